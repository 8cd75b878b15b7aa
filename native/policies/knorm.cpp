#include "policy.h"

#include <cmath>

// Rank = minus the L2 norm of the key. Rotations of the key (RoPE, Hadamard) leave it as it is.
void indexmem_rank_knorm(indexmem_ranking & ranking) {
    ranking.each_chunk([](const indexmem_rank_chunk & c) {
        float square[INDEXMEM_RANK_CHUNK];
        c.squares(square);
        for (int64_t i = 0; i < c.n; ++i) {
            c.rank[i] = -std::sqrt(square[i]);
        }
    });
}
