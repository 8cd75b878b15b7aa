#pragma once

#include "llama-graph.h"

#include "indexmem-kv-cache.h"
#include "indexmem-latent.h"
#include "indexmem-layer-nodes.h"
#include "indexmem-scoring.h"

#include <array>
#include <map>
#include <optional>

//
// The attention of a bounded cache in the compute graph
//
// Invariants
//   - per layer: store K and V, then, of each of its slices, attend and evict; the eviction nodes come after attention in the graph, after that of all
//     layers that read the same entries, and what leaves is written into the latent memory before its rows are overwritten
//   - a graph without eviction is built for ubatches that evict nothing; likewise with scoring
//   - a KV head is a stream of flash attention: dimension 3 of q, k, v and the mask
//

// what a step of n_tokens says to the ops that evict, of one sequence in a class; the states are those of the class
std::array<int32_t, INDEXMEM_CTL_SIZE> indexmem_ctl_of(const llama_kv_cache_bounded & kv, const llama_kv_cache_bounded::seq_state & before,
        const llama_kv_cache_bounded::seq_state & after, uint32_t n_tokens, uint32_t cls);

class llm_graph_input_attn_bounded;

// an input that is or has that of a bounded cache
class indexmem_bounded_input {
public:
    virtual ~indexmem_bounded_input() = default;

    virtual llm_graph_input_attn_bounded & get_bounded() = 0;
};

class llm_graph_input_attn_bounded : public llm_graph_input_attn_kv, public indexmem_bounded_input {
public:
    llm_graph_input_attn_bounded(
            const llm_graph_context & graph,
            const llama_kv_cache_bounded_context * mctx);

    void set_input(const llama_ubatch * ubatch) override;

    bool can_reuse(const llm_graph_params & params) override;

    llm_graph_input_attn_bounded & get_bounded() override { return *this; }

    // what the attention of a layer reads, seen before its attention is built
    void tap       (ggml_tensor * hidden, int il) { hiddens[il] = hidden; }
    void tap_unless(ggml_tensor * hidden, int il) { hiddens.emplace(il, hidden); } // another one was shown

    // attention output [n_embd_head_v*n_head, n_tokens]
    ggml_tensor * build_attn(
            const llm_graph_context & graph,
            ggml_tensor * q_cur, // [n_embd_head_k, n_head,    n_tokens]
            ggml_tensor * k_cur, // [n_embd_head_k, n_head_kv, n_tokens], null in a layer that reads the entries of another
            ggml_tensor * v_cur, // [n_embd_head_v, n_head_kv, n_tokens], likewise
            float kq_scale,
            int   il);

private:
    // what the topology of the graph depends on
    struct shape {
        uint32_t s0;
        uint32_t n_seq;
        uint32_t n_tokens; // per sequence
        std::array<uint32_t, indexmem_kv_counts::N_CLASSES_MAX> n_kv;
        bool     evict;
        bool     rotary;
        bool     recall;
        bool     score;
        uint32_t n_old;

        bool operator==(const shape & other) const {
            return s0 == other.s0 && n_seq == other.n_seq && n_tokens == other.n_tokens && n_kv == other.n_kv &&
                evict == other.evict && rotary == other.rotary && recall == other.recall && score == other.score && n_old == other.n_old;
        }
    };

    static shape shape_of(const llama_kv_cache_bounded_context * mctx, const llama_ubatch & ubatch);

    // the first row that attention looks at
    int64_t row_first() const { return sh.recall ? 0 : mctx->get_kv().get_n_front(); }

    float softcap() const { return hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0f; }

    ggml_tensor * build_attend(const llm_graph_context & graph, const indexmem_layer_nodes & nodes, const llama_kv_cache_bounded::layer & l,
            ggml_tensor * q, float kq_scale);

    void build_store(const llm_graph_context & graph, const std::vector<const llama_kv_cache_bounded::layer *> & of_layer,
            ggml_tensor * q_cur, ggml_tensor * k_cur, ggml_tensor * v_cur);

    // of one slice; result and queries are those of its heads
    ggml_tensor * build_slice(const llm_graph_context & graph, const llama_kv_cache_bounded::layer & l, ggml_tensor * q_cur, float kq_scale,
            bool by_token);

    void put(const llm_graph_context & graph, const llama_kv_cache_bounded::layer & l, ggml_tensor * op) const;

    void build_evict(const llm_graph_context & graph, const llama_kv_cache_bounded::layer & l, ggml_tensor * q_cur, float kq_scale);

    // the inputs that slices of one class share
    struct shared {
        ggml_tensor * mask  = nullptr; // F16 [n_kv, n_tokens, 1, n_seq]
        ggml_tensor * slots = nullptr; // I64 [n_tokens, 1, n_seq]           slots of the new entries
        ggml_tensor * ctl   = nullptr; // I32 [INDEXMEM_CTL_SIZE, n_seq]
        ggml_tensor * ctl_rotary = nullptr; // the same for the table of rotary positions, null if it holds nothing

        std::map<int64_t, ggml_tensor *> mask_heads; // n_head_kv -> F16 [n_kv, n_tokens, 1, n_head_kv*n_seq]

        std::optional<indexmem_scoring> scoring; // if there is an indexer
        std::optional<indexmem_stock>   stock;   // if something is evicted
    };

    void set_class(uint32_t cls);

    ggml_tensor * get_mask(ggml_context * ctx, uint32_t cls, int64_t n_head_kv);

    const llama_kv_cache_bounded_context * mctx;

    shape sh;

    std::vector<shared> classes;

    ggml_tensor * rings = nullptr; // I64 [n_last, 1, n_seq]             ring rows of the newest queries

    std::optional<indexmem_latent> latent; // if there is a latent memory

    std::map<int, ggml_tensor *> hiddens; // layer -> F32 [n_embd, n_tokens*n_seq], of an indexer

    struct asked { ggml_tensor * q; float scale; };
    std::map<int, asked> owners; // layer -> its own queries, of one whose entries others read

    std::vector<float> hadamard_k;
    std::vector<float> hadamard_v;
};
