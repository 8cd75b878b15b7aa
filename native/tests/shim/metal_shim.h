#pragma once

// As much of the Metal Shading Language as the kernels use, in C++: they are compiled as they are and run by executor.h.
// What the language forbids and C++ allows is not found here: most mistakes with address spaces, double, recursion, what a
// compiler may do under fast math. Include everything else before the kernels; metal_end.h takes the
// words of the language away again.

#include "executor.h"

#include "ggml.h"

#include <cmath>

typedef unsigned char uchar;

struct half {
    ggml_fp16_t bits;

    half() = default;
    explicit half(float x) : bits(ggml_fp32_to_fp16(x)) {}
    explicit operator float() const { return ggml_fp16_to_fp32(bits); }
};

struct uint3  { uint32_t x, y, z; };
struct uint4  { uint32_t x, y, z, w; };

template <typename To, typename From>
To as_type(From from) {
    static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
    To to;
    memcpy((void *) &to, &from, sizeof(to));
    return to;
}

namespace metal {

// no others of mixed types: there the language has no answer either
template <typename T> T min(T a, T b) { return b < a ? b : a; }
template <typename T> T max(T a, T b) { return a < b ? b : a; }

namespace precise {
inline float exp (float x) { return std::exp(x);  }
inline float sqrt(float x) { return std::sqrt(x); }
inline float log (float x) { return std::log(x);  }
inline float tanh(float x) { return std::tanh(x); }
} // namespace precise

enum class mem_flags { mem_none, mem_device, mem_threadgroup };

// Memory is one here, and a barrier for the wrong kind of it is not found out.
inline void threadgroup_barrier(mem_flags) { shim::barrier(); }

template <typename T> T simd_sum(T x) { return shim::reduce(x, [](T a, T b) { return a + b; }); }
template <typename T> T simd_min(T x) { return shim::reduce(x, [](T a, T b) { return b < a ? b : a; }); }
template <typename T> T simd_max(T x) { return shim::reduce(x, [](T a, T b) { return a < b ? b : a; }); }

template <typename T> T simd_broadcast(T x, uint16_t lane) { return shim::shuffle(x, lane); }

template <typename T> T simd_prefix_exclusive_sum(T x) {
    const T * all = shim::executor::get().exchange(x, "a prefix sum");
    T res = 0;
    for (uint32_t i = 0; i < shim::here().lane; ++i) {
        res += all[i];
    }
    return res;
}

struct atomic_uint { uint32_t value; };
enum memory_order { memory_order_relaxed };

inline void     atomic_store_explicit    (volatile atomic_uint * a, uint32_t x, memory_order)  { a->value = x; }
inline uint32_t atomic_load_explicit     (const volatile atomic_uint * a, memory_order)        { return a->value; }
inline uint32_t atomic_fetch_add_explicit(volatile atomic_uint * a, uint32_t x, memory_order)  { a->value = a->value + x; return a->value - x; }

} // namespace metal

// `threadgroup` is a word of attributes, too, where a keyword may stand. As a qualifier it keeps such pointers from others.
#define kernel
#define device
#define constant
#define thread
#define threadgroup volatile
