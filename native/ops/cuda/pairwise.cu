#include "kernels.cuh"

// A block has the keys of a tile of slots, a slot a lane; its warps share the queries.

namespace indexmem_cuda {

static __global__ void pairwise_kernel(const op_view op) {
    __shared__ float keys[TILE_FLOATS];
    __shared__ float totals[WARPS][TILE];

    const tensor & k       = op.src[0];
    const tensor & queries = op.src[1];

    const int32_t * c = op.src[2].at<int32_t>(blockIdx.y);

    const int s      = blockIdx.y;
    const int slot0  = blockIdx.x*TILE;
    const int n_used = c[INDEXMEM_CTL_N_USED];
    if (c[INDEXMEM_CTL_N_EVICT] == 0 || slot0 >= n_used) {
        return;
    }
    const int  n_embd  = k.ne[0];
    const int  n_head  = op.params[INDEXMEM_PARAM_HEADS];
    const bool maximum = op.params[INDEXMEM_PARAM_REDUCE] == INDEXMEM_REDUCE_MAX;
    const int  p1      = c[INDEXMEM_CTL_POS_LAST] + 1;
    const int  p0      = max(0, p1 - op.params[INDEXMEM_PARAM_QUERIES]);

    load_tile(k, { 0, s }, slot0, n_used, keys);
    __syncthreads();

    const int lane = threadIdx.x % WARP;
    const int warp = threadIdx.x/WARP;
    const float * key = keys + lane*tile_pitch(k); // of a slot that is not in use: whatever lies there, and never written

    float total = maximum ? -INFINITY : 0.0f;
    for (int p = p0 + warp; p < p1; p += WARPS) {
        const float * q = queries.at<float>(p % queries.ne[1], 0, s);
        const float * w = q + n_head*n_embd;

        float score = 0.0f;
        for (int h = 0; h < n_head; ++h) {
            score += w[h]*fmaxf(dot(q + h*n_embd, key, n_embd), 0.0f);
        }
        total = maximum ? fmaxf(total, score) : total + score;
    }
    totals[warp][lane] = total;
    __syncthreads();

    if (warp == 0 && slot0 + lane < n_used) {
        for (int i = 1; i < WARPS; ++i) {
            total = maximum ? fmaxf(total, totals[i][lane]) : total + totals[i][lane];
        }
        op.dst.at<float>(0, 0, s)[slot0 + lane] = maximum ? total : total/(float) (p1 - p0);
    }
}

void pairwise(ggml_backend_cuda_context & ctx, const ggml_tensor * op) {
    launch(pairwise_kernel, dim3(blocks_for(op->ne[1], TILE), op->ne[3]), THREADS, ctx, op_view(op));
}

} // namespace indexmem_cuda
