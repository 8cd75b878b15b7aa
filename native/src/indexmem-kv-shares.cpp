#include "indexmem-kv-shares.h"

#include <map>
#include <set>

using counts = indexmem_kv_counts;

std::vector<indexmem_slice> indexmem_slices_of(uint32_t il, const indexmem_need * needs, uint32_t n_head) {
    std::vector<indexmem_slice> res;
    for (uint32_t h = 0; h < n_head; ++h) {
        if (h > 0 && needs[h] == needs[h - 1]) {
            res.back().n_head++;
        } else {
            res.push_back({ il, h, 1 });
        }
    }
    return res;
}

indexmem_budgets indexmem_budgets_of(const counts::limits & lim, uint32_t n_ubatch, uint32_t n_latent,
        const std::vector<indexmem_need> & needs, const std::vector<uint64_t> & row_bytes) {
    std::map<indexmem_need, uint32_t> budgets; // of slices with equal needs
    double   sum   = 0.0;
    uint64_t bytes = 0;
    for (size_t i = 0; i < needs.size(); ++i) {
        budgets[needs[i]] = 0;
        sum   += (double) needs[i].share*row_bytes[i];
        bytes += row_bytes[i];
    }
    const indexmem_budgets equal = { {}, std::vector<uint8_t>(needs.size(), 0) };
    const uint64_t n_least = counts::budget_min(lim.sinks, lim.pin, lim.window, n_latent); // protected, and room for one
    if (budgets.size() < 2 || budgets.size() > counts::N_CLASSES_MAX || lim.budget <= n_least) {
        return equal;
    }

    const uint32_t n_half = std::min(lim.span/2, lim.span - std::min(lim.span, n_ubatch)); // and a ubatch has to fit behind it
    const uint32_t n_most = lim.span > 0 ? std::max(lim.budget, n_half) : UINT32_MAX;
    const uint64_t n_may  = bytes*counts::geometry::slots_of(lim.budget - n_latent + n_ubatch, n_latent, false);

    const double n_mean = (double) (lim.budget - n_least + 1);
    const auto first = [&](const indexmem_need & need) {
        return std::min<double>(need.least, indexmem_budgets::LEAST_MOST*n_mean);
    };
    double n_first = 0.0;
    for (size_t i = 0; i < needs.size(); ++i) {
        n_first += first(needs[i])*row_bytes[i];
    }
    const double scale = std::min(1.0, 0.5*n_mean*bytes/std::max(n_first, 1.0));

    // whether what is left of these needs takes no more, slots, which are padded, included
    const auto fits = [&](uint64_t mean) {
        for (auto & [need, budget] : budgets) {
            const double n = std::max(need.share*(bytes/sum)*(double) (mean - n_least + 1), scale*first(need));
            budget = (uint32_t) std::min<double>(n_least - 1 + std::max(1.0, n), n_most);
        }
        uint64_t n_slots = 0;
        uint64_t n_held  = 0;
        for (size_t i = 0; i < needs.size(); ++i) {
            const uint32_t n = budgets.at(needs[i]);
            n_held  += n*row_bytes[i];
            n_slots += row_bytes[i]*counts::geometry::slots_of(n - n_latent + n_ubatch, n_latent, true);
        }
        return n_slots <= n_may && n_held <= bytes*lim.budget;
    };
    // The largest mean that fits. It may be above the budget: what wide slices cannot take, because of the span, the others get.
    uint64_t most = n_least, too_many = 64*(uint64_t) lim.budget;
    while (most + 1 < too_many) {
        const uint64_t mean = most + (too_many - most)/2;
        (fits(mean) ? most : too_many) = mean;
    }
    if (most == n_least || !fits(most)) {
        return equal;
    }
    std::set<std::pair<uint32_t, indexmem_need>> classes; // ascending
    for (const auto & [need, budget] : budgets) {
        classes.insert({ budget, need });
    }
    if (classes.begin()->first == classes.rbegin()->first) {
        return equal;
    }
    indexmem_budgets res = equal;
    for (const auto & [budget, need] : classes) {
        for (size_t i = 0; i < needs.size(); ++i) {
            if (needs[i] == need) {
                res.classes[i] = (uint8_t) res.budgets.size();
            }
        }
        res.budgets.push_back(budget);
    }
    return res;
}
