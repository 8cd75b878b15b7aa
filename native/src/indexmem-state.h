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
//     head     id, n_seen, n_used, n_fixed, pin, n_scored, ring_from, n_evictions
//     table    positions of the entries that have been through an eviction: [n_fixed] of every KV head of every layer. Those
//              of the other entries follow from the head
//     rows     of every layer: K, V, the ring of queries if the policy keeps one; of an indexer its state, the hidden
//              states that wait to be scored, the ring of queries if it keeps one; of a latent memory, once something has
//              been evicted, its state and the rows of its slots in K and V
//
// Invariants
//   - the size follows from the heads: what only counts bytes reads no tensor and changes nothing
//   - a number out of a state is checked against what this context can hold before it is used for anything
//   - a state that is refused leaves the cache as it was
//   - slots keep their order, so what has been appended since the last eviction can still be taken back after reading
//

constexpr uint32_t INDEXMEM_STATE_MAGIC   = 0x564B4D49; // "IMKV"
constexpr uint32_t INDEXMEM_STATE_VERSION = 6;

// neighbouring bytes of a tensor
struct indexmem_state_piece {
    ggml_tensor * tensor;
    size_t        offset;
    size_t        size;
};

// What of a layer belongs to the state of a sequence, in its order. The sequence lies in this stream.
std::vector<indexmem_state_piece> indexmem_state_table(
        const llama_kv_cache_bounded::layer     & l,
        const llama_kv_cache_bounded::seq_state & seq, uint32_t stream);

std::vector<indexmem_state_piece> indexmem_state_rows(
        const llama_kv_cache_bounded            & kv,
        const llama_kv_cache_bounded::layer     & l,
        const llama_kv_cache_bounded::seq_state & seq, uint32_t stream);

// of the header: nullptr is no memory
std::string indexmem_state_name(const indexmem_memory * memory);
