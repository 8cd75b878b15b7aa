#include "indexmem-copy.h"

#include "indexmem-error.h"
#include "indexmem-mixed.h"

#include "llama-context.h"
#include "llama-impl.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cstring>
#include <set>
#include <stdexcept>

// Of a device's memory so much stays free: an eighth, no more than this.
static constexpr size_t   LEFT_FREE  = 1u << 30;
static constexpr uint32_t LEFT_SHARE = 8;

// Memory is taken in pieces of this size at most: where one of them cannot be had, those before it can be used.
static constexpr size_t BLOCK = 64u << 20;

// what llama_state_seq_get_data() begins with (io_magic in llama-context.cpp), before the id of the sequence
static constexpr uint32_t MAGIC = 0xAF143CD8;

static ggml_backend_buffer_type_t type_of(const ggml_tensor * t) {
    return ggml_backend_buffer_get_type(t->buffer);
}

static bool in_host(ggml_backend_buffer_type_t buft) {
    return ggml_backend_buft_is_host(buft);
}

// so many bytes at least for a piece: the next one begins where the device likes it
static uint64_t padded(ggml_backend_buffer_type_t buft, uint64_t size) {
    return in_host(buft) ? size : GGML_PAD(size, ggml_backend_buft_get_alignment(buft));
}

// bytes of a device that may be taken
static uint64_t room_of(ggml_backend_buffer_type_t buft) {
    ggml_backend_dev_t dev = ggml_backend_buft_get_device(buft);
    if (!dev || in_host(buft)) {
        return UINT64_MAX;
    }
    size_t free, total;
    ggml_backend_dev_memory(dev, &free, &total);
    if (total == 0) {
        return UINT64_MAX; // it does not say: it may refuse
    }
    const size_t left = std::min(LEFT_FREE, total/LEFT_SHARE);
    return free > left ? free - left : 0;
}

//
// what a state consists of
//

class indexmem_copy::recorder : public llama_io_write_i {
public:
    content found;

    void write(const void * src, size_t size) override {
        if (found.sections.empty() || found.sections.back().n_bytes > 0) {
            found.sections.push_back({ {}, 0 });
        }
        const auto * bytes = (const uint8_t *) src;
        auto & head = found.sections.back().head;
        head.insert(head.end(), bytes, bytes + size);
        n_written += size;
    }

    void write_tensor(ggml_tensor * tensor, size_t offset, size_t size) override {
        found.pieces.push_back({ tensor, offset, size });
        found.sections.back().n_bytes += size;
        n_written += size;
    }

    size_t n_bytes() override { return n_written; }

private:
    size_t n_written = 0;
};

static llama_kv_cache_bounded & bounded_of(llama_context & ctx) {
    auto * res = indexmem_bounded(ctx.get_memory());
    if (!res) {
        throw std::runtime_error("the context has no bounded KV cache");
    }
    return *res;
}

indexmem_copy::content indexmem_copy::content_of(llama_context & ctx, llama_seq_id seq_id) {
    if (!bounded_of(ctx).get_seq(seq_id)) {
        throw std::runtime_error(format("there is no sequence %d in this context", seq_id));
    }
    recorder io;
    io.write(&MAGIC,  sizeof(MAGIC));
    io.write(&seq_id, sizeof(seq_id));
    ctx.get_memory()->state_write(io, seq_id);
    return std::move(io.found);
}

//
// memory
//

uint64_t indexmem_copy::store::n_bytes() const {
    uint64_t res = 0;
    for (const auto & b : blocks) {
        res += ggml_nbytes(b.tensor);
    }
    return res;
}

std::vector<indexmem_state_piece> indexmem_copy::find_places(const std::vector<indexmem_state_piece> & pieces) {
    // Takes more memory for a store that has less than this, as much of it as there is
    const auto reserve = [](store & s, ggml_backend_buffer_type_t buft, uint64_t n_bytes) {
        const uint64_t held = s.n_bytes();
        if (held >= n_bytes || (held > 0 && room_of(buft) < std::min<uint64_t>(n_bytes - held, BLOCK))) {
            return;
        }
        s.blocks.clear(); // first, so that there are never two
        uint64_t left = std::min(n_bytes, room_of(buft));
        const size_t most = ggml_backend_buft_get_max_size(buft);
        while (left > 0) {
            const size_t size = std::min<uint64_t>({ left, BLOCK, most - most % ggml_backend_buft_get_alignment(buft) });
            block b;
            b.ctx.reset(ggml_init({ ggml_tensor_overhead(), nullptr, true }));
            b.tensor = ggml_new_tensor_1d(b.ctx.get(), GGML_TYPE_I8, (int64_t) size);
            b.buffer.reset(ggml_backend_buft_alloc_buffer(buft, ggml_backend_buft_get_alloc_size(buft, b.tensor)));
            if (!b.buffer) {
                break;
            }
            ggml_backend_tensor_alloc(b.buffer.get(), b.tensor, ggml_backend_buffer_get_base(b.buffer.get()));
            s.blocks.push_back(std::move(b));
            left -= size;
        }
    };

    // how far a store has been used
    struct end {
        size_t   i_block = 0;
        uint64_t offset  = 0;
    };
    std::map<ggml_backend_buffer_type_t, end> ends;

    // some bytes of a piece, as many as the block has; 0: the store is full
    std::vector<indexmem_state_piece> res;
    const auto place = [&](ggml_backend_buffer_type_t buft, uint64_t size) -> uint64_t {
        auto & blocks = stores[buft].blocks;
        auto & e      = ends[buft];
        while (e.i_block < blocks.size()) {
            ggml_tensor * t = blocks[e.i_block].tensor;
            const uint64_t n = std::min<uint64_t>(size, ggml_nbytes(t) - std::min<uint64_t>(e.offset, ggml_nbytes(t)));
            if (n > 0) {
                res.push_back({ t, e.offset, n });
                e.offset += padded(buft, n);
                return n;
            }
            e = { e.i_block + 1, 0 };
        }
        return 0;
    };

    const auto host = ggml_backend_cpu_buffer_type();

    std::map<ggml_backend_buffer_type_t, uint64_t> wanted = { { host, 0 } };
    for (const auto & p : pieces) {
        const auto buft = type_of(p.tensor);
        wanted[in_host(buft) ? host : buft] += padded(buft, p.size);
    }
    for (auto it = stores.begin(); it != stores.end();) {
        it = wanted.count(it->first) ? std::next(it) : stores.erase(it);
    }
    for (const auto & [buft, n_bytes] : wanted) {
        if (buft != host) {
            reserve(stores[buft], buft, n_bytes);
            wanted[host] += n_bytes - std::min(n_bytes, stores[buft].n_bytes());
        }
    }
    reserve(stores[host], host, wanted[host]);

    for (const auto & p : pieces) {
        const auto buft = in_host(type_of(p.tensor)) ? host : type_of(p.tensor);
        for (uint64_t left = p.size; left > 0;) {
            uint64_t n = place(buft, left);
            n = n > 0 ? n : place(host, left);
            if (n == 0) {
                throw std::runtime_error("there is no memory for a copy of the state");
            }
            left -= n;
        }
    }
    return res;
}

//
// copies
//

static ggml_tensor bytes_of(const indexmem_state_piece & piece, size_t offset, size_t size) {
    return indexmem_state_view({ piece.tensor, piece.offset + offset, size });
}

// Metal takes several command buffers for each copy that is not waited for. Its memory is the host's, which is faster there.
static bool maps(ggml_backend_dev_t dev) {
    return strcmp(ggml_backend_reg_name(ggml_backend_dev_backend_reg(dev)), "MTL") == 0;
}

void indexmem_copy_pieces(llama_context & ctx, const std::vector<indexmem_state_piece> & from, const std::vector<indexmem_state_piece> & to) {
    // the backend of a device, which copies there one after the other without being waited for
    std::map<ggml_backend_dev_t, ggml_backend_t> backends;
    ggml_backend_sched_t sched = ctx.get_sched();
    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); ++i) {
        ggml_backend_t backend = ggml_backend_sched_get_backend(sched, i);
        backends.emplace(ggml_backend_get_device(backend), backend);
    }
    std::set<ggml_backend_t> busy;

    for (size_t i = 0, j = 0, a = 0, b = 0; i < from.size();) {
        GGML_ASSERT(j < to.size());
        const size_t n = std::min(from[i].size - a, to[j].size - b);
        ggml_tensor src = bytes_of(from[i], a, n);
        ggml_tensor dst = bytes_of(to[j],   b, n);

        const auto it = backends.find(ggml_backend_buft_get_device(type_of(&src)));
        if (type_of(&src) == type_of(&dst) && !in_host(type_of(&src)) && it != backends.end() && !maps(it->first)) {
            ggml_backend_tensor_copy_async(it->second, it->second, &src, &dst);
            busy.insert(it->second);
        } else {
            ggml_backend_tensor_copy(&src, &dst);
        }
        a += n;
        b += n;
        if (a == from[i].size) {
            a = 0;
            ++i;
        }
        if (b == to[j].size) {
            b = 0;
            ++j;
        }
    }
    for (ggml_backend_t backend : busy) {
        ggml_backend_synchronize(backend);
    }
}

uint64_t indexmem_copy::size(llama_context & ctx, llama_seq_id seq_id) {
    const auto found = content_of(ctx, seq_id);
    uint64_t res = 0;
    for (const auto & s : found.sections) {
        res += s.head.size();
    }
    for (const auto & p : found.pieces) {
        res += padded(type_of(p.tensor), p.size);
    }
    return res;
}

uint64_t indexmem_copy::n_bytes(bool on_device) const {
    uint64_t res = 0;
    for (const auto & [buft, s] : stores) {
        res += in_host(buft) != on_device ? s.n_bytes() : 0;
    }
    for (const auto & s : sections) {
        res += on_device ? 0 : s.head.size();
    }
    return res;
}

void indexmem_copy::take(llama_context & ctx, llama_seq_id seq_id) {
    owner = 0;
    sections.clear();

    ctx.synchronize();
    auto found = content_of(ctx, seq_id);
    places = find_places(found.pieces);
    indexmem_copy_pieces(ctx, found.pieces, places);

    const auto * mixed = dynamic_cast<const llama_memory_mixed *>(ctx.get_memory());
    sections = std::move(found.sections);
    seq      = *bounded_of(ctx).get_seq(seq_id);
    n_window = mixed ? mixed->n_window(seq_id) : 0;
    owner    = bounded_of(ctx).get_id();
}

uint64_t indexmem_copy::state_size() const {
    uint64_t res = 0;
    for (const auto & s : sections) {
        res += s.head.size() + s.n_bytes;
    }
    return res;
}

void indexmem_copy::state(uint8_t * dst) const {
    size_t i = 0, done = 0; // of which place so much has been written
    for (const auto & s : sections) {
        dst = std::copy(s.head.begin(), s.head.end(), dst);
        for (uint64_t left = s.n_bytes; left > 0;) {
            const auto & p = places[i];
            const size_t n = std::min<uint64_t>(left, p.size - done);
            ggml_backend_tensor_get(p.tensor, dst, p.offset + done, n);
            dst  += n;
            left -= n;
            done += n;
            if (done == p.size) {
                done = 0;
                ++i;
            }
        }
    }
}

void indexmem_copy::put(llama_context & ctx, llama_seq_id seq_id) const {
    auto & bounded = bounded_of(ctx);
    if (owner == 0) {
        throw std::runtime_error("there is no copy");
    }
    if (!bounded.get_seq(seq_id)) {
        throw std::runtime_error(format("there is no sequence %d in this context", seq_id));
    }
    ctx.synchronize();

    // another cache checks it, and one that gives states another pin does that when it reads
    if (owner != bounded.get_id() || bounded.get_load_pin() >= 0) {
        std::vector<uint8_t> bytes(state_size());
        state(bytes.data());
        if (ctx.state_seq_set_data(seq_id, bytes.data(), bytes.size(), 0) != bytes.size()) {
            const std::string why = indexmem_last_error();
            throw std::runtime_error(why.empty() ? "llama.cpp refuses the state" : why);
        }
        return;
    }
    try {
        auto * mixed = dynamic_cast<llama_memory_mixed *>(ctx.get_memory());
        if (mixed) {
            mixed->replace(seq_id, seq, n_window);
        } else {
            bounded.replace({ { seq_id, seq } });
        }
        indexmem_copy_pieces(ctx, places, mixed ? mixed->pieces(seq_id) : indexmem_state_pieces(bounded, seq_id));
    } catch (...) {
        bounded.spoil(seq_id);
        throw;
    }
}
