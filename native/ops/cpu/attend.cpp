#include "attend-many.h"
#include "attend-work.h"
#include "hand-out.h"

// Attention is cut into tasks by shape and mask alone, so that the order of additions, and with it every bit of the result,
// does not depend on the number of threads:
//
//   stream  one KV head of one sequence
//   block   up to ROWS of its queries, those of a token next to each other (row = token*n_group + head of the group)
//   span    some chunks of its keys; so many spans that there is enough to do for many threads
//
// Who does a task matters to nobody: where there is much to do they are handed out while it is done, else each thread has
// its part, because handing out takes a barrier more.
//
// A task works through the chunks of its span with a running maximum, and leaves a maximum, a sum and an unnormalised output
// per query; after a barrier the spans of each query are merged by log-sum-exp.
//
// With few queries, K and V are converted in registers, or beforehand where nobody may look at a key that lies between others
// (it may hold NaN). With many, a chunk is converted to fp32 beforehand, its keys transposed, and the two products and what
// is between them go over all queries of the block one after the other. That adds in another order, so the tokens of a batch of
// drafts take the first way, however many they are: each gets the bits that it would get if it came alone.

namespace indexmem_cpu {

namespace {

using indexmem_simd::TILE;
using indexmem_simd::WIDTH;

int64_t part_of(const attend_shape & sh, int64_t stream, int64_t block, int64_t span) {
    return ((stream*sh.n_blocks + block)*sh.n_spans + span)*sh.n_rows_block;
}

const ggml_fp16_t * mask_row(const ggml_tensor * mask, int64_t token, int64_t stream) {
    return (const ggml_fp16_t *) ((const char *) mask->data + token*mask->nb[1] + (stream % mask->ne[3])*mask->nb[3]);
}

// most masks end with -inf: slots not in use, and the future
int64_t find_visible(const attend_shape & sh, const ggml_tensor * mask, int64_t stream, int64_t block) {
    constexpr ggml_fp16_t hidden = 0xFC00; // -inf
    constexpr int64_t     STEP   = 32;

    int64_t res = 0;
    for (int64_t t = block*ROWS/sh.n_group; t < sh.n_tokens && t*sh.n_group < (block + 1)*ROWS; ++t) {
        const ggml_fp16_t * row = mask_row(mask, t, stream);
        int64_t n = sh.n_kv;
        for (; n - STEP >= res; n -= STEP) {
            uint16_t differs = 0;
            for (int64_t i = n - STEP; i < n; ++i) {
                differs |= row[i] ^ hidden;
            }
            if (differs) {
                break;
            }
        }
        while (n > res && row[n - 1] == hidden) {
            --n;
        }
        res = std::max(res, n);
    }
    return res;
}

// The biases of the block's tokens [t0, t1) for keys [i0, i0 + n). Returns how many keys there are up to the last that
// anybody sees, and in `holes` whether nobody sees one of them.
int64_t find_biases(const ggml_tensor * op, const attend_work & work, int64_t stream,
        int64_t t0, int64_t t1, int64_t i0, int64_t n, bool & holes) {
    const ggml_tensor * count = op->src[4];

    const int64_t n_latent = count ? std::clamp<int64_t>(count->ne[0] - i0, 0, n) : 0;
    if (n_latent > 0) {
        const float * n_in = (const float *) ((const char *) count->data
                + (stream % count->ne[1])*count->nb[1] + (stream/count->ne[1])*count->nb[2]) + i0;
        for (int64_t i = 0; i < n_latent; ++i) {
            work.logs[i] = std::log(n_in[i]); // -inf if the slot is empty
        }
    }
    std::fill(work.top, work.top + CHUNK, -INFINITY);
    for (int64_t t = t0; t < t1; ++t) {
        float * bias = work.bias + (t - t0)*CHUNK;
        ggml_cpu_fp16_to_fp32(mask_row(op->src[3], t, stream) + i0, bias, n);
        std::fill(bias + n, bias + CHUNK, -INFINITY);
        for (int64_t i = 0; i < n_latent; ++i) {
            bias[i] += work.logs[i];
        }
        for (int64_t i = 0; i < CHUNK; i += WIDTH) {
            indexmem_simd::store(work.top + i, indexmem_simd::max(indexmem_simd::load(work.top + i), indexmem_simd::load(bias + i)));
        }
    }
    while (n > 0 && work.top[n - 1] == -INFINITY) {
        --n;
    }
    int any = 0;
    for (int64_t i = 0; i < n; ++i) {
        any |= work.top[i] == -INFINITY;
    }
    holes = any;
    return n;
}

attend_rows rows_of(const ggml_tensor * t, int64_t stream, int64_t i0) {
    return { (const char *) t->data + i0*t->nb[1] + stream*t->nb[3], t->nb[1] };
}

// n rows of a cache tensor as fp32, zeros where nobody looks
attend_rows convert(const ggml_tensor * t, const attend_rows & src, int64_t n, int64_t wide, const float * top, float * dst) {
    const int64_t n_embd = t->ne[0];

    bool done = wide == n_embd && attend_with(t->type, [&](auto from) { attend_convert<decltype(from)>(src, n, wide, top, dst); });
    for (int64_t i = 0; i < n && !done; ++i) {
        float * row = dst + i*wide;
        if (top[i] == -INFINITY) {
            std::fill(row, row + wide, 0.0f);
            continue;
        }
        to_f32(t->type, src.row(i), row, n_embd);
        std::fill(row + n_embd, row + wide, 0.0f);
    }
    return { (const char *) dst, wide*sizeof(float) };
}

// Logits of a query to weights, with a maximum that is at least `stat.max`; stat and out follow it.
void soften(float * l, const float * bias, int64_t n, float scale, float softcap, attend_stat & stat, float * out, int64_t wide_v) {
    using namespace indexmem_simd;

    if (softcap != 0.0f) {
        attend_cap(l, n, scale, softcap);
        scale = 1.0f;
    }
    // beyond n biases are -inf
    vec top = set1(-INFINITY);
    for (int64_t i = 0; i < n; i += WIDTH) {
        const vec x = biased(mul(load(l + i), set1(scale)), load(bias + i));
        store(l + i, x);
        top = max(top, x);
    }
    const float max_new = std::max(stat.max, max_of(top));
    if (max_new == -INFINITY) {
        std::fill(l, l + n, 0.0f);
        return;
    }
    if (stat.max != max_new) {
        if (stat.max != -INFINITY) {
            const float shrink = std::exp(stat.max - max_new);
            stat.sum *= shrink;
            ggml_vec_scale_f32((int) wide_v, out, shrink);
        }
        stat.max = max_new;
    }
    vec total = zero();
    for (int64_t i = 0; i < n; i += WIDTH) {
        const vec x = indexmem_simd::exp(add(load(l + i), set1(-max_new)));
        store(l + i, x);
        total = add(total, x);
    }
    stat.sum += sum(total);
}

// what one task works on
struct attend_task {
    const attend_shape & sh;
    const ggml_tensor  * op;
    const attend_work  & work;

    int64_t stream;
    int64_t r0; // queries
    int64_t r1;
    int64_t t0; // their tokens
    int64_t t1;

    attend_stat * stats;
    float       * parts;

    float scale;
    float softcap;

    attend_task(const attend_shape & sh, const ggml_tensor * op, const attend_work & work, int64_t stream, int64_t block, int64_t span) :
        sh(sh), op(op), work(work), stream(stream),
        r0(block*ROWS), r1(std::min(r0 + ROWS, sh.n_rows)), t0(r0/sh.n_group), t1((r1 - 1)/sh.n_group + 1),
        stats(work.stats + part_of(sh, stream, block, span)), parts(work.parts + part_of(sh, stream, block, span)*sh.wide_v),
        scale(ggml_get_op_params_f32(op, INDEXMEM_PARAM_SCALE)), softcap(ggml_get_op_params_f32(op, INDEXMEM_PARAM_SOFTCAP)) {
        std::fill(stats, stats + (r1 - r0), attend_stat{ -INFINITY, 0.0f });
        std::fill(parts, parts + (r1 - r0)*sh.wide_v, 0.0f);
    }

    const float * query(int64_t r) const {
        const ggml_tensor * q = op->src[0];
        return (const float *) ((const char *) q->data + (r/sh.n_group)*q->nb[1] + (r % sh.n_group)*q->nb[2] + stream*q->nb[3]);
    }

    float * out(int64_t r) const { return parts + (r - r0)*sh.wide_v; }

    void soften(float * logits, int64_t r, int64_t n) const {
        const float * bias = work.bias + (r/sh.n_group - t0)*CHUNK;
        indexmem_cpu::soften(logits, bias, n, scale, softcap, stats[r - r0], out(r), sh.wide_v);
    }
};

// n keys from i0 on, the last of which somebody sees; what comes next of K and V is fetched meanwhile
void attend_few(const attend_task & task, int64_t i0, int64_t n, bool holes, attend_ahead next_k, attend_ahead next_v) {
    const attend_shape & sh   = task.sh;
    const attend_work  & work = task.work;
    const ggml_tensor  * k    = task.op->src[1];
    const ggml_tensor  * v    = task.op->src[2];

    const attend_kernels * fk = !holes && sh.wide_k == sh.n_embd_k ? attend_kernels_of(k->type) : nullptr;
    const attend_kernels * fv = !holes && sh.wide_v == sh.n_embd_v ? attend_kernels_of(v->type) : nullptr;

    attend_rows k_rows = rows_of(k, task.stream, i0);
    attend_rows v_rows = rows_of(v, task.stream, i0);
    k_rows = fk ? k_rows : convert(k, k_rows, n, sh.wide_k, work.top, work.k);
    v_rows = fv ? v_rows : convert(v, v_rows, n, sh.wide_v, work.top, work.v);
    fk = fk ? fk : attend_kernels_of(GGML_TYPE_F32);
    fv = fv ? fv : attend_kernels_of(GGML_TYPE_F32);

    for (int64_t r = task.r0; r < task.r1; r += TILE) {
        const int n_tile = (int) std::min<int64_t>(TILE, task.r1 - r);

        const float * q_rows[TILE];
        float       * out   [TILE];
        for (int i = 0; i < n_tile; ++i) {
            q_rows[i] = task.query(r + i);
            if (sh.wide_k != sh.n_embd_k) {
                float * wide = work.q + i*sh.wide_k;
                std::copy(q_rows[i], q_rows[i] + sh.n_embd_k, wide);
                std::fill(wide + sh.n_embd_k, wide + sh.wide_k, 0.0f);
                q_rows[i] = wide;
            }
            out[i] = task.out(r + i);
        }
        fk->dots[n_tile](q_rows, k_rows, n, sh.wide_k, work.logits, next_k);
        for (int i = 0; i < n_tile; ++i) {
            task.soften(work.logits + i*CHUNK, r + i, n);
        }
        fv->accumulate[n_tile](work.logits, v_rows, n, sh.wide_v, out, next_v);
        next_k = next_v = {}; // once is enough
    }
}

void attend_many(const attend_task & task, int64_t i0, int64_t n, const attend_ahead & next_k, const attend_ahead & next_v) {
    using indexmem_simd::MANY;

    const attend_shape & sh   = task.sh;
    const attend_work  & work = task.work;
    const ggml_tensor  * k    = task.op->src[1];
    const ggml_tensor  * v    = task.op->src[2];

    const attend_rows k_rows = rows_of(k, task.stream, i0);
    const auto columns = [&](auto from) { attend_convert_columns<decltype(from)>(k_rows, n, sh.wide_k, work.top, work.k_many); };
    if (sh.wide_k != sh.n_embd_k || !attend_with(k->type, columns)) {
        const attend_rows wide = convert(k, k_rows, n, sh.wide_k, work.top, work.k);
        attend_convert_columns<indexmem_simd::from_f32>(wide, n, sh.wide_k, work.top, work.k_many);
    }
    const int64_t n_fetch = MANY*CHUNK/(task.r1 - task.r0) + 1; // rows of what comes next, for each tile
    int64_t       fetched = 0;
    for (int64_t r = task.r0; r < task.r1; r += MANY) {
        const int n_tile = (int) std::min<int64_t>(MANY, task.r1 - r);

        const float * q_rows[MANY];
        for (int i = 0; i < n_tile; ++i) {
            q_rows[i] = task.query(r + i);
        }
        attend_kernels_many_of(n_tile).dots(q_rows, work.k_many, n, sh.n_embd_k, work.logits + (r - task.r0)*CHUNK);
        for (int64_t i = 0; i < n_fetch; ++i, ++fetched) {
            next_k.fetch(fetched);
            next_v.fetch(fetched);
        }
    }
    for (int64_t r = task.r0; r < task.r1; ++r) {
        task.soften(work.logits + (r - task.r0)*CHUNK, r, n);
    }
    convert(v, rows_of(v, task.stream, i0), n, sh.wide_v, work.top, work.v);
    for (int64_t r = task.r0; r < task.r1; r += MANY) {
        const int n_tile = (int) std::min<int64_t>(MANY, task.r1 - r);

        float * out[MANY];
        for (int i = 0; i < n_tile; ++i) {
            out[i] = task.out(r + i);
        }
        attend_kernels_many_of(n_tile).accumulate(work.logits + (r - task.r0)*CHUNK, work.v, n, sh.wide_v, out);
    }
}

// chunks [c0, c1) of a block; `more`: this thread goes on with the next ones
void attend_span(const attend_shape & sh, const ggml_tensor * op, const attend_work & work,
        int64_t stream, int64_t block, int64_t c0, int64_t c1, bool more) {
    const attend_task task(sh, op, work, stream, block, c0/sh.span);

    for (int64_t c = c0; c < c1; ++c) {
        const int64_t i0 = c*CHUNK;

        bool holes = false;
        const int64_t n = find_biases(op, work, stream, task.t0, task.t1, i0, std::min(CHUNK, sh.n_kv - i0), holes);
        if (n == 0) {
            continue;
        }
        attend_ahead next_k;
        attend_ahead next_v;
        if (more || c + 1 < c1) {
            const int64_t n_next = std::min(CHUNK, sh.n_kv - i0 - CHUNK);
            next_k = { rows_of(op->src[1], stream, i0 + CHUNK), n_next };
            next_v = { rows_of(op->src[2], stream, i0 + CHUNK), n_next };
        }
        if (task.r1 - task.r0 <= FEW || sh.alone) {
            attend_few(task, i0, n, holes, next_k, next_v);
        } else {
            attend_many(task, i0, n, next_k, next_v);
        }
    }
}

// row r of a stream
void merge_spans(const attend_shape & sh, ggml_tensor * dst, const attend_work & work, int64_t stream, int64_t r) {
    const int64_t block   = r/ROWS;
    const int64_t visible = work.visible[(stream % sh.n_mask)*sh.n_blocks + block];
    const int64_t n_spans = (visible + sh.span*CHUNK - 1)/(sh.span*CHUNK);

    const int64_t part = part_of(sh, stream, block, 0) + r % ROWS;

    float * out = (float *) ((char *) dst->data + (r % sh.n_group)*dst->nb[1] + (r/sh.n_group)*dst->nb[2] + stream*dst->nb[3]);
    std::fill(out, out + sh.n_embd_v, 0.0f);

    // what a sink takes goes nowhere
    const ggml_tensor * sinks = dst->src[5];
    const float sink = sinks ? ((const float *) sinks->data)[stream*sh.n_group % sinks->ne[0] + r % sh.n_group] : -INFINITY;

    float max = sink;
    for (int64_t i = 0; i < n_spans; ++i) {
        max = std::max(max, work.stats[part + i*sh.n_rows_block].max);
    }
    if (max == -INFINITY) {
        return; // sees nothing
    }
    float sum = std::exp(sink - max);
    for (int64_t i = 0; i < n_spans; ++i) {
        const attend_stat & stat = work.stats[part + i*sh.n_rows_block];
        const float weight = std::exp(stat.max - max);
        sum += weight*stat.sum;
        ggml_vec_mad_f32((int) sh.n_embd_v, out, work.parts + (part + i*sh.n_rows_block)*sh.wide_v, weight);
    }
    ggml_vec_scale_f32((int) sh.n_embd_v, out, 1.0f/sum);
}

} // namespace

size_t attend_work_size(const ggml_tensor * op, int n_tasks) {
    const attend_work work(attend_shape(op), nullptr, 0);
    return work.size_shared + n_tasks*work.size_thread;
}

void attend(const ggml_compute_params * params, ggml_tensor * dst) {
    const attend_shape sh(dst);
    const attend_work  work(sh, params->wdata, params->ith);

    int64_t n_all = 0; // chunks
    for (int64_t i = 0; i < sh.n_mask*sh.n_blocks; ++i) {
        work.visible[i] = (int32_t) find_visible(sh, dst->src[3], i/sh.n_blocks, i % sh.n_blocks);
        n_all += (work.visible[i] + CHUNK - 1)/CHUNK*(sh.n_stream/sh.n_mask);
    }

    // the tasks that begin in chunks [begin, end) of all
    const auto do_tasks = [&](int64_t begin, int64_t end) {
        int64_t at = 0;
        for (int64_t stream = 0; stream < sh.n_stream && at < end; ++stream) {
            for (int64_t block = 0; block < sh.n_blocks && at < end; ++block) {
                const int64_t n_chunks = (work.visible[(stream % sh.n_mask)*sh.n_blocks + block] + CHUNK - 1)/CHUNK;
                for (int64_t c = 0; c < n_chunks; c += sh.span) {
                    const int64_t n = std::min(sh.span, n_chunks - c);
                    if (at >= begin && at < end) {
                        attend_span(sh, dst, work, stream, block, c, c + n, at + n < end && c + n < n_chunks);
                    }
                    at += n;
                }
            }
        }
    };
    if (params->nth > 1 && n_all*sh.n_rows_block >= MUCH*params->nth) {
        hand_out portions(params);
        portions.begin();
        portions.each(n_all, do_tasks);
    } else {
        do_tasks(n_all*params->ith/params->nth, n_all*(params->ith + 1)/params->nth);
    }

    ggml_barrier(params->threadpool);

    const int64_t n_rows = sh.n_stream*sh.n_rows;
    for (int64_t r = n_rows*params->ith/params->nth; r < n_rows*(params->ith + 1)/params->nth; ++r) {
        merge_spans(sh, dst, work, r/sh.n_rows, r % sh.n_rows);
    }
}

} // namespace indexmem_cpu
