#pragma once

#include "llama-graph.h"

#include "indexmem-kv-cache.h"

//
// How an indexer scores entries, in the compute graph
//
// Scores are needed when something is evicted, not before. In a graph that does not score, the hidden states of the new
// tokens are put aside (one copy per layer); in one that does, the network runs once over the n_old pending tokens and the
// new ones, for all heads of the layer, and its output goes into the slots of their entries, in each slice of the layer.
//
// Invariants
//   - rows of a scoring graph, per sequence: n_old pending tokens, oldest first, then the new ones. A sequence with fewer
//     pending tokens has its missing rows first; what is computed for them goes to rows that belong to no entry
//   - new tokens that are scored together with pending ones go through the ring, too, where it has room for both: the CPU
//     backend concatenates on one thread, value by value. Rows that pending tokens are read from are not written before that
//   - the network sees every token once, unless the token is taken back in between
//   - a step may have no new tokens: of a state that is read only what is pending is scored
//
class indexmem_scoring {
public:
    // in a class of slices, for ubatches of n_tokens per sequence that do what the step does
    indexmem_scoring(ggml_context * ctx, const llama_kv_cache_bounded & kv, uint32_t cls, const llama_kv_cache_bounded::step & st,
            uint32_t n_tokens);

    // the step of the class
    void set_input(const llama_kv_cache_bounded & kv, const llama_kv_cache_bounded::step & st);

    // Of a layer, whose first slice this is: scores F32 [n_state, n_state_heads, (n_old + n_tokens)*n_seq], null if nothing is scored.
    // `res` gets nodes to be computed first, in their order. hidden F32 [n_embd, n_tokens*n_seq]: what the attention of the layer
    // projects to Q, K and V, null without tokens.
    ggml_tensor * build_scores(ggml_context * ctx, const llama_kv_cache_bounded & kv, const llama_kv_cache_bounded::layer & first,
            ggml_tensor * hidden, std::vector<ggml_tensor *> & res);

    // puts those of the heads of a slice of this class, of n_head_kv of the layer, into their slots
    ggml_tensor * build_store(ggml_context * ctx, const llama_kv_cache_bounded::layer & l, ggml_tensor * scores, int64_t n_head_kv) const;

    // ranks F32 [n_slots, n_head_kv, n_seq] at the eviction of a scoring graph
    ggml_tensor * build_rank(ggml_context * ctx, const llama_kv_cache_bounded & kv, const llama_kv_cache_bounded::layer & l,
            ggml_tensor * pos, ggml_tensor * ctl);

    // moves state along with the entries; returns a view of the state
    ggml_tensor * build_compact(ggml_context * ctx, const llama_kv_cache_bounded & kv, const llama_kv_cache_bounded::layer & l,
            ggml_tensor * plan, ggml_tensor * ctl);

private:
    void make_rows(ggml_context * ctx, const llama_kv_cache_bounded & kv);

    ggml_tensor * view_state(ggml_context * ctx, const llama_kv_cache_bounded & kv, const llama_kv_cache_bounded::layer & l) const;

    const uint32_t cls;
    const uint32_t s0;
    const int64_t  n_seq;
    const int64_t  n_tokens; // per sequence
    const int64_t  n_old;
    const bool     score;
    const bool     in_ring; // the new tokens that are scored, with pending ones, go through the ring

    ggml_tensor * rows_new   = nullptr; // I64 [n_tokens, 1, n_seq]         ring rows of the new hidden states, if they go there
    ggml_tensor * rows_old   = nullptr; // I32 [n_old, n_seq], or with new  ring rows of the hidden states to score
    ggml_tensor * slots      = nullptr; // I64 [n_old + n_tokens, 1, n_seq] slots of the scored entries
    ggml_tensor * rows_query = nullptr; // I64 [n_last, 1, n_seq]           ring rows of the latest queries
};
