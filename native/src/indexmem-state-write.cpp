#include "indexmem-state.h"

#include "llama.h"

#include <stdexcept>

using kv_cache = llama_kv_cache_bounded;

namespace {

template <typename T>
void put(llama_io_write_i & io, T value) {
    io.write(&value, sizeof(value));
}

// in the order of get_header()
void put_header(llama_io_write_i & io, const kv_cache & kv) {
    const auto & cfg = kv.get_config();
    const uint32_t version = indexmem_state_version_of(kv);

    put<uint32_t>(io, INDEXMEM_STATE_MAGIC);
    put<uint32_t>(io, version);
    io.write_string(kv.get_policy().name);
    io.write_string(indexmem_state_name(kv.get_memory()));
    put<uint32_t>(io, kv.get_n_latent());
    put<uint64_t>(io, cfg.sidecar ? cfg.sidecar->get_hash() : 0);
    put<uint32_t>(io, kv.get_n_ring());
    put<uint32_t>(io, kv.get_rot_k());
    put<uint32_t>(io, kv.get_rot_v());
    put<uint32_t>(io, kv.get_layers().size());
    if (version > INDEXMEM_STATE_VERSION_ONE) {
        put<uint32_t>(io, cfg.n_classes());
    }
    for (const auto & l : kv.get_layers()) {
        put<uint32_t>(io, l.il);
        if (version > INDEXMEM_STATE_VERSION_ONE) {
            put<uint32_t>(io, l.cls);
        }
        if (version > INDEXMEM_STATE_VERSION_WHOLE) {
            put<uint32_t>(io, l.head);
        }
        put<uint32_t>(io, l.k->ne[2]);
        put<uint32_t>(io, l.k->ne[0]);
        put<uint32_t>(io, l.v->ne[0]);
        put<uint32_t>(io, l.k->type);
        put<uint32_t>(io, l.v->type);
        for (uint32_t size : indexmem_state_sizes_of(kv, l.heads())) {
            put<uint32_t>(io, size);
        }
    }
}

// in the order of get_head()
void put_head(llama_io_write_i & io, llama_seq_id id, const kv_cache::seq_state & seq, uint32_t n_classes) {
    put<uint32_t>(io, id);
    put<uint32_t>(io, seq.n_seen);
    put<uint32_t>(io, seq.n_used);
    put<uint32_t>(io, seq.n_fixed);
    put<uint32_t>(io, seq.pin);
    put<uint32_t>(io, seq.n_scored);
    put<uint32_t>(io, seq.ring_from);
    put<uint64_t>(io, seq.n_evictions);
    put<uint32_t>(io, seq.shift);
    put<uint64_t>(io, seq.n_rebases);
    put<uint32_t>(io, seq.n_first);
    put<uint32_t>(io, seq.n_last);
    for (uint32_t c = 1; c < n_classes; ++c) {
        put<uint32_t>(io, seq.of(c).n_used);
        put<uint32_t>(io, seq.of(c).n_fixed);
    }
}

} // namespace

// A state that is asked to stay on the device (LLAMA_STATE_SEQ_FLAGS_ON_DEVICE) holds its bytes all the same: llama.cpp's
// writer for it takes tensors of types without blocks only, keeps one state of each sequence, and what has left the state could
// not be checked. What stays there is a copy (indexmem-copy.h).
void indexmem_state_put(llama_io_write_i & io, const std::vector<indexmem_state_piece> & pieces, bool on_device) {
    std::vector<uint8_t> buf;
    for (const auto & p : pieces) {
        if (!on_device) {
            io.write_tensor(p.tensor, p.offset, p.size);
        } else if (ggml_backend_buffer_is_host(p.tensor->buffer)) {
            io.write((const char *) p.tensor->data + p.offset, p.size);
        } else {
            buf.resize(p.size);
            ggml_backend_tensor_get(p.tensor, buf.data(), p.offset, p.size);
            io.write(buf.data(), buf.size());
        }
    }
}

// Called to count bytes, too, while the device may still be computing: no tensor is read here, and pending copies stay
// pending. What such a copy is to bring is still where it comes from.
void llama_kv_cache_bounded::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    const bool on_device = flags & LLAMA_STATE_SEQ_FLAGS_ON_DEVICE;

    put_header(io, *this);

    std::vector<llama_seq_id> ids;
    for (llama_seq_id s = 0; s < (llama_seq_id) get_n_seq_max(); ++s) {
        const auto & seq = *get_seq(s);
        if (s != seq_id && (seq_id != -1 || (seq.n_used == 0 && !seq.broken))) {
            continue;
        }
        if (seq.broken) {
            throw std::runtime_error("bounded KV state: " + indexmem_kv_counts::broken_text(s));
        }
        ids.push_back(s);
    }
    put<uint32_t>(io, ids.size());
    for (llama_seq_id id : ids) {
        put_head(io, id, *get_seq(id), cfg.n_classes());
        indexmem_state_put(io, indexmem_state_pieces(*this, id), on_device);
    }
}
