#pragma once

// The tiles of AMX in software, for CPUs that have none. Included before all else (-include): what a source says with the
// intrinsics of tiles is done by tiles.cpp then, and where the CPU would fault, the program ends and says why.
//
// After "Intel 64 and IA-32 Architectures Software Developer's Manual", LDTILECFG, STTILECFG, TILELOADD, TILESTORED, TDPBSSD, ...

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#    include <sys/syscall.h>
#    include <unistd.h>
#endif

namespace software_tiles {

// the 64 bytes of LDTILECFG, by their places in the manual
constexpr int PALETTE = 0, START_ROW = 1, COLSB = 16, ROWS = 48, CONFIG_SIZE = 64;

void load_config(const void * config);
void store_config(void * config);
void release();
void zero (int tile);
void load (int tile, const void * base, size_t stride);
void store(int tile, void * base, size_t stride);

// signed bytes of both; unsigned ones of the first, of the second or of both
void dot_ss(int c, int a, int b);
void dot_us(int c, int a, int b);
void dot_su(int c, int a, int b);
void dot_uu(int c, int a, int b);

// arch_prctl: Linux grants the use of tiles to a process that asks for it
long grant(long number, long code, long feature);

} // namespace software_tiles

#undef _tile_loadconfig
#undef _tile_storeconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbssd
#undef _tile_dpbsud
#undef _tile_dpbusd
#undef _tile_dpbuud
#define _tile_loadconfig(config)        software_tiles::load_config(config)
#define _tile_storeconfig(config)       software_tiles::store_config(config)
#define _tile_release()                 software_tiles::release()
#define _tile_zero(tile)                software_tiles::zero(tile)
#define _tile_loadd(tile, base, stride) software_tiles::load (tile, base, stride)
#define _tile_stored(tile, base, stride) software_tiles::store(tile, base, stride)
#define _tile_dpbssd(c, a, b)           software_tiles::dot_ss(c, a, b)
#define _tile_dpbsud(c, a, b)           software_tiles::dot_su(c, a, b)
#define _tile_dpbusd(c, a, b)           software_tiles::dot_us(c, a, b)
#define _tile_dpbuud(c, a, b)           software_tiles::dot_uu(c, a, b)
#define syscall(number, code, feature)  software_tiles::grant(number, code, feature)

#ifndef __AMX_INT8__
#    define __AMX_INT8__ 1
#endif
#ifndef __AMX_TILE__
#    define __AMX_TILE__ 1
#endif
