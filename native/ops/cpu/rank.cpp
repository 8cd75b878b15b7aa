#include "kernels.h"
#include "policy.h"

namespace indexmem_cpu {

namespace {

struct rank_work {
    size_t pos;     // offsets into the work area of a thread
    size_t scratch;
    size_t k;
    size_t size;

    // entries: keys, or the terms of an indexer
    rank_work(const ggml_tensor * entries, bool needs_keys) {
        const size_t n_slots = entries->ne[1];
        const size_t n_embd  = entries->ne[0];

        pos     = 0;
        scratch = align_up(n_slots*sizeof(int32_t));
        k       = scratch + align_up((2*n_slots + n_embd)*sizeof(float));
        size    = k + (needs_keys ? align_up(n_slots*n_embd*sizeof(float)) : 0);
    }
};

const indexmem_rank_t rank_functions[] = {
#define INDEXMEM_POLICY(name, needs_keys, n_queries, help) indexmem_rank_##name,
#include "policies.def"
#undef INDEXMEM_POLICY
};

} // namespace

size_t rank_work_size(const ggml_tensor * op, int n_tasks) {
    const auto * info = indexmem_policy_get(ggml_get_op_params_i32(op, INDEXMEM_PARAM_POLICY));
    return rank_work(op->src[0], info->needs_keys).size*n_tasks;
}

void rank(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * k   = dst->src[0]; // or terms
    const ggml_tensor * pos = dst->src[1];
    const ggml_tensor * ctl = dst->src[2];
    const ggml_tensor * q   = dst->src[3];
    const ggml_tensor * sinks = dst->src[4];

    const int policy = ggml_get_op_params_i32(dst, INDEXMEM_PARAM_POLICY);
    const indexmem_policy_info * info = indexmem_policy_get(policy);

    const rank_work layout(k, info->needs_keys);
    char * work = (char *) params->wdata + params->ith*layout.size;

    indexmem_rank_view view = {};
    view.n_embd    = k->ne[0];
    view.n_queries = info->n_queries;
    view.scale     = ggml_get_op_params_f32(dst, INDEXMEM_PARAM_SCALE);
    view.softcap   = ggml_get_op_params_f32(dst, INDEXMEM_PARAM_SOFTCAP);
    view.il        = ggml_get_op_params_i32(dst, INDEXMEM_PARAM_IL);
    view.scratch   = (float *) (work + layout.scratch);
    memcpy(&view.seed, dst->op_params + INDEXMEM_PARAM_SEED, sizeof(view.seed));

    int32_t * pos_row = (int32_t *) (work + layout.pos);
    float   * k_row   = (float   *) (work + layout.k);

    const bool has_terms = policy == indexmem_policy_find("indexer");
    if (has_terms) {
        view.n_terms   = (int32_t) k->ne[0];
        view.pos_slope = ggml_get_op_params_f32(dst, INDEXMEM_PARAM_SLOPE);
        view.age_scale = ggml_get_op_params_f32(dst, INDEXMEM_PARAM_AGE);
        view.nb_term   = k->nb[1];
    }

    for (int64_t ir = params->ith; ir < dst->ne[1]*dst->ne[2]; ir += params->nth) {
        const row_index row = row_at(ir, dst->ne[1]);
        const int32_t * c = ctl_of(ctl, row.s);
        if (c[INDEXMEM_CTL_N_EVICT] == 0) {
            continue;
        }

        view.n        = c[INDEXMEM_CTL_N_USED];
        view.pos_last = c[INDEXMEM_CTL_POS_LAST];
        view.head     = (int32_t) row.h;
        GGML_ASSERT(view.n <= k->ne[1]);

        const int32_t * pos_src = pos_of(pos, row);
        for (int64_t i = 0; i < view.n; ++i) {
            pos_row[i] = pos_at(pos_src, c, i);
        }
        view.pos = pos_row;

        if (has_terms) {
            view.terms = (const char *) k->data + (row.h % k->ne[2])*k->nb[2] + row.s*k->nb[3];
        }
        if (info->needs_keys) {
            const char * k_src = (const char *) k->data + row.h*k->nb[2] + row.s*k->nb[3];
            rows_to_f32(k, k_src, 0, view.n, k_row);
            view.k = k_row;
        }
        if (q) {
            view.n_group = q->ne[2]/k->ne[2];
            view.n_ring  = q->ne[1];
            view.nb_ring = q->nb[1];
            view.nb_head = q->nb[2];
            view.q       = (const char *) q->data + row.h*view.n_group*q->nb[2] + row.s*q->nb[3];
            view.sinks   = sinks ? (const float *) sinks->data + row.h*view.n_group : nullptr;
        }

        rank_functions[policy](view, (float *) ((char *) dst->data + row.h*dst->nb[1] + row.s*dst->nb[2]));
    }
}

} // namespace indexmem_cpu
