#pragma once

// fp32 building blocks of the policies, on the vector helpers of ggml's CPU backend

#include "vec.h"

#include <cstdint>

inline float indexmem_dot(const float * a, const float * b, int64_t n) {
    float sum = 0.0f;
    ggml_vec_dot_f32((int) n, &sum, 0, a, 0, b, 0, 1);
    return sum;
}
