#include "kernels.cuh"

namespace indexmem_cuda {

namespace {

struct leaving_args {
    tensor  k, v, plan, ctl;
    float * entries;

    leaving_args(const ggml_tensor * op, float * entries) :
        k(op->src[2]), v(op->src[3]), plan(op->src[4]), ctl(op->src[5]), entries(entries) {
    }
};

} // namespace

// a warp for each entry
static __global__ void leaving_kernel(const leaving_args a) {
    const row_index row = row_of_block(a.k.ne[2]);
    const int i = blockIdx.x*WARPS + threadIdx.x/WARP;
    if (i >= n_leaving(a.plan, a.ctl, row)) {
        return;
    }
    const int32_t slot = a.plan.at<int32_t>(0, row.h, row.s)[i];
    const int n_embd_k = a.k.ne[0];
    const int n_embd   = n_embd_k + a.v.ne[0];
    const char * key   = a.k.at<char>(slot, row.h, row.s);
    const char * value = a.v.at<char>(slot, row.h, row.s);

    float * entry = a.entries + ((int64_t) blockIdx.y*a.plan.ne[0] + i)*n_embd;
    for (int d = threadIdx.x % WARP; d < n_embd; d += WARP) {
        entry[d] = d < n_embd_k ? value_at(a.k.type, key, d) : value_at(a.v.type, value, d - n_embd_k);
    }
}

void gather_leaving(ggml_backend_cuda_context & ctx, const ggml_tensor * op, float * entries) {
    const ggml_tensor * plan = op->src[4];
    const dim3 grid(blocks_for(plan->ne[0], WARPS), plan->ne[2]*plan->ne[3]);
    launch(leaving_kernel, grid, THREADS, ctx, leaving_args(op, entries));
}

} // namespace indexmem_cuda
