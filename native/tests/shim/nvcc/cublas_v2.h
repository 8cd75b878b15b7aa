#pragma once

// What a header of ggml's CUDA backend needs of cuBLAS to be parsed, for toolkits that come without it: our kernels use
// none of it, and can be compiled there. A real header is found before this one.

#include <cuda_runtime.h>

typedef struct cublasContext * cublasHandle_t;

enum cublasStatus_t   { CUBLAS_STATUS_SUCCESS };
enum cublasMath_t     { CUBLAS_TF32_TENSOR_OP_MATH };
enum cublasOperation_t { CUBLAS_OP_N, CUBLAS_OP_T };

cublasStatus_t cublasCreate      (cublasHandle_t * handle);
cublasStatus_t cublasSetMathMode (cublasHandle_t handle, cublasMath_t mode);
cublasStatus_t cublasSetStream   (cublasHandle_t handle, cudaStream_t stream);
const char *   cublasGetStatusString(cublasStatus_t status);
