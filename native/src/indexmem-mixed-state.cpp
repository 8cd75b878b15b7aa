#include "indexmem-mixed.h"

#include "indexmem-error.h"
#include "indexmem-state.h"

#include "llama-batch.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <stdexcept>

//
// State of a mixed memory
//
//   header     magic, version
//   bounded    as a bounded cache writes it: which sequences there are, and how many tokens each has seen
//   window     if there is one: types and sizes of K and V of each layer; of each sequence the number of positions, up to the
//              newest, and their rows
//   recurrent  if there is one: sizes of each layer's states; of each sequence its rows
//
// Invariants
//   - nothing is changed before everything has been read and checked; what follows then does not fail
//   - formats of llama.cpp's own are not used: their readers trust what they read
//

static constexpr uint32_t MAGIC   = 0x584D4D49; // "IMMX"
static constexpr uint32_t VERSION = 1;

namespace {

template <typename T>
void put(llama_io_write_i & io, T value) {
    io.write(&value, sizeof(value));
}

void expect(llama_io_read_i & io, uint64_t expected, const char * what) {
    uint64_t found;
    io.read(&found, sizeof(found));
    if (found != expected) {
        throw std::runtime_error(format("mixed KV state: %s is %llu in the state and %llu in this context", what,
                    (unsigned long long) found, (unsigned long long) expected));
    }
}

// what makes the rows of one context those of another: calls f(number, what) in order
template <typename F>
void for_each_size(const std::vector<ggml_tensor *> & tensors, const char * what, F f) {
    f(tensors.size(), what);
    for (const ggml_tensor * t : tensors) {
        f(t ? (uint64_t) t->type : 0, what);
        f(t ? (uint64_t) t->ne[0] : 0, what);
    }
}

} // namespace

llama_pos llama_memory_mixed::n_window(llama_seq_id seq_id) const {
    const llama_pos held = window ? window->get().seq_pos_min(seq_id) : -1;
    return held < 0 ? 0 : bounded->get_seq(seq_id)->n_seen - held;
}

void llama_memory_mixed::replace(llama_seq_id seq_id, const llama_kv_cache_bounded::seq_state & seq, llama_pos n_window) {
    seq_rm(seq_id, -1, -1);
    bounded->replace({ { seq_id, seq } });
    if (window) {
        window->place(seq_id, seq.n_seen - n_window, seq.n_seen);
    }
    if (recurrent && seq.n_seen > 0) {
        recurrent->place(seq_id, seq.n_seen);
    }
}

std::vector<indexmem_state_piece> llama_memory_mixed::pieces(llama_seq_id seq_id) const {
    auto res = indexmem_state_pieces(*bounded, seq_id);

    const llama_pos n_seen = bounded->get_seq(seq_id)->n_seen;
    const auto add = [&](const std::vector<indexmem_state_piece> & more) { res.insert(res.end(), more.begin(), more.end()); };
    if (window) {
        add(window->rows(seq_id, n_seen - n_window(seq_id), n_seen));
    }
    if (recurrent && n_seen > 0) {
        add(recurrent->row(seq_id));
    }
    return res;
}

void llama_memory_mixed::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    const bool on_device = flags & LLAMA_STATE_SEQ_FLAGS_ON_DEVICE;

    put<uint32_t>(io, MAGIC);
    put<uint32_t>(io, VERSION);
    bounded->state_write(io, seq_id, flags); // refuses broken ones

    std::vector<llama_seq_id> ids;
    for (llama_seq_id s = 0; s < (llama_seq_id) bounded->get_n_seq_max(); ++s) {
        if (bounded->get_seq(s)->n_seen > 0 && (seq_id == -1 || s == seq_id)) {
            ids.push_back(s);
        }
    }
    const auto put_size = [&](uint64_t n, const char *) { put<uint64_t>(io, n); };
    if (window) {
        for_each_size(window->tensors(), "the window's cache", put_size);
        for (llama_seq_id id : ids) {
            const llama_pos p1 = bounded->get_seq(id)->n_seen;
            put<uint64_t>(io, n_window(id));
            indexmem_state_put(io, window->rows(id, p1 - n_window(id), p1), on_device);
        }
    }
    if (recurrent) {
        for_each_size(recurrent->tensors(), "the recurrent state", put_size);
        for (llama_seq_id id : ids) {
            indexmem_state_put(io, recurrent->row(id), on_device);
        }
    }
}

void llama_memory_mixed::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    GGML_UNUSED(flags); // what was written with them has the same bytes

    indexmem_clear_error();
    try {
        read(io, seq_id);
    } catch (const std::exception & err) {
        indexmem_error_is(err.what());
        throw;
    }
}

void llama_memory_mixed::read(llama_io_read_i & io, llama_seq_id seq_id) {
    uint32_t magic, version;
    io.read(&magic,   sizeof(magic));
    io.read(&version, sizeof(version));
    if (magic != MAGIC || version != VERSION) {
        throw std::runtime_error(magic != MAGIC ? "mixed KV state: this is not the state of a model with layers of several kinds" :
                format("mixed KV state: has format %u, this version of indexmem-edge reads format %u", version, VERSION));
    }
    const auto state = bounded->read_state(io, seq_id);

    // n positions of a sequence, or its row; bytes in the order in which they were written
    struct part {
        llama_seq_id id;
        llama_pos    n_seen;
        llama_pos    n;
        std::vector<uint8_t> data;
    };
    std::vector<part> windows, states;

    const auto check = [&](uint64_t n, const char * what) { expect(io, n, what); };
    if (window) {
        for_each_size(window->tensors(), "the window's cache", check);
        for (const auto & [id, seq] : state->seqs) {
            if (seq.n_seen == 0) {
                continue;
            }
            uint64_t n;
            io.read(&n, sizeof(n));
            if (n > (uint64_t) seq.n_seen) {
                throw std::runtime_error(format("mixed KV state: holds %llu positions of a window, of %d seen", (unsigned long long) n, seq.n_seen));
            }
            if (seq.n_seen - (llama_pos) n > window->first_seen(seq.n_seen)) {
                throw std::runtime_error(format("mixed KV state: holds %llu positions of a window, and the next token looks at %d",
                            (unsigned long long) n, seq.n_seen - window->first_seen(seq.n_seen)));
            }
            // a context with a larger ubatch had room for more than is looked at: the newest are enough
            const uint64_t n_kept = std::min<uint64_t>(n, window->get().get_size());

            part p = { id, seq.n_seen, (llama_pos) n_kept, {} };
            for (const ggml_tensor * t : window->tensors()) {
                indexmem_state_some(io, (n - n_kept)*t->nb[1], nullptr);
                indexmem_state_some(io, n_kept*t->nb[1], &p.data);
            }
            windows.push_back(std::move(p));
        }
    }
    if (recurrent) {
        for_each_size(recurrent->tensors(), "the recurrent state", check);
        for (const auto & [id, seq] : state->seqs) {
            if (seq.n_seen == 0) {
                continue;
            }
            part p = { id, seq.n_seen, 1, std::vector<uint8_t>(recurrent->size_row()) };
            io.read(p.data.data(), p.data.size());
            states.push_back(std::move(p));
        }
    }
    indexmem_state_end(io);

    // nothing below fails
    if (seq_id == -1) {
        clear(false);
    }
    for (const auto & [id, seq] : state->seqs) {
        seq_rm(id, -1, -1);
    }
    bounded->apply_state(*state);
    for (const auto & p : windows) {
        window->place(p.id, p.n_seen - p.n, p.n_seen);
        indexmem_state_set(window->rows(p.id, p.n_seen - p.n, p.n_seen), p.data);
    }
    for (const auto & p : states) {
        indexmem_state_set(recurrent->place(p.id, p.n_seen), p.data);
    }
}
