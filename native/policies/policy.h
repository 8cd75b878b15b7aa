#pragma once

// What a policy sees and returns: ranks of the entries of one KV head of one sequence.
//
// Invariants
//   - a rank is a pure function of the view: same view, same ranks, whatever the thread or the number of threads
//   - higher ranks stay; ties are broken later, by position (selection, not the policy)
//   - entries are in slot order, which is not position order

#include <cstddef>
#include <cstdint>

constexpr int INDEXMEM_MAX_QUERIES = 32;

struct indexmem_rank_view {
    int64_t n;              // entries now in the cache, those of the current ubatch included
    int64_t n_embd;         // head size of the keys

    const int32_t * pos;    // [n]          position of each entry
    const float   * k;      // [n][n_embd]  cached (post-RoPE) keys, null unless the policy needs them

    // queries of the group, null unless the policy needs them:  query(g, p)  for positions p in (pos_last - n_queries, pos_last]
    const char * q;
    int64_t      n_group;   // query heads that share this KV head
    int64_t      n_ring;    // the query of position p is in ring row p % n_ring
    size_t       nb_ring;   // bytes between ring rows
    size_t       nb_head;   // bytes between query heads
    const float * sinks;    // [n_group] a logit of each query head whose attention goes nowhere, null: none
    int32_t      n_queries;
    int32_t      pos_last;  // position of the newest entry

    // what the indexer of a sidecar says of each entry, null unless the policy is `indexer`
    const char * terms;     // [n][n_terms] floats
    size_t       nb_term;   // bytes between entries
    int32_t      n_terms;   // 1, or 2 with a retention rate
    float        pos_slope;
    float        age_scale;

    float scale;            // of the attention logits
    float softcap;          // of the attention logits, 0 = none

    uint64_t seed;
    int32_t  il;            // layer of the model
    int32_t  head;          // KV head

    float * scratch;        // [2*n + n_embd] for the policy's own use

    const float * query(int64_t g, int32_t p) const {
        return (const float *) (q + (p % n_ring)*nb_ring + g*nb_head);
    }
};

// writes rank[n]
typedef void (*indexmem_rank_t)(const indexmem_rank_view & view, float * rank);

// Attention that query (g, p) gives to every entry it may see (position <= p), as probabilities over the entries now in
// the cache and the sink; 0 for the others. prob[n].
void indexmem_attention_row(const indexmem_rank_view & view, int64_t g, int32_t p, float * prob);

#define INDEXMEM_POLICY(name, needs_keys, n_queries, help) \
    void indexmem_rank_##name(const indexmem_rank_view & view, float * rank);
#include "policies.def"
#undef INDEXMEM_POLICY
