#pragma once

// The tiles of AMX, made ready for the products of ggml-cpu/amx/mmq.cpp. Included where AMX may be absent, too.

#if defined(__AMX_INT8__) && defined(__AVX512VNNI__)

#include <immintrin.h>

#include <cstdint>

#if defined(__linux__)
#    include <sys/syscall.h>
#    include <unistd.h>
#endif

// What LDTILECFG reads. The eight tiles of mmq.cpp: B in 0 and 1, A in 2 and 3, C in 4 to 7 (its comment has the shapes).
struct indexmem_amx_config {
    uint8_t  palette;
    uint8_t  start_row;
    uint8_t  reserved[14];
    uint16_t row_bytes[16];
    uint8_t  rows[16];
};
static_assert(sizeof(indexmem_amx_config) == 64, "the instruction reads 64 bytes");

// Constant data: _tile_loadconfig of GCC before 12.4 and 13.3 tells the compiler of 8 of its bytes only, so stores to a
// variable would be dropped.
alignas(64) static constexpr indexmem_amx_config indexmem_amx_tiles = {
    1, 0, {}, { 64, 64, 32, 32, 64, 64, 64, 64 }, { 8, 8, 16, 16, 16, 16, 16, 16 },
};

// At the start of every product, in every thread that computes it: other libraries configure and release the tiles of a
// thread, too.
inline void indexmem_amx_begin() {
#if defined(__linux__)
    // Linux gives a process the tiles on request. ggml asks when it looks for AMX; a thread asks again, once.
    constexpr long ARCH_REQ_XCOMP_PERM_ = 0x1023, XFEATURE_XTILEDATA_ = 18;
    static thread_local const long asked = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM_, XFEATURE_XTILEDATA_);
    (void) asked;
#endif
    _tile_loadconfig(&indexmem_amx_tiles);
}

#endif
