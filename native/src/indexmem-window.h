#pragma once

#include "indexmem-kv-cache.h"
#include "indexmem-state.h"

#include "llama-kv-cache.h"

#include <map>
#include <string>
#include <vector>

//
// The cache of layers that look at a window
//
// llama.cpp's own, as long as the window and one ubatch: it needs no budget. Here is what a bounded cache beside it asks of it.
//
// Invariants
//   - of a sequence it holds neighbouring positions up to the newest: indices, as everywhere but in keys
//   - its keys are rotated by the positions that those of the bounded cache are rotated by: turned with them
//
class indexmem_window {
public:
    using layer_filter_cb = llama_memory_i::layer_filter_cb;
    using layer_reuse_cb  = llama_memory_i::layer_reuse_cb;

    indexmem_window(const llama_model & model, ggml_type type_k, ggml_type type_v, bool offload, uint32_t n_seq_max, uint32_t n_ubatch,
            const layer_filter_cb & filter, const layer_reuse_cb & reuse);

    llama_kv_cache & get() { return cache; }

    const llama_kv_cache & get() const { return cache; }

    // the first position that a token at p0 attends to, p0 if it is the only one
    llama_pos first_seen(llama_pos p0) const;

    // whether a token at position p0 still finds all that it attends to
    bool can_go_on(llama_seq_id seq_id, llama_pos p0) const;

    // the first position for which, and for all after it, that is so
    llama_pos first_way_on(llama_seq_id seq_id) const;

    // tokens that a sequence can grow by before what its present end looks at is overwritten: at least one ubatch
    uint32_t n_spare() const;

    // What it holds of a sequence in front of position p1 becomes what it holds of another. The device is idle.
    void copy(llama_seq_id src, llama_seq_id dst, llama_pos p1);

    // rows of K and V, layer by layer, of positions [p0, p1) of a sequence, all of which it holds
    std::vector<indexmem_state_piece> rows(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const;

    // makes a sequence hold these positions, no more than there are cells, and nothing else; what rows they lie in is open
    void place(llama_seq_id seq_id, llama_pos p0, llama_pos p1);

    // K and V of each layer
    const std::vector<ggml_tensor *> & tensors() const { return stores; }

    // as llama_kv_cache_bounded::learn_rotation, of a layer of the window
    void learn_rotation(llama_kv_cache_bounded & bounded, int32_t il, const ggml_tensor * k_cur, const ggml_tensor * hadamard);

    // takes the memory for turn() beforehand
    void reserve(llama_context & lctx, indexmem_rotator & rotator);

    // all keys of a sequence to positions that differ by delta; false with an error
    bool turn(llama_context & lctx, indexmem_rotator & rotator, llama_seq_id seq_id, int32_t delta, std::string & error);

private:
    struct layer {
        indexmem_rotation rotation;

        int64_t n_rot; // size of the Hadamard rotation, 0 = none
    };

    // calls f(keys [n_embd_head_k, rows], layer, heads) for each layer whose keys are rotated
    template <typename F>
    void for_each(F f);

    const llama_model & model;

    llama_kv_cache cache;

    std::vector<ggml_tensor *> stores;

    std::map<int32_t, layer> layers; // those that are known
};

// A ubatch of the positions [p0, p1) of one sequence, as caches take them up without a graph. It refers to seq_id.
llama_ubatch indexmem_ubatch_of(llama_batch_allocr & balloc, llama_seq_id & seq_id, llama_pos p0, llama_pos p1);
