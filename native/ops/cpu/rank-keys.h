#pragma once

// How ranks read the keys of a chunk: as they lie in the cache, converted in registers by the kernels of attention, or converted
// beforehand where a type or a size has no such kernels.

#include "attend-many.h"
#include "policy.h"

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

} // namespace indexmem_cpu
