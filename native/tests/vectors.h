#pragma once

// the vectors that the kernels of the CPU backend have (indexmem-cpu.h), asked for as llama does

#include "ggml-backend.h"

#include <string>

inline std::string cpu_vectors() {
    ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    auto get = (const char * (*)()) ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu), "ggml_indexmem_cpu_vectors");
    return get ? get() : "unknown";
}
