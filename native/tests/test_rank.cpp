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
