#include "policy.h"

#include <algorithm>

// Expected Attention (arXiv 2510.00636): what queries to come will look at, if they are like the latest ones, each as it would be on
// average from later positions (indexmem-ahead.h: that is done before this op).
//
// Rank = the logit that such a query gives on average: the product of the key with the mean of the latest queries of the group. How
// far single queries lie from their mean is left out, and so is a soft cap: docs/design.md says why.
void indexmem_rank_expected(indexmem_ranking & ranking) {
    const auto & sh = ranking.shape();

    ranking.each_head([&](const indexmem_rank_head & h) {
        const indexmem_rank_queries queries(sh, h);
        float * mean = h.scratch;
        std::fill_n(mean, sh.n_embd, 0.0f);
        for (int64_t i = 0; i < queries.n; ++i) {
            const float * q = sh.query(h, queries.group(i), queries.position(i));
            for (int64_t d = 0; d < sh.n_embd; ++d) {
                mean[d] += q[d];
            }
        }
        for (int64_t d = 0; d < sh.n_embd; ++d) {
            mean[d] *= sh.scale/(float) queries.n;
        }
    });

    ranking.each_chunk([](const indexmem_rank_chunk & c) {
        float logit[INDEXMEM_RANK_CHUNK];
        c.dots(c.head.scratch, logit);
        std::copy_n(logit, c.n, c.rank);
    });
}
