#include "indexmem-rotation.h"

#include "ggml-backend.h"
#include "ggml-impl.h"
#include "llama-impl.h"

#include <algorithm>
#include <cmath>
#include <iterator>

ggml_tensor * indexmem_rotation::build(ggml_context * ctx, ggml_tensor * x, ggml_tensor * delta, ggml_tensor * freq_factors) const {
    // ROPE multiplies by this when it mixes frequencies, and keys have been multiplied already
    const float length = ext_factor != 0.0f ? 1.0f + 0.1f*logf(1.0f/freq_scale) : 1.0f;

    if (n_parts() > 1) {
        int parts[GGML_MROPE_SECTIONS];
        std::copy(std::begin(sections), std::end(sections), parts);
        x = ggml_rope_multi(ctx, x, delta, freq_factors, n_dims, parts, mode, n_ctx_orig, freq_base, freq_scale, ext_factor, 1.0f/length,
                beta_fast, beta_slow);
    } else {
        x = ggml_rope_ext(ctx, x, delta, freq_factors, n_dims, mode, n_ctx_orig, freq_base, freq_scale, ext_factor, 1.0f/length,
                beta_fast, beta_slow);
    }
    return n_offset > 0 ? ggml_rope_set_offset(x, n_offset) : x;
}

std::vector<int32_t> indexmem_rotation::positions(const int32_t * deltas, int64_t n) const {
    std::vector<int32_t> res(n_parts()*n, 0);
    for (int part = 0; part < std::min(n_parts(), 3); ++part) {
        std::copy(deltas, deltas + n, res.begin() + part*n);
    }
    return res;
}

namespace {

class tracer {
public:
    explicit tracer(const ggml_tensor * hadamard) : hadamard(hadamard) {}

    // the ROPE behind t, with `offset` values of the head in front of what it rotated; null if there is none
    const ggml_tensor * find(const ggml_tensor * t, int & offset) {
        if (!t || !error.empty()) {
            return nullptr;
        }
        if (++n_visited > N_VISITED_MAX) {
            error = "its keys come by a way that is too long to follow";
            return nullptr;
        }
        switch (t->op) {
            case GGML_OP_NONE:
            case GGML_OP_GET_ROWS:
            case GGML_OP_MUL_MAT_ID:
                return nullptr;
            case GGML_OP_MUL_MAT:
                return t->src[0] == hadamard && hadamard ? find(t->src[1], offset) : nullptr;
            case GGML_OP_VIEW:
            case GGML_OP_RESHAPE:
            case GGML_OP_PERMUTE:
            case GGML_OP_TRANSPOSE:
            case GGML_OP_CONT:
            case GGML_OP_CPY:
            case GGML_OP_DUP:
            case GGML_OP_REPEAT:
            case GGML_OP_RMS_NORM: // a rotation keeps lengths
            case GGML_OP_L2_NORM:
                return find(t->src[0], offset);
            case GGML_OP_SCALE:
                return ggml_get_op_params_f32(t, 1) == 0.0f ? find(t->src[0], offset) : none_in(t);
            case GGML_OP_CONCAT:
                return in_concat(t, offset);
            case GGML_OP_ROPE:
                return none_in(t) || !error.empty() ? nullptr : t;
            default:
                return none_in(t);
        }
    }

    std::string error;

private:
    static constexpr int N_VISITED_MAX = 256;

    // null, and an error if what goes into t was rotated
    const ggml_tensor * none_in(const ggml_tensor * t) {
        for (const ggml_tensor * src : t->src) {
            int offset = 0;
            if (find(src, offset)) {
                error = format("its keys go through %s after their rotation", ggml_op_desc(t));
            }
        }
        return nullptr;
    }

    // one part of the head rotated, the other not
    const ggml_tensor * in_concat(const ggml_tensor * t, int & offset) {
        int first = 0, second = 0;
        const ggml_tensor * a = find(t->src[0], first);
        const ggml_tensor * b = find(t->src[1], second);
        if ((a || b) && (ggml_get_op_params_i32(t, 0) != 0 || (a && b))) {
            error = "its keys are put together of several that were rotated";
            return nullptr;
        }
        offset = a ? first : (int) t->src[0]->ne[0] + second;
        return a ? a : b;
    }

    const ggml_tensor * hadamard;

    int n_visited = 0;
};

} // namespace

bool indexmem_rotation_of(const ggml_tensor * k_cur, const ggml_tensor * hadamard, indexmem_rotation & rotation, std::string & error) {
    tracer tr(hadamard);

    int offset = 0;
    const ggml_tensor * rope = tr.find(k_cur, offset);

    error    = tr.error;
    rotation = {};
    if (!error.empty()) {
        return false;
    }
    if (!rope) {
        return true;
    }
    const auto f32 = [&](int i) { return ggml_get_op_params_f32(rope, i); };
    const auto i32 = [&](int i) { return ggml_get_op_params_i32(rope, i); };

    rotation.rotates    = true;
    rotation.n_dims     = i32(1);
    rotation.mode       = i32(2);
    rotation.n_ctx_orig = i32(4);
    rotation.freq_base  = f32(5);
    rotation.freq_scale = f32(6);
    rotation.ext_factor = f32(7);
    rotation.beta_fast  = f32(9);
    rotation.beta_slow  = f32(10);
    rotation.n_offset   = i32(15) + offset;

    if (rotation.mode == GGML_ROPE_TYPE_MROPE || rotation.mode == GGML_ROPE_TYPE_IMROPE) {
        for (int i = 0; i < GGML_MROPE_SECTIONS; ++i) {
            rotation.sections[i] = i32(11 + i);
        }
    } else if (rotation.mode != GGML_ROPE_TYPE_NORMAL && rotation.mode != GGML_ROPE_TYPE_NEOX) {
        error = format("its keys are rotated in a way (%d) that is not known here", rotation.mode);
        return false;
    }
    if (rotation.n_offset + rotation.n_dims > k_cur->ne[0]) {
        error = format("%d values of a key of %d were rotated", rotation.n_offset + rotation.n_dims, (int) k_cur->ne[0]);
        return false;
    }
    if (const ggml_tensor * factors = rope->src[2]) {
        if (factors->op != GGML_OP_NONE) {
            error = "its frequencies are computed";
            return false;
        }
        rotation.factors.resize(rotation.n_dims/2, 1.0f);
        if (factors->buffer && factors->data) {
            ggml_backend_tensor_get(factors, rotation.factors.data(), 0, rotation.factors.size()*sizeof(float));
        }
    }
    return true;
}
