#pragma once

#include "llama-batch.h"
#include "llama-memory.h"

#include "indexmem-kv-counts.h"
#include "indexmem-kv-shares.h"
#include "indexmem-ops.h"
#include "indexmem-rotator.h"
#include "indexmem-sidecar.h"

#include "ggml-cpp.h"

#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

struct llama_model;

//
// llama_kv_cache_bounded
//
// A KV cache of a fixed number of slots per KV head. KV heads are outermost, so each can hold different tokens.
//
// Invariants
//   - buffers are allocated once; their size depends on the budget and n_ubatch, never on the number of tokens seen
//   - the host knows how many slots are in use, equal for all heads of a class of layers (indexmem-kv-counts.h), the device which
//     tokens they hold
//   - with a latent memory that has slots, these lie in front of all others in K and V, in rows [0, n_front); slot i of an
//     entry is row n_front + i. They are read from the first eviction of a sequence on
//   - the hidden state of a pending entry at position p lies in row p % n_wait, the query of position p in row p % n_ring
//

class llama_kv_cache_bounded : public llama_memory_i {
public:
    // everything decided before the cache exists
    struct config : indexmem_kv_counts::limits {
        uint64_t seed;
        int      policy; // index into policies.def

        bool        span_asked;  // one that turns out to be impossible is refused; if it was not asked for, it is left out
        std::string span_reason; // why there is none, "" if none was wanted

        std::vector<indexmem_slice> slices; // of all bounded layers, in order; empty: each is whole, and all have the same budget

        std::shared_ptr<const indexmem_sidecar> sidecar; // null if nothing of one is used
        std::shared_ptr<const indexmem_memory>  memory;  // null = off
    };

    using seq_state = indexmem_kv_counts::seq_state;
    using step      = indexmem_kv_counts::step;

    // of the model, or those of its KV heads that have a budget of their own (indexmem-kv-shares.h): a slice
    struct layer {
        uint32_t il;
        uint32_t head; // the first of its KV heads, of those of the layer of the model
        uint32_t cls;  // of its budget

        bool whole; // it has all heads of the layer of the model

        ggml_tensor * k;   // [n_embd_head_k, n_front + n_slots, n_head_kv, n_seq_max]
        ggml_tensor * v;   // [n_embd_head_v, n_front + n_slots, n_head_kv, n_seq_max]; of latent attention (MLA) the front of each row of K
        ggml_tensor * pos; // I32 [n_slots, n_head_kv, n_seq_max]
        ggml_tensor * rotary; // the same, what keys are rotated by: of sequences that have been rebased. Null without a span
        ggml_tensor * q;   // F32 [n_embd_head_k, n_ring, n_head, n_seq_max] latest queries, null unless the policy reads them
        ggml_tensor * ahead; // F32 [n_embd_head_k, n_embd_head_k] what moves queries to later positions (indexmem-ahead.h); null unless the rank is of those

        // of the indexer, null without one. The last n_wait rows of `state` and `queries` belong to no entry: writes for
        // sequences with fewer pending entries than others go there.
        ggml_tensor * state;   // F32 [n_state, n_slots + n_wait, n_state_heads, n_seq_max]
        ggml_tensor * pending; // [n_embd, n_wait, 1, n_seq_max] hidden states: the one of position p in row p % n_wait. The first slice of a
                               // layer has them for all
        ggml_tensor * sinks; // F32 [n_head] of the model: logits of query heads whose attention goes nowhere. Null if there are none

        ggml_tensor * queries; // F32 [n_query_state, n_ring + n_wait, 1, n_seq_max], null unless its rank reads queries, and then it is whole

        std::vector<ggml_tensor *> memory; // F32 [ne0, ne1, n_head_kv, n_seq_max] state of the latent memory, empty without one

        uint32_t last; // the last layer of the model that reads its entries: they are evicted behind that one

        bool attends; // by our op, and not by flash attention
        bool stock;   // its device has no kernels of ours: what is small lies in the host's memory (indexmem-stock.h)

        std::optional<indexmem_rotation> rotation; // of keys; known as soon as a graph was built

        float scale   = 1.0f; // of the logits of attention, likewise
        float softcap = 0.0f;

        bool has_values() const { return v->view_src == nullptr; } // of its own

        int64_t        n_head() const { return k->ne[2]; } // KV heads
        indexmem_slice heads()  const { return { il, head, (uint32_t) n_head(), cls }; }

        // of what has a row for each head of the layer of the model, in dimension 1, the rows that belong to the heads of this slice
        ggml_tensor * of_heads(ggml_context * ctx, ggml_tensor * t, int64_t n_head_kv) const;

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
                 const config & cfg,
        const layer_filter_cb & filter = nullptr,  // which layers it is for; null: all that attend
        const layer_reuse_cb  & reuse  = nullptr); // the layer whose entries one without its own reads, or -1

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

    // What the ubatches of a batch do; nothing has changed then. Logs why, and says so to indexmem_last_error(), if it fails.
    llama_memory_status prepare(const std::vector<llama_ubatch> & ubatches, std::vector<step> & steps) const;

    // whether seq_rm() and seq_cp() would do it; nothing has changed then
    bool can_seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const;
    bool can_seq_cp(llama_seq_id seq_id_src, llama_pos p0, llama_pos p1) const; // logs why not

    // A state that has been read and checked, and not yet put into the cache. What read_state() throws leaves it as it was,
    // and apply_state() does not fail.
    struct loading;
    std::shared_ptr<loading> read_state(llama_io_read_i & io, llama_seq_id seq_id) const;
    void apply_state(const loading & what);

    // What these sequences held is forgotten, and who calls this puts what they are to hold into their streams. The device is
    // idle.
    void replace(const std::vector<std::pair<llama_seq_id, seq_state>> & seqs);

    // Tells caches apart, also from one that was where another is now. Never 0.
    uint64_t get_id() const { return id; }

    // a sequence whose entries no longer belong together
    void spoil(llama_seq_id seq_id);

    const llama_model          & get_model()  const { return model; }
    const config               & get_config() const { return cfg; }
    const indexmem_policy_info & get_policy() const { return *indexmem_policy_get(cfg.policy); }

    const std::vector<layer> & get_layers() const { return layers; }

    // the slices that a layer reads, its own or another's, and the slice that has a KV head of its own. Empty, null: there are none
    std::vector<const layer *> get_sources(int32_t il) const;
    const layer              * get_layer(int32_t il, uint32_t head = 0) const;

    uint32_t get_n_head_kv(int32_t il) const; // KV heads that a layer has a cache of its own for

    const seq_state * get_seq(llama_seq_id seq_id) const; // null out of range

    const indexmem_indexer * get_indexer() const { return indexer; } // null unless it is the policy
    const indexmem_memory  * get_memory()  const { return cfg.memory.get(); } // null = off

    const indexmem_kv_counts           & get_counts()   const { return counts; }
    const indexmem_kv_counts::geometry & get_geometry() const { return counts.get_geometry(); }

    uint32_t get_n_slots(const layer & l) const { return get_geometry().n_slots[l.cls]; } // of entries
    uint32_t get_n_front()   const { return get_geometry().n_front; }
    uint32_t get_n_latent()  const { return get_geometry().n_latent; } // slots of the memory
    uint32_t get_n_ring()    const { return get_geometry().n_ring; }
    uint32_t get_n_wait()    const { return get_geometry().n_wait; }
    uint32_t get_n_seq_max() const { return counts.n_seq_max(); }

    // false, with the reason, when that is impossible
    bool set_pin(llama_seq_id seq_id, uint32_t n, std::string & error);
    uint32_t pin_room() const { return counts.pin_room(); }

    // the stream that holds the data of a sequence now: another one's until pending copies have been made
    uint32_t get_stream(llama_seq_id seq_id) const;

    // positions held by one head, in slot order: indices, and what its keys are rotated by
    std::vector<int32_t> get_positions(llama_seq_id seq_id, const layer & l, uint32_t head) const;
    std::vector<int32_t> get_rotary   (llama_seq_id seq_id, const layer & l, uint32_t head) const;

    uint32_t            get_span()        const { return counts.get_limits().span; } // 0: none is in force
    const std::string & get_span_reason() const { return span_reason; } // why not, "" if none was wanted

    // What a graph does with the keys of a layer before they are stored. Throws if a span was asked for and they cannot be
    // turned to other positions.
    void learn_rotation(int32_t il, const ggml_tensor * k_cur, const ggml_tensor * hadamard);

    // how a graph computes the logits of attention of a layer, whose policy may want them
    void learn_scale(uint32_t il, float scale, float softcap);

    // The pinned prefix of sequences whose state is read from now on, as far as it is still there; -1: their own.
    void    set_load_pin(int32_t n) { load_pin = n; }
    int32_t get_load_pin() const { return load_pin; }

    void log_made() const; // what the log says of a new one

    size_t size_kv_bytes()      const;
    size_t size_meta_bytes()    const; // all but K and V
    size_t size_indexer_bytes() const; // the part of it that the indexer keeps
    size_t size_memory_bytes()  const; // the part of it that the latent memory keeps
    size_t size_rotator_bytes() const { return rotator.size_bytes(); } // none of them: where keys are turned

    int64_t get_rot_k() const { return rot_k; } // size of the Hadamard rotation of keys and queries, 0 = none
    int64_t get_rot_v() const { return rot_v; }

    // of a ubatch: the rebases that have to come first; false, with a message, if one fails. Then the sequence is broken
    bool rebase(const step & st);

    // of a ubatch: it has been computed, or it was begun and has not
    void finish (const step & st) { counts.finish(st); }
    void abandon(const step & st) { counts.abandon(st); }

    indexmem_rotator & get_rotator() { return rotator; }

    // from now on rotary positions grow without end, because of this; fails if a span was asked for
    void drop_span(const std::string & why);

    // microseconds spent by the CPU in ranking, selection and compaction; the ops add to it
    mutable int64_t evict_us = 0;

    int64_t rebase_us = 0; // spent in rebases

    // what indexmem_work_bytes() found, and for how many threads: the shapes never change
    mutable int    work_threads = 0;
    mutable size_t work_bytes   = 0;

private:
    const llama_model & model;

    const config cfg;

    const uint64_t id;

    const indexmem_indexer * indexer = nullptr;

    indexmem_kv_counts counts;

    std::string span_reason;

    llama_context * lctx = nullptr; // the one that this is the memory of, known from its first batch on

    indexmem_rotator rotator;

    int32_t load_pin = -1;

    std::string unusable; // why nothing can be evaluated as the context is set up now, "" if it can

    int64_t rot_k = 0;
    int64_t rot_v = 0;

    std::vector<layer> layers;

    std::unordered_map<int32_t, std::vector<size_t>> map_layer_ids; // model layer -> indices of what it reads in layers

    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> ctxs_bufs;

    // a sequence to be copied, or (src NOTHING) whose memory is to be cleared
    static constexpr uint32_t NOTHING = UINT32_MAX;
    struct copy { uint32_t src, dst; seq_state seq = {}; }; // seq: of the source
    std::vector<copy> copies; // pending, applied by init_update

    // host: for all but keys, values and what waits to be scored; another context than `ctx` for a device without kernels of ours
    layer new_layer(ggml_context * ctx, ggml_context * host, const indexmem_slice & slice, ggml_type type_k, ggml_type type_v) const;

    void reset(llama_seq_id seq_id);

    std::vector<int32_t> get_table(ggml_tensor * t, const seq_state & seq, int32_t tail, llama_seq_id seq_id, uint32_t head) const;

    bool turn_layer(uint32_t s, layer & l, const seq_state & from, int32_t end, std::string & error);

    void reserve_rotator();

    void write_ahead(const layer & l) const;

    void apply_copies();
    void copy_rows(ggml_tensor * t, const copy & c, const std::vector<std::pair<int64_t, int64_t>> & rows);
    std::vector<std::pair<int64_t, int64_t>> rows_in_use(const layer & l, const ggml_tensor * t, uint32_t n_used) const;
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

    // a ubatch that was begun, and that next() did not confirm, has not been computed
    ~llama_kv_cache_bounded_context() override;

    bool next()  override;
    bool apply() override;

    llama_memory_status  get_status() const override { return status; }
    const llama_ubatch & get_ubatch() const override;

    const llama_kv_cache_bounded & get_kv() const { return *kv; }

    const step & get_step() const { return steps[i_cur]; }

    // the same with rotary positions; valid until the next call
    const llama_ubatch * get_rotary_ubatch(const llama_ubatch & ubatch) const;

    void learn_rotation(int32_t il, const ggml_tensor * k_cur, const ggml_tensor * hadamard) const {
        kv->learn_rotation(il, k_cur, hadamard);
    }

    void learn_scale(uint32_t il, float scale, float softcap) const { kv->learn_scale(il, scale, softcap); }

private:
    llama_kv_cache_bounded * kv;

    llama_memory_status status;

    size_t i_cur = 0;
    bool   begun = false; // the current ubatch

    std::vector<step>         steps;
    std::vector<llama_ubatch> ubatches;

    mutable llama_ubatch           rotary_ubatch;
    mutable std::vector<llama_pos> rotary_pos;
};

// the bounded cache behind a memory context, or null
const llama_kv_cache_bounded_context * indexmem_context(const llama_memory_context_i * mctx);
