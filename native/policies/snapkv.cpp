#include "policy.h"

#include <algorithm>

// The entries in the order of their positions: sorted by groups of bits, from the lowest on. `other` is used on the way.
static void sort_by_position(const indexmem_rank_head & h, int32_t * order, int32_t * other) {
    constexpr int      BITS = 11;
    constexpr uint32_t MASK = (1u << BITS) - 1;

    int32_t first = h.position(0);
    int32_t last  = first;
    for (int64_t i = 1; i < h.n; ++i) {
        first = std::min(first, h.position(i));
        last  = std::max(last,  h.position(i));
    }
    int n_passes = 1;
    while ((int64_t) (last - first) >> n_passes*BITS) {
        ++n_passes;
    }
    for (int pass = 0; pass < n_passes; ++pass) {
        const bool      to_order = (n_passes - pass) % 2 == 1;
        int32_t       * dst = to_order ? order : other;
        const int32_t * src = to_order ? other : order; // not read in the first pass

        const auto digit = [&](int32_t i) { return (uint32_t) (h.position(i) - first) >> pass*BITS & MASK; };

        int32_t place[MASK + 2] = {};
        for (int64_t i = 0; i < h.n; ++i) {
            ++place[digit((int32_t) i) + 1];
        }
        for (uint32_t d = 1; d <= MASK; ++d) {
            place[d] += place[d - 1];
        }
        for (int64_t i = 0; i < h.n; ++i) {
            const int32_t entry = pass > 0 ? src[i] : (int32_t) i;
            dst[place[digit(entry)]++] = entry;
        }
    }
}

// Rank = attention received from the last queries, mean over queries and the group, then smoothed: the mean over the
// entry and its three neighbours on each side in position order (fewer at the ends).
void indexmem_rank_snapkv(indexmem_ranking & ranking) {
    constexpr int64_t REACH = 3;

    const size_t n_attention = indexmem_rank_attention_scratch(ranking.shape());
    const auto order_of  = [&](const indexmem_rank_head & h) { return (int32_t *) (h.scratch + n_attention); };
    const auto sorted_of = [&](const indexmem_rank_head & h) { return h.scratch + n_attention + ranking.shape().n_slots; };

    indexmem_rank_attention(ranking, [&](const indexmem_rank_head & h) { sort_by_position(h, order_of(h), (int32_t *) sorted_of(h)); });

    // from here on chunks are of places in that order
    ranking.each_chunk([&](const indexmem_rank_chunk & c) {
        for (int64_t i = c.i0; i < c.i0 + c.n; ++i) {
            sorted_of(c.head)[i] = c.head.rank[order_of(c.head)[i]];
        }
    });
    ranking.each_chunk([&](const indexmem_rank_chunk & c) {
        const float * sorted = sorted_of(c.head);
        for (int64_t i = c.i0; i < c.i0 + c.n; ++i) {
            const int64_t lo = std::max<int64_t>(0,               i - REACH);
            const int64_t hi = std::min<int64_t>(c.head.n - 1,    i + REACH);
            float sum = 0.0f;
            for (int64_t j = lo; j <= hi; ++j) {
                sum += sorted[j];
            }
            c.head.rank[order_of(c.head)[i]] = sum/(float) (hi - lo + 1);
        }
    });
}
