#include "indexer.h"

// KVzap: a linear layer, or two with an exact GELU between them. The score is the rank.
class indexer_kvzap : public indexmem_indexer {
public:
    indexer_kvzap(const indexmem_geometry & geometry, const indexmem_metadata & meta) : geometry(geometry) {
        n_mid = meta.u32("indexmem.kvzap.mid_dim", 0, 65536);
    }

    const char * kind() const override { return "kvzap"; }

    std::vector<indexmem_tensor_spec> tensors() const override {
        const int64_t d = geometry.n_embd;
        const int64_t w = n_mid ? n_mid : d;
        const int64_t H = geometry.n_head_kv;

        std::vector<indexmem_tensor_spec> res = {
            { "out_proj.weight", { w, H }, false },
            { "out_proj.bias",   { H },    false },
        };
        if (n_mid) {
            res.push_back({ "in_proj.weight", { d, w }, true  });
            res.push_back({ "in_proj.bias",   { w },    false });
        }
        return res;
    }

    uint32_t n_state()       const override { return 1; }
    uint32_t n_state_heads() const override { return geometry.n_head_kv; }

    ggml_tensor * build_state(ggml_context * ctx, const indexmem_weights & w, ggml_tensor * hidden) const override {
        ggml_tensor * x = hidden;
        if (n_mid) {
            x = ggml_gelu_erf(ctx, indexmem_linear(ctx, x, w.at("in_proj.weight"), w.at("in_proj.bias")));
        }
        x = indexmem_linear(ctx, x, w.at("out_proj.weight"), w.at("out_proj.bias"));
        return ggml_reshape_3d(ctx, x, 1, geometry.n_head_kv, hidden->ne[1]);
    }

private:
    indexmem_geometry geometry;

    uint32_t n_mid; // 0: linear
};

std::unique_ptr<indexmem_indexer> indexmem_make_kvzap(const indexmem_geometry & geometry, const indexmem_metadata & meta) {
    return std::make_unique<indexer_kvzap>(geometry, meta);
}
