#pragma once

// An indexer kind: a small trained network that scores KV entries. Hidden state of a layer in, terms of a rank out.
//
//   hidden state (input of the layer's attention)
//     -> build_state    floats kept for every entry                 [n_state, n_state_heads, tokens]
//     -> build_queries  floats kept for the latest tokens, if any   [n_query_state, tokens]
//   at eviction
//     -> build_terms    terms of the rank of every slot             [1 or 2, n_slots, n_state_heads, n_seq]
//     -> rank           terms[0] + pos_slope*j + terms[1]*(i - j)/age_scale     i: newest position, j: of the entry
//
// Invariants
//   - a kind is one file that defines indexmem_make_<kind>(), and one line of indexers.def
//   - a kind holds constants only: no weights, no state, so one object serves all layers, contexts and threads
//   - all constants come from the sidecar; a missing or impossible one is an indexmem_sidecar_error
//   - the state of an entry depends on its own token alone, so it can be computed at any time before it is ranked
//   - graphs consist of ops that every backend has, or GGML_OP_INDEXMEM; they are fp32 but for what the matrices hold

#include "indexmem-metadata.h"

#include "ggml.h"

#include <memory>

class indexmem_indexer {
public:
    virtual ~indexmem_indexer() = default;

    virtual const char * kind() const = 0;

    virtual std::vector<indexmem_tensor_spec> tensors() const = 0;

    virtual uint32_t n_state()       const = 0;
    virtual uint32_t n_state_heads() const = 0;             // KV heads, or 1 if all share a score
    virtual uint32_t n_query_state() const { return 0; }
    virtual uint32_t n_queries()     const { return 0; }    // latest tokens whose query state the rank reads

    virtual float pos_slope() const { return 0.0f; }
    virtual float age_scale() const { return 1.0f; }

    // hidden F32 [n_embd, T] -> F32 [n_state, n_state_heads, T]
    virtual ggml_tensor * build_state(ggml_context * ctx, const indexmem_weights & w, ggml_tensor * hidden) const = 0;

    // hidden F32 [n_embd, T] -> F32 [n_query_state, T]
    virtual ggml_tensor * build_queries(ggml_context * ctx, const indexmem_weights & w, ggml_tensor * hidden) const;

    // state F32 [n_state, n_slots, n_state_heads, S], queries F32 [n_query_state, n_ring, 1, S] (the one of position p in
    // row p % n_ring; null if n_queries is 0), ctl I32 [INDEXMEM_CTL_SIZE, S] -> terms
    virtual ggml_tensor * build_terms(ggml_context * ctx, ggml_tensor * state, ggml_tensor * queries, ggml_tensor * ctl) const;
};

struct indexmem_indexer_info {
    const char * name;
    const char * help;
    std::unique_ptr<indexmem_indexer> (*make)(const indexmem_geometry & geometry, const indexmem_metadata & meta);
};

// the table; null out of range
const indexmem_indexer_info * indexmem_indexer_get(size_t i);

// pieces that the kinds share

ggml_tensor * indexmem_layer_norm(ggml_context * ctx, ggml_tensor * x, ggml_tensor * weight, ggml_tensor * bias, float eps);
ggml_tensor * indexmem_linear    (ggml_context * ctx, ggml_tensor * x, ggml_tensor * weight, ggml_tensor * bias = nullptr);
