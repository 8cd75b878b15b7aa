#include "kernels.h"

namespace indexmem_cpu {

// slot src[i] -> slot dst[i], for i up to the first negative one
struct move_list {
    const int32_t * dst;
    const int32_t * src;
};

static move_list moves_of(const ggml_tensor * plan, row_index row) {
    const char * base = (const char *) plan->data + row.h*plan->nb[2] + row.s*plan->nb[3];
    return { (const int32_t *) (base + plan->nb[1]), (const int32_t *) (base + 2*plan->nb[1]) };
}

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

        const move_list m = moves_of(plan, row);

        char * base = (char *) dst->data + row.h*dst->nb[2] + row.s*dst->nb[3];
        for (int64_t i = params->ith; i < n_evict_max && m.dst[i] >= 0; i += params->nth) {
            memcpy(base + m.dst[i]*dst->nb[1], base + m.src[i]*dst->nb[1], row_size);
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

        const move_list m = moves_of(plan, row);
        for (int64_t i = 0; i < n_evict_max && m.dst[i] >= 0; ++i) {
            pos[m.dst[i]] = pos[m.src[i]];
        }
    }
}

void moves(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * plan = dst->src[0];

    for (int64_t ir = params->ith; ir < dst->ne[1]*dst->ne[2]; ir += params->nth) {
        const row_index row = row_at(ir, dst->ne[1]);
        const int32_t * evicted = (const int32_t *) ((const char *) plan->data + row.h*plan->nb[2] + row.s*plan->nb[3]);
        const move_list m = moves_of(plan, row);

        const auto list = [&](int64_t i) { return (int32_t *) ((char *) dst->data + row.h*dst->nb[1] + row.s*dst->nb[2] + i*dst->nb[3]); };
        const auto fill = [&](const int32_t * src, int32_t * res) {
            for (int64_t i = 0; i < dst->ne[0]; ++i) {
                res[i] = src[i] >= 0 ? src[i] : std::max(src[0], 0);
            }
        };
        for (int64_t i = 0; i < dst->ne[0]; ++i) {
            list(0)[i] = evicted[i] >= 0 ? (int32_t) i : -1;
        }
        fill(evicted, list(1));
        fill(m.dst,   list(2));
        fill(m.src,   list(3));
    }
}

void ages(const ggml_compute_params * params, ggml_tensor * dst) {
    for (int64_t ir = params->ith; ir < dst->ne[1]*dst->ne[2]; ir += params->nth) {
        const row_index row = row_at(ir, dst->ne[1]);
        const int32_t * c   = ctl_of(dst->src[1], row.s);
        const int32_t * pos = pos_of(dst->src[0], row);

        float * age = (float *) ((char *) dst->data + row.h*dst->nb[1] + row.s*dst->nb[2]);
        for (int64_t i = 0; i < dst->ne[0]; ++i) {
            age[i] = i < c[INDEXMEM_CTL_N_USED] ? (float) (c[INDEXMEM_CTL_POS_LAST] - pos_at(pos, c, i)) : -1.0f;
        }
    }
}

} // namespace indexmem_cpu
