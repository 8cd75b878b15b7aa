#pragma once

// what the constructors of the op share

#include "indexmem-ops.h"

#include "ggml-impl.h"

inline ggml_tensor * indexmem_op_init(ggml_tensor * result, indexmem_op op) {
    result->op = GGML_OP_INDEXMEM;
    ggml_set_op_params_i32(result, INDEXMEM_PARAM_OP, op);
    return result;
}

inline void indexmem_assert_ctl(const ggml_tensor * ctl, int64_t n_seq) {
    GGML_ASSERT(ctl->type == GGML_TYPE_I32);
    GGML_ASSERT(ctl->ne[0] == INDEXMEM_CTL_SIZE);
    GGML_ASSERT(ctl->ne[1] == n_seq);
    GGML_ASSERT(ggml_is_contiguous(ctl));
}

inline void indexmem_assert_pos(const ggml_tensor * pos, int64_t n_slots, int64_t n_head, int64_t n_seq) {
    GGML_ASSERT(pos->type == GGML_TYPE_I32);
    GGML_ASSERT(pos->ne[0] == n_slots);
    GGML_ASSERT(pos->ne[1] == n_head);
    GGML_ASSERT(pos->ne[2] == n_seq);
    GGML_ASSERT(ggml_is_contiguous_rows(pos));
}

inline void indexmem_assert_plan(const ggml_tensor * plan, int64_t n_head, int64_t n_seq) {
    GGML_ASSERT(plan->type == GGML_TYPE_I32);
    GGML_ASSERT(plan->ne[1] == 3);
    GGML_ASSERT(plan->ne[2] == n_head);
    GGML_ASSERT(plan->ne[3] == n_seq);
    GGML_ASSERT(ggml_is_contiguous_rows(plan));
}
