#include "indexmem-kv-cache.h"

#include "llama-impl.h"
#include "llama-io.h"
#include "llama-model.h"

#include <algorithm>
#include <stdexcept>

//
// State of a bounded cache, little endian as everything llama.cpp writes
//
//   magic, version, geometry (checked field by field), number of sequences
//   per sequence: id, n_seen, n_used, n_fixed, pin, n_scored, n_evictions; positions [n_head_kv][n_used] of every layer
//   per sequence and layer: rows of K, rows of V [n_head_kv][n_used], the ring of queries if the policy keeps one; of an
//   indexer its state [n_state_heads][n_used], the hidden states of pending entries, the ring of queries if it keeps one;
//   of a latent memory, once something has been evicted, its state and the rows of its slots in K and V
//
// Invariants
//   - reading validates everything and holds the data aside before the first byte of the cache changes
//   - slots keep their order, so what has been appended since the last eviction can still be taken back after reading
//

static constexpr uint32_t STATE_MAGIC   = 0x564B4D49; // "IMKV"
static constexpr uint32_t STATE_VERSION = 5;

namespace {

// an empty vector has no address to copy from or to
template <typename T>
void put_all(llama_io_write_i & io, const std::vector<T> & values) {
    if (!values.empty()) {
        io.write(values.data(), values.size()*sizeof(T));
    }
}

template <typename T>
void get_all(llama_io_read_i & io, std::vector<T> & values) {
    if (!values.empty()) {
        io.read(values.data(), values.size()*sizeof(T));
    }
}

template <typename T>
void put(llama_io_write_i & io, T value) {
    io.write(&value, sizeof(value));
}

template <typename T>
T get(llama_io_read_i & io) {
    T value;
    io.read(&value, sizeof(value));
    return value;
}

void expect(llama_io_read_i & io, uint32_t expected, const char * what, int32_t il = -1) {
    const uint32_t found = get<uint32_t>(io);
    if (found != expected) {
        const std::string where = il >= 0 ? format(" of layer %d", il) : "";
        throw std::runtime_error(format("bounded KV state: %s%s is %u in the state and %u in this context",
                    what, where.c_str(), found, expected));
    }
}

// rows [i0, i0 + n) of every head of a sequence
struct stored {
    ggml_tensor * tensor;
    int64_t       i0;
    int64_t       n;

    size_t offset(int64_t h, uint32_t stream) const {
        return i0*tensor->nb[1] + h*tensor->nb[2] + stream*tensor->nb[3];
    }
};

void put_rows(llama_io_write_i & io, const stored & part, uint32_t stream) {
    std::vector<uint8_t> buf(part.n*part.tensor->nb[1]);
    for (int64_t h = 0; h < part.tensor->ne[2] && part.n > 0; ++h) {
        ggml_backend_tensor_get(part.tensor, buf.data(), part.offset(h, stream), buf.size());
        put_all(io, buf);
    }
}

struct pending_rows {
    stored               part;
    std::vector<uint8_t> data;
};

pending_rows get_rows(llama_io_read_i & io, const stored & part) {
    pending_rows rows = { part, std::vector<uint8_t>(part.tensor->ne[2]*part.n*part.tensor->nb[1]) };
    get_all(io, rows.data);
    return rows;
}

// what of a layer belongs to the state of a sequence, in its order
std::vector<stored> stored_of(const llama_kv_cache_bounded & kv, const llama_kv_cache_bounded::layer & l, const llama_kv_cache_bounded::seq_state & seq) {
    const int64_t n_front = kv.get_n_front();
    const int64_t n_ring  = kv.get_n_ring();

    std::vector<stored> res = { { l.k, n_front, seq.n_used }, { l.v, n_front, seq.n_used } };
    if (l.q) {
        res.push_back({ l.q, 0, n_ring });
    }
    if (l.state) {
        res.push_back({ l.state,   0, seq.n_used });
        // in the order of their positions, so that the length of the ring does not matter: around its end in two parts
        const int64_t n_first = std::min<int64_t>(seq.n_pending(), kv.get_n_wait() - seq.n_scored % kv.get_n_wait());
        res.push_back({ l.pending, seq.n_scored % kv.get_n_wait(), n_first });
        res.push_back({ l.pending, 0, seq.n_pending() - n_first });
    }
    if (l.queries) {
        res.push_back({ l.queries, 0, n_ring });
    }
    if (seq.n_evictions > 0 && !l.memory.empty()) {
        for (ggml_tensor * t : l.memory) {
            res.push_back({ t, 0, t->ne[1] });
        }
        res.push_back({ l.k, 0, kv.get_n_latent() });
        res.push_back({ l.v, 0, kv.get_n_latent() });
    }
    return res;
}

// not read_string(): its length is not to be trusted
void expect_name(llama_io_read_i & io, const std::string & name, const char * what) {
    expect(io, name.size(), format("length of the name of the %s", what).c_str());
    std::string found(name.size(), '\0');
    io.read(&found[0], found.size());
    if (found != name) {
        for (char & c : found) {
            c = c >= 0x20 && c < 0x7F ? c : '?'; // it is about to be printed
        }
        throw std::runtime_error(format("bounded KV state: made with %s '%s', this context has '%s'", what, found.c_str(), name.c_str()));
    }
}

std::string name_of(const indexmem_memory * memory) {
    return memory ? memory->kind() : "off";
}

// Positions of one head: distinct, in range, consecutive since the last eviction, and with every protected one present.
void check_positions(const std::vector<int32_t> & pos, const llama_kv_cache_bounded::seq_state & seq, uint32_t n_prefix, uint32_t window) {
    const llama_pos n_seen = seq.n_seen;

    std::vector<int32_t> sorted = pos;
    std::sort(sorted.begin(), sorted.end());

    const int64_t n = sorted.size();

    bool ok = n == 0 || (sorted.front() >= 0 && sorted.back() < n_seen);
    ok = ok && std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end();

    const int64_t n_first = std::min<int64_t>(n_prefix, n_seen);
    const int64_t n_last  = std::min<int64_t>(window,   n_seen);
    ok = ok && n >= n_first && n >= n_last;
    ok = ok && (n_first == 0 || sorted[n_first - 1] == n_first - 1);
    ok = ok && (n_last  == 0 || sorted[n - n_last]  == n_seen - n_last);
    for (uint32_t i = seq.n_fixed; i < seq.n_used; ++i) {
        ok = ok && pos[i] == seq.pos_tail() + (llama_pos) (i - seq.n_fixed);
    }
    if (!ok) {
        throw std::runtime_error("bounded KV state: the table of positions is damaged");
    }
}

} // namespace

void llama_kv_cache_bounded::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    GGML_UNUSED(flags);

    // the copies only move data into sequences this call may read
    const_cast<llama_kv_cache_bounded *>(this)->apply_copies();

    put<uint32_t>(io, STATE_MAGIC);
    put<uint32_t>(io, STATE_VERSION);
    io.write_string(get_policy().name);
    io.write_string(name_of(get_memory()));
    put<uint32_t>(io, get_n_latent());
    put<uint32_t>(io, cfg.sinks);
    put<uint32_t>(io, cfg.window);
    put<uint64_t>(io, cfg.sidecar ? cfg.sidecar->get_hash() : 0);
    put<uint32_t>(io, get_n_ring());
    put<uint32_t>(io, rot_k);
    put<uint32_t>(io, rot_v);
    put<uint32_t>(io, layers.size());
    for (const auto & l : layers) {
        put<uint32_t>(io, l.il);
        put<uint32_t>(io, l.k->ne[2]);
        put<uint32_t>(io, l.k->ne[0]);
        put<uint32_t>(io, l.v->ne[0]);
        put<uint32_t>(io, l.k->type);
        put<uint32_t>(io, l.v->type);
    }

    std::vector<llama_seq_id> ids;
    for (size_t s = 0; s < get_n_seq_max(); ++s) {
        if ((seq_id == -1 && (get_seq(s)->n_used > 0 || get_seq(s)->broken)) || (llama_seq_id) s == seq_id) {
            ids.push_back(s);
        }
    }

    for (llama_seq_id id : ids) {
        if (get_seq(id)->broken) {
            throw std::runtime_error(format("bounded KV state: sequence %d is broken: evaluating it was interrupted while entries were "
                        "evicted", id));
        }
    }
    put<uint32_t>(io, ids.size());
    for (llama_seq_id id : ids) {
        const auto & seq = *get_seq(id);
        put<uint32_t>(io, id);
        put<uint32_t>(io, seq.n_seen);
        put<uint32_t>(io, seq.n_used);
        put<uint32_t>(io, seq.n_fixed);
        put<uint32_t>(io, seq.pin);
        put<uint32_t>(io, seq.n_scored);
        put<uint64_t>(io, seq.n_evictions);
        for (const auto & l : layers) {
            for (uint32_t h = 0; h < l.pos->ne[1]; ++h) {
                put_all(io, get_positions(id, l, h));
            }
        }
    }
    for (llama_seq_id id : ids) {
        for (const auto & l : layers) {
            for (const auto & part : stored_of(*this, l, *get_seq(id))) {
                put_rows(io, part, id);
            }
        }
    }
}

void llama_kv_cache_bounded::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    GGML_UNUSED(flags);

    if (seq_id != -1 && !get_seq(seq_id)) {
        throw std::runtime_error(format("bounded KV state: there is no sequence %d in this context", seq_id));
    }

    expect(io, STATE_MAGIC,   "magic");
    expect(io, STATE_VERSION, "version");
    expect_name(io, get_policy().name, "policy");
    expect_name(io, name_of(get_memory()), "memory");
    expect(io, get_n_latent(), "number of slots of the memory");
    expect(io, cfg.sinks,     "number of sinks");
    expect(io, cfg.window,    "window");
    if (get<uint64_t>(io) != (cfg.sidecar ? cfg.sidecar->get_hash() : 0)) {
        throw std::runtime_error("bounded KV state: made with another sidecar than the one of this context");
    }
    expect(io, get_n_ring(),        "number of kept queries");
    expect(io, rot_k,         "rotation of K");
    expect(io, rot_v,         "rotation of V");
    expect(io, layers.size(), "number of layers");
    for (const auto & l : layers) {
        expect(io, l.il,       "index",             l.il);
        expect(io, l.k->ne[2], "number of KV heads", l.il);
        expect(io, l.k->ne[0], "head size of K",    l.il);
        expect(io, l.v->ne[0], "head size of V",    l.il);
        expect(io, l.k->type,  "type of K",         l.il);
        expect(io, l.v->type,  "type of V",         l.il);
    }

    struct pending_seq {
        llama_seq_id id;
        seq_state    state;
        std::vector<std::vector<int32_t>> pos; // [layer] of [n_head_kv*n_used]
        std::vector<pending_rows>         rows;
    };
    std::vector<pending_seq> pending(get<uint32_t>(io));
    if (pending.size() > get_n_seq_max() || (seq_id != -1 && pending.size() != 1)) {
        throw std::runtime_error(format("bounded KV state: holds %zu sequences, expected %s", pending.size(),
                    seq_id == -1 ? format("at most %u", get_n_seq_max()).c_str() : "one"));
    }

    for (auto & p : pending) {
        const uint32_t id      = get<uint32_t>(io);
        const uint32_t n_seen  = get<uint32_t>(io);
        const uint32_t n_used  = get<uint32_t>(io);
        const uint32_t n_fixed = get<uint32_t>(io);
        const uint32_t pin     = get<uint32_t>(io);
        const uint32_t n_scored = get<uint32_t>(io);

        p.id = seq_id == -1 ? (llama_seq_id) id : seq_id;
        p.state.n_evictions = get<uint64_t>(io);

        for (const auto & other : pending) {
            if (&other != &p && other.id == p.id && &other < &p) {
                throw std::runtime_error(format("bounded KV state: sequence %d occurs twice", p.id));
            }
        }
        if (!get_seq(p.id)) {
            throw std::runtime_error(format("bounded KV state: sequence %u does not fit a context of %u", id, get_n_seq_max()));
        }
        if (n_used > cfg.budget - get_n_latent()) {
            throw std::runtime_error(format("bounded KV state: holds %u entries, the budget is %u", n_used, cfg.budget - get_n_latent()));
        }
        const bool evicted = p.state.n_evictions > 0;
        if (n_used > n_seen || evicted != (n_used < n_seen) || n_fixed > n_used || n_seen > (uint32_t) INT32_MAX || cfg.budget < indexmem_kv_counts::budget_min(cfg.sinks, pin, cfg.window, get_n_latent())) {
            throw std::runtime_error(format("bounded KV state: impossible counts (seen %u, held %u, fixed %u, pinned %u)",
                        n_seen, n_used, n_fixed, pin));
        }
        p.state.n_seen  = n_seen;
        p.state.n_used  = n_used;
        p.state.n_fixed = n_fixed;
        p.state.pin     = pin;
        p.state.n_scored = n_scored;

        // pending entries are the newest, not moved since they were appended, and their hidden states fit the ring
        if (!get_indexer() ? n_scored != 0 : n_scored > n_seen || (llama_pos) n_scored < p.state.pos_tail()) {
            throw std::runtime_error(format("bounded KV state: impossible number of scored entries (%u of %u seen)", n_scored, n_seen));
        }
        if (get_indexer() && n_seen - n_scored > get_n_wait()) {
            throw std::runtime_error(format("bounded KV state: %u entries wait to be scored and a budget of %u has room for %u: "
                        "use the budget that the state was made with", n_seen - n_scored, cfg.budget, get_n_wait()));
        }

        for (const auto & l : layers) {
            std::vector<int32_t> all;
            for (uint32_t h = 0; h < l.pos->ne[1]; ++h) {
                std::vector<int32_t> pos(n_used);
                get_all(io, pos);
                check_positions(pos, p.state, std::max(cfg.sinks, pin), cfg.window);
                all.insert(all.end(), pos.begin(), pos.end());
            }
            p.pos.push_back(std::move(all));
        }
    }
    for (auto & p : pending) {
        for (const auto & l : layers) {
            for (const auto & part : stored_of(*this, l, p.state)) {
                p.rows.push_back(get_rows(io, part));
            }
        }
    }

    // nothing below fails
    if (seq_id == -1) {
        clear(false);
    }
    for (const auto & p : pending) {
        reset(p.id);
    }
    apply_copies(); // and clear the memories that are about to be replaced
    for (const auto & p : pending) {
        counts.assign(p.id, p.state);
        if (p.state.n_used == 0) {
            continue;
        }
        for (const auto & rows : p.rows) {
            ggml_tensor * t = rows.part.tensor;
            const size_t size = rows.part.n*t->nb[1];
            for (int64_t h = 0; h < t->ne[2]; ++h) {
                ggml_backend_tensor_set(t, rows.data.data() + h*size, rows.part.offset(h, p.id), size);
            }
        }
        for (size_t i = 0; i < layers.size(); ++i) {
            ggml_tensor * t = layers[i].pos;
            const size_t size = p.state.n_used*sizeof(int32_t);
            for (int64_t h = 0; h < t->ne[1]; ++h) {
                ggml_backend_tensor_set(t, p.pos[i].data() + h*p.state.n_used, h*t->nb[1] + p.id*t->nb[2], size);
            }
        }
    }
}
