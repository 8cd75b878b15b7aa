#include "policy.h"

#include <cstring>

// Rank = position, as a float of the same order. (float) pos would do up to 2^24; beyond, neighbours would be equal, and of
// equals the later one leaves. So floats are counted: position 2^30 is the first positive one that is normal, the one before it
// the first negative one.
void indexmem_rank_streaming(indexmem_ranking & ranking) {
    ranking.each_chunk([](const indexmem_rank_chunk & c) {
        int32_t pos[INDEXMEM_RANK_CHUNK];
        c.positions(pos);
        for (int64_t i = 0; i < c.n; ++i) {
            const int32_t  from_middle = pos[i] - (1 << 30);
            const uint32_t bits = from_middle >= 0 ? 0x00800000u + (uint32_t) from_middle : 0x80800000u + (uint32_t) (-1 - from_middle);
            memcpy(c.rank + i, &bits, sizeof(bits));
        }
    });
}
