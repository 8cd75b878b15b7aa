#include "kernels.h"
#include "vec.h"

// Keys are cut into chunks of a fixed size, so that the order of additions, and with it every bit of the result, does not
// depend on the number of threads. A task is one chunk of one KV head: its rows of K and V are read and converted once
// for all queries of the group. Each task leaves a maximum, a sum and an unnormalised output per query; after a barrier
// the chunks of each query are merged by log-sum-exp.

namespace indexmem_cpu {

namespace {

constexpr int64_t CHUNK = 128; // keys

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
        return align_up(CHUNK*n_embd_k*sizeof(float)) + align_up(CHUNK*n_embd_v*sizeof(float)) + 2*align_up(CHUNK*sizeof(float));
    }
};

float * partial_of(const attend_shape & sh, float * partials, int64_t stream, int64_t row, int64_t chunk) {
    return partials + ((stream*sh.n_rows() + row)*sh.n_chunks() + chunk)*sh.partial();
}

void attend_chunk(const attend_shape & sh, const ggml_tensor * dst, int64_t stream, int64_t chunk, char * work, float * partials) {
    const ggml_tensor * q    = dst->src[0];
    const ggml_tensor * k    = dst->src[1];
    const ggml_tensor * v    = dst->src[2];
    const ggml_tensor * mask = dst->src[3];

    const float scale   = ggml_get_op_params_f32(dst, INDEXMEM_PARAM_SCALE);
    const float softcap = ggml_get_op_params_f32(dst, INDEXMEM_PARAM_SOFTCAP);

    float * k_rows = (float *) work;
    float * v_rows = (float *) (work + align_up(CHUNK*sh.n_embd_k*sizeof(float)));
    float * bias   = (float *) ((char *) v_rows + align_up(CHUNK*sh.n_embd_v*sizeof(float)));
    float * logits = (float *) ((char *) bias   + align_up(CHUNK*sizeof(float)));

    const int64_t i0 = chunk*CHUNK;
    const int64_t n  = std::min(CHUNK, sh.n_kv - i0);

    int64_t n_converted = 0; // leading rows of k_rows and v_rows that are filled

    for (int64_t t = 0; t < sh.n_tokens; ++t) {
        const char * mask_row = (const char *) mask->data + t*mask->nb[1] + (stream % mask->ne[3])*mask->nb[3];
        ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) mask_row + i0, bias, n);

        // most masks end with -inf: slots not in use, and the future
        int64_t n_visible = n;
        while (n_visible > 0 && bias[n_visible - 1] == -INFINITY) {
            --n_visible;
        }

        for (; n_converted < n_visible; ++n_converted) {
            const int64_t i = i0 + n_converted;
            row_to_f32(k->type, (const char *) k->data + i*k->nb[1] + stream*k->nb[3], k_rows + n_converted*sh.n_embd_k, sh.n_embd_k);
            row_to_f32(v->type, (const char *) v->data + i*v->nb[1] + stream*v->nb[3], v_rows + n_converted*sh.n_embd_v, sh.n_embd_v);
        }

        for (int64_t g = 0; g < sh.n_group; ++g) {
            const float * q_row = (const float *) ((const char *) q->data + t*q->nb[1] + g*q->nb[2] + stream*q->nb[3]);

            float * part = partial_of(sh, partials, stream, g*sh.n_tokens + t, chunk);
            float * out  = part + 2;

            float max = -INFINITY;
            for (int64_t i = 0; i < n_visible; ++i) {
                if (bias[i] == -INFINITY) {
                    logits[i] = -INFINITY; // its key may hold anything
                    continue;
                }
                float dot;
                ggml_vec_dot_f32((int) sh.n_embd_k, &dot, 0, q_row, 0, k_rows + i*sh.n_embd_k, 0, 1);
                dot *= scale;
                if (softcap != 0.0f) {
                    dot = softcap*std::tanh(dot/softcap);
                }
                logits[i] = dot + bias[i];
                max = std::max(max, logits[i]);
            }

            part[0] = max;
            part[1] = 0.0f;
            if (max == -INFINITY) {
                continue;
            }
            part[1] = (float) ggml_vec_soft_max_f32((int) n_visible, logits, logits, max);

            std::fill(out, out + sh.n_embd_v, 0.0f);
            for (int64_t i = 0; i < n_visible; ++i) {
                if (logits[i] != 0.0f) {
                    ggml_vec_mad_f32((int) sh.n_embd_v, out, v_rows + i*sh.n_embd_v, logits[i]);
                }
            }
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
        attend_chunk(sh, dst, task/sh.n_chunks(), task % sh.n_chunks(), work, partials);
    }

    ggml_barrier(params->threadpool);

    for (int64_t task = params->ith; task < sh.n_stream*sh.n_rows(); task += params->nth) {
        merge_chunks(sh, dst, task/sh.n_rows(), task % sh.n_rows(), partials);
    }
}

} // namespace indexmem_cpu
