#include "indexer.h"

#include "ggml-backend.h"
#include "indexmem-ops.h"

// The retention scorer of IndexMem++: x = GELU(LN(A LN(h))), or LN(h) when the trunk is linear; m = M x,
// lambda = -softplus(P x + p). Two floats per entry and head, and the position does the rest: what the authors fold into an
// intercept e_j = m_j + pos_slope*j - lambda_j*j/age_scale is added when an entry is ranked, which loses no digits at
// large positions.
class indexer_retention : public indexmem_indexer {
public:
    indexer_retention(const indexmem_geometry & geometry, const indexmem_metadata & meta) : geometry(geometry) {
        const bool mlp = meta.choice("indexmem.retention.trunk", { "linear", "mlp" }) == 1;
        n_mid = meta.u32("indexmem.retention.mid_dim", mlp ? 1 : 0, mlp ? 65536 : 0);
        eps   = meta.f32_pos("indexmem.retention.norm_eps");
        slope = meta.f32    ("indexmem.retention.pos_slope");
        age   = meta.f32_pos("indexmem.retention.age_scale");
        decay = meta.boolean("indexmem.retention.decay");
        if (meta.has("indexmem.retention.gate_scale")) {
            meta.f32s("indexmem.retention.gate_scale", geometry.n_layer); // of training: checked, not used
        }
    }

    const char * kind() const override { return "retention"; }

    std::vector<indexmem_tensor_spec> tensors() const override {
        const int64_t d = geometry.n_embd;
        const int64_t w = n_mid ? n_mid : d;
        const int64_t H = geometry.n_head_kv;

        std::vector<indexmem_tensor_spec> res = {
            { "in_norm.weight",        { d },    false },
            { "in_norm.bias",          { d },    false },
            { "magnitude_proj.weight", { w, H }, false },
        };
        if (n_mid) {
            res.push_back({ "input_proj.weight", { d, w }, true  });
            res.push_back({ "mid_norm.weight",   { w },    false });
            res.push_back({ "mid_norm.bias",     { w },    false });
        }
        if (decay) {
            res.push_back({ "retention_proj.weight", { w, H }, false });
            res.push_back({ "retention_proj.bias",   { H },    false });
        }
        return res;
    }

    uint32_t n_state()       const override { return decay ? 2 : 1; }
    uint32_t n_state_heads() const override { return geometry.n_head_kv; }

    float pos_slope() const override { return slope; }
    float age_scale() const override { return age; }

    ggml_tensor * build_state(ggml_context * ctx, const indexmem_weights & w, ggml_tensor * hidden) const override {
        ggml_backend_buffer_t buffer = w.at("in_norm.weight")->buffer;
        if (hidden->ne[1] <= N_FUSED && buffer && ggml_backend_buffer_is_host(buffer)) {
            return build_fused(ctx, w, hidden);
        }
        ggml_tensor * x = indexmem_layer_norm(ctx, hidden, w.at("in_norm.weight"), w.at("in_norm.bias"), eps);
        if (n_mid) {
            x = indexmem_linear(ctx, x, w.at("input_proj.weight"));
            x = indexmem_layer_norm(ctx, x, w.at("mid_norm.weight"), w.at("mid_norm.bias"), eps);
            x = ggml_gelu_erf(ctx, x);
        }
        const int64_t H = geometry.n_head_kv;
        const int64_t T = hidden->ne[1];

        ggml_tensor * m = ggml_reshape_3d(ctx, indexmem_linear(ctx, x, w.at("magnitude_proj.weight")), 1, H, T);
        if (!decay) {
            return m;
        }
        ggml_tensor * l = indexmem_linear(ctx, x, w.at("retention_proj.weight"), w.at("retention_proj.bias"));
        l = ggml_neg(ctx, ggml_softplus(ctx, l));
        return ggml_concat(ctx, m, ggml_reshape_3d(ctx, l, 1, H, T), 0);
    }

private:
    static constexpr int64_t N_FUSED = 64; // up to so many tokens one op is faster than the products of a graph

    ggml_tensor * build_fused(ggml_context * ctx, const indexmem_weights & w, ggml_tensor * hidden) const {
        const auto find = [&](const char * name) {
            const auto it = w.find(name);
            return it == w.end() ? nullptr : it->second;
        };
        const ggml_indexmem_retention_weights weights = {
            find("in_norm.weight"),        find("in_norm.bias"),
            find("input_proj.weight"),     find("mid_norm.weight"),       find("mid_norm.bias"),
            find("magnitude_proj.weight"), find("retention_proj.weight"), find("retention_proj.bias"),
        };
        return ggml_indexmem_retention(ctx, hidden, &weights, eps);
    }

    indexmem_geometry geometry;

    uint32_t n_mid; // 0: linear
    float    eps;
    float    slope;
    float    age;
    bool     decay;
};

std::unique_ptr<indexmem_indexer> indexmem_make_retention(const indexmem_geometry & geometry, const indexmem_metadata & meta) {
    return std::make_unique<indexer_retention>(geometry, meta);
}
