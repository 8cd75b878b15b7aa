#include "indexmem-kv-cache.h"

#include "llama-model.h"

#include <cstring>

// what the bounded cache of a layer is made of

// Hidden states wait in the type of the matrices that read them, the most exact one. The original rounds them to that type
// for the product in any case.
static ggml_type pending_type(const indexmem_weights & weights, int64_t n_embd) {
    bool half = n_embd % ggml_blck_size(GGML_TYPE_Q8_0) != 0;
    for (const auto & [name, w] : weights) {
        if (w->ne[0] != n_embd || ggml_n_dims(w) < 2 || ggml_is_quantized(w->type)) {
            continue;
        }
        if (w->type != GGML_TYPE_F16) {
            return GGML_TYPE_F32;
        }
        half = true;
    }
    return half ? GGML_TYPE_F16 : GGML_TYPE_Q8_0;
}

llama_kv_cache_bounded::layer llama_kv_cache_bounded::new_layer(ggml_context * ctx, ggml_context * host, const indexmem_slice & slice,
        ggml_type type_k, ggml_type type_v) const {
    const auto & hparams = model.hparams;

    const uint32_t il = slice.il;

    const int64_t n_embd_k  = hparams.n_embd_head_k(il);
    const int64_t n_embd_v  = hparams.n_embd_head_v(il);
    const int64_t n_head    = slice.n_head;
    const int64_t n_seq_max = get_n_seq_max();

    const auto & geo = get_geometry();

    layer l = {};
    l.il    = il;
    l.head  = slice.head;
    l.cls   = slice.cls;
    l.whole = slice.n_head == hparams.n_head_kv(il);

    const uint32_t n_slots = get_n_slots(l);

    l.last = il;
    l.stock = host != ctx;
    l.k   = ggml_new_tensor_4d(ctx, type_k, n_embd_k, geo.n_front + n_slots, n_head, n_seq_max);
    l.v   = hparams.is_mla() ?
        ggml_view_4d(ctx, l.k, n_embd_v, l.k->ne[1], l.k->ne[2], l.k->ne[3], l.k->nb[1], l.k->nb[2], l.k->nb[3], 0) :
        ggml_new_tensor_4d(ctx, type_v, n_embd_v, geo.n_front + n_slots, n_head, n_seq_max);
    l.pos = ggml_new_tensor_3d(host, GGML_TYPE_I32, n_slots, n_head, n_seq_max);
    if (cfg.span > 0) {
        l.rotary = ggml_dup_tensor(host, l.pos);
        ggml_format_name(l.rotary, "bounded_rotary_l%d", il);
    }
    if (ggml_tensor * sinks = model.layers[il].attn_sinks) {
        const int64_t n = sinks->ne[0]/hparams.n_head_kv(il); // query heads of a KV head
        l.sinks = l.whole ? sinks : ggml_view_1d(ctx, sinks, n*n_head, l.head*n*sinks->nb[0]);
    }
    ggml_format_name(l.k,   "bounded_k_l%d",   il);
    ggml_format_name(l.v,   "bounded_v_l%d",   il);
    ggml_format_name(l.pos, "bounded_pos_l%d", il);
    if (indexer) {
        l.state = ggml_new_tensor_4d(host, GGML_TYPE_F32, indexer->n_state(), n_slots + geo.n_wait,
                l.whole ? indexer->n_state_heads() : n_head, n_seq_max);
        ggml_format_name(l.state, "bounded_state_l%d", il);
        if (l.head == 0) {
            l.pending = ggml_new_tensor_4d(ctx, pending_type(cfg.sidecar->get_layer(il), hparams.n_embd), hparams.n_embd, geo.n_wait, 1,
                    n_seq_max);
            ggml_format_name(l.pending, "bounded_pending_l%d", il);
        }
        if (geo.n_ring > 0) {
            l.queries = ggml_new_tensor_4d(host, GGML_TYPE_F32, indexer->n_query_state(), geo.n_ring + geo.n_wait, 1, n_seq_max);
            ggml_format_name(l.queries, "bounded_queries_l%d", il);
        }
    } else if (geo.n_ring > 0) {
        l.q = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, n_embd_k, geo.n_ring, hparams.n_head(il), n_seq_max);
        ggml_format_name(l.q, "bounded_q_l%d", il);
        if (strcmp(get_policy().name, "expected") == 0) {
            l.ahead = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_embd_k, n_embd_k);
            ggml_format_name(l.ahead, "bounded_ahead_l%d", il);
        }
    }
    if (cfg.memory) {
        for (const auto & shape : cfg.memory->shapes(n_embd_k, n_embd_v)) {
            ggml_tensor * t = ggml_new_tensor_4d(host, GGML_TYPE_F32, shape.ne0, shape.ne1, n_head, n_seq_max);
            ggml_format_name(t, "bounded_memory%zu_l%d", l.memory.size(), il);
            l.memory.push_back(t);
        }
    }
    return l;
}
