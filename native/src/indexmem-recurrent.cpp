#include "indexmem-recurrent.h"

#include "indexmem-window.h"

#include "llama-batch.h"
#include "llama-model.h"

#include <algorithm>

indexmem_recurrent::indexmem_recurrent(const llama_model & model, bool offload, uint32_t n_seq_max, uint32_t n_rs_seq, bool way_back,
        const llama_memory_recurrent::layer_filter_cb & filter) :
    n_seq_max(n_seq_max), n_pos(model.hparams.n_pos_per_embd()), way_back(way_back),
    memory(model, GGML_TYPE_F32, GGML_TYPE_F32, offload, n_seq_max*(way_back ? 2 : 1), n_seq_max, n_rs_seq, filter), before() {
}

bool indexmem_recurrent::prepare(const std::vector<llama_ubatch> & ubatches) {
    return way_back || memory.prepare(ubatches);
}

void indexmem_recurrent::put(llama_seq_id seq_id, uint32_t row, llama_pos pos) {
    if (tail(seq_id) >= 0) {
        auto & old = memory.cells[tail(seq_id)];
        old.seq_id.clear();
        old.pos = old.src = -1;
    }
    auto & cell = memory.cells[row];
    cell.pos    = pos;
    cell.src    = row;
    cell.seq_id = { seq_id };
    tail(seq_id) = row;
    memory.used = std::count_if(memory.cells.begin(), memory.cells.end(), [](const auto & c) { return !c.is_empty(); });
}

void indexmem_recurrent::move_aside(llama_seq_id seq_id) {
    const uint32_t old   = tail(seq_id);
    const uint32_t other = old < n_seq_max ? n_seq_max + seq_id : seq_id;
    for (int64_t i = 0; i <= memory.n_rs_seq; ++i) { // with its snapshots
        indexmem_state_set(row_at(i*memory.size + other), indexmem_state_get(row_at(i*memory.size + old)));
    }
    put(seq_id, other, memory.cells[old].pos);
}

uint32_t indexmem_recurrent::n_in(const llama_ubatch & ubatch, uint32_t bank) const {
    const llama_seq_id s0 = ubatch.seq_id_unq[0];
    uint32_t n = 0;
    for (llama_seq_id s = s0; s < s0 + (llama_seq_id) ubatch.n_seqs_unq; ++s) {
        n += tail(s) >= 0 && tail(s)/n_seq_max == bank;
    }
    return n;
}

bool indexmem_recurrent::moves(const llama_ubatch & ubatch) const {
    return way_back && n_in(ubatch, bank_of(ubatch)) > 0;
}

// Sequences that are always evaluated together lie in the same bank of rows and are written to the other. Those that come from
// elsewhere, the smaller part, are moved first.
void indexmem_recurrent::write_to_other_rows(const llama_ubatch & ubatch) {
    const llama_seq_id s0 = ubatch.seq_id_unq[0];
    const llama_seq_id s1 = s0 + ubatch.n_seqs_unq;

    const uint32_t bank = bank_of(ubatch);
    for (llama_seq_id s = s0; s < s1; ++s) {
        if (tail(s) >= 0 && tail(s)/n_seq_max == bank) {
            move_aside(s);
        }
    }
    before = { memory.cells, memory.rs_idx, memory.head, memory.used };

    memory.head = bank*n_seq_max + s0;
    memory.n    = s1 - s0;
    memory.rs_z = -1;
    for (llama_seq_id s = s0; s < s1; ++s) {
        const uint32_t row  = bank*n_seq_max + s;
        const int32_t  from = tail(s);
        if (from < 0) {
            memory.rs_z = memory.head; // is cleared, and read by all that begin
        }
        put(s, row, ubatch.pos[(s - s0 + 1)*ubatch.n_seq_tokens - 1]);
        memory.cells[row].src0 = from < 0 ? memory.head : from;
    }
}

void indexmem_recurrent::begin(const llama_ubatch & ubatch) {
    if (way_back) {
        write_to_other_rows(ubatch);
    } else {
        memory.find_slot(ubatch);
    }
}

void indexmem_recurrent::abandon() {
    if (way_back) {
        memory.cells  = before.cells;
        memory.rs_idx = before.rs_idx; // the graph has used up what was to be gone back
        memory.head   = before.head;
        memory.used   = before.used;
    }
}

bool indexmem_recurrent::touched(llama_seq_id seq_id) const {
    const int64_t row = memory.cells[seq_id].tail;
    return !way_back && row >= memory.head && row < memory.head + (int64_t) memory.n;
}

// llama.cpp lets both share a row until one of them goes on, and a snapshot that one goes back to, then or later, is no state of the other
void indexmem_recurrent::copy(llama_seq_id src, llama_seq_id dst, llama_pos n_seen) {
    memory.seq_rm(dst, -1, -1);
    if (tail(src) < 0) {
        return;
    }
    if (way_back || memory.n_rs_seq > 0) {
        const auto bytes = indexmem_state_get(row(src));
        indexmem_state_set(place(dst, n_seen), bytes);
    } else {
        memory.seq_cp(src, dst, -1, -1);
    }
}

// a copy that has not been evaluated yet has the state of its source
std::vector<indexmem_state_piece> indexmem_recurrent::row(llama_seq_id seq_id) const {
    const int32_t cell = memory.cells[seq_id].tail;
    GGML_ASSERT(cell >= 0);
    const int32_t src = memory.cells[cell].src;
    return row_at((int64_t) memory.rs_idx[seq_id]*memory.size + (src >= 0 ? src : cell));
}

std::vector<indexmem_state_piece> indexmem_recurrent::place(llama_seq_id seq_id, llama_pos n_seen) {
    memory.seq_rm(seq_id, -1, -1);
    if (way_back) {
        put(seq_id, seq_id, n_seen - 1);
    } else {
        llama_batch_allocr balloc(n_pos);
        GGML_ASSERT(memory.find_slot(indexmem_ubatch_of(balloc, seq_id, n_seen - 1, n_seen)));
        memory.cells[memory.head].src = memory.head; // its row is not to be cleared by the next ubatch
    }
    return row(seq_id);
}

std::vector<ggml_tensor *> indexmem_recurrent::tensors() const {
    std::vector<ggml_tensor *> res;
    for (size_t il = 0; il < memory.r_l.size(); ++il) {
        res.insert(res.end(), { memory.r_l[il], memory.s_l[il], memory.p_l[il] });
    }
    return res;
}

std::vector<indexmem_state_piece> indexmem_recurrent::row_at(int64_t row) const {
    std::vector<indexmem_state_piece> res;
    for (ggml_tensor * t : tensors()) {
        if (t && t->ne[0] > 0) {
            res.push_back({ t, row*t->nb[1], ggml_row_size(t->type, t->ne[0]) });
        }
    }
    return res;
}

size_t indexmem_recurrent::size_row() const {
    size_t res = 0;
    for (const auto & piece : row_at(0)) {
        res += piece.size;
    }
    return res;
}
