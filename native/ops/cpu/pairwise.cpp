#include "kernels.h"

// Slots are worked on in blocks whose keys are transposed, so that the innermost loop runs over slots: a value of a query
// is multiplied with one value of every key of the block. A block belongs to one thread, hence the same bits with any
// number of threads.

namespace indexmem_cpu {

static constexpr int64_t BLOCK = 64; // slots

size_t pairwise_work_size(const ggml_tensor * op, int n_tasks) {
    return align_up(op->src[0]->ne[0]*BLOCK*sizeof(float))*n_tasks;
}

void pairwise(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * keys    = dst->src[0];
    const ggml_tensor * queries = dst->src[1];
    const ggml_tensor * ctl     = dst->src[2];

    const int64_t n_embd    = keys->ne[0];
    const int64_t n_ring    = queries->ne[1];
    const int64_t n_head    = ggml_get_op_params_i32(dst, INDEXMEM_PARAM_HEADS);
    const int32_t n_queries = ggml_get_op_params_i32(dst, INDEXMEM_PARAM_QUERIES);
    const bool    maximum   = ggml_get_op_params_i32(dst, INDEXMEM_PARAM_REDUCE) == INDEXMEM_REDUCE_MAX;

    float * kt = (float *) ((char *) params->wdata + params->ith*align_up(n_embd*BLOCK*sizeof(float))); // [n_embd][BLOCK]

    for (int64_t s = 0; s < keys->ne[3]; ++s) {
        const int32_t * c = ctl_of(ctl, s);
        if (c[INDEXMEM_CTL_N_EVICT] == 0) {
            continue;
        }
        const int64_t n_used = c[INDEXMEM_CTL_N_USED];
        const int32_t p1     = c[INDEXMEM_CTL_POS_LAST] + 1;
        const int32_t p0     = std::max(0, p1 - n_queries);
        const float   weight = maximum ? 1.0f : 1.0f/(float) (p1 - p0);

        for (int64_t i0 = params->ith*BLOCK; i0 < n_used; i0 += params->nth*BLOCK) {
            const int64_t n = std::min(BLOCK, n_used - i0);

            for (int64_t l = 0; l < BLOCK; ++l) {
                const float * k = (const float *) ((const char *) keys->data + (i0 + std::min(l, n - 1))*keys->nb[1] + s*keys->nb[3]);
                for (int64_t d = 0; d < n_embd; ++d) {
                    kt[d*BLOCK + l] = k[d];
                }
            }

            float total[BLOCK];
            std::fill(total, total + BLOCK, maximum ? -INFINITY : 0.0f);

            for (int32_t p = p0; p < p1; ++p) {
                const float * q = (const float *) ((const char *) queries->data + (p % n_ring)*queries->nb[1] + s*queries->nb[3]);
                const float * w = q + n_head*n_embd;

                float score[BLOCK] = {};
                for (int64_t h = 0; h < n_head; ++h) {
                    float dot[BLOCK] = {};
                    for (int64_t d = 0; d < n_embd; ++d) {
                        const float   qd = q[h*n_embd + d];
                        const float * kd = kt + d*BLOCK;
                        for (int64_t l = 0; l < BLOCK; ++l) {
                            dot[l] += qd*kd[l];
                        }
                    }
                    for (int64_t l = 0; l < BLOCK; ++l) {
                        score[l] += w[h]*std::max(dot[l], 0.0f);
                    }
                }
                for (int64_t l = 0; l < BLOCK; ++l) {
                    total[l] = maximum ? std::max(total[l], score[l]) : total[l] + score[l];
                }
            }

            float * res = (float *) ((char *) dst->data + s*dst->nb[3]) + i0;
            for (int64_t l = 0; l < n; ++l) {
                res[l] = total[l]*weight;
            }
        }
    }
}

} // namespace indexmem_cpu
