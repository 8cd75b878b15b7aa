#include "indexmem-kv-shares.h"

#include <set>

using counts = indexmem_kv_counts;

indexmem_layer_budgets indexmem_budgets_of(const counts::limits & lim, uint32_t n_ubatch, uint32_t n_latent,
        const std::vector<float> & shares, const std::vector<uint64_t> & row_bytes) {
    std::set<float> values;
    double   sum   = 0.0;
    uint64_t bytes = 0;
    for (size_t il = 0; il < shares.size(); ++il) {
        if (shares[il] > 0.0f) {
            values.insert(shares[il]);
            sum   += (double) shares[il]*row_bytes[il];
            bytes += row_bytes[il];
        }
    }
    indexmem_layer_budgets res;
    res.classes.assign(shares.size(), 0);
    const uint64_t n_least = counts::budget_min(lim.sinks, lim.pin, lim.window, n_latent); // protected, and room for one
    if (values.size() < 2 || values.size() > counts::N_CLASSES_MAX || lim.budget <= n_least) {
        return res;
    }
    for (size_t il = 0; il < shares.size(); ++il) {
        res.classes[il] = shares[il] > 0.0f ? (uint8_t) std::distance(values.begin(), values.find(shares[il])) : 0;
    }

    const uint32_t n_half = std::min(lim.span/2, lim.span - std::min(lim.span, n_ubatch)); // and a ubatch has to fit behind it
    const uint32_t n_most = lim.span > 0 ? std::max(lim.budget, n_half) : UINT32_MAX;
    const uint64_t n_may  = bytes*counts::geometry::slots_of(lim.budget - n_latent + n_ubatch, n_latent, false);

    // whether what is left of these shares takes no more, slots, which are padded, included
    const auto fits = [&](uint64_t mean) {
        res.budgets.clear();
        for (float share : values) {
            const double n = share*(bytes/sum)*(double) (mean - n_least + 1);
            res.budgets.push_back((uint32_t) std::min<double>(n_least - 1 + std::max(1.0, n), n_most));
        }
        uint64_t n_slots = 0;
        uint64_t n_held  = 0;
        for (size_t il = 0; il < shares.size(); ++il) {
            const uint32_t n = shares[il] > 0.0f ? res.budgets[res.classes[il]] : 0;
            n_held  += n*row_bytes[il];
            n_slots += n > 0 ? row_bytes[il]*counts::geometry::slots_of(n - n_latent + n_ubatch, n_latent, true) : 0;
        }
        return n_slots <= n_may && n_held <= bytes*lim.budget;
    };
    // The largest mean that fits. It may be above the budget: what wide layers cannot take, because of the span, the others get.
    uint64_t most = n_least, too_many = 64*(uint64_t) lim.budget;
    while (most + 1 < too_many) {
        const uint64_t mean = most + (too_many - most)/2;
        (fits(mean) ? most : too_many) = mean;
    }
    const bool differ = most > n_least && fits(most) && res.budgets.front() < res.budgets.back();
    if (!differ) {
        res.budgets.clear();
        res.classes.assign(shares.size(), 0);
    }
    return res;
}
