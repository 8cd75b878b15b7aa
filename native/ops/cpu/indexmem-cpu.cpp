#include "indexmem-cpu.h"

#include "ggml-cpu-impl.h"
#include "ggml-impl.h"
#include "indexmem-ops.h"
#include "policy.h"

#include <algorithm>
#include <cmath>
#include <cstring>

// Work is split over rows, a row being one KV head of one sequence. The result does not depend on the split.

namespace {

constexpr size_t ALIGN = 64;

size_t align_up(size_t n) {
    return (n + ALIGN - 1)/ALIGN*ALIGN;
}

struct row_index {
    int64_t h; // KV head
    int64_t s; // sequence of the ubatch
};

row_index row_at(int64_t ir, int64_t n_head) {
    return { ir % n_head, ir/n_head };
}

const int32_t * ctl_of(const ggml_tensor * ctl, int64_t s) {
    return (const int32_t *) ((const char *) ctl->data + s*ctl->nb[1]);
}

int32_t * pos_of(const ggml_tensor * pos, row_index row) {
    return (int32_t *) ((char *) pos->data + row.h*pos->nb[1] + row.s*pos->nb[2]);
}

// position of any slot in use
int32_t pos_at(const int32_t * pos, const int32_t * ctl, int64_t slot) {
    const int32_t n_fixed = ctl[INDEXMEM_CTL_N_FIXED];
    return slot < n_fixed ? pos[slot] : ctl[INDEXMEM_CTL_POS_TAIL] + (int32_t) (slot - n_fixed);
}

//
// rank
//

struct rank_work {
    size_t pos;     // offsets into the work area of a thread
    size_t scratch;
    size_t k;
    size_t size;

    rank_work(const ggml_tensor * k_cache, bool needs_keys) {
        const size_t n_slots = k_cache->ne[1];
        const size_t n_embd  = k_cache->ne[0];

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

void rank(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * k   = dst->src[0];
    const ggml_tensor * pos = dst->src[1];
    const ggml_tensor * ctl = dst->src[2];
    const ggml_tensor * q   = dst->src[3];

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

    const ggml_to_float_t to_float = ggml_get_type_traits(k->type)->to_float;

    for (int64_t ir = params->ith; ir < k->ne[2]*k->ne[3]; ir += params->nth) {
        const row_index row = row_at(ir, k->ne[2]);
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

        if (info->needs_keys) {
            const char * k_src = (const char *) k->data + row.h*k->nb[2] + row.s*k->nb[3];
            for (int64_t i = 0; i < view.n; ++i) {
                if (k->type == GGML_TYPE_F32) {
                    memcpy(k_row + i*view.n_embd, k_src + i*k->nb[1], view.n_embd*sizeof(float));
                } else {
                    to_float(k_src + i*k->nb[1], k_row + i*view.n_embd, view.n_embd);
                }
            }
            view.k = k_row;
        }
        if (q) {
            view.n_group = q->ne[2]/k->ne[2];
            view.n_ring  = q->ne[1];
            view.nb_ring = q->nb[1];
            view.nb_head = q->nb[2];
            view.q       = (const char *) q->data + row.h*view.n_group*q->nb[2] + row.s*q->nb[3];
        }

        rank_functions[policy](view, (float *) ((char *) dst->data + row.h*dst->nb[1] + row.s*dst->nb[2]));
    }
}

//
// select
//

// Ascending order of keys = order of leaving. NaN < -inf < ... < +inf; among equal ranks the later position first.
// Positions are distinct within a head, hence so are keys.
uint64_t select_key(float rank, int32_t pos) {
    uint32_t bits;
    if (std::isnan(rank)) {
        bits = 0;
    } else {
        rank += 0.0f; // -0 -> +0
        memcpy(&bits, &rank, sizeof(bits));
        bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    }
    return (uint64_t) bits << 32 | (0xFFFFFFFFu - (uint32_t) pos);
}

void select(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * rank = dst->src[0];
    const ggml_tensor * pos  = dst->src[1];
    const ggml_tensor * ctl  = dst->src[2];

    const int64_t n_slots     = rank->ne[0];
    const int64_t n_head      = rank->ne[1];
    const int64_t n_evict_max = dst->ne[0];

    const size_t size_keys = align_up(n_slots*sizeof(uint64_t));
    uint64_t * keys = (uint64_t *) ((char *) params->wdata + params->ith*2*size_keys);
    uint64_t * work = (uint64_t *) ((char *) keys + size_keys);

    for (int64_t ir = params->ith; ir < n_head*rank->ne[2]; ir += params->nth) {
        const row_index row = row_at(ir, n_head);
        const int32_t * c = ctl_of(ctl, row.s);

        int32_t * evicted  = (int32_t *) ((char *) dst->data + row.h*dst->nb[2] + row.s*dst->nb[3]);
        int32_t * move_dst = evicted  + n_evict_max;
        int32_t * move_src = move_dst + n_evict_max;
        std::fill(evicted, evicted + 3*n_evict_max, -1);

        const int64_t n_evict = c[INDEXMEM_CTL_N_EVICT];
        const int64_t n_used  = c[INDEXMEM_CTL_N_USED];
        if (n_evict == 0) {
            continue;
        }
        GGML_ASSERT(n_evict <= n_evict_max && n_used <= n_slots);

        const float   * r = (const float *) ((const char *) rank->data + row.h*rank->nb[1] + row.s*rank->nb[2]);
        const int32_t * p = pos_of(pos, row);

        constexpr uint64_t stays = UINT64_MAX;

        int64_t n_candidates = 0;
        for (int64_t i = 0; i < n_used; ++i) {
            const int32_t pi = pos_at(p, c, i);
            const bool candidate = pi >= c[INDEXMEM_CTL_KEEP_LO] && pi < c[INDEXMEM_CTL_KEEP_HI];
            keys[i] = candidate ? select_key(r[i], pi) : stays;
            if (candidate) {
                work[n_candidates++] = keys[i];
            }
        }
        GGML_ASSERT(n_evict <= n_candidates);

        std::nth_element(work, work + n_evict - 1, work + n_candidates);
        const uint64_t cut = work[n_evict - 1];

        const int64_t n_left = n_used - n_evict;
        int64_t ie = 0;
        int64_t id = 0;
        int64_t is = 0;
        for (int64_t i = 0; i < n_used; ++i) {
            if (keys[i] <= cut) {
                evicted[ie++] = (int32_t) i;
                if (i < n_left) {
                    move_dst[id++] = (int32_t) i;
                }
            } else if (i >= n_left) {
                move_src[is++] = (int32_t) i;
            }
        }
        GGML_ASSERT(ie == n_evict && id == is);
    }
}

//
// compact
//

void compact(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * plan = dst->src[1];
    const ggml_tensor * ctl  = dst->src[2];

    const int64_t n_evict_max = plan->ne[0];
    const size_t  row_size    = ggml_row_size(dst->type, dst->ne[0]);

    for (int64_t ir = 0; ir < dst->ne[2]*dst->ne[3]; ++ir) {
        const row_index row = row_at(ir, dst->ne[2]);
        if (ctl_of(ctl, row.s)[INDEXMEM_CTL_N_EVICT] == 0) {
            continue;
        }

        const int32_t * move_dst = (const int32_t *) ((const char *) plan->data + row.h*plan->nb[2] + row.s*plan->nb[3]) + n_evict_max;
        const int32_t * move_src = move_dst + n_evict_max;

        char * base = (char *) dst->data + row.h*dst->nb[2] + row.s*dst->nb[3];
        for (int64_t i = params->ith; i < n_evict_max && move_dst[i] >= 0; i += params->nth) {
            memcpy(base + move_dst[i]*dst->nb[1], base + move_src[i]*dst->nb[1], row_size);
        }
    }
}

void compact_pos(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * plan = dst->src[1];
    const ggml_tensor * ctl  = dst->src[2];

    const int64_t n_evict_max = plan->ne[0];

    for (int64_t ir = params->ith; ir < dst->ne[1]*dst->ne[2]; ir += params->nth) {
        const row_index row = row_at(ir, dst->ne[1]);
        const int32_t * c = ctl_of(ctl, row.s);
        if (c[INDEXMEM_CTL_N_EVICT] == 0) {
            continue;
        }

        int32_t * pos = pos_of(dst, row);
        for (int64_t i = c[INDEXMEM_CTL_N_FIXED]; i < c[INDEXMEM_CTL_N_USED]; ++i) {
            pos[i] = pos_at(pos, c, i);
        }

        const int32_t * move_dst = (const int32_t *) ((const char *) plan->data + row.h*plan->nb[2] + row.s*plan->nb[3]) + n_evict_max;
        const int32_t * move_src = move_dst + n_evict_max;
        for (int64_t i = 0; i < n_evict_max && move_dst[i] >= 0; ++i) {
            pos[move_dst[i]] = pos[move_src[i]];
        }
    }
}

} // namespace

size_t ggml_indexmem_cpu_work_size(const ggml_tensor * op, int n_tasks) {
    switch (ggml_get_op_params_i32(op, INDEXMEM_PARAM_OP)) {
        case INDEXMEM_OP_RANK:
            {
                const auto * info = indexmem_policy_get(ggml_get_op_params_i32(op, INDEXMEM_PARAM_POLICY));
                return rank_work(op->src[0], info->needs_keys).size*n_tasks;
            }
        case INDEXMEM_OP_SELECT:
            return 2*align_up(op->src[0]->ne[0]*sizeof(uint64_t))*n_tasks;
        default:
            return 0;
    }
}

void ggml_compute_forward_indexmem(const ggml_compute_params * params, ggml_tensor * dst) {
    const int64_t t_start_us = ggml_time_us();

    switch (ggml_get_op_params_i32(dst, INDEXMEM_PARAM_OP)) {
        case INDEXMEM_OP_RANK:        rank       (params, dst); break;
        case INDEXMEM_OP_SELECT:      select     (params, dst); break;
        case INDEXMEM_OP_COMPACT:     compact    (params, dst); break;
        case INDEXMEM_OP_COMPACT_POS: compact_pos(params, dst); break;
        default: GGML_ABORT("unknown indexmem op");
    }

    int64_t * timer;
    memcpy(&timer, dst->op_params + INDEXMEM_PARAM_TIMER, sizeof(timer));
    if (timer && params->ith == 0) {
        *timer += ggml_time_us() - t_start_us;
    }
}
