#include "indexmem-state.h"

#include <algorithm>

using kv_cache = llama_kv_cache_bounded;

std::string indexmem_state_name(const indexmem_memory * memory) {
    return memory ? memory->kind() : "off";
}

std::vector<uint8_t> indexmem_state_get(const std::vector<indexmem_state_piece> & pieces) {
    std::vector<uint8_t> res;
    for (const auto & piece : pieces) {
        res.resize(res.size() + piece.size);
        ggml_backend_tensor_get(piece.tensor, res.data() + res.size() - piece.size, piece.offset, piece.size);
    }
    return res;
}

void indexmem_state_set(const std::vector<indexmem_state_piece> & pieces, const std::vector<uint8_t> & data) {
    size_t done = 0;
    for (const auto & piece : pieces) {
        ggml_backend_tensor_set(piece.tensor, data.data() + done, piece.offset, piece.size);
        done += piece.size;
    }
}

ggml_tensor indexmem_state_view(const indexmem_state_piece & piece) {
    ggml_tensor res = *piece.tensor;
    res.type  = GGML_TYPE_I8;
    res.ne[0] = (int64_t) piece.size;
    res.ne[1] = res.ne[2] = res.ne[3] = 1;
    res.nb[0] = 1;
    res.nb[1] = res.nb[2] = res.nb[3] = piece.size;
    res.data  = (char *) piece.tensor->data + piece.offset;
    return res;
}

// f: of each of these heads, the slice that holds it here and its number there
template <typename F>
static void for_heads(const kv_cache & kv, const indexmem_slice & heads, F f) {
    for (uint32_t h = heads.head; h < heads.head + heads.n_head; ++h) {
        const auto & l = *kv.get_layer(heads.il, h);
        f(l, h - l.head);
    }
}

std::vector<indexmem_state_piece> indexmem_state_table(
        const kv_cache & kv, const indexmem_slice & heads, const kv_cache::seq_state & of_all, uint32_t stream) {
    std::vector<indexmem_state_piece> res;
    for (bool rotary : { false, true }) {
        for_heads(kv, heads, [&](const kv_cache::layer & l, int64_t h) {
            const auto seq = of_all.of(l.cls);
            ggml_tensor * t = rotary ? l.rotary : l.pos;
            if (seq.n_fixed > 0 && (!rotary || seq.n_rebases > 0)) {
                res.push_back({ t, h*t->nb[1] + stream*t->nb[2], seq.n_fixed*sizeof(int32_t) });
            }
        });
    }
    return res;
}

indexmem_state_rows indexmem_state_rows_of(
        const kv_cache & kv, const indexmem_slice & heads, const kv_cache::seq_state & of_all, uint32_t stream) {
    const auto & first = *kv.get_layer(heads.il); // it has what all heads of a layer share
    const auto   seq   = of_all.of(kv.get_layer(heads.il, heads.head)->cls);

    indexmem_state_rows res;

    const auto add_rows = [&](indexmem_state_part part, ggml_tensor * t, int64_t h, int64_t i0, int64_t n) {
        if (t && h < t->ne[2] && n > 0) {
            res[part].push_back({ t, i0*t->nb[1] + h*t->nb[2] + stream*t->nb[3], n*t->nb[1] });
        }
    };
    // rows [i0, i0 + n) of every head
    const auto add = [&](indexmem_state_part part, auto tensor_of, int64_t i0, int64_t n) {
        for_heads(kv, heads, [&](const kv_cache::layer & l, int64_t h) { add_rows(part, tensor_of(l), h, i0, n); });
    };
    const auto of_k = [](const kv_cache::layer & l) { return l.k; };
    const auto of_v = [](const kv_cache::layer & l) { return l.has_values() ? l.v : nullptr; };
    const auto of_state = [](const kv_cache::layer & l) { return l.state; };
    if (seq.n_used == 0) {
        return res;
    }
    // the query of position p is in row p % n_ring: with fewer than n_ring of them the other rows hold nothing
    const int64_t n_queries = std::min<int64_t>(kv.get_n_ring(), first.state ? seq.n_scored : seq.n_seen);

    add(INDEXMEM_STATE_ENTRIES, of_k, kv.get_n_front(), seq.n_used);
    add(INDEXMEM_STATE_ENTRIES, of_v, kv.get_n_front(), seq.n_used);
    if (first.q) {
        for_heads(kv, heads, [&](const kv_cache::layer & l, int64_t h) {
            const int64_t n = l.q->ne[2]/l.n_head(); // query heads of a KV head
            for (int64_t i = h*n; i < (h + 1)*n; ++i) {
                add_rows(INDEXMEM_STATE_RING, l.q, i, 0, n_queries);
            }
        });
    }
    add(INDEXMEM_STATE_SCORED, of_state, 0, seq.n_used);
    if (first.pending && heads.head == 0) {
        // in the order of their positions, so that the length of the ring does not matter: around its end in two parts
        const int64_t row     = seq.n_scored % kv.get_n_wait();
        const int64_t n_first = std::min<int64_t>(seq.n_pending(), kv.get_n_wait() - row);
        add_rows(INDEXMEM_STATE_PENDING, first.pending, 0, row, n_first);
        add_rows(INDEXMEM_STATE_PENDING, first.pending, 0, 0, seq.n_pending() - n_first);
        add_rows(INDEXMEM_STATE_QUERIES, first.queries, 0, 0, n_queries);
    }
    if (seq.n_evictions > 0 && !first.memory.empty()) {
        for (size_t i = 0; i < first.memory.size(); ++i) {
            add(INDEXMEM_STATE_MEMORY, [&](const kv_cache::layer & l) { return l.memory[i]; }, 0, first.memory[i]->ne[1]);
        }
        add(INDEXMEM_STATE_MEMORY, of_k, 0, kv.get_n_latent());
        add(INDEXMEM_STATE_MEMORY, of_v, 0, kv.get_n_latent());
    }
    return res;
}

std::vector<indexmem_state_piece> indexmem_state_pieces(const kv_cache & kv, llama_seq_id seq_id) {
    const uint32_t stream = kv.get_stream(seq_id);
    const auto   & seq    = *kv.get_seq(seq_id);

    std::vector<indexmem_state_piece> res;
    const auto add = [&](const std::vector<indexmem_state_piece> & pieces) { res.insert(res.end(), pieces.begin(), pieces.end()); };
    for (const auto & l : kv.get_layers()) {
        add(indexmem_state_table(kv, l.heads(), seq, stream));
    }
    for (const auto & l : kv.get_layers()) {
        for (const auto & part : indexmem_state_rows_of(kv, l.heads(), seq, stream)) {
            add(part);
        }
    }
    return res;
}

indexmem_state_sizes indexmem_state_sizes_of(const kv_cache & kv, const indexmem_slice & heads) {
    indexmem_state_sizes res = {};
    const auto add = [&](indexmem_state_part part, const ggml_tensor * t, int64_t h, int64_t n_heads, uint32_t n_rows) {
        res[part] += t && h < t->ne[2] ? (uint32_t) (t->nb[1]*n_heads*n_rows) : 0;
    };
    for_heads(kv, heads, [&](const kv_cache::layer & l, int64_t h) {
        const ggml_tensor * v = l.has_values() ? l.v : nullptr;
        add(INDEXMEM_STATE_ENTRIES, l.k,     h, 1, 1);
        add(INDEXMEM_STATE_ENTRIES, v,       h, 1, 1);
        add(INDEXMEM_STATE_RING,    l.q,     h, l.q ? l.q->ne[2]/l.n_head() : 0, 1);
        add(INDEXMEM_STATE_SCORED,  l.state, h, 1, 1);
        for (const ggml_tensor * t : l.memory) {
            add(INDEXMEM_STATE_MEMORY, t, h, 1, (uint32_t) t->ne[1]);
        }
        if (!l.memory.empty()) {
            add(INDEXMEM_STATE_MEMORY, l.k, h, 1, kv.get_n_latent());
            add(INDEXMEM_STATE_MEMORY, v,   h, 1, kv.get_n_latent());
        }
    });
    if (heads.head == 0) {
        const auto & first = *kv.get_layer(heads.il);
        add(INDEXMEM_STATE_PENDING, first.pending, 0, 1, 1);
        add(INDEXMEM_STATE_QUERIES, first.queries, 0, 1, 1);
    }
    return res;
}

uint32_t indexmem_state_version_of(const kv_cache & kv) {
    for (const auto & l : kv.get_layers()) {
        if (!l.whole) {
            return INDEXMEM_STATE_VERSION;
        }
    }
    return kv.get_config().n_classes() > 1 ? INDEXMEM_STATE_VERSION_WHOLE : INDEXMEM_STATE_VERSION_ONE;
}

uint64_t indexmem_state_origin::n_rows(indexmem_state_part part, const kv_cache::seq_state & seq) const {
    const uint32_t n_queries = std::min<uint32_t>(n_ring, policy == INDEXMEM_STATE_INDEXER ? seq.n_scored : seq.n_seen);
    switch (seq.n_used > 0 ? part : INDEXMEM_STATE_N_PARTS) {
        case INDEXMEM_STATE_ENTRIES:
        case INDEXMEM_STATE_SCORED:  return seq.n_used;
        case INDEXMEM_STATE_RING:
        case INDEXMEM_STATE_QUERIES: return n_queries;
        case INDEXMEM_STATE_PENDING: return seq.n_pending();
        case INDEXMEM_STATE_MEMORY:  return seq.n_evictions > 0 ? 1 : 0;
        default:                     return 0;
    }
}
