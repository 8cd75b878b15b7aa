#include "policy.h"

// Rank = attention received from the newest query, mean over the query heads of the group.
void indexmem_rank_tova(const indexmem_rank_view & view, float * rank) {
    float * prob = view.scratch; // [n]

    for (int64_t i = 0; i < view.n; ++i) {
        rank[i] = 0.0f;
    }
    for (int64_t g = 0; g < view.n_group; ++g) {
        indexmem_attention_row(view, g, view.pos_last, prob);
        for (int64_t i = 0; i < view.n; ++i) {
            rank[i] += prob[i]/(float) view.n_group;
        }
    }
}
