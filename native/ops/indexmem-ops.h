#pragma once

// The ggml op of the bounded cache. One op code, GGML_OP_INDEXMEM, with the kind in op_params[0], so that a backend
// needs one line of dispatch.
//
//   retention hidden -> state       a retention scorer for a few tokens, on the CPU; elsewhere, and for many, a graph
//   pairwise indexer state -> terms what the latest queries of a pairwise indexer say of every entry
//   rank     cache, terms -> ranks  which entries matter, by policy
//   select   ranks -> plan          who leaves, and which survivors move into the holes
//   centroid plan, cache -> memory  writes what leaves into the slots of a centroid memory, in place
//   residual plan, cache -> memory  writes what leaves into the matrix of a residual memory, in place
//   compact  plan  -> cache         moves rows as bytes, in place; or the position table
//   moves    plan  -> row indices   the moves of a plan for ops of ggml, on the CPU: where a device has no kernel of ours
//   ages     positions -> numbers   how far back entries lie, for ops of ggml, on the CPU: likewise
//   attended attention -> ranks     the rank of a policy from attention that ops of ggml computed, on the CPU: likewise
//   bias     mask, counts -> mask   a mask for each KV head, with the biases of its latent slots
//   attend   q, cache -> output     attention on the CPU; elsewhere ggml_flash_attn_ext
//
// Shapes (H KV heads, S sequences of the ubatch, n_slots slots, T tokens a sequence):
//   k, v    any type  [n_embd, n_slots, H, S]
//   pos     I32       [n_slots, H, S]       positions of slots [0, n_fixed); later slots hold consecutive positions
//   ctl     I32       [INDEXMEM_CTL_SIZE, S] what the host decided for this ubatch, see below
//   q       F32       [n_embd, n_ring, H*G, S] latest queries: the one of position p in row p % n_ring
//   terms   F32       [1 or 2, n_slots, H or 1, S] of an indexer; 1: all heads share them
//   rank    F32       [n_slots, H, S]       entries beyond n_used are undefined
//   plan    I32       [n_evict_max, 3, H, S] rows: evicted slots | move to | move from; ascending, padded with -1
//
// Invariants
//   - everything that varies from ubatch to ubatch is in tensors (ctl), nothing in op_params: graphs can be reused, and a
//     device needs no decision of the host in the middle
//   - slots [0, n_used) are in use before an eviction, [0, n_used - n_evict) after it: dense, without holes
//   - the lowest ranks leave; equal ranks (-0 == +0): the later position leaves; NaN ranks below everything
//   - entries with position < keep_lo or >= keep_hi never leave
//   - at most n_evict rows move per head; sources and destinations are disjoint
//   - if fewer than n_evict entries of a head may leave, or the plan holds fewer, it is the plan of an eviction of so many; what
//     follows goes by the plan, and the entries in slots from n_used - n_evict on are lost

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

enum indexmem_op {
    INDEXMEM_OP_RANK,
    INDEXMEM_OP_SELECT,
    INDEXMEM_OP_COMPACT,
    INDEXMEM_OP_COMPACT_POS,
    INDEXMEM_OP_ATTEND,
    INDEXMEM_OP_PAIRWISE,
    INDEXMEM_OP_CENTROID,
    INDEXMEM_OP_RESIDUAL,
    INDEXMEM_OP_BIAS,
    INDEXMEM_OP_RETENTION,
    INDEXMEM_OP_MOVES,
    INDEXMEM_OP_AGES,
    INDEXMEM_OP_ATTENDED,
};

enum indexmem_reduce {
    INDEXMEM_REDUCE_MEAN,
    INDEXMEM_REDUCE_MAX,
};

enum indexmem_ctl {
    INDEXMEM_CTL_N_USED,   // slots in use, the tokens of this ubatch included
    INDEXMEM_CTL_N_EVICT,  // entries that leave each head, 0 = none
    INDEXMEM_CTL_N_FIXED,  // slots whose position stands in `pos`
    INDEXMEM_CTL_POS_TAIL, // position of slot n_fixed; slot n_fixed + i has pos_tail + i
    INDEXMEM_CTL_KEEP_LO,
    INDEXMEM_CTL_KEEP_HI,
    INDEXMEM_CTL_POS_LAST, // position of the newest token
    INDEXMEM_CTL_SIZE = 8,
};

GGML_API struct ggml_tensor * ggml_indexmem_rank(
        struct ggml_context * ctx,
        struct ggml_tensor  * k,
        struct ggml_tensor  * pos,
        struct ggml_tensor  * ctl,
        struct ggml_tensor  * q,       // null if the policy reads no queries
        struct ggml_tensor  * sinks,   // F32 [H*G] of query heads, a logit whose attention goes nowhere; null: none
        int                   policy,  // index into policies.def
        int                   il,      // layer of the model
        uint64_t              seed,
        float                 scale,   // of the attention logits
        float                 softcap);

// Ranks from the terms of an indexer, for entry j of a cache whose newest entry is i:
//   terms[0] + pos_slope*j + terms[1]*(i - j)/age_scale      the last only if there are two terms
GGML_API struct ggml_tensor * ggml_indexmem_rank_terms(
        struct ggml_context * ctx,
        struct ggml_tensor  * terms,
        struct ggml_tensor  * pos,
        struct ggml_tensor  * ctl,
        float                 pos_slope,
        float                 age_scale);

// Positions counted back from the newest entry, which has 0; slots that are not in use: -1. -> F32 [n_slots, H, S]
GGML_API struct ggml_tensor * ggml_indexmem_ages(
        struct ggml_context * ctx,
        struct ggml_tensor  * pos,
        struct ggml_tensor  * ctl);

// What ggml_indexmem_rank() gives, of a policy that looks at attention, if that is known: F32 [n_slots, H, S]
GGML_API struct ggml_tensor * ggml_indexmem_rank_attended(
        struct ggml_context * ctx,
        struct ggml_tensor  * attention,
        struct ggml_tensor  * pos,
        struct ggml_tensor  * ctl,
        int                   policy);

// The retention scorer (indexers/retention.cpp) on hidden F32 [n_embd, T]. The trunk is linear if `input` is null. Vectors
// are F32. -> F32 [1 or 2, H, T]: the magnitude, and the decay if there is a matrix for it
struct ggml_indexmem_retention_weights {
    struct ggml_tensor * in_norm;        // [n_embd]
    struct ggml_tensor * in_norm_bias;
    struct ggml_tensor * input;          // [n_embd, n_mid] any type, or null
    struct ggml_tensor * mid_norm;       // [n_mid], or null
    struct ggml_tensor * mid_norm_bias;
    struct ggml_tensor * magnitude;      // [n_mid or n_embd, H]
    struct ggml_tensor * retention;      // the same, or null
    struct ggml_tensor * retention_bias; // [H], or null
};

GGML_API struct ggml_tensor * ggml_indexmem_retention(
        struct ggml_context                          * ctx,
        struct ggml_tensor                           * hidden,
        const struct ggml_indexmem_retention_weights * weights,
        float                                          eps);

// What the latest queries say of the key of every slot: sum_h c_h relu(q_h . k), reduced over the queries of the last
// min(n_queries, tokens seen) positions. keys F32 [n_embd, n_slots, 1, S], queries F32 [n_head*(n_embd + 1), n_ring, 1, S]:
// first q, then c; the one of position p in row p % n_ring. -> F32 [1, n_slots, 1, S]
GGML_API struct ggml_tensor * ggml_indexmem_pairwise(
        struct ggml_context * ctx,
        struct ggml_tensor  * keys,
        struct ggml_tensor  * queries,
        struct ggml_tensor  * ctl,
        int                   n_head,
        int                   n_queries,
        enum indexmem_reduce  reduce);

GGML_API struct ggml_tensor * ggml_indexmem_select(
        struct ggml_context * ctx,
        struct ggml_tensor  * rank,
        struct ggml_tensor  * pos,
        struct ggml_tensor  * ctl,
        int64_t               n_evict_max);

// Centroid memory (IndexMem++): the entries that leave (plan, before the compaction) are folded into running means, in fp32.
//   means F32 [n_embd_k + n_embd_v, R, H, S]   mean of keys, then mean of values, of each latent slot
//   count F32 [R, H, S]                        entries in it, 0 = empty
// Of the entries that leave, in the order of the plan, the first fill the empty slots, lowest first; each of the others goes
// to the slot whose mean key is nearest (squared distance in fp32; the first of equals) as the means are then; the means
// take them up in that order, c += (x - c)/n. Returns a view of `means`.
GGML_API struct ggml_tensor * ggml_indexmem_centroid(
        struct ggml_context * ctx,
        struct ggml_tensor  * means,
        struct ggml_tensor  * count,
        struct ggml_tensor  * k,
        struct ggml_tensor  * v,
        struct ggml_tensor  * plan,
        struct ggml_tensor  * ctl);

// Residual memory (IndexMem, arXiv 2605.25475): the entries that leave are added to a matrix and a normaliser, in fp32.
//   state F32 [n_feature, n_embd_v + 1, H, S]   row d < n_embd_v: component d of the value; the last row: the normaliser
//   phi   F32 [n_embd_k, n_feature]             features of a key, f = phi k
// For a sequence of which something leaves, over the entries that leave:
//   state[:, d] = decay*state[:, d] + rate*sum f*v[d]      state[:, n_embd_v] = decay*state[:, n_embd_v] + rate*sum f*f
// Returns a view of `state`.
GGML_API struct ggml_tensor * ggml_indexmem_residual(
        struct ggml_context * ctx,
        struct ggml_tensor  * state,
        struct ggml_tensor  * phi,
        struct ggml_tensor  * k,
        struct ggml_tensor  * v,
        struct ggml_tensor  * plan,
        struct ggml_tensor  * ctl,
        float                 rate,
        float                 decay);

// mask F16 [n_kv, T, 1, S], count F32 [R, H, S] -> F16 [n_kv, T, 1, H*S]: the mask of each KV head, with log(count) added to
// its first R columns
GGML_API struct ggml_tensor * ggml_indexmem_bias(
        struct ggml_context * ctx,
        struct ggml_tensor  * mask,
        struct ggml_tensor  * count);

// returns a view of `cache`
GGML_API struct ggml_tensor * ggml_indexmem_compact(
        struct ggml_context * ctx,
        struct ggml_tensor  * cache,
        struct ggml_tensor  * plan,
        struct ggml_tensor  * ctl);

// also writes the positions of the slots from n_fixed on; returns a view of `pos`
GGML_API struct ggml_tensor * ggml_indexmem_compact_pos(
        struct ggml_context * ctx,
        struct ggml_tensor  * pos,
        struct ggml_tensor  * plan,
        struct ggml_tensor  * ctl);

// A plan as row indices that can all be used -> I32 [n_evict_max, H, S, 4]: numbers | evicted slots | where rows go | where they come from.
// What follows the last of a list is its first again, or slot 0 if it is empty. The numbers, 0 to those that leave, then -1, are the
// first row of a plan for the evicted rows by themselves.
GGML_API struct ggml_tensor * ggml_indexmem_moves(
        struct ggml_context * ctx,
        struct ggml_tensor  * plan);

// The same arguments, result and semantics as ggml_flash_attn_ext without ALiBi, for one KV head per dimension 3:
//   q F32 [n_embd_k, T, G, N]   k, v any type [n_embd, n_kv, 1, N]   mask F16 [n_kv, T, 1, 1 or N]   -> F32 [n_embd_v, G, T, N]
// count F32 [R, N] or null: log(count) is added to the logits of the first R keys. sinks F32 [G*H] or null, with H heads in
// dimension 3 of each sequence: a logit of each query head whose weight goes nowhere. Accumulates in fp32, and gives the same bits
// with any number of threads.
GGML_API struct ggml_tensor * ggml_indexmem_attend(
        struct ggml_context * ctx,
        struct ggml_tensor  * q,
        struct ggml_tensor  * k,
        struct ggml_tensor  * v,
        struct ggml_tensor  * mask,
        struct ggml_tensor  * count,
        struct ggml_tensor  * sinks,
        float                 scale,
        float                 softcap);

// Each token of this attention then gets the bits that it would get by itself, whatever else is evaluated with it, at some cost: drafts
// are to change nothing. `n_entries`: for how many there is room in a sequence, in all heads together; `n_seq`: for how many sequences.
GGML_API void ggml_indexmem_attend_alone(struct ggml_tensor * op, int64_t n_entries, int64_t n_seq);

// The CPU backend adds the wall time of the op, in microseconds, to *counter, which must outlive the graph.
GGML_API void ggml_indexmem_set_timer(struct ggml_tensor * op, int64_t * counter);

#ifdef __cplusplus
}

// layout of op_params; some share a place, being of different ops
enum indexmem_param {
    INDEXMEM_PARAM_OP      = 0,
    INDEXMEM_PARAM_POLICY  = 1,
    INDEXMEM_PARAM_IL      = 2,
    INDEXMEM_PARAM_SCALE   = 3,
    INDEXMEM_PARAM_EPS     = 3,
    INDEXMEM_PARAM_SOFTCAP = 4,
    INDEXMEM_PARAM_ALONE   = 5,
    INDEXMEM_PARAM_SEQS    = 6,
    INDEXMEM_PARAM_SEED    = 6, // 64 bits
    INDEXMEM_PARAM_TIMER   = 8, // a pointer
    INDEXMEM_PARAM_SLOPE   = 10,
    INDEXMEM_PARAM_AGE     = 11,
    INDEXMEM_PARAM_RATE    = 10,
    INDEXMEM_PARAM_DECAY   = 11,
    INDEXMEM_PARAM_HEADS   = 12,
    INDEXMEM_PARAM_QUERIES = 13,
    INDEXMEM_PARAM_REDUCE  = 14,
};

struct indexmem_policy_info {
    const char * name;
    bool         needs_keys;
    int          n_queries;
    const char * help;
};

// null out of range
GGML_API const indexmem_policy_info * indexmem_policy_get(int policy);
// -1 if there is none of that name
GGML_API int                          indexmem_policy_find(const char * name);

#endif
