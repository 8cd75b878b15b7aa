#pragma once

// what the CPU kernels of GGML_OP_INDEXMEM share

#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "indexmem-ops.h"

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

// one row of a cache in fp32
inline void row_to_f32(ggml_type type, const void * src, float * dst, int64_t n) {
    switch (type) {
        case GGML_TYPE_F32:  memcpy(dst, src, n*sizeof(float));                             break;
        case GGML_TYPE_F16:  ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) src, dst, n);       break;
        case GGML_TYPE_BF16: ggml_cpu_bf16_to_fp32((const ggml_bf16_t *) src, dst, n);       break;
        default:             ggml_get_type_traits(type)->to_float(src, dst, n);             break;
    }
}

// kernels, and the bytes of work buffer they need
void rank       (const ggml_compute_params * params, ggml_tensor * dst);
void select     (const ggml_compute_params * params, ggml_tensor * dst);
void compact    (const ggml_compute_params * params, ggml_tensor * dst);
void compact_pos(const ggml_compute_params * params, ggml_tensor * dst);
void attend     (const ggml_compute_params * params, ggml_tensor * dst);

size_t rank_work_size  (const ggml_tensor * op, int n_tasks);
size_t select_work_size(const ggml_tensor * op, int n_tasks);
size_t attend_work_size(const ggml_tensor * op, int n_tasks);

} // namespace indexmem_cpu
