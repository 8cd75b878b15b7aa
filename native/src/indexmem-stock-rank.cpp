#include "indexmem-stock.h"

#include "indexmem-nodes.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cfloat>
#include <cstring>

// Taken off the logits of entries that a query does not see. It is finite because a query may see none at all, and its attention is
// multiplied with zeros then.
static constexpr float UNSEEN = 1e30f;

static bool is_policy(int policy, const char * name) {
    return strcmp(indexmem_policy_get(policy)->name, name) == 0;
}

bool indexmem_stock::ranks(int policy) {
    const char * known[] = { "knorm", "keydiff", "tova", "snapkv", "expected" };
    return std::any_of(std::begin(known), std::end(known), [policy](const char * name) { return is_policy(policy, name); });
}

ggml_tensor * indexmem_stock::build_rank(ggml_context * ctx, ggml_tensor * keys, ggml_tensor * pos, ggml_tensor * ctl, ggml_tensor * q,
        ggml_tensor * sinks, int policy, float scale, float softcap) {
    const int64_t n_slots = keys->ne[1];
    const int64_t H       = keys->ne[2];
    GGML_ASSERT(ranks(policy) && keys->ne[3] == n_seq);

    auto & read = rows[H];
    if (!read) {
        read = indexmem_new_input(ctx, "stock_rows", GGML_TYPE_I32, n_slots, H, n_seq);
    }
    keys = ggml_get_rows(ctx, keys, read);

    ggml_tensor * res = nullptr;
    if (is_policy(policy, "knorm")) {
        res = ggml_neg(ctx, ggml_sqrt(ctx, ggml_sum_rows(ctx, ggml_sqr(ctx, keys))));
    } else if (is_policy(policy, "keydiff")) {
        res = build_keydiff(ctx, keys);
    } else {
        const int64_t n_queries = indexmem_policy_get(policy)->n_queries;
        q = build_queries(ctx, q, n_queries, H);
        if (is_policy(policy, "expected")) {
            res = build_expected(ctx, keys, q, n_queries, scale);
        } else {
            // the newest query sees all that there is
            ggml_tensor * seen = n_queries > 1 ? build_seen(ctx, ggml_indexmem_ages(ctx, pos, ctl), n_queries) : build_used(ctx, n_slots, H);
            res = build_attention(ctx, keys, q, seen, sinks, scale, softcap);
        }
    }
    res = ggml_reshape_3d(ctx, res, n_slots, H, n_seq);
    return is_policy(policy, "snapkv") ? ggml_indexmem_rank_attended(ctx, res, pos, ctl, policy) : res;
}

ggml_tensor * indexmem_stock::get_weights(ggml_context * ctx, int64_t n_slots) {
    if (!weights) {
        weights = indexmem_new_input(ctx, "stock_weights", GGML_TYPE_F32, 1, n_slots, 1, n_seq);
    }
    return weights;
}

ggml_tensor * indexmem_stock::get_shares(ggml_context * ctx, int64_t n_queries) {
    if (!shares) {
        shares = indexmem_new_input(ctx, "stock_shares", GGML_TYPE_F32, n_queries, 1, 1, n_seq);
    }
    return shares;
}

ggml_tensor * indexmem_stock::build_keydiff(ggml_context * ctx, ggml_tensor * keys) {
    const int64_t H = keys->ne[2];

    keys = ggml_l2_norm(ctx, keys, FLT_MIN); // a key of zeros stays one

    ggml_tensor * sum = ggml_cont(ctx, ggml_transpose(ctx, ggml_mul(ctx, keys, get_weights(ctx, keys->ne[1]))));
    sum = ggml_reshape_4d(ctx, ggml_sum_rows(ctx, sum), keys->ne[0], 1, H, n_seq);

    ggml_tensor * res = ggml_mul_mat(ctx, keys, ggml_l2_norm(ctx, sum, FLT_MIN));
    ggml_prec_set_acc(res, GGML_PREC_F32);
    return ggml_neg(ctx, res);
}

// ring F32 [n_embd, n_ring, H*G, S], newest query first -> F32 [n_embd, n_queries*G, H, S]
ggml_tensor * indexmem_stock::build_queries(ggml_context * ctx, ggml_tensor * ring, int64_t n_queries, int64_t H) {
    const int64_t n_head = ring->ne[2];
    if (ring->ne[1] == 1) {
        ring = ggml_cont(ctx, ring);
    } else {
        auto & read = ring_rows[n_head];
        if (!read) {
            read = indexmem_new_input(ctx, "stock_queries", GGML_TYPE_I32, n_queries, n_head, n_seq);
        }
        n_ring = ring->ne[1];
        ring   = ggml_get_rows(ctx, ring, read);
    }
    return ggml_reshape_4d(ctx, ring, ring->ne[0], n_queries*(n_head/H), H, n_seq);
}

// 1 for entries -> F32 [n_slots, 1, 1, H*S]
ggml_tensor * indexmem_stock::build_used(ggml_context * ctx, int64_t n_slots, int64_t H) {
    ggml_tensor * res = ggml_reshape_4d(ctx, get_weights(ctx, n_slots), n_slots, 1, 1, n_seq);
    return ggml_reshape_4d(ctx, ggml_repeat_4d(ctx, res, n_slots, 1, H, n_seq), n_slots, 1, 1, H*n_seq);
}

// 1 for entries that are at least as old as a query, ages F32 [n_slots, H, S] -> F32 [n_slots, n_queries, 1, H*S]
ggml_tensor * indexmem_stock::build_seen(ggml_context * ctx, ggml_tensor * ages, int64_t n_queries) {
    const int64_t n_slots = ages->ne[0];
    const int64_t H       = ages->ne[1];
    if (!newer) {
        newer = indexmem_new_input(ctx, "stock_newer", GGML_TYPE_F32, 1, n_queries);
    }
    ages = ggml_reshape_4d(ctx, ages, n_slots, 1, H, n_seq);
    ages = ggml_repeat_4d(ctx, ages, n_slots, n_queries, H, n_seq);
    ages = ggml_clamp(ctx, ggml_sub(ctx, ages, newer), 0.0f, 1.0f);
    return ggml_reshape_4d(ctx, ages, n_slots, n_queries, 1, H*n_seq);
}

static ggml_tensor * build_logits(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, float scale, float softcap) {
    ggml_tensor * res = ggml_mul_mat(ctx, a, b);
    ggml_prec_set_acc(res, GGML_PREC_F32);
    if (softcap == 0.0f) {
        return ggml_scale(ctx, res, scale);
    }
    return ggml_scale(ctx, ggml_tanh(ctx, ggml_scale(ctx, res, scale/softcap)), softcap);
}

// keys F32 [n_embd, n_slots, H, S], q F32 [n_embd, n_queries*G, H, S], seen F32 [n_slots, n_queries, 1, H*S] -> F32 [1, n_slots, H, S]
ggml_tensor * indexmem_stock::build_attention(ggml_context * ctx, ggml_tensor * keys, ggml_tensor * q, ggml_tensor * seen, ggml_tensor * sinks,
        float scale, float softcap) {
    const int64_t n_slots   = seen->ne[0];
    const int64_t n_queries = seen->ne[1];
    const int64_t H         = keys->ne[2];
    const int64_t G         = q->ne[1]/n_queries;

    ggml_tensor * mask = ggml_scale_bias(ctx, seen, UNSEEN, -UNSEEN);
    ggml_tensor * cur  = build_logits(ctx, keys, q, scale, softcap);
    if (sinks) { // softmax wants all heads that have a sink in dimension 2
        mask = ggml_reshape_4d(ctx, ggml_repeat_4d(ctx, mask, n_slots, n_queries, G, H*n_seq), n_slots, n_queries, G*H, n_seq);
        cur  = ggml_reshape_4d(ctx, cur, n_slots, n_queries, G*H, n_seq);
    } else {
        cur  = ggml_reshape_4d(ctx, cur, n_slots, n_queries, G, H*n_seq);
    }
    cur = ggml_soft_max_ext(ctx, cur, mask, 1.0f, 0.0f);
    ggml_soft_max_add_sinks(cur, sinks);
    cur = ggml_reshape_4d(ctx, cur, n_slots, n_queries, G, H*n_seq);

    // what counts of it: each query the same, and nothing of one that sees nothing
    if (n_queries > 1) {
        seen = ggml_reshape_4d(ctx, seen, n_slots, n_queries, H, n_seq);
        seen = ggml_mul(ctx, seen, ggml_reshape_4d(ctx, get_shares(ctx, n_queries), 1, n_queries, 1, n_seq));
        seen = ggml_reshape_4d(ctx, seen, n_slots, n_queries, 1, H*n_seq);
        cur  = ggml_mul(ctx, cur, seen);
    }
    cur = ggml_reshape_4d(ctx, cur, n_slots, n_queries*G, H, n_seq);
    cur = ggml_sum_rows(ctx, ggml_cont(ctx, ggml_transpose(ctx, cur)));
    return ggml_scale(ctx, cur, 1.0f/(float) G);
}

// the same without `seen`, [n_slots, 1, H, S]
ggml_tensor * indexmem_stock::build_expected(ggml_context * ctx, ggml_tensor * keys, ggml_tensor * q, int64_t n_queries, float scale) {
    const int64_t n_embd = q->ne[0];
    const int64_t n_all  = q->ne[1];
    const int64_t H      = q->ne[2];
    const int64_t G      = n_all/n_queries;

    q = ggml_reshape_4d(ctx, q, n_embd, n_queries, G*H, n_seq);
    q = ggml_mul(ctx, q, ggml_reshape_4d(ctx, get_shares(ctx, n_queries), 1, n_queries, 1, n_seq));
    q = ggml_reshape_4d(ctx, q, n_embd, n_all, H, n_seq);

    ggml_tensor * mean = ggml_sum_rows(ctx, ggml_cont(ctx, ggml_transpose(ctx, q)));
    return build_logits(ctx, keys, ggml_reshape_4d(ctx, mean, n_embd, 1, H, n_seq), scale/(float) G, 0.0f);
}

template <typename T>
static void set(ggml_tensor * t, const std::vector<T> & data) {
    ggml_backend_tensor_set(t, data.data(), 0, ggml_nbytes(t));
}

void indexmem_stock::set_input(const std::vector<int32_t> & ctl) {
    const auto n_used = [&](int64_t s, int64_t n_slots) {
        return std::min<int64_t>(ctl[s*INDEXMEM_CTL_SIZE + INDEXMEM_CTL_N_USED], n_slots);
    };
    const auto pos_last = [&](int64_t s) { return ctl[s*INDEXMEM_CTL_SIZE + INDEXMEM_CTL_POS_LAST]; };

    for (const auto & [H, t] : rows) {
        std::vector<int32_t> data(ggml_nelements(t), 0);
        for (int64_t row = 0; row < H*n_seq; ++row) {
            for (int64_t i = 0; i < n_used(row/H, t->ne[0]); ++i) {
                data[row*t->ne[0] + i] = (int32_t) i;
            }
        }
        set(t, data);
    }
    if (weights) {
        std::vector<float> data(ggml_nelements(weights), 0.0f);
        for (int64_t s = 0; s < n_seq; ++s) {
            std::fill_n(data.begin() + s*weights->ne[1], n_used(s, weights->ne[1]), 1.0f);
        }
        set(weights, data);
    }
    for (const auto & [n_head, t] : ring_rows) {
        std::vector<int32_t> data(ggml_nelements(t));
        for (int64_t row = 0; row < n_head*n_seq; ++row) {
            const int32_t last = pos_last(row/n_head);
            for (int32_t i = 0; i < t->ne[0]; ++i) {
                data[row*t->ne[0] + i] = (int32_t) (std::max(last - i, 0) % n_ring); // before the first: the first
            }
        }
        set(t, data);
    }
    if (shares) {
        std::vector<float> data(ggml_nelements(shares), 0.0f);
        for (int64_t s = 0; s < n_seq; ++s) {
            const int64_t n = std::min<int64_t>(shares->ne[0], pos_last(s) + 1);
            std::fill_n(data.begin() + s*shares->ne[0], n, 1.0f/(float) n);
        }
        set(shares, data);
    }
    if (newer) {
        std::vector<float> data(ggml_nelements(newer));
        for (size_t i = 0; i < data.size(); ++i) {
            data[i] = (float) i - 1.0f; // the youngest age that the query does not see
        }
        set(newer, data);
    }
}
