#include "kernels.cuh"

// The key of the entry that leaves last is found byte by byte, from the top: how many keys that begin like it have each value
// of the next byte? Keys are distinct, so the choice is exact whatever the ranks.
//
// A block chooses for one KV head. Of large caches many blocks do, each for a part of the entries, and what all have counted is
// known in the kernel after.

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

//
// large caches
//

namespace {

constexpr int64_t LARGE    = 8192; // slots: of fewer one block is done before so many kernels have started
constexpr int     PART     = 2048; // entries of a block
constexpr int     N_BYTES  = 8;    // of a key

// what is known of the cut when some of its bytes are
struct select_cut {
    uint64_t bytes;
    uint32_t left;  // it is the left-th of the keys that begin with them
    uint32_t total; // entries that leave
};

struct select_args : op_view {
    uint32_t   * bins;   // [row][N_BYTES][BINS] keys that begin with what is known, by their next byte
    select_cut * cuts;   // [row][N_BYTES] before that byte is known
    uint32_t   * counts; // [row][part][2] entries that leave, and that move
    int          n_parts;
    int          step;   // of select_count_kernel: the byte; of select_plan_kernel: 0 counts, 1 writes

    using op_view::op_view;
};

// the part of a block
struct select_part {
    const select_args & a;
    row_index   row;
    select_keys keys;
    int n_used;
    int begin;
    int end;

    __device__ select_part(const select_args & a) : a(a), row(row_of_block(a.src[0].ne[1])) {
        keys   = { a.src[0].at<uint32_t>(row.h, row.s), a.src[1].at<int32_t>(row.h, row.s), a.src[2].at<int32_t>(row.s) };
        n_used = min(keys.ctl[INDEXMEM_CTL_N_USED], a.src[0].ne[0]);
        begin  = min(n_used, (int) blockIdx.x*PART);
        end    = min(n_used, begin + PART);
    }

    __device__ uint32_t n_evict() const { return (uint32_t) min(keys.ctl[INDEXMEM_CTL_N_EVICT], a.dst.ne[0]); }

    __device__ uint32_t   * bins(int i) const { return a.bins + ((int64_t) blockIdx.y*N_BYTES + i)*BINS; }
    __device__ select_cut * cut (int i) const { return a.cuts + (int64_t) blockIdx.y*N_BYTES + i; }

    // The cut with byte i known, too: all blocks find the same. `warps` and `found` are shared memory. total 0: nothing may leave
    __device__ select_cut next(int i, uint32_t * warps, select_cut * found) const {
        const int      tid    = threadIdx.x;
        const uint32_t count  = tid < BINS ? bins(i)[tid] : 0;
        select_cut     before = *cut(i);
        uint32_t all;
        const uint32_t below = block_scan(count, warps, all);
        if (i == 0) { // of all keys: fewer may leave
            before.left = before.total = before.left < all ? before.left : all;
        }
        if (tid == 0) {
            *found = { 0, 0, 0 };
        }
        __syncthreads();
        if (below < before.left && before.left <= below + count) { // one thread
            *found = { before.bytes << 8 | (uint64_t) tid, before.left - below, before.total };
        }
        __syncthreads();
        return *found;
    }
};

} // namespace

// byte 0: nothing is known yet; and the plan is empty
static __global__ void select_begin_kernel(const select_args a) {
    const select_part part(a);
    for (int i = blockIdx.x*SELECT_THREADS + threadIdx.x; i < a.dst.ne[0]; i += a.n_parts*SELECT_THREADS) {
        for (int list = 0; list < 3; ++list) {
            a.dst.at<int32_t>(list, part.row.h, part.row.s)[i] = -1;
        }
    }
    for (int i = blockIdx.x*SELECT_THREADS + threadIdx.x; i < N_BYTES*BINS; i += a.n_parts*SELECT_THREADS) {
        part.bins(0)[i] = 0;
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        *part.cut(0) = { 0, part.n_evict(), 0 };
    }
}

static __global__ void select_count_kernel(const select_args a) {
    __shared__ uint32_t   bins[BINS];
    __shared__ uint32_t   warps[SELECT_THREADS/WARP];
    __shared__ select_cut found;

    const select_part part(a);
    if (part.n_evict() == 0) {
        return;
    }
    const int  byte = a.step;
    select_cut cut  = { 0, 0, 0 };
    if (byte > 0) {
        cut = part.next(byte - 1, warps, &found);
        if (cut.total == 0) {
            return;
        }
        if (blockIdx.x == 0 && threadIdx.x == 0) {
            *part.cut(byte) = cut;
        }
    }
    if (threadIdx.x < BINS) {
        bins[threadIdx.x] = 0;
    }
    __syncthreads();
    const int shift = 8*(N_BYTES - 1 - byte);
    for (int i = part.begin + threadIdx.x; i < part.end; i += SELECT_THREADS) {
        uint64_t key;
        if (part.keys.get(i, key) && key >> shift >> 8 == cut.bytes) {
            atomicAdd(&bins[key >> shift & (BINS - 1)], 1u);
        }
    }
    __syncthreads();
    if (threadIdx.x < BINS && bins[threadIdx.x] > 0) {
        atomicAdd(&part.bins(byte)[threadIdx.x], bins[threadIdx.x]);
    }
}

// How many entries of each part leave and move, then which.
static __global__ void select_plan_kernel(const select_args a) {
    __shared__ uint32_t   warps[SELECT_THREADS/WARP];
    __shared__ select_cut found;

    const select_part part(a);
    if (part.n_evict() == 0) {
        return;
    }
    const select_cut cut = part.next(N_BYTES - 1, warps, &found);
    if (cut.total == 0) {
        return;
    }
    const bool write  = a.step == 1;
    uint32_t * counts = a.counts + (int64_t) blockIdx.y*a.n_parts*2;
    uint32_t n_evicted = 0;
    uint32_t n_moved   = 0;
    for (int i = 0; write && i < (int) blockIdx.x; ++i) {
        n_evicted += counts[2*i];
        n_moved   += counts[2*i + 1];
    }
    int32_t * evicted  = a.dst.at<int32_t>(0, part.row.h, part.row.s);
    int32_t * move_dst = a.dst.at<int32_t>(1, part.row.h, part.row.s);
    int32_t * move_src = a.dst.at<int32_t>(2, part.row.h, part.row.s);

    const int n_left = part.n_used - (int) cut.total;
    for (int i0 = part.begin; i0 < part.end; i0 += SELECT_THREADS) {
        const int i = i0 + threadIdx.x;
        uint64_t key;
        const bool leaves = i < part.end && part.keys.get(i, key) && key <= cut.bytes;
        const bool moves  = i < part.end && i >= n_left && !leaves;

        uint32_t total; // both counts in one number
        const uint32_t before = block_scan((uint32_t) leaves | (uint32_t) moves << 16, warps, total);
        if (write && leaves) {
            const uint32_t ie = n_evicted + (before & 0xFFFF);
            evicted[ie] = i;
            if (i < n_left) {
                move_dst[ie] = i;
            }
        }
        if (write && moves) {
            move_src[n_moved + (before >> 16)] = i;
        }
        n_evicted += total & 0xFFFF;
        n_moved   += total >> 16;
    }
    if (!write && threadIdx.x == 0) {
        counts[2*blockIdx.x]     = n_evicted;
        counts[2*blockIdx.x + 1] = n_moved;
    }
}

static void select_large(ggml_backend_cuda_context & ctx, const ggml_tensor * op) {
    const int64_t n_row = op->ne[2]*op->ne[3];

    select_args args(op);
    args.n_parts = blocks_for(op->src[0]->ne[0], PART);

    ggml_cuda_pool_alloc<uint32_t>   bins  (ctx.pool(), n_row*N_BYTES*BINS);
    ggml_cuda_pool_alloc<select_cut> cuts  (ctx.pool(), n_row*N_BYTES);
    ggml_cuda_pool_alloc<uint32_t>   counts(ctx.pool(), n_row*args.n_parts*2);
    args.bins   = bins.get();
    args.cuts   = cuts.get();
    args.counts = counts.get();

    const dim3 grid(args.n_parts, n_row);
    launch(select_begin_kernel, grid, SELECT_THREADS, ctx, args);
    for (args.step = 0; args.step < N_BYTES; ++args.step) {
        launch(select_count_kernel, grid, SELECT_THREADS, ctx, args);
    }
    for (args.step = 0; args.step < 2; ++args.step) {
        launch(select_plan_kernel, grid, SELECT_THREADS, ctx, args);
    }
}

void select(ggml_backend_cuda_context & ctx, const ggml_tensor * op) {
    if (op->src[0]->ne[0] >= LARGE) {
        select_large(ctx, op);
        return;
    }
    launch(select_kernel, dim3(1, op->ne[2]*op->ne[3]), SELECT_THREADS, ctx, op_view(op));
}

} // namespace indexmem_cuda
