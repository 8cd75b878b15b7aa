#include "indexmem-hooks.h"

#include "indexmem-error.h"
#include "indexmem-graph.h"
#include "indexmem-mixed-graph.h"

#include "llama-impl.h"
#include "llama-model.h"

#include <cstring>

// the hooks of graphs; those of contexts are in indexmem-api.cpp

uint32_t indexmem_graph_nodes(const llama_memory_i * memory) {
    const auto * kv = indexmem_bounded(memory);
    if (!kv) {
        return 0;
    }
    // what is needed: 28 a layer for storing, attending and evicting, 45 for the largest indexer, 22 for the larger memory
    return (uint32_t) kv->get_layers().size()*(48 + (kv->get_indexer() ? 80 : 0) + (kv->get_memory() ? 40 : 0));
}

uint32_t indexmem_rope_length(const llama_memory_i * memory, uint32_t n_ctx) {
    const auto * kv = indexmem_bounded(memory);
    return kv && kv->get_span() > 0 ? kv->get_span() : n_ctx;
}

const llama_ubatch * indexmem_rotary_ubatch(const llama_memory_context_i * mctx, const llama_ubatch & ubatch) {
    const auto * bounded = indexmem_context(mctx);
    return bounded ? bounded->get_rotary_ubatch(ubatch) : &ubatch;
}

static llm_graph_input_attn_bounded * bounded_input(const llm_graph_context & graph) {
    if (!indexmem_context(graph.mctx)) {
        return nullptr;
    }
    for (const auto & input : graph.res->inputs) {
        if (auto * bounded = dynamic_cast<indexmem_bounded_input *>(input.get())) {
            return &bounded->get_bounded();
        }
    }
    return nullptr;
}

void indexmem_tap(const llm_graph_context & graph, ggml_tensor * hidden, int il) {
    if (auto * input = bounded_input(graph)) {
        input->tap(hidden, il);
    }
}

void indexmem_tap_named(const llm_graph_context & graph, ggml_tensor * cur, const char * name, int il) {
    auto * input = strcmp(name, "attn_norm") == 0 ? bounded_input(graph) : nullptr;
    if (input) {
        input->tap_unless(cur, il);
    }
}

std::unique_ptr<llm_graph_input_attn_kv> indexmem_build_attn_inp(const llm_graph_context & graph) {
    const auto * mctx = indexmem_context(graph.mctx);
    if (!mctx) {
        return nullptr;
    }
    return std::make_unique<llm_graph_input_attn_bounded>(graph, mctx);
}

const llama_memory_recurrent_context * indexmem_recurrent_of(const llama_memory_context_i * mctx) {
    const auto * mixed = indexmem_mixed_context(mctx);
    return mixed ? mixed->get_recurrent() : nullptr;
}

const llama_kv_cache_context * indexmem_window_of(const llama_memory_context_i * mctx) {
    const auto * mixed = indexmem_mixed_context(mctx);
    return mixed ? mixed->get_window() : nullptr;
}

std::unique_ptr<llm_graph_input_attn_kv_iswa> indexmem_build_attn_inp_iswa(const llm_graph_context & graph, ggml_tensor * mask) {
    return std::make_unique<llm_graph_input_iswa_bounded>(graph, indexmem_mixed_context(graph.mctx), mask);
}

std::unique_ptr<llm_graph_input_mem_hybrid> indexmem_build_inp_hybrid(const llm_graph_context & graph, std::unique_ptr<llm_graph_input_rs> rs) {
    typedef llm_graph_input_hybrid_bounded<llm_graph_input_mem_hybrid, llm_graph_input_attn_kv> input;
    return std::make_unique<input>(graph.cparams, indexmem_build_attn_inp(graph), std::move(rs));
}

std::unique_ptr<llm_graph_input_attn_k> indexmem_build_attn_inp_k(const llm_graph_context & graph) {
    return indexmem_context(graph.mctx) ? std::make_unique<llm_graph_input_k_bounded>(graph) : nullptr;
}

std::unique_ptr<llm_graph_input_mem_hybrid_k> indexmem_build_inp_hybrid_k(const llm_graph_context & graph, std::unique_ptr<llm_graph_input_rs> rs) {
    typedef llm_graph_input_hybrid_bounded<llm_graph_input_mem_hybrid_k, llm_graph_input_attn_k> input;
    return std::make_unique<input>(graph.cparams, indexmem_build_attn_inp_k(graph), std::move(rs));
}

std::unique_ptr<llm_graph_input_mem_hybrid_iswa> indexmem_build_inp_hybrid_iswa(const llm_graph_context & graph,
        std::unique_ptr<llm_graph_input_rs> rs, ggml_tensor * mask) {
    typedef llm_graph_input_hybrid_bounded<llm_graph_input_mem_hybrid_iswa, llm_graph_input_attn_kv_iswa> input;
    return std::make_unique<input>(graph.cparams, indexmem_build_attn_inp_iswa(graph, mask), std::move(rs));
}

ggml_tensor * indexmem_build_attn(
        const llm_graph_context & graph,
        llm_graph_input_i * inp,
        ggml_tensor * q_cur,
        ggml_tensor * k_cur,
        ggml_tensor * v_cur,
        ggml_tensor * kq_b,
        ggml_tensor * sinks,
        float kq_scale,
        int   il,
        ggml_tensor * v_mla) {
    auto * bounded = dynamic_cast<indexmem_bounded_input *>(inp);
    if (!bounded) {
        return nullptr;
    }
    const auto * window = dynamic_cast<llm_graph_input_iswa_bounded *>(inp);
    if (window && graph.hparams.is_swa(il)) {
        indexmem_mixed_context(graph.mctx)->learn_window_rotation(il, k_cur, window->self_k_rot_swa);
        return nullptr;
    }
    bool others = false; // sinks that are not the layer's
    for (const auto * l : indexmem_context(graph.mctx)->get_kv().get_sources(il)) {
        others = others || sinks != (l->sinks && !l->whole ? l->sinks->view_src : l->sinks);
    }
    if (kq_b || others) {
        indexmem_fail(INDEXMEM_ERROR_MODEL, format("layer %d adds %s to its attention, which a bounded KV cache does not support",
                    il, kq_b ? "a bias" : "sink logits that are not its own"));
    }
    ggml_tensor * cur = bounded->get_bounded().build_attn(graph, q_cur, k_cur, v_cur, kq_scale, il);
    if (v_mla) {
        ggml_context * ctx = graph.ctx0;
        const int64_t  n   = cur->ne[1];
        cur = ggml_permute(ctx, ggml_reshape_3d(ctx, cur, v_mla->ne[0], q_cur->ne[1], n), 0, 2, 1, 3);
        cur = ggml_cont(ctx, ggml_permute(ctx, ggml_mul_mat(ctx, v_mla, cur), 0, 2, 1, 3));
        cur = ggml_reshape_2d(ctx, cur, cur->ne[0]*cur->ne[1], n);
    }
    return cur;
}

void indexmem_refuse(const llama_memory_context_i * mctx, const char * what) {
    if (indexmem_context(mctx)) {
        indexmem_fail(INDEXMEM_ERROR_MODEL, format("the model uses %s, which a bounded KV cache does not support yet", what));
    }
}
