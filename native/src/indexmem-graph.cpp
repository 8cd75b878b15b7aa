#include "indexmem-graph.h"

#include "indexmem-error.h"
#include "indexmem-nodes.h"

#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

std::array<int32_t, INDEXMEM_CTL_SIZE> indexmem_ctl_of(const llama_kv_cache_bounded & kv, const llama_kv_cache_bounded::seq_state & before,
        const llama_kv_cache_bounded::seq_state & after, uint32_t n_tokens, uint32_t cls) {
    const llama_pos n_seen = before.n_seen + n_tokens;
    const int32_t   n_used = before.n_used + n_tokens;

    std::array<int32_t, INDEXMEM_CTL_SIZE> c = {};
    c[INDEXMEM_CTL_N_USED]   = n_used;
    c[INDEXMEM_CTL_N_EVICT]  = n_used - (int32_t) after.n_used;
    c[INDEXMEM_CTL_N_FIXED]  = before.n_fixed;
    c[INDEXMEM_CTL_POS_TAIL] = before.pos_tail();
    c[INDEXMEM_CTL_KEEP_LO]  = (int32_t) kv.get_counts().n_protected(before, cls);
    c[INDEXMEM_CTL_KEEP_HI]  = n_seen - (llama_pos) kv.get_counts().window_of(after);
    c[INDEXMEM_CTL_POS_LAST] = n_seen - 1;
    return c;
}

// Tokens of a ubatch that may be drafts, if the logits after each are wanted: so few that it does not matter how they are attended
static constexpr uint32_t N_DRAFTS = 32;

//
// llm_graph_input_attn_bounded
//

// The sequences are those of the ubatch: for some models llama.cpp reserves a graph of one, where the largest step is of all of them.
llm_graph_input_attn_bounded::shape llm_graph_input_attn_bounded::shape_of(
        const llama_kv_cache_bounded_context * mctx, const llama_ubatch & ubatch) {
    const auto & st = mctx->get_step();
    return { st.s0, ubatch.n_seqs_unq, ubatch.n_tokens/ubatch.n_seqs_unq, st.n_kv, st.evict, st.evict && st.rotary, st.recall, st.score, st.n_old };
}

llm_graph_input_attn_bounded::llm_graph_input_attn_bounded(
        const llm_graph_context & graph,
        const llama_kv_cache_bounded_context * mctx) :
    llm_graph_input_attn_kv(graph.hparams, graph.cparams, nullptr), mctx(mctx), sh(shape_of(mctx, graph.ubatch)) {
    ggml_context * ctx = graph.ctx0;

    const auto & kv = mctx->get_kv();
    auto st = mctx->get_step();
    st.n_seq = sh.n_seq;

    classes = std::vector<shared>(kv.get_config().n_classes());
    for (uint32_t c = 0; c < classes.size(); ++c) {
        classes[c].mask  = indexmem_new_input(ctx, "bounded_mask",  GGML_TYPE_F16, sh.n_kv[c], sh.n_tokens, 1, sh.n_seq);
        classes[c].slots = indexmem_new_input(ctx, "bounded_slots", GGML_TYPE_I64, sh.n_tokens, 1, sh.n_seq);

        if (sh.evict) {
            classes[c].stock.emplace(sh.n_seq);
            classes[c].ctl = indexmem_new_input(ctx, "bounded_ctl", GGML_TYPE_I32, INDEXMEM_CTL_SIZE, sh.n_seq);
        }
        if (sh.rotary) {
            classes[c].ctl_rotary = indexmem_new_input(ctx, "bounded_ctl_rotary", GGML_TYPE_I32, INDEXMEM_CTL_SIZE, sh.n_seq);
        }
        if (kv.get_indexer()) {
            classes[c].scoring.emplace(ctx, kv, c, st, sh.n_tokens);
        }
    }
    if (kv.get_memory()) {
        latent.emplace(kv, st);
    }
    if (!kv.get_indexer() && kv.get_n_ring() > 0) {
        const int64_t n_last = std::min<int64_t>(sh.n_tokens, kv.get_policy().n_queries);
        rings = indexmem_new_input(ctx, "bounded_rings", GGML_TYPE_I64, n_last, 1, sh.n_seq);
    }

    // the caller rotates q, k, v and the output when these are set
    if (kv.get_rot_k() > 0) {
        hadamard_k = indexmem_hadamard(kv.get_rot_k());
        self_k_rot = indexmem_new_input(ctx, "attn_inp_k_rot", GGML_TYPE_F32, kv.get_rot_k(), kv.get_rot_k());
    }
    if (kv.get_rot_v() > 0) {
        hadamard_v = indexmem_hadamard(kv.get_rot_v());
        self_v_rot = indexmem_new_input(ctx, "attn_inp_v_rot", GGML_TYPE_F32, kv.get_rot_v(), kv.get_rot_v());
    }
}

bool llm_graph_input_attn_bounded::can_reuse(const llm_graph_params & params) {
    const auto * mctx_new = indexmem_context(params.mctx);
    if (!mctx_new || !(shape_of(mctx_new, params.ubatch) == sh)) {
        return false;
    }
    mctx = mctx_new;
    return true;
}

void llm_graph_input_attn_bounded::set_class(uint32_t cls) {
    const auto & kv = mctx->get_kv();
    const auto   st = mctx->get_step().of(cls);

    auto & [mask, slots, ctl, ctl_rotary, mask_heads, scoring, stock] = classes[cls];
    const uint32_t n_kv = sh.n_kv[cls];

    const ggml_fp16_t zero = ggml_fp32_to_fp16(0.0f);
    const ggml_fp16_t inf  = ggml_fp32_to_fp16(-INFINITY);

    // where it lies in memory of the host the mask is written in place: it has n_kv values for each token
    const bool in_place = ggml_backend_buffer_is_host(mask->buffer);

    std::vector<ggml_fp16_t> data_mask (in_place ? 0 : ggml_nelements(mask));
    std::vector<int64_t>     data_slots(ggml_nelements(slots));

    ggml_fp16_t * row = in_place ? (ggml_fp16_t *) mask->data : data_mask.data();
    for (uint32_t s = 0; s < sh.n_seq; ++s) {
        const uint32_t n_used = st.before[s].n_used;
        for (uint32_t i = 0; i < sh.n_tokens; ++i, row += n_kv) {
            data_slots[s*sh.n_tokens + i] = n_used + i;

            // everything in the cache is in the past; among the new tokens attention is causal
            const int64_t first = kv.get_n_front() - row_first();
            const int64_t last  = first + n_used + i + 1;
            std::fill(row,         row + first,   inf);
            std::fill(row + first, row + last,    zero);
            std::fill(row + last,  row + n_kv,  inf);
            if (sh.recall) {
                std::fill(row, row + kv.get_n_latent(), zero); // empty ones are masked by their counts
            }
        }
    }
    if (!in_place) {
        ggml_backend_tensor_set(mask, data_mask.data(), 0, ggml_nbytes(mask));
    }
    ggml_backend_tensor_set(slots, data_slots.data(), 0, ggml_nbytes(slots));

    if (scoring) {
        scoring->set_input(kv, st);
    }

    if (ctl) {
        std::vector<int32_t> data_ctl;
        for (uint32_t s = 0; s < sh.n_seq; ++s) {
            const auto of_seq = indexmem_ctl_of(kv, st.before[s], st.after[s], sh.n_tokens, cls);
            data_ctl.insert(data_ctl.end(), of_seq.begin(), of_seq.end());
        }
        ggml_backend_tensor_set(ctl, data_ctl.data(), 0, ggml_nbytes(ctl));
        stock->set_input(data_ctl);
        if (ctl_rotary) {
            for (uint32_t s = 0; s < sh.n_seq; ++s) {
                data_ctl[s*INDEXMEM_CTL_SIZE + INDEXMEM_CTL_POS_TAIL] -= st.before[s].shift;
            }
            ggml_backend_tensor_set(ctl_rotary, data_ctl.data(), 0, ggml_nbytes(ctl_rotary));
        }
    }
}

void llm_graph_input_attn_bounded::set_input(const llama_ubatch * ubatch) {
    GGML_UNUSED(ubatch);

    const auto & kv = mctx->get_kv();
    const auto & st = mctx->get_step();

    for (uint32_t c = 0; c < classes.size(); ++c) {
        set_class(c);
    }
    if (latent) {
        latent->set_input();
    }

    if (rings) {
        const int64_t n_last = rings->ne[0];
        std::vector<int64_t> data_rings(ggml_nelements(rings));
        for (uint32_t s = 0; s < sh.n_seq; ++s) {
            const llama_pos p0 = st.before[s].n_seen + sh.n_tokens - n_last;
            for (int64_t i = 0; i < n_last; ++i) {
                data_rings[s*n_last + i] = (p0 + i) % kv.get_n_ring();
            }
        }
        ggml_backend_tensor_set(rings, data_rings.data(), 0, ggml_nbytes(rings));
    }

    if (self_k_rot) {
        ggml_backend_tensor_set(self_k_rot, hadamard_k.data(), 0, ggml_nbytes(self_k_rot));
    }
    if (self_v_rot) {
        ggml_backend_tensor_set(self_v_rot, hadamard_v.data(), 0, ggml_nbytes(self_v_rot));
    }
}

// One sequence: the same mask serves all KV heads. Several: a copy for each, since dimension 3 counts both.
ggml_tensor * llm_graph_input_attn_bounded::get_mask(ggml_context * ctx, uint32_t cls, int64_t n_head_kv) {
    ggml_tensor * mask = classes[cls].mask;
    if (sh.n_seq == 1 || n_head_kv == 1) {
        return mask;
    }
    auto & res = classes[cls].mask_heads[n_head_kv];
    if (!res) {
        res = ggml_repeat_4d(ctx, mask, mask->ne[0], sh.n_tokens, n_head_kv, sh.n_seq);
        res = ggml_reshape_4d(ctx, res, mask->ne[0], sh.n_tokens, 1, n_head_kv*sh.n_seq);
    }
    return res;
}

ggml_tensor * llm_graph_input_attn_bounded::build_attn(
        const llm_graph_context & graph,
        ggml_tensor * q_cur,
        ggml_tensor * k_cur,
        ggml_tensor * v_cur,
        float kq_scale,
        int   il) {
    ggml_context * ctx = graph.ctx0;
    ggml_cgraph  * gf  = graph.gf;

    const auto of_layer = mctx->get_kv().get_sources(il);
    if (of_layer.empty() || (of_layer[0]->il == (uint32_t) il) != (k_cur != nullptr)) {
        indexmem_fail(INDEXMEM_ERROR_MODEL, format("layer %d attends but has no bounded KV cache", il));
    }
    if (k_cur) {
        build_store(graph, of_layer, q_cur, k_cur, v_cur);
        if (of_layer[0]->last != (uint32_t) il) {
            owners[il] = { q_cur, kq_scale };
        }
    }
    const uint32_t il_own    = of_layer[0]->il;
    const int64_t  n_head_kv = hparams.n_head_kv(il_own);
    const bool     evict     = sh.evict && of_layer[0]->last == (uint32_t) il;

    const auto  owner = owners.find(il_own);
    const asked own   = owner == owners.end() ? asked{ q_cur, kq_scale } : owner->second;
    if (evict) {
        mctx->learn_scale(il_own, own.scale, softcap());
    }

    // Flash attention gives the heads of a token as neighbours, and takes masks that all heads share: what slots of a memory weigh is theirs.
    const bool by_token = !latent && std::none_of(of_layer.begin(), of_layer.end(), [](const auto * l) { return l->attends; });

    ggml_tensor * res = nullptr;
    for (const auto * l : of_layer) {
        ggml_tensor * cur = build_slice(graph, *l, l->of_heads(ctx, q_cur, n_head_kv), kq_scale, by_token);
        ggml_build_forward_expand(gf, cur);
        if (evict) {
            build_evict(graph, *l, l->of_heads(ctx, own.q, n_head_kv), own.scale);
        }
        res = res ? ggml_concat(ctx, res, cur, by_token ? 1 : 2) : cur;
    }
    // -> [n_embd_head_v*G*H, T*S]
    if (sh.n_tokens > 1 && !by_token) {
        res = ggml_cont(ctx, ggml_permute(ctx, res, 0, 2, 1, 3));
    }
    res = ggml_reshape_2d(ctx, res, ggml_nelements(res)/(sh.n_tokens*sh.n_seq), sh.n_tokens*sh.n_seq);
    ggml_build_forward_expand(gf, res);
    return res;
}

// q_cur F32 [n_embd_head_k, G*H, T*S] -> attention output F32 [n_embd_head_v*G, T, H, S], by_token: [n_embd_head_v*G, H, T, S]
ggml_tensor * llm_graph_input_attn_bounded::build_slice(const llm_graph_context & graph, const llama_kv_cache_bounded::layer & l,
        ggml_tensor * q_cur, float kq_scale, bool by_token) {
    ggml_context * ctx = graph.ctx0;

    const int64_t T   = sh.n_tokens;
    const int64_t S   = sh.n_seq;
    const int64_t H   = l.n_head();
    const int64_t G   = q_cur->ne[1]/H;

    const indexmem_layer_nodes nodes(ctx, mctx->get_kv(), l, sh.s0, S, T);

    if (by_token) {
        ggml_tensor * op = nodes.flash_by_token(q_cur, sh.n_kv[l.cls], row_first(), classes[l.cls].mask, kq_scale, softcap());
        put(graph, l, op);
        return ggml_reshape_4d(ctx, op, op->ne[0]*G, H, T, S);
    }
    ggml_tensor * q;
    if (S == 1) {
        q = ggml_view_4d(ctx, q_cur, q_cur->ne[0], T, G, H, q_cur->nb[2], q_cur->nb[1], q_cur->nb[1]*G, 0);
    } else {
        q = ggml_cont(ctx, indexmem_tokens_last(ctx, q_cur, T, S, T));
        q = ggml_reshape_4d(ctx, q, q->ne[0], T, G, H*S);
    }
    ggml_tensor * cur = build_attend(graph, nodes, l, q, kq_scale);
    if (latent) {
        const float scale = hparams.f_attention_scale != 0.0f ? hparams.f_attention_scale : 1.0f/std::sqrt((float) l.k->ne[0]);
        cur = latent->build_add(ctx, l, q, kq_scale/scale, cur);
    }
    return ggml_reshape_4d(ctx, cur, cur->ne[0]*G, T, H, S);
}

void llm_graph_input_attn_bounded::build_store(
        const llm_graph_context & graph,
        const std::vector<const llama_kv_cache_bounded::layer *> & of_layer,
        ggml_tensor * q_cur,
        ggml_tensor * k_cur,
        ggml_tensor * v_cur) {
    ggml_context * ctx = graph.ctx0;
    ggml_cgraph  * gf  = graph.gf;

    const auto & kv = mctx->get_kv();
    const uint32_t il = of_layer[0]->il;
    const int64_t  n_head_kv = hparams.n_head_kv(il);

    mctx->learn_rotation(il, k_cur, self_k_rot);

    for (const auto * l : of_layer) {
        const auto heads = [&](ggml_tensor * t) { return l->of_heads(ctx, t, n_head_kv); };
        const indexmem_layer_nodes nodes(ctx, kv, *l, sh.s0, sh.n_seq, sh.n_tokens);
        for (ggml_tensor * t : nodes.store(heads(k_cur), heads(v_cur), heads(q_cur), classes[l->cls].slots, rings)) {
            ggml_build_forward_expand(gf, t);
        }
    }
    if (!kv.get_indexer()) {
        return;
    }
    const auto hidden = hiddens.find(il);
    if (hidden == hiddens.end()) {
        indexmem_fail(INDEXMEM_ERROR_MODEL, format("the graph of architecture '%s' does not show what the attention of "
                    "layer %u reads, which an indexer needs: use it without a sidecar", llm_arch_name(graph.arch), il));
    }
    std::vector<ggml_tensor *> nodes;
    ggml_tensor * scores = classes[of_layer[0]->cls].scoring->build_scores(ctx, kv, *of_layer[0], hidden->second, nodes);
    for (const auto * l : of_layer) {
        if (scores) {
            nodes.push_back(classes[l->cls].scoring->build_store(ctx, *l, scores, n_head_kv));
        }
    }
    for (ggml_tensor * t : nodes) {
        ggml_build_forward_expand(gf, t);
    }
}

// q F32 [n_embd_head_k, T, G, H*S] -> F32 [n_embd_head_v, G, T, H*S]
ggml_tensor * llm_graph_input_attn_bounded::build_attend(
        const llm_graph_context & graph,
        const indexmem_layer_nodes & nodes,
        const llama_kv_cache_bounded::layer & l,
        ggml_tensor * q,
        float kq_scale) {
    ggml_context * ctx = graph.ctx0;

    ggml_tensor * k = nodes.streams(l.k, sh.n_kv[l.cls], row_first());
    ggml_tensor * v = nodes.streams(l.v, sh.n_kv[l.cls], row_first());

    ggml_tensor * count = latent ? latent->build_count(ctx, l) : nullptr;

    if (l.attends) {
        ggml_tensor * cur = ggml_indexmem_attend(ctx, q, k, v, get_mask(ctx, l.cls, l.k->ne[2]), count, l.sinks, kq_scale, softcap());
        if (sh.n_tokens <= N_DRAFTS && graph.n_outputs == (int64_t) sh.n_tokens*sh.n_seq) {
            ggml_indexmem_attend_alone(cur, l.k->ne[1]*l.k->ne[2], l.k->ne[3]);
        }
        return cur;
    }
    ggml_tensor * op;
    ggml_tensor * cur = nodes.flash(q, k, v, count || l.sinks ? classes[l.cls].mask : get_mask(ctx, l.cls, l.k->ne[2]), count, kq_scale, softcap(), op);
    put(graph, l, op);
    return cur;
}

// flash attention is computed where the entries are
void llm_graph_input_attn_bounded::put(const llm_graph_context & graph, const llama_kv_cache_bounded::layer & l, ggml_tensor * op) const {
    if (ggml_backend_buffer_is_host(l.k->buffer)) {
        ggml_backend_sched_set_tensor_backend(graph.sched, op, graph.backend_cpu);
    } else {
        graph.res->add_fused_node({ LLM_FUSED_OP_FLASH_ATTN, op, (int) l.il });
    }
}

void llm_graph_input_attn_bounded::build_evict(
        const llm_graph_context & graph,
        const llama_kv_cache_bounded::layer & l,
        ggml_tensor * q_cur,
        float kq_scale) {
    const indexmem_layer_nodes nodes(graph.ctx0, mctx->get_kv(), l, sh.s0, sh.n_seq, sh.n_tokens);

    auto & [mask, slots, ctl, ctl_rotary, mask_heads, scoring, stock] = classes[l.cls];
    const auto list = nodes.evict(q_cur, ctl, ctl_rotary, kq_scale, softcap(), latent ? &*latent : nullptr, scoring ? &*scoring : nullptr,
            &*stock);

    for (ggml_tensor * t : list) {
        if (t->op == GGML_OP_INDEXMEM) {
            ggml_indexmem_set_timer(t, &mctx->get_kv().evict_us);
        }
        if (t->op == GGML_OP_SET_ROWS && t->src[0]->op == GGML_OP_CONT) { // means that go to another device: their gaps are closed before
            ggml_backend_sched_set_tensor_backend(graph.sched, t->src[0], graph.backend_cpu);
        }
        ggml_build_forward_expand(graph.gf, t);
    }
    if (l.sinks && ggml_backend_buffer_is_host(l.k->buffer)) { // and not where these weights are: each eviction would copy all keys there
        ggml_backend_sched_set_tensor_backend(graph.sched, list[0], graph.backend_cpu);
    }
    graph.cb(list[0], "bounded_rank", l.il);
    graph.cb(list[1], "bounded_plan", l.il);
}
