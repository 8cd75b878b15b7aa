#include "common.metal"

// Survivors move into the holes: rows as bytes, or their positions. What moves and where it goes are disjoint, so the moves
// need no order.
//   src: the cache or pos (= dst) | plan | ctl

namespace indexmem {

template <typename T>
inline void copy_row(device const char * from, device char * to, uint n, uint lane) {
    for (uint i = lane; i < n; i += WIDTH) {
        ((device T *) to)[i] = ((device const T *) from)[i];
    }
}

} // namespace indexmem

// grid [n_evict_max/SIMD, H, S]: a simdgroup for each row
INDEXMEM_KERNEL(compact) {
    device const indexmem_metal_ctl & c = ctl_of(src2, args.src[2], tgpig.z);
    const int i = tgpig.x*SIMD + sgitg;
    if (c.n_evict == 0 || i >= args.src[1].ne[0]) {
        return;
    }
    device const char * plan = at2(src1, args.src[1], tgpig.y, tgpig.z);
    const int to   = ((device const int *) (plan +   args.src[1].nb[1]))[i];
    const int from = ((device const int *) (plan + 2*args.src[1].nb[1]))[i];
    if (to < 0 || from < 0) {
        return;
    }
    device char * rows = at2(dst, args.dst, tgpig.y, tgpig.z);
    device const char * a = rows + from*args.dst.nb[1];
    device       char * b = rows + to  *args.dst.nb[1];
    if (args.copy_size == 16) {
        copy_row<uint4>(a, b, args.row_size/16, tiisg);
    } else {
        copy_row<ushort>(a, b, args.row_size/2, tiisg);
    }
}

// grid [1, H, S]
INDEXMEM_KERNEL(compact_pos) {
    device const indexmem_metal_ctl & c = ctl_of(src2, args.src[2], tgpig.z);
    if (c.n_evict == 0) {
        return;
    }
    device const char * plan     = at2(src1, args.src[1], tgpig.y, tgpig.z);
    device const int  * move_dst = (device const int *) (plan +   args.src[1].nb[1]);
    device const int  * move_src = (device const int *) (plan + 2*args.src[1].nb[1]);
    device       int  * pos      = (device       int *) at1(dst, args.dst, tgpig.y, tgpig.z);

    for (int i = c.n_fixed + (int) tiitg; i < c.n_used; i += THREADS) {
        pos[i] = pos_at(pos, c, i);
    }
    threadgroup_barrier(mem_flags::mem_device);
    for (int i = tiitg; i < args.src[1].ne[0]; i += THREADS) {
        if (move_dst[i] >= 0 && move_src[i] >= 0) {
            pos[move_dst[i]] = pos[move_src[i]];
        }
    }
}
