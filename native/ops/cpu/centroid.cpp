#include "kernels.h"

// The centroid memory of one KV head, written by one thread.

namespace indexmem_cpu {

namespace {

// entries whose nearest slot is sought at once: each has a lane of its own, so that the sum of a distance has one order on
// every machine and nothing is added across lanes
constexpr int64_t LANES = 16;

// slots tried at once, so that the sums do not wait for each other
constexpr int64_t TRIED = 4;

struct centroid_work {
    size_t entry;  // keys and values of the entries that leave, in fp32
    size_t slot;   // the latent slot of each
    size_t lanes;  // keys of LANES entries side by side: [n_embd_k][LANES]
    size_t size;

    explicit centroid_work(const ggml_tensor * op) {
        const size_t n_embd      = op->ne[0];
        const size_t n_evict_max = op->src[4]->ne[0];

        entry = 0;
        slot  = align_up(n_evict_max*n_embd*sizeof(float));
        lanes = slot + align_up(n_evict_max*sizeof(int32_t));
        size  = lanes + align_up(op->src[2]->ne[0]*LANES*sizeof(float));
    }
};

// squared distances of LANES keys to the means of TRIED slots
inline void distances(const float * lanes, const float * const (&means)[TRIED], int64_t n, float (&sums)[TRIED][LANES]) {
    float acc[TRIED][LANES] = {};
    for (int64_t d = 0; d < n; ++d) {
        for (int64_t t = 0; t < TRIED; ++t) {
            const float m = means[t][d];
            for (int64_t l = 0; l < LANES; ++l) {
                const float x = lanes[d*LANES + l] - m;
                acc[t][l] += x*x;
            }
        }
    }
    memcpy(sums, acc, sizeof(acc));
}

// slot_of[l] for n_keys <= LANES keys: the first of the nearest slots. Keys are n_stride floats apart, means are mean(r).
template <typename F>
void nearest(const float * keys, int64_t n_keys, int64_t n_stride, int64_t n_embd, int64_t n_latent, F mean, float * lanes, int32_t * slot_of) {
    for (int64_t l = 0; l < LANES; ++l) {
        const float * key = keys + std::min(l, n_keys - 1)*n_stride; // spare lanes repeat the last one
        for (int64_t d = 0; d < n_embd; ++d) {
            lanes[d*LANES + l] = key[d];
        }
    }

    float   best [LANES];
    int32_t found[LANES] = {};
    std::fill_n(best, LANES, INFINITY);

    for (int64_t r = 0; r < n_latent; r += TRIED) {
        const float * means[TRIED];
        for (int64_t t = 0; t < TRIED; ++t) {
            means[t] = mean(std::min(r + t, n_latent - 1)); // the last one again is never nearer than itself
        }
        float sums[TRIED][LANES];
        distances(lanes, means, n_embd, sums);
        for (int64_t t = 0; t < TRIED; ++t) {
            for (int64_t l = 0; l < LANES; ++l) {
                const bool nearer = sums[t][l] < best[l];
                found[l] = nearer ? (int32_t) (r + t) : found[l];
                best [l] = nearer ? sums[t][l]        : best [l];
            }
        }
    }
    std::copy(found, found + n_keys, slot_of);
}

} // namespace

size_t centroid_work_size(const ggml_tensor * op, int n_tasks) {
    return centroid_work(op).size*n_tasks;
}

void centroid(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * count = dst->src[1];
    const ggml_tensor * k     = dst->src[2];
    const ggml_tensor * v     = dst->src[3];
    const ggml_tensor * plan  = dst->src[4];
    const ggml_tensor * ctl   = dst->src[5];

    const int64_t n_embd_k = k->ne[0];
    const int64_t n_embd   = dst->ne[0];
    const int64_t n_latent = dst->ne[1];

    const centroid_work layout(dst);
    char * work = (char *) params->wdata + params->ith*layout.size;
    float   * entries = (float   *) (work + layout.entry);
    int32_t * slot_of = (int32_t *) (work + layout.slot);
    float   * lanes   = (float   *) (work + layout.lanes);

    for (int64_t ir = params->ith; ir < dst->ne[2]*dst->ne[3]; ir += params->nth) {
        const row_index row = row_at(ir, dst->ne[2]);
        const leaving_slots evicted(plan, ctl_of(ctl, row.s), row);
        const int64_t n_evict = evicted.n;
        if (n_evict == 0) {
            continue;
        }
        char  * means = (char *) dst->data + row.h*dst->nb[2] + row.s*dst->nb[3];
        float * n     = (float *) ((char *) count->data + row.h*count->nb[1] + row.s*count->nb[2]);
        auto mean = [&](int64_t r) { return (float *) (means + r*dst->nb[1]); };

        for (int64_t i = 0; i < n_evict; ++i) {
            float * e = entries + i*n_embd;
            rows_to_f32(k, (const char *) k->data + row.h*k->nb[2] + row.s*k->nb[3], evicted.slot[i], evicted.slot[i] + 1, e);
            rows_to_f32(v, (const char *) v->data + row.h*v->nb[2] + row.s*v->nb[3], evicted.slot[i], evicted.slot[i] + 1, e + n_embd_k);
        }

        int64_t n_filled = 0; // entries that found an empty slot
        for (int64_t r = 0; r < n_latent && n_filled < n_evict; ++r) {
            if (n[r] == 0.0f) {
                memcpy(mean(r), entries + n_filled*n_embd, n_embd*sizeof(float));
                n[r] = 1.0f;
                ++n_filled;
            }
        }
        for (int64_t i = n_filled; i < n_evict; i += LANES) {
            nearest(entries + i*n_embd, std::min(LANES, n_evict - i), n_embd, n_embd_k, n_latent, mean, lanes, slot_of + i);
        }
        for (int64_t i = n_filled; i < n_evict; ++i) {
            float * m = mean(slot_of[i]);
            const float * e = entries + i*n_embd;
            const float rate = 1.0f/(n[slot_of[i]] += 1.0f);
            for (int64_t d = 0; d < n_embd; ++d) {
                m[d] += (e[d] - m[d])*rate;
            }
        }
    }
}

void bias(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * mask  = dst->src[0];
    const ggml_tensor * count = dst->src[1];

    const int64_t n_head   = count->ne[1];
    const int64_t n_latent = count->ne[0];

    for (int64_t ir = params->ith; ir < dst->ne[1]*dst->ne[3]; ir += params->nth) {
        const int64_t t = ir % dst->ne[1];
        const row_index row = row_at(ir/dst->ne[1], n_head);

        const ggml_fp16_t * src = (const ggml_fp16_t *) ((const char *) mask->data + t*mask->nb[1] + row.s*mask->nb[3]);
        ggml_fp16_t       * res = (ggml_fp16_t *) ((char *) dst->data + t*dst->nb[1] + (ir/dst->ne[1])*dst->nb[3]);
        const float       * n   = (const float *) ((const char *) count->data + row.h*count->nb[1] + row.s*count->nb[2]);

        memcpy(res + n_latent, src + n_latent, (dst->ne[0] - n_latent)*sizeof(ggml_fp16_t));
        for (int64_t r = 0; r < n_latent; ++r) {
            res[r] = GGML_CPU_FP32_TO_FP16(GGML_CPU_FP16_TO_FP32(src[r]) + std::log(n[r]));
        }
    }
}

} // namespace indexmem_cpu
