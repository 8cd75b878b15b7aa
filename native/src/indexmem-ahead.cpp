#include "indexmem-ahead.h"

#include "indexmem-nodes.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "llama-impl.h"

#include <stdexcept>

static constexpr size_t N_TENSORS = 128;

// With R the rotation by one position, R + R^2 + ... + R^n = R (1 + R)(1 + R^2)(1 + R^4)...(1 + R^(n/2)), n being a power of two: a
// handful of the same ops that turn keys, on the rows of the unit matrix.
std::vector<float> indexmem_ahead(const indexmem_rotation & rotation, int64_t n, int64_t rot) {
    std::vector<float> res(n*n, 0.0f);
    for (int64_t i = 0; i < n; ++i) {
        res[i*n + i] = 1.0f;
    }
    if (!rotation.rotates) {
        return res;
    }
    ggml_context_ptr holder(ggml_init({ N_TENSORS*ggml_tensor_overhead() + ggml_graph_overhead_custom(N_TENSORS, false), nullptr, true }));
    ggml_context * ctx = holder.get();
    ggml_cgraph  * gf  = ggml_new_graph_custom(ctx, N_TENSORS, false);

    ggml_tensor * unit     = indexmem_new_input(ctx, "ahead_unit", GGML_TYPE_F32, n, n);
    ggml_tensor * factors  = rotation.factors.empty() ? nullptr : indexmem_new_input(ctx, "ahead_factors", GGML_TYPE_F32, rotation.factors.size());
    ggml_tensor * hadamard = rot == 0 ? nullptr : indexmem_new_input(ctx, "ahead_hadamard", GGML_TYPE_F32, rot, rot);

    std::vector<std::pair<ggml_tensor *, int32_t>> deltas;
    const auto turn = [&](ggml_tensor * t, int32_t by) {
        deltas.emplace_back(indexmem_new_input(ctx, "ahead_delta", GGML_TYPE_I32, n*rotation.n_parts()), by);
        return rotation.build(ctx, t, deltas.back().first, factors);
    };
    // the Hadamard matrix is its own inverse
    ggml_tensor * cur = hadamard ? llama_mul_mat_hadamard(ctx, unit, hadamard) : unit;
    cur = turn(ggml_reshape_3d(ctx, cur, n, 1, n), 1);
    for (int32_t by = 1; by < INDEXMEM_N_AHEAD; by *= 2) {
        cur = ggml_scale(ctx, ggml_add(ctx, cur, turn(cur, by)), 0.5f);
    }
    cur = ggml_reshape_2d(ctx, cur, n, n);
    cur = hadamard ? llama_mul_mat_hadamard(ctx, cur, hadamard) : cur;
    cur = ggml_cont(ctx, ggml_transpose(ctx, cur)); // row i was what becomes of the unit vector i
    ggml_set_output(cur);
    ggml_build_forward_expand(gf, cur);

    ggml_backend_ptr backend(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
    ggml_gallocr_ptr allocator(backend ? ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend.get())) : nullptr);
    if (!allocator || !ggml_gallocr_alloc_graph(allocator.get(), gf)) {
        throw std::runtime_error("the policy 'expected': there is no CPU backend, or no memory, to average rotations");
    }
    ggml_backend_tensor_set(unit, res.data(), 0, ggml_nbytes(unit));
    if (factors) {
        ggml_backend_tensor_set(factors, rotation.factors.data(), 0, ggml_nbytes(factors));
    }
    if (hadamard) {
        ggml_backend_tensor_set(hadamard, indexmem_hadamard(rot).data(), 0, ggml_nbytes(hadamard));
    }
    for (const auto & [delta, by] : deltas) {
        const std::vector<int32_t> same(n, by);
        ggml_backend_tensor_set(delta, rotation.positions(same.data(), n).data(), 0, ggml_nbytes(delta));
    }
    if (ggml_backend_graph_compute(backend.get(), gf) != GGML_STATUS_SUCCESS) {
        throw std::runtime_error("the policy 'expected': rotations could not be averaged");
    }
    ggml_backend_tensor_get(cur, res.data(), 0, ggml_nbytes(cur));
    return res;
}
