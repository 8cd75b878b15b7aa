#pragma once

// CUDA backend of GGML_OP_INDEXMEM (see indexmem-ops.h)

struct ggml_tensor;
struct ggml_backend_cuda_context;

#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)

// These backends are built from the same sources, and nobody has run our kernels there: the op stays on the CPU.
inline bool ggml_cuda_indexmem_supported(const ggml_tensor *)                  { return false; }
inline bool ggml_cuda_indexmem(ggml_backend_cuda_context &, ggml_tensor *)     { return false; }

#else

// Whether there is a kernel for the op, its types and its shapes. There is none for attention, which on a GPU is
// ggml_flash_attn_ext, nor for policies that nobody has written one for.
bool ggml_cuda_indexmem_supported(const ggml_tensor * op);

// false: not supported. Launches kernels and waits for nothing, so that the graph can be captured.
bool ggml_cuda_indexmem(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

#endif
