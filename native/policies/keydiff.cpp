#include "policy.h"

#include <algorithm>
#include <cmath>

// Rank = minus the cosine of the key and the mean of the normalised keys now in the cache. A zero key has cosine 0.
void indexmem_rank_keydiff(indexmem_ranking & ranking) {
    const int64_t D = ranking.shape().n_embd;

    // The cosine does not depend on the length of the mean: the sum serves as well. Scratch: the sum, then that of each chunk.
    const auto sum_of = [D](const indexmem_rank_chunk & c) { return c.head.scratch + (1 + c.index())*D; };

    // for now the rank is the length of the key
    ranking.each_chunk([&](const indexmem_rank_chunk & c) {
        float rate[INDEXMEM_RANK_CHUNK];
        c.squares(rate);
        for (int64_t i = 0; i < c.n; ++i) {
            c.rank[i] = std::sqrt(rate[i]);
            rate[i]   = c.rank[i] > 0.0f ? 1.0f/c.rank[i] : 0.0f;
        }
        std::fill_n(sum_of(c), D, 0.0f);
        c.add(rate, sum_of(c));
    });

    ranking.each_head([&](const indexmem_rank_head & h) {
        float * sum = h.scratch;
        std::fill_n(sum, D, 0.0f);
        for (int64_t c = 0; c < h.n_chunks(); ++c) {
            for (int64_t d = 0; d < D; ++d) {
                sum[d] += h.scratch[(1 + c)*D + d];
            }
        }
    });

    ranking.each_chunk([&](const indexmem_rank_chunk & c) {
        const float * sum = c.head.scratch;
        float square = 0.0f;
        for (int64_t d = 0; d < D; ++d) {
            square += sum[d]*sum[d];
        }
        const float length = std::sqrt(square);

        float dot[INDEXMEM_RANK_CHUNK];
        c.dots(sum, dot);
        for (int64_t i = 0; i < c.n; ++i) {
            const float both = c.rank[i]*length;
            c.rank[i] = both > 0.0f ? -dot[i]/both : 0.0f;
        }
    });
}
