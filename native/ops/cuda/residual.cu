#include "kernels.cuh"

// First the features of all entries that leave, then every value of the state is read and written once.

namespace indexmem_cuda {

namespace {

struct residual_args : op_view {
    float * entries;  // [row][n_evict_max][n_embd_k + n_embd_v]
    float * features; // [row][n_evict_max][n_feature]

    using op_view::op_view;

    __device__ int n_evict(row_index row) const { return n_leaving(src[4], src[5], row); }

    __device__ const float * entry(int i) const {
        return entries + ((int64_t) blockIdx.y*src[4].ne[0] + i)*(src[2].ne[0] + src[3].ne[0]);
    }

    __device__ float * feature(int i) const { return features + ((int64_t) blockIdx.y*src[4].ne[0] + i)*dst.ne[0]; }
};

} // namespace

// a warp for each entry, its lanes share the features
static __global__ void residual_feature_kernel(const residual_args a) {
    const int i = blockIdx.x*WARPS + threadIdx.x/WARP;
    if (i >= a.n_evict(row_of_block(a.dst.ne[2]))) {
        return;
    }
    const tensor & phi = a.src[1];
    for (int j = threadIdx.x % WARP; j < a.dst.ne[0]; j += WARP) {
        a.feature(i)[j] = dot(phi.at<float>(j), a.entry(i), phi.ne[0]);
    }
}

// z of the grid: component of the value, the last is the normaliser
static __global__ void residual_state_kernel(const residual_args a) {
    const row_index row = row_of_block(a.dst.ne[2]);
    const int n_evict = a.n_evict(row);
    const int j       = blockIdx.x*THREADS + threadIdx.x;
    if (n_evict == 0 || j >= a.dst.ne[0]) {
        return;
    }
    const int  d          = blockIdx.z;
    const bool normaliser = d == a.src[3].ne[0];
    const float rate      = a.param_f32(INDEXMEM_PARAM_RATE);

    float * state = a.dst.at<float>(d, row.h, row.s) + j;
    float x = a.param_f32(INDEXMEM_PARAM_DECAY)*(*state);
    for (int i = 0; i < n_evict; ++i) {
        const float f = a.feature(i)[j];
        x += rate*f*(normaliser ? f : a.entry(i)[a.src[2].ne[0] + d]);
    }
    *state = x;
}

void residual(ggml_backend_cuda_context & ctx, const ggml_tensor * op) {
    const int64_t n_row       = op->ne[2]*op->ne[3];
    const int64_t n_evict_max = op->src[4]->ne[0];
    const int64_t n_embd      = op->src[2]->ne[0] + op->src[3]->ne[0];

    ggml_cuda_pool_alloc<float> entries (ctx.pool(), n_row*n_evict_max*n_embd);
    ggml_cuda_pool_alloc<float> features(ctx.pool(), n_row*n_evict_max*op->ne[0]);

    residual_args args(op);
    args.entries  = entries.get();
    args.features = features.get();

    gather_leaving(ctx, op, args.entries);
    launch(residual_feature_kernel, dim3(blocks_for(n_evict_max, WARPS), n_row),              THREADS, ctx, args);
    launch(residual_state_kernel,   dim3(blocks_for(op->ne[0], THREADS), n_row, op->ne[1]), THREADS, ctx, args);
}

} // namespace indexmem_cuda
