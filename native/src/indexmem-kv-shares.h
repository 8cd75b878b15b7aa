#pragma once

#include "indexmem-kv-counts.h"

#include <cstdint>
#include <vector>

//
// Budgets that differ by layer and by KV head
//
// In some heads one entry more or less decides whether a fact of long ago is found, in others hardly anything is lost with most of
// the entries. A sidecar can say so, of each layer or of each head: the share that it gets of the budget, and how many entries it gets
// before any is shared. A share counts for budgets of every size; what a head cannot do without is a number, which in a large budget is
// nothing special. Neighbouring heads of a layer with equal needs are a slice of it, which is kept as a layer of its own. Slices of equal
// needs are a class, and have one budget.
//
// Invariants
//   - what is protected in one head is protected in all: needs are of the rest of the budget
//   - a small budget is not spent on few heads: what one gets first is at most LEAST_MOST times what heads have on average, and what
//     all get first at most half of what there is
//   - all slices together have no more entries, and take no more bytes for slots, than with the same budget each
//   - no budget takes more than half of a span, unless all would
//   - which slices there are follows from the needs alone, whatever the budget is
//
struct indexmem_need {
    float    share; // above 0
    uint32_t least; // entries beside what is protected; 0: none before the rest is shared

    bool operator<(const indexmem_need & other) const {
        return share != other.share ? share < other.share : least < other.least;
    }
    bool operator==(const indexmem_need & other) const { return share == other.share && least == other.least; }
};

// KV heads [head, head + n_head) of a layer
struct indexmem_slice {
    uint32_t il;
    uint32_t head;
    uint32_t n_head;
    uint32_t cls = 0; // of its budget
};

struct indexmem_budgets {
    static constexpr uint32_t LEAST_MOST = 5;

    std::vector<uint32_t> budgets; // of each class, ascending; empty: all slices have the same
    std::vector<uint8_t>  classes; // of each slice
};

// The slices of a layer: needs are those of its heads.
std::vector<indexmem_slice> indexmem_slices_of(uint32_t il, const indexmem_need * needs, uint32_t n_head);

// needs: of each slice, no more different ones than there can be classes
// row_bytes: what an entry takes in each slice, all heads together
indexmem_budgets indexmem_budgets_of(const indexmem_kv_counts::limits & lim, uint32_t n_ubatch, uint32_t n_latent,
        const std::vector<indexmem_need> & needs, const std::vector<uint64_t> & row_bytes);
