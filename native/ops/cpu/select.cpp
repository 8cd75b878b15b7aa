#include "kernels.h"

namespace indexmem_cpu {

// Ascending order of keys = order of leaving. NaN < -inf < ... < +inf; among equal ranks the later position first.
// Positions are distinct within a head, hence so are keys. Without branches, so that loops over it are vectorised.
static inline uint64_t select_key(float rank, int32_t pos) {
    const float value = rank + 0.0f; // -0 -> +0
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    bits ^= (uint32_t) ((int32_t) bits >> 31) | 0x80000000u;
    bits  = value == value ? bits : 0;
    return (uint64_t) bits << 32 | (0xFFFFFFFFu - (uint32_t) pos);
}

static constexpr uint64_t STAYS = UINT64_MAX; // beyond the key of any rank

// keys of slots [i0, i1), whose positions are pos_of_slot(i); returns how many of them may leave
template <typename F>
static int64_t make_keys(uint64_t * keys, const float * rank, int64_t i0, int64_t i1, int32_t lo, int32_t hi, F pos_of_slot) {
    int64_t n = 0;
    for (int64_t i = i0; i < i1; ++i) {
        const int32_t  p   = pos_of_slot(i);
        const uint64_t key = select_key(rank[i], p);
        const bool may_leave = p >= lo && p < hi;
        keys[i] = may_leave ? key : STAYS;
        n += may_leave;
    }
    return n;
}

// The n-th lowest of the keys, of which at least n are below STAYS. Few of many leave: only keys below the n-th lowest so far are
// collected, and whenever twice as many as needed are there, the higher half goes. Work: n_work keys, all of them at most.
static uint64_t nth_lowest(const uint64_t * keys, int64_t n_keys, int64_t n, uint64_t * work, int64_t n_work) {
    const int64_t capacity = std::min(2*n + 16, n_work);

    uint64_t cut = STAYS;
    int64_t  n_found = 0;
    for (int64_t i = 0; i < n_keys; ++i) {
        if (keys[i] >= cut) {
            continue;
        }
        work[n_found++] = keys[i];
        if (n_found == capacity) {
            std::nth_element(work, work + n - 1, work + n_found);
            cut = work[n - 1];
            n_found = n;
        }
    }
    GGML_ASSERT(n <= n_found);
    std::nth_element(work, work + n - 1, work + n_found);
    return work[n - 1];
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

        const int64_t n_used = std::min<int64_t>(c[INDEXMEM_CTL_N_USED], n_slots);
        if (c[INDEXMEM_CTL_N_EVICT] == 0) {
            continue;
        }

        const float   * r = (const float *) ((const char *) rank->data + row.h*rank->nb[1] + row.s*rank->nb[2]);
        const int32_t * p = pos_of(pos, row);

        const int32_t lo = c[INDEXMEM_CTL_KEEP_LO];
        const int32_t hi = c[INDEXMEM_CTL_KEEP_HI];
        const int64_t n_fixed = std::min<int64_t>(c[INDEXMEM_CTL_N_FIXED], n_used);
        const int32_t tail    = c[INDEXMEM_CTL_POS_TAIL];
        const int64_t n_may_leave =
            make_keys(keys, r, 0,       n_fixed, lo, hi, [&](int64_t i) { return p[i]; }) +
            make_keys(keys, r, n_fixed, n_used,  lo, hi, [&](int64_t i) { return tail + (int32_t) (i - n_fixed); });

        const int64_t n_evict = std::min({ (int64_t) c[INDEXMEM_CTL_N_EVICT], n_evict_max, n_may_leave });
        if (n_evict == 0) {
            continue;
        }
        const uint64_t cut = nth_lowest(keys, n_used, n_evict, work, n_slots);

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
