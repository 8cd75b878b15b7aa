#include "indexmem-graph.h"

#include "indexmem-error.h"

#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <cmath>
#include <stdexcept>

// entry (i, j) is +-1/sqrt(n), negative where i and j share an odd number of bits
std::vector<float> indexmem_hadamard(int64_t n) {
    const float value = 1.0f/std::sqrt((float) n);
    std::vector<float> res(n*n);
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < n; ++j) {
            bool odd = false;
            for (int64_t both = i & j; both; both &= both - 1) {
                odd = !odd;
            }
            res[i*n + j] = odd ? -value : value;
        }
    }
    return res;
}

ggml_tensor * indexmem_new_input(ggml_context * ctx, const char * name, ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2, int64_t ne3) {
    ggml_tensor * res = ggml_new_tensor_4d(ctx, type, ne0, ne1, ne2, ne3);
    ggml_set_input(res);
    ggml_set_name(res, name);
    return res;
}

ggml_tensor * indexmem_view_seqs(ggml_context * ctx, ggml_tensor * t, int64_t n, uint32_t s0, int64_t n_seq, int64_t i0) {
    return ggml_view_4d(ctx, t, t->ne[0], n, t->ne[2], n_seq, t->nb[1], t->nb[2], t->nb[3], i0*t->nb[1] + s0*t->nb[3]);
}

ggml_tensor * indexmem_tokens_last(ggml_context * ctx, ggml_tensor * cur, int64_t n_tokens, int64_t n_seq, int64_t n) {
    cur = ggml_view_4d(ctx, cur, cur->ne[0], cur->ne[1], n, n_seq,
            cur->nb[1], cur->nb[2], cur->nb[2]*n_tokens, cur->nb[2]*(n_tokens - n));
    return ggml_permute(ctx, cur, 0, 2, 1, 3);
}

//
// llm_graph_input_attn_bounded
//

llm_graph_input_attn_bounded::shape llm_graph_input_attn_bounded::shape_of(
        const llama_kv_cache_bounded_context * mctx, uint32_t n_tokens) {
    const auto & st = mctx->get_step();
    return { st.s0, st.n_seq, n_tokens/st.n_seq, st.n_kv, st.evict, st.recall, st.score, st.n_old };
}

llm_graph_input_attn_bounded::llm_graph_input_attn_bounded(
        const llm_graph_context & graph,
        const llama_kv_cache_bounded_context * mctx) :
    llm_graph_input_attn_kv(graph.hparams, graph.cparams, nullptr), mctx(mctx), sh(shape_of(mctx, graph.ubatch.n_tokens)) {
    ggml_context * ctx = graph.ctx0;

    const auto & kv = mctx->get_kv();

    mask  = indexmem_new_input(ctx, "bounded_mask",  GGML_TYPE_F16, sh.n_kv, sh.n_tokens, 1, sh.n_seq);
    slots = indexmem_new_input(ctx, "bounded_slots", GGML_TYPE_I64, sh.n_tokens, 1, sh.n_seq);

    if (sh.evict) {
        ctl = indexmem_new_input(ctx, "bounded_ctl", GGML_TYPE_I32, INDEXMEM_CTL_SIZE, sh.n_seq);
    }
    if (kv.get_memory()) {
        latent.emplace(kv, mctx->get_step());
    }
    if (kv.get_indexer()) {
        scoring.emplace(ctx, kv, mctx->get_step(), sh.n_tokens);
    } else if (kv.get_n_ring() > 0) {
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
    if (!mctx_new || !(shape_of(mctx_new, params.ubatch.n_tokens) == sh)) {
        return false;
    }
    mctx = mctx_new;
    return true;
}

void llm_graph_input_attn_bounded::set_input(const llama_ubatch * ubatch) {
    GGML_UNUSED(ubatch);

    const auto & kv = mctx->get_kv();
    const auto & st = mctx->get_step();

    const ggml_fp16_t zero = ggml_fp32_to_fp16(0.0f);
    const ggml_fp16_t inf  = ggml_fp32_to_fp16(-INFINITY);

    std::vector<ggml_fp16_t> data_mask (ggml_nelements(mask), inf);
    std::vector<int64_t>     data_slots(ggml_nelements(slots));

    for (uint32_t s = 0; s < sh.n_seq; ++s) {
        const uint32_t n_used = st.before[s].n_used;
        for (uint32_t i = 0; i < sh.n_tokens; ++i) {
            data_slots[s*sh.n_tokens + i] = n_used + i;

            // everything in the cache is in the past; among the new tokens attention is causal
            ggml_fp16_t * row = data_mask.data() + (int64_t) (s*sh.n_tokens + i)*sh.n_kv;
            if (sh.recall) {
                std::fill(row, row + kv.get_n_latent(), zero); // empty ones are masked by their counts
            }
            row += kv.get_n_front() - row_first();
            std::fill(row, row + n_used + i + 1, zero);
        }
    }
    ggml_backend_tensor_set(mask,  data_mask.data(),  0, ggml_nbytes(mask));
    ggml_backend_tensor_set(slots, data_slots.data(), 0, ggml_nbytes(slots));

    if (latent) {
        latent->set_input();
    }
    if (scoring) {
        scoring->set_input(kv, st);
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

    if (ctl) {
        std::vector<int32_t> data_ctl(ggml_nelements(ctl), 0);
        for (uint32_t s = 0; s < sh.n_seq; ++s) {
            const auto & before = st.before[s];
            const auto & after  = st.after[s];

            const llama_pos n_seen = before.n_seen + sh.n_tokens;
            const int32_t   n_used = before.n_used + sh.n_tokens;

            int32_t * c = data_ctl.data() + s*INDEXMEM_CTL_SIZE;
            c[INDEXMEM_CTL_N_USED]   = n_used;
            c[INDEXMEM_CTL_N_EVICT]  = n_used - (int32_t) after.n_used;
            c[INDEXMEM_CTL_N_FIXED]  = before.n_fixed;
            c[INDEXMEM_CTL_POS_TAIL] = before.pos_tail();
            c[INDEXMEM_CTL_KEEP_LO]  = std::max(kv.get_config().sinks, before.pin);
            c[INDEXMEM_CTL_KEEP_HI]  = n_seen - (llama_pos) kv.get_config().window;
            c[INDEXMEM_CTL_POS_LAST] = n_seen - 1;
        }
        ggml_backend_tensor_set(ctl, data_ctl.data(), 0, ggml_nbytes(ctl));
    }

    if (self_k_rot) {
        ggml_backend_tensor_set(self_k_rot, hadamard_k.data(), 0, ggml_nbytes(self_k_rot));
    }
    if (self_v_rot) {
        ggml_backend_tensor_set(self_v_rot, hadamard_v.data(), 0, ggml_nbytes(self_v_rot));
    }
}

// the slots of entries of K or V, for the sequences of the ubatch
ggml_tensor * llm_graph_input_attn_bounded::view_entries(ggml_context * ctx, ggml_tensor * t) const {
    const auto & kv = mctx->get_kv();
    return indexmem_view_seqs(ctx, t, kv.get_n_slots(), sh.s0, sh.n_seq, kv.get_n_front());
}

// One sequence: the same mask serves all KV heads. Several: a copy for each, since dimension 3 counts both.
ggml_tensor * llm_graph_input_attn_bounded::get_mask(ggml_context * ctx, int64_t n_head_kv) {
    if (sh.n_seq == 1 || n_head_kv == 1) {
        return mask;
    }
    auto & res = mask_heads[n_head_kv];
    if (!res) {
        res = ggml_repeat_4d(ctx, mask, sh.n_kv, sh.n_tokens, n_head_kv, sh.n_seq);
        res = ggml_reshape_4d(ctx, res, sh.n_kv, sh.n_tokens, 1, n_head_kv*sh.n_seq);
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

    const auto * l = mctx->get_kv().get_layer(il);
    if (!l) {
        throw std::runtime_error(format("layer %d attends but has no bounded KV cache", il));
    }

    const int64_t T   = sh.n_tokens;
    const int64_t S   = sh.n_seq;
    const int64_t H   = l->k->ne[2];
    const int64_t Hq  = q_cur->ne[1];
    const int64_t G   = Hq/H;
    // store
    ggml_build_forward_expand(gf, ggml_set_rows(ctx, view_entries(ctx, l->k), indexmem_tokens_last(ctx, k_cur, T, S, T), slots));
    ggml_build_forward_expand(gf, ggml_set_rows(ctx, view_entries(ctx, l->v), indexmem_tokens_last(ctx, v_cur, T, S, T), slots));
    if (l->q) {
        ggml_build_forward_expand(gf, ggml_set_rows(ctx,
                    indexmem_view_seqs(ctx, l->q, l->q->ne[1], sh.s0, S), indexmem_tokens_last(ctx, q_cur, T, S, rings->ne[0]), rings));
    }

    if (scoring) {
        const auto hidden = hiddens.find(il);
        if (hidden == hiddens.end()) {
            indexmem_fail(INDEXMEM_ERROR_MODEL, format("the graph of architecture '%s' does not show what the attention of "
                        "layer %d reads, which an indexer needs: use it without a sidecar", llm_arch_name(graph.arch), il));
        }
        scoring->build_store(graph, mctx->get_kv(), *l, hidden->second);
    }

    // attend: heads of a sequence are neighbours in memory, so (head, sequence) is one dimension
    ggml_tensor * q;
    if (S == 1) {
        q = ggml_view_4d(ctx, q_cur, q_cur->ne[0], T, G, H, q_cur->nb[2], q_cur->nb[1], q_cur->nb[1]*G, 0);
    } else {
        q = ggml_cont(ctx, indexmem_tokens_last(ctx, q_cur, T, S, T));
        q = ggml_reshape_4d(ctx, q, q->ne[0], T, G, H*S);
    }
    ggml_tensor * cur = build_attend(graph, *l, q, kq_scale);
    if (latent) {
        const float scale = hparams.f_attention_scale != 0.0f ? hparams.f_attention_scale : 1.0f/std::sqrt((float) l->k->ne[0]);
        cur = latent->build_add(ctx, *l, q, kq_scale/scale, cur);
    }

    // [n_embd_head_v, G, T, H*S] -> [n_embd_head_v*G*H, T*S]
    if (T > 1) {
        cur = ggml_reshape_4d(ctx, cur, cur->ne[0]*G, T, H, S);
        cur = ggml_cont(ctx, ggml_permute(ctx, cur, 0, 2, 1, 3));
    }
    cur = ggml_reshape_2d(ctx, cur, l->v->ne[0]*Hq, T*S);
    ggml_build_forward_expand(gf, cur);

    if (sh.evict) {
        build_evict(graph, *l, q_cur, kq_scale);
    }

    return cur;
}

// q F32 [n_embd_head_k, T, G, H*S] -> F32 [n_embd_head_v, G, T, H*S]
ggml_tensor * llm_graph_input_attn_bounded::build_attend(
        const llm_graph_context & graph,
        const llama_kv_cache_bounded::layer & l,
        ggml_tensor * q,
        float kq_scale) {
    ggml_context * ctx = graph.ctx0;

    const auto streams = [&](ggml_tensor * t) {
        return ggml_view_4d(ctx, t, t->ne[0], sh.n_kv, 1, q->ne[3], t->nb[1], t->nb[2], t->nb[2], row_first()*t->nb[1] + sh.s0*t->nb[3]);
    };
    const float softcap = hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0f;

    ggml_tensor * count = latent ? latent->build_count(ctx, l) : nullptr;

    if (l.attends) {
        return ggml_indexmem_attend(ctx, q, streams(l.k), streams(l.v), get_mask(ctx, l.k->ne[2]), count, kq_scale, softcap);
    }
    ggml_tensor * biased = count ? ggml_indexmem_bias(ctx, mask, count) : get_mask(ctx, l.k->ne[2]);
    ggml_tensor * cur    = ggml_flash_attn_ext(ctx, q, streams(l.k), streams(l.v), biased, kq_scale, 0.0f, softcap);
    ggml_prec_set_acc(cur, GGML_PREC_F32);
    if (ggml_backend_buffer_is_host(l.k->buffer)) {
        ggml_backend_sched_set_tensor_backend(graph.sched, cur, graph.backend_cpu); // where the entries are
    } else {
        graph.res->add_fused_node({ LLM_FUSED_OP_FLASH_ATTN, cur, (int) l.il });
    }
    return cur;
}

void llm_graph_input_attn_bounded::build_evict(
        const llm_graph_context & graph,
        const llama_kv_cache_bounded::layer & l,
        ggml_tensor * q_cur,
        float kq_scale) {
    ggml_context * ctx = graph.ctx0;
    ggml_cgraph  * gf  = graph.gf;

    const auto & kv = mctx->get_kv();

    ggml_tensor * k   = view_entries(ctx, l.k);
    ggml_tensor * v   = view_entries(ctx, l.v);
    ggml_tensor * pos = ggml_view_3d(ctx, l.pos, l.pos->ne[0], l.pos->ne[1], sh.n_seq, l.pos->nb[1], l.pos->nb[2], sh.s0*l.pos->nb[2]);

    ggml_tensor * rank = build_rank(graph, l, pos, q_cur, kq_scale);
    ggml_tensor * plan = ggml_indexmem_select(ctx, rank, pos, ctl, kv.get_evict_max(sh.n_tokens));

    std::vector<ggml_tensor *> nodes = { rank, plan };
    if (latent) {
        const auto writes = latent->build_write(ctx, l, k, v, plan, ctl);
        nodes.insert(nodes.end(), writes.begin(), writes.end());
    }
    nodes.push_back(ggml_indexmem_compact    (ctx, k,   plan, ctl));
    nodes.push_back(ggml_indexmem_compact    (ctx, v,   plan, ctl));
    nodes.push_back(ggml_indexmem_compact_pos(ctx, pos, plan, ctl));
    if (scoring) {
        nodes.push_back(scoring->build_compact(ctx, kv, l, plan, ctl));
    }
    for (ggml_tensor * t : nodes) {
        if (t->op == GGML_OP_INDEXMEM) {
            ggml_indexmem_set_timer(t, &kv.evict_us);
        }
        ggml_build_forward_expand(gf, t);
    }
    graph.cb(rank, "bounded_rank", l.il);
    graph.cb(plan, "bounded_plan", l.il);
}

ggml_tensor * llm_graph_input_attn_bounded::build_rank(
        const llm_graph_context & graph,
        const llama_kv_cache_bounded::layer & l,
        ggml_tensor * pos,
        ggml_tensor * q_cur,
        float kq_scale) {
    ggml_context * ctx = graph.ctx0;

    const auto & kv = mctx->get_kv();

    if (scoring) {
        return scoring->build_rank(ctx, kv, l, pos, ctl);
    }
    ggml_tensor * q = nullptr;
    if (l.q) {
        q = indexmem_view_seqs(ctx, l.q, l.q->ne[1], sh.s0, sh.n_seq);
    } else if (kv.get_policy().n_queries > 0) {
        q = indexmem_tokens_last(ctx, q_cur, sh.n_tokens, sh.n_seq, 1); // a ring of one row
    }
    return ggml_indexmem_rank(ctx, view_entries(ctx, l.k), pos, ctl, q, kv.get_config().policy, l.il, kv.get_config().seed,
            kq_scale, hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0f);
}
