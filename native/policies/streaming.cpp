#include "policy.h"

// Rank = position. Exact in fp32 up to 2^24 and monotonic beyond; ties there would evict the later position, which the
// protected window keeps far from the cut.
void indexmem_rank_streaming(const indexmem_rank_view & view, float * rank) {
    for (int64_t i = 0; i < view.n; ++i) {
        rank[i] = (float) view.pos[i];
    }
}
