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

std::vector<indexmem_state_piece> indexmem_state_table(const kv_cache::layer & l, const kv_cache::seq_state & of_all, uint32_t stream) {
    const auto seq = of_all.of(l.cls);

    std::vector<indexmem_state_piece> res;
    for (ggml_tensor * t : { l.pos, seq.n_rebases > 0 ? l.rotary : nullptr }) {
        for (int64_t h = 0; t && h < t->ne[1] && seq.n_fixed > 0; ++h) {
            res.push_back({ t, h*t->nb[1] + stream*t->nb[2], seq.n_fixed*sizeof(int32_t) });
        }
    }
    return res;
}

indexmem_state_rows indexmem_state_rows_of(
        const kv_cache & kv, const kv_cache::layer & l, const kv_cache::seq_state & of_all, uint32_t stream) {
    const auto seq = of_all.of(l.cls);

    indexmem_state_rows res;

    // rows [i0, i0 + n) of every head
    const auto add = [&](indexmem_state_part part, ggml_tensor * t, int64_t i0, int64_t n) {
        for (int64_t h = 0; h < t->ne[2] && n > 0; ++h) {
            res[part].push_back({ t, i0*t->nb[1] + h*t->nb[2] + stream*t->nb[3], n*t->nb[1] });
        }
    };
    if (seq.n_used == 0) {
        return res;
    }
    // the query of position p is in row p % n_ring: with fewer than n_ring of them the other rows hold nothing
    const int64_t n_queries = std::min<int64_t>(kv.get_n_ring(), l.state ? seq.n_scored : seq.n_seen);

    add(INDEXMEM_STATE_ENTRIES, l.k, kv.get_n_front(), seq.n_used);
    if (l.has_values()) {
        add(INDEXMEM_STATE_ENTRIES, l.v, kv.get_n_front(), seq.n_used);
    }
    if (l.q) {
        add(INDEXMEM_STATE_RING, l.q, 0, n_queries);
    }
    if (l.state) {
        add(INDEXMEM_STATE_SCORED, l.state, 0, seq.n_used);
        // in the order of their positions, so that the length of the ring does not matter: around its end in two parts
        const int64_t first   = seq.n_scored % kv.get_n_wait();
        const int64_t n_first = std::min<int64_t>(seq.n_pending(), kv.get_n_wait() - first);
        add(INDEXMEM_STATE_PENDING, l.pending, first, n_first);
        add(INDEXMEM_STATE_PENDING, l.pending, 0, seq.n_pending() - n_first);
    }
    if (l.queries) {
        add(INDEXMEM_STATE_QUERIES, l.queries, 0, n_queries);
    }
    if (seq.n_evictions > 0 && !l.memory.empty()) {
        for (ggml_tensor * t : l.memory) {
            add(INDEXMEM_STATE_MEMORY, t, 0, t->ne[1]);
        }
        add(INDEXMEM_STATE_MEMORY, l.k, 0, kv.get_n_latent());
        add(INDEXMEM_STATE_MEMORY, l.v, 0, kv.get_n_latent());
    }
    return res;
}

std::vector<indexmem_state_piece> indexmem_state_pieces(const kv_cache & kv, llama_seq_id seq_id) {
    const uint32_t stream = kv.get_stream(seq_id);
    const auto   & seq    = *kv.get_seq(seq_id);

    std::vector<indexmem_state_piece> res;
    const auto add = [&](const std::vector<indexmem_state_piece> & pieces) { res.insert(res.end(), pieces.begin(), pieces.end()); };
    for (const auto & l : kv.get_layers()) {
        add(indexmem_state_table(l, seq, stream));
    }
    for (const auto & l : kv.get_layers()) {
        for (const auto & part : indexmem_state_rows_of(kv, l, seq, stream)) {
            add(part);
        }
    }
    return res;
}

indexmem_state_sizes indexmem_state_sizes_of(const kv_cache & kv, const kv_cache::layer & l) {
    const auto row = [](const ggml_tensor * t) { return t ? (uint32_t) (t->nb[1]*t->ne[2]) : 0; };

    indexmem_state_sizes res = {};
    res[INDEXMEM_STATE_ENTRIES] = row(l.k) + (l.has_values() ? row(l.v) : 0);
    res[INDEXMEM_STATE_RING]    = row(l.q);
    res[INDEXMEM_STATE_SCORED]  = row(l.state);
    res[INDEXMEM_STATE_PENDING] = row(l.pending);
    res[INDEXMEM_STATE_QUERIES] = row(l.queries);
    for (const ggml_tensor * t : l.memory) {
        res[INDEXMEM_STATE_MEMORY] += row(t)*(uint32_t) t->ne[1];
    }
    if (!l.memory.empty()) {
        res[INDEXMEM_STATE_MEMORY] += (row(l.k) + row(l.v))*kv.get_n_latent();
    }
    return res;
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
