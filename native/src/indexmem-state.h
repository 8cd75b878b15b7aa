#pragma once

#include "indexmem-kv-cache.h"

#include "llama-io.h"

#include <array>
#include <string>
#include <vector>

//
// State of a bounded cache, little endian as everything llama.cpp writes
//
//   header     magic, version, policy, memory, sidecar, geometry, number of classes of slices, of every slice of a layer
//              (indexmem-kv-shares.h) its class, its first head and the bytes of a row of each part; number of sequences
//   sequences  one after the other:
//     head     id, n_seen, n_used, n_fixed, pin, n_scored, ring_from, n_evictions, shift, n_rebases, n_first, n_last; n_used and
//              n_fixed of every other class
//     table    positions of the entries that have been through an eviction or a rebase: [n_fixed] of every KV head of every
//              slice; once there was a rebase, those that their keys are rotated by as well, after the others of the slice. Of
//              the other entries they follow from the head
//     rows     of every slice: K, V, the ring of queries if the policy keeps one; of an indexer its state, the hidden
//              states that wait to be scored, the ring of queries if it keeps one; of a latent memory, once something has
//              been evicted, its state and the rows of its slots in K and V
//
// Invariants
//   - the size follows from the heads: what only counts bytes reads no tensor and changes nothing
//   - a number out of a state is checked against what this context can hold before it is used for anything
//   - a state that is refused leaves the cache as it was
//   - a state says itself how large its parts are: those that this cache has no use for are skipped
//   - what holds more entries than the budget is read into a cache as large as it, in the host's memory, and the policy of this
//     one evicts there, as a step of no tokens (indexmem-state-fit.cpp)
//   - heads that are of one class here hold equally much in a state, whatever slices it has
//   - a cache with one class of whole layers writes format 8, which has no classes and which libraries before format 9 read; one with
//     classes of whole layers format 9, without first heads
//   - formats 6 and 7 are read as well. They have no sizes of parts, but sinks and window, which n_first and n_last follow from;
//     of format 6, of states that know of no rebase, the head ends before `shift`
//   - slots keep their order, so what has been appended since the last eviction can still be taken back after reading
//

constexpr uint32_t INDEXMEM_STATE_MAGIC   = 0x564B4D49; // "IMKV"
constexpr uint32_t INDEXMEM_STATE_VERSION       = 10; // of a cache with slices of layers
constexpr uint32_t INDEXMEM_STATE_VERSION_WHOLE = 9;  // of one with classes of whole layers
constexpr uint32_t INDEXMEM_STATE_VERSION_ONE   = 8;  // of one with one class of whole layers
constexpr uint32_t INDEXMEM_STATE_VERSION_OLDEST = 6;

constexpr const char * INDEXMEM_STATE_INDEXER = "indexer"; // the policy whose entries have scores

// neighbouring bytes of a tensor
struct indexmem_state_piece {
    ggml_tensor * tensor;
    size_t        offset;
    size_t        size;
};

// The bytes of a piece as a tensor, for what copies tensors; it is valid as long as the other.
ggml_tensor indexmem_state_view(const indexmem_state_piece & piece);

// The table of some heads, which this cache may keep in other slices: of each its positions, then, if there was a rebase, of each
// its rotary ones. The sequence lies in this stream.
std::vector<indexmem_state_piece> indexmem_state_table(
        const llama_kv_cache_bounded            & kv,
        const indexmem_slice                    & heads,
        const llama_kv_cache_bounded::seq_state & seq, uint32_t stream);

// the parts that the rows of a slice are made of, in their order
enum indexmem_state_part {
    INDEXMEM_STATE_ENTRIES, // K and V
    INDEXMEM_STATE_RING,    // queries that a policy keeps
    INDEXMEM_STATE_SCORED,  // of an indexer: what it keeps of each entry,
    INDEXMEM_STATE_PENDING, // hidden states of tokens that wait,
    INDEXMEM_STATE_QUERIES, // what it keeps of the latest queries
    INDEXMEM_STATE_MEMORY,  // a latent memory, with the rows of its slots in K and V
    INDEXMEM_STATE_N_PARTS,
};

using indexmem_state_rows = std::array<std::vector<indexmem_state_piece>, INDEXMEM_STATE_N_PARTS>;

indexmem_state_rows indexmem_state_rows_of(
        const llama_kv_cache_bounded            & kv,
        const indexmem_slice                    & heads,
        const llama_kv_cache_bounded::seq_state & seq, uint32_t stream);

// all that a sequence holds, tables and rows, in the order in which they are written: after its head
std::vector<indexmem_state_piece> indexmem_state_pieces(const llama_kv_cache_bounded & kv, llama_seq_id seq_id);

// Bytes of a row of each part, all these heads: of an entry, a query, a pending token, and of the memory all
using indexmem_state_sizes = std::array<uint32_t, INDEXMEM_STATE_N_PARTS>;

indexmem_state_sizes indexmem_state_sizes_of(const llama_kv_cache_bounded & kv, const indexmem_slice & heads);

// the format that a cache writes
uint32_t indexmem_state_version_of(const llama_kv_cache_bounded & kv);

// What a state says of the cache that it was made with. Unlike the head sizes and types of K and V these may differ from ours.
struct indexmem_state_origin {
    uint32_t    version;
    std::string policy;
    std::string memory;
    uint32_t    n_latent;
    uint32_t    sinks  = 0; // of formats before 8
    uint32_t    window = 0; // likewise
    uint64_t    sidecar;
    uint32_t    n_ring;

    uint32_t n_classes = 1;

    std::vector<indexmem_slice>       slices; // all bounded layers, in order, with the classes of the state
    std::vector<indexmem_state_sizes> sizes;  // of each slice

    // rows of a part that a sequence has
    uint64_t n_rows(indexmem_state_part part, const llama_kv_cache_bounded::seq_state & seq) const;
};

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

// Reads so many bytes, however many that is: no more memory than there are bytes. `res` null: they are skipped
void indexmem_state_some(llama_io_read_i & io, uint64_t n, std::vector<uint8_t> * res);

// The tables and the rows of a sequence that a cache takes up as `seq`, and that was written as `from`: checked, and held, or, of
// what reads them into tensors later, left to it.
void indexmem_state_hold_sequence(llama_io_read_i & io, const indexmem_state_origin & origin, const llama_kv_cache_bounded & kv,
        const llama_kv_cache_bounded::seq_state & from, const llama_kv_cache_bounded::seq_state & seq, uint32_t stream,
        std::vector<indexmem_state_held> & held);

// The same of one that has to do this step first: it is done, and what is left is held. Throws if there is no memory for it.
void indexmem_state_hold_fitted(llama_io_read_i & io, const indexmem_state_origin & origin, const llama_kv_cache_bounded & kv,
        const llama_kv_cache_bounded::seq_state & from, const llama_kv_cache_bounded::step & st, uint32_t stream,
        std::vector<indexmem_state_held> & held);

// the bytes of pieces, one after the other, and the same back into pieces of the same size in all
std::vector<uint8_t> indexmem_state_get(const std::vector<indexmem_state_piece> & pieces);
void                 indexmem_state_set(const std::vector<indexmem_state_piece> & pieces, const std::vector<uint8_t> & data);

// Throws unless this is the end of what is read: llama.cpp refuses what follows in a file too late, when the cache has changed.
void indexmem_state_end(llama_io_read_i & io);
