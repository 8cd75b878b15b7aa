#include "common.metal"

// Grid [1, H, S]. Keys are 64 bits, ascending in the order of leaving, and all different: bits of the rank, then the
// position. The key of the last entry that leaves is found byte by byte, from the counts of each value of a byte; keys are
// made anew in each pass, so that there is no limit to the number of slots.
//   src: rank | pos | ctl

namespace indexmem {

// NaN < -inf < ... < +inf, -0 == +0; of equal ranks the later position is less
inline ulong select_key(uint rank, int pos) {
    const uint size = rank & 0x7FFFFFFFu;
    const uint order = size > 0x7F800000u ? 0u : size == 0u ? 0x80000000u : rank == size ? rank | 0x80000000u : ~rank;
    return (ulong) order << 32 | (ulong) (0xFFFFFFFFu - (uint) pos);
}

struct select_row {
    device const uint * rank; // bits
    device const int  * pos;
    int n_used;

    // false: it stays in any case
    bool key_of(device const indexmem_metal_ctl & c, int i, thread ulong & key) const {
        if (i >= n_used) {
            return false;
        }
        const int p = pos_at(pos, c, i);
        key = select_key(rank[i], p);
        return p >= c.keep_lo && p < c.keep_hi;
    }
};

struct select_shared {
    atomic_uint count[256];
    uint work[SIMD];
    uint byte_found;
    uint wanted_next;
};

} // namespace indexmem

INDEXMEM_KERNEL(select) {
    device const indexmem_metal_ctl & c = ctl_of(src2, args.src[2], tgpig.z);

    const int n_max = args.dst.ne[0];
    device int * evicted  = (device int *) at2(dst, args.dst, tgpig.y, tgpig.z);
    device int * move_dst = evicted  + n_max;
    device int * move_src = move_dst + n_max;

    threadgroup select_shared * sh = (threadgroup select_shared *) shared;

    int n_evict = min(c.n_evict, n_max);
    int n_out  = 0;
    int n_from = 0;

    if (n_evict > 0) {
        const select_row row = {
            (device const uint *) at1(src0, args.src[0], tgpig.y, tgpig.z),
            (device const int  *) at1(src1, args.src[1], tgpig.y, tgpig.z),
            min(c.n_used, args.src[0].ne[0]),
        };

        if (tiitg == 0) {
            sh->byte_found  = 0; // stays so if none may leave
            sh->wanted_next = n_evict;
        }
        ulong cut    = 0;       // the bytes of the key that are known
        uint  wanted = n_evict; // of the keys that begin with them, this is which
        for (int shift = 56; shift >= 0; shift -= 8) {
            atomic_store_explicit(&sh->count[tiitg], 0u, memory_order_relaxed);
            threadgroup_barrier(mem_flags::mem_threadgroup);
            for (int i = tiitg; i < row.n_used; i += THREADS) {
                ulong key;
                if (row.key_of(c, i, key) && (key >> shift >> 8) == cut) {
                    atomic_fetch_add_explicit(&sh->count[(uint) (key >> shift) & 0xFFu], 1u, memory_order_relaxed);
                }
            }
            threadgroup_barrier(mem_flags::mem_threadgroup);

            const uint n = atomic_load_explicit(&sh->count[tiitg], memory_order_relaxed);
            uint total;
            const uint before = group_scan(n, tiisg, sgitg, sh->work, total);
            if (shift == 56 && total < wanted) { // of all keys: fewer may leave
                n_evict = total;
                wanted  = total;
            }
            if (before < wanted && wanted <= before + n) {
                sh->byte_found  = tiitg;
                sh->wanted_next = wanted - before;
            }
            threadgroup_barrier(mem_flags::mem_threadgroup);
            cut    = cut << 8 | (ulong) sh->byte_found;
            wanted = sh->wanted_next;
        }

        const int n_left = row.n_used - n_evict;
        for (int i0 = 0; i0 < row.n_used; i0 += THREADS) {
            const int i = i0 + (int) tiitg;
            ulong key = 0;
            const bool leaves = row.key_of(c, i, key) && key <= cut;
            const bool moves  = !leaves && i >= n_left && i < row.n_used;

            // two counts in one number, neither exceeds THREADS
            uint total;
            const uint before = group_scan((leaves ? 1u : 0u) + (moves ? 1u << 16 : 0u), tiisg, sgitg, sh->work, total);
            const int out  = n_out  + (int) (before & 0xFFFFu);
            const int from = n_from + (int) (before >> 16);
            if (leaves && out < n_max) {
                evicted [out] = i;
                move_dst[out] = i < n_left ? i : -1; // slots ascend: the holes come first
            }
            if (moves && from < n_max) {
                move_src[from] = i;
            }
            n_out  += (int) (total & 0xFFFFu);
            n_from += (int) (total >> 16);
        }
    }

    for (int i = n_out + (int) tiitg; i < n_max; i += THREADS) {
        evicted [i] = -1;
        move_dst[i] = -1;
    }
    for (int i = n_from + (int) tiitg; i < n_max; i += THREADS) {
        move_src[i] = -1;
    }
}
