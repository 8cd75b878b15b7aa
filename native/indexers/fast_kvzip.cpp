#include "indexer.h"

#include <cmath>

// Fast-KVzip: how much of the attention over a few learned base keys a learned query would give to the entry's own key,
// 1/(1 + sum_n exp(base_n - l)) = softmax([l, base])[0], mean over the queries of the group.
class indexer_fast_kvzip : public indexmem_indexer {
public:
    indexer_fast_kvzip(const indexmem_geometry & geometry, const indexmem_metadata & meta) : geometry(geometry) {
        n_group = meta.u32("indexmem.fast_kvzip.group_count", 1, 1024);
        n_dim   = meta.u32("indexmem.fast_kvzip.dim",         1, 1024);
        n_base  = meta.u32("indexmem.fast_kvzip.base_count",  1, 4096);
        eps     = meta.f32_pos("indexmem.fast_kvzip.norm_eps");
    }

    const char * kind() const override { return "fast_kvzip"; }

    std::vector<indexmem_tensor_spec> tensors() const override {
        const int64_t d = geometry.n_embd;
        const int64_t H = geometry.n_head_kv;
        return {
            { "q_proj.weight", { d, H*n_group*n_dim }, true  },
            { "q_proj.bias",   { H*n_group*n_dim },    false },
            { "k_proj.weight", { d, H*n_dim },         true  },
            { "q_norm.weight", { n_dim },              false },
            { "k_norm.weight", { n_dim },              false },
            { "k_base",        { n_dim, n_base, H },   false },
            { "b",             { n_group, H },         false },
        };
    }

    uint32_t n_state()       const override { return 1; }
    uint32_t n_state_heads() const override { return geometry.n_head_kv; }

    ggml_tensor * build_state(ggml_context * ctx, const indexmem_weights & w, ggml_tensor * hidden) const override {
        const int64_t H = geometry.n_head_kv;
        const int64_t T = hidden->ne[1];
        const float   s = 1.0f/std::sqrt((float) n_dim);

        auto heads = [&](ggml_tensor * x, const char * norm, int64_t n) {
            x = ggml_reshape_4d(ctx, x, n_dim, n, H, T);
            return ggml_mul(ctx, ggml_rms_norm(ctx, x, eps), w.at(norm));
        };
        ggml_tensor * q = heads(indexmem_linear(ctx, hidden, w.at("q_proj.weight"), w.at("q_proj.bias")), "q_norm.weight", n_group);
        ggml_tensor * k = heads(indexmem_linear(ctx, hidden, w.at("k_proj.weight")),                      "k_norm.weight", 1);

        ggml_tensor * own = ggml_scale(ctx, ggml_mul_mat(ctx, k, q), s);               // [1, g, H, T]
        own = ggml_add(ctx, own, ggml_reshape_3d(ctx, w.at("b"), 1, n_group, H));

        // one product for each head: the base keys of a head are those of all tokens, and not every device repeats dimension 3
        ggml_tensor * base = ggml_reshape_3d(ctx, ggml_cont(ctx, ggml_permute(ctx, q, 0, 1, 3, 2)), n_dim, n_group*T, H);
        base = ggml_scale(ctx, ggml_mul_mat(ctx, w.at("k_base"), base), s);
        base = ggml_permute(ctx, ggml_reshape_4d(ctx, base, n_base, n_group, T, H), 0, 1, 3, 2); // [n, g, H, T]

        ggml_tensor * prob = ggml_soft_max(ctx, ggml_concat(ctx, own, base, 0));       // [1 + n, g, H, T]
        prob = ggml_view_4d(ctx, prob, 1, n_group, H, T, prob->nb[1], prob->nb[2], prob->nb[3], 0);
        prob = ggml_reshape_3d(ctx, ggml_cont(ctx, prob), n_group, H, T);
        return ggml_mean(ctx, prob);
    }

private:
    indexmem_geometry geometry;

    int64_t n_group;
    int64_t n_dim;
    int64_t n_base;
    float   eps;
};

std::unique_ptr<indexmem_indexer> indexmem_make_fast_kvzip(const indexmem_geometry & geometry, const indexmem_metadata & meta) {
    return std::make_unique<indexer_fast_kvzip>(geometry, meta);
}
