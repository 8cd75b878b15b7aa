#include "indexmem-nodes.h"

#include <cmath>

// entry (i, j) is +-1/sqrt(n), negative where i and j share an odd number of bits
std::vector<float> indexmem_hadamard(int64_t n) {
    const float value = 1.0f/std::sqrt((float) n);
    std::vector<float> res(n*n);
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < n; ++j) {
            bool odd = false;
            for (int64_t both = i & j; both; both &= both - 1) {
                odd = !odd;
            }
            res[i*n + j] = odd ? -value : value;
        }
    }
    return res;
}

ggml_tensor * indexmem_new_input(ggml_context * ctx, const char * name, ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2, int64_t ne3) {
    ggml_tensor * res = ggml_new_tensor_4d(ctx, type, ne0, ne1, ne2, ne3);
    ggml_set_input(res);
    ggml_set_name(res, name);
    return res;
}

ggml_tensor * indexmem_view_seqs(ggml_context * ctx, ggml_tensor * t, int64_t n, uint32_t s0, int64_t n_seq, int64_t i0) {
    return ggml_view_4d(ctx, t, t->ne[0], n, t->ne[2], n_seq, t->nb[1], t->nb[2], t->nb[3], i0*t->nb[1] + s0*t->nb[3]);
}

ggml_tensor * indexmem_tokens_last(ggml_context * ctx, ggml_tensor * cur, int64_t n_tokens, int64_t n_seq, int64_t n) {
    cur = ggml_view_4d(ctx, cur, cur->ne[0], cur->ne[1], n, n_seq,
            cur->nb[1], cur->nb[2], cur->nb[2]*n_tokens, cur->nb[2]*(n_tokens - n));
    return ggml_permute(ctx, cur, 0, 2, 1, 3);
}
