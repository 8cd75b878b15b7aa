#pragma once

// what the CPU backend calls: GGML_OP_INDEXMEM (see indexmem-ops.h), and products of weights

#include "ggml.h"

#include <stdbool.h>
#include <stddef.h>

struct ggml_compute_params;

#ifdef __cplusplus
extern "C" {
#endif

// Those of these functions that other libraries get by name from ggml_backend_reg_get_proc_address(), else null: the CPU
// backend may be a library that is loaded while the program runs.
void * ggml_indexmem_cpu_function(const char * name);

// The vectors that the kernels are compiled for (simd.h): "AVX-512", "AVX2", "NEON", or "none".
const char * ggml_indexmem_cpu_vectors(void);

// bytes of work buffer
size_t ggml_indexmem_cpu_work_size(const struct ggml_tensor * op, int n_tasks);

void ggml_compute_forward_indexmem(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// GGML_OP_MUL_MAT where this is faster (matmul.cpp); false, and nothing done, where it is not. All threads call it, with the
// rows of src1 in the type that dot products with src0 take, contiguous, and chunk n_threads next in their pool.
bool ggml_indexmem_mul_mat(const struct ggml_compute_params * params, struct ggml_tensor * dst, const void * rows);

// the same for weights in blocks of 8 rows, interleaved by 8 bytes (repack.h); src1 is F32
bool ggml_indexmem_mul_mat_q4_0x8(const struct ggml_compute_params * params, struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif
