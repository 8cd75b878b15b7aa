#include "rank-keys.h"

#include <algorithm>

// Expected Attention (arXiv 2510.00636). The queries to come are taken for draws from a normal distribution, whose mean and covariance
// are those of the latest queries, each as it would be on average from later positions (indexmem-ahead.h: that is done before this op).
// The logit of a key is normal, too, and the expectation of its exponential is e^(mean + variance/2).
//
// Rank = the logarithm of that, mean over the query heads of the group. Mean and variance are taken of the logits of the latest
// queries, which costs less than the products with a covariance of [n_embd][n_embd].

using namespace indexmem_cpu;

void indexmem_rank_expected(indexmem_ranking & ranking) {
    ranking.each_chunk([](const indexmem_rank_chunk & c) {
        const auto  & sh = c.shape;
        const int32_t p0 = sh.query_first(c.head);
        const int64_t n  = c.head.pos_last + 1 - p0;

        float logits[INDEXMEM_MAX_QUERIES*CHUNK];
        float rank[CHUNK] = {};
        for (int64_t g = 0; g < sh.n_group; ++g) {
            rank_products(c, n, [&](int64_t i) { return sh.query(c.head, g, p0 + (int32_t) i); }, logits);

            float mean[CHUNK]   = {};
            float square[CHUNK] = {}; // of the distances from it, added up
            for (int64_t q = 0; q < n; ++q) {
                float * l = logits + q*CHUNK;
                if (sh.softcap != 0.0f) {
                    attend_cap(l, c.n, sh.scale, sh.softcap);
                }
                const float factor = sh.softcap != 0.0f ? 1.0f : sh.scale;
                for (int64_t i = 0; i < c.n; ++i) {
                    l[i]    *= factor;
                    mean[i] += l[i];
                }
            }
            for (int64_t i = 0; i < c.n; ++i) {
                mean[i] /= (float) n;
            }
            for (int64_t q = 0; q < n; ++q) {
                for (int64_t i = 0; i < c.n; ++i) {
                    const float distance = logits[q*CHUNK + i] - mean[i];
                    square[i] += distance*distance;
                }
            }
            for (int64_t i = 0; i < c.n; ++i) {
                rank[i] += mean[i] + 0.5f*square[i]/(float) n;
            }
        }
        for (int64_t i = 0; i < c.n; ++i) {
            c.rank[i] = rank[i]/(float) sh.n_group;
        }
    });
}
