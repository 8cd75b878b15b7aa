#include "kernels.cuh"

// A block chooses for one KV head. The key of the entry that leaves last is found byte by byte, from the top: how many keys
// that begin like it have each value of the next byte? Keys are distinct, so the choice is exact whatever the ranks.

namespace indexmem_cuda {

static constexpr int SELECT_THREADS = 512;
static constexpr int BINS           = 256;

static_assert(SELECT_THREADS >= BINS && SELECT_THREADS < 1 << 16);

// Ascending order of keys = order of leaving. NaN < -inf < ... < +inf; among equal ranks the later position first. In
// integers, because fast arithmetic takes small numbers for zero.
static __device__ uint64_t select_key(uint32_t rank, int32_t pos) {
    const uint32_t magnitude = rank & 0x7FFFFFFF;

    uint32_t bits;
    if (magnitude > 0x7F800000) {
        bits = 0; // NaN
    } else if (magnitude == 0 || rank == magnitude) {
        bits = magnitude | 0x80000000;
    } else {
        bits = ~rank;
    }
    return (uint64_t) bits << 32 | (0xFFFFFFFF - (uint32_t) pos);
}

// keys of one KV head, computed again each time they are looked at
struct select_keys {
    const uint32_t * rank;
    const int32_t  * pos;
    const int32_t  * ctl;

    // entries that may not leave have none
    __device__ bool get(int slot, uint64_t & key) const {
        const int32_t p = pos_at(pos, ctl, slot);
        key = select_key(rank[slot], p);
        return p >= ctl[INDEXMEM_CTL_KEEP_LO] && p < ctl[INDEXMEM_CTL_KEEP_HI];
    }
};

static __global__ void select_kernel(const op_view op) {
    __shared__ uint32_t bins[BINS];
    __shared__ uint32_t warps[SELECT_THREADS/WARP];
    __shared__ uint32_t chosen;
    __shared__ uint32_t skipped;

    const tensor & rank = op.src[0];
    const tensor & pos  = op.src[1];
    const tensor & ctl  = op.src[2];

    const row_index row = row_of_block(rank.ne[1]);
    const int       tid = threadIdx.x;

    const int32_t * c = ctl.at<int32_t>(row.s);

    int32_t * evicted  = op.dst.at<int32_t>(0, row.h, row.s);
    int32_t * move_dst = op.dst.at<int32_t>(1, row.h, row.s);
    int32_t * move_src = op.dst.at<int32_t>(2, row.h, row.s);
    for (int i = tid; i < op.dst.ne[0]; i += SELECT_THREADS) {
        evicted[i] = move_dst[i] = move_src[i] = -1;
    }
    __syncthreads(); // another thread writes the plan to the same place

    const int n_used  = min(c[INDEXMEM_CTL_N_USED], rank.ne[0]);
    int       n_evict = min(c[INDEXMEM_CTL_N_EVICT], op.dst.ne[0]);
    if (n_evict == 0) {
        return;
    }
    const select_keys keys = { rank.at<uint32_t>(row.h, row.s), pos.at<int32_t>(row.h, row.s), c };

    uint64_t cut  = 0;                  // the bytes found
    uint32_t left = (uint32_t) n_evict; // it is the left-th of the keys that begin with them
    for (int shift = 56; shift >= 0; shift -= 8) {
        if (tid < BINS) {
            bins[tid] = 0;
        }
        __syncthreads();
        for (int i = tid; i < n_used; i += SELECT_THREADS) {
            uint64_t key;
            if (keys.get(i, key) && key >> shift >> 8 == cut) {
                atomicAdd(&bins[key >> shift & (BINS - 1)], 1u);
            }
        }
        __syncthreads();
        const uint32_t count = tid < BINS ? bins[tid] : 0;
        uint32_t total;
        const uint32_t before = block_scan(count, warps, total);
        if (shift == 56 && total < left) { // of all keys: fewer may leave
            if (total == 0) {
                return;
            }
            n_evict = (int) total;
            left    = total;
        }
        if (before < left && left <= before + count) { // one thread
            chosen  = (uint32_t) tid;
            skipped = before;
        }
        __syncthreads();
        cut   = cut << 8 | chosen;
        left -= skipped;
    }

    const int n_left = n_used - n_evict;
    uint32_t n_evicted = 0;
    uint32_t n_moved   = 0;
    for (int i0 = 0; i0 < n_used; i0 += SELECT_THREADS) {
        const int i = i0 + tid;
        uint64_t key;
        const bool leaves = i < n_used && keys.get(i, key) && key <= cut;
        const bool moves  = i < n_used && i >= n_left && !leaves;

        uint32_t total; // both counts in one number
        const uint32_t before = block_scan((uint32_t) leaves | (uint32_t) moves << 16, warps, total);
        if (leaves) {
            const uint32_t ie = n_evicted + (before & 0xFFFF);
            evicted[ie] = i;
            if (i < n_left) {
                move_dst[ie] = i;
            }
        }
        if (moves) {
            move_src[n_moved + (before >> 16)] = i;
        }
        n_evicted += total & 0xFFFF;
        n_moved   += total >> 16;
    }
}

void select(ggml_backend_cuda_context & ctx, const ggml_tensor * op) {
    launch(select_kernel, dim3(1, op->ne[2]*op->ne[3]), SELECT_THREADS, ctx, op_view(op));
}

} // namespace indexmem_cuda
