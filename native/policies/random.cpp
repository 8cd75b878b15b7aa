#include "policy.h"

// A fixed number in [0, 1) for each (seed, layer, head, position): the finaliser of SplitMix64.
static float hash01(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    x =  x ^ (x >> 31);
    return (float) (x >> 40) / 16777216.0f;
}

void indexmem_rank_random(const indexmem_rank_view & view, float * rank) {
    const uint64_t stream = (uint64_t) view.head + ((uint64_t) view.il << 12);
    for (int64_t i = 0; i < view.n; ++i) {
        const uint64_t index = 1 + (uint64_t) (uint32_t) view.pos[i] + (stream << 32);
        rank[i] = hash01(view.seed + 0x9E3779B97F4A7C15ull * index);
    }
}
