#include "common.metal"

// Ranks that need nothing but the entry itself, and keydiff. Grid [entries/THREADS, H, S], a thread for each entry; with
// keys [entries/SIMD, H, S], a simdgroup for each; keydiff [1, H, S].
//   src: keys or terms | pos | ctl

namespace indexmem {

// a float for each position, in their order: see native/policies/streaming.cpp
inline float ordered(int pos) {
    const int from_middle = pos - (1 << 30);
    return as_type<float>(from_middle >= 0 ? 0x00800000u + (uint) from_middle : 0x80800000u + (uint) (-1 - from_middle));
}

// the finaliser of SplitMix64, as a number in [0, 1)
inline float hash01(ulong x) {
    x = (x ^ (x >> 30))*0xBF58476D1CE4E5B9ul;
    x = (x ^ (x >> 27))*0x94D049BB133111EBul;
    x =  x ^ (x >> 31);
    return (float) (uint) (x >> 40)*(1.0f/16777216.0f);
}

} // namespace indexmem

#define INDEXMEM_RANK_OF_POSITION(name, rank_of_pos)                                                \
    INDEXMEM_KERNEL(rank_##name) {                                                                  \
        device const indexmem_metal_ctl & c = ctl_of(src2, args.src[2], tgpig.z);                   \
        const int i = tgpig.x*THREADS + tiitg;                                                      \
        if (c.n_evict == 0 || i >= c.n_used) {                                                      \
            return;                                                                                 \
        }                                                                                           \
        device const int * pos_row = (device const int *) at1(src1, args.src[1], tgpig.y, tgpig.z); \
        const int pos = pos_at(pos_row, c, i);                                                      \
        ((device float *) at1(dst, args.dst, tgpig.y, tgpig.z))[i] = rank_of_pos;                   \
    }

INDEXMEM_RANK_OF_POSITION(full,      ((void) pos, 0.0f))
INDEXMEM_RANK_OF_POSITION(streaming, ordered(pos))
INDEXMEM_RANK_OF_POSITION(random,    hash01(args.seed + 0x9E3779B97F4A7C15ul*
        (1 + (ulong) (uint) pos + (((ulong) tgpig.y + ((ulong) args.il << 12)) << 32))))

INDEXMEM_KERNEL(rank_indexer) {
    device const indexmem_metal_ctl & c = ctl_of(src2, args.src[2], tgpig.z);
    const int i = tgpig.x*THREADS + tiitg;
    if (c.n_evict == 0 || i >= c.n_used) {
        return;
    }
    device const int   * pos_row = (device const int   *) at1(src1, args.src[1], tgpig.y, tgpig.z);
    device const float * term    = (device const float *) (at2(src0, args.src[0], tgpig.y % args.src[0].ne[2], tgpig.z)
            + i*args.src[0].nb[1]);

    const int pos = pos_at(pos_row, c, i);
    float rank = term[0] + args.pos_slope*(float) pos;
    if (args.src[0].ne[0] > 1) {
        rank += term[1]*((float) (c.pos_last - pos)/args.age_scale);
    }
    ((device float *) at1(dst, args.dst, tgpig.y, tgpig.z))[i] = rank;
}

INDEXMEM_KERNEL(rank_knorm) {
    device const indexmem_metal_ctl & c = ctl_of(src2, args.src[2], tgpig.z);
    const int i = tgpig.x*SIMD + sgitg;
    if (c.n_evict == 0 || i >= c.n_used) {
        return;
    }
    device const char * k = at2(src0, args.src[0], tgpig.y, tgpig.z) + i*args.src[0].nb[1];

    float sum = 0.0f;
    for (int d = tiisg; d < args.src[0].ne[0]; d += WIDTH) {
        const float x = key_at(k, d);
        sum += x*x;
    }
    sum = simd_sum(sum);
    if (tiisg == 0) {
        ((device float *) at1(dst, args.dst, tgpig.y, tgpig.z))[i] = -precise::sqrt(sum);
    }
}

// The cosine does not depend on the length of the mean key: the sum serves as well. Each simdgroup adds up its own entries,
// then the sums are added in order. shared: [SIMD][n_embd] floats
INDEXMEM_KERNEL(rank_keydiff) {
    device const indexmem_metal_ctl & c = ctl_of(src2, args.src[2], tgpig.z);
    if (c.n_evict == 0) {
        return;
    }
    const int n_embd = args.src[0].ne[0];
    device char * keys = at2(src0, args.src[0], tgpig.y, tgpig.z);

    threadgroup float * sums = (threadgroup float *) shared;
    threadgroup float * sum  = sums + sgitg*n_embd;
    for (int d = tiisg; d < n_embd; d += WIDTH) {
        sum[d] = 0.0f;
    }
    for (int i = sgitg; i < c.n_used; i += SIMD) {
        device const char * k = keys + i*args.src[0].nb[1];
        float norm = 0.0f;
        for (int d = tiisg; d < n_embd; d += WIDTH) {
            const float x = key_at(k, d);
            norm += x*x;
        }
        norm = precise::sqrt(simd_sum(norm));
        if (norm > 0.0f) {
            for (int d = tiisg; d < n_embd; d += WIDTH) {
                sum[d] += key_at(k, d)/norm;
            }
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int d = tiitg; d < n_embd; d += THREADS) {
        float all = sums[d];
        for (int j = 1; j < SIMD; ++j) {
            all += sums[j*n_embd + d];
        }
        sums[d] = all;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    float norm_sum = 0.0f;
    for (int d = tiisg; d < n_embd; d += WIDTH) {
        norm_sum += sums[d]*sums[d];
    }
    norm_sum = precise::sqrt(simd_sum(norm_sum));

    device float * rank = (device float *) at1(dst, args.dst, tgpig.y, tgpig.z);
    for (int i = sgitg; i < c.n_used; i += SIMD) {
        device const char * k = keys + i*args.src[0].nb[1];
        float norm = 0.0f;
        float dot  = 0.0f;
        for (int d = tiisg; d < n_embd; d += WIDTH) {
            const float x = key_at(k, d);
            norm += x*x;
            dot  += x*sums[d];
        }
        const float len = precise::sqrt(simd_sum(norm))*norm_sum;
        dot = simd_sum(dot);
        if (tiisg == 0) {
            rank[i] = len > 0.0f ? -dot/len : 0.0f;
        }
    }
}
