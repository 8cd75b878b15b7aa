#include "indexmem-ops-init.h"

// What stands between ops of ggml and kernels of ours, where a device has the first alone: on the CPU.

ggml_tensor * ggml_indexmem_moves(
        ggml_context * ctx,
        ggml_tensor  * plan) {
    indexmem_assert_plan(plan, plan->ne[2], plan->ne[3]);

    ggml_tensor * result = indexmem_op_init(
            ggml_new_tensor_4d(ctx, GGML_TYPE_I32, plan->ne[0], plan->ne[2], plan->ne[3], 4), INDEXMEM_OP_MOVES);

    result->src[0] = plan;

    return result;
}

ggml_tensor * ggml_indexmem_ages(
        ggml_context * ctx,
        ggml_tensor  * pos,
        ggml_tensor  * ctl) {
    indexmem_assert_pos(pos, pos->ne[0], pos->ne[1], pos->ne[2]);
    indexmem_assert_ctl(ctl, pos->ne[2]);

    ggml_tensor * result = indexmem_op_init(
            ggml_new_tensor_3d(ctx, GGML_TYPE_F32, pos->ne[0], pos->ne[1], pos->ne[2]), INDEXMEM_OP_AGES);

    result->src[0] = pos;
    result->src[1] = ctl;

    return result;
}

ggml_tensor * ggml_indexmem_rank_attended(
        ggml_context * ctx,
        ggml_tensor  * attention,
        ggml_tensor  * pos,
        ggml_tensor  * ctl,
        int            policy) {
    const indexmem_policy_info * info = indexmem_policy_get(policy);
    GGML_ASSERT(info && info->n_queries > 0);
    GGML_ASSERT(attention->type == GGML_TYPE_F32 && ggml_is_contiguous_rows(attention));
    indexmem_assert_pos(pos, attention->ne[0], attention->ne[1], attention->ne[2]);
    indexmem_assert_ctl(ctl, attention->ne[2]);

    ggml_tensor * result = indexmem_op_init(
            ggml_new_tensor_3d(ctx, GGML_TYPE_F32, attention->ne[0], attention->ne[1], attention->ne[2]), INDEXMEM_OP_ATTENDED);

    ggml_set_op_params_i32(result, INDEXMEM_PARAM_POLICY, policy);

    result->src[0] = attention;
    result->src[1] = pos;
    result->src[2] = ctl;

    return result;
}
