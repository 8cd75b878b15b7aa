#include "indexmem-cuda.cuh"

#include "kernels.cuh"

using namespace indexmem_cuda;

bool ggml_cuda_indexmem_supported(const ggml_tensor * op) {
    switch (ggml_get_op_params_i32(op, INDEXMEM_PARAM_OP)) {
        case INDEXMEM_OP_RANK:        return rank_supported(op);
        case INDEXMEM_OP_PAIRWISE:    return op->src[0]->ne[0] <= MAX_EMBD;
        case INDEXMEM_OP_CENTROID:
        case INDEXMEM_OP_RESIDUAL:    return is_cache_type(op->src[2]->type) && is_cache_type(op->src[3]->type);
        case INDEXMEM_OP_SELECT:
        case INDEXMEM_OP_COMPACT:
        case INDEXMEM_OP_COMPACT_POS:
        case INDEXMEM_OP_BIAS:        return op->ne[1] <= 65535; // tokens are dimension z of its grid
        default:                      return false;
    }
}

bool ggml_cuda_indexmem(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    switch (ggml_get_op_params_i32(dst, INDEXMEM_PARAM_OP)) {
        case INDEXMEM_OP_RANK:        rank       (ctx, dst); return true;
        case INDEXMEM_OP_SELECT:      select     (ctx, dst); return true;
        case INDEXMEM_OP_COMPACT:     compact    (ctx, dst); return true;
        case INDEXMEM_OP_COMPACT_POS: compact_pos(ctx, dst); return true;
        case INDEXMEM_OP_PAIRWISE:    pairwise   (ctx, dst); return true;
        case INDEXMEM_OP_CENTROID:    centroid   (ctx, dst); return true;
        case INDEXMEM_OP_RESIDUAL:    residual   (ctx, dst); return true;
        case INDEXMEM_OP_BIAS:        bias       (ctx, dst); return true;
        default:                      return false;
    }
}
