#include "policy.h"

// Rank of the entry at position j when the newest position is i: m + pos_slope*j + lambda*(i - j)/age_scale. Without a
// retention rate the last part is missing, and indexers other than the retention scorer have a slope of 0.
void indexmem_rank_indexer(indexmem_ranking & ranking) {
    const auto & shape = ranking.shape();
    const float  rate  = 1.0f/shape.age_scale;

    ranking.each_chunk([&](const indexmem_rank_chunk & c) {
        int32_t pos[INDEXMEM_RANK_CHUNK];
        c.positions(pos);
        for (int64_t i = 0; i < c.n; ++i) {
            const float * term = (const float *) (c.head.terms + (c.i0 + i)*shape.nb_term);
            c.rank[i] = term[0] + shape.pos_slope*(float) pos[i];
            if (shape.n_terms > 1) {
                c.rank[i] += term[1]*((float) (c.head.pos_last - pos[i])*rate);
            }
        }
    });
}
