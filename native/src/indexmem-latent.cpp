#include "indexmem-latent.h"

#include "indexmem-nodes.h"

#include <numeric>

using kv_cache = llama_kv_cache_bounded;

indexmem_latent::indexmem_latent(const kv_cache & kv, const kv_cache::step & st) :
    kv(kv), memory(*kv.get_memory()), s0(st.s0), n_seq(st.n_seq), recall(st.recall) {
}

void indexmem_latent::set_input() {
    if (rows) {
        std::vector<int64_t> data(ggml_nelements(rows));
        std::iota(data.begin(), data.end(), 0);
        ggml_backend_tensor_set(rows, data.data(), 0, ggml_nbytes(rows));
    }
}

indexmem_memory_view indexmem_latent::view(ggml_context * ctx, const kv_cache::layer & l) const {
    indexmem_memory_view res = { l.il, {}, nullptr };
    for (ggml_tensor * t : l.memory) {
        res.state.push_back(indexmem_view_seqs(ctx, t, t->ne[1], s0, n_seq));
    }
    if (!memory.tensors().empty()) {
        res.weights = &kv.get_config().sidecar->get_layer(l.il);
    }
    return res;
}

ggml_tensor * indexmem_latent::build_count(ggml_context * ctx, const kv_cache::layer & l) const {
    return recall ? memory.build_count(ctx, view(ctx, l)) : nullptr;
}

ggml_tensor * indexmem_latent::build_add(ggml_context * ctx, const kv_cache::layer & l, ggml_tensor * q, float q_scale, ggml_tensor * cur) const {
    if (!recall || !memory.enabled(l.il)) {
        return cur;
    }
    if (q_scale != 1.0f) {
        q = ggml_scale(ctx, ggml_cont(ctx, q), q_scale);
    }
    return memory.build_add(ctx, view(ctx, l), q, cur);
}

std::vector<ggml_tensor *> indexmem_latent::build_write(ggml_context * ctx, const kv_cache::layer & l,
        ggml_tensor * k, ggml_tensor * v, ggml_tensor * plan, ggml_tensor * ctl) {
    if (!memory.enabled(l.il)) {
        return {};
    }
    if (!rows && memory.n_slots() > 0) {
        rows = indexmem_new_input(ctx, "bounded_latent", GGML_TYPE_I64, memory.n_slots(), 1);
    }
    indexmem_memory_leaving e = { k, v, plan, ctl, nullptr, nullptr, rows };
    if (rows) {
        e.k_slots = indexmem_view_seqs(ctx, l.k, rows->ne[0], s0, n_seq);
        e.v_slots = indexmem_view_seqs(ctx, l.v, rows->ne[0], s0, n_seq);
    }
    return memory.build_write(ctx, view(ctx, l), e);
}
