#include "indexmem-cpu.h"

#include "kernels.h"
#include "simd.h"

#include <cstring>
#include <utility>

void * ggml_indexmem_cpu_function(const char * name) {
    const std::pair<const char *, void *> functions[] = {
        { "ggml_indexmem_cpu_vectors",   (void *) ggml_indexmem_cpu_vectors   },
        { "ggml_indexmem_cpu_work_size", (void *) ggml_indexmem_cpu_work_size },
    };
    for (const auto & [known, function] : functions) {
        if (strcmp(name, known) == 0) {
            return function;
        }
    }
    return nullptr;
}

const char * ggml_indexmem_cpu_vectors() {
    return indexmem_simd::NAME;
}

size_t ggml_indexmem_cpu_work_size(const ggml_tensor * op, int n_tasks) {
    switch (ggml_get_op_params_i32(op, INDEXMEM_PARAM_OP)) {
        case INDEXMEM_OP_RANK:
        case INDEXMEM_OP_ATTENDED:  return indexmem_cpu::rank_work_size     (op, n_tasks);
        case INDEXMEM_OP_SELECT:    return indexmem_cpu::select_work_size   (op, n_tasks);
        case INDEXMEM_OP_ATTEND:    return indexmem_cpu::attend_work_size   (op, n_tasks);
        case INDEXMEM_OP_RETENTION: return indexmem_cpu::retention_work_size(op, n_tasks);
        case INDEXMEM_OP_PAIRWISE:  return indexmem_cpu::pairwise_work_size (op, n_tasks);
        case INDEXMEM_OP_CENTROID:  return indexmem_cpu::centroid_work_size (op, n_tasks);
        case INDEXMEM_OP_RESIDUAL:  return indexmem_cpu::residual_work_size (op, n_tasks);
        default:                    return 0;
    }
}

void ggml_compute_forward_indexmem(const ggml_compute_params * params, ggml_tensor * dst) {
    const int64_t t_start_us = ggml_time_us();

    switch (ggml_get_op_params_i32(dst, INDEXMEM_PARAM_OP)) {
        case INDEXMEM_OP_RANK:
        case INDEXMEM_OP_ATTENDED:    indexmem_cpu::rank       (params, dst); break;
        case INDEXMEM_OP_SELECT:      indexmem_cpu::select     (params, dst); break;
        case INDEXMEM_OP_COMPACT:     indexmem_cpu::compact    (params, dst); break;
        case INDEXMEM_OP_COMPACT_POS: indexmem_cpu::compact_pos(params, dst); break;
        case INDEXMEM_OP_MOVES:       indexmem_cpu::moves      (params, dst); break;
        case INDEXMEM_OP_AGES:        indexmem_cpu::ages       (params, dst); break;
        case INDEXMEM_OP_ATTEND:      indexmem_cpu::attend     (params, dst); break;
        case INDEXMEM_OP_RETENTION:   indexmem_cpu::retention  (params, dst); break;
        case INDEXMEM_OP_PAIRWISE:    indexmem_cpu::pairwise   (params, dst); break;
        case INDEXMEM_OP_CENTROID:    indexmem_cpu::centroid   (params, dst); break;
        case INDEXMEM_OP_RESIDUAL:    indexmem_cpu::residual   (params, dst); break;
        case INDEXMEM_OP_BIAS:        indexmem_cpu::bias       (params, dst); break;
        default: GGML_ABORT("unknown indexmem op");
    }

    int64_t * timer;
    memcpy(&timer, dst->op_params + INDEXMEM_PARAM_TIMER, sizeof(timer));
    if (timer && params->ith == 0) {
        *timer += ggml_time_us() - t_start_us;
    }
}
