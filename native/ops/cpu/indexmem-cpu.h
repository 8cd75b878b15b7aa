#pragma once

// CPU backend of GGML_OP_INDEXMEM (see indexmem-ops.h)

#include "ggml.h"

#include <stddef.h>

struct ggml_compute_params;

#ifdef __cplusplus
extern "C" {
#endif

// bytes of work buffer
size_t ggml_indexmem_cpu_work_size(const struct ggml_tensor * op, int n_tasks);

void ggml_compute_forward_indexmem(const struct ggml_compute_params * params, struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif
