#pragma once

// The two ways to the ranks of indexmem_rank_attention(), by how many queries a head is asked by at once. In the first one lanes
// are entries, and what is there for one query is done; in the second one lanes are queries.

#include "policy.h"

namespace indexmem_cpu {

void rank_attention_few (indexmem_ranking & ranking, const indexmem_ranking::of_head & aside);
void rank_attention_many(indexmem_ranking & ranking, const indexmem_ranking::of_head & aside);

// of a head, in floats
size_t rank_attention_few_scratch (const indexmem_rank_shape & shape);
size_t rank_attention_many_scratch(const indexmem_rank_shape & shape);

} // namespace indexmem_cpu
