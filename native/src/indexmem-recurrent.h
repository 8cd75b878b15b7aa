#pragma once

#include "indexmem-state.h"

#include "llama-memory-recurrent.h"

#include <vector>

//
// The states of recurrent layers
//
// llama.cpp's own, which a ubatch overwrites in place. Here is what a bounded cache beside them asks of them, and a way back:
// with two rows for a sequence a ubatch reads one and writes the other, so one that is stopped has not happened.
//
// Invariants, with a way back
//   - sequence s lies in row s or in row n_seq_max + s, and no two sequences share a row
//   - the rows that a ubatch writes hold the state of no sequence
//
class indexmem_recurrent {
public:
    indexmem_recurrent(const llama_model & model, bool offload, uint32_t n_seq_max, uint32_t n_rs_seq, bool way_back,
            const llama_memory_recurrent::layer_filter_cb & filter);

    llama_memory_recurrent & get() { return memory; }

    const llama_memory_recurrent & get() const { return memory; }

    bool has_way_back() const { return way_back; }

    // which of their two rows the sequences of the latest ubatch were written to
    uint32_t get_bank() const { return way_back ? memory.head/n_seq_max : 0; }

    // whether there is room for them; changes nothing
    bool prepare(const std::vector<llama_ubatch> & ubatches);

    // whether begin() moves states aside for a ubatch, for which the device has to be idle
    bool moves(const llama_ubatch & ubatch) const;

    // the rows of a ubatch; abandon() makes all as it was before this, if there is a way back
    void begin(const llama_ubatch & ubatch);
    void abandon();

    // whether the latest ubatch may have written where the state of a sequence lies
    bool touched(llama_seq_id seq_id) const;

    // The state of a sequence becomes that of another, which has seen n tokens. The device is idle.
    void copy(llama_seq_id src, llama_seq_id dst, llama_pos n_seen);

    // the state of a sequence: a row of each tensor
    std::vector<indexmem_state_piece> row(llama_seq_id seq_id) const;

    // an empty one for a sequence that has seen n tokens
    std::vector<indexmem_state_piece> place(llama_seq_id seq_id, llama_pos n_seen);

    // bytes of one state
    size_t size_row() const;

    // of each layer, some of them null
    std::vector<ggml_tensor *> tensors() const;

private:
    // what llama.cpp knows of its rows
    struct table {
        std::vector<llama_memory_recurrent::mem_cell> cells;
        std::vector<uint32_t> rs_idx;
        uint32_t head, used;
    };

    std::vector<indexmem_state_piece> row_at(int64_t row) const;

    int32_t & tail(llama_seq_id seq_id) { return memory.cells[seq_id].tail; }
    int32_t   tail(llama_seq_id seq_id) const { return memory.cells[seq_id].tail; }

    // how many sequences of a ubatch lie in a bank
    uint32_t n_in(const llama_ubatch & ubatch, uint32_t bank) const;

    // the bank that a ubatch is written to
    uint32_t bank_of(const llama_ubatch & ubatch) const { return n_in(ubatch, 0) <= n_in(ubatch, 1) ? 0 : 1; }

    // a sequence lies in a row from now on; where it lay before is free
    void put(llama_seq_id seq_id, uint32_t row, llama_pos pos);

    // moves the state of a sequence to its other row
    void move_aside(llama_seq_id seq_id);

    void write_to_other_rows(const llama_ubatch & ubatch);

    const uint32_t n_seq_max;
    const uint32_t n_pos; // numbers that a position has
    const bool     way_back;

    llama_memory_recurrent memory;

    table before; // the latest ubatch
};
