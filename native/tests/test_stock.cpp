// Evictions by ops of ggml alone against the plain reference: rows that move, of every type. On the device that INDEXMEM_TEST_DEVICE
// names, if it is set. Ranks: test_stock_rank.cpp.

#include "test.h"
#include "graph.h"

#include "indexmem-stock.h"
#include "reference.h"

#include <cmath>
#include <numeric>
#include <random>

static std::vector<float> random_values(std::mt19937 & rng, size_t n) {
    std::vector<float> res(n);
    for (auto & v : res) {
        v = std::normal_distribution<float>()(rng);
    }
    return res;
}

// the lists of ggml_indexmem_moves(): numbers | evicted | to | from
static std::vector<int32_t> row_indices(const std::vector<indexmem_reference_plan> & plans, int64_t n) {
    std::vector<int32_t> res;
    for (const auto & p : plans) {
        for (int64_t i = 0; i < n; ++i) {
            res.push_back(i < (int64_t) p.evicted.size() ? (int32_t) i : -1);
        }
    }
    for (auto part : { &indexmem_reference_plan::evicted, &indexmem_reference_plan::dst, &indexmem_reference_plan::src }) {
        for (const auto & p : plans) {
            for (int64_t i = 0; i < n; ++i) {
                res.push_back((p.*part).empty() ? 0 : (p.*part)[i < (int64_t) (p.*part).size() ? i : 0]);
            }
        }
    }
    return res;
}

// of heads and sequences that differ; every fifth has nothing to move
static std::vector<indexmem_reference_plan> random_plans(std::mt19937 & rng, int64_t n_rows, int32_t n_used, int32_t n_evict) {
    std::vector<indexmem_reference_plan> res;
    for (int64_t row = 0; row < n_rows; ++row) {
        std::vector<int32_t> pos(n_used);
        std::iota(pos.begin(), pos.end(), 0);
        res.push_back(indexmem_reference_select(random_values(rng, n_used), pos, row % 5 == 4 ? 0 : n_evict, 0, n_used));
    }
    return res;
}

TEST(moves_of_a_plan) {
    constexpr int64_t n_head = 3, n_seq = 2, n_evict = 21, n_max = 25;
    std::mt19937 rng(1);
    const auto plans = random_plans(rng, n_head*n_seq, 60, n_evict);

    op_graph g;
    ggml_tensor * plan  = g.input(GGML_TYPE_I32, n_max, 3, n_head, n_seq);
    ggml_tensor * moves = ggml_indexmem_moves(g.ctx, plan);
    if (!g.has(moves)) {
        return; // the CPU alone computes it
    }
    g.alloc();
    std::vector<int32_t> data(ggml_nelements(plan), -1);
    for (size_t row = 0; row < plans.size(); ++row) {
        const auto at = data.begin() + row*3*n_max;
        std::copy(plans[row].evicted.begin(), plans[row].evicted.end(), at);
        std::copy(plans[row].dst.begin(), plans[row].dst.end(), at + n_max);
        std::copy(plans[row].src.begin(), plans[row].src.end(), at + 2*n_max);
    }
    g.set(plan, data);
    g.compute({ moves }, 2);
    CHECK(g.get<int32_t>(moves) == row_indices(plans, n_max));
}

struct compact_case { int64_t n_embd, n_slots, n_front, n_head, n_seq; int32_t n_used, n_evict; };

static const compact_case compact_cases[] = {
    //embd slots front heads seqs used evict
    {  64,  256,  0,   3,    1,    41,    1 },
    { 128,  256,  0,   1,    3,   256,   63 },
    {  96,  512, 64,   5,    2,   509,  253 }, // slots of a memory in front
    {  32, 1536,  0,   8,    1,  1025,  512 },
    { 256,  256,  0,   2,    2,    12,    9 },
};

static void run_compact(const compact_case & c, ggml_type type) {
    std::mt19937 rng(c.n_slots*131 + c.n_used);
    const auto plans = random_plans(rng, c.n_head*c.n_seq, c.n_used, c.n_evict);
    const int64_t n_max = c.n_evict + 3;

    op_graph g;
    ggml_tensor * cache = g.input(type, c.n_embd, c.n_front + c.n_slots, c.n_head, c.n_seq + 1); // another sequence before
    ggml_tensor * moves = g.input(GGML_TYPE_I32, n_max, c.n_head, c.n_seq, 4);
    ggml_tensor * view  = ggml_view_4d(g.ctx, cache, c.n_embd, c.n_slots, c.n_head, c.n_seq, cache->nb[1], cache->nb[2], cache->nb[3],
            cache->nb[3] + c.n_front*cache->nb[1]);
    ggml_tensor * moved = indexmem_stock_compact(g.ctx, view, moves);
    g.alloc();

    // of very different size from row to row
    auto values = random_values(rng, ggml_nelements(cache));
    for (size_t i = 0; i < values.size(); ++i) {
        values[i] *= std::ldexp(1.0f, (int) (i/c.n_embd % 23) - 12);
    }
    const auto before = to_type(type, values, c.n_embd);
    g.set(cache, before);
    g.set(moves, row_indices(plans, n_max));
    g.compute({ moved }, 2);

    auto want = before;
    const size_t row_size = ggml_row_size(type, c.n_embd);
    for (size_t row = 0; row < plans.size(); ++row) {
        const size_t first = (c.n_head + row)*(c.n_front + c.n_slots) + c.n_front;
        for (size_t i = 0; i < plans[row].dst.size(); ++i) {
            const auto at = [&](int32_t slot) { return want.begin() + (first + slot)*row_size; };
            std::copy(at(plans[row].src[i]), at(plans[row].src[i]) + row_size, at(plans[row].dst[i]));
        }
    }
    CHECK_MSG(g.get<uint8_t>(cache) == want, "%s, rows of %d", ggml_type_name(type), (int) c.n_embd);
}

TEST(rows_move_bit_for_bit) {
    int n_exact = 0;
    for (int type = 0; type < GGML_TYPE_COUNT; ++type) {
        if (indexmem_stock_exact((ggml_type) type)) {
            ++n_exact;
            for (const auto & c : compact_cases) {
                run_compact(c, (ggml_type) type);
            }
        }
    }
    CHECK(n_exact >= 3);
}
