#pragma once

// Takes the place of the header of this name in ggml's CUDA backend, so that our kernels are compiled as C++ and run on the
// CPU (executor.h), unchanged: what they use of CUDA and of the backend, and nothing else.

#include "executor.h"

#include "ggml.h"
#include "ggml-impl.h"

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

#include <algorithm>
#include <climits>
#include <cmath>

#define __global__
#define __host__
#define __device__
#define __shared__ SHIM_GROUP_VARIABLE

#define threadIdx shim::here().index
#define blockIdx  shim::here().group
#define blockDim  shim::here().size

using std::max;
using std::min;

typedef ggml_fp16_t half;

struct int4 {
    int x, y, z, w;
};

inline float __half2float(half x) { return ggml_fp16_to_fp32(x); }
inline half  __float2half(float x) { return ggml_fp32_to_fp16(x); }

inline void __syncthreads() { shim::barrier(); }

template <typename T>
T __shfl_xor_sync(uint32_t, T x, int mask, int) { return shim::shuffle(x, shim::here().lane ^ (uint32_t) mask); }

template <typename T>
T __shfl_up_sync(uint32_t, T x, int delta, int) { // the first lanes keep their own
    const uint32_t lane = shim::here().lane;
    return shim::shuffle(x, lane < (uint32_t) delta ? lane : lane - (uint32_t) delta);
}

inline uint32_t atomicAdd(uint32_t * p, uint32_t x) {
    const uint32_t before = *p;
    *p += x;
    return before;
}

// host

struct dim3 {
    uint32_t x, y, z;

    dim3(int64_t x, int64_t y = 1, int64_t z = 1) : x((uint32_t) x), y((uint32_t) y), z((uint32_t) z) {
        // the limits of a grid
        GGML_ASSERT(0 < x && x < INT_MAX && 0 < y && y < 65536 && 0 < z && z < 65536);
    }
};

enum cudaError_t { cudaSuccess };
typedef void * cudaStream_t;

#define CUDA_CHECK(call) GGML_ASSERT((call) == cudaSuccess)

// Each launch takes another order, the same in every run, or all the one that INDEXMEM_SHIM_ORDER names.
inline shim::order order_of_launch() {
    static std::mt19937 rng(1);
    return getenv("INDEXMEM_SHIM_ORDER") ? shim::order_of_environment() : (shim::order) (rng() % 3);
}

template <typename A>
cudaError_t cudaLaunchKernel(void (*kernel)(A), dim3 grid, dim3 block, void ** args, size_t, cudaStream_t) {
    const A a = *(const A *) args[0];
    shim::run({ grid.x, grid.y, grid.z }, { block.x, block.y, block.z }, 0, order_of_launch(), [&] { kernel(a); });
    return cudaSuccess;
}

// memory of a pool, poisoned; nothing behind it may be written
struct ggml_cuda_pool {
};

template <typename T>
struct ggml_cuda_pool_alloc {
    static constexpr size_t GUARD = 64;

    std::vector<uint8_t> bytes;

    ggml_cuda_pool_alloc(ggml_cuda_pool &, size_t n) : bytes(n*sizeof(T) + GUARD, 0xFF) {
    }

    ~ggml_cuda_pool_alloc() {
        GGML_ASSERT(std::all_of(bytes.end() - GUARD, bytes.end(), [](uint8_t x) { return x == 0xFF; }));
    }

    T * get() { return (T *) bytes.data(); }
};

struct ggml_backend_cuda_context {
    ggml_cuda_pool memory;

    ggml_cuda_pool & pool()   { return memory; }
    cudaStream_t     stream() { return nullptr; }
};
