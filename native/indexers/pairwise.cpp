#include "indexer.h"

#include "indexmem-ops.h"

#include <cmath>

// The pairwise indexer of IndexMem v1: A_st = sum_h c_sh relu(q_sh . k_t), reduced over the latest queries s. Entries keep
// their key k_t, one for all KV heads of the layer; the latest queries q_s and their weights c_s are kept in a ring.
class indexer_pairwise : public indexmem_indexer {
public:
    indexer_pairwise(const indexmem_geometry & geometry, const indexmem_metadata & meta) : geometry(geometry) {
        n_head = meta.u32("indexmem.pairwise.head_count",  1, 1024);
        n_dim  = meta.u32("indexmem.pairwise.head_dim",    1, 1024);
        n_last = meta.u32("indexmem.pairwise.query_count", 1, 1024);
        eps    = meta.f32_pos("indexmem.pairwise.norm_eps");
        reduce = meta.choice("indexmem.pairwise.reduce", { "mean", "max" }) == 0 ? INDEXMEM_REDUCE_MEAN : INDEXMEM_REDUCE_MAX;
    }

    const char * kind() const override { return "pairwise"; }

    std::vector<indexmem_tensor_spec> tensors() const override {
        const int64_t d = geometry.n_embd;
        return {
            { "w_q.weight",          { d, n_head*n_dim }, true  },
            { "w_q.bias",            { n_head*n_dim },    false },
            { "w_k.weight",          { d, n_dim },        true  },
            { "w_k.bias",            { n_dim },           false },
            { "weights_proj.weight", { d, n_head },       false },
            { "weights_proj.bias",   { n_head },          false },
            { "q_norm.weight",       { n_dim },           false },
            { "q_norm.bias",         { n_dim },           false },
            { "k_norm.weight",       { n_dim },           false },
            { "k_norm.bias",         { n_dim },           false },
        };
    }

    uint32_t n_state()       const override { return (uint32_t) n_dim; }
    uint32_t n_state_heads() const override { return 1; }
    uint32_t n_query_state() const override { return (uint32_t) (n_head*(n_dim + 1)); } // q, then c
    uint32_t n_queries()     const override { return n_last; }

    ggml_tensor * build_state(ggml_context * ctx, const indexmem_weights & w, ggml_tensor * hidden) const override {
        ggml_tensor * k = indexmem_linear(ctx, hidden, w.at("w_k.weight"), w.at("w_k.bias"));
        k = indexmem_layer_norm(ctx, k, w.at("k_norm.weight"), w.at("k_norm.bias"), eps);
        return ggml_reshape_3d(ctx, k, n_dim, 1, hidden->ne[1]);
    }

    ggml_tensor * build_queries(ggml_context * ctx, const indexmem_weights & w, ggml_tensor * hidden) const override {
        const int64_t T = hidden->ne[1];

        ggml_tensor * q = indexmem_linear(ctx, hidden, w.at("w_q.weight"), w.at("w_q.bias"));
        q = ggml_reshape_3d(ctx, q, n_dim, n_head, T);
        q = indexmem_layer_norm(ctx, q, w.at("q_norm.weight"), w.at("q_norm.bias"), eps);
        q = ggml_reshape_2d(ctx, q, n_dim*n_head, T);

        ggml_tensor * c = indexmem_linear(ctx, hidden, w.at("weights_proj.weight"), w.at("weights_proj.bias"));
        c = ggml_scale(ctx, c, 1.0f/std::sqrt((float) (n_head*n_dim)));
        return ggml_concat(ctx, q, c, 0);
    }

    // not ggml_lightning_indexer: on CUDA it knows one geometry (64 heads of 128), and on the CPU it takes a dot product
    // for each pair and head
    ggml_tensor * build_terms(ggml_context * ctx, ggml_tensor * state, ggml_tensor * queries, ggml_tensor * ctl) const override {
        return ggml_indexmem_pairwise(ctx, state, queries, ctl, (int) n_head, (int) n_last, reduce);
    }

private:
    indexmem_geometry geometry;

    int64_t  n_head;
    int64_t  n_dim;
    uint32_t n_last;
    float    eps;

    indexmem_reduce reduce;
};

std::unique_ptr<indexmem_indexer> indexmem_make_pairwise(const indexmem_geometry & geometry, const indexmem_metadata & meta) {
    return std::make_unique<indexer_pairwise>(geometry, meta);
}
