// new rotary positions for what a KV head holds: the rule alone

#include "indexmem-kv-counts.h"
#include "indexmem-span.h"

#include "test.h"

#include <numeric>
#include <random>

// n positions of a head as they can be: a protected prefix, a window at the end, what lies between anywhere
static std::vector<int32_t> some_positions(std::mt19937 & rng, uint32_t n, uint32_t n_protected, uint32_t n_window, int32_t next) {
    std::vector<int32_t> middle(next - n_protected - n_window);
    std::iota(middle.begin(), middle.end(), (int32_t) n_protected);
    std::shuffle(middle.begin(), middle.end(), rng);
    middle.resize(n - n_protected - n_window);
    std::sort(middle.begin(), middle.end());

    std::vector<int32_t> res(n_protected);
    std::iota(res.begin(), res.end(), 0);
    res.insert(res.end(), middle.begin(), middle.end());
    for (uint32_t i = 0; i < n_window; ++i) {
        res.push_back(next - (int32_t) (n_window - i));
    }
    return res;
}

TEST(a_rebase_keeps_what_has_to_stay) {
    std::mt19937 rng(0);
    for (int i = 0; i < 3000; ++i) {
        const uint32_t n_protected = rng() % 6, n_window = 1 + rng() % 8;
        const uint32_t n        = n_protected + n_window + rng() % 40;
        const uint32_t n_tokens = 1 + rng() % 32;
        const uint32_t span     = n + n_tokens + rng() % 200;
        const int32_t  next     = (int32_t) (std::max(span - n_tokens + 1, n) + rng() % 100);

        const int32_t end = indexmem_span_end(span, n, n_tokens);
        CHECK(end >= (int32_t) n && end + n_tokens <= span);

        const auto before = some_positions(rng, n, n_protected, n_window, next);
        const auto after  = indexmem_span_rebase(before, n_protected, n_window, end);
        CHECK(after.size() == n);
        for (uint32_t j = 0; j < n; ++j) {
            CHECK(j >= n_protected || after[j] == before[j]);
            CHECK(j == 0 || after[j] > after[j - 1]);
            CHECK(j <= n_protected || after[j] - after[j - 1] <= before[j] - before[j - 1]);
            CHECK(j <= n_protected || before[j] - before[j - 1] > 1 || after[j] - after[j - 1] == 1);
        }
        CHECK(n == n_protected || after.back() == end - 1);
    }
}

TEST(a_prefix_alone_stays) {
    CHECK((indexmem_span_rebase({ 0, 1, 2 }, 3, 1, 3) == std::vector<int32_t>{ 0, 1, 2 }));
    CHECK(indexmem_span_rebase({}, 0, 1, 0).empty());
}

// All heads of a sequence end at the same place, wherever their entries lie.
TEST(dense_when_there_is_no_room) {
    std::mt19937 rng(1);
    for (int i = 0; i < 100; ++i) {
        const auto after = indexmem_span_rebase(some_positions(rng, 40, 4, 8, 500), 4, 8, 40);
        for (int32_t j = 0; j < 40; ++j) {
            CHECK(after[j] == j);
        }
    }
}

using counts = indexmem_kv_counts;

static counts counts_of(uint32_t span, uint32_t n_seq) {
    counts::limits lim = {};
    lim.budget = 40;
    lim.sinks  = 4;
    lim.window = 8;
    lim.span   = span;
    return counts(lim, counts::geometry::of(lim, 32, 0, 0, false, false, true), n_seq);
}

static counts::step prepare(const counts & c, uint32_t n, uint32_t s0, uint32_t n_seq) {
    std::vector<int32_t> pos;
    for (uint32_t s = s0; s < s0 + n_seq; ++s) {
        for (uint32_t t = 0; t < n; ++t) {
            pos.push_back(c.get(s)->n_seen + (int32_t) t);
        }
    }
    std::string error;
    const auto steps = c.prepare({ { s0, n_seq, n, pos.data() } }, error);
    CHECK_MSG(steps.size() == 1, "%s", error.c_str());
    return steps[0];
}

TEST(positions_stay_inside_the_span) {
    for (uint32_t span : { 72u, 100u, 1000u }) {
        std::mt19937 rng(span);
        counts c = counts_of(span, 3), twin = counts_of(0, 3);
        for (int i = 0; i < 500; ++i) {
            const uint32_t s0 = rng() % 3, n_seq = 1 + rng() % (3 - s0), n = rng() % 2 ? 1 : 1 + rng() % 32;
            const auto st = prepare(c, n, s0, n_seq);
            twin.finish(prepare(twin, n, s0, n_seq));
            for (uint32_t k = 0; k < n_seq; ++k) {
                const auto & now = *c.get(s0 + k), & before = st.before[k];
                const bool full = now.rotary_next() + n > span;
                CHECK(before.n_rebases == now.n_rebases + full && before.rotary_next() + n <= span);
                CHECK(before.n_seen == now.n_seen && before.n_used == now.n_used && before.rotary_next() >= (int32_t) before.n_used);
                CHECK(!full || before.n_fixed == before.n_used);
                CHECK(st.rotary || before.n_rebases == 0);
            }
            if (rng() % 5 == 0 && !st.evict) { // the rebase has been made, the ubatch has not
                c.abandon(st);
                CHECK(c.get(s0)->shift == st.before[0].shift && !c.get(s0)->broken);
                continue;
            }
            c.finish(st);
            if (rng() % 4 == 0) {
                const auto & seq = *c.get(s0);
                const int32_t p = std::max(seq.pos_tail(), seq.n_seen - 3);
                CHECK(c.can_remove(seq, p) && !c.can_remove(seq, seq.pos_tail() - 1));
            }
        }
        CHECK(c.get(1)->n_rebases > 0 && twin.get(1)->n_rebases == 0 && twin.get(1)->shift == 0);
    }
}

// what a state can bring: positions far beyond the span
TEST(a_sequence_from_elsewhere_comes_back_into_the_span) {
    counts c = counts_of(100, 1);
    counts::seq_state seq = *c.get(0);
    seq.n_seen  = 1000000;
    seq.n_used  = seq.n_fixed = 30;
    seq.n_evictions = 5;
    c.assign(0, seq);
    const auto st = prepare(c, 1, 0, 1);
    CHECK(st.before[0].n_rebases == 1 && st.before[0].rotary_next() == 50 && st.before[0].n_seen == 1000000);
}

