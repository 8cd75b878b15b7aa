#pragma once

// How attention is cut into tasks (see attend.cpp), and what lies where in the work buffer.

#include "attend-tile.h"

namespace indexmem_cpu {

constexpr int64_t ROWS  = 96;  // queries of a block
constexpr int64_t FEW   = 2*indexmem_simd::TILE; // up to so many, K and V are converted in registers
constexpr int64_t TASKS = 192; // no need for more
constexpr int64_t TASKS_ALONE = 32; // of a sequence among many: what tasks leave takes memory
constexpr int64_t MUCH  = 96;  // queries times chunks for each thread

struct attend_shape {
    int64_t n_embd_k;
    int64_t n_embd_v;
    int64_t n_kv;
    int64_t n_tokens;
    int64_t n_group;
    int64_t n_stream;
    int64_t n_mask; // streams of the mask

    int64_t wide_k; // row lengths in the kernels
    int64_t wide_v;
    int64_t n_rows; // queries of a stream
    int64_t n_blocks;
    int64_t n_rows_block;
    int64_t n_chunks;
    int64_t span; // chunks
    int64_t n_spans;

    bool alone; // no token may get other bits because of others

    explicit attend_shape(const ggml_tensor * op) :
        n_embd_k(op->src[1]->ne[0]), n_embd_v(op->src[2]->ne[0]), n_kv(op->src[1]->ne[1]),
        n_tokens(op->src[0]->ne[1]), n_group(op->src[0]->ne[2]), n_stream(op->src[0]->ne[3]), n_mask(op->src[3]->ne[3]) {
        wide_k       = GGML_PAD(n_embd_k, HALF);
        wide_v       = GGML_PAD(n_embd_v, HALF);
        n_rows       = n_tokens*n_group;
        n_blocks     = (n_rows + ROWS - 1)/ROWS;
        n_rows_block = std::min(n_rows, ROWS);
        n_chunks     = (n_kv + CHUNK - 1)/CHUNK;
        // how many keys there are, and how many sequences, depends on what else is in the batch. Each has tasks enough by itself.
        const int64_t n_entries = ggml_get_op_params_i32(op, INDEXMEM_PARAM_ALONE);
        const int64_t n_seq     = ggml_get_op_params_i32(op, INDEXMEM_PARAM_SEQS);
        alone        = n_entries > 0;
        span         = std::max<int64_t>(1, alone ? n_entries/CHUNK/std::max(2*TASKS/n_seq, TASKS_ALONE) : n_stream*n_blocks*n_chunks/TASKS);
        n_spans      = (n_chunks + span - 1)/span;
    }

    int64_t n_parts() const { return n_stream*n_blocks*n_spans*n_rows_block; }
};

// what a task leaves of a query
struct attend_stat {
    float max;
    float sum;
};

// the work buffer: what tasks leave, then the scratch of this thread
struct attend_work {
    attend_stat * stats;   // [stream][block][span][row]
    float       * parts;   // the same, [wide_v] each

    int32_t     * visible; // [n_mask][n_blocks] keys up to the last that a query of the block sees
    float       * q;       // [TILE][wide_k]
    float       * k;       // [CHUNK][wide_k]
    float       * k_many;  // the same, the other way around: [wide_k][CHUNK]
    float       * v;       // [CHUNK][wide_v]
    float       * bias;    // [token of the block][CHUNK]
    float       * top;     // [CHUNK] the largest bias
    float       * logs;    // [CHUNK] of the counts
    float       * logits;  // [query of the block, or of a tile if they are few][CHUNK]

    size_t size_shared;
    size_t size_thread;

    attend_work(const attend_shape & sh, void * data, int ith) {
        char * base = (char *) data;
        size_t used = 0;
        const auto take = [&](auto *& p, int64_t n) {
            p = (std::remove_reference_t<decltype(p)>) (base ? base + used : nullptr); // without data, only sizes are asked for
            used += align_up(n*sizeof(*p));
        };
        take(stats, sh.n_parts());
        take(parts, sh.n_parts()*sh.wide_v);
        size_shared = used;

        size_thread = 0; // filled in below
        const auto fill = [&] {
            take(visible, sh.n_mask*sh.n_blocks);
            take(q,       indexmem_simd::TILE*sh.wide_k);
            take(k,       CHUNK*sh.wide_k);
            take(k_many,  sh.n_rows_block > FEW ? CHUNK*sh.wide_k : 0);
            take(v,       CHUNK*sh.wide_v);
            take(bias,    (std::min(sh.n_tokens, ROWS) + 1)*CHUNK);
            take(top,     CHUNK);
            take(logs,    CHUNK);
            take(logits,  sh.n_rows_block*CHUNK);
        };
        fill();
        size_thread = used - size_shared;
        used = size_shared + ith*size_thread;
        fill();
    }
};

} // namespace indexmem_cpu
