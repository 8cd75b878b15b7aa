#include "policy.h"

#include <algorithm>

// Rank = attention received from the last queries, mean over queries and the group, then smoothed: the mean over the
// entry and its three neighbours on each side in position order (fewer at the ends).
void indexmem_rank_snapkv(const indexmem_rank_view & view, float * rank) {
    constexpr int64_t reach = 3;

    const int64_t n = view.n;

    float   * prob  = view.scratch;                   // [n]
    int32_t * order = (int32_t *) (view.scratch + n); // [n] entries by position

    for (int64_t i = 0; i < n; ++i) {
        rank[i]  = 0.0f;
        order[i] = (int32_t) i;
    }

    const int32_t p0 = std::max(0, view.pos_last + 1 - view.n_queries);
    const float weight = 1.0f/(float) (view.n_group*(view.pos_last + 1 - p0));
    for (int64_t g = 0; g < view.n_group; ++g) {
        for (int32_t p = p0; p <= view.pos_last; ++p) {
            indexmem_attention_row(view, g, p, prob);
            for (int64_t i = 0; i < n; ++i) {
                rank[i] += prob[i]*weight;
            }
        }
    }

    std::sort(order, order + n, [&](int32_t a, int32_t b) { return view.pos[a] < view.pos[b]; });

    std::copy(rank, rank + n, prob);
    for (int64_t i = 0; i < n; ++i) {
        const int64_t lo = std::max<int64_t>(0,     i - reach);
        const int64_t hi = std::min<int64_t>(n - 1, i + reach);
        float sum = 0.0f;
        for (int64_t j = lo; j <= hi; ++j) {
            sum += prob[order[j]];
        }
        rank[order[i]] = sum/(float) (hi - lo + 1);
    }
}
