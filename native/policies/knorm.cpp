#include "policy.h"
#include "policy-math.h"

#include <cmath>

// Rank = minus the L2 norm of the key. Rotations of the key (RoPE, Hadamard) leave it as it is.
void indexmem_rank_knorm(const indexmem_rank_view & view, float * rank) {
    for (int64_t i = 0; i < view.n; ++i) {
        const float * k = view.k + i*view.n_embd;
        rank[i] = -std::sqrt(indexmem_dot(k, k, view.n_embd));
    }
}
