#include "indexmem-state.h"

#include "llama-impl.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

using kv_cache = llama_kv_cache_bounded;

// Longer than any conversation, and far enough from where positions end that none of the sums with them overflows.
static constexpr uint32_t N_SEEN_MAX = 1u << 30;

namespace {

// numbers and names of a state, each of which is compared with something
class reader {
public:
    explicit reader(llama_io_read_i & io) : io(io) {}

    template <typename T>
    T get() {
        T value;
        io.read(&value, sizeof(value));
        return value;
    }

    void expect(uint32_t expected, const char * what, int32_t il = -1) {
        const uint32_t found = get<uint32_t>();
        if (found != expected) {
            const std::string where = il >= 0 ? format(" of layer %d", il) : "";
            throw std::runtime_error(format("bounded KV state: %s%s is %u in the state and %u in this context",
                        what, where.c_str(), found, expected));
        }
    }

    // not read_string(): its length is not to be trusted
    void expect_name(const std::string & name, const char * what) {
        expect(name.size(), format("length of the name of the %s", what).c_str());
        std::string found(name.size(), '\0');
        io.read(&found[0], found.size());
        if (found != name) {
            for (char & c : found) {
                c = c >= 0x20 && c < 0x7F ? c : '?'; // it is about to be printed
            }
            throw std::runtime_error(format("bounded KV state: made with %s '%s', this context has '%s'", what, found.c_str(),
                        name.c_str()));
        }
    }

private:
    llama_io_read_i & io;
};

// in the order of put_header(); returns the version
uint32_t check_header(reader & in, const kv_cache & kv) {
    const auto & cfg = kv.get_config();

    in.expect(INDEXMEM_STATE_MAGIC, "magic");
    const uint32_t version = in.get<uint32_t>();
    if (version < INDEXMEM_STATE_VERSION_OLDEST || version > INDEXMEM_STATE_VERSION) {
        throw std::runtime_error(format("bounded KV state: has format %u, this version of indexmem-edge reads formats %u to %u: "
                    "evaluate the text again", version, INDEXMEM_STATE_VERSION_OLDEST, INDEXMEM_STATE_VERSION));
    }
    in.expect_name(kv.get_policy().name, "policy");
    in.expect_name(indexmem_state_name(kv.get_memory()), "memory");
    in.expect(kv.get_n_latent(), "number of slots of the memory");
    in.expect(cfg.sinks,         "number of sinks");
    in.expect(cfg.window,        "window");
    if (in.get<uint64_t>() != (cfg.sidecar ? cfg.sidecar->get_hash() : 0)) {
        throw std::runtime_error("bounded KV state: made with another sidecar than the one of this context");
    }
    in.expect(kv.get_n_ring(),        "number of kept queries");
    in.expect(kv.get_rot_k(),         "rotation of K");
    in.expect(kv.get_rot_v(),         "rotation of V");
    in.expect(kv.get_layers().size(), "number of layers");
    for (const auto & l : kv.get_layers()) {
        in.expect(l.il,       "index",              l.il);
        in.expect(l.k->ne[2], "number of KV heads", l.il);
        in.expect(l.k->ne[0], "head size of K",     l.il);
        in.expect(l.v->ne[0], "head size of V",     l.il);
        in.expect(l.k->type,  "type of K",          l.il);
        in.expect(l.v->type,  "type of V",          l.il);
    }
    return version;
}

// what a context may hold of a sequence, whatever its positions
void check_head(const kv_cache & kv, const kv_cache::seq_state & seq) {
    const auto & cfg = kv.get_config();

    const uint32_t budget = cfg.budget - kv.get_n_latent();
    if (seq.n_used > budget) {
        throw std::runtime_error(format("bounded KV state: holds %u entries, the budget is %u", seq.n_used, budget));
    }

    const uint32_t n_seen  = seq.n_seen; // a negative number is a large one
    const bool     evicted = seq.n_evictions > 0;

    bool ok = n_seen <= N_SEEN_MAX && seq.n_used <= n_seen && seq.n_fixed <= seq.n_used;
    ok = ok && cfg.budget >= indexmem_kv_counts::budget_min(cfg.sinks, seq.pin, cfg.window, kv.get_n_latent());
    // at least one entry leaves at an eviction, and what is protected stays
    ok = ok && seq.n_evictions <= n_seen - seq.n_used;
    ok = ok && (evicted ? seq.n_fixed >= std::max(cfg.sinks, seq.pin) + cfg.window : seq.n_used == n_seen);
    ok = ok && (evicted || seq.n_rebases > 0 || seq.n_fixed == 0);
    ok = ok && (seq.n_used > 0 || n_seen == 0);
    if (!ok) {
        throw std::runtime_error(format("bounded KV state: impossible counts (seen %u, held %u, fixed %u, pinned %u, evicted "
                    "%llu times)", n_seen, seq.n_used, seq.n_fixed, seq.pin, (unsigned long long) seq.n_evictions));
    }

    // entries have distinct positions below that of the next token, and only a rebase makes them smaller
    if (seq.shift < 0 || seq.rotary_next() < (int32_t) seq.n_used || (seq.n_rebases == 0 && seq.shift != 0) || seq.n_rebases > n_seen) {
        throw std::runtime_error(format("bounded KV state: impossible rotary positions (%u seen, %u held, next %lld, renewed %llu times)",
                    n_seen, seq.n_used, (long long) seq.n_seen - seq.shift, (unsigned long long) seq.n_rebases));
    }
    if (seq.n_rebases > 0 && kv.get_span() == 0) {
        throw std::runtime_error("bounded KV state: its positions were renewed to stay inside a span: use a context that has a span, too");
    }

    if (seq.ring_from < 0 || seq.ring_from > (kv.get_n_ring() > 0 ? seq.n_seen : 0)) {
        throw std::runtime_error(format("bounded KV state: impossible first query %d (%u seen)", seq.ring_from, n_seen));
    }

    // entries that wait are the newest, not moved since they were appended, and their hidden states fit the ring
    const int32_t n_moved = seq.n_rebases > 0 ? 0 : seq.n_fixed; // a rebase fixes positions and moves nothing
    if (!kv.get_indexer() ? seq.n_scored != 0 : seq.n_scored > seq.n_seen || seq.n_scored < seq.n_seen - (int32_t) seq.n_used + n_moved) {
        throw std::runtime_error(format("bounded KV state: impossible number of scored entries (%u of %u seen)",
                    seq.n_scored, n_seen));
    }
    if (kv.get_indexer() && seq.n_pending() > kv.get_n_wait()) {
        throw std::runtime_error(format("bounded KV state: %u entries wait to be scored and a budget of %u has room for %u: "
                    "use the budget that the state was made with", seq.n_pending(), cfg.budget, kv.get_n_wait()));
    }
}

// in the order of put_head(); the id is checked by the caller
llama_seq_id get_head(reader & in, const kv_cache & kv, uint32_t version, kv_cache::seq_state & seq) {
    const uint32_t id = in.get<uint32_t>();
    seq.n_seen      = in.get<uint32_t>();
    seq.n_used      = in.get<uint32_t>();
    seq.n_fixed     = in.get<uint32_t>();
    seq.pin         = in.get<uint32_t>();
    seq.n_scored    = in.get<uint32_t>();
    seq.ring_from   = in.get<uint32_t>();
    seq.n_evictions = in.get<uint64_t>();
    if (version > 6) {
        seq.shift     = in.get<uint32_t>();
        seq.n_rebases = in.get<uint64_t>();
    }
    check_head(kv, seq);
    return (llama_seq_id) id;
}

// The table of one head: distinct, older than the tail, and with the tail every protected position is there.
void check_table(std::vector<int32_t> pos, const kv_cache::seq_state & seq, uint32_t n_prefix, uint32_t window) {
    std::sort(pos.begin(), pos.end());

    const int64_t n    = pos.size();
    const int64_t tail = seq.pos_tail();

    bool ok = pos.front() >= 0 && pos.back() < tail;
    ok = ok && std::adjacent_find(pos.begin(), pos.end()) == pos.end();

    const int64_t n_first = std::min<int64_t>(n_prefix, tail);
    const int64_t n_last  = tail - std::max<int64_t>(seq.n_seen - (int64_t) window, 0); // of the window
    ok = ok && n_first <= n && n_last <= n;
    ok = ok && (n_first <= 0 || pos[n_first - 1] == n_first - 1);
    ok = ok && (n_last  <= 0 || pos[n - n_last]  == tail - n_last);
    if (!ok) {
        throw std::runtime_error("bounded KV state: the table of positions is damaged");
    }
}

// The rotary positions of one head: in the order of the others, below those of the tail; the prefix has its own, the window neighbours.
void check_rotary(const std::vector<int32_t> & pos, const std::vector<int32_t> & rotary, const kv_cache::seq_state & seq,
        uint32_t n_prefix, uint32_t window) {
    std::vector<std::pair<int32_t, int32_t>> both;
    for (size_t i = 0; i < pos.size(); ++i) {
        both.push_back({ pos[i], rotary[i] });
    }
    std::sort(both.begin(), both.end());

    bool ok = both.front().second >= 0 && both.back().second < seq.pos_tail() - seq.shift;
    for (size_t i = 0; i < both.size(); ++i) {
        ok = ok && (i == 0 || both[i - 1].second < both[i].second);
        ok = ok && (both[i].first >= (int64_t) n_prefix || both[i].second == both[i].first);
        ok = ok && (both[i].first < seq.n_seen - (int64_t) window || both[i].second == both[i].first - seq.shift);
    }
    if (!ok) {
        throw std::runtime_error("bounded KV state: the table of rotary positions is damaged");
    }
}

// of one layer
void hold_table(llama_io_read_i & io, const kv_cache & kv, const kv_cache::layer & l, const kv_cache::seq_state & seq, uint32_t stream,
        std::vector<indexmem_state_held> & held) {
    const auto & cfg = kv.get_config();

    std::vector<std::vector<int32_t>> tables;
    for (const auto & piece : indexmem_state_table(l, seq, stream)) {
        held.push_back(indexmem_state_hold(io, piece));
        tables.emplace_back(seq.n_fixed);
        memcpy(tables.back().data(), held.back().data.data(), held.back().data.size());
    }
    const size_t n_head = l.pos->ne[1];
    for (size_t h = 0; h < std::min(tables.size(), n_head); ++h) {
        check_table(tables[h], seq, std::max(cfg.sinks, seq.pin), cfg.window);
        if (tables.size() > n_head) {
            check_rotary(tables[h], tables[n_head + h], seq, std::max(cfg.sinks, seq.pin), cfg.window);
        }
    }
}

} // namespace

// The last part of a file is a state: llama.cpp refuses what follows it too late, when the cache has changed.
void indexmem_state_end(llama_io_read_i & io) {
    if (io.defers()) {
        return;
    }
    uint8_t more;
    try {
        io.read(&more, sizeof(more));
    } catch (const std::exception &) {
        return;
    }
    throw std::runtime_error("bounded KV state: there is something behind it in the file");
}

indexmem_state_held indexmem_state_hold(llama_io_read_i & io, const indexmem_state_piece & piece) {
    indexmem_state_held res = { piece, std::vector<uint8_t>(piece.size) };
    io.read(res.data.data(), piece.size);
    return res;
}

std::shared_ptr<llama_kv_cache_bounded::loading> llama_kv_cache_bounded::read_state(llama_io_read_i & io, llama_seq_id seq_id) const {
    if (seq_id != -1 && !get_seq(seq_id)) {
        throw std::runtime_error(format("bounded KV state: there is no sequence %d in this context", seq_id));
    }

    reader in(io);
    const uint32_t version = check_header(in, *this);

    const uint32_t n_seq = in.get<uint32_t>();
    if (n_seq > get_n_seq_max() || (seq_id != -1 && n_seq != 1)) {
        throw std::runtime_error(format("bounded KV state: holds %u sequences, expected %s", n_seq,
                    seq_id == -1 ? format("at most %u", get_n_seq_max()).c_str() : "one"));
    }

    auto res = std::make_shared<loading>();
    res->seq_id = seq_id;

    // A reader of memory leaves tensors alone until it is destroyed, and forgets them when this throws. Others write at
    // once, so their rows have to wait here.
    const bool defers = io.defers();

    for (uint32_t i = 0; i < n_seq; ++i) {
        seq_state seq;
        llama_seq_id id = get_head(in, *this, version, seq);
        if (seq_id != -1) {
            id = seq_id;
        } else if (!get_seq(id)) {
            throw std::runtime_error(format("bounded KV state: sequence %u does not fit a context of %u", id, get_n_seq_max()));
        } else if (!res->seqs.empty() && id <= res->seqs.back().first) {
            throw std::runtime_error(format("bounded KV state: sequence %d occurs twice, or out of order", id));
        }
        res->seqs.push_back({ id, seq });

        for (const auto & l : layers) {
            hold_table(io, *this, l, seq, id, res->held);
        }
        for (const auto & l : layers) {
            for (const auto & piece : indexmem_state_rows(*this, l, seq, id)) {
                if (defers) {
                    io.read_tensor(piece.tensor, piece.offset, piece.size);
                } else {
                    res->held.push_back(indexmem_state_hold(io, piece));
                }
            }
        }
    }
    return res;
}

void llama_kv_cache_bounded::apply_state(const loading & what) {
    if (what.seq_id == -1) {
        clear(false);
    }
    for (const auto & [id, _] : what.seqs) {
        reset(id);
    }
    apply_copies(); // and clear the memories that are about to be replaced
    for (const auto & [id, seq] : what.seqs) {
        counts.assign(id, seq);
    }
    for (const auto & h : what.held) {
        h.apply();
    }
}

void llama_kv_cache_bounded::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    GGML_UNUSED(flags); // what was written with them has the same bytes

    const auto state = read_state(io, seq_id);
    indexmem_state_end(io);
    apply_state(*state);
}
