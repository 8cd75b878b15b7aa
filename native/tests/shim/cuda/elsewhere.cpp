// Tests of ops that are linked with this run the CUDA kernels.

#include "graph.h"

#include "ggml-cuda/common.cuh"
#include "indexmem-cuda.cuh"
#include "indexmem-ops.h"

static const bool elsewhere = [] {
    op_elsewhere = [](ggml_tensor * op) {
        if (op->op != GGML_OP_INDEXMEM) {
            return false;
        }
        if (!ggml_cuda_indexmem_supported(op)) {
            fprintf(stderr, "there is no CUDA kernel for kind %d\n", ggml_get_op_params_i32(op, INDEXMEM_PARAM_OP));
            exit(EXIT_FAILURE);
        }
        ggml_backend_cuda_context ctx;
        return ggml_cuda_indexmem(ctx, op);
    };
    return true;
}();
