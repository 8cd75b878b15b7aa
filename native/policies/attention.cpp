#include "attention.h"

#include "attend-lanes.h"

#include <algorithm>

// Attention of the latest queries, for the policies that look at it: tova, snapkv.

using namespace indexmem_cpu;

// At least half of the lanes have something to do.
static bool many(const indexmem_rank_shape & sh) {
    return 2*sh.n_group*sh.n_queries > LANES;
}

size_t indexmem_rank_attention_scratch(const indexmem_rank_shape & shape) {
    if (shape.attended) {
        return 0;
    }
    return many(shape) ? rank_attention_many_scratch(shape) : rank_attention_few_scratch(shape);
}

void indexmem_rank_attention(indexmem_ranking & ranking, const indexmem_ranking::of_head & aside) {
    if (ranking.shape().attended) {
        if (aside) {
            ranking.each_head_aside(aside);
        }
        ranking.each_chunk([](const indexmem_rank_chunk & c) { std::copy_n(c.head.attention + c.i0, c.n, c.rank); });
        return;
    }
    (many(ranking.shape()) ? rank_attention_many : rank_attention_few)(ranking, aside);
}
