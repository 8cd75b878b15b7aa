#include "common.metal"

// Ranks from the attention of the latest queries: tova, snapkv. Three kernels, one after the other:
//   attention_sum    [G*n_queries, H, S]  largest logit and sum of exponentials of each query, into scratch
//   attention_mean   [entries/SIMD, H, S] what each entry receives, mean over the queries
//   attention_smooth [1, H, S]            snapkv: mean over the neighbours by position
// and from the mean of such queries, by one kernel: expected
//   attention_expected [entries/SIMD, H, S]
//   src: keys | pos | ctl | queries | sinks, if there are any
//   scratch of (KV head, sequence): [G*n_queries] pairs | smoothed: [n_slots] means | [n_slots] entries by position

namespace indexmem {

// the latest queries: positions from first on
struct query_range {
    int first;
    int n;
};

inline query_range latest_queries(device const indexmem_metal_ctl & c, int n_queries) {
    const int first = max(0, c.pos_last + 1 - n_queries);
    return { first, c.pos_last + 1 - first };
}

inline device const float * query_of(constant indexmem_metal_args & args, device char * queries, uint h, uint s, int g, int p) {
    const uint n_group = args.src[3].ne[2]/args.src[0].ne[2];
    return (device const float *) (at2(queries, args.src[3], h*n_group + g, s) + (p % args.src[3].ne[1])*args.src[3].nb[1]);
}

inline float logit_of(constant indexmem_metal_args & args, device const float * q, device const char * k, uint lane) {
    const float logit = args.scale*dot_key(q, k, args.src[0].ne[0], lane);
    return args.softcap != 0.0f ? args.softcap*precise::tanh(logit/args.softcap) : logit;
}

inline device float * scratch_of(constant indexmem_metal_args & args, device float * scratch, uint h, uint s) {
    return scratch + ((ulong) s*args.src[0].ne[2] + h)*args.scratch_row;
}

} // namespace indexmem

// shared: [SIMD] largest logits, [SIMD] sums
INDEXMEM_KERNEL(attention_sum) {
    device const indexmem_metal_ctl & c = ctl_of(src2, args.src[2], tgpig.z);
    const query_range latest = latest_queries(c, args.n_queries);
    const int g = tgpig.x/args.n_queries;
    const int p = latest.first + (int) (tgpig.x % args.n_queries);
    if (c.n_evict == 0 || p > c.pos_last) {
        return;
    }
    device const float * q    = query_of(args, src3, tgpig.y, tgpig.z, g, p);
    device const int   * pos  = (device const int *) at1(src1, args.src[1], tgpig.y, tgpig.z);
    device const char  * keys = at2(src0, args.src[0], tgpig.y, tgpig.z);

    float top = 0.0f;
    float sum = 0.0f; // 0: nothing seen yet
    for (int i = sgitg; i < c.n_used; i += SIMD) {
        if (pos_at(pos, c, i) > p) {
            continue;
        }
        const float logit = logit_of(args, q, keys + i*args.src[0].nb[1], tiisg);
        if (sum == 0.0f || logit > top) {
            sum = sum == 0.0f ? 1.0f : sum*precise::exp(top - logit) + 1.0f;
            top = logit;
        } else {
            sum += precise::exp(logit - top);
        }
    }
    threadgroup float * tops = (threadgroup float *) shared;
    threadgroup float * sums = tops + SIMD;
    if (tiisg == 0) {
        tops[sgitg] = top;
        sums[sgitg] = sum;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (tiitg == 0) {
        for (int j = 1; j < SIMD; ++j) {
            if (sums[j] == 0.0f) {
                continue;
            }
            if (sum == 0.0f) { // its top is none
                sum = sums[j];
                top = tops[j];
                continue;
            }
            const float most = max(top, tops[j]);
            sum = sum*precise::exp(top - most) + sums[j]*precise::exp(tops[j] - most);
            top = most;
        }
        if (args.src[4].ne[0] > 0) { // a sink takes part, and gets nothing
            const uint n_group = args.src[3].ne[2]/args.src[0].ne[2];
            const float sink = ((device const float *) src4)[tgpig.y*n_group + g];
            const float most = max(top, sink);
            sum = sum*precise::exp(top - most) + precise::exp(sink - most);
            top = most;
        }
        device float * res = scratch_of(args, scratch, tgpig.y, tgpig.z) + 2*tgpig.x;
        res[0] = top;
        res[1] = sum;
    }
}

INDEXMEM_KERNEL(attention_mean) {
    device const indexmem_metal_ctl & c = ctl_of(src2, args.src[2], tgpig.z);
    const int i = tgpig.x*SIMD + sgitg;
    if (c.n_evict == 0 || i >= c.n_used) {
        return;
    }
    const query_range latest = latest_queries(c, args.n_queries);
    const int n_group = args.src[3].ne[2]/args.src[0].ne[2];
    const int pos     = pos_at((device const int *) at1(src1, args.src[1], tgpig.y, tgpig.z), c, i);

    device const char  * k    = at2(src0, args.src[0], tgpig.y, tgpig.z) + i*args.src[0].nb[1];
    device       float * sums = scratch_of(args, scratch, tgpig.y, tgpig.z);

    float total = 0.0f;
    for (int g = 0; g < n_group; ++g) {
        for (int j = max(0, pos - latest.first); j < latest.n; ++j) {
            device const float * q   = query_of(args, src3, tgpig.y, tgpig.z, g, latest.first + j);
            device const float * sum = sums + 2*(g*args.n_queries + j);
            total += precise::exp(logit_of(args, q, k, tiisg) - sum[0])/sum[1]; // sum[1] > 0: this entry is in it
        }
    }
    if (tiisg == 0) {
        device float * res = args.smooth ? sums + 2*n_group*args.n_queries
                                         : (device float *) at1(dst, args.dst, tgpig.y, tgpig.z);
        res[i] = total/(float) (n_group*latest.n);
    }
}

// The product with the mean of such queries: native/policies/expected.cpp. shared: [n_embd] that mean
INDEXMEM_KERNEL(attention_expected) {
    device const indexmem_metal_ctl & c = ctl_of(src2, args.src[2], tgpig.z);
    if (c.n_evict == 0) {
        return;
    }
    const query_range latest = latest_queries(c, args.n_queries);
    const int n_group = args.src[3].ne[2]/args.src[0].ne[2];
    const int n_all   = n_group*latest.n;

    threadgroup float * mean = (threadgroup float *) shared;
    for (int d = tiitg; d < args.src[0].ne[0]; d += THREADS) {
        float sum = 0.0f;
        for (int i = 0; i < n_all; ++i) {
            sum += query_of(args, src3, tgpig.y, tgpig.z, i/latest.n, latest.first + i % latest.n)[d];
        }
        mean[d] = args.scale*sum/(float) n_all;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    const int i = tgpig.x*SIMD + sgitg;
    if (i >= c.n_used) {
        return;
    }
    const float logit = dot_key(mean, at2(src0, args.src[0], tgpig.y, tgpig.z) + i*args.src[0].nb[1], args.src[0].ne[0], tiisg);
    if (tiisg == 0) {
        ((device float *) at1(dst, args.dst, tgpig.y, tgpig.z))[i] = logit;
    }
}

INDEXMEM_KERNEL(attention_smooth) {
    device const indexmem_metal_ctl & c = ctl_of(src2, args.src[2], tgpig.z);
    if (c.n_evict == 0) {
        return;
    }
    const int n = c.n_used;
    const int n_group = args.src[3].ne[2]/args.src[0].ne[2];

    device const int   * pos   = (device const int *) at1(src1, args.src[1], tgpig.y, tgpig.z);
    device       float * rank  = (device float *) at1(dst, args.dst, tgpig.y, tgpig.z);
    device const float * mean  = scratch_of(args, scratch, tgpig.y, tgpig.z) + 2*n_group*args.n_queries;
    device       int   * order = (device int *) mean + args.src[0].ne[1];

    for (int i = tiitg; i < n; i += THREADS) {
        order[i] = i;
    }
    threadgroup_barrier(mem_flags::mem_device);

    // Bitonic: blocks of `size` become sorted. All pairs are ordered upwards (the first step of a block compares it with
    // its mirror image), so that what a power of two is short of counts as largest, and takes no part.
    for (int size = 2; size < 2*n; size *= 2) {
        for (int step = size/2; step > 0; step /= 2) {
            for (int t = tiitg; ; t += THREADS) {
                const int base = t/step*2*step;
                const int a = base + t % step;
                const int b = step == size/2 ? base + size - 1 - t % step : a + step;
                if (a >= n) {
                    break;
                }
                if (b < n) {
                    const int ia = order[a];
                    const int ib = order[b];
                    if (pos_at(pos, c, ia) > pos_at(pos, c, ib)) {
                        order[a] = ib;
                        order[b] = ia;
                    }
                }
            }
            threadgroup_barrier(mem_flags::mem_device);
        }
    }

    constexpr int reach = 3;
    for (int i = tiitg; i < n; i += THREADS) {
        const int lo = max(0,     i - reach);
        const int hi = min(n - 1, i + reach);
        float sum = 0.0f;
        for (int j = lo; j <= hi; ++j) {
            sum += mean[order[j]];
        }
        rank[order[i]] = sum/(float) (hi - lo + 1);
    }
}
