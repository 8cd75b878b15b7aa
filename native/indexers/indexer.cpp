#include "indexer.h"

#define INDEXMEM_INDEXER(name, help) \
    std::unique_ptr<indexmem_indexer> indexmem_make_##name(const indexmem_geometry & geometry, const indexmem_metadata & meta);
#include "indexers.def"
#undef INDEXMEM_INDEXER

static const indexmem_indexer_info indexers[] = {
#define INDEXMEM_INDEXER(name, help) { #name, help, indexmem_make_##name },
#include "indexers.def"
#undef INDEXMEM_INDEXER
};

const indexmem_indexer_info * indexmem_indexer_get(size_t i) {
    return i < sizeof(indexers)/sizeof(indexers[0]) ? &indexers[i] : nullptr;
}

ggml_tensor * indexmem_indexer::build_queries(ggml_context * ctx, const indexmem_weights & w, ggml_tensor * hidden) const {
    GGML_UNUSED(ctx); GGML_UNUSED(w); GGML_UNUSED(hidden);
    return nullptr;
}

ggml_tensor * indexmem_indexer::build_terms(ggml_context * ctx, ggml_tensor * state, ggml_tensor * queries, ggml_tensor * ctl) const {
    GGML_UNUSED(ctx); GGML_UNUSED(queries); GGML_UNUSED(ctl);
    return state;
}

ggml_tensor * indexmem_layer_norm(ggml_context * ctx, ggml_tensor * x, ggml_tensor * weight, ggml_tensor * bias, float eps) {
    return ggml_add(ctx, ggml_mul(ctx, ggml_norm(ctx, x, eps), weight), bias);
}

ggml_tensor * indexmem_linear(ggml_context * ctx, ggml_tensor * x, ggml_tensor * weight, ggml_tensor * bias) {
    x = ggml_mul_mat(ctx, weight, x);
    ggml_prec_set_acc(x, GGML_PREC_F32);
    return bias ? ggml_add(ctx, x, bias) : x;
}
