#pragma once

#include "indexmem-kv-cache.h"
#include "indexmem-recurrent.h"
#include "indexmem-window.h"

#include <memory>
#include <vector>

//
// The memory of a model whose layers are of several kinds
//
// Layers that attend to everything have a bounded cache, those that look at a window llama.cpp's cache of that size, and
// recurrent ones their state.
//
// Invariants
//   - all parts have seen the same tokens; what one of them refuses none does, and all are as they were
//   - the parts hold indices. Rotary positions are known to the bounded cache alone, and keys of the window are turned with its own
//   - a recurrent state cannot go back, or as far as its snapshots reach (n_rs_seq). A ubatch that was begun and not computed has
//     not happened if the states have a way back; otherwise its sequences are broken
//
class llama_memory_mixed : public llama_memory_i {
public:
    llama_memory_mixed(
            std::unique_ptr<llama_kv_cache_bounded> bounded,
            std::unique_ptr<indexmem_window>        window,      // null if no layer has one
            std::unique_ptr<indexmem_recurrent>     recurrent);  // likewise

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
    // llama_memory_mixed specific API
    //

    llama_kv_cache_bounded & get_bounded() const { return *bounded; }

    indexmem_window    * get_window()    const { return window.get(); }    // null if there is none
    indexmem_recurrent * get_recurrent() const { return recurrent.get(); } // likewise

    size_t size_window_bytes()    const;
    size_t size_recurrent_bytes() const;

    // positions of a sequence that the cache of the window holds, up to the newest; 0 without one
    llama_pos n_window(llama_seq_id seq_id) const;

    // as llama_kv_cache_bounded::replace, with so many positions of the window; then pieces() says where all that lies
    void replace(llama_seq_id seq_id, const llama_kv_cache_bounded::seq_state & seq, llama_pos n_window);

    // all that the parts hold of a sequence, in the order in which it is written
    std::vector<indexmem_state_piece> pieces(llama_seq_id seq_id) const;

    // before a ubatch of the bounded cache: the rebases that have to come first, of all parts; false with a message
    bool rebase(const llama_kv_cache_bounded::step & st);

    // before a ubatch: the rows of recurrent states that it reads and writes
    void begin_recurrent(const llama_ubatch & ubatch);

    // of a ubatch that has been computed, or was begun and has not
    void finish (const llama_kv_cache_bounded::step & st);
    void abandon(const llama_kv_cache_bounded::step & st);

private:
    void read(llama_io_read_i & io, llama_seq_id seq_id);

    const std::unique_ptr<llama_kv_cache_bounded> bounded;
    const std::unique_ptr<indexmem_window>        window;
    const std::unique_ptr<indexmem_recurrent>     recurrent;

    llama_context * lctx = nullptr; // known from the first batch on

    std::vector<uint32_t> n_latest; // [n_seq_max] tokens of the latest ubatch: of so many there are snapshots of the recurrent states
};

class llama_memory_mixed_context : public llama_memory_context_i {
public:
    // of errors and updates
    explicit llama_memory_mixed_context(llama_memory_status status) : status(status) {}

    // of a full cache
    explicit llama_memory_mixed_context(llama_memory_mixed * mem);

    // of a batch
    llama_memory_mixed_context(
            llama_memory_mixed * mem,
            std::vector<llama_kv_cache_bounded::step> steps,
            llama_kv_cache::slot_info_vec_t           slots,
            std::vector<llama_ubatch>                 ubatches);

    ~llama_memory_mixed_context() override;

    bool next()  override;
    bool apply() override;

    llama_memory_status  get_status() const override { return status; }
    const llama_ubatch & get_ubatch() const override { return ubatches[i_cur]; }

    const llama_kv_cache_bounded_context * get_bounded()   const { return bounded.get(); }
    const llama_kv_cache_context         * get_window()    const { return window.get(); }    // null if there is none
    const llama_memory_recurrent_context * get_recurrent() const { return recurrent.get(); } // likewise

    // indexmem_recurrent::get_bank: a graph writes to one of them
    uint32_t get_bank() const { return recurrent ? mem->get_recurrent()->get_bank() : 0; }

    void learn_window_rotation(int32_t il, const ggml_tensor * k_cur, const ggml_tensor * hadamard) const;

private:
    llama_memory_mixed * mem = nullptr;

    llama_memory_status status;

    size_t i_cur = 0;
    bool   begun = false; // the current ubatch

    std::vector<llama_ubatch> ubatches;

    std::unique_ptr<llama_kv_cache_bounded_context> bounded;
    std::unique_ptr<llama_kv_cache_context>         window;
    std::unique_ptr<llama_memory_recurrent_context> recurrent;
};

// the mixed memory behind a memory context, or null
const llama_memory_mixed_context * indexmem_mixed_context(const llama_memory_context_i * mctx);

// Of n drafts that follow the next token of a sequence in a batch, how many can be taken back exactly, whatever ubatches the
// batch is cut into: see indexmem_draft_room(), and if `copied` indexmem_draft_room_copied()
uint32_t indexmem_n_drafts(const llama_memory_i * memory, llama_seq_id seq_id, uint32_t n, bool copied);

// the bounded cache that a memory is or has, or null
llama_kv_cache_bounded * indexmem_bounded(llama_memory_i * memory);
const llama_kv_cache_bounded * indexmem_bounded(const llama_memory_i * memory);
