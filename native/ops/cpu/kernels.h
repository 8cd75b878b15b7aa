#pragma once

// what the CPU kernels of GGML_OP_INDEXMEM share

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "indexmem-ops.h"
#include "simd-mappings.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace indexmem_cpu {

constexpr size_t ALIGN = 64;

inline size_t align_up(size_t n) {
    return (n + ALIGN - 1)/ALIGN*ALIGN;
}

struct row_index {
    int64_t h; // KV head
    int64_t s; // sequence of the ubatch
};

inline row_index row_at(int64_t ir, int64_t n_head) {
    return { ir % n_head, ir/n_head };
}

inline const int32_t * ctl_of(const ggml_tensor * ctl, int64_t s) {
    return (const int32_t *) ((const char *) ctl->data + s*ctl->nb[1]);
}

inline int32_t * pos_of(const ggml_tensor * pos, row_index row) {
    return (int32_t *) ((char *) pos->data + row.h*pos->nb[1] + row.s*pos->nb[2]);
}

// position of any slot in use
inline int32_t pos_at(const int32_t * pos, const int32_t * ctl, int64_t slot) {
    const int32_t n_fixed = ctl[INDEXMEM_CTL_N_FIXED];
    return slot < n_fixed ? pos[slot] : ctl[INDEXMEM_CTL_POS_TAIL] + (int32_t) (slot - n_fixed);
}

// the slots that leave a KV head: fewer than n_evict if there were not so many
struct leaving_slots {
    const int32_t * slot;
    int64_t         n;

    leaving_slots(const ggml_tensor * plan, const int32_t * ctl, row_index row) :
        slot((const int32_t *) ((const char *) plan->data + row.h*plan->nb[2] + row.s*plan->nb[3])),
        n(std::min<int64_t>(ctl[INDEXMEM_CTL_N_EVICT], plan->ne[0])) {
        while (n > 0 && slot[n - 1] < 0) {
            --n;
        }
    }
};

// ggml's own conversions of these two are compiled for the least of all CPUs; these loops vectorise for the present one
inline void q8_0_to_f32(const block_q8_0 * src, float * dst, int64_t n) {
    for (int64_t ib = 0; ib < n/QK8_0; ++ib) {
        const float d = GGML_CPU_FP16_TO_FP32(src[ib].d);
        for (int64_t i = 0; i < QK8_0; ++i) {
            dst[ib*QK8_0 + i] = d*src[ib].qs[i];
        }
    }
}

inline void q4_0_to_f32(const block_q4_0 * src, float * dst, int64_t n) {
    for (int64_t ib = 0; ib < n/QK4_0; ++ib) {
        const float d = GGML_CPU_FP16_TO_FP32(src[ib].d);
        for (int64_t i = 0; i < QK4_0/2; ++i) {
            dst[ib*QK4_0 + i]           = d*(float) ((src[ib].qs[i] & 0xF) - 8);
            dst[ib*QK4_0 + i + QK4_0/2] = d*(float) ((src[ib].qs[i] >> 4)  - 8);
        }
    }
}

// n values of any type in fp32
inline void to_f32(ggml_type type, const void * src, float * dst, int64_t n) {
    switch (type) {
        case GGML_TYPE_F32:  memcpy(dst, src, n*sizeof(float));                        break;
        case GGML_TYPE_F16:  ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) src, dst, n); break;
        case GGML_TYPE_BF16: ggml_cpu_bf16_to_fp32((const ggml_bf16_t *) src, dst, n); break;
        case GGML_TYPE_Q8_0: q8_0_to_f32((const block_q8_0 *) src, dst, n);            break;
        case GGML_TYPE_Q4_0: q4_0_to_f32((const block_q4_0 *) src, dst, n);            break;
        default:             ggml_get_type_traits(type)->to_float(src, dst, n);        break;
    }
}

// rows [i0, i1) of a cache tensor, from the row `src` = row 0 of one KV head, into a matrix of fp32
inline void rows_to_f32(const ggml_tensor * t, const char * src, int64_t i0, int64_t i1, float * dst) {
    if (t->nb[1] == ggml_row_size(t->type, t->ne[0])) {
        to_f32(t->type, src + i0*t->nb[1], dst, (i1 - i0)*t->ne[0]);
        return;
    }
    for (int64_t i = i0; i < i1; ++i) {
        to_f32(t->type, src + i*t->nb[1], dst + (i - i0)*t->ne[0], t->ne[0]);
    }
}

// kernels, and the bytes of work buffer they need
void rank       (const ggml_compute_params * params, ggml_tensor * dst);
void select     (const ggml_compute_params * params, ggml_tensor * dst);
void compact    (const ggml_compute_params * params, ggml_tensor * dst);
void compact_pos(const ggml_compute_params * params, ggml_tensor * dst);
void moves      (const ggml_compute_params * params, ggml_tensor * dst);
void ages       (const ggml_compute_params * params, ggml_tensor * dst);
void attend     (const ggml_compute_params * params, ggml_tensor * dst);
void retention  (const ggml_compute_params * params, ggml_tensor * dst);
void pairwise   (const ggml_compute_params * params, ggml_tensor * dst);
void centroid   (const ggml_compute_params * params, ggml_tensor * dst);
void residual   (const ggml_compute_params * params, ggml_tensor * dst);
void bias       (const ggml_compute_params * params, ggml_tensor * dst);

size_t rank_work_size     (const ggml_tensor * op, int n_tasks);
size_t select_work_size   (const ggml_tensor * op, int n_tasks);
size_t attend_work_size   (const ggml_tensor * op, int n_tasks);
size_t retention_work_size(const ggml_tensor * op, int n_tasks);
size_t pairwise_work_size (const ggml_tensor * op, int n_tasks);
size_t centroid_work_size (const ggml_tensor * op, int n_tasks);
size_t residual_work_size (const ggml_tensor * op, int n_tasks);

} // namespace indexmem_cpu
