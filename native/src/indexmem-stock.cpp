#include "indexmem-stock.h"

bool indexmem_stock_exact(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F32:
        case GGML_TYPE_F16:
        case GGML_TYPE_BF16:
        case GGML_TYPE_Q8_0:
        case GGML_TYPE_Q4_0:
        case GGML_TYPE_Q5_0:
            return true;
        default:
            return false;
    }
}

// a list of ggml_indexmem_moves()
static ggml_tensor * list_of(ggml_context * ctx, ggml_tensor * moves, int64_t i) {
    return ggml_view_3d(ctx, moves, moves->ne[0], moves->ne[1], moves->ne[2], moves->nb[1], moves->nb[2], i*moves->nb[3]);
}

ggml_tensor * indexmem_stock_compact(ggml_context * ctx, ggml_tensor * cache, ggml_tensor * moves) {
    return ggml_set_rows(ctx, cache, ggml_get_rows(ctx, cache, list_of(ctx, moves, 3)), list_of(ctx, moves, 2));
}

ggml_tensor * indexmem_stock_leaving(ggml_context * ctx, ggml_tensor * cache, ggml_tensor * moves) {
    return ggml_get_rows(ctx, cache, list_of(ctx, moves, 1));
}

ggml_tensor * indexmem_stock_leaving_plan(ggml_context * ctx, ggml_tensor * moves) {
    return ggml_view_4d(ctx, moves, moves->ne[0], 3, moves->ne[1], moves->ne[2], moves->nb[3], moves->nb[1], moves->nb[2], 0);
}
