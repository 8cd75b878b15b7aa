#include "common.metal"

// Grid [entries/SIMD, 1, S]: a simdgroup for each entry, its lanes share the queries.
//   src: keys | queries | ctl

INDEXMEM_KERNEL(pairwise) {
    device const indexmem_metal_ctl & c = ctl_of(src2, args.src[2], tgpig.z);
    const int i = tgpig.x*SIMD + sgitg;
    if (c.n_evict == 0 || i >= c.n_used) {
        return;
    }
    const int n_embd = args.src[0].ne[0];
    const int end    = c.pos_last + 1;
    const int first  = max(0, end - args.n_queries);

    device const float * k = (device const float *) (at2(src0, args.src[0], 0, tgpig.z) + i*args.src[0].nb[1]);

    float total = 0.0f;
    bool  empty = true;
    for (int p = first + (int) tiisg; p < end; p += WIDTH) {
        device const float * q = (device const float *) (at2(src1, args.src[1], 0, tgpig.z)
                + (p % args.src[1].ne[1])*args.src[1].nb[1]);
        device const float * w = q + args.n_head*n_embd;

        float score = 0.0f;
        for (int h = 0; h < args.n_head; ++h) {
            float dot = 0.0f;
            for (int d = 0; d < n_embd; ++d) {
                dot += q[h*n_embd + d]*k[d];
            }
            score += w[h]*max(dot, 0.0f);
        }
        total = !args.maximum ? total + score : empty ? score : max(total, score);
        empty = false;
    }
    if (args.maximum) {
        const float first_lane = simd_broadcast(total, 0); // it has seen a query
        total = simd_max(empty ? first_lane : total);
    } else {
        total = simd_sum(total)/(float) (end - first);
    }
    if (tiisg == 0) {
        ((device float *) at2(dst, args.dst, 0, tgpig.z))[i] = total;
    }
}
