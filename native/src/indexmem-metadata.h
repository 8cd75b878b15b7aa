#pragma once

// What the parts of a sidecar, indexers and memories, are read with and described by

#include "ggml.h"
#include "gguf.h"

#include <cstdint>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

// what is wrong with a sidecar: what was expected, what was found, what to do
struct indexmem_sidecar_error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Typed access to the keys of a sidecar. Every getter throws indexmem_sidecar_error if the key is missing, has another
// type, or its value is out of range.
class indexmem_metadata {
public:
    explicit indexmem_metadata(const gguf_context * gguf) : gguf(gguf) {}

    bool has(const char * key) const { return gguf_find_key(gguf, key) >= 0; }

    uint32_t    u32    (const char * key, uint32_t min, uint32_t max) const;
    float       f32    (const char * key) const; // finite
    float       f32_pos(const char * key) const; // finite, above 0
    bool        boolean(const char * key) const;
    std::string str    (const char * key) const;

    // one of `choices`; returns its index
    size_t choice(const char * key, const std::vector<const char *> & choices) const;

    std::vector<float> f32s (const char * key, size_t n) const; // finite
    std::vector<bool>  bools(const char * key, size_t n) const;

    size_t size(const char * key) const; // of an array

    // n numbers, each at least 0 and below `end`
    std::vector<uint32_t> counts(const char * key, size_t n, uint32_t end) const;

    // at least one number, ascending, each at least 0 and below `end`
    std::vector<uint32_t> ascending(const char * key, uint32_t end) const;

private:
    int64_t find(const char * key, gguf_type type) const;
    int64_t find_array(const char * key, gguf_type type, size_t n) const;

    const gguf_context * gguf;
};

// what a sidecar says about its base model
struct indexmem_geometry {
    uint32_t n_layer;
    uint32_t n_embd;
    uint32_t n_head_kv;
};

// a tensor that every layer of the sidecar must have, as blk.<layer>.indexmem.<name>
struct indexmem_tensor_spec {
    std::string          name;
    std::vector<int64_t> ne;     // 1 to 3 dimensions
    bool                 matrix; // F32, F16 or Q8_0; otherwise F32 only
};

using indexmem_weights = std::unordered_map<std::string, ggml_tensor *>; // of one layer, by name in the spec
