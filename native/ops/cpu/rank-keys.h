#pragma once

// How ranks read the keys of a chunk: as they lie in the cache, converted in registers by the kernels of attention, or converted
// beforehand where a type or a size has no such kernels.

#include "attend-many.h"
#include "policy.h"

#include <array>

static_assert(INDEXMEM_RANK_CHUNK == indexmem_cpu::CHUNK, "a chunk of ranks is one of attention");

struct indexmem_rank_thread {
    float * keys;    // [CHUNK][wide] converted
    float * columns; // [wide][CHUNK] the same, the other way around; if there are many queries
    float * rows;    // [TILE][wide] of queries
};

namespace indexmem_cpu {

inline int64_t rank_wide(const indexmem_rank_shape & sh) { return GGML_PAD(sh.n_embd, HALF); }

struct rank_keys {
    attend_rows  rows;
    ggml_type    type; // of the rows
    attend_ahead next;

    explicit rank_keys(const indexmem_rank_chunk & c) {
        const ggml_tensor * k    = c.shape.k;
        const int64_t       wide = rank_wide(c.shape);

        rows = { c.head.k + c.i0*k->nb[1], k->nb[1] };
        type = k->type;
        next = { { rows.row(CHUNK), k->nb[1] }, std::min(CHUNK, c.head.n - c.i0 - CHUNK) };
        if (wide == c.shape.n_embd && attend_kernels_of(type)) {
            return;
        }
        for (int64_t i = 0; i < c.n; ++i) {
            float * row = c.thread.keys + i*wide;
            to_f32(type, rows.row(i), row, c.shape.n_embd);
            std::fill(row + c.shape.n_embd, row + wide, 0.0f);
        }
        rows = { (const char *) c.thread.keys, wide*sizeof(float) };
        type = GGML_TYPE_F32;
    }

    const attend_kernels & kernels() const { return *attend_kernels_of(type); }
};

// Products of n queries with the keys of a chunk, [n][CHUNK]; query(i): their values.
template <typename Query>
void rank_products(const indexmem_rank_chunk & c, int64_t n, Query query, float * out) {
    using namespace indexmem_simd;

    const rank_keys keys(c);
    const int64_t   n_embd = c.shape.n_embd;
    const int64_t   wide   = rank_wide(c.shape);

    if (n <= 2*TILE) {
        for (int64_t i = 0; i < n; i += TILE) {
            const int n_tile = (int) std::min<int64_t>(TILE, n - i);
            const float * q[TILE];
            for (int j = 0; j < n_tile; ++j) {
                q[j] = query(i + j);
                if (wide != n_embd) {
                    float * row = c.thread.rows + j*wide;
                    std::copy(q[j], q[j] + n_embd, row);
                    std::fill(row + n_embd, row + wide, 0.0f);
                    q[j] = row;
                }
            }
            keys.kernels().dots[n_tile](q, keys.rows, c.n, wide, out + i*CHUNK, i == 0 ? keys.next : attend_ahead());
        }
        return;
    }
    static const std::array<float, CHUNK> seen = {}; // all keys
    attend_with(keys.type, [&](auto from) {
        attend_convert_columns<decltype(from)>(keys.rows, c.n, wide, seen.data(), c.thread.columns);
    });
    int64_t fetched = 0;
    for (int64_t i = 0; i < n; i += MANY) {
        const int n_tile = (int) std::min<int64_t>(MANY, n - i);
        const float * q[MANY];
        for (int j = 0; j < n_tile; ++j) {
            q[j] = query(i + j);
        }
        attend_kernels_many_of(n_tile).dots(q, c.thread.columns, c.n, n_embd, out + i*CHUNK);
        for (const int64_t upto = CHUNK*(i + n_tile)/n; fetched < upto; ++fetched) {
            keys.next.fetch(fetched);
        }
    }
}

} // namespace indexmem_cpu
