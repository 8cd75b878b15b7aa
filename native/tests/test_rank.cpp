// Ranks of the policies that read keys, positions and queries, each against a plain version in double.

#include "ranks.h"

TEST(every_policy_is_tested) {
    for (int policy = 0; indexmem_policy_get(policy); ++policy) {
        const std::string name = indexmem_policy_get(policy)->name;
        CHECK_MSG(name == "indexer" || std::any_of(std::begin(policies), std::end(policies), [&](const auto & p) { return name == p.name; }),
                "%s", name.c_str());
    }
}

TEST(ranks_equal_the_plain_versions) {
    for (const auto & c : rank_cases) {
        for (size_t i = 0; i < std::size(policies); ++i) {
            run_rank(c, GGML_TYPE_F16, (int) i);
        }
    }
}

// Of the CPU: what runs elsewhere does not know these threads.
TEST(ranks_are_the_same_with_any_number_of_threads) {
    if (op_elsewhere) {
        return;
    }
    for (rank_case c : { rank_cases[4], rank_cases[5], rank_case{ 64, 4096, 2, 3, { 4000 }, 3900, 0.0f, 1 } }) {
        for (size_t i = 0; i < std::size(policies); ++i) {
            std::vector<float> first;
            run_rank(c, GGML_TYPE_F16, (int) i, &first);
            for (int n_threads = 2; n_threads <= 7 && test_threads(n_threads) == n_threads; n_threads += c.n_slots > 1000 ? 5 : 1) {
                rank_case other = c;
                other.n_threads = n_threads;
                std::vector<float> found;
                run_rank(other, GGML_TYPE_F16, (int) i, &found);
                CHECK_MSG(memcmp(first.data(), found.data(), first.size()*sizeof(float)) == 0, "%s, %d threads", policies[i].name, n_threads);
            }
        }
    }
}

// So many slots that queries take turns, and that positions are not sorted in one pass. Kernels of devices, which do neither, run
// here one thread after the other: fewer are enough for them.
TEST(ranks_of_large_caches) {
    const int32_t n = op_elsewhere ? 3000 : 33000;
    for (size_t i = 0; i < std::size(policies); ++i) {
        run_rank({ 32, n, 1, 2, { n - 100 }, n - 1000, 0.0f, 2 }, GGML_TYPE_F16, (int) i);
    }
}

TEST(keys_of_any_type) {
    for (ggml_type type : { GGML_TYPE_F32, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q5_1, GGML_TYPE_Q5_0, GGML_TYPE_Q4_1, GGML_TYPE_Q4_0 }) {
        for (size_t i = 0; i < std::size(policies); ++i) {
            if (indexmem_policy_get(indexmem_policy_find(policies[i].name))->needs_keys) {
                run_rank(rank_cases[0], type, (int) i);
                if (ggml_blck_size(type) == 1) {
                    run_rank(rank_cases[5], type, (int) i);
                }
            }
        }
    }
}

// Logits whose exponentials are no numbers, and a newest entry in the first slot, which all but one query do not see.
TEST(logits_far_below_zero) {
    constexpr int32_t D = 64, SLOTS = 32, N = 8, RING = 48;
    for (const auto & p : policies) {
        const auto * info = indexmem_policy_get(indexmem_policy_find(p.name));
        if (info->n_queries == 0) {
            continue;
        }
        op_graph g;
        auto * k   = g.input(GGML_TYPE_F16, D, SLOTS, 1, 1);
        auto * pos = g.input(GGML_TYPE_I32, SLOTS, 1, 1);
        auto * ctl = g.input(GGML_TYPE_I32, INDEXMEM_CTL_SIZE, 1);
        auto * q   = g.input(GGML_TYPE_F32, D, info->n_queries > 1 ? RING : 1, 1, 1);
        auto * res = ggml_indexmem_rank(g.ctx, k, pos, ctl, q, nullptr, indexmem_policy_find(p.name), IL, SEED, SCALE, 0.0f);
        if (!g.has(res)) {
            continue;
        }
        g.alloc();
        entries e;
        e.head     = 0;
        e.p0       = 0;
        e.pos_last = N - 1;
        e.softcap  = 0.0f;
        e.queries.resize(1);
        std::vector<int32_t> data_pos(SLOTS, -9), data_ctl(INDEXMEM_CTL_SIZE, 0);
        std::vector<float>   data_k(SLOTS*D, 0.0f), data_q(ggml_nelements(q), NAN);
        for (int32_t i = 0; i < N; ++i) {
            data_pos[i] = (i + N - 1) % N;
            e.pos.push_back(data_pos[i]);
            e.keys.emplace_back(D, -12.0f - i % 2); // logits of about -230 and -250
            std::copy(e.keys.back().begin(), e.keys.back().end(), data_k.begin() + i*D);
            e.queries[0].emplace_back(D, 1.0f);
            if (i >= N - info->n_queries) {
                std::fill_n(data_q.begin() + (info->n_queries > 1 ? i : 0)*D, D, 1.0f);
            }
        }
        data_ctl[INDEXMEM_CTL_N_USED]   = N;
        data_ctl[INDEXMEM_CTL_N_EVICT]  = 1;
        data_ctl[INDEXMEM_CTL_N_FIXED]  = N;
        data_ctl[INDEXMEM_CTL_POS_TAIL] = N;
        data_ctl[INDEXMEM_CTL_POS_LAST] = N - 1;
        g.set(k, to_type(GGML_TYPE_F16, data_k, D));
        g.set(pos, data_pos);
        g.set(ctl, data_ctl);
        g.set(q, data_q);
        g.compute({ res }, 1);
        const auto  found    = g.get<float>(res);
        const ranks expected = p.plain(e);
        for (int32_t i = 0; i < N; ++i) {
            CHECK_MSG(std::fabs(found[i] - expected[i]) <= p.tolerance*std::max(p.least, std::fabs(expected[i])), "%s, entry %d: %g, expected %g",
                    p.name, i, found[i], expected[i]);
        }
    }
}
