// indexmem.h without a model: defaults, errors, the table of policies

#include "test.h"

#include "indexmem.h"

#include <cstring>

static bool refused(const indexmem_params & params, const char * text) {
    const bool ok = indexmem_next_context(&params);
    const bool res = !ok && strstr(indexmem_last_error(), text);
    if (!res) {
        fprintf(stderr, "expected an error with '%s', got %s '%s'\n", text, ok ? "success" : "error", indexmem_last_error());
    }
    indexmem_next_context(nullptr);
    return res;
}

TEST(defaults) {
    const auto params = indexmem_default_params();
    CHECK(params.struct_size == sizeof(params));
    CHECK(params.budget == 0);
    CHECK(params.sinks == 4);
    CHECK(params.window == 0);
    CHECK(indexmem_next_context(&params));
    CHECK(strcmp(indexmem_last_error(), "") == 0);
}

TEST(a_small_budget_names_the_minimum) {
    auto params = indexmem_default_params();
    params.budget = 132;
    CHECK(refused(params, "133"));
    params.budget = 133;
    CHECK(indexmem_next_context(&params));
    params.pin = 100;
    CHECK(refused(params, "229"));
}

TEST(bad_fields) {
    auto params = indexmem_default_params();
    params.budget = 1024;
    params.policy = "nosuch";
    CHECK(refused(params, "streaming, random, knorm"));
    params.policy = nullptr;
    params.window = UINT32_MAX; // the sum must not wrap around
    params.pin    = UINT32_MAX;
    CHECK(refused(params, "8589934591"));
    params = indexmem_default_params();
    params.budget = UINT32_MAX;
    CHECK(refused(params, "too large"));
    params.struct_size = 8;
    CHECK(refused(params, "different versions"));
}

TEST(no_context) {
    indexmem_stats stats = {};
    stats.struct_size = sizeof(stats);
    CHECK(!indexmem_is_bounded(nullptr));
    CHECK(!indexmem_get_stats(nullptr, 0, &stats));
    CHECK(indexmem_get_positions(nullptr, 0, 0, 0, nullptr, 0) == -1);
    CHECK(indexmem_n_head_kv(nullptr, 0) == -1);
    CHECK(!indexmem_set_pin(nullptr, 0, 1));
    CHECK(strlen(indexmem_last_error()) > 0);
}

TEST(policies) {
    CHECK(indexmem_policy_count() == 9);
    for (int i = 0; i < indexmem_policy_count(); ++i) {
        CHECK(strlen(indexmem_policy_name(i)) > 0);
        CHECK(strlen(indexmem_policy_help(i)) > 0);
    }
    CHECK(indexmem_policy_name(-1) == nullptr);
    CHECK(indexmem_policy_name(indexmem_policy_count()) == nullptr);
}
