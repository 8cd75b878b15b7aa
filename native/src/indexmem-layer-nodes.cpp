#include "indexmem-layer-nodes.h"

#include "indexmem-nodes.h"

#include "llama-hparams.h"

#include <algorithm>
#include <optional>

using kv_cache = llama_kv_cache_bounded;

indexmem_layer_nodes::indexmem_layer_nodes(ggml_context * ctx, const kv_cache & kv, const kv_cache::layer & l,
        uint32_t s0, int64_t n_seq, int64_t n_tokens) :
    ctx(ctx), kv(kv), l(l), s0(s0), n_seq(n_seq), n_tokens(n_tokens) {
}

ggml_tensor * indexmem_layer_nodes::entries(ggml_tensor * t) const {
    return indexmem_view_seqs(ctx, t, kv.get_n_slots(l), s0, n_seq, kv.get_n_front());
}

std::vector<ggml_tensor *> indexmem_layer_nodes::store(
        ggml_tensor * k_cur, ggml_tensor * v_cur, ggml_tensor * q_cur, ggml_tensor * slots, ggml_tensor * rings) const {
    const auto last = [&](ggml_tensor * cur, int64_t n) { return indexmem_tokens_last(ctx, cur, n_tokens, n_seq, n); };

    std::vector<ggml_tensor *> res = { ggml_set_rows(ctx, entries(l.k), last(k_cur, n_tokens), slots) };
    if (l.has_values()) {
        res.push_back(ggml_set_rows(ctx, entries(l.v), last(v_cur, n_tokens), slots));
    }
    if (l.q) {
        res.push_back(ggml_set_rows(ctx, indexmem_view_seqs(ctx, l.q, l.q->ne[1], s0, n_seq), last(q_cur, rings->ne[0]), rings));
    }
    return res;
}

// heads of a sequence are neighbours in memory, so (head, sequence) is one dimension
ggml_tensor * indexmem_layer_nodes::streams(ggml_tensor * t, int64_t n, int64_t i0) const {
    return ggml_view_4d(ctx, t, t->ne[0], n, 1, t->ne[2]*n_seq, t->nb[1], t->nb[2], t->nb[2], i0*t->nb[1] + s0*t->nb[3]);
}

ggml_tensor * indexmem_layer_nodes::flash_by_token(ggml_tensor * q_cur, int64_t n_kv, int64_t i0, ggml_tensor * mask, float scale,
        float softcap) const {
    const auto rows = [&](ggml_tensor * t) {
        return ggml_view_4d(ctx, t, t->ne[0], n_kv, t->ne[2], n_seq, t->nb[1], t->nb[2], t->nb[3], i0*t->nb[1] + s0*t->nb[3]);
    };
    ggml_tensor * q = ggml_view_4d(ctx, q_cur, q_cur->ne[0], n_tokens, q_cur->ne[1], n_seq, q_cur->nb[2], q_cur->nb[1],
            n_tokens*q_cur->nb[2], 0);
    ggml_tensor * op = ggml_flash_attn_ext(ctx, q, rows(l.k), rows(l.v), mask, scale, 0.0f, softcap);
    ggml_flash_attn_ext_add_sinks(op, l.sinks);
    ggml_prec_set_acc(op, GGML_PREC_F32);
    return op;
}

ggml_tensor * indexmem_layer_nodes::flash(ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * mask, ggml_tensor * count,
        float scale, float softcap, ggml_tensor *& op) const {
    const int64_t H = l.k->ne[2];
    const int64_t G = q->ne[2];
    const int64_t T = q->ne[1];
    const int64_t S = n_seq;

    if (count) {
        mask = ggml_indexmem_bias(ctx, mask, count);
    }
    if (l.sinks) {
        // flash attention wants all heads that have a sink in dimension 2
        if (mask->ne[3] > S) {
            mask = ggml_repeat_4d(ctx, ggml_reshape_4d(ctx, mask, mask->ne[0]*T, 1, H, S), mask->ne[0]*T, G, H, S);
            mask = ggml_reshape_4d(ctx, mask, mask->ne[0]/T, T, G*H, S);
        }
        const auto heads = [&](ggml_tensor * t) {
            return ggml_view_4d(ctx, t, t->ne[0], t->ne[1], t->ne[2]*H, S, t->nb[1], t->ne[2] > 1 ? t->nb[2] : t->nb[3], H*t->nb[3], 0);
        };
        q = heads(q);
        k = heads(k);
        v = heads(v);
    }
    op = ggml_flash_attn_ext(ctx, q, k, v, mask, scale, 0.0f, softcap);
    ggml_flash_attn_ext_add_sinks(op, l.sinks);
    ggml_prec_set_acc(op, GGML_PREC_F32);
    if (!l.sinks) {
        return op;
    }
    ggml_tensor * res = ggml_permute(ctx, ggml_reshape_4d(ctx, op, op->ne[0]*G, H, T, S), 0, 2, 1, 3);
    return ggml_reshape_4d(ctx, T > 1 ? ggml_cont(ctx, res) : res, op->ne[0], G, T, H*S);
}

ggml_tensor * indexmem_layer_nodes::rank(ggml_tensor * pos, ggml_tensor * q_cur, ggml_tensor * ctl, float scale, float softcap,
        indexmem_scoring * scoring, indexmem_stock * stock) const {
    if (scoring) {
        return scoring->build_rank(ctx, kv, l, pos, ctl);
    }
    ggml_tensor * q = nullptr;
    if (l.q) {
        q = indexmem_view_seqs(ctx, l.q, l.q->ne[1], s0, n_seq);
        if (l.ahead) {
            // as one matrix: not every device repeats dimension 3
            ggml_tensor * turned = ggml_mul_mat(ctx, l.ahead, ggml_reshape_2d(ctx, q, q->ne[0], ggml_nrows(q)));
            ggml_prec_set_acc(turned, GGML_PREC_F32);
            q = ggml_reshape_4d(ctx, turned, q->ne[0], q->ne[1], q->ne[2], q->ne[3]);
        }
    } else if (kv.get_policy().n_queries > 0) {
        q = indexmem_tokens_last(ctx, q_cur, n_tokens, n_seq, 1); // a ring of one row
    }
    ggml_tensor * k = entries(l.k);
    if (l.stock && indexmem_stock::ranks(kv.get_config().policy)) {
        return stock->build_rank(ctx, k, pos, ctl, q, l.sinks, kv.get_config().policy, scale, softcap);
    }
    if (l.stock && !kv.get_policy().needs_keys) {
        k = ggml_view_4d(ctx, pos, 1, pos->ne[0], pos->ne[1], pos->ne[2], pos->nb[0], pos->nb[1], pos->nb[2], 0); // for its shape
    }
    return ggml_indexmem_rank(ctx, k, pos, ctl, q, l.sinks, kv.get_config().policy, l.il, kv.get_config().seed, scale, softcap);
}

std::vector<ggml_tensor *> indexmem_layer_nodes::evict(ggml_tensor * q_cur, ggml_tensor * ctl, ggml_tensor * ctl_rotary, float scale, float softcap,
        indexmem_latent * latent, indexmem_scoring * scoring, indexmem_stock * stock) const {
    ggml_tensor * k   = entries(l.k);
    ggml_tensor * v   = entries(l.v);

    const auto table = [&](ggml_tensor * t) {
        return ggml_view_3d(ctx, t, t->ne[0], t->ne[1], n_seq, t->nb[1], t->nb[2], s0*t->nb[2]);
    };
    ggml_tensor * pos = table(l.pos);

    ggml_tensor * ranks = rank(pos, q_cur, ctl, scale, softcap, scoring, stock);
    ggml_tensor * plan  = ggml_indexmem_select(ctx, ranks, pos, ctl, kv.get_counts().evict_max((uint32_t) n_tokens));

    std::vector<ggml_tensor *> res = { ranks, plan };
    ggml_tensor * moves = l.stock ? ggml_indexmem_moves(ctx, plan) : nullptr;
    if (latent) {
        const auto writes = moves ? latent->build_write(ctx, l, indexmem_stock_leaving(ctx, k, moves), indexmem_stock_leaving(ctx, v, moves),
                indexmem_stock_leaving_plan(ctx, moves), ctl) : latent->build_write(ctx, l, k, v, plan, ctl);
        res.insert(res.end(), writes.begin(), writes.end());
    }
    const auto compact = [&](ggml_tensor * t) {
        return moves && indexmem_stock_exact(t->type) ? indexmem_stock_compact(ctx, t, moves) : ggml_indexmem_compact(ctx, t, plan, ctl);
    };
    res.push_back(compact(k));
    if (l.has_values()) {
        res.push_back(compact(v));
    }
    res.push_back(ggml_indexmem_compact_pos(ctx, pos, plan, ctl));
    if (ctl_rotary) {
        res.push_back(ggml_indexmem_compact_pos(ctx, table(l.rotary), plan, ctl_rotary));
    }
    if (scoring) {
        res.push_back(scoring->build_compact(ctx, kv, l, plan, ctl));
    }
    return res;
}

std::vector<ggml_tensor *> indexmem_layer_nodes_of_all(ggml_context * ctx, const llama_hparams & hparams, const kv_cache & kv,
        const kv_cache::layer & l, uint32_t n_seq, uint32_t n_tokens) {
    const int64_t T  = n_tokens;
    const int64_t S  = n_seq;
    const int64_t H  = l.n_head();
    const int64_t Hq = hparams.n_head(l.il)/hparams.n_head_kv(l.il)*H;

    kv_cache::step st = {};
    st.n_seq    = n_seq;
    st.n_tokens = n_tokens;
    st.evict  = true;
    st.recall = kv.get_memory()  != nullptr;
    st.score  = kv.get_indexer() != nullptr;
    st.n_old  = kv.get_n_wait();

    const auto input = [&](ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2 = 1, int64_t ne3 = 1) {
        return ggml_new_tensor_4d(ctx, type, ne0, ne1, ne2, ne3);
    };
    ggml_tensor * q_cur = input(GGML_TYPE_F32, l.k->ne[0], Hq, T*S);
    ggml_tensor * k_cur = input(GGML_TYPE_F32, l.k->ne[0], H,  T*S);
    ggml_tensor * v_cur = input(GGML_TYPE_F32, l.v->ne[0], H,  T*S);
    ggml_tensor * slots = input(GGML_TYPE_I64, T, 1, S);
    ggml_tensor * ctl   = input(GGML_TYPE_I32, INDEXMEM_CTL_SIZE, S);
    ggml_tensor * rings = l.q ? input(GGML_TYPE_I64, std::min<int64_t>(T, kv.get_policy().n_queries), 1, S) : nullptr;

    const float scale   = 1.0f;
    const float softcap = hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0f;

    const int64_t n_kv = kv.get_geometry().n_kv_max(l.cls, true);

    const indexmem_layer_nodes nodes(ctx, kv, l, 0, S, T);

    std::optional<indexmem_latent>  latent;
    std::optional<indexmem_scoring> scoring;
    indexmem_stock stock(S);

    auto res = nodes.store(k_cur, v_cur, q_cur, slots, rings);
    const auto add = [&](const std::vector<ggml_tensor *> & more) { res.insert(res.end(), more.begin(), more.end()); };

    if (st.score) {
        const auto & indexer = *kv.get_indexer();
        scoring.emplace(ctx, kv, l.cls, st, n_tokens);
        ggml_tensor * scores = l.pending ? scoring->build_scores(ctx, kv, l, input(GGML_TYPE_F32, hparams.n_embd, T*S), res) :
            input(GGML_TYPE_F32, indexer.n_state(), indexer.n_state_heads(), (st.n_old + T)*S);
        add({ scoring->build_store(ctx, l, scores, hparams.n_head_kv(l.il)) });
    }
    ggml_tensor * count = nullptr;
    if (st.recall) {
        latent.emplace(kv, st);
        count = latent->build_count(ctx, l);
    }
    ggml_tensor * q    = input(GGML_TYPE_F32, l.k->ne[0], T, Hq/H, H*S);
    ggml_tensor * k    = nodes.streams(l.k, n_kv, 0);
    ggml_tensor * v    = nodes.streams(l.v, n_kv, 0);
    ggml_tensor * mask = input(GGML_TYPE_F16, n_kv, T, 1, S);
    ggml_tensor * each = S == 1 || H == 1 ? mask : input(GGML_TYPE_F16, n_kv, T, 1, H*S);

    ggml_tensor * op;
    ggml_tensor * cur = l.attends ? ggml_indexmem_attend(ctx, q, k, v, each, count, l.sinks, scale, softcap) :
        latent ? nodes.flash(q, k, v, count || l.sinks ? mask : each, count, scale, softcap, op) :
        nodes.flash_by_token(q_cur, n_kv, 0, mask, scale, softcap);
    add({ latent ? latent->build_add(ctx, l, q, 1.0f, cur) : cur });
    add(nodes.evict(q_cur, ctl, l.rotary ? ctl : nullptr, scale, softcap, latent ? &*latent : nullptr, scoring ? &*scoring : nullptr,
            &stock));
    return res;
}
