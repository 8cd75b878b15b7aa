#include "indexmem-mixed-graph.h"

#include "indexmem-hooks.h"

llm_graph_input_iswa_bounded::llm_graph_input_iswa_bounded(
        const llm_graph_context & graph, const llama_memory_mixed_context * mixed, ggml_tensor * mask) :
    llm_graph_input_attn_kv_iswa(graph.hparams, graph.cparams, nullptr),
    base(new llm_graph_input_attn_bounded(graph, mixed->get_bounded())), mixed(mixed) {
    const auto & window = *mixed->get_window();

    self_k_idxs_swa = window.build_input_k_idxs(graph.ctx0, graph.ubatch);
    self_v_idxs_swa = window.build_input_v_idxs(graph.ctx0, graph.ubatch);

    self_kq_mask_swa     = mask;
    self_kq_mask_swa_cnv = mask;

    self_k_rot_swa = window.build_input_k_rot(graph.ctx0);
    self_v_rot_swa = window.build_input_v_rot(graph.ctx0);

    self_k_rot = base->self_k_rot; // the caller rotates by them
    self_v_rot = base->self_v_rot;
}

llm_graph_input_k_bounded::llm_graph_input_k_bounded(const llm_graph_context & graph) :
    llm_graph_input_attn_k(graph.hparams, graph.cparams, nullptr),
    base(new llm_graph_input_attn_bounded(graph, indexmem_context(graph.mctx))) {
}

void llm_graph_input_iswa_bounded::set_input(const llama_ubatch * ubatch) {
    base->set_input(ubatch);

    // the cells of a window hold indices, and `ubatch` has the positions that are rotated by
    const auto & window  = *mixed->get_window();
    const auto & indices = mixed->get_ubatch();

    // what no layer uses has no memory
    if (self_k_idxs_swa->buffer) {
        window.set_input_k_idxs(self_k_idxs_swa, &indices);
        window.set_input_v_idxs(self_v_idxs_swa, &indices);
    }
    if (self_kq_mask_swa->buffer) {
        window.set_input_kq_mask(self_kq_mask_swa, &indices, cparams.causal_attn);
    }
    if (self_k_rot_swa && self_k_rot_swa->buffer) {
        window.set_input_k_rot(self_k_rot_swa);
    }
    if (self_v_rot_swa && self_v_rot_swa->buffer) {
        window.set_input_v_rot(self_v_rot_swa);
    }
}

bool llm_graph_input_iswa_bounded::can_reuse(const llm_graph_params & params) {
    const auto * next = indexmem_mixed_context(params.mctx);
    if (!next || !next->get_window() || !base->can_reuse(params)) {
        return false;
    }
    mixed = next;
    const int64_t n_stream = params.cparams.kv_unified ? 1 : params.ubatch.n_seqs_unq;
    return self_k_idxs_swa->ne[0] == params.ubatch.n_tokens &&
        self_kq_mask_swa->ne[0] == next->get_window()->get_n_kv() &&
        self_kq_mask_swa->ne[1] == params.ubatch.n_tokens/n_stream && self_kq_mask_swa->ne[3] == n_stream;
}
