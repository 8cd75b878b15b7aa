#include "kernels.cuh"

// Four kernels, each with the parallelism of its step: read the entries that leave, find the slot of each of the first ones
// among the empty slots and put it there, find the nearest slot for each of the others, and let every slot take up its own,
// in the order of the plan.

namespace indexmem_cuda {

namespace {

struct centroid_args : op_view {
    float   * entries; // [row][n_evict_max][n_embd]
    int32_t * slot_of; // [row][n_evict_max]
    int32_t * n_fill;  // [row] entries that find an empty slot

    using op_view::op_view;

    __device__ int n_evict_max() const { return src[4].ne[0]; }

    __device__ int n_evict(row_index row) const { return n_leaving(src[4], src[5], row); }

    __device__ float * counts(row_index row) const { return src[1].at<float>(row.h, row.s); }

    __device__ const float * entry(int i) const { return entries + ((int64_t) blockIdx.y*n_evict_max() + i)*dst.ne[0]; }

    __device__ int32_t * slots() const { return slot_of + (int64_t) blockIdx.y*n_evict_max(); }
};

} // namespace

static __global__ void centroid_fill_kernel(const centroid_args a) {
    __shared__ uint32_t warps[WARPS];

    const row_index row = row_of_block(a.dst.ne[2]);
    const int n_evict = a.n_evict(row);
    if (n_evict == 0) {
        return;
    }
    float * n = a.counts(row);

    int n_empty = 0; // up to here
    for (int r0 = 0; r0 < a.dst.ne[1] && n_empty < n_evict; r0 += THREADS) {
        const int  r     = r0 + threadIdx.x;
        const bool empty = r < a.dst.ne[1] && n[r] == 0.0f;

        uint32_t total;
        const int i = n_empty + (int) block_scan(empty, warps, total);
        if (empty && i < n_evict) {
            const float * e = a.entry(i);
            float       * m = a.dst.at<float>(r, row.h, row.s);
            for (int d = 0; d < a.dst.ne[0]; ++d) {
                m[d] = e[d];
            }
            n[r] = 1.0f;
        }
        n_empty += (int) total;
    }
    if (threadIdx.x == 0) {
        a.n_fill[blockIdx.y] = min(n_empty, n_evict);
    }
}

// a warp for each entry, its lanes share the slots
static __global__ void centroid_nearest_kernel(const centroid_args a) {
    const row_index row = row_of_block(a.dst.ne[2]);
    const int i = blockIdx.x*WARPS + threadIdx.x/WARP;
    if (i >= a.n_evict(row) || i < a.n_fill[blockIdx.y]) {
        return;
    }
    const float * e = a.entry(i);

    float best = INFINITY;
    int   slot = a.dst.ne[1];
    for (int r = threadIdx.x % WARP; r < a.dst.ne[1]; r += WARP) {
        const float * m = a.dst.at<float>(r, row.h, row.s);
        float distance = 0.0f;
        for (int d = 0; d < a.src[2].ne[0]; ++d) {
            const float x = e[d] - m[d];
            distance += x*x;
        }
        if (distance < best) {
            best = distance;
            slot = r;
        }
    }
    for (int offset = WARP/2; offset > 0; offset /= 2) { // the first of equals
        const float other      = __shfl_xor_sync(0xFFFFFFFF, best, offset, WARP);
        const int   other_slot = __shfl_xor_sync(0xFFFFFFFF, slot, offset, WARP);
        if (other < best || (other == best && other_slot < slot)) {
            best = other;
            slot = other_slot;
        }
    }
    if (threadIdx.x % WARP == 0) {
        a.slots()[i] = slot < a.dst.ne[1] ? slot : 0; // no distance is a number
    }
}

// a warp for each latent slot
static __global__ void centroid_update_kernel(const centroid_args a) {
    const row_index row = row_of_block(a.dst.ne[2]);
    const int n_evict = a.n_evict(row);
    const int r       = blockIdx.x*WARPS + threadIdx.x/WARP;
    if (n_evict == 0 || r >= a.dst.ne[1]) {
        return;
    }
    const int n_fill = a.n_fill[blockIdx.y];
    const int lane   = threadIdx.x % WARP;

    float * n = a.counts(row) + r;
    float * m = a.dst.at<float>(r, row.h, row.s);

    const float n_before = *n;
    float n_after = n_before;
    for (int d = lane; d < a.dst.ne[0]; d += WARP) {
        float mean = m[d];
        n_after = n_before;
        for (int i = n_fill; i < n_evict; ++i) {
            if (a.slots()[i] == r) {
                n_after += 1.0f;
                mean += (a.entry(i)[d] - mean)*(1.0f/n_after);
            }
        }
        m[d] = mean;
    }
    n_after = warp_max(n_after); // lanes without a component have not counted, and now all have read the count
    if (lane == 0) {
        *n = n_after;
    }
}

void centroid(ggml_backend_cuda_context & ctx, const ggml_tensor * op) {
    const int64_t n_row       = op->ne[2]*op->ne[3];
    const int64_t n_evict_max = op->src[4]->ne[0];

    ggml_cuda_pool_alloc<float>   entries(ctx.pool(), n_row*n_evict_max*op->ne[0]);
    ggml_cuda_pool_alloc<int32_t> slot_of(ctx.pool(), n_row*n_evict_max);
    ggml_cuda_pool_alloc<int32_t> n_fill (ctx.pool(), n_row);

    centroid_args args(op);
    args.entries = entries.get();
    args.slot_of = slot_of.get();
    args.n_fill  = n_fill.get();

    gather_leaving(ctx, op, args.entries);
    launch(centroid_fill_kernel,    dim3(1,                              n_row), THREADS, ctx, args);
    launch(centroid_nearest_kernel, dim3(blocks_for(n_evict_max, WARPS), n_row), THREADS, ctx, args);
    launch(centroid_update_kernel,  dim3(blocks_for(op->ne[1],   WARPS), n_row), THREADS, ctx, args);
}

} // namespace indexmem_cuda
