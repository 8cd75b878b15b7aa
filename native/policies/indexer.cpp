#include "policy.h"

// Rank of the entry at position j when the newest position is i: m + pos_slope*j + lambda*(i - j)/age_scale. Without a
// retention rate the last part is missing, and indexers other than the retention scorer have a slope of 0.
void indexmem_rank_indexer(const indexmem_rank_view & view, float * rank) {
    const float rate = 1.0f/view.age_scale;

    for (int64_t i = 0; i < view.n; ++i) {
        const float * term = (const float *) (view.terms + i*view.nb_term);
        rank[i] = term[0] + view.pos_slope*(float) view.pos[i];
        if (view.n_terms > 1) {
            rank[i] += term[1]*((float) (view.pos_last - view.pos[i])*rate);
        }
    }
}
