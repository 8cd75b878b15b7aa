#pragma once

#include "indexmem-kv-cache.h"

#include "llama-io.h"

#include <string>
#include <vector>

//
// State of a bounded cache, little endian as everything llama.cpp writes
//
//   header     magic, version, policy, memory, geometry; number of sequences
//   sequences  one after the other:
//     head     id, n_seen, n_used, n_fixed, pin, n_scored, ring_from, n_evictions, shift, n_rebases
//     table    positions of the entries that have been through an eviction or a rebase: [n_fixed] of every KV head of every
//              layer; once there was a rebase, those that their keys are rotated by as well, after the others of the layer. Of
//              the other entries they follow from the head
//     rows     of every layer: K, V, the ring of queries if the policy keeps one; of an indexer its state, the hidden
//              states that wait to be scored, the ring of queries if it keeps one; of a latent memory, once something has
//              been evicted, its state and the rows of its slots in K and V
//
// Invariants
//   - the size follows from the heads: what only counts bytes reads no tensor and changes nothing
//   - a number out of a state is checked against what this context can hold before it is used for anything
//   - a state that is refused leaves the cache as it was
//   - format 6, of states that know of no rebase, is read as well: the head ends before `shift`
//   - slots keep their order, so what has been appended since the last eviction can still be taken back after reading
//

constexpr uint32_t INDEXMEM_STATE_MAGIC   = 0x564B4D49; // "IMKV"
constexpr uint32_t INDEXMEM_STATE_VERSION = 7;
constexpr uint32_t INDEXMEM_STATE_VERSION_OLDEST = 6;

// neighbouring bytes of a tensor
struct indexmem_state_piece {
    ggml_tensor * tensor;
    size_t        offset;
    size_t        size;
};

// What of a layer belongs to the state of a sequence, in its order: the table (of each head its positions, then, if there was a
// rebase, of each head its rotary ones) and the rows. The sequence lies in this stream.
std::vector<indexmem_state_piece> indexmem_state_table(
        const llama_kv_cache_bounded::layer     & l,
        const llama_kv_cache_bounded::seq_state & seq, uint32_t stream);

std::vector<indexmem_state_piece> indexmem_state_rows(
        const llama_kv_cache_bounded            & kv,
        const llama_kv_cache_bounded::layer     & l,
        const llama_kv_cache_bounded::seq_state & seq, uint32_t stream);

// of the header: nullptr is no memory
std::string indexmem_state_name(const indexmem_memory * memory);

// bytes that wait for all of a state to be read
struct indexmem_state_held {
    indexmem_state_piece piece;
    std::vector<uint8_t> data;

    void apply() const { ggml_backend_tensor_set(piece.tensor, data.data(), piece.offset, piece.size); }
};

struct llama_kv_cache_bounded::loading {
    llama_seq_id seq_id; // -1: all that the context has

    std::vector<std::pair<llama_seq_id, seq_state>> seqs;
    std::vector<indexmem_state_held>                held;
};

void indexmem_state_put(llama_io_write_i & io, const std::vector<indexmem_state_piece> & pieces, bool on_device);

indexmem_state_held indexmem_state_hold(llama_io_read_i & io, const indexmem_state_piece & piece);

// the bytes of pieces, one after the other, and the same back into pieces of the same size in all
std::vector<uint8_t> indexmem_state_get(const std::vector<indexmem_state_piece> & pieces);
void                 indexmem_state_set(const std::vector<indexmem_state_piece> & pieces, const std::vector<uint8_t> & data);

// Throws unless this is the end of what is read: llama.cpp refuses what follows in a file too late, when the cache has changed.
void indexmem_state_end(llama_io_read_i & io);
