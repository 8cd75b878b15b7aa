#include "policy.h"

// Rank = attention received from the newest query, mean over the query heads of the group.
void indexmem_rank_tova(indexmem_ranking & ranking) {
    indexmem_rank_attention(ranking);
}
