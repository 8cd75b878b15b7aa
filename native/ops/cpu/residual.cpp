#include "kernels.h"
#include "vec.h"

// The residual memory of one KV head, written by one thread: first the features of all entries that leave, then one row of
// the state after the other, so that each is read and written once.

namespace indexmem_cpu {

namespace {

struct residual_work {
    size_t feature; // [n_evict_max][n_feature]
    size_t value;   // [n_evict_max][n_embd_v]
    size_t key;     // [n_embd_k]
    size_t size;

    explicit residual_work(const ggml_tensor * op) {
        const size_t n_evict_max = op->src[4]->ne[0];

        feature = 0;
        value   = feature + align_up(n_evict_max*op->ne[0]*sizeof(float));
        key     = value   + align_up(n_evict_max*op->src[3]->ne[0]*sizeof(float));
        size    = key     + align_up(op->src[2]->ne[0]*sizeof(float));
    }
};

} // namespace

size_t residual_work_size(const ggml_tensor * op, int n_tasks) {
    return residual_work(op).size*n_tasks;
}

void residual(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * phi  = dst->src[1];
    const ggml_tensor * k    = dst->src[2];
    const ggml_tensor * v    = dst->src[3];
    const ggml_tensor * plan = dst->src[4];
    const ggml_tensor * ctl  = dst->src[5];

    const int64_t n_embd_k  = k->ne[0];
    const int64_t n_embd_v  = v->ne[0];
    const int64_t n_feature = dst->ne[0];

    const float rate  = ggml_get_op_params_f32(dst, INDEXMEM_PARAM_RATE);
    const float decay = ggml_get_op_params_f32(dst, INDEXMEM_PARAM_DECAY);

    const residual_work layout(dst);
    char * work = (char *) params->wdata + params->ith*layout.size;
    float * features = (float *) (work + layout.feature);
    float * values   = (float *) (work + layout.value);
    float * key      = (float *) (work + layout.key);

    for (int64_t ir = params->ith; ir < dst->ne[2]*dst->ne[3]; ir += params->nth) {
        const row_index row = row_at(ir, dst->ne[2]);

        const leaving_slots evicted(plan, ctl_of(ctl, row.s), row);
        const int64_t n_evict = evicted.n;
        if (n_evict == 0) {
            continue;
        }
        for (int64_t i = 0; i < n_evict; ++i) {
            rows_to_f32(k, (const char *) k->data + row.h*k->nb[2] + row.s*k->nb[3], evicted.slot[i], evicted.slot[i] + 1, key);
            rows_to_f32(v, (const char *) v->data + row.h*v->nb[2] + row.s*v->nb[3], evicted.slot[i], evicted.slot[i] + 1, values + i*n_embd_v);
            for (int64_t j = 0; j < n_feature; ++j) {
                ggml_vec_dot_f32((int) n_embd_k, features + i*n_feature + j, 0, (float *) phi->data + j*n_embd_k, 0, key, 0, 1);
            }
        }
        char * state = (char *) dst->data + row.h*dst->nb[2] + row.s*dst->nb[3];
        for (int64_t d = 0; d <= n_embd_v; ++d) {
            float * s = (float *) (state + d*dst->nb[1]);
            ggml_vec_scale_f32((int) n_feature, s, decay);
            for (int64_t i = 0; i < n_evict; ++i) {
                const float * f = features + i*n_feature;
                if (d < n_embd_v) {
                    ggml_vec_mad_f32((int) n_feature, s, f, rate*values[i*n_embd_v + d]);
                    continue;
                }
                for (int64_t j = 0; j < n_feature; ++j) {
                    s[j] += rate*f[j]*f[j];
                }
            }
        }
    }
}

} // namespace indexmem_cpu
