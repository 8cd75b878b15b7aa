#include "kernels.h"

namespace indexmem_cpu {

// Ascending order of keys = order of leaving. NaN < -inf < ... < +inf; among equal ranks the later position first.
// Positions are distinct within a head, hence so are keys.
static uint64_t select_key(float rank, int32_t pos) {
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

size_t select_work_size(const ggml_tensor * op, int n_tasks) {
    return 2*align_up(op->src[0]->ne[0]*sizeof(uint64_t))*n_tasks;
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

} // namespace indexmem_cpu
