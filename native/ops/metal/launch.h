#pragma once

// How an op of GGML_OP_INDEXMEM runs on Metal: which kernels, on which grid, with what arguments. Knows nothing of Metal, so
// that the tests run the same.

#include "ggml.h"

#include <cstdint>
#include <vector>

#include "args.h"

struct indexmem_metal_launch {
    const char * kernel; // kernel_indexmem_<kernel>
    int    grid[3];      // groups of INDEXMEM_METAL_THREADS
    size_t memory;       // bytes of a group
};

// those of an op run one after the other, each sees what the one before wrote
std::vector<indexmem_metal_launch> indexmem_metal_launches(const ggml_tensor * op);

indexmem_metal_args indexmem_metal_args_of(const ggml_tensor * op);

// types that keys and values are read from, of any kind of op
struct indexmem_metal_types {
    int32_t k;
    int32_t v;
};

indexmem_metal_types indexmem_metal_types_of(const ggml_tensor * op);
