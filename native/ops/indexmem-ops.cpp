#include "indexmem-ops-init.h"

#include <cstring>

ggml_tensor * ggml_indexmem_rank(
        ggml_context * ctx,
        ggml_tensor  * k,
        ggml_tensor  * pos,
        ggml_tensor  * ctl,
        ggml_tensor  * q,
        ggml_tensor  * sinks,
        int            policy,
        int            il,
        uint64_t       seed,
        float          scale,
        float          softcap) {
    const indexmem_policy_info * info = indexmem_policy_get(policy);
    GGML_ASSERT(info && strcmp(info->name, "indexer") != 0); // that one ranks terms
    GGML_ASSERT(ggml_is_contiguous_rows(k));
    indexmem_assert_pos(pos, k->ne[1], k->ne[2], k->ne[3]);
    indexmem_assert_ctl(ctl, k->ne[3]);
    GGML_ASSERT((q != nullptr) == (info->n_queries > 0));
    if (q) {
        GGML_ASSERT(q->type == GGML_TYPE_F32);
        GGML_ASSERT(q->ne[0] == k->ne[0]);
        GGML_ASSERT(q->ne[1] >= info->n_queries);
        GGML_ASSERT(q->ne[2] % k->ne[2] == 0);
        GGML_ASSERT(q->ne[3] == k->ne[3]);
        GGML_ASSERT(ggml_is_contiguous_rows(q));
        GGML_ASSERT(!sinks || (sinks->type == GGML_TYPE_F32 && sinks->ne[0] == q->ne[2] && ggml_nrows(sinks) == 1));
    }

    ggml_tensor * result = indexmem_op_init(
            ggml_new_tensor_3d(ctx, GGML_TYPE_F32, k->ne[1], k->ne[2], k->ne[3]), INDEXMEM_OP_RANK);

    ggml_set_op_params_i32(result, INDEXMEM_PARAM_POLICY,  policy);
    ggml_set_op_params_i32(result, INDEXMEM_PARAM_IL,      il);
    ggml_set_op_params_f32(result, INDEXMEM_PARAM_SCALE,   scale);
    ggml_set_op_params_f32(result, INDEXMEM_PARAM_SOFTCAP, softcap);
    memcpy(result->op_params + INDEXMEM_PARAM_SEED, &seed, sizeof(seed));

    result->src[0] = k;
    result->src[1] = pos;
    result->src[2] = ctl;
    result->src[3] = q;
    result->src[4] = q ? sinks : nullptr;

    return result;
}

ggml_tensor * ggml_indexmem_rank_terms(
        ggml_context * ctx,
        ggml_tensor  * terms,
        ggml_tensor  * pos,
        ggml_tensor  * ctl,
        float          pos_slope,
        float          age_scale) {
    const int64_t n_slots = pos->ne[0];
    const int64_t n_head  = pos->ne[1];
    const int64_t n_seq   = pos->ne[2];
    GGML_ASSERT(terms->type == GGML_TYPE_F32);
    GGML_ASSERT(terms->ne[0] == 1 || terms->ne[0] == 2);
    GGML_ASSERT(terms->ne[1] == n_slots);
    GGML_ASSERT(terms->ne[2] == 1 || terms->ne[2] == n_head);
    GGML_ASSERT(terms->ne[3] == n_seq);
    GGML_ASSERT(terms->nb[0] == sizeof(float));
    indexmem_assert_pos(pos, n_slots, n_head, n_seq);
    indexmem_assert_ctl(ctl, n_seq);

    ggml_tensor * result = indexmem_op_init(
            ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n_slots, n_head, n_seq), INDEXMEM_OP_RANK);

    ggml_set_op_params_i32(result, INDEXMEM_PARAM_POLICY, indexmem_policy_find("indexer"));
    ggml_set_op_params_f32(result, INDEXMEM_PARAM_SLOPE,  pos_slope);
    ggml_set_op_params_f32(result, INDEXMEM_PARAM_AGE,    age_scale);

    result->src[0] = terms;
    result->src[1] = pos;
    result->src[2] = ctl;

    return result;
}

ggml_tensor * ggml_indexmem_retention(
        ggml_context                          * ctx,
        ggml_tensor                           * hidden,
        const ggml_indexmem_retention_weights * weights,
        float                                   eps) {
    const auto & w = *weights;
    const int64_t n_trunk = w.magnitude->ne[0];
    GGML_ASSERT(hidden->type == GGML_TYPE_F32 && ggml_is_matrix(hidden) && ggml_is_contiguous_rows(hidden));
    GGML_ASSERT(w.in_norm->ne[0] == hidden->ne[0] && w.in_norm_bias->ne[0] == hidden->ne[0]);
    GGML_ASSERT((w.input ? w.input->ne[1] : hidden->ne[0]) == n_trunk);
    GGML_ASSERT(!w.input || (w.input->ne[0] == hidden->ne[0] && w.mid_norm->ne[0] == n_trunk && w.mid_norm_bias->ne[0] == n_trunk));
    GGML_ASSERT(!w.retention || (ggml_are_same_shape(w.retention, w.magnitude) && w.retention_bias->ne[0] == w.magnitude->ne[1]));

    ggml_tensor * result = indexmem_op_init(
            ggml_new_tensor_3d(ctx, GGML_TYPE_F32, w.retention ? 2 : 1, w.magnitude->ne[1], hidden->ne[1]), INDEXMEM_OP_RETENTION);

    ggml_set_op_params_f32(result, INDEXMEM_PARAM_EPS, eps);

    result->src[0] = hidden;
    result->src[1] = w.in_norm;
    result->src[2] = w.in_norm_bias;
    result->src[3] = w.input;
    result->src[4] = w.mid_norm;
    result->src[5] = w.mid_norm_bias;
    result->src[6] = w.magnitude;
    result->src[7] = w.retention;
    result->src[8] = w.retention_bias;

    return result;
}

ggml_tensor * ggml_indexmem_pairwise(
        ggml_context  * ctx,
        ggml_tensor   * keys,
        ggml_tensor   * queries,
        ggml_tensor   * ctl,
        int             n_head,
        int             n_queries,
        indexmem_reduce reduce) {
    const int64_t n_seq = keys->ne[3];
    GGML_ASSERT(keys->type == GGML_TYPE_F32 && queries->type == GGML_TYPE_F32);
    GGML_ASSERT(keys->ne[2] == 1 && queries->ne[2] == 1 && queries->ne[3] == n_seq);
    GGML_ASSERT(ggml_is_contiguous_rows(keys) && ggml_is_contiguous_rows(queries));
    GGML_ASSERT(n_head > 0 && queries->ne[0] == n_head*(keys->ne[0] + 1));
    GGML_ASSERT(n_queries > 0 && queries->ne[1] >= n_queries);
    indexmem_assert_ctl(ctl, n_seq);

    ggml_tensor * result = indexmem_op_init(
            ggml_new_tensor_4d(ctx, GGML_TYPE_F32, 1, keys->ne[1], 1, n_seq), INDEXMEM_OP_PAIRWISE);

    ggml_set_op_params_i32(result, INDEXMEM_PARAM_HEADS,   n_head);
    ggml_set_op_params_i32(result, INDEXMEM_PARAM_QUERIES, n_queries);
    ggml_set_op_params_i32(result, INDEXMEM_PARAM_REDUCE,  reduce);

    result->src[0] = keys;
    result->src[1] = queries;
    result->src[2] = ctl;

    return result;
}

ggml_tensor * ggml_indexmem_select(
        ggml_context * ctx,
        ggml_tensor  * rank,
        ggml_tensor  * pos,
        ggml_tensor  * ctl,
        int64_t        n_evict_max) {
    GGML_ASSERT(rank->type == GGML_TYPE_F32);
    GGML_ASSERT(ggml_is_contiguous_rows(rank));
    GGML_ASSERT(n_evict_max > 0);
    indexmem_assert_pos(pos, rank->ne[0], rank->ne[1], rank->ne[2]);
    indexmem_assert_ctl(ctl, rank->ne[2]);

    ggml_tensor * result = indexmem_op_init(
            ggml_new_tensor_4d(ctx, GGML_TYPE_I32, n_evict_max, 3, rank->ne[1], rank->ne[2]), INDEXMEM_OP_SELECT);

    result->src[0] = rank;
    result->src[1] = pos;
    result->src[2] = ctl;

    return result;
}

ggml_tensor * ggml_indexmem_centroid(
        ggml_context * ctx,
        ggml_tensor  * means,
        ggml_tensor  * count,
        ggml_tensor  * k,
        ggml_tensor  * v,
        ggml_tensor  * plan,
        ggml_tensor  * ctl) {
    const int64_t n_slots = means->ne[1];
    const int64_t n_head  = means->ne[2];
    const int64_t n_seq   = means->ne[3];
    GGML_ASSERT(means->type == GGML_TYPE_F32 && ggml_is_contiguous_rows(means));
    GGML_ASSERT(means->ne[0] == k->ne[0] + v->ne[0]);
    GGML_ASSERT(count->type == GGML_TYPE_F32 && ggml_is_contiguous_rows(count));
    GGML_ASSERT(count->ne[0] == n_slots && count->ne[1] == n_head && count->ne[2] == n_seq);
    GGML_ASSERT(k->ne[2] == n_head && k->ne[3] == n_seq && ggml_is_contiguous_rows(k));
    GGML_ASSERT(v->ne[2] == n_head && v->ne[3] == n_seq && ggml_is_contiguous_rows(v));
    indexmem_assert_plan(plan, n_head, n_seq);
    indexmem_assert_ctl(ctl, n_seq);

    ggml_tensor * result = indexmem_op_init(ggml_view_tensor(ctx, means), INDEXMEM_OP_CENTROID);

    result->src[0] = means;
    result->src[1] = count;
    result->src[2] = k;
    result->src[3] = v;
    result->src[4] = plan;
    result->src[5] = ctl;

    return result;
}

ggml_tensor * ggml_indexmem_residual(
        ggml_context * ctx,
        ggml_tensor  * state,
        ggml_tensor  * phi,
        ggml_tensor  * k,
        ggml_tensor  * v,
        ggml_tensor  * plan,
        ggml_tensor  * ctl,
        float          rate,
        float          decay) {
    const int64_t n_head = state->ne[2];
    const int64_t n_seq  = state->ne[3];
    GGML_ASSERT(state->type == GGML_TYPE_F32 && ggml_is_contiguous_rows(state));
    GGML_ASSERT(state->ne[1] == v->ne[0] + 1);
    GGML_ASSERT(phi->type == GGML_TYPE_F32 && ggml_is_contiguous(phi) && ggml_is_matrix(phi));
    GGML_ASSERT(phi->ne[0] == k->ne[0] && phi->ne[1] == state->ne[0]);
    GGML_ASSERT(k->ne[2] == n_head && k->ne[3] == n_seq && ggml_is_contiguous_rows(k));
    GGML_ASSERT(v->ne[2] == n_head && v->ne[3] == n_seq && ggml_is_contiguous_rows(v));
    indexmem_assert_plan(plan, n_head, n_seq);
    indexmem_assert_ctl(ctl, n_seq);

    ggml_tensor * result = indexmem_op_init(ggml_view_tensor(ctx, state), INDEXMEM_OP_RESIDUAL);

    ggml_set_op_params_f32(result, INDEXMEM_PARAM_RATE,  rate);
    ggml_set_op_params_f32(result, INDEXMEM_PARAM_DECAY, decay);

    result->src[0] = state;
    result->src[1] = phi;
    result->src[2] = k;
    result->src[3] = v;
    result->src[4] = plan;
    result->src[5] = ctl;

    return result;
}

ggml_tensor * ggml_indexmem_bias(
        ggml_context * ctx,
        ggml_tensor  * mask,
        ggml_tensor  * count) {
    GGML_ASSERT(mask->type == GGML_TYPE_F16 && ggml_is_contiguous(mask) && mask->ne[2] == 1);
    GGML_ASSERT(count->type == GGML_TYPE_F32 && ggml_is_contiguous_rows(count));
    GGML_ASSERT(count->ne[0] <= mask->ne[0] && count->ne[2] == mask->ne[3]);

    ggml_tensor * result = indexmem_op_init(
            ggml_new_tensor_4d(ctx, GGML_TYPE_F16, mask->ne[0], mask->ne[1], 1, count->ne[1]*count->ne[2]), INDEXMEM_OP_BIAS);

    result->src[0] = mask;
    result->src[1] = count;

    return result;
}

ggml_tensor * ggml_indexmem_compact(
        ggml_context * ctx,
        ggml_tensor  * cache,
        ggml_tensor  * plan,
        ggml_tensor  * ctl) {
    GGML_ASSERT(ggml_is_contiguous_rows(cache));
    indexmem_assert_plan(plan, cache->ne[2], cache->ne[3]);
    indexmem_assert_ctl(ctl, cache->ne[3]);

    ggml_tensor * result = indexmem_op_init(ggml_view_tensor(ctx, cache), INDEXMEM_OP_COMPACT);

    result->src[0] = cache;
    result->src[1] = plan;
    result->src[2] = ctl;

    return result;
}

ggml_tensor * ggml_indexmem_compact_pos(
        ggml_context * ctx,
        ggml_tensor  * pos,
        ggml_tensor  * plan,
        ggml_tensor  * ctl) {
    indexmem_assert_pos(pos, pos->ne[0], plan->ne[2], plan->ne[3]);
    indexmem_assert_plan(plan, pos->ne[1], pos->ne[2]);
    indexmem_assert_ctl(ctl, pos->ne[2]);

    ggml_tensor * result = indexmem_op_init(ggml_view_tensor(ctx, pos), INDEXMEM_OP_COMPACT_POS);

    result->src[0] = pos;
    result->src[1] = plan;
    result->src[2] = ctl;

    return result;
}

ggml_tensor * ggml_indexmem_attend(
        ggml_context * ctx,
        ggml_tensor  * q,
        ggml_tensor  * k,
        ggml_tensor  * v,
        ggml_tensor  * mask,
        ggml_tensor  * count,
        ggml_tensor  * sinks,
        float          scale,
        float          softcap) {
    GGML_ASSERT(q->type == GGML_TYPE_F32);
    GGML_ASSERT(q->ne[0] == k->ne[0]);
    GGML_ASSERT(k->ne[1] == v->ne[1]);
    GGML_ASSERT(k->ne[2] == 1 && v->ne[2] == 1);
    GGML_ASSERT(k->ne[3] == q->ne[3] && v->ne[3] == q->ne[3]);
    GGML_ASSERT(ggml_is_contiguous_rows(q) && ggml_is_contiguous_rows(k) && ggml_is_contiguous_rows(v));
    GGML_ASSERT(mask->type == GGML_TYPE_F16 && ggml_is_contiguous(mask));
    GGML_ASSERT(mask->ne[0] == k->ne[1] && mask->ne[1] == q->ne[1] && mask->ne[2] == 1);
    GGML_ASSERT(mask->ne[3] == 1 || mask->ne[3] == q->ne[3]);
    GGML_ASSERT(!count || (count->type == GGML_TYPE_F32 && ggml_is_contiguous_rows(count)));
    GGML_ASSERT(!count || (count->ne[0] <= k->ne[1] && count->ne[1]*count->ne[2] == q->ne[3]));
    GGML_ASSERT(!sinks || (sinks->type == GGML_TYPE_F32 && ggml_nrows(sinks) == 1));
    GGML_ASSERT(!sinks || (sinks->ne[0] % q->ne[2] == 0 && q->ne[3] % (sinks->ne[0]/q->ne[2]) == 0));

    ggml_tensor * result = indexmem_op_init(
            ggml_new_tensor_4d(ctx, GGML_TYPE_F32, v->ne[0], q->ne[2], q->ne[1], q->ne[3]), INDEXMEM_OP_ATTEND);

    ggml_set_op_params_f32(result, INDEXMEM_PARAM_SCALE,   scale);
    ggml_set_op_params_f32(result, INDEXMEM_PARAM_SOFTCAP, softcap);

    result->src[0] = q;
    result->src[1] = k;
    result->src[2] = v;
    result->src[3] = mask;
    result->src[4] = count;
    result->src[5] = sinks;

    return result;
}

void ggml_indexmem_attend_alone(ggml_tensor * op, int64_t n_entries, int64_t n_seq) {
    GGML_ASSERT(n_entries > 0 && n_seq > 0);
    ggml_set_op_params_i32(op, INDEXMEM_PARAM_ALONE, (int32_t) std::min<int64_t>(n_entries, INT32_MAX));
    ggml_set_op_params_i32(op, INDEXMEM_PARAM_SEQS,  (int32_t) n_seq);
}

void ggml_indexmem_set_timer(ggml_tensor * op, int64_t * counter) {
    GGML_ASSERT(op->op == GGML_OP_INDEXMEM);
    memcpy(op->op_params + INDEXMEM_PARAM_TIMER, &counter, sizeof(counter));
}

static const indexmem_policy_info indexmem_policies[] = {
#define INDEXMEM_POLICY(name, needs_keys, n_queries, help) { #name, needs_keys, n_queries, help },
#include "policies.def"
#undef INDEXMEM_POLICY
};

static constexpr int indexmem_n_policies = sizeof(indexmem_policies)/sizeof(indexmem_policies[0]);

const indexmem_policy_info * indexmem_policy_get(int policy) {
    return policy >= 0 && policy < indexmem_n_policies ? &indexmem_policies[policy] : nullptr;
}

int indexmem_policy_find(const char * name) {
    for (int i = 0; i < indexmem_n_policies; ++i) {
        if (strcmp(indexmem_policies[i].name, name) == 0) {
            return i;
        }
    }
    return -1;
}
