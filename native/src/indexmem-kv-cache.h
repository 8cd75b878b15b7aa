#pragma once

#include "llama-batch.h"
#include "llama-graph.h"
#include "llama-memory.h"

#include "indexmem.h"
#include "indexmem-ops.h"
#include "indexmem-sidecar.h"

#include <algorithm>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

struct llama_cparams;
struct llama_hparams;
struct llama_model;

//
// llama_kv_cache_bounded
//
// A KV cache of a fixed number of slots per KV head. KV heads are outermost, so each can hold different tokens.
//
// Invariants
//   - buffers are allocated once; their size depends on the budget and n_ubatch, never on the number of tokens seen
//   - the host knows how many slots are in use (equal for all heads), the device which tokens they hold
//   - with a latent memory that has slots, these lie in front of all others in K and V, in rows [0, n_front); slot i of an
//     entry is row n_front + i. They are read from the first eviction of a sequence on
//   - slots [0, n_used) of every head are in use. Slots [0, n_fixed) have their position in the device table `pos`;
//     slot n_fixed + i, appended since the last eviction, holds position n_seen - (n_used - n_fixed) + i
//   - after apply() of a ubatch, n_used plus the slots of the memory <= budget
//   - with an indexer, entries at positions [n_scored, n_seen) are pending: the hidden states they are scored from lie in
//     a ring of n_wait rows. What is ranked has been scored, so pending entries are in slots from n_fixed on
//

class llama_kv_cache_bounded : public llama_memory_i {
public:
    // everything decided before the cache exists
    struct config {
        uint32_t    budget;
        uint32_t    sinks;
        uint32_t    window;
        uint32_t    pin;
        uint32_t    evict_step; // 0 = from the room in the budget
        uint64_t    seed;
        int         policy;     // index into policies.def
        double      ratio;      // of the tokens seen, 0 = none

        std::shared_ptr<const indexmem_sidecar> sidecar; // null if nothing of one is used
        std::shared_ptr<const indexmem_memory>  memory;  // null = off
    };

    // Attention looks at a multiple of so many rows: kernels of some backends want that, and it bounds how often the graph
    // changes while the cache fills.
    static constexpr uint32_t N_KV_PAD = 256;

    // Tokens that can wait to be scored: a small network costs less per token when it sees many. Of a small budget they are
    // a small share too, because their hidden states take more bytes than entries do.
    static constexpr uint32_t N_WAIT_MAX  = 32;
    static constexpr uint32_t N_WAIT_MIN  = 4;
    static constexpr uint32_t WAIT_SHARE  = 32; // of the budget

    // queries kept beyond those that a rank reads: so many tokens can be taken back exactly
    static constexpr uint32_t N_RING_SLACK = 32;

    // host side of one sequence
    struct seq_state {
        llama_pos n_seen  = 0;
        uint32_t  n_used  = 0;
        uint32_t  n_fixed = 0;
        uint32_t  pin     = 0;
        llama_pos n_scored = 0;

        uint64_t n_evictions = 0; // ubatches that evicted

        llama_pos pos_tail()  const { return n_seen - (llama_pos) (n_used - n_fixed); }
        uint32_t  n_pending() const { return (uint32_t) (n_seen - n_scored); }

        // forgets the entries from p0 on, which have not been moved since they were appended
        void truncate(llama_pos p0) {
            n_used  -= (uint32_t) (n_seen - p0);
            n_seen   = p0;
            n_scored = std::min(n_scored, p0);
        }
    };

    // what one ubatch does, decided on the host before any ubatch of the batch runs
    struct step {
        uint32_t s0;      // first sequence (stream) of the ubatch
        uint32_t n_seq;   // consecutive sequences
        uint32_t n_kv;    // slots that attention looks at
        bool     evict;   // some sequence evicts
        bool     recall;  // some sequence has evicted before, and the memory is read
        bool     score;   // the indexer scores what is pending and the new tokens; if not, the new tokens become pending
        uint32_t n_old;   // pending entries scored, the most of any sequence

        std::vector<seq_state> before; // [n_seq]
        std::vector<seq_state> after;  // [n_seq]
    };

    struct layer {
        uint32_t il;

        ggml_tensor * k;   // [n_embd_head_k, n_front + n_slots, n_head_kv, n_seq_max]
        ggml_tensor * v;   // [n_embd_head_v, n_front + n_slots, n_head_kv, n_seq_max]
        ggml_tensor * pos; // I32 [n_slots, n_head_kv, n_seq_max]
        ggml_tensor * q;   // F32 [n_embd_head_k, n_ring, n_head, n_seq_max] latest queries, null unless the policy reads them

        // of the indexer, null without one. The last n_wait rows of `state` and `queries` belong to no entry: writes for
        // sequences with fewer pending entries than others go there.
        ggml_tensor * state;   // F32 [n_state, n_slots + n_wait, n_state_heads, n_seq_max]
        ggml_tensor * pending; // [n_embd, n_wait, 1, n_seq_max] hidden states: the one of position p in row p % n_wait
        ggml_tensor * queries; // F32 [n_query_state, n_ring + n_wait, 1, n_seq_max], null unless its rank reads queries

        std::vector<ggml_tensor *> memory; // F32 [ne0, ne1, n_head_kv, n_seq_max] state of the latent memory, empty without one

        bool attends; // by our op, and not by flash attention

        // all that holds data of sequences
        std::vector<ggml_tensor *> tensors() const;
    };

    llama_kv_cache_bounded(
            const llama_model & model,
                    ggml_type   type_k,
                    ggml_type   type_v,
                         bool   offload,
                     uint32_t   n_seq_max,
                     uint32_t   n_ubatch,
                 const config & cfg);

    //
    // llama_memory_i
    //

    llama_memory_context_ptr init_batch(
            llama_batch_allocr & balloc,
            uint32_t n_ubatch,
            bool embd_all) override;

    llama_memory_context_ptr init_full() override;

    llama_memory_context_ptr init_update(llama_context * lctx, bool optimize) override;

    bool get_can_shift() const override { return false; }

    void clear(bool data) override;

    bool seq_rm  (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1) override;
    void seq_cp  (llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) override;
    void seq_keep(llama_seq_id seq_id)                                                          override;
    void seq_add (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1, llama_pos shift) override;
    void seq_div (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1, int d) override;

    llama_pos seq_pos_min(llama_seq_id seq_id) const override;
    llama_pos seq_pos_max(llama_seq_id seq_id) const override;

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const override;

    void state_write(llama_io_write_i & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) const override;
    void state_read (llama_io_read_i  & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) override;

    //
    // llama_kv_cache_bounded specific API
    //

    const config               & get_config() const { return cfg; }
    const indexmem_policy_info & get_policy() const { return *indexmem_policy_get(cfg.policy); }

    const std::vector<layer> & get_layers() const { return layers; }

    const layer     * get_layer(int32_t il) const; // null if the layer has no cache
    const seq_state * get_seq  (llama_seq_id seq_id) const; // null out of range

    const indexmem_indexer * get_indexer() const { return indexer; } // null unless it is the policy
    const indexmem_memory  * get_memory()  const { return cfg.memory.get(); } // null = off

    uint32_t get_n_slots()   const { return n_slots; } // of entries
    uint32_t get_n_front()   const { return n_front; }
    uint32_t get_n_latent()  const { return cfg.memory ? cfg.memory->n_slots() : 0; } // slots of the memory
    uint32_t get_n_ring()    const { return n_ring; }
    uint32_t get_n_wait()    const { return n_wait; }
    uint32_t get_n_seq_max() const { return (uint32_t) seqs.size(); }

    // entries that a sequence may keep at its present length, the slots of the memory not counted
    uint32_t get_budget(const seq_state & seq) const;

    // entries that leave at once: at least the step, and never into what is protected
    uint32_t get_evict_step(const seq_state & seq) const;

    // entries that leave at once at most, after n_tokens more
    uint32_t get_evict_max(uint32_t n_tokens) const;

    // false when pin, sinks and window leave no room, or when evicted entries would have to be pinned
    bool set_pin(llama_seq_id seq_id, uint32_t n, std::string & error);

    // positions held by one head, in slot order
    std::vector<int32_t> get_positions(llama_seq_id seq_id, const layer & l, uint32_t head) const;

    size_t size_kv_bytes()      const;
    size_t size_meta_bytes()    const; // all but K and V
    size_t size_indexer_bytes() const; // the part of it that the indexer keeps
    size_t size_memory_bytes()  const; // the part of it that the latent memory keeps

    int64_t get_rot_k() const { return rot_k; } // size of the Hadamard rotation of keys and queries, 0 = none
    int64_t get_rot_v() const { return rot_v; }

    void apply(const step & st);

    // microseconds spent by the CPU in ranking, selection and compaction; the ops add to it
    mutable int64_t evict_us = 0;

    // smallest budget that leaves room to evict, with so many slots of a memory
    static uint64_t budget_min(uint64_t sinks, uint64_t pin, uint64_t window, uint64_t n_latent);

private:
    const llama_model & model;

    const config cfg;

    const indexmem_indexer * indexer = nullptr;

    uint32_t n_slots = 0;
    uint32_t n_front = 0;
    uint32_t n_ring  = 0; // of queries, of the policy or the indexer
    uint32_t n_wait  = 0; // hidden states that wait to be scored

    int64_t rot_k = 0;
    int64_t rot_v = 0;

    std::vector<seq_state> seqs; // [n_seq_max]
    std::vector<layer>     layers;

    std::unordered_map<int32_t, size_t> map_layer_ids; // model layer -> index in layers

    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> ctxs_bufs;

    // a sequence to be copied, or (src NOTHING) whose memory is to be cleared
    static constexpr uint32_t NOTHING = UINT32_MAX;
    struct copy { uint32_t src, dst; };
    std::vector<copy> copies; // pending, applied by init_update

    // empty on failure
    std::vector<step> prepare(const std::vector<llama_ubatch> & ubatches) const;

    uint32_t n_protected(const seq_state & seq) const; // length of the protected prefix

    bool can_remove(const seq_state & seq, llama_pos p0) const; // whether a tail can be taken back exactly

    void reset(llama_seq_id seq_id);

    void apply_copies();
    void clear_memory(uint32_t stream);

    friend class llama_kv_cache_bounded_context;
};

class llama_kv_cache_bounded_context : public llama_memory_context_i {
public:
    using step = llama_kv_cache_bounded::step;

    // used for errors and updates
    llama_kv_cache_bounded_context(llama_kv_cache_bounded * kv, llama_memory_status status);

    // used to create a full-cache context
    explicit llama_kv_cache_bounded_context(llama_kv_cache_bounded * kv);

    // used to create a batch processing context
    llama_kv_cache_bounded_context(
            llama_kv_cache_bounded * kv,
            std::vector<step> steps,
            std::vector<llama_ubatch> ubatches);

    bool next()  override;
    bool apply() override;

    llama_memory_status  get_status() const override { return status; }
    const llama_ubatch & get_ubatch() const override;

    const llama_kv_cache_bounded & get_kv() const { return *kv; }

    const step & get_step() const { return steps[i_cur]; }

private:
    llama_kv_cache_bounded * kv;

    llama_memory_status status;

    size_t i_cur = 0;

    std::vector<step>         steps;
    std::vector<llama_ubatch> ubatches;
};

// The bounded cache asked for by indexmem_next_context(), or null if none was. Throws std::runtime_error when the model
// or the parameters do not allow one.
llama_memory_i * indexmem_create_memory(
        const llama_model         & model,
        const llama_memory_params & params,
        const llama_cparams       & cparams);
