#pragma once

#include "indexmem-kv-counts.h"

#include <cstdint>
#include <vector>

//
// Budgets that differ by layer
//
// In some layers one head more or less decides whether a fact of long ago is found, in others hardly anything is lost with most of
// the entries. A sidecar can say so: of each layer the share that it gets of the budget, and how many entries it gets before any is
// shared. A share counts for budgets of every size; what a layer cannot do without is a number, which in a large budget is nothing
// special. Layers of equal needs are a class, and have one budget.
//
// Invariants
//   - what is protected in one layer is protected in all: needs are of the rest of the budget
//   - a small budget is not spent on few layers: what one gets first is at most LEAST_MOST times what layers have on average, and what
//     all get first at most half of what there is
//   - all layers together have no more entries, and take no more bytes for slots, than with the same budget each
//   - no budget takes more than half of a span, unless all would
//
struct indexmem_layer_need {
    float    share; // above 0; 0: there is no such cache in the layer
    uint32_t least; // entries beside what is protected; 0: none before the rest is shared

    bool operator<(const indexmem_layer_need & other) const {
        return share != other.share ? share < other.share : least < other.least;
    }
};

struct indexmem_layer_budgets {
    static constexpr uint32_t LEAST_MOST = 5;

    std::vector<uint32_t> budgets; // of each class, ascending; empty: all layers have the same
    std::vector<uint8_t>  classes; // [n_layer], 0 of layers without a share
};

// needs: no more different ones than there can be classes
// row_bytes: what an entry takes in each layer
indexmem_layer_budgets indexmem_budgets_of(const indexmem_kv_counts::limits & lim, uint32_t n_ubatch, uint32_t n_latent,
        const std::vector<indexmem_layer_need> & needs, const std::vector<uint64_t> & row_bytes);
