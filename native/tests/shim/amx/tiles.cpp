#include "tiles.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace software_tiles {

namespace {

// of palette 1
constexpr int MAX_TILES = 8, MAX_ROWS = 16, ROW_BYTES = 64;

struct tile {
    int     rows, colsb;
    uint8_t bytes[MAX_ROWS][ROW_BYTES];
};

struct registers {
    bool configured;
    int  start_row;
    uint8_t config[CONFIG_SIZE]; // as it was loaded
    tile tiles[MAX_TILES];
};

thread_local registers state;

std::atomic<bool> granted{ false };

[[noreturn]] void fault(const char * instruction, const char * why) {
    fprintf(stderr, "%s faults: %s\n", instruction, why);
    abort();
}

void expect(bool fine, const char * instruction, const char * why) {
    if (!fine) {
        fault(instruction, why);
    }
}

tile & use(int i, const char * instruction) {
    expect(granted,                    instruction, "the process has not asked for the tiles");
    expect(state.configured,           instruction, "no tiles are configured in this thread");
    expect(i >= 0 && i < MAX_TILES,    instruction, "there is no such tile");
    expect(state.tiles[i].rows != 0,   instruction, "the tile has no rows in this configuration");
    return state.tiles[i];
}

// what is beyond the rows and bytes of a tile is zero after every instruction that writes it
void clear(tile & t) {
    memset(t.bytes, 0, sizeof(t.bytes));
}

template <typename A, typename B>
void dot(const char * instruction, int ic, int ia, int ib) {
    expect(ic != ia && ic != ib && ia != ib, instruction, "the tiles are not three different ones");
    tile & c = use(ic, instruction);
    tile & a = use(ia, instruction);
    tile & b = use(ib, instruction);
    expect(c.colsb % 4 == 0 && a.colsb % 4 == 0 && b.colsb % 4 == 0, instruction, "rows are not whole groups of four bytes");
    expect(c.rows == a.rows && c.colsb == b.colsb && a.colsb/4 == b.rows, instruction, "the shapes do not match");

    const tile before = c;
    clear(c);
    for (int m = 0; m < c.rows; ++m) {
        for (int n = 0; n < c.colsb/4; ++n) {
            int32_t start;
            memcpy(&start, &before.bytes[m][4*n], sizeof(start));
            uint32_t sum = (uint32_t) start; // wraps around
            for (int k = 0; k < a.colsb/4; ++k) {
                for (int i = 0; i < 4; ++i) {
                    sum += (uint32_t) ((int32_t) (A) a.bytes[m][4*k + i]*(int32_t) (B) b.bytes[k][4*n + i]);
                }
            }
            memcpy(&c.bytes[m][4*n], &sum, sizeof(sum));
        }
    }
    state.start_row = 0;
}

} // namespace

void load_config(const void * config) {
    uint8_t bytes[CONFIG_SIZE];
    memcpy(bytes, config, sizeof(bytes));

    if (bytes[PALETTE] == 0) {
        release();
        return;
    }
    expect(bytes[PALETTE] == 1, "LDTILECFG", "there is no such palette");
    for (int i = 2; i < COLSB; ++i) {
        expect(bytes[i] == 0, "LDTILECFG", "a reserved byte is not zero");
    }
    registers next = {};
    next.configured = true;
    next.start_row  = bytes[START_ROW];
    memcpy(next.config, bytes, sizeof(bytes));
    for (int i = 0; i < 16; ++i) {
        uint16_t colsb;
        memcpy(&colsb, bytes + COLSB + i*sizeof(colsb), sizeof(colsb));
        const int rows = bytes[ROWS + i];
        if (i >= MAX_TILES) {
            expect(colsb == 0 && rows == 0, "LDTILECFG", "it has more tiles than the palette");
            continue;
        }
        expect(colsb <= ROW_BYTES && rows <= MAX_ROWS, "LDTILECFG", "a tile is larger than those of the palette");
        expect((colsb == 0) == (rows == 0),            "LDTILECFG", "a tile has rows of no bytes, or no rows");
        next.tiles[i].rows  = rows;
        next.tiles[i].colsb = colsb;
    }
    state = next;
}

void store_config(void * config) {
    state.config[START_ROW] = (uint8_t) state.start_row;
    memcpy(config, state.config, sizeof(state.config));
}

void release() {
    state = {};
}

void zero(int i) {
    clear(use(i, "TILEZERO"));
    state.start_row = 0;
}

void load(int i, const void * base, size_t stride) {
    tile & t = use(i, "TILELOADD");
    if (state.start_row == 0) {
        clear(t);
    }
    for (int r = state.start_row; r < t.rows; ++r) {
        memcpy(t.bytes[r], (const char *) base + r*stride, t.colsb);
    }
    state.start_row = 0;
}

void store(int i, void * base, size_t stride) {
    const tile & t = use(i, "TILESTORED");
    for (int r = state.start_row; r < t.rows; ++r) {
        memcpy((char *) base + r*stride, t.bytes[r], t.colsb);
    }
    state.start_row = 0;
}

void dot_ss(int c, int a, int b) { dot<int8_t,  int8_t >("TDPBSSD", c, a, b); }
void dot_su(int c, int a, int b) { dot<int8_t,  uint8_t>("TDPBSUD", c, a, b); }
void dot_us(int c, int a, int b) { dot<uint8_t, int8_t >("TDPBUSD", c, a, b); }
void dot_uu(int c, int a, int b) { dot<uint8_t, uint8_t>("TDPBUUD", c, a, b); }

long grant(long number, long code, long feature) {
#if defined(__linux__)
    constexpr long ARCH_REQ_XCOMP_PERM_ = 0x1023, XFEATURE_XTILEDATA_ = 18;
    if (number != SYS_arch_prctl || code != ARCH_REQ_XCOMP_PERM_ || feature != XFEATURE_XTILEDATA_) {
        return -1;
    }
#endif
    granted = true;
    return 0;
}

} // namespace software_tiles
