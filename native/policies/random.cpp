#include "policy.h"

// A fixed number in [0, 1) for each (seed, layer, head, position): the finaliser of SplitMix64.
static float hash01(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    x =  x ^ (x >> 31);
    return (float) (x >> 40) / 16777216.0f;
}

void indexmem_rank_random(indexmem_ranking & ranking) {
    const auto & shape = ranking.shape();

    ranking.each_chunk([&](const indexmem_rank_chunk & c) {
        const uint64_t stream = (uint64_t) c.head.head + ((uint64_t) shape.il << 12);
        int32_t pos[INDEXMEM_RANK_CHUNK];
        c.positions(pos);
        for (int64_t i = 0; i < c.n; ++i) {
            const uint64_t index = 1 + (uint64_t) (uint32_t) pos[i] + (stream << 32);
            c.rank[i] = hash01(shape.seed + 0x9E3779B97F4A7C15ull * index);
        }
    });
}
