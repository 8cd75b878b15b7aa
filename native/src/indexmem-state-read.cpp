#include "indexmem-state-reader.h"

#include "indexmem-error.h"

#include <algorithm>

using kv_cache = llama_kv_cache_bounded;

// Longer than any conversation, and far enough from where positions end that none of the sums with them overflows.
static constexpr uint32_t N_SEEN_MAX = 1u << 30;

namespace {

// what a cache may hold of a sequence in a class of layers, whatever its positions
void check_class(const kv_cache & kv, const indexmem_state_origin & o, const kv_cache::seq_state & seq) {
    const uint32_t n_seen  = seq.n_seen; // a negative number is a large one
    const bool     evicted = seq.n_evictions > 0;

    bool ok = n_seen <= N_SEEN_MAX && seq.n_used <= n_seen && seq.n_fixed <= seq.n_used;
    ok = ok && (evicted || seq.n_used == n_seen);
    ok = ok && (evicted || seq.n_rebases > 0 || seq.n_fixed == 0);
    ok = ok && (seq.n_used > 0 || n_seen == 0);
    // the first and the last are there
    ok = ok && seq.n_first <= seq.n_used && seq.n_last <= seq.n_used;
    ok = ok && (seq.n_used < n_seen ? (uint64_t) seq.n_first + seq.n_last <= seq.n_used && seq.n_first <= seq.n_fixed : true);
    ok = ok && (evicted || seq.n_last == n_seen);
    ok = ok && (evicted || seq.n_rebases > 0 || seq.n_first == n_seen);
    if (!ok) {
        throw std::runtime_error(format("bounded KV state: impossible counts (seen %u, held %u, fixed %u, pinned %u, evicted "
                    "%llu times, the first %u and the last %u)", n_seen, seq.n_used, seq.n_fixed, seq.pin,
                    (unsigned long long) seq.n_evictions, seq.n_first, seq.n_last));
    }

    // entries have distinct positions below that of the next token, and only a rebase makes them smaller
    if (seq.shift < 0 || seq.rotary_next() < (int32_t) seq.n_used || (seq.n_rebases == 0 && seq.shift != 0) || seq.n_rebases > n_seen) {
        throw std::runtime_error(format("bounded KV state: impossible rotary positions (%u seen, %u held, next %lld, renewed %llu times)",
                    n_seen, seq.n_used, (long long) seq.n_seen - seq.shift, (unsigned long long) seq.n_rebases));
    }
    if (seq.n_rebases > 0 && kv.get_span() == 0) {
        throw std::runtime_error("bounded KV state: its positions were renewed to stay inside a span: use a context that has a span, too");
    }

    if (seq.ring_from < 0 || seq.ring_from > (o.n_ring > 0 ? seq.n_seen : 0)) {
        throw std::runtime_error(format("bounded KV state: impossible first query %d (%u seen)", seq.ring_from, n_seen));
    }

    // entries that wait are the newest, not moved since they were appended
    const int32_t n_moved = seq.n_rebases > 0 ? 0 : seq.n_fixed; // a rebase fixes positions and moves nothing
    if (o.policy != INDEXMEM_STATE_INDEXER ? seq.n_scored != 0 :
            seq.n_scored > seq.n_seen || seq.n_scored < seq.n_seen - (int32_t) seq.n_used + n_moved) {
        throw std::runtime_error(format("bounded KV state: impossible number of scored entries (%u of %u seen)",
                    seq.n_scored, n_seen));
    }
    if (o.policy == INDEXMEM_STATE_INDEXER && seq.n_pending() > indexmem_kv_counts::N_WAIT_MAX) {
        throw std::runtime_error(format("bounded KV state: %u entries wait to be scored, and no cache lets more than %u wait",
                    seq.n_pending(), indexmem_kv_counts::N_WAIT_MAX));
    }
}

// What a state holds in each of its classes, in ours: heads that are of one class here must hold equally much.
void take_classes(const kv_cache & kv, const indexmem_state_origin & o, const kv_cache::seq_state & theirs, kv_cache::seq_state & seq) {
    const uint32_t n_classes = kv.get_config().n_classes();

    std::array<int, indexmem_kv_counts::N_CLASSES_MAX> found;
    found.fill(-1);
    for (const auto & slice : o.slices) {
        for (uint32_t h = slice.head; h < slice.head + slice.n_head; ++h) {
            int & cls = found[kv.get_layer(slice.il, h)->cls];
            cls = cls < 0 ? (int) slice.cls : cls;
            const auto a = theirs.of(cls), b = theirs.of(slice.cls);
            if (a.n_used != b.n_used || a.n_fixed != b.n_fixed) {
                throw std::runtime_error("bounded KV state: made with other budgets of layers, and layers that have one budget in this context "
                        "hold different numbers of entries in it: use the sidecar and the option for layers that it was made with, or "
                        "evaluate the text again");
            }
        }
    }
    for (uint32_t c = 0; c < indexmem_kv_counts::N_CLASSES_MAX; ++c) {
        const auto from = theirs.of(std::max(0, found[std::min(c, n_classes - 1)]));
        seq.put(c, from.n_used, from.n_fixed);
    }
}

void check_head(const kv_cache & kv, const indexmem_state_origin & o, const kv_cache::seq_state & seq) {
    uint64_t n_gone = 0;
    for (uint32_t c = 0; c < kv.get_config().n_classes(); ++c) {
        const auto of_class = seq.of(c);
        check_class(kv, o, of_class);
        n_gone += of_class.n_seen - of_class.n_used;
    }
    const uint32_t n_tail = seq.n_seen - kv.get_counts().pos_tail(seq); // entries behind the tables of all classes
    if (seq.n_last < n_tail) { // they are the last that were appended
        throw std::runtime_error(format("bounded KV state: impossible counts (the last %u are there, %u were appended since entries left)",
                    seq.n_last, n_tail));
    }
    if (seq.n_evictions > n_gone) { // at least one entry leaves at an eviction
        throw std::runtime_error(format("bounded KV state: impossible counts (%llu entries evicted in %llu evictions)",
                    (unsigned long long) n_gone, (unsigned long long) seq.n_evictions));
    }
}

// in the order of put_head(); the id is checked by the caller
llama_seq_id get_head(indexmem_state_reader & in, const kv_cache & kv, const indexmem_state_origin & o, kv_cache::seq_state & seq) {
    const uint32_t id = in.get<uint32_t>();
    seq.n_seen      = in.get<uint32_t>();
    seq.n_used      = in.get<uint32_t>();
    seq.n_fixed     = in.get<uint32_t>();
    seq.pin         = in.get<uint32_t>();
    seq.n_scored    = in.get<uint32_t>();
    seq.ring_from   = in.get<uint32_t>();
    seq.n_evictions = in.get<uint64_t>();
    if (o.version > 6) {
        seq.shift     = in.get<uint32_t>();
        seq.n_rebases = in.get<uint64_t>();
    }
    if (o.version > 7) {
        seq.n_first = in.get<uint32_t>();
        seq.n_last  = in.get<uint32_t>();
    } else if (seq.n_evictions > 0) { // what its cache protected
        seq.n_first = std::max(o.sinks, seq.pin);
        seq.n_last  = std::max(o.window, seq.n_used - std::min(seq.n_fixed, seq.n_used));
    } else {
        seq.n_first = seq.n_rebases > 0 ? std::min<uint32_t>(std::max(o.sinks, seq.pin), seq.n_seen) : seq.n_seen;
        seq.n_last  = seq.n_seen;
    }
    kv_cache::seq_state theirs = seq;
    for (uint32_t c = 1; c < o.n_classes; ++c) {
        const uint32_t n_used = in.get<uint32_t>();
        theirs.put(c, n_used, in.get<uint32_t>());
    }
    take_classes(kv, o, theirs, seq);
    check_head(kv, o, seq);
    return (llama_seq_id) id;
}

// The table of one head: distinct, older than the tail, and with the tail the first and the last positions are there.
void check_table(std::vector<int32_t> pos, const kv_cache::seq_state & seq) {
    std::sort(pos.begin(), pos.end());

    const int64_t n    = pos.size();
    const int64_t tail = seq.pos_tail();

    bool ok = pos.front() >= 0 && pos.back() < tail;
    ok = ok && std::adjacent_find(pos.begin(), pos.end()) == pos.end();

    const int64_t n_first = std::min<int64_t>(seq.n_first, tail);
    const int64_t n_last  = seq.n_last - (int64_t) (seq.n_used - seq.n_fixed); // those in the table
    ok = ok && n_first <= n && n_last <= n;
    ok = ok && (n_first <= 0 || pos[n_first - 1] == n_first - 1);
    ok = ok && (n_last  <= 0 || pos[n - n_last]  == tail - n_last);
    if (!ok) {
        throw std::runtime_error("bounded KV state: the table of positions is damaged");
    }
}

// The rotary positions of one head: in the order of the others, below those of the tail; the first have their own, the last are
// neighbours.
void check_rotary(const std::vector<int32_t> & pos, const std::vector<int32_t> & rotary, const kv_cache::seq_state & seq) {
    std::vector<std::pair<int32_t, int32_t>> both;
    for (size_t i = 0; i < pos.size(); ++i) {
        both.push_back({ pos[i], rotary[i] });
    }
    std::sort(both.begin(), both.end());

    bool ok = both.front().second >= 0 && both.back().second < seq.pos_tail() - seq.shift;
    for (size_t i = 0; i < both.size(); ++i) {
        const auto [p, r] = both[i];
        ok = ok && (i == 0 || both[i - 1].second < r);
        ok = ok && (p >= (int64_t) seq.n_first || r == p);
        ok = ok && (p < (int64_t) seq.n_first || p < seq.n_seen - (int64_t) seq.n_last || r == p - seq.shift);
    }
    if (!ok) {
        throw std::runtime_error("bounded KV state: the table of rotary positions is damaged");
    }
}

// of one slice
void hold_table(llama_io_read_i & io, const kv_cache & kv, const indexmem_slice & heads, const kv_cache::seq_state & of_all, uint32_t stream,
        std::vector<indexmem_state_held> & held) {
    const auto seq = of_all.of(kv.get_layer(heads.il, heads.head)->cls); // as much as of the others

    std::vector<std::vector<int32_t>> tables;
    for (const auto & piece : indexmem_state_table(kv, heads, of_all, stream)) {
        held.push_back(indexmem_state_hold(io, piece));
        tables.emplace_back(seq.n_fixed);
        memcpy(tables.back().data(), held.back().data.data(), held.back().data.size());
    }
    const size_t n_head = heads.n_head;
    for (size_t h = 0; h < std::min(tables.size(), n_head); ++h) {
        check_table(tables[h], seq);
        if (tables.size() > n_head) {
            check_rotary(tables[h], tables[n_head + h], seq);
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

void indexmem_state_some(llama_io_read_i & io, uint64_t n, std::vector<uint8_t> * res) {
    constexpr uint64_t N_AT_ONCE = 1 << 20;

    std::vector<uint8_t> skipped(res ? 0 : std::min(n, N_AT_ONCE));
    while (n > 0) {
        const size_t some = std::min(n, N_AT_ONCE);
        if (res) {
            res->resize(res->size() + some);
        }
        io.read(res ? res->data() + res->size() - some : skipped.data(), some);
        n -= some;
    }
}

void indexmem_state_hold_sequence(llama_io_read_i & io, const indexmem_state_origin & o, const kv_cache & kv,
        const kv_cache::seq_state & from, const kv_cache::seq_state & seq, uint32_t stream, std::vector<indexmem_state_held> & held) {
    // A reader of memory leaves tensors alone until it is destroyed, and forgets them when this throws. Others write at
    // once, so their rows have to wait here.
    const bool defers = io.defers();

    const auto ours = indexmem_state_origin_of(kv);
    for (const auto & slice : o.slices) {
        hold_table(io, kv, slice, seq, stream, held);
    }
    for (size_t i = 0; i < o.slices.size(); ++i) {
        const auto & slice = o.slices[i];
        const auto   rows  = indexmem_state_rows_of(kv, slice, seq, stream);
        for (int part = 0; part < INDEXMEM_STATE_N_PARTS; ++part) {
            const uint64_t size = o.sizes[i][part]*o.n_rows((indexmem_state_part) part, from.of(kv.get_layer(slice.il, slice.head)->cls));
            if (!indexmem_state_goes_on(o, ours, part)) {
                indexmem_state_some(io, size, nullptr);
                continue;
            }
            uint64_t expected = 0;
            for (const auto & piece : rows[part]) {
                expected += piece.size;
            }
            if (size != expected) {
                throw std::runtime_error(format("bounded KV state: %llu bytes of part %d of layer %u, expected %llu", (unsigned long long) size, part,
                            slice.il, (unsigned long long) expected));
            }
            for (const auto & piece : rows[part]) {
                if (defers) {
                    io.read_tensor(piece.tensor, piece.offset, piece.size);
                } else {
                    held.push_back(indexmem_state_hold(io, piece));
                }
            }
        }
    }
}

std::shared_ptr<llama_kv_cache_bounded::loading> llama_kv_cache_bounded::read_state(llama_io_read_i & io, llama_seq_id seq_id) const {
    if (seq_id != -1 && !get_seq(seq_id)) {
        throw std::runtime_error(format("bounded KV state: there is no sequence %d in this context", seq_id));
    }

    indexmem_state_reader in(io);
    const auto origin = indexmem_state_get_header(in, *this);

    const uint32_t n_seq = in.get<uint32_t>();
    if (n_seq > get_n_seq_max() || (seq_id != -1 && n_seq != 1)) {
        throw std::runtime_error(format("bounded KV state: holds %u sequences, expected %s", n_seq,
                    seq_id == -1 ? format("at most %u", get_n_seq_max()).c_str() : "one"));
    }

    auto res = std::make_shared<loading>();
    res->seq_id = seq_id;

    for (uint32_t i = 0; i < n_seq; ++i) {
        seq_state from;
        llama_seq_id id = get_head(in, *this, origin, from);
        if (seq_id != -1) {
            id = seq_id;
        } else if (!get_seq(id)) {
            throw std::runtime_error(format("bounded KV state: sequence %u does not fit a context of %u", id, get_n_seq_max()));
        } else if (!res->seqs.empty() && id <= res->seqs.back().first) {
            throw std::runtime_error(format("bounded KV state: sequence %d occurs twice, or out of order", id));
        }
        const seq_state seq = indexmem_state_adopt(*this, origin, from);

        step st;
        std::string error;
        if (!counts.fit(id, seq, st, error)) {
            throw std::runtime_error("bounded KV state: holds more than the budget has room for, and " + error);
        }
        res->seqs.push_back({ id, st.after[0] });
        if (st.evict || st.score) {
            indexmem_state_hold_fitted(io, origin, *this, from, st, id, res->held);
        } else {
            indexmem_state_hold_sequence(io, origin, *this, from, seq, id, res->held);
        }
    }
    return res;
}

void llama_kv_cache_bounded::replace(const std::vector<std::pair<llama_seq_id, seq_state>> & seqs) {
    for (const auto & [id, _] : seqs) {
        reset(id);
    }
    apply_copies(); // and clear the memories that are about to be replaced
    for (const auto & [id, seq] : seqs) {
        counts.assign(id, seq);
    }
}

void llama_kv_cache_bounded::apply_state(const loading & what) {
    if (what.seq_id == -1) {
        clear(false);
    }
    replace(what.seqs);
    for (const auto & h : what.held) {
        h.apply();
    }
}

void llama_kv_cache_bounded::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    GGML_UNUSED(flags); // what was written with them has the same bytes

    indexmem_clear_error();
    try {
        const auto state = read_state(io, seq_id);
        indexmem_state_end(io);
        apply_state(*state);
    } catch (const std::exception & err) {
        indexmem_error_is(err.what());
        throw;
    }
}
