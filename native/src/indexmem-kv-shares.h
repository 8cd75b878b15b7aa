#pragma once

#include "indexmem-kv-counts.h"

#include <cstdint>
#include <vector>

//
// Budgets that differ by layer
//
// In some layers one head more or less decides whether a fact of long ago is found, in others hardly anything is lost with most of
// the entries. A sidecar can say so: of each layer the share that it gets of the budget. Layers of equal shares are a class, and
// have one budget.
//
// Invariants
//   - what is protected in one layer is protected in all: shares are of the rest of the budget
//   - all layers together have no more entries, and take no more bytes for slots, than with the same budget each
//   - no budget takes more than half of a span, unless all would
//
struct indexmem_layer_budgets {
    std::vector<uint32_t> budgets; // of each class, ascending; empty: all layers have the same
    std::vector<uint8_t>  classes; // [n_layer], 0 of layers without a share
};

// shares: above 0, of the layers that the cache is for, of the others 0; no more values than there can be classes
// row_bytes: what an entry takes in each layer
indexmem_layer_budgets indexmem_budgets_of(const indexmem_kv_counts::limits & lim, uint32_t n_ubatch, uint32_t n_latent,
        const std::vector<float> & shares, const std::vector<uint64_t> & row_bytes);
