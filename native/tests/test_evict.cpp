// rank, selection and compaction against the plain reference

#include "test.h"
#include "graph.h"

#include "indexmem-ops.h"
#include "reference.h"

#include <limits>
#include <random>

struct evict_case {
    int64_t n_slots, n_head, n_seq;
    int32_t n_used, n_fixed, n_evict; // of sequence 0; other sequences evict one entry less each
    int32_t keep_lo, window;
    int     ranks;                    // 0 distinct, 1 many ties, 2 all equal, 3 with NaN, inf and -0
    int32_t n_plan = 0;               // entries that the plan holds, 0: 3 more than leave
};

static std::vector<float> make_ranks(std::mt19937 & rng, int kind, size_t n) {
    std::vector<float> rank(n);
    for (auto & r : rank) {
        switch (kind) {
            case 0: r = std::normal_distribution<float>()(rng);              break;
            case 1: r = (float) (rng() % 4);                                 break;
            case 2: r = 0.0f;                                                break;
            case 3:
                {
                    const float odd[] = { NAN, -NAN, INFINITY, -INFINITY, 0.0f, -0.0f, 1e-42f, -1.0f };
                    r = odd[rng() % 8];
                } break;
        }
    }
    return rank;
}

static void run_evict(const evict_case & c, ggml_type type, int n_threads) {
    std::mt19937 rng(c.n_slots*131 + c.n_used*7 + c.n_evict + c.ranks);

    const int64_t n_embd = 64;
    const int64_t n_evict_max = c.n_plan ? c.n_plan : c.n_evict + 3;

    op_graph g;
    ggml_tensor * rank  = g.input(GGML_TYPE_F32, c.n_slots, c.n_head, c.n_seq);
    ggml_tensor * pos   = g.input(GGML_TYPE_I32, c.n_slots, c.n_head, c.n_seq);
    ggml_tensor * ctl   = g.input(GGML_TYPE_I32, INDEXMEM_CTL_SIZE, c.n_seq);
    ggml_tensor * cache = g.input(type, n_embd, c.n_slots, c.n_head, c.n_seq);
    ggml_tensor * plan  = ggml_indexmem_select(g.ctx, rank, pos, ctl, n_evict_max);
    ggml_tensor * moved = ggml_indexmem_compact(g.ctx, cache, plan, ctl);
    ggml_tensor * fixed = ggml_indexmem_compact_pos(g.ctx, pos, plan, ctl);
    g.alloc();

    // a past of which some positions are missing, then consecutive ones; slots not in use hold rubbish
    const int32_t n_past = 3*c.n_fixed + 1;
    std::vector<float>   data_rank = make_ranks(rng, c.ranks, ggml_nelements(rank));
    std::vector<int32_t> data_pos(ggml_nelements(pos), -777);
    std::vector<int32_t> data_ctl(ggml_nelements(ctl), 0);
    std::vector<std::vector<int32_t>> all_pos;
    for (int64_t s = 0; s < c.n_seq; ++s) {
        int32_t * ctl_s = data_ctl.data() + s*INDEXMEM_CTL_SIZE;
        ctl_s[INDEXMEM_CTL_N_USED]   = c.n_used;
        ctl_s[INDEXMEM_CTL_N_EVICT]  = std::max<int32_t>(0, c.n_evict - (int32_t) s);
        ctl_s[INDEXMEM_CTL_N_FIXED]  = c.n_fixed;
        ctl_s[INDEXMEM_CTL_POS_TAIL] = n_past;
        ctl_s[INDEXMEM_CTL_KEEP_LO]  = c.keep_lo;
        ctl_s[INDEXMEM_CTL_KEEP_HI]  = n_past + (c.n_used - c.n_fixed) - c.window;
        ctl_s[INDEXMEM_CTL_POS_LAST] = n_past + (c.n_used - c.n_fixed) - 1;
        for (int64_t h = 0; h < c.n_head; ++h) {
            std::vector<int32_t> past(n_past);
            for (int32_t i = 0; i < n_past; ++i) {
                past[i] = i;
            }
            std::shuffle(past.begin() + std::min(c.keep_lo, c.n_fixed), past.end(), rng);
            past.resize(c.n_fixed);
            std::shuffle(past.begin(), past.end(), rng);
            std::copy(past.begin(), past.end(), data_pos.begin() + (s*c.n_head + h)*c.n_slots);
            for (int32_t i = c.n_fixed; i < c.n_used; ++i) {
                past.push_back(n_past + i - c.n_fixed);
            }
            all_pos.push_back(past);
        }
    }

    std::vector<float> values(ggml_nelements(cache));
    for (auto & v : values) {
        v = std::normal_distribution<float>()(rng);
    }
    std::vector<uint8_t> data_cache = to_type(type, values, n_embd);

    g.set(rank, data_rank);
    g.set(pos, data_pos);
    g.set(ctl, data_ctl);
    g.set(cache, data_cache);
    g.compute({ plan, moved, fixed }, n_threads);

    const auto res_plan  = g.get<int32_t>(plan);
    const auto res_pos   = g.get<int32_t>(pos);
    const auto res_cache = g.get<uint8_t>(cache);

    const size_t row_size = ggml_row_size(type, n_embd);
    for (int64_t row = 0; row < c.n_head*c.n_seq; ++row) {
        const int32_t n_evict = data_ctl[row/c.n_head*INDEXMEM_CTL_SIZE + INDEXMEM_CTL_N_EVICT];

        indexmem_reference_plan ref;
        if (n_evict > 0) {
            const std::vector<float> r(data_rank.begin() + row*c.n_slots, data_rank.begin() + row*c.n_slots + c.n_used);
            const int32_t n_fits = std::min(n_evict, (int32_t) n_evict_max);
            ref = indexmem_reference_select(r, all_pos[row], n_fits, c.keep_lo, data_ctl[INDEXMEM_CTL_KEEP_HI]);
        }

        const int32_t * p = res_plan.data() + row*3*n_evict_max;
        auto matches = [&](const int32_t * found, std::vector<int32_t> expected) {
            expected.resize(n_evict_max, -1);
            return std::equal(expected.begin(), expected.end(), found);
        };
        CHECK(matches(p, ref.evicted));
        CHECK(matches(p +   n_evict_max, ref.dst));
        CHECK(matches(p + 2*n_evict_max, ref.src));

        // rows as bytes; slots no longer in use may hold anything
        std::vector<std::vector<uint8_t>> rows(c.n_slots);
        for (int64_t i = 0; i < c.n_slots; ++i) {
            const auto at = data_cache.begin() + (row*c.n_slots + i)*row_size;
            rows[i].assign(at, at + row_size);
        }
        std::vector<int32_t> expected_pos = all_pos[row];
        indexmem_reference_compact(ref, rows);
        indexmem_reference_compact(ref, expected_pos);
        for (int64_t i = 0; i < c.n_used - n_evict; ++i) {
            CHECK(memcmp(rows[i].data(), res_cache.data() + (row*c.n_slots + i)*row_size, row_size) == 0);
            if (n_evict > 0) {
                CHECK(expected_pos[i] == res_pos[row*c.n_slots + i]);
            }
        }
        for (int64_t i = c.n_used; i < c.n_slots; ++i) {
            CHECK(memcmp(rows[i].data(), res_cache.data() + (row*c.n_slots + i)*row_size, row_size) == 0);
        }
    }
}

static const evict_case evict_cases[] = {
    //slots heads seqs  used fixed evict  lo window ranks
    {  256,  3,   1,     41,   40,    1,   4,    9,  0 },
    {  256,  3,   1,     41,   40,    1,   4,    9,  1 },
    {  256,  1,   1,    200,    0,  190,   0,   10,  0 }, // nothing but the tail
    {  256,  1,   1,    200,  200,  190,   0,    0,  2 }, // no tail, no window, all equal
    {  256,  2,   3,    256,  100,   63,   4,   32,  0 }, // several sequences, a full cache
    {  256,  2,   3,    130,  100,    2,   4,   32,  3 }, // the last sequence evicts nothing
    {  512,  5,   1,    509,  256,  253,   1,  128,  3 },
    { 1536,  3,   1,   1536, 1024,  512,   4,  128,  0 },
    { 1536,  8,   1,   1025, 1000,   32,  64,  128,  1 },
    {  256,  1,   1,     12,   11,    1,   8,    3,  0 }, // one candidate
};

TEST(select_and_compact) {
    for (const auto & c : evict_cases) {
        for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_F32 }) {
            run_evict(c, type, 1 + (int) (c.n_evict % 3));
        }
    }
}

// By a mistake elsewhere only: never out of bounds, and the same on every device.
TEST(fewer_may_leave_than_asked_for) {
    const evict_case cases[] = {
        { 256,  3,   1,     41,   40,   30,  30,    9,  0 },     // some may
        { 256,  3,   1,     41,   40,   30,  30,    9,  3 },
        { 256,  2,   2,     41,   40,   30,  40,    1,  0 },     // none may
        { 256,  2,   1,    256,  100,   63,   4,   32,  1, 17 }, // the plan is too short
        { 256,  2,   1,     41,   40,   30,  30,    9,  0, 4 },  // both
        { 640,  1,   1,    640,    0,  639,   0,    1,  0, 1 },
        { 9000, 1,   2,   8500, 8000,  300, 8400,   9,  3 },     // the same in a large cache
        { 9000, 1,   2,   8500, 8000,   30, 8499,   1,  0 },
        { 9000, 2,   1,   9000,  100,  630,   4,   32,  1, 170 },
    };
    for (const auto & c : cases) {
        run_evict(c, GGML_TYPE_F16, 2);
    }
}

TEST(large_caches) {
    const evict_case cases[] = {
        { 33000, 2, 1, 33000, 32488,     1, 4, 128, 0 },
        { 33000, 2, 1, 33000, 32488,    32, 4, 128, 3, 33000 }, // with a ratio the plan is as long as the cache
        { 33000, 2, 1, 33000, 32488,   512, 4, 128, 1 },
        { 33000, 2, 1, 32999, 20000, 16000, 4, 128, 0 },
        { 9000,  2, 2,  8999,  8900,     1, 4, 128, 0 }, // nothing leaves the second sequence
    };
    for (const auto & c : cases) {
        run_evict(c, GGML_TYPE_Q4_0, 2);
    }
}

// Positions from `pos0` on, with gaps between them, ranked by the policy `streaming`.
static void run_oldest(int32_t pos0, int32_t n_evict) {
    const int64_t n_slots = 33000, n_head = 2, n_fixed = 32000, n_keep = 4, n_window = 128;

    op_graph g;
    ggml_tensor * k    = g.input(GGML_TYPE_F16, 32, n_slots, n_head, 1);
    ggml_tensor * pos  = g.input(GGML_TYPE_I32, n_slots, n_head, 1);
    ggml_tensor * ctl  = g.input(GGML_TYPE_I32, INDEXMEM_CTL_SIZE, 1);
    ggml_tensor * rank = ggml_indexmem_rank(g.ctx, k, pos, ctl, nullptr, nullptr, indexmem_policy_find("streaming"), 0, 0, 1.0f, 0.0f);
    ggml_tensor * plan = ggml_indexmem_select(g.ctx, rank, pos, ctl, n_slots);
    g.alloc();

    std::mt19937 rng(n_evict);
    std::vector<int32_t> past(n_fixed), data_pos(ggml_nelements(pos), -777);
    for (int64_t i = 0; i < n_fixed; ++i) {
        past[i] = pos0 + (int32_t) (i + i/3);
    }
    const int32_t tail = past.back() + 5;
    std::vector<int32_t> data_ctl(INDEXMEM_CTL_SIZE, 0);
    data_ctl[INDEXMEM_CTL_N_USED]   = n_slots;
    data_ctl[INDEXMEM_CTL_N_EVICT]  = n_evict;
    data_ctl[INDEXMEM_CTL_N_FIXED]  = n_fixed;
    data_ctl[INDEXMEM_CTL_POS_TAIL] = tail;
    data_ctl[INDEXMEM_CTL_KEEP_LO]  = past[n_keep];
    data_ctl[INDEXMEM_CTL_KEEP_HI]  = tail + (int32_t) (n_slots - n_fixed - n_window);
    data_ctl[INDEXMEM_CTL_POS_LAST] = tail + (int32_t) (n_slots - n_fixed) - 1;

    const std::vector<int32_t> oldest(past.begin() + n_keep, past.begin() + n_keep + n_evict);
    for (int64_t h = 0; h < n_head; ++h) {
        std::shuffle(past.begin(), past.end(), rng);
        std::copy(past.begin(), past.end(), data_pos.begin() + h*n_slots);
    }
    g.set(pos, data_pos);
    g.set(ctl, data_ctl);
    g.compute({ plan }, 2);

    const auto found = g.get<int32_t>(plan);
    for (int64_t h = 0; h < n_head; ++h) {
        std::vector<int32_t> left;
        for (int32_t i = 0; i < n_evict; ++i) {
            const int32_t slot = found[3*h*n_slots + i];
            left.push_back(slot >= 0 && slot < n_fixed ? data_pos[h*n_slots + slot] : -1);
        }
        std::sort(left.begin(), left.end());
        CHECK_MSG(left == oldest, "positions from %d on, %d leave: others than the oldest", pos0, n_evict);
        CHECK(found[3*h*n_slots + n_evict] == -1);
    }
}

TEST(the_oldest_leave_first_at_any_position) {
    run_oldest(0,                             512);
    run_oldest((1 << 24) - 100,               1);
    run_oldest((1 << 24) + 7,                 16000);
    run_oldest((1 << 30) - 20,                32);
    run_oldest(INT32_MAX - 100000,            513);
}

TEST(threads_agree_with_the_reference) {
    for (int n_threads = 1; n_threads <= 5; ++n_threads) {
        run_evict(evict_cases[4], GGML_TYPE_Q8_0, n_threads);
    }
    // several threads for a head
    for (int n_threads = 2; n_threads <= 7; ++n_threads) {
        for (int ranks = 0; ranks <= 3; ++ranks) {
            run_evict({ 1536, 1, 1, 1500, 1400,   32,  4,  128, ranks },    GGML_TYPE_F16, n_threads);
            run_evict({ 1536, 2, 1, 1500, 1000,  512, 64,  128, ranks },    GGML_TYPE_F16, n_threads);
            run_evict({  256, 1, 2,   41,   40,   30, 30,    9, ranks },    GGML_TYPE_F16, n_threads); // fewer may leave
            run_evict({  256, 1, 1,  256,  100,  200,  4,   32, ranks, 9 }, GGML_TYPE_F16, n_threads); // the plan is short
        }
    }
}

// The ranks of every policy are finite where the cache is, whatever lies in slots that are not in use.
TEST(ranks_ignore_poisoned_slots) {
    const int64_t n_embd = 64, n_slots = 256, n_head = 2, n_group = 3, n_used = 77;

    std::mt19937 rng(1);
    std::normal_distribution<float> normal;

    for (int policy = 0; indexmem_policy_get(policy); ++policy) {
        const auto * info = indexmem_policy_get(policy);
        if (strcmp(info->name, "indexer") == 0) {
            continue; // ranks terms, not keys: test_indexer.cpp
        }
        const int64_t n_ring = info->n_queries > 1 ? 64 : 1;

        op_graph g;
        ggml_tensor * k   = g.input(GGML_TYPE_F16, n_embd, n_slots, n_head, 1);
        ggml_tensor * pos = g.input(GGML_TYPE_I32, n_slots, n_head, 1);
        ggml_tensor * ctl = g.input(GGML_TYPE_I32, INDEXMEM_CTL_SIZE, 1);
        ggml_tensor * q   = info->n_queries > 0 ? g.input(GGML_TYPE_F32, n_embd, n_ring, n_head*n_group, 1) : nullptr;
        ggml_tensor * r   = ggml_indexmem_rank(g.ctx, k, pos, ctl, q, nullptr, policy, 5, 42, 0.125f, 0.0f);
        g.alloc();

        std::vector<float> values(ggml_nelements(k), NAN);
        for (int64_t h = 0; h < n_head; ++h) {
            for (int64_t i = 0; i < n_used*n_embd; ++i) {
                values[h*n_slots*n_embd + i] = i < n_embd ? 0.0f : normal(rng); // the first key is zero
            }
        }
        std::vector<ggml_fp16_t> data_k(values.size());
        ggml_fp32_to_fp16_row(values.data(), data_k.data(), values.size());
        std::vector<int32_t> data_pos(ggml_nelements(pos), -5);
        for (int64_t i = 0; i < n_used; ++i) {
            data_pos[i] = data_pos[n_slots + i] = (int32_t) (2*i);
        }
        std::vector<int32_t> data_ctl(INDEXMEM_CTL_SIZE, 0);
        data_ctl[INDEXMEM_CTL_N_USED]   = n_used;
        data_ctl[INDEXMEM_CTL_N_EVICT]  = 1;
        data_ctl[INDEXMEM_CTL_N_FIXED]  = n_used;
        data_ctl[INDEXMEM_CTL_POS_LAST] = 2*n_used - 2;
        g.set(k, data_k);
        g.set(pos, data_pos);
        g.set(ctl, data_ctl);
        if (q) {
            std::vector<float> data_q(ggml_nelements(q));
            for (auto & x : data_q) {
                x = normal(rng);
            }
            g.set(q, data_q);
        }
        g.compute({ r }, 2);

        const auto res = g.get<float>(r);
        for (int64_t h = 0; h < n_head; ++h) {
            for (int64_t i = 0; i < n_used; ++i) {
                CHECK_MSG(std::isfinite(res[h*n_slots + i]), "policy %s, entry %d", info->name, (int) i);
            }
        }
    }
}
