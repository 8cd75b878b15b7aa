#include "kernels.cuh"

namespace indexmem_cuda {

// a thread for each key, token and (KV head, sequence)
static __global__ void bias_kernel(const op_view op) {
    const tensor & mask  = op.src[0];
    const tensor & count = op.src[1];

    const int i = blockIdx.x*THREADS + threadIdx.x;
    if (i >= op.dst.ne[0]) {
        return;
    }
    const row_index row = row_of_block(count.ne[1]);

    half value = mask.at<half>(blockIdx.z, 0, row.s)[i];
    if (i < count.ne[0]) {
        const float n = count.at<float>(row.h, row.s)[i]; // its logarithm is exactly 0 where it is 1, with fast math as well
        value = __float2half(__half2float(value) + (n == 1 ? 0.0f : logf(n)));
    }
    op.dst.at<half>(blockIdx.z, 0, blockIdx.y)[i] = value;
}

void bias(ggml_backend_cuda_context & ctx, const ggml_tensor * op) {
    launch(bias_kernel, dim3(blocks_for(op->ne[0], THREADS), op->ne[3], op->ne[1]), THREADS, ctx, op_view(op));
}

} // namespace indexmem_cuda
