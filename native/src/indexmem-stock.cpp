#include "indexmem-stock.h"

#include "indexmem-nodes.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cfloat>
#include <cstring>

bool indexmem_stock_exact(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F32:
        case GGML_TYPE_F16:
        case GGML_TYPE_BF16:
        case GGML_TYPE_Q8_0:
        case GGML_TYPE_Q4_0:
        case GGML_TYPE_Q5_0:
            return true;
        default:
            return false;
    }
}

// a list of ggml_indexmem_moves()
static ggml_tensor * list_of(ggml_context * ctx, ggml_tensor * moves, int64_t i) {
    return ggml_view_3d(ctx, moves, moves->ne[0], moves->ne[1], moves->ne[2], moves->nb[1], moves->nb[2], i*moves->nb[3]);
}

ggml_tensor * indexmem_stock_compact(ggml_context * ctx, ggml_tensor * cache, ggml_tensor * moves) {
    return ggml_set_rows(ctx, cache, ggml_get_rows(ctx, cache, list_of(ctx, moves, 3)), list_of(ctx, moves, 2));
}

ggml_tensor * indexmem_stock_leaving(ggml_context * ctx, ggml_tensor * cache, ggml_tensor * moves) {
    return ggml_get_rows(ctx, cache, list_of(ctx, moves, 1));
}

ggml_tensor * indexmem_stock_leaving_plan(ggml_context * ctx, ggml_tensor * moves) {
    return ggml_view_4d(ctx, moves, moves->ne[0], 3, moves->ne[1], moves->ne[2], moves->nb[3], moves->nb[1], moves->nb[2], 0);
}

static bool is_policy(int policy, const char * name) {
    return strcmp(indexmem_policy_get(policy)->name, name) == 0;
}

bool indexmem_stock::ranks(int policy) {
    return is_policy(policy, "knorm") || is_policy(policy, "keydiff");
}

ggml_tensor * indexmem_stock::build_rank(ggml_context * ctx, ggml_tensor * keys, int policy) {
    const int64_t n_embd  = keys->ne[0];
    const int64_t n_slots = keys->ne[1];
    const int64_t H       = keys->ne[2];
    GGML_ASSERT(ranks(policy) && keys->ne[3] == n_seq);

    auto & read = rows[H];
    if (!read) {
        read = indexmem_new_input(ctx, "stock_rows", GGML_TYPE_I32, n_slots, H, n_seq);
    }
    ggml_tensor * cur = ggml_get_rows(ctx, keys, read);

    if (is_policy(policy, "knorm")) {
        cur = ggml_sqrt(ctx, ggml_sum_rows(ctx, ggml_sqr(ctx, cur)));
    } else {
        if (!weights) {
            weights = indexmem_new_input(ctx, "stock_weights", GGML_TYPE_F32, 1, n_slots, 1, n_seq);
        }
        cur = ggml_l2_norm(ctx, cur, FLT_MIN); // a key of zeros stays one

        ggml_tensor * sum = ggml_cont(ctx, ggml_transpose(ctx, ggml_mul(ctx, cur, weights)));
        sum = ggml_reshape_4d(ctx, ggml_sum_rows(ctx, sum), n_embd, 1, H, n_seq);

        cur = ggml_mul_mat(ctx, cur, ggml_l2_norm(ctx, sum, FLT_MIN));
        ggml_prec_set_acc(cur, GGML_PREC_F32);
    }
    return ggml_reshape_3d(ctx, ggml_neg(ctx, cur), n_slots, H, n_seq);
}

void indexmem_stock::set_input(const std::vector<int32_t> & ctl) {
    const auto n_used = [&](int64_t s, int64_t n_slots) {
        return std::min<int64_t>(ctl[s*INDEXMEM_CTL_SIZE + INDEXMEM_CTL_N_USED], n_slots);
    };
    for (const auto & [H, t] : rows) {
        std::vector<int32_t> data(ggml_nelements(t), 0);
        for (int64_t row = 0; row < H*n_seq; ++row) {
            for (int64_t i = 0; i < n_used(row/H, t->ne[0]); ++i) {
                data[row*t->ne[0] + i] = (int32_t) i;
            }
        }
        ggml_backend_tensor_set(t, data.data(), 0, ggml_nbytes(t));
    }
    if (weights) {
        std::vector<float> data(ggml_nelements(weights), 0.0f);
        for (int64_t s = 0; s < n_seq; ++s) {
            std::fill_n(data.begin() + s*weights->ne[1], n_used(s, weights->ne[1]), 1.0f);
        }
        ggml_backend_tensor_set(weights, data.data(), 0, ggml_nbytes(weights));
    }
}
