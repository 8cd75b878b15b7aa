#include "indexmem-scoring.h"

#include "indexmem-error.h"
#include "indexmem-nodes.h"

#include "llama-impl.h"

using kv_cache = llama_kv_cache_bounded;

indexmem_scoring::indexmem_scoring(ggml_context * ctx, const kv_cache & kv, uint32_t cls, const kv_cache::step & st, uint32_t n_tokens) :
    cls(cls), s0(st.s0), n_seq(st.n_seq), n_tokens(n_tokens), n_old(st.n_old), score(st.score),
    in_ring(n_old > 0 && n_old + this->n_tokens <= (int64_t) kv.get_n_wait()) {
    if (score && n_old + n_tokens > 0) {
        slots = indexmem_new_input(ctx, "indexer_slots", GGML_TYPE_I64, n_old + n_tokens, 1, n_seq);
    }
}

// What a layer reads and writes by. A class that has no first slice of a layer makes none of it, and a graph has no input without use.
void indexmem_scoring::make_rows(ggml_context * ctx, const kv_cache & kv) {
    if (!rows_new && n_tokens > 0 && (!score || in_ring)) {
        rows_new = indexmem_new_input(ctx, "indexer_rows_new", GGML_TYPE_I64, n_tokens, 1, n_seq);
    }
    if (!slots) {
        return;
    }
    if (!rows_old && n_old > 0) {
        rows_old = indexmem_new_input(ctx, "indexer_rows_old", GGML_TYPE_I32, in_ring ? n_old + n_tokens : n_old, n_seq);
    }
    const int64_t n_queries = kv.get_indexer()->n_queries();
    if (!rows_query && n_queries > 0) {
        rows_query = indexmem_new_input(ctx, "indexer_rows_query", GGML_TYPE_I64, std::min(n_old + n_tokens, n_queries), 1, n_seq);
    }
}

void indexmem_scoring::set_input(const kv_cache & kv, const kv_cache::step & st) {
    const int64_t n_ring_old = kv.get_n_wait();

    if (rows_new) {
        std::vector<int64_t> data(ggml_nelements(rows_new));
        for (int64_t s = 0; s < n_seq; ++s) {
            for (int64_t i = 0; i < n_tokens; ++i) {
                data[s*n_tokens + i] = (st.before[s].n_seen + i) % n_ring_old;
            }
        }
        ggml_backend_tensor_set(rows_new, data.data(), 0, ggml_nbytes(rows_new));
    }
    if (!slots) {
        return;
    }

    const int64_t n_rows = n_old + n_tokens;
    const int64_t n_read = rows_old ? rows_old->ne[0] : 0; // rows that come from the ring

    std::vector<int32_t> data_old(n_read*n_seq, 0);
    std::vector<int64_t> data_slots(n_rows*n_seq);
    for (int64_t s = 0; s < n_seq; ++s) {
        const auto & seq = st.before[s];

        const int64_t n_missing = n_old - seq.n_pending();
        for (int64_t i = 0; i < n_rows; ++i) {
            data_slots[s*n_rows + i] = i < n_missing ? kv.get_geometry().n_slots[cls] + i : seq.n_used - n_old + i;
        }
        for (int64_t i = n_missing; i < n_read; ++i) {
            data_old[s*n_read + i] = (int32_t) ((seq.n_seen - n_old + i) % n_ring_old);
        }
    }
    ggml_backend_tensor_set(slots, data_slots.data(), 0, ggml_nbytes(slots));
    if (rows_old) {
        ggml_backend_tensor_set(rows_old, data_old.data(), 0, ggml_nbytes(rows_old));
    }

    if (rows_query) {
        const int64_t n_last = rows_query->ne[0];
        std::vector<int64_t> data(n_last*n_seq);
        for (int64_t s = 0; s < n_seq; ++s) {
            const auto & seq = st.before[s];
            for (int64_t i = 0; i < n_last; ++i) {
                const int64_t row = n_rows - n_last + i; // of the scored rows
                const int64_t p   = seq.n_seen - n_old + row;
                data[s*n_last + i] = row < n_old - seq.n_pending() ? kv.get_n_ring() + row : p % kv.get_n_ring();
            }
        }
        ggml_backend_tensor_set(rows_query, data.data(), 0, ggml_nbytes(rows_query));
    }
}

ggml_tensor * indexmem_scoring::build_scores(ggml_context * ctx, const kv_cache & kv, const kv_cache::layer & l, ggml_tensor * hidden,
        std::vector<ggml_tensor *> & res) {
    make_rows(ctx, kv);

    const int64_t n_embd = l.pending->ne[0];
    if (hidden && hidden->ne[0] != n_embd) {
        indexmem_fail(INDEXMEM_ERROR_MODEL, format("the attention of layer %d reads %lld values per token, the indexer %lld", l.il,
                    (long long) hidden->ne[0], (long long) n_embd));
    }
    if (hidden) {
        // a node of its own, so that whoever follows the evaluation (training does) finds what the indexer reads in every architecture
        hidden = ggml_is_contiguous(hidden) ? ggml_reshape_2d(ctx, hidden, n_embd, ggml_nrows(hidden)) : ggml_cont(ctx, hidden);
        ggml_format_name(hidden, "indexmem_hidden-%d", (int) l.il);
    }

    ggml_tensor * ring = indexmem_view_seqs(ctx, l.pending, l.pending->ne[1], s0, n_seq);
    if (rows_new) {
        ring = ggml_set_rows(ctx, ring, ggml_reshape_4d(ctx, hidden, n_embd, n_tokens, 1, n_seq), rows_new);
    }
    if (!slots) {
        res.push_back(ring);
        return nullptr;
    }

    const auto & indexer = *kv.get_indexer();
    const auto & weights = kv.get_config().sidecar->get_layer(l.il);

    const int64_t n_rows = n_old + n_tokens; // per sequence

    if (n_old > 0) {
        ggml_tensor * rows = ggml_view_3d(ctx, ring, n_embd, ring->ne[1], n_seq, ring->nb[1], ring->nb[3], 0);
        rows = ggml_get_rows(ctx, rows, rows_old);
        if (!in_ring) {
            rows = ggml_concat(ctx, rows, ggml_reshape_3d(ctx, hidden, n_embd, n_tokens, n_seq), 1);
        }
        hidden = ggml_reshape_2d(ctx, rows, n_embd, n_rows*n_seq);
    }

    ggml_tensor * state = indexer.build_state(ctx, weights, hidden);
    ggml_format_name(state, "indexmem_state-%d", (int) l.il);

    if (rows_query) {
        const int64_t n_last = rows_query->ne[0];

        ggml_tensor * q = indexer.build_queries(ctx, weights, hidden);
        ggml_format_name(q, "indexmem_queries-%d", (int) l.il);
        q = ggml_view_4d(ctx, q, q->ne[0], n_last, 1, n_seq, q->nb[1], q->nb[1]*n_rows, q->nb[1]*n_rows, q->nb[1]*(n_rows - n_last));
        res.push_back(ggml_set_rows(ctx, indexmem_view_seqs(ctx, l.queries, l.queries->ne[1], s0, n_seq), q, rows_query));
    }
    return state;
}

ggml_tensor * indexmem_scoring::build_store(ggml_context * ctx, const kv_cache::layer & l, ggml_tensor * scores, int64_t n_head_kv) const {
    const int64_t n_rows = n_old + n_tokens;
    scores = indexmem_tokens_last(ctx, l.of_heads(ctx, scores, n_head_kv), n_rows, n_seq, n_rows);
    return ggml_set_rows(ctx, indexmem_view_seqs(ctx, l.state, l.state->ne[1], s0, n_seq), scores, slots);
}

ggml_tensor * indexmem_scoring::view_state(ggml_context * ctx, const kv_cache & kv, const kv_cache::layer & l) const {
    return indexmem_view_seqs(ctx, l.state, kv.get_n_slots(l), s0, n_seq);
}

ggml_tensor * indexmem_scoring::build_rank(ggml_context * ctx, const kv_cache & kv, const kv_cache::layer & l, ggml_tensor * pos, ggml_tensor * ctl) {
    GGML_ASSERT(score); // what is ranked has been scored

    const auto & indexer = *kv.get_indexer();

    ggml_tensor * queries = l.queries ? indexmem_view_seqs(ctx, l.queries, kv.get_n_ring(), s0, n_seq) : nullptr;
    ggml_tensor * terms   = indexer.build_terms(ctx, view_state(ctx, kv, l), queries, ctl);
    return ggml_indexmem_rank_terms(ctx, terms, pos, ctl, indexer.pos_slope(), indexer.age_scale());
}

ggml_tensor * indexmem_scoring::build_compact(ggml_context * ctx, const kv_cache & kv, const kv_cache::layer & l, ggml_tensor * plan, ggml_tensor * ctl) {
    // heads that share their state evict the same entries: the plan of one is that of all
    plan = ggml_view_4d(ctx, plan, plan->ne[0], plan->ne[1], l.state->ne[2], plan->ne[3], plan->nb[1], plan->nb[2], plan->nb[3], 0);
    return ggml_indexmem_compact(ctx, view_state(ctx, kv, l), plan, ctl);
}
