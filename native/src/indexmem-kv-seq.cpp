#include "indexmem-state.h"

#include "llama-impl.h"

#include <algorithm>
#include <limits>
#include <numeric>

//
// What a bounded cache does with whole sequences and their ends
//

const llama_kv_cache_bounded::seq_state * llama_kv_cache_bounded::get_seq(llama_seq_id seq_id) const {
    return counts.get(seq_id);
}

bool llama_kv_cache_bounded::set_pin(llama_seq_id seq_id, uint32_t n, std::string & error) {
    if (!get_seq(seq_id)) {
        error = format("there is no sequence %d (n_seq_max is %u)", seq_id, get_n_seq_max());
        return false;
    }
    return counts.set_pin(seq_id, n, error);
}

// a pending copy would make what lies in the stream of its destination stale; its source holds the same
uint32_t llama_kv_cache_bounded::get_stream(llama_seq_id seq_id) const {
    uint32_t stream = seq_id;
    for (auto it = copies.rbegin(); it != copies.rend(); ++it) {
        if (it->dst == stream && it->src != NOTHING) {
            stream = it->src;
        }
    }
    return stream;
}

// of one head, in slot order; tail: that of slot n_fixed
std::vector<int32_t> llama_kv_cache_bounded::get_table(ggml_tensor * t, const seq_state & seq, int32_t tail, llama_seq_id seq_id,
        uint32_t head) const {
    const uint32_t stream = get_stream(seq_id);

    std::vector<int32_t> res(seq.n_used);
    if (seq.n_fixed > 0) {
        ggml_backend_tensor_get(t, res.data(), head*t->nb[1] + stream*t->nb[2], seq.n_fixed*sizeof(int32_t));
    }
    std::iota(res.begin() + seq.n_fixed, res.end(), tail);
    return res;
}

std::vector<int32_t> llama_kv_cache_bounded::get_positions(llama_seq_id seq_id, const layer & l, uint32_t head) const {
    const auto seq = get_seq(seq_id)->of(l.cls);
    return get_table(l.pos, seq, seq.pos_tail(), seq_id, head);
}

std::vector<int32_t> llama_kv_cache_bounded::get_rotary(llama_seq_id seq_id, const layer & l, uint32_t head) const {
    const auto seq = get_seq(seq_id)->of(l.cls);
    return get_table(seq.n_rebases > 0 ? l.rotary : l.pos, seq, seq.pos_tail() - seq.shift, seq_id, head);
}

void llama_kv_cache_bounded::reset(llama_seq_id seq_id) {
    const auto & seq = *get_seq(seq_id);
    if (cfg.memory && (seq.n_evictions > 0 || seq.broken)) {
        copies.push_back({ NOTHING, (uint32_t) seq_id });
    }
    counts.reset(seq_id);
}

void llama_kv_cache_bounded::clear(bool data) {
    copies.clear();
    for (uint32_t s = 0; s < get_n_seq_max(); ++s) {
        if (cfg.memory && !data) {
            copies.push_back({ NOTHING, s });
        }
        counts.reset(s);
    }
    if (data) {
        if (lctx) {
            llama_synchronize(lctx); // what is still being computed writes into these
        }
        for (auto & [_, buf] : ctxs_bufs) {
            ggml_backend_buffer_clear(buf.get(), 0);
        }
        for (const auto & l : layers) {
            write_ahead(l);
        }
    }
}

bool llama_kv_cache_bounded::can_seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    const auto & seq = *get_seq(seq_id);

    p0 = std::max(p0, 0);
    p1 = p1 < 0 ? std::numeric_limits<llama_pos>::max() : p1;

    if (p0 >= seq.n_seen || p0 >= p1) {
        return true; // nothing there
    }
    return p1 >= seq.n_seen && (p0 == 0 || counts.can_remove(seq, p0)); // else a gap would be left
}

bool llama_kv_cache_bounded::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    if (seq_id < 0) {
        bool res = true;
        for (uint32_t s = 0; s < get_n_seq_max(); ++s) {
            res &= seq_rm(s, p0, p1);
        }
        return res;
    }
    GGML_ASSERT((uint32_t) seq_id < get_n_seq_max());

    const auto & seq = *get_seq(seq_id);

    p0 = std::max(p0, 0);
    p1 = p1 < 0 ? std::numeric_limits<llama_pos>::max() : p1;

    if (p0 == 0 && p1 >= seq.n_seen && (seq.n_seen > 0 || seq.broken)) {
        reset(seq_id); // a broken one, too
        return true;
    }
    if (!can_seq_rm(seq_id, p0, p1)) {
        return false;
    }
    if (p0 < seq.n_seen && p0 < p1) {
        counts.truncate(seq_id, p0);
    }
    return true;
}

// A prefix is exact under the same conditions as seq_rm.
bool llama_kv_cache_bounded::can_seq_cp(llama_seq_id seq_id_src, llama_pos p0, llama_pos p1) const {
    const auto & src = *get_seq(seq_id_src);
    if (src.broken) {
        LLAMA_LOG_ERROR("%s: nothing copied: %s\n", __func__, indexmem_kv_counts::broken_text(seq_id_src).c_str());
        return false;
    }
    if (p0 > 0 || (p1 >= 0 && p1 < src.n_seen && !counts.can_remove(src, p1))) {
        LLAMA_LOG_ERROR("%s: a bounded cache copies whole sequences, or prefixes whose end has not been compacted and got no new positions; nothing copied\n", __func__);
        return false;
    }
    return true;
}

void llama_kv_cache_bounded::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    GGML_ASSERT(get_seq(seq_id_src) && get_seq(seq_id_dst));

    if (seq_id_src == seq_id_dst || !can_seq_cp(seq_id_src, p0, p1)) {
        return;
    }
    seq_state dst = *get_seq(seq_id_src);
    if (p1 >= 0 && p1 < dst.n_seen) {
        dst.truncate(p1);
    }
    copies.push_back({ (uint32_t) seq_id_src, (uint32_t) seq_id_dst, *get_seq(seq_id_src) });
    counts.assign(seq_id_dst, dst);
}

void llama_kv_cache_bounded::spoil(llama_seq_id seq_id) {
    seq_state seq = *get_seq(seq_id);
    seq.broken = true;
    counts.assign(seq_id, seq);
}

// [begin, end) of the rows of each head that hold something when a sequence has so many entries. What lies in the others is never
// looked at.
std::vector<std::pair<int64_t, int64_t>> llama_kv_cache_bounded::rows_in_use(const layer & l, const ggml_tensor * t, uint32_t n_used) const {
    if (t == l.k || t == l.v) {
        return { { 0, get_n_front() + n_used } };
    }
    if (t == l.pos || t == l.rotary) {
        return { { 0, n_used } };
    }
    if (t == l.state) {
        return { { 0, n_used }, { get_n_slots(l), t->ne[1] } };
    }
    return { { 0, t->ne[1] } };
}

void llama_kv_cache_bounded::copy_rows(ggml_tensor * t, const copy & c, const std::vector<std::pair<int64_t, int64_t>> & rows) {
    const bool   table    = t->ne[3] == 1; // a row is a number
    const size_t size     = ggml_nbytes(t)/get_n_seq_max();
    const size_t row_size = table ? t->nb[0] : t->nb[1];
    const size_t nb_head  = table ? t->nb[1] : t->nb[2];
    const bool   whole    = rows.size() == 1 && (rows[0].second - rows[0].first)*row_size == nb_head;
    for (size_t head = 0; head < size; head += whole ? size : nb_head) {
        for (const auto & [begin, end] : rows) {
            if (begin == end) {
                continue;
            }
            const size_t at    = head + begin*row_size;
            const size_t bytes = whole ? size : (end - begin)*row_size;
            ggml_tensor src = indexmem_state_view({ t, c.src*size + at, bytes });
            ggml_tensor dst = indexmem_state_view({ t, c.dst*size + at, bytes });
            ggml_backend_tensor_copy(&src, &dst);
        }
    }
}

// What is pending, in order, so that a copy reads what its source held then: nothing but this writes to sequences between
// two ubatches. The device is idle with respect to the cache when this is called.
void llama_kv_cache_bounded::apply_copies() {
    for (const auto & c : copies) {
        if (c.src == NOTHING) {
            clear_memory(c.dst);
            continue;
        }
        for (const auto & l : layers) {
            for (ggml_tensor * t : l.tensors()) {
                copy_rows(t, c, rows_in_use(l, t, c.seq.of(l.cls).n_used));
            }
        }
    }
    copies.clear();
}

// Zero is empty. The rows that attention reads are cleared, too: what they hold must be finite even where it is masked.
void llama_kv_cache_bounded::clear_memory(uint32_t stream) {
    for (const auto & l : layers) {
        for (ggml_tensor * t : l.memory) {
            const size_t size = ggml_nbytes(t)/get_n_seq_max();
            ggml_backend_tensor_memset(t, 0, stream*size, size);
        }
        for (ggml_tensor * t : { l.k, l.v }) {
            for (int64_t h = 0; h < t->ne[2] && get_n_front() > 0; ++h) {
                ggml_backend_tensor_memset(t, 0, h*t->nb[2] + stream*t->nb[3], get_n_front()*t->nb[1]);
            }
        }
    }
}

void llama_kv_cache_bounded::seq_keep(llama_seq_id seq_id) {
    for (uint32_t s = 0; s < get_n_seq_max(); ++s) {
        if ((llama_seq_id) s != seq_id) {
            reset(s);
        }
    }
}

void llama_kv_cache_bounded::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
    GGML_UNUSED(seq_id); GGML_UNUSED(p0); GGML_UNUSED(p1);
    if (shift != 0) {
        LLAMA_LOG_ERROR("%s: positions of a bounded cache cannot be shifted (get_can_shift is false); nothing changed\n", __func__);
    }
}

void llama_kv_cache_bounded::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {
    GGML_UNUSED(seq_id); GGML_UNUSED(p0); GGML_UNUSED(p1);
    if (d != 1) {
        LLAMA_LOG_ERROR("%s: positions of a bounded cache cannot be divided; nothing changed\n", __func__);
    }
}

// The first of the positions from which on every head has all: what comes after it can be taken out. The logical sequence has
// no gaps, though: what has been evicted was seen, and a batch has to continue after the last token.
llama_pos llama_kv_cache_bounded::seq_pos_min(llama_seq_id seq_id) const {
    const auto * seq = get_seq(seq_id);
    if (!seq || seq->n_seen == 0) {
        return -1;
    }
    return seq->broken ? seq->n_seen - 1 : std::max(0, std::min(counts.pos_tail(*seq), seq->n_seen) - 1);
}

llama_pos llama_kv_cache_bounded::seq_pos_max(llama_seq_id seq_id) const {
    const auto * seq = get_seq(seq_id);
    return seq ? seq->n_seen - 1 : -1;
}
