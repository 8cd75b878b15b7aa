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

// an entry that may leave
struct candidate {
    uint64_t key;
    int32_t  slot;
};

// The n lowest of a list, if it has more, are brought to its front. Returns how many they are.
static int64_t lowest(candidate * list, int64_t n_list, int64_t n) {
    if (n_list <= n) {
        return n_list;
    }
    std::nth_element(list, list + n - 1, list + n_list, [](const candidate & a, const candidate & b) { return a.key < b.key; });
    return n;
}

// ranks and positions of a row
struct select_row {
    const float   * rank;
    const int32_t * pos;
    const int32_t * ctl;
    int64_t         n_used;

    select_row(const ggml_tensor * op, row_index row) :
        rank((const float *) ((const char *) op->src[0]->data + row.h*op->src[0]->nb[1] + row.s*op->src[0]->nb[2])),
        pos(pos_of(op->src[1], row)), ctl(ctl_of(op->src[2], row.s)),
        n_used(std::min<int64_t>(ctl[INDEXMEM_CTL_N_USED], op->src[0]->ne[0])) {}
};

// Keys of slots [i0, i0 + n), whose positions are pos_of_slot(i); whether one is below `cut`.
template <typename F>
static bool make_keys(const select_row & row, int64_t i0, int64_t n, uint64_t cut, uint64_t * keys, F pos_of_slot) {
    const int32_t lo = row.ctl[INDEXMEM_CTL_KEEP_LO];
    const int32_t hi = row.ctl[INDEXMEM_CTL_KEEP_HI];

    int below = 0;
    for (int64_t i = 0; i < n; ++i) {
        const int32_t  p   = pos_of_slot(i0 + i);
        const uint64_t key = select_key(row.rank[i0 + i], p);
        keys[i] = p >= lo && p < hi ? key : STAYS;
        below |= keys[i] < cut;
    }
    return below;
}

// The n lowest of slots [begin, end) that may leave, or all if they are fewer. Few of many leave: only entries below the n-th lowest
// so far are collected, and whenever twice as many as needed are there, the higher half goes. `list` has room for `capacity`.
static int64_t collect(const select_row & row, int64_t begin, int64_t end, int64_t n, candidate * list, int64_t capacity) {
    constexpr int64_t BLOCK = 64; // slots

    const int64_t n_fixed = std::clamp<int64_t>(row.ctl[INDEXMEM_CTL_N_FIXED], begin, end);
    const int32_t tail    = row.ctl[INDEXMEM_CTL_POS_TAIL] - row.ctl[INDEXMEM_CTL_N_FIXED];

    capacity = std::min(capacity, 2*n + 16);

    uint64_t cut     = STAYS;
    int64_t  n_found = 0;
    uint64_t keys[BLOCK];
    for (int64_t i0 = begin; i0 < end;) {
        const int64_t block = std::min(BLOCK, (i0 < n_fixed ? n_fixed : end) - i0);
        const bool below = i0 < n_fixed ?
            make_keys(row, i0, block, cut, keys, [&](int64_t i) { return row.pos[i]; }) :
            make_keys(row, i0, block, cut, keys, [&](int64_t i) { return tail + (int32_t) i; });
        for (int64_t i = 0; i < block && below; ++i) {
            if (keys[i] >= cut) {
                continue;
            }
            list[n_found++] = { keys[i], (int32_t) (i0 + i) };
            if (n_found == capacity && n < capacity) {
                n_found = lowest(list, n_found, n);
                cut     = list[n - 1].key;
            }
        }
        i0 += block;
    }
    return lowest(list, n_found, n);
}

// the plan of a row from candidates, at most n of which leave
static void write_plan(const select_row & row, candidate * list, int64_t n_list, int64_t n, int32_t * evicted, int64_t n_evict_max) {
    int32_t * move_dst = evicted  + n_evict_max;
    int32_t * move_src = move_dst + n_evict_max;

    const int64_t n_evict = lowest(list, n_list, n);
    for (int64_t i = 0; i < n_evict; ++i) {
        evicted[i] = list[i].slot;
    }
    std::sort(evicted, evicted + n_evict);

    const int64_t n_left = row.n_used - n_evict;
    const int64_t n_move = std::lower_bound(evicted, evicted + n_evict, (int32_t) n_left) - evicted;
    std::copy(evicted, evicted + n_move, move_dst);
    int64_t next = n_move; // of the evicted
    int64_t is   = 0;
    for (int64_t i = n_left; i < row.n_used; ++i) {
        if (next < n_evict && evicted[next] == i) {
            ++next;
        } else {
            move_src[is++] = (int32_t) i;
        }
    }
    GGML_ASSERT(is == n_move);
}

// Candidates of each thread. Lists of neighbours lie next to each other.
struct select_work {
    int64_t     capacity;
    candidate * lists;
    int64_t   * n_found; // [threads]

    select_work(const ggml_tensor * op, void * data, int n_tasks) :
        capacity(std::min(2*op->ne[0] + 16, op->src[0]->ne[0])),
        lists((candidate *) data), n_found((int64_t *) ((char *) data + size_lists(n_tasks))) {}

    size_t size_lists(int n_tasks) const { return align_up(n_tasks*capacity*sizeof(candidate)); }
    size_t size      (int n_tasks) const { return size_lists(n_tasks) + n_tasks*sizeof(int64_t); }
};

size_t select_work_size(const ggml_tensor * op, int n_tasks) {
    return select_work(op, nullptr, n_tasks).size(n_tasks);
}

// Where there are fewer rows than threads, several threads look for the candidates of a row, each in a part of its slots, and the
// first of them writes the plan.
void select(const ggml_compute_params * params, ggml_tensor * dst) {
    const int64_t n_head      = dst->src[0]->ne[1];
    const int64_t n_rows      = n_head*dst->src[0]->ne[2];
    const int64_t n_evict_max = dst->ne[0];
    const int64_t n_parts     = std::max<int64_t>(1, params->nth/n_rows);

    const select_work work(dst, params->wdata, params->nth);
    candidate * list = work.lists + params->ith*work.capacity;

    const auto n_wanted = [&](const select_row & row) { return std::min<int64_t>(row.ctl[INDEXMEM_CTL_N_EVICT], n_evict_max); };

    const auto plan_of = [&](row_index at) {
        int32_t * res = (int32_t *) ((char *) dst->data + at.h*dst->nb[2] + at.s*dst->nb[3]);
        std::fill(res, res + 3*n_evict_max, -1);
        return res;
    };

    if (n_parts == 1) {
        for (int64_t ir = params->ith; ir < n_rows; ir += params->nth) {
            const select_row row(dst, row_at(ir, n_head));
            int32_t * plan = plan_of(row_at(ir, n_head));
            if (n_wanted(row) > 0) {
                const int64_t n_found = collect(row, 0, row.n_used, n_wanted(row), list, work.capacity);
                write_plan(row, list, n_found, n_wanted(row), plan, n_evict_max);
            }
        }
        return;
    }

    const int64_t ir   = params->ith/n_parts;
    const int64_t part = params->ith % n_parts;
    if (ir < n_rows) {
        const select_row row(dst, row_at(ir, n_head));
        work.n_found[params->ith] = n_wanted(row) == 0 ? 0 :
            collect(row, row.n_used*part/n_parts, row.n_used*(part + 1)/n_parts, n_wanted(row), list, work.capacity);
    }
    ggml_barrier(params->threadpool);

    if (ir < n_rows && part == 0) {
        const select_row row(dst, row_at(ir, n_head));
        int64_t n_found = work.n_found[params->ith];
        for (int64_t other = 1; other < n_parts; ++other) {
            const int64_t n = work.n_found[params->ith + other];
            std::copy(list + other*work.capacity, list + other*work.capacity + n, list + n_found);
            n_found += n;
        }
        write_plan(row, list, n_found, n_wanted(row), plan_of(row_at(ir, n_head)), n_evict_max);
    }
}

} // namespace indexmem_cpu
