#include "policy.h"
#include "policy-math.h"

#include <cmath>

// Rank = minus the cosine of the key and the mean of the normalised keys now in the cache. A zero key has cosine 0.
void indexmem_rank_keydiff(const indexmem_rank_view & view, float * rank) {
    const int64_t D = view.n_embd;

    // the cosine does not depend on the length of the mean: the sum serves as well
    float * sum  = view.scratch;     // [D]
    float * norm = view.scratch + D; // [n]

    for (int64_t d = 0; d < D; ++d) {
        sum[d] = 0.0f;
    }
    for (int64_t i = 0; i < view.n; ++i) {
        const float * k = view.k + i*D;
        norm[i] = std::sqrt(indexmem_dot(k, k, D));
        if (norm[i] > 0.0f) {
            ggml_vec_mad_f32((int) D, sum, k, 1.0f/norm[i]);
        }
    }

    const float norm_sum = std::sqrt(indexmem_dot(sum, sum, D));

    for (int64_t i = 0; i < view.n; ++i) {
        const float len = norm[i]*norm_sum;
        rank[i] = len > 0.0f ? -indexmem_dot(view.k + i*D, sum, D)/len : 0.0f;
    }
}
