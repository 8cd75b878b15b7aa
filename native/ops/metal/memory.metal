#include "common.metal"

// What leaves is written into a latent memory, by one group for each KV head and sequence: grid [1, H, S].
//   src: the memory (= dst) | count or phi | keys | values | plan | ctl

// shared: [SIMD] numbers, [THREADS] entries; [n_evict_max] latent slot of each entry, [n_evict_max] rate of each
INDEXMEM_KERNEL(centroid) {
    device const indexmem_metal_ctl & c = ctl_of(src5, args.src[5], tgpig.z);
    device const int * evicted = (device const int *) at2(src4, args.src[4], tgpig.y, tgpig.z);
    const int n_evict = n_leaving(evicted, c, args.src[4].ne[0]);
    if (n_evict == 0) {
        return;
    }
    const int n_embd_k = args.src[2].ne[0];
    const int n_embd   = args.dst.ne[0];
    const int n_latent = args.dst.ne[1];

    device       char  * means   = at2(dst, args.dst, tgpig.y, tgpig.z);
    device       float * count   = (device float *) at1(src1, args.src[1], tgpig.y, tgpig.z);
    device       char  * keys    = at2(src2, args.src[2], tgpig.y, tgpig.z);
    device       char  * values  = at2(src3, args.src[3], tgpig.y, tgpig.z);

    threadgroup uint  * work    = (threadgroup uint  *) shared;
    threadgroup int   * fill    = (threadgroup int   *) (work + SIMD);
    threadgroup int   * slot_of = fill + THREADS;
    threadgroup float * rate_of = (threadgroup float *) (slot_of + args.src[4].ne[0]);

    // component d of entry i, keys first
#define INDEXMEM_COMPONENT(i, d) ((d) < n_embd_k ? key_at(keys + evicted[i]*args.src[2].nb[1], d) \
                                                 : entry_at(values + evicted[i]*args.src[3].nb[1], (d) - n_embd_k))

    // the first entries fill the empty slots, in blocks of THREADS slots
    int n_filled = 0;
    for (int r0 = 0; r0 < n_latent && n_filled < n_evict; r0 += THREADS) {
        const int  r     = r0 + (int) tiitg;
        const bool empty = r < n_latent && count[r] == 0.0f;
        uint n_empty;
        const int entry = n_filled + (int) group_scan(empty ? 1u : 0u, tiisg, sgitg, work, n_empty);
        const bool takes = empty && entry < n_evict;
        fill[tiitg] = takes ? entry : -1;
        if (takes) {
            count[r] = 1.0f;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (int j = sgitg; j < min(n_latent - r0, THREADS); j += SIMD) {
            if (fill[j] < 0) {
                continue;
            }
            device float * mean = (device float *) (means + (r0 + j)*args.dst.nb[1]);
            for (int d = tiisg; d < n_embd; d += WIDTH) {
                mean[d] = INDEXMEM_COMPONENT(fill[j], d);
            }
        }
        n_filled = min(n_evict, n_filled + (int) n_empty);
    }
    threadgroup_barrier(mem_flags::mem_device);

    // Each of the others goes to the nearest mean: a simdgroup for each, its lanes share the means. Of equals it is the first
    // of a lane, and then of all lanes.
    for (int i = n_filled + (int) sgitg; i < n_evict; i += SIMD) {
        device const char * k = keys + evicted[i]*args.src[2].nb[1];
        float best = 3.4e38f;
        int   slot = n_latent; // this lane has seen no mean
        for (int r = tiisg; r < n_latent; r += WIDTH) {
            device const float * mean = (device const float *) (means + r*args.dst.nb[1]);
            float distance = 0.0f;
            for (int d = 0; d < n_embd_k; ++d) {
                const float x = key_at(k, d) - mean[d];
                distance += x*x;
            }
            if (distance < best) {
                best = distance;
                slot = r;
            }
        }
        const float least = simd_min(best);
        slot = simd_min(best == least ? slot : n_latent);
        if (tiisg == 0) {
            slot_of[i] = slot < n_latent ? slot : 0; // no smallest one: distances are NaN
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    if (tiitg == 0) {
        for (int i = n_filled; i < n_evict; ++i) {
            count[slot_of[i]] += 1.0f;
            rate_of[i] = 1.0f/count[slot_of[i]];
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // in the order of the plan, each component by itself
    for (int d = tiitg; d < n_embd; d += THREADS) {
        for (int i = n_filled; i < n_evict; ++i) {
            device float * mean = (device float *) (means + slot_of[i]*args.dst.nb[1]);
            mean[d] += (INDEXMEM_COMPONENT(i, d) - mean[d])*rate_of[i];
        }
    }
#undef INDEXMEM_COMPONENT
}

// A few entries at a time: their features, then what they add to each element of the state. shared: [entries][n_feature]
INDEXMEM_KERNEL(residual) {
    device const indexmem_metal_ctl & c = ctl_of(src5, args.src[5], tgpig.z);
    device const int * evicted = (device const int *) at2(src4, args.src[4], tgpig.y, tgpig.z);
    const int n_evict = n_leaving(evicted, c, args.src[4].ne[0]);

    const int n_embd_k  = args.src[2].ne[0];
    const int n_embd_v  = args.src[3].ne[0];
    const int n_feature = args.dst.ne[0];

    device       char * state   = at2(dst,  args.dst,    tgpig.y, tgpig.z);
    device       char * keys    = at2(src2, args.src[2], tgpig.y, tgpig.z);
    device       char * values  = at2(src3, args.src[3], tgpig.y, tgpig.z);

    threadgroup float * features = (threadgroup float *) shared;

    for (int i0 = 0; i0 < n_evict; i0 += INDEXMEM_METAL_FEATURED) {
        const int n = min(n_evict - i0, INDEXMEM_METAL_FEATURED);

        for (int j = tiitg; j < n*n_feature; j += THREADS) {
            device const float * phi = (device const float *) (src1 + (j % n_feature)*args.src[1].nb[1]);
            device const char  * k   = keys + evicted[i0 + j/n_feature]*args.src[2].nb[1];
            float f = 0.0f;
            for (int d = 0; d < n_embd_k; ++d) {
                f += phi[d]*key_at(k, d);
            }
            features[j] = f;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);

        for (int d = sgitg; d <= n_embd_v; d += SIMD) {
            device float * s = (device float *) (state + d*args.dst.nb[1]);
            for (int j = tiisg; j < n_feature; j += WIDTH) {
                float sum = i0 == 0 ? args.decay*s[j] : s[j];
                for (int i = 0; i < n; ++i) {
                    const float f = features[i*n_feature + j];
                    const float v = d < n_embd_v ? entry_at(values + evicted[i0 + i]*args.src[3].nb[1], d) : f;
                    sum += f*(args.rate*v);
                }
                s[j] = sum;
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup); // features are free again
    }
}

// The mask of each KV head: grid [T, 1, H*S].  src: mask | count
INDEXMEM_KERNEL(bias) {
    const uint n_head = args.src[1].ne[1];

    device const ushort * mask  = (device const ushort *) (src0 + tgpig.x*args.src[0].nb[1] + tgpig.z/n_head*args.src[0].nb[3]);
    device       ushort * res   = (device       ushort *) (dst  + tgpig.x*args.dst.nb[1]    + tgpig.z*args.dst.nb[3]);
    device const float  * count = (device const float  *) at1(src1, args.src[1], tgpig.z % n_head, tgpig.z/n_head);

    constexpr ushort hidden = 0xFC00; // -inf
    for (int i = tiitg; i < args.dst.ne[0]; i += THREADS) {
        ushort m = mask[i];
        if (i < args.src[1].ne[0] && m != hidden) {
            m = count[i] == 0.0f ? hidden : as_type<ushort>((half) ((float) as_type<half>(m) + precise::log(count[i])));
        }
        res[i] = m;
    }
}
