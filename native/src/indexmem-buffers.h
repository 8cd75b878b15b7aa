#pragma once

#include "ggml-cpp.h"

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

struct llama_model;

// Tensors in memory next to the layers of a model: one context and one buffer for each type of memory.
class indexmem_buffers {
public:
    // n_tensors: the most that will be made
    indexmem_buffers(const llama_model & model, bool offload, size_t n_tensors);

    ggml_backend_buffer_type_t type(uint32_t il) const;

    // to make tensors of a layer in, until alloc(); in memory of another type than type(il), if one is given
    ggml_context * context(uint32_t il, ggml_backend_buffer_type_t buft = nullptr);

    // Gives all tensors their memory; fails with `what` in the error if there is not enough. Of a model that was
    // loaded without its weights, nothing is allocated.
    void alloc(const std::string & what);

    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> & get() { return ctxs_bufs; }

private:
    const llama_model & model;

    const bool   offload;
    const size_t n_tensors;

    std::map<std::string, std::pair<ggml_backend_buffer_type_t, ggml_context_ptr>> ctxs;

    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> ctxs_bufs;
};
