#include "policy.h"

#include <algorithm>

// Nothing is ever evicted under this policy, so all entries rank the same.
void indexmem_rank_full(indexmem_ranking & ranking) {
    ranking.each_chunk([](const indexmem_rank_chunk & c) { std::fill(c.rank, c.rank + c.n, 0.0f); });
}
