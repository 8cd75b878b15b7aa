#include "kernels.h"
#include "simd.h"
#include "vec.h"

// Keys are cut into chunks of a fixed size, so that the order of additions, and with it every bit of the result, does not
// depend on the number of threads. A task is one chunk of one KV head: its rows of K and V are read and converted once
// for all queries of the group. Each task leaves a maximum, a sum and an unnormalised output per query; after a barrier
// the chunks of each query are merged by log-sum-exp.

namespace indexmem_cpu {

namespace {

using indexmem_simd::ahead;

constexpr int64_t CHUNK = 128; // keys
constexpr int64_t TILE  = 4;   // queries of a group that share a loaded key

struct attend_shape {
    int64_t n_embd_k;
    int64_t n_embd_v;
    int64_t n_kv;
    int64_t n_tokens;
    int64_t n_group;
    int64_t n_stream; // (KV head, sequence)

    explicit attend_shape(const ggml_tensor * op) :
        n_embd_k(op->src[1]->ne[0]), n_embd_v(op->src[2]->ne[0]), n_kv(op->src[1]->ne[1]),
        n_tokens(op->src[0]->ne[1]), n_group(op->src[0]->ne[2]), n_stream(op->src[0]->ne[3]) {
    }

    int64_t n_chunks() const { return (n_kv + CHUNK - 1)/CHUNK; }
    int64_t n_rows()   const { return n_tokens*n_group; } // queries of a stream

    // floats: maximum, sum, output
    int64_t partial() const { return 2 + n_embd_v; }

    size_t partials_size() const { return align_up(n_stream*n_rows()*n_chunks()*partial()*sizeof(float)); }

    size_t thread_size() const {
        return align_up(CHUNK*n_embd_k*sizeof(float)) + align_up(CHUNK*n_embd_v*sizeof(float)) + align_up(CHUNK*sizeof(float)) + align_up(TILE*CHUNK*sizeof(float));
    }
};

float * partial_of(const attend_shape & sh, float * partials, int64_t stream, int64_t row, int64_t chunk) {
    return partials + ((stream*sh.n_rows() + row)*sh.n_chunks() + chunk)*sh.partial();
}

bool seen_by_any(const attend_shape & sh, const ggml_tensor * mask, int64_t stream, int64_t key) {
    static const ggml_fp16_t hidden = ggml_fp32_to_fp16(-INFINITY);
    for (int64_t t = 0; t < sh.n_tokens; ++t) {
        const char * row = (const char *) mask->data + t*mask->nb[1] + (stream % mask->ne[3])*mask->nb[3];
        if (((const ggml_fp16_t *) row)[key] != hidden) {
            return true;
        }
    }
    return false;
}

// R queries of one token against n keys; what a key says to a query it is hidden from is overruled by its bias
template <int R>
void attend_tile(const attend_shape & sh, const float * const * q, const float * k_rows, const float * v_rows, const float * bias,
        int64_t n, float scale, float softcap, float * logits, float * const * parts, const ahead & next_k, const ahead & next_v) {
    indexmem_simd::dots<R>(q, k_rows, n, sh.n_embd_k, logits, CHUNK, next_k);

    float * out[R];
    for (int r = 0; r < R; ++r) {
        float * l = logits + r*CHUNK;
        float max = -INFINITY;
        for (int64_t i = 0; i < n; ++i) {
            l[i] *= scale;
        }
        if (softcap != 0.0f) {
            for (int64_t i = 0; i < n; ++i) {
                l[i] = softcap*std::tanh(l[i]/softcap);
            }
        }
        for (int64_t i = 0; i < n; ++i) {
            l[i] += bias[i];
        }
        ggml_vec_max_f32((int) n, &max, l);

        out[r] = parts[r] + 2;
        std::fill(out[r], out[r] + sh.n_embd_v, 0.0f);
        parts[r][0] = max;
        parts[r][1] = max == -INFINITY ? 0.0f : (float) ggml_vec_soft_max_f32((int) n, l, l, max);
        if (max == -INFINITY) {
            std::fill(l, l + n, 0.0f);
        }
    }
    indexmem_simd::accumulate<R>(logits, CHUNK, v_rows, n, sh.n_embd_v, out, next_v);
}

// rows of K or V of a task's chunk, if it is a whole one
ahead rows_of_task(const attend_shape & sh, const ggml_tensor * t, int64_t task) {
    const int64_t stream = task/sh.n_chunks();
    const int64_t chunk  = task % sh.n_chunks();
    if (stream >= sh.n_stream || (chunk + 1)*CHUNK > sh.n_kv || t->nb[1] != ggml_row_size(t->type, t->ne[0])) {
        return {};
    }
    return { (const char *) t->data + chunk*CHUNK*t->nb[1] + stream*t->nb[3], t->nb[1] };
}

void attend_chunk(const attend_shape & sh, const ggml_tensor * dst, int64_t task, int64_t task_next, char * work, float * partials) {
    const int64_t stream = task/sh.n_chunks();
    const int64_t chunk  = task % sh.n_chunks();

    const ggml_tensor * q    = dst->src[0];
    const ggml_tensor * k    = dst->src[1];
    const ggml_tensor * v    = dst->src[2];
    const ggml_tensor * mask  = dst->src[3];
    const ggml_tensor * count = dst->src[4];

    const float scale   = ggml_get_op_params_f32(dst, INDEXMEM_PARAM_SCALE);
    const float softcap = ggml_get_op_params_f32(dst, INDEXMEM_PARAM_SOFTCAP);

    float * k_rows = (float *) work;
    float * v_rows = (float *) (work + align_up(CHUNK*sh.n_embd_k*sizeof(float)));
    float * bias   = (float *) ((char *) v_rows + align_up(CHUNK*sh.n_embd_v*sizeof(float)));
    float * logits = (float *) ((char *) bias   + align_up(CHUNK*sizeof(float)));

    const int64_t i0 = chunk*CHUNK;
    const int64_t n  = std::min(CHUNK, sh.n_kv - i0);

    // entries in each latent slot
    const int64_t n_latent = count ? count->ne[0] : 0;
    const float * n_in = !count ? nullptr : (const float *) ((const char *) count->data
            + (stream % count->ne[1])*count->nb[1] + (stream/count->ne[1])*count->nb[2]);

    // K and V of the thread's next chunk are on their way while this one is worked on
    ahead next_k = rows_of_task(sh, k, task_next);
    ahead next_v = rows_of_task(sh, v, task_next);

    int64_t n_converted = 0; // leading rows of k_rows and v_rows that are filled

    for (int64_t t = 0; t < sh.n_tokens; ++t) {
        const char * mask_row = (const char *) mask->data + t*mask->nb[1] + (stream % mask->ne[3])*mask->nb[3];
        ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) mask_row + i0, bias, n);
        for (int64_t i = i0; i < std::min(i0 + n, n_latent); ++i) {
            bias[i - i0] += std::log(n_in[i]); // -inf if it is empty
        }

        // most masks end with -inf: slots not in use, and the future
        int64_t n_visible = n;
        while (n_visible > 0 && bias[n_visible - 1] == -INFINITY) {
            --n_visible;
        }

        if (n_converted < n_visible) {
            rows_to_f32(k, (const char *) k->data + stream*k->nb[3], i0 + n_converted, i0 + n_visible, k_rows + n_converted*sh.n_embd_k);
            rows_to_f32(v, (const char *) v->data + stream*v->nb[3], i0 + n_converted, i0 + n_visible, v_rows + n_converted*sh.n_embd_v);
            for (; n_converted < n_visible; ++n_converted) {
                const bool empty = i0 + n_converted < n_latent && n_in[i0 + n_converted] == 0.0f;
                if (empty || (bias[n_converted] == -INFINITY && !seen_by_any(sh, mask, stream, i0 + n_converted))) {
                    // may hold anything, NaN included
                    std::fill_n(k_rows + n_converted*sh.n_embd_k, sh.n_embd_k, 0.0f);
                    std::fill_n(v_rows + n_converted*sh.n_embd_v, sh.n_embd_v, 0.0f);
                }
            }
        }

        for (int64_t g = 0; g < sh.n_group; g += TILE) {
            const int64_t n_rows = std::min(TILE, sh.n_group - g);

            const float * q_rows[TILE];
            float       * parts [TILE];
            for (int64_t r = 0; r < n_rows; ++r) {
                q_rows[r] = (const float *) ((const char *) q->data + t*q->nb[1] + (g + r)*q->nb[2] + stream*q->nb[3]);
                parts [r] = partial_of(sh, partials, stream, (g + r)*sh.n_tokens + t, chunk);
            }
            switch (n_rows) {
                case 1: attend_tile<1>(sh, q_rows, k_rows, v_rows, bias, n_visible, scale, softcap, logits, parts, next_k, next_v); break;
                case 2: attend_tile<2>(sh, q_rows, k_rows, v_rows, bias, n_visible, scale, softcap, logits, parts, next_k, next_v); break;
                case 3: attend_tile<3>(sh, q_rows, k_rows, v_rows, bias, n_visible, scale, softcap, logits, parts, next_k, next_v); break;
                case 4: attend_tile<4>(sh, q_rows, k_rows, v_rows, bias, n_visible, scale, softcap, logits, parts, next_k, next_v); break;
            }
            next_k = next_v = {}; // once is enough
        }
    }
}

void merge_chunks(const attend_shape & sh, ggml_tensor * dst, int64_t stream, int64_t row, float * partials) {
    float * out = (float *) ((char *) dst->data
            + (row/sh.n_tokens)*dst->nb[1] + (row % sh.n_tokens)*dst->nb[2] + stream*dst->nb[3]);
    std::fill(out, out + sh.n_embd_v, 0.0f);

    float max = -INFINITY;
    for (int64_t c = 0; c < sh.n_chunks(); ++c) {
        max = std::max(max, partial_of(sh, partials, stream, row, c)[0]);
    }
    if (max == -INFINITY) {
        return; // sees nothing
    }

    float sum = 0.0f;
    for (int64_t c = 0; c < sh.n_chunks(); ++c) {
        const float * part = partial_of(sh, partials, stream, row, c);
        if (part[0] == -INFINITY) {
            continue;
        }
        const float weight = std::exp(part[0] - max);
        sum += weight*part[1];
        ggml_vec_mad_f32((int) sh.n_embd_v, out, part + 2, weight);
    }
    ggml_vec_scale_f32((int) sh.n_embd_v, out, 1.0f/sum);
}

} // namespace

size_t attend_work_size(const ggml_tensor * op, int n_tasks) {
    const attend_shape sh(op);
    return sh.partials_size() + n_tasks*sh.thread_size();
}

void attend(const ggml_compute_params * params, ggml_tensor * dst) {
    const attend_shape sh(dst);

    float * partials = (float *) params->wdata;
    char  * work     = (char *) params->wdata + sh.partials_size() + params->ith*sh.thread_size();

    for (int64_t task = params->ith; task < sh.n_stream*sh.n_chunks(); task += params->nth) {
        attend_chunk(sh, dst, task, task + params->nth, work, partials);
    }

    ggml_barrier(params->threadpool);

    for (int64_t task = params->ith; task < sh.n_stream*sh.n_rows(); task += params->nth) {
        merge_chunks(sh, dst, task/sh.n_rows(), task % sh.n_rows(), partials);
    }
}

} // namespace indexmem_cpu
