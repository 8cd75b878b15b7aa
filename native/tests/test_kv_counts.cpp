// the bookkeeping of a bounded cache, alone: no model, no tensors

#include "indexmem-kv-counts.h"
#include "indexmem-kv-shares.h"

#include "test.h"

#include <numeric>
#include <random>

using counts = indexmem_kv_counts;

static counts::limits limits_of(uint32_t budget) {
    counts::limits lim = {};
    lim.budget = budget;
    lim.sinks  = 4;
    lim.window = 8;
    return lim;
}

// what is asked for, and what ranks
struct kind {
    uint32_t n_latent  = 0;
    uint32_t n_queries = 0;
    bool     indexer   = false;
    bool     recalls   = false;
    bool     evicts    = true;
};

static counts counts_of(const counts::limits & lim, const kind & k, uint32_t n_ubatch = 32, uint32_t n_seq = 1) {
    return counts(lim, counts::geometry::of(lim, n_ubatch, k.n_latent, k.n_queries, k.indexer, k.recalls, k.evicts), n_seq);
}

// n more tokens of sequences [s0, s0 + n_seq), one ubatch; empty with an error
static std::vector<counts::step> prepare(const counts & c, uint32_t n, std::string & error, uint32_t s0 = 0, uint32_t n_seq = 1) {
    std::vector<int32_t> pos;
    for (uint32_t s = s0; s < s0 + n_seq; ++s) {
        for (uint32_t t = 0; t < n; ++t) {
            pos.push_back(c.get(s)->n_seen + (int32_t) t);
        }
    }
    return c.prepare({ { s0, n_seq, n, pos.data() } }, error);
}

static counts::step feed(counts & c, uint32_t n, uint32_t s0 = 0, uint32_t n_seq = 1) {
    std::string error;
    const auto steps = prepare(c, n, error, s0, n_seq);
    CHECK_MSG(steps.size() == 1, "%s", error.c_str());
    c.finish(steps[0]);
    return steps[0];
}

static bool same(const counts::seq_state & a, const counts::seq_state & b) {
    return a.n_seen == b.n_seen && a.n_used == b.n_used && a.n_fixed == b.n_fixed && a.pin == b.pin && a.n_scored == b.n_scored &&
        a.n_evictions == b.n_evictions && a.broken == b.broken;
}

// what one eviction ranks grows with the budget, so what leaves in it does too, and a plan has room for that
TEST(more_entries_leave_at_once_of_large_budgets) {
    struct { uint32_t room, step; } cases[] = { { 1, 1 }, { 7, 1 }, { 80, 10 }, { 256, 32 }, { 4223, 32 }, { 4224, 33 }, { 16384, 128 }, { 131072, 1024 } };
    for (const auto & is : cases) {
        for (const uint32_t asked : { 0u, 5u }) {
            counts::limits lim = limits_of(4 + 8 + is.room);
            lim.evict_step = asked;
            counts c = counts_of(lim, {});
            feed(c, 4 + 8 + is.room);
            const uint32_t step = asked > 0 ? std::min(asked, is.room) : is.step;
            CHECK_MSG(c.evict_step_of(*c.get(0)) == step, "room %u", is.room);
            CHECK(c.get(0)->n_evictions == 0);
            const counts::step st = feed(c, 1);
            CHECK_MSG(c.get(0)->n_evictions == 1 && c.get(0)->n_used + step == lim.budget + 1, "room %u: %u left", is.room, c.get(0)->n_used);
            CHECK_MSG(step <= c.evict_max(1), "room %u: a plan for %u", is.room, c.evict_max(1));
        }
    }
}

// where heads have budgets of their own, what they have on average says how often, as far as the smallest can follow
TEST(small_heads_do_not_evict_at_every_token) {
    struct { uint32_t smallest, largest, step; } cases[] = { { 200, 300, 23 }, { 60, 900, 23 }, { 50, 900, 19 }, { 14, 900, 1 }, { 13, 900, 1 } };
    for (const auto & is : cases) {
        counts::limits lim = limits_of(200);
        lim.budgets = { is.smallest, is.largest };
        counts c = counts_of(lim, {});
        CHECK_MSG(c.evict_step_of(*c.get(0)) == is.step, "%u: %u", is.smallest, c.evict_step_of(*c.get(0)));
        while (c.get(0)->n_evictions == 0) {
            feed(c, 1);
        }
        CHECK(c.get(0)->n_used == is.smallest + 1 - is.step);
    }
}

TEST(a_window_that_nobody_chose_follows_the_room) {
    counts::limits lim = limits_of(1024);
    lim.window = counts::WINDOW_LEAST;
    CHECK(counts_of(lim, {}).window_of({}) == 128);
    lim.window_grows = true;
    counts c = counts_of(lim, {}, 512);
    CHECK(c.window_of(*c.get(0)) == (1024 - 4)/4);
    CHECK(counts_of(lim, { 24 }).window_of({}) == (1024 - 24 - 4)/4); // the slots of a memory are not room
    lim.budgets = { 804, 1500 };
    CHECK(counts_of(lim, {}).window_of({}) == (1024 - 4)/4 && counts_of(lim, {}).pin_room() == 895); // of what heads have on average
    lim.budgets = { 304, 1500 };
    CHECK(counts_of(lim, {}).window_of({}) == 150 && counts_of(lim, { 24 }).window_of({}) == 138); // at most half of the smallest
    lim.ratio = 0.5;
    counts half = counts_of(lim, {}, 512);
    for (int i = 0; i < 12; ++i) {
        feed(half, 100);
        const auto & seq = *half.get(0);
        CHECK(half.window_of(seq) <= std::max(128u, (half.budget_of(seq) - 4)/2) && half.window_of(seq) >= 128);
    }
    lim.ratio = 0.0;
    lim.budgets.clear();

    std::string error;
    CHECK(c.set_pin(0, 424, error) && c.window_of(*c.get(0)) == 150);
    CHECK(c.pin_room() == 895 && counts_of(lim, { 24 }).pin_room() == 895 - 24);
    CHECK(c.set_pin(0, 895, error) && c.window_of(*c.get(0)) == 128); // what fits beside the least window is still accepted
    CHECK(!c.set_pin(0, 896, error) && error.find("1025") != std::string::npos);
    CHECK(c.set_pin(0, 0, error));

    feed(c, 512);
    feed(c, 512);
    CHECK(c.get(0)->n_last == 1024);
    feed(c, 1);
    CHECK(c.get(0)->n_last == 255 && c.get(0)->n_used >= 4 + 255);

    lim.ratio = 0.25; // the room grows with the text, and so does the window
    counts r = counts_of(lim, {}, 512);
    uint32_t before = 0;
    for (int i = 0; i < 20; ++i) {
        feed(r, 256);
        const auto seq = *r.get(0);
        CHECK(r.window_of(seq) >= before && seq.n_used <= r.budget_of(seq));
        CHECK(seq.n_used >= std::min<uint32_t>(seq.n_seen, lim.sinks + seq.n_last) && seq.n_last <= std::max<uint32_t>(r.window_of(seq), seq.n_used));
        before = r.window_of(seq);
    }
    CHECK(before == 255);
}

TEST(small_classes_keep_the_beginning_of_a_long_prefix) {
    counts::limits lim = limits_of(200);
    lim.budgets = { 100, 150, 300 };
    counts c = counts_of(lim, { 10 });
    std::string error;
    CHECK(c.pin_room() == 200 - 8 - 10 - 1);
    CHECK(!c.set_pin(0, c.pin_room() + 1, error) && error.find("the budget is 200") != std::string::npos);

    const auto kept = [&](uint32_t pin, uint32_t cls) {
        CHECK(c.set_pin(0, pin, error));
        return c.n_protected(*c.get(0), cls);
    };
    CHECK(kept(81, 0) == 81 && kept(82, 0) == 81 - 81/8 && kept(181, 0) == 81 - 81/8);
    CHECK(kept(131, 1) == 131 && kept(132, 1) == 131 - 131/8 && kept(181, 2) == 181);
    CHECK(kept(0, 0) == 4 && kept(0, 2) == 4);

    CHECK(c.set_pin(0, 181, error) && c.n_protected(*c.get(0)) == 71);
    const uint32_t step = c.evict_step_of(*c.get(0));
    CHECK(step >= 1 && 71 + 8 + step <= 90);
    for (int i = 0; i < 300; ++i) {
        feed(c, i % 3 == 0 ? 17 : 1);
        const auto & seq = *c.get(0);
        for (uint32_t k = 0; k < 3; ++k) {
            const uint32_t n_used = seq.of(k).n_used;
            CHECK(n_used <= c.budget_of(seq, k) && n_used >= std::min<uint32_t>(seq.n_seen, c.n_protected(seq, k) + 8));
        }
        CHECK(seq.n_evictions == 0 || seq.n_first == 71); // what is sure to be in all of them
    }
    CHECK(c.set_pin(0, 181, error)); // as it is
    CHECK(!c.set_pin(0, 180, error) && c.set_pin(0, 71, error) && !c.set_pin(0, 72, error));
}

TEST(a_budget_is_never_exceeded) {
    for (uint32_t budget : { 14u, 40u, 1000u }) {
        for (double ratio : { 0.0, 0.25 }) {
            counts::limits lim = limits_of(budget);
            lim.ratio = ratio;
            counts c = counts_of(lim, {});
            std::mt19937 rng(budget);
            for (int i = 0; i < 300; ++i) {
                const auto st  = feed(c, 1 + rng() % 32);
                const auto seq = *c.get(0);
                CHECK(seq.n_used <= c.budget_of(seq) && seq.n_used <= budget);
                CHECK(seq.n_used >= std::min<uint32_t>(seq.n_seen, lim.sinks + lim.window));
                CHECK(st.n_kv[0] % counts::N_KV_PAD == 0 && st.n_kv[0] >= st.before[0].n_used + st.n_tokens);
                CHECK(st.evict == (st.after[0].n_evictions > st.before[0].n_evictions));
                CHECK(seq.n_fixed == (st.evict ? seq.n_used : st.before[0].n_fixed));
            }
        }
    }
}

TEST(slots_hold_a_budget_and_a_ubatch) {
    for (uint32_t n_latent : { 0u, 3u, 64u }) {
        for (uint32_t n_ubatch : { 1u, 31u, 512u }) {
            const auto lim = limits_of(100);
            const auto geo = counts::geometry::of(lim, n_ubatch, n_latent, 0, false, n_latent > 0, true);
            CHECK(geo.n_front >= n_latent && geo.n_front % 8 == 0);
            CHECK(geo.n_slots[0] >= lim.budget - n_latent + n_ubatch);
            CHECK(geo.n_slots[0] % counts::N_KV_PAD == 0 || (geo.n_front + geo.n_slots[0]) % counts::N_KV_PAD == 0);
        }
    }
}

TEST(positions_come_once_and_in_order) {
    const std::vector<std::vector<int32_t>> wrong = { { 0, 1, 1, 2 }, { 1, 2, 3, 4 }, { 0, 2, 3, 4 }, { 3, 2, 1, 0 }, { -1, 0, 1, 2 } };
    for (const auto & pos : wrong) {
        counts c = counts_of(limits_of(40), {});
        std::string error;
        CHECK(c.prepare({ { 0, 1, 4, pos.data() } }, error).empty());
        CHECK(error.find("each position once") != std::string::npos);
        CHECK(c.get(0)->n_seen == 0);
    }
    // the second ubatch of a batch goes on where the first ends
    counts c = counts_of(limits_of(40), {});
    const std::vector<int32_t> pos = { 0, 1, 2, 3 };
    std::string error;
    CHECK(c.prepare({ { 0, 1, 2, pos.data() }, { 0, 1, 2, pos.data() + 2 } }, error).size() == 2);
    CHECK(c.prepare({ { 0, 1, 2, pos.data() }, { 0, 1, 2, pos.data() + 1 } }, error).empty());
    CHECK(c.prepare({ { 1, 1, 2, pos.data() } }, error).empty());
    CHECK(error.find("no sequence 1") != std::string::npos);
}

TEST(the_policy_full_refuses_and_changes_nothing) {
    kind k;
    k.evicts = false;
    counts c = counts_of(limits_of(40), k);
    feed(c, 30);
    std::string error;
    CHECK(prepare(c, 11, error).empty());
    CHECK(error.find("evict nothing") != std::string::npos);
    CHECK(c.get(0)->n_seen == 30);
    feed(c, 10);
}

// of every kind of step: what is not finished has not happened, unless entries may have moved
TEST(an_abandoned_step_leaves_a_sequence_as_it_was_or_broken) {
    kind plain, ring, indexer, both, memory;
    ring.n_queries    = 32;
    indexer.indexer   = true;
    both.indexer      = true;
    both.n_queries    = 16;
    memory.n_latent   = 3;
    memory.recalls    = true;
    for (const kind & k : { plain, ring, indexer, both, memory }) {
        for (int seed = 0; seed < 200; ++seed) {
            std::mt19937 rng(seed);
            counts c    = counts_of(limits_of(200), k, 64);
            counts twin = counts_of(limits_of(200), k, 64);
            for (int i = 0; i < 40; ++i) {
                const uint32_t n = rng() % 3 ? 1 : 1 + rng() % 64;
                std::string error;
                if (rng() % 3 == 0) {
                    const auto aborted = prepare(c, 1 + rng() % 64, error);
                    CHECK(aborted.size() == 1);
                    c.abandon(aborted[0]);
                    if (aborted[0].evict) {
                        CHECK(c.get(0)->broken && c.get(0)->n_seen == twin.get(0)->n_seen);
                        break;
                    }
                }
                CHECK(same(*c.get(0), *twin.get(0)));
                feed(c, n);
                feed(twin, n);
            }
        }
    }
}

TEST(nothing_but_clearing_mends_a_broken_sequence) {
    counts c = counts_of(limits_of(40), {}, 32, 2);
    feed(c, 30, 0, 2);
    feed(c, 10, 1);
    std::string error;
    auto steps = prepare(c, 20, error);
    CHECK(steps.size() == 1 && steps[0].evict);
    c.abandon(steps[0]);

    CHECK(prepare(c, 1, error).empty());
    CHECK(error.find("broken") != std::string::npos);
    CHECK(!c.can_remove(*c.get(0), 29));
    CHECK(!c.set_pin(0, 5, error) && error.find("broken") != std::string::npos);
    feed(c, 1, 1); // the other sequence is not concerned

    c.reset(0);
    CHECK(!c.get(0)->broken);
    feed(c, 5);
    c.abandon(prepare(c, 1, error)[0]);
    CHECK(!c.get(0)->broken && c.get(0)->n_seen == 5);
}

// only the sequence that evicts is concerned when a ubatch of several is interrupted
TEST(sequences_break_alone) {
    counts c = counts_of(limits_of(40), {}, 32, 3);
    feed(c, 20, 0, 3);
    feed(c, 20, 1);
    std::string error;
    const auto steps = prepare(c, 4, error, 0, 3);
    CHECK(steps.size() == 1 && steps[0].evict);
    c.abandon(steps[0]);
    CHECK(!c.get(0)->broken && c.get(1)->broken && !c.get(2)->broken);
    CHECK(c.get(0)->n_seen == 20 && c.get(1)->n_seen == 40);
}

// A model of the ring: the position whose query each row holds. An eviction must find all that it reads, however often text
// was taken back or a step was abandoned before it.
TEST(an_eviction_finds_its_queries) {
    for (const bool indexer : { false, true }) {
        for (const double ratio : { 0.0, 0.3 }) {
            int n_evictions = 0;
            for (int seed = 0; seed < 300; ++seed) {
                constexpr uint32_t n_queries = 32;
                std::mt19937 rng(seed);
                kind k;
                k.n_queries = n_queries;
                k.indexer   = indexer;
                counts::limits lim = limits_of(150);
                lim.ratio = ratio;
                lim.pin   = 20;
                counts c = counts_of(lim, k, 80);
                const int32_t n_ring = (int32_t) c.get_geometry().n_ring;

                // the text of a position changes when it is taken back: (position, version)
                std::vector<std::pair<int32_t, int>> ring(n_ring, { -1, 0 });
                std::vector<int> version(5000, 0);

                const auto write = [&](const counts::step & st) {
                    const auto & before = st.before[0];
                    const int32_t end = before.n_seen + (int32_t) st.n_tokens;
                    if (indexer && !st.score) {
                        return;
                    }
                    const int32_t begin = std::max(indexer ? before.n_scored : before.n_seen, end - (int32_t) n_queries);
                    for (int32_t p = begin; p < end; ++p) {
                        ring[p % n_ring] = { p, version[p] };
                    }
                };
                for (int i = 0; i < 60; ++i) {
                    const auto seq = *c.get(0);
                    std::string error;
                    switch (rng() % 6) {
                        case 0: {
                            const int32_t p0 = seq.n_seen - (int32_t) (rng() % 70);
                            if (p0 > 0 && c.can_remove(seq, p0)) {
                                c.truncate(0, p0);
                                for (int32_t p = p0; p < seq.n_seen; ++p) {
                                    version[p]++;
                                }
                            }
                            break;
                        }
                        case 1: {
                            const auto steps = prepare(c, 1 + rng() % 80, error);
                            if (!steps.empty() && !steps[0].evict) {
                                for (uint32_t t = 0; t < steps[0].n_tokens; ++t) {
                                    version[seq.n_seen + t]++;
                                }
                                write(steps[0]);
                                for (uint32_t t = 0; t < steps[0].n_tokens; ++t) {
                                    version[seq.n_seen + t]++;
                                }
                                c.abandon(steps[0]);
                            }
                            break;
                        }
                        case 2:
                            if (ratio > 0.0 && rng() % 4 == 0) {
                                c.set_pin(0, 0, error); // the budget becomes smaller
                            }
                            break;
                        default: {
                            const auto steps = prepare(c, rng() % 2 ? 1 : 1 + rng() % 80, error);
                            if (steps.empty()) {
                                CHECK_MSG(false, "%s", error.c_str());
                                i = 1000;
                                break;
                            }
                            write(steps[0]);
                            c.finish(steps[0]);
                            if (steps[0].evict) {
                                n_evictions++;
                                const int32_t end = c.get(0)->n_seen;
                                for (int32_t p = std::max(0, end - (int32_t) n_queries); p < end; ++p) {
                                    CHECK(ring[p % n_ring].first == p && ring[p % n_ring].second == version[p]);
                                }
                            }
                        }
                    }
                }
            }
            CHECK(n_evictions > 1000);
        }
    }
}

// A smaller budget can evict earlier than the text once reached, and then queries are missing: that is told.
TEST(queries_that_are_lost_are_told) {
    kind k;
    k.n_queries = 32;
    for (const bool abandoned : { false, true }) {
        counts large = counts_of(limits_of(200), k, 80);
        feed(large, 60);
        feed(large, 60);
        std::string error;
        if (abandoned) {
            large.abandon(prepare(large, 70, error)[0]);
        } else {
            feed(large, 70);
            large.truncate(0, 120);
        }
        counts small = counts_of(limits_of(125), k, 80);
        small.assign(0, *large.get(0)); // as a state does
        feed(small, 5);
        CHECK(prepare(small, 1, error).empty());
        CHECK(error.find("overwritten") != std::string::npos);
        CHECK(prepare(small, 27, error).size() == 1); // enough new ones

        small.reset(0);
        feed(small, 80);
        feed(small, 80);
    }
}

// the waiting rows hold what is pending, and what is pending is newer than the last eviction
TEST(pending_entries_fit_their_ring) {
    for (uint32_t budget : { 40u, 400u, 4000u }) {
        kind k;
        k.indexer = true;
        counts c = counts_of(limits_of(budget), k, 64, 2);
        std::mt19937 rng(budget);
        for (int i = 0; i < 500; ++i) {
            const auto st = feed(c, rng() % 4 ? 1 : 1 + rng() % 64, rng() % 2);
            CHECK(st.n_old <= c.get_geometry().n_wait);
            CHECK(!st.score || st.n_old >= st.before[0].n_pending());
            CHECK(!st.evict || st.score);
            for (uint32_t s = 0; s < 2; ++s) {
                const auto & seq = *c.get(s);
                CHECK(seq.n_pending() <= c.get_geometry().n_wait);
                CHECK(seq.n_scored >= seq.pos_tail());
            }
        }
    }
}

// what a state of another cache does before it can be used
TEST(a_state_is_fitted_as_by_a_step_of_no_tokens) {
    counts large = counts_of(limits_of(200), {});
    feed(large, 32); feed(large, 32); feed(large, 32); feed(large, 32);
    const auto whole = *large.get(0);
    std::string  error;
    counts::step st;

    // room for all of it
    CHECK(large.fit(0, whole, st, error) && !st.evict && !st.score && same(st.before[0], st.after[0]));
    counts exact = counts_of(limits_of(128), {});
    CHECK(exact.fit(0, whole, st, error) && !st.evict);

    // one too many: as many leave as a step takes out
    counts less = counts_of(limits_of(127), {});
    CHECK(less.fit(0, whole, st, error) && st.evict);
    CHECK(st.after[0].n_used == 128 - less.evict_step_of(whole) && st.after[0].n_fixed == st.after[0].n_used);
    CHECK(st.after[0].n_evictions == 1 && st.after[0].n_seen == 128 && st.after[0].n_first == 4 && st.after[0].n_last == 8);

    // far too many; the slots of a memory are out of the budget
    counts small = counts_of(limits_of(40), { 5, 0, false, true });
    CHECK(small.fit(0, whole, st, error) && st.after[0].n_used == 35 && !st.recall);

    // nothing leaves by the policy that evicts nothing
    counts full = counts_of(limits_of(40), { 0, 0, false, false, false });
    CHECK(!full.fit(0, whole, st, error) && error.find("evict nothing") != std::string::npos);

    // an indexer scores what waits when something leaves, or when more wait than may
    const kind ranked = { 0, 0, true };
    counts wide = counts_of(limits_of(2000), ranked);
    feed(wide, 1); for (int i = 0; i < 20; ++i) { feed(wide, 1); }
    const auto waiting = *wide.get(0);
    CHECK(waiting.n_pending() == 21);
    CHECK(counts_of(limits_of(40), ranked).fit(0, waiting, st, error) && !st.evict && st.score && st.n_old == 21);
    CHECK(st.after[0].n_pending() == 0 && st.before[0].n_pending() == 21);
    CHECK(counts_of(limits_of(15), ranked).fit(0, waiting, st, error) && st.evict && st.score && st.after[0].n_pending() == 0);
    CHECK(wide.fit(0, waiting, st, error) && !st.score && st.after[0].n_pending() == 21);
}

// what is gone does not come back, whatever is protected later
TEST(what_is_sure_to_be_there) {
    counts c = counts_of(limits_of(40), {});
    const auto check = [&](uint32_t first, uint32_t last) { CHECK(c.get(0)->n_first == first && c.get(0)->n_last == last); };
    check(0, 0);
    feed(c, 30); check(30, 30);
    feed(c, 20); check(4, 8);
    feed(c, 1);  check(4, 8);
    feed(c, 1);  check(4, 9);
    c.truncate(0, 51); check(4, 8);

    auto foreign = *c.get(0);
    foreign.n_first = 2;
    foreign.n_last  = 5;
    c.assign(0, foreign);
    feed(c, 1); check(2, 6);
    feed(c, 32); check(2, 8);
    std::string error;
    CHECK(!c.set_pin(0, 3, error) && error.find("only the first 2 tokens") != std::string::npos);
    CHECK(c.set_pin(0, 2, error));
    c.reset(0); check(0, 0);
}

// n tokens one by one; eventful: something left, was scored, or got a new position
static counts::seq_state fed_alone(counts & c, uint32_t n, bool & eventful) {
    eventful = false;
    for (uint32_t i = 0; i < n; ++i) {
        const uint64_t n_rebases = c.get(0)->n_rebases;
        const auto st = feed(c, 1);
        eventful = eventful || st.evict || st.score || st.after[0].n_rebases > n_rebases;
    }
    return *c.get(0);
}

// Whatever number of drafts is wrong, and however a batch is cut into ubatches: what is left is what tokens that came one by one
// would have left.
TEST(drafts_leave_nothing_behind) {
    std::mt19937 rng(7);
    for (const kind & k : { kind{}, kind{ 0, 32 }, kind{ 5, 0, false, true }, kind{ 0, 0, true }, kind{ 0, 128, true } }) {
        for (uint32_t budget : { 30u, 100u, 1100u }) {
            for (double ratio : { 0.0, 0.25 }) {
                for (uint32_t span : { 0u, budget + 200 }) {
                    counts::limits lim = limits_of(budget);
                    lim.ratio = ratio;
                    lim.span  = span;
                    counts c = counts_of(lim, k);
                    if (budget > 1000) {
                        for (int i = 0; i < 33; ++i) {
                            feed(c, 32);
                        }
                    }
                    for (int i = 0; i < 60; ++i) {
                        const uint32_t n_asked = rng() % 20;
                        const uint32_t n       = c.n_drafts(*c.get(0), n_asked);
                        CHECK(n <= n_asked && c.n_drafts(*c.get(0), n) == n);

                        bool eventful;
                        std::vector<counts> left; // after 0, 1, ... drafts that were right
                        for (uint32_t right = 0; right <= n; ++right) {
                            counts one_by_one = c, drafted = c;
                            for (uint32_t todo = 1 + n; todo > 0;) {
                                const uint32_t some = 1 + rng() % todo;
                                const auto st = feed(drafted, some);
                                CHECK(n == 0 || (!st.evict && !st.score));
                                todo -= some;
                            }
                            const auto expected = fed_alone(one_by_one, 1 + right, eventful);
                            CHECK(n == 0 || !eventful);
                            CHECK(n == right || drafted.can_remove(*drafted.get(0), expected.n_seen));
                            if (n > right) {
                                drafted.truncate(0, expected.n_seen);
                            }
                            const auto & found = *drafted.get(0);
                            CHECK(same(found, expected) && found.shift == expected.shift && found.n_rebases == expected.n_rebases);
                            CHECK(found.n_first == expected.n_first && found.n_last == expected.n_last);
                            CHECK(found.ring_from <= std::max(0, found.n_seen - (int32_t) k.n_queries)); // all that a rank reads
                            left.push_back(drafted);
                        }
                        // there is a reason for every draft that may not be
                        if (n < n_asked) {
                            counts beyond = c;
                            fed_alone(beyond, n + 2, eventful);
                            CHECK(eventful);
                        }
                        c = left[rng() % left.size()];
                    }
                }
            }
        }
    }
    counts c = counts_of(limits_of(40), {});
    feed(c, 32);
    CHECK(c.n_drafts(*c.get(0), UINT32_MAX) == 7); // and the token before them fill it
    feed(c, 8);
    CHECK(c.n_drafts(*c.get(0), 1) == 0);
    auto broken = *c.get(0);
    broken.n_used = 10;
    broken.broken = true;
    CHECK(c.n_drafts(broken, 5) == 0);
}

//
// layers with budgets of their own
//

static counts::limits limits_of(const std::vector<uint32_t> & budgets, uint32_t budget) {
    counts::limits lim = limits_of(budget);
    lim.budgets = budgets;
    return lim;
}

TEST(no_class_exceeds_its_budget_and_all_evict_together) {
    for (double ratio : { 0.0, 0.3 }) {
        auto lim = limits_of({ 30, 50, 200 }, 80);
        lim.ratio = ratio;
        kind k;
        k.indexer = true;
        counts c = counts_of(lim, k);
        std::mt19937 rng(7);
        for (int i = 0; i < 400; ++i) {
            const auto st  = feed(c, i % 3 == 0 ? 1 + rng() % 32 : 1);
            const auto seq = *c.get(0);
            int32_t tail = 0;
            for (uint32_t cls = 0; cls < 3; ++cls) {
                const auto before = st.before[0].of(cls), after = st.after[0].of(cls);
                CHECK(after.n_used <= c.budget_of(seq, cls) && after.n_used <= lim.budgets[cls]);
                CHECK(after.n_used >= std::min<uint32_t>(seq.n_seen, lim.sinks + lim.window));
                const bool left = after.n_used < before.n_used + st.n_tokens;
                CHECK(!left || st.evict);
                CHECK(after.n_fixed == (left ? after.n_used : before.n_fixed));
                CHECK(st.n_kv[cls] >= before.n_used + st.n_tokens && st.n_kv[cls] <= c.get_geometry().n_slots[cls]);
                tail = std::max(tail, after.pos_tail());
            }
            CHECK(c.pos_tail(seq) == tail && c.can_remove(seq, tail) && (tail == 0 || !c.can_remove(seq, tail - 1)));
            CHECK(c.get(0)->of(2).n_used >= c.get(0)->n_used);
        }
        CHECK(ratio > 0.0 || c.get(0)->of(2).n_used > 150);
    }
}

TEST(classes_that_are_full_evict_in_the_same_steps) {
    auto lim = limits_of({ 30, 200 }, 115);
    counts c = counts_of(lim, {});
    for (int i = 0; i < 40; ++i) {
        feed(c, 32);
    }
    int n_both = 0, n_one = 0;
    for (int i = 0; i < 200; ++i) {
        const auto st = feed(c, 1);
        int n = 0;
        for (uint32_t cls = 0; cls < 2; ++cls) {
            n += st.after[0].of(cls).n_used < st.before[0].of(cls).n_used + 1;
        }
        n_both += n == 2;
        n_one  += n == 1;
    }
    CHECK_MSG(n_both > 20 && n_one <= 1, "%d steps of both, %d of one", n_both, n_one);
}

TEST(a_rebase_ends_at_the_same_position_in_all_classes) {
    auto lim = limits_of({ 30, 90 }, 60);
    lim.span = 160;
    counts c = counts_of(lim, {});
    for (int i = 0; i < 60; ++i) {
        const auto st = feed(c, 1 + i % 32);
        CHECK(c.get(0)->rotary_next() <= 160 && st.before[0].rotary_next() >= (int32_t) st.before[0].of(1).n_used);
    }
    CHECK(c.get(0)->n_rebases > 2);
}

static std::vector<indexmem_need> needs_of(const std::vector<float> & shares, const std::vector<uint32_t> & least = {}) {
    std::vector<indexmem_need> res;
    for (size_t il = 0; il < shares.size(); ++il) {
        res.push_back({ shares[il], least.empty() ? 0 : least[il] });
    }
    return res;
}

TEST(shares_become_budgets_that_take_no_more) {
    const auto needs = needs_of({ 1.0f, 4.0f, 1.0f, 2.0f, 1.0f });
    const std::vector<uint64_t> bytes = { 768, 768, 768, 1536, 768 };
    for (uint32_t budget : { 13u, 20u, 64u, 100u, 512u, 1024u, 5000u }) {
        for (uint32_t n_ubatch : { 1u, 100u, 512u }) {
            for (uint32_t n_latent : { 0u, 7u }) {
                auto lim = limits_of(budget + n_latent);
                const auto found = indexmem_budgets_of(lim, n_ubatch, n_latent, needs, bytes);
                const uint64_t n_fixed = counts::budget_min(lim.sinks, lim.pin, lim.window, n_latent);
                if (found.budgets.empty()) {
                    CHECK_MSG(budget < 40, "%u", budget); // hardly more than what is protected
                    continue;
                }
                CHECK(found.budgets.size() == 3 && found.classes[1] == 2 && found.classes[3] == 1 && found.classes[0] == 0);
                lim.budgets = found.budgets;
                const auto several = counts::geometry::of(lim, n_ubatch, n_latent, 0, false, n_latent > 0, true);
                const auto one     = counts::geometry::of(limits_of(lim.budget), n_ubatch, n_latent, 0, false, n_latent > 0, true);
                uint64_t n_held = 0, n_slots = 0, n_bytes = 0;
                for (size_t il = 0; il < needs.size(); ++il) {
                    const uint32_t cls = found.classes[il];
                    n_held  += bytes[il]*lim.budgets[cls];
                    n_slots += bytes[il]*several.n_slots[cls];
                    n_bytes += bytes[il];
                    CHECK(lim.budgets[cls] >= n_fixed);
                }
                CHECK(n_held <= n_bytes*lim.budget && n_slots <= n_bytes*one.n_slots[0]);
                CHECK(budget < 100 || n_held > 0.85*n_bytes*lim.budget);
            }
        }
    }
    auto lim = limits_of(1000);
    lim.span = 2200;
    const auto capped = indexmem_budgets_of(lim, 64, 0, needs, bytes).budgets;
    CHECK(capped[2] == 1100); // half of the span
    CHECK(3*capped[0] + 2*capped[1] + capped[2] > 0.98*6*1000); // and what it cannot take the others get
    lim = limits_of(100);
    lim.span = 300;
    CHECK(indexmem_budgets_of(lim, 180, 0, needs, bytes).budgets.back() == 120); // and a ubatch fits behind it
    CHECK(indexmem_budgets_of(lim, 64, 0, needs_of({ 2.0f, 2.0f }), { 1, 1 }).budgets.empty()); // all the same

    // a budget of most of the span is the same in all layers: a text that fits is kept whole
    lim = limits_of(1500);
    lim.span = 2200;
    const auto equal = indexmem_budgets_of(lim, 64, 0, needs, bytes);
    CHECK(equal.budgets.empty() && equal.classes == std::vector<uint8_t>(needs.size(), 0));
}

TEST(heads_of_equal_needs_are_kept_together_where_they_are_neighbours) {
    const auto lengths = [](const std::vector<float> & shares, const std::vector<uint32_t> & least = {}) {
        const auto needs = needs_of(shares, least);
        std::vector<uint32_t> res;
        uint32_t head = 0;
        for (const auto & slice : indexmem_slices_of(3, needs.data(), needs.size())) {
            CHECK(slice.il == 3 && slice.head == head && slice.cls == 0);
            head += slice.n_head;
            res.push_back(slice.n_head);
        }
        CHECK(head == shares.size());
        return res;
    };
    typedef std::vector<uint32_t> of;
    CHECK(lengths({ 1.0f, 1.0f, 1.0f, 1.0f }) == of({ 4 }));
    CHECK(lengths({ 2.0f }) == of({ 1 }));
    CHECK(lengths({ 1.0f, 2.0f, 2.0f, 1.0f }) == of({ 1, 2, 1 }));
    CHECK(lengths({ 1.0f, 1.0f, 1.0f }, { 0, 0, 5 }) == of({ 2, 1 }));
    CHECK(lengths({}).empty());
}

TEST(what_a_layer_needs_at_least_comes_first) {
    const auto needs = needs_of({ 1.0f, 2.0f, 1.0f, 1.0f, 1.0f }, { 0, 0, 400, 250, 0 });
    const std::vector<uint64_t> bytes(5, 768);
    const uint32_t n_fixed = 4 + 8;
    const auto budgets = [&](uint32_t budget, uint32_t layer) {
        const auto found = indexmem_budgets_of(limits_of(budget), 32, 0, needs, bytes);
        CHECK(std::is_sorted(found.budgets.begin(), found.budgets.end()));
        uint64_t n_held = 0;
        for (size_t il = 0; il < needs.size(); ++il) {
            n_held += found.budgets[found.classes[il]];
        }
        CHECK(n_held <= 5*budget && n_held > 0.85*5*budget);
        return found.budgets[found.classes[layer]] - n_fixed;
    };
    for (uint32_t budget : { 300u, 320u }) { // the wide layer has what it needs, and the others share the rest
        CHECK(budgets(budget, 2) == 400 && budgets(budget, 3) == 250);
        CHECK(std::abs((int) budgets(budget, 1) - 2*(int) budgets(budget, 0)) <= 1);
        CHECK(budgets(budget, 0) == budgets(budget, 4));
    }
    CHECK(budgets(100, 2) > 100 && budgets(100, 2) + budgets(100, 3) <= 5*(100 - n_fixed)/2 + 2); // a small one is not spent on them alone
    CHECK(budgets(4000, 2) == budgets(4000, 0) && budgets(4000, 3) == budgets(4000, 0)); // in a large one it is nothing special
    CHECK(budgets(4000, 1) > 1.9*budgets(4000, 0));

    std::vector<uint32_t> least(30, 0); // nor on one
    least[18] = 1000;
    const auto wide = indexmem_budgets_of(limits_of(32), 32, 0, needs_of(std::vector<float>(30, 1.0f), least), std::vector<uint64_t>(30, 768));
    CHECK(wide.classes[18] == 1 && wide.budgets[1] - n_fixed <= 5*(32 - n_fixed) && wide.budgets[1] - n_fixed > 4*(32 - n_fixed));
}
