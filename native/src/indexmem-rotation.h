#pragma once

#include "ggml.h"

#include <string>
#include <vector>

//
// How the keys of a layer are rotated by their positions
//
// Read from the graph that a model builds, not from tables of architectures: so partial rotation, scaling, frequency factors
// and layers that are not rotated at all come out as they are.
//
struct indexmem_rotation {
    bool rotates = false; // the fields below are of no meaning otherwise

    int   n_dims     = 0;
    int   n_offset   = 0; // values of the head in front of those that are rotated
    int   mode       = 0;
    int   n_ctx_orig = 0;
    float freq_base  = 0.0f;
    float freq_scale = 0.0f;
    float ext_factor = 0.0f;
    float beta_fast  = 0.0f;
    float beta_slow  = 0.0f;

    int sections[GGML_MROPE_SECTIONS] = {}; // with a position of several dimensions (M-RoPE), which frequencies each of them turns

    std::vector<float> factors; // of the frequencies, [n_dims/2]; empty: 1

    // numbers that make up a position
    int n_parts() const { return sections[0] + sections[1] + sections[2] + sections[3] > 0 ? 4 : 1; }

    // of n positions of text [n_parts, n]: all dimensions are the same, but for a fourth one, which is of images alone and 0
    std::vector<int32_t> positions(const int32_t * deltas, int64_t n) const;

    // x F32 [n_embd, 1, n] turned by as many positions as delta I32 [n*n_parts] says, without a change of length; factors F32 or null
    ggml_tensor * build(ggml_context * ctx, ggml_tensor * x, ggml_tensor * delta, ggml_tensor * factors) const;
};

// What is done to a key between its projection and the cache. k_cur: what the cache stores; hadamard: the matrix by which keys of
// quantised caches are multiplied, or null. Reads the factors out of the model's tensors, unless these have no data. False, with
// the reason, if a key cannot be turned to another position as it lies in the cache.
bool indexmem_rotation_of(const ggml_tensor * k_cur, const ggml_tensor * hadamard, indexmem_rotation & rotation, std::string & error);
