#include "hand-out.h"
#include "rank-keys.h"

#include <vector>

// Heads are ranked some at a time, so that the scratch does not grow with their number, and all threads work on those: on chunks of
// their entries.

namespace indexmem_cpu {

namespace {

// Bytes that heads may take together, of all threads and for each; one is always taken. What they take is soon read again, and most of it
// is then to be in the cache of a core; but fewer heads at a time wait for each other more often.
constexpr size_t  SCRATCH        = 8u << 20;
constexpr size_t  SCRATCH_THREAD = 3u << 19;
constexpr int64_t MAX_HEADS      = 64; // at a time

const indexmem_rank_t rank_functions[] = {
#define INDEXMEM_POLICY(name, needs_keys, n_queries, help) indexmem_rank_##name,
#include "policies.def"
#undef INDEXMEM_POLICY
};

indexmem_rank_shape shape_of(const ggml_tensor * op, int n_threads) {
    const ggml_tensor * k      = op->src[0];
    const ggml_tensor * q      = op->src[3];
    const int           policy = ggml_get_op_params_i32(op, INDEXMEM_PARAM_POLICY);
    const auto        * info   = indexmem_policy_get(policy);

    indexmem_rank_shape sh = {};
    sh.k          = k;
    sh.n_threads  = n_threads;
    sh.attended   = ggml_get_op_params_i32(op, INDEXMEM_PARAM_OP) == INDEXMEM_OP_ATTENDED;
    sh.n_slots    = op->ne[0];
    sh.n_embd     = k->ne[0];
    sh.needs_keys = info->needs_keys && !sh.attended;
    sh.n_queries  = info->n_queries;
    sh.attends    = info->n_queries > 0 && policy != indexmem_policy_find("expected");
    sh.scale      = ggml_get_op_params_f32(op, INDEXMEM_PARAM_SCALE);
    sh.softcap    = ggml_get_op_params_f32(op, INDEXMEM_PARAM_SOFTCAP);
    sh.il         = ggml_get_op_params_i32(op, INDEXMEM_PARAM_IL);
    memcpy(&sh.seed, op->op_params + INDEXMEM_PARAM_SEED, sizeof(sh.seed));
    if (q) {
        sh.n_group = q->ne[2]/k->ne[2];
        sh.n_ring  = q->ne[1];
        sh.nb_ring = q->nb[1];
        sh.nb_head = q->nb[2];
    }
    if (policy == indexmem_policy_find("indexer")) {
        sh.n_terms   = (int32_t) k->ne[0];
        sh.pos_slope = ggml_get_op_params_f32(op, INDEXMEM_PARAM_SLOPE);
        sh.age_scale = ggml_get_op_params_f32(op, INDEXMEM_PARAM_AGE);
        sh.nb_term   = k->nb[1];
    }
    return sh;
}

// the work buffer: scratch of heads, then that of this thread
struct rank_work {
    float * heads;
    size_t  n_scratch; // floats of a head
    int64_t n_heads;   // at a time

    indexmem_rank_thread thread;

    size_t size_shared;
    size_t size_thread;

    rank_work(const ggml_tensor * op, const indexmem_rank_shape & sh, void * data, int ith) {
        n_scratch = align_up(indexmem_rank_scratch(sh)*sizeof(float))/sizeof(float);
        n_heads   = std::min(op->ne[1]*op->ne[2], MAX_HEADS);
        if (n_scratch > 0) {
            const size_t most = std::min(SCRATCH, sh.n_threads*SCRATCH_THREAD);
            n_heads = std::clamp<int64_t>(most/(n_scratch*sizeof(float)), 1, n_heads);
        }
        const int64_t wide    = sh.needs_keys ? rank_wide(sh) : 0;
        const size_t  keys    = align_up(CHUNK*wide*sizeof(float));
        const size_t  columns = sh.attends ? keys : 0;

        size_shared = n_heads*n_scratch*sizeof(float);
        size_thread = keys + columns + align_up(indexmem_simd::TILE*wide*sizeof(float));

        char * base = (char *) data + size_shared + ith*size_thread;
        heads          = (float *) data;
        thread.keys    = (float *) base;
        thread.columns = (float *) (base + keys);
        thread.rows    = (float *) (base + keys + columns);
    }
};

class ranking_of_threads : public indexmem_ranking {
public:
    ranking_of_threads(const ggml_compute_params * params, const indexmem_rank_shape & sh, const indexmem_rank_thread & thread) :
        params(params), sh(sh), thread(thread), portions(params) {
        portions.begin();
    }

    std::vector<indexmem_rank_head> heads; // that are ranked now

    const indexmem_rank_shape & shape() const override { return sh; }

    void each_chunk(const of_chunk & f) override {
        int64_t n_all = 0;
        for (const auto & h : heads) {
            n_all += h.n_chunks();
        }
        portions.each(n_all, [&](int64_t begin, int64_t end) {
            int64_t first = 0; // of the head
            for (const auto & h : heads) {
                for (int64_t c = std::max(begin, first); c < std::min(end, first + h.n_chunks()); ++c) {
                    const int64_t i0 = (c - first)*CHUNK;
                    f({ h, sh, thread, i0, std::min(CHUNK, h.n - i0), h.rank + i0 });
                }
                first += h.n_chunks();
            }
        });
        ggml_barrier(params->threadpool);
    }

    void each_head(const of_head & f) override {
        each_head_aside(f);
        ggml_barrier(params->threadpool);
    }

    void each_head_aside(const of_head & f) override {
        for (size_t i = params->ith; i < heads.size(); i += params->nth) {
            f(heads[i]);
        }
    }

private:
    const ggml_compute_params  * params;
    const indexmem_rank_shape  & sh;
    const indexmem_rank_thread & thread;

    hand_out portions;
};

indexmem_rank_head head_at(const ggml_tensor * op, const indexmem_rank_shape & sh, row_index row) {
    const ggml_tensor * k     = op->src[0];
    const ggml_tensor * q     = op->src[3];
    const ggml_tensor * sinks = op->src[4];
    const int32_t     * c     = ctl_of(op->src[2], row.s);

    indexmem_rank_head h = {};
    h.n        = c[INDEXMEM_CTL_N_USED];
    h.pos      = pos_of(op->src[1], row);
    h.n_fixed  = c[INDEXMEM_CTL_N_FIXED];
    h.pos_tail = c[INDEXMEM_CTL_POS_TAIL];
    h.pos_last = c[INDEXMEM_CTL_POS_LAST];
    h.head     = (int32_t) row.h;
    h.rank     = (float *) ((char *) op->data + row.h*op->nb[1] + row.s*op->nb[2]);
    GGML_ASSERT(h.n <= sh.n_slots);

    if (sh.attended) {
        h.attention = (const float *) ((const char *) k->data + row.h*k->nb[1] + row.s*k->nb[2]);
    }
    if (sh.n_terms > 0) {
        h.terms = (const char *) k->data + (row.h % k->ne[2])*k->nb[2] + row.s*k->nb[3];
    }
    if (sh.needs_keys) {
        h.k = (const char *) k->data + row.h*k->nb[2] + row.s*k->nb[3];
    }
    if (q) {
        h.q     = (const char *) q->data + row.h*sh.n_group*q->nb[2] + row.s*q->nb[3];
        h.sinks = sinks ? (const float *) sinks->data + row.h*sh.n_group : nullptr;
    }
    return h;
}

} // namespace

// Enough for fewer threads, too: what one takes of the scratch depends on their number.
size_t rank_work_size(const ggml_tensor * op, int n_tasks) {
    size_t res = 0;
    for (int n = 1; n <= n_tasks; ++n) {
        const auto sh = shape_of(op, n);
        const rank_work work(op, sh, nullptr, 0);
        res = std::max(res, work.size_shared + n*work.size_thread);
    }
    return res;
}

void rank(const ggml_compute_params * params, ggml_tensor * dst) {
    const auto sh = shape_of(dst, params->nth);
    const rank_work work(dst, sh, params->wdata, params->ith);

    ranking_of_threads ranking(params, sh, work.thread);

    const int64_t n_row = dst->ne[1]*dst->ne[2];
    for (int64_t ir = 0; ir < n_row;) {
        ranking.heads.clear();
        for (; ir < n_row && (int64_t) ranking.heads.size() < work.n_heads; ++ir) {
            const row_index row = row_at(ir, dst->ne[1]);
            if (ctl_of(dst->src[2], row.s)[INDEXMEM_CTL_N_EVICT] > 0) {
                ranking.heads.push_back(head_at(dst, sh, row));
                ranking.heads.back().scratch = work.heads + (ranking.heads.size() - 1)*work.n_scratch;
            }
        }
        if (!ranking.heads.empty()) {
            rank_functions[ggml_get_op_params_i32(dst, INDEXMEM_PARAM_POLICY)](ranking);
        }
    }
}

} // namespace indexmem_cpu

size_t indexmem_rank_scratch(const indexmem_rank_shape & sh) {
    if (sh.attends) {
        return indexmem_rank_attention_scratch(sh) + 2*sh.n_slots;
    }
    return sh.needs_keys ? (sh.n_chunks() + 1)*sh.n_embd : 0;
}
