#pragma once

// The products of a chunk of keys with many queries, for who wants all of them and nothing else of the keys. A lane is a query, so
// that sums and maxima over the keys are no affair of lanes. Keys need not lie the other way around: the values of a few, converted
// into a buffer of a few lines, serve all lanes one after the other.

#include "attend-tile.h"

namespace indexmem_cpu {

// Vectors of queries, and keys worked on at once: their accumulators fit into the registers.
constexpr int     LANE_VECS = indexmem_simd::WIDTH >= 16 ? 2 : 4;
constexpr int     LANE_KEYS = indexmem_simd::WIDTH >= 16 ? 8 : indexmem_simd::MANY;
constexpr int64_t LANES     = LANE_VECS*indexmem_simd::WIDTH;

// out[j*LANES + l] = query l . key j, for n keys; `columns` is [n_embd][LANES], n_embd a multiple of HALF
template <typename From>
void attend_dots_lanes(const attend_rows & k, int64_t n, int64_t n_embd, const float * columns, float * out, const attend_ahead & next) {
    using namespace indexmem_simd;

    for (int64_t j = 0; j < n; j += LANE_KEYS) {
        for (int i = 0; i < LANE_KEYS; ++i) {
            next.fetch(j + i);
        }
        const char * row[LANE_KEYS];
        vec          acc[LANE_KEYS][LANE_VECS];
        for (int i = 0; i < LANE_KEYS; ++i) {
            row[i] = k.row(std::min(j + i, n - 1));
            for (int v = 0; v < LANE_VECS; ++v) {
                acc[i][v] = zero();
            }
        }
        attend_blocks(n_embd, [&](int64_t d, auto size) {
            constexpr int64_t N = decltype(size)::value;
            float keys[LANE_KEYS][N];
            for (int i = 0; i < LANE_KEYS; ++i) {
                const vec scale = From::scale(row[i], d);
                for (int64_t b = 0; b < N; b += WIDTH) {
                    store(keys[i] + b, From::at(row[i], d, b, scale));
                }
            }
            const float * column = columns + d*LANES;
            for (int64_t b = 0; b < N; ++b, column += LANES) {
                vec y[LANE_VECS];
                for (int v = 0; v < LANE_VECS; ++v) {
                    y[v] = load(column + v*WIDTH);
                }
                for (int i = 0; i < LANE_KEYS; ++i) {
                    const vec x = set1(keys[i][b]);
                    for (int v = 0; v < LANE_VECS; ++v) {
                        acc[i][v] = mul_add(acc[i][v], x, y[v]);
                    }
                }
            }
        });
        for (int i = 0; i < LANE_KEYS && j + i < n; ++i) {
            for (int v = 0; v < LANE_VECS; ++v) {
                store(out + (j + i)*LANES + v*WIDTH, acc[i][v]);
            }
        }
    }
}

} // namespace indexmem_cpu
