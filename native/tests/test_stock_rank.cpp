// Ranks by ops of ggml alone against the plain versions. On the device that INDEXMEM_TEST_DEVICE names, if it is set.

#include "ranks.h"

#include "indexmem-stock.h"

#include <memory>

// A device may round the factors of a product to half precision.
static const double TOLERANCE = getenv("INDEXMEM_TEST_DEVICE") ? 50.0 : 1.0;

static rank_way by_ops_of_ggml(int64_t n_seq) {
    const auto stock = std::make_shared<indexmem_stock>(n_seq);
    return { [stock](ggml_context * ctx, const rank_inputs & in) {
        return stock->build_rank(ctx, in.k, in.pos, in.ctl, in.q, in.sinks, in.policy, SCALE, in.softcap);
    }, [stock](const std::vector<int32_t> & ctl) { stock->set_input(ctl); }, TOLERANCE };
}

static void run(const rank_case & c, ggml_type type) {
    for (size_t i = 0; i < std::size(policies); ++i) {
        if (indexmem_stock::ranks(indexmem_policy_find(policies[i].name))) {
            run_rank(c, type, (int) i, nullptr, by_ops_of_ggml(c.n_used.size()));
        }
    }
}

TEST(policies_that_read_keys_have_a_form_in_ops_of_ggml) {
    for (int policy = 0; indexmem_policy_get(policy); ++policy) {
        CHECK(indexmem_stock::ranks(policy) == indexmem_policy_get(policy)->needs_keys);
    }
}

TEST(ranks_equal_the_plain_versions) {
    for (const auto & c : rank_cases) {
        run(c, GGML_TYPE_F16);
    }
}

TEST(keys_of_any_type) {
    for (int type = 0; type < GGML_TYPE_COUNT; ++type) {
        if (indexmem_stock_exact((ggml_type) type)) {
            run(rank_cases[0], (ggml_type) type);
            run(rank_cases[3], (ggml_type) type);
        }
    }
}

TEST(ranks_of_large_caches) {
    run({ 32, 33000, 1, 2, { 32900 }, 32000, 0.0f, 2 }, GGML_TYPE_F16);
}
