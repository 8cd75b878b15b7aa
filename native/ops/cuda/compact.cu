#include "kernels.cuh"

namespace indexmem_cuda {

namespace {

struct compact_args : op_view {
    int row_size; // bytes

    explicit compact_args(const ggml_tensor * op) : op_view(op), row_size((int) ggml_row_size(op->type, op->ne[0])) {
    }
};

} // namespace

// A warp moves one row. Sources and destinations are disjoint, so no order is needed.
template <typename word>
static __global__ void compact_kernel(const compact_args op) {
    const tensor & cache = op.dst;
    const tensor & plan  = op.src[1];

    const row_index row = row_of_block(cache.ne[2]);
    if (op.src[2].at<int32_t>(row.s)[INDEXMEM_CTL_N_EVICT] == 0) {
        return;
    }
    const int i = blockIdx.x*WARPS + threadIdx.x/WARP;
    if (i >= plan.ne[0]) {
        return;
    }
    const int32_t to = plan.at<int32_t>(1, row.h, row.s)[i];
    if (to < 0) {
        return;
    }
    const int32_t from = plan.at<int32_t>(2, row.h, row.s)[i];

    word       * dst = cache.at<word>(to,   row.h, row.s);
    const word * src = cache.at<word>(from, row.h, row.s);
    for (int j = threadIdx.x % WARP; j < op.row_size/(int) sizeof(word); j += WARP) {
        dst[j] = src[j];
    }
}

void compact(ggml_backend_cuda_context & ctx, const ggml_tensor * op) {
    const compact_args args(op);

    // the largest words that every row consists of
    const size_t bits = (size_t) op->data | args.row_size | op->nb[1] | op->nb[2] | op->nb[3];
    const dim3 grid(blocks_for(op->src[1]->ne[0], WARPS), op->ne[2]*op->ne[3]);
    if (bits % sizeof(int4) == 0) {
        launch(compact_kernel<int4>, grid, THREADS, ctx, args);
    } else if (bits % sizeof(int) == 0) {
        launch(compact_kernel<int>,  grid, THREADS, ctx, args);
    } else {
        launch(compact_kernel<char>, grid, THREADS, ctx, args);
    }
}

static __global__ void compact_pos_kernel(const op_view op) {
    const tensor & plan = op.src[1];

    const row_index row = row_of_block(op.dst.ne[1]);
    const int32_t * c = op.src[2].at<int32_t>(row.s);
    if (c[INDEXMEM_CTL_N_EVICT] == 0) {
        return;
    }
    int32_t * pos = op.dst.at<int32_t>(row.h, row.s);
    for (int i = c[INDEXMEM_CTL_N_FIXED] + threadIdx.x; i < c[INDEXMEM_CTL_N_USED]; i += THREADS) {
        pos[i] = pos_at(pos, c, i);
    }
    __syncthreads(); // what moves may have been written by another thread

    const int32_t * to   = plan.at<int32_t>(1, row.h, row.s);
    const int32_t * from = plan.at<int32_t>(2, row.h, row.s);
    for (int i = threadIdx.x; i < plan.ne[0] && to[i] >= 0; i += THREADS) {
        pos[to[i]] = pos[from[i]];
    }
}

void compact_pos(ggml_backend_cuda_context & ctx, const ggml_tensor * op) {
    launch(compact_pos_kernel, dim3(1, op->ne[1]*op->ne[2]), THREADS, ctx, op_view(op));
}

} // namespace indexmem_cuda
