#pragma once

#include "indexmem-rotation.h"

#include "ggml-cpp.h"

#include <map>
#include <string>
#include <vector>

struct llama_context;

// which rows of a tensor get new positions, and by how many each is turned
struct indexmem_turn {
    std::vector<int32_t> rows;
    std::vector<int32_t> deltas;

    void add(int64_t row, int32_t delta) {
        if (delta != 0) {
            rows.push_back((int32_t) row);
            deltas.push_back(delta);
        }
    }
};

//
// Turns keys that lie in a cache to other positions
//
// With stock ops on the device where the cache lies, or on the CPU where that device lacks one of them. A few thousand rows at
// a time, so that what it needs of memory is small and always the same. Not stopped by an abort: it takes as long as a
// ubatch at most, and half of it would be of no use.
//
class indexmem_rotator {
public:
    // keys [n, ne1, ne2, ne3] of any type, the first n values of rows of which `t` may have more; rot: size of their Hadamard
    // rotation, 0 = none. False with an error; the rows may be anything then.
    bool turn(llama_context & lctx, ggml_tensor * t, int64_t n, const indexmem_rotation & rotation, int64_t rot, const indexmem_turn & what,
            std::string & error);

    // takes the memory for turn() beforehand
    void reserve(llama_context & lctx, ggml_tensor * t, int64_t n, const indexmem_rotation & rotation, int64_t rot);

    size_t size_bytes() const; // of the memory it computes in

private:
    static constexpr size_t N_ROWS = 2048;

    // where rows of t are turned; staged: not where they lie
    ggml_backend_t backend_for(llama_context & lctx, ggml_tensor * t, int64_t n, const indexmem_rotation & rotation, int64_t rot, bool & staged);

    ggml_gallocr_t allocator_for(ggml_backend_t backend);

    bool turn_some(ggml_backend_t backend, bool staged, ggml_tensor * t, int64_t n, const indexmem_rotation & rotation, int64_t rot,
            const int32_t * rows, const int32_t * deltas, int64_t n_rows, std::string & error);

    ggml_backend_t cpu_backend(const llama_context & lctx);

    ggml_backend_ptr cpu;

    std::map<ggml_backend_buffer_type_t, ggml_gallocr_ptr> allocators;
};
