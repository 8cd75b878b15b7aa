#include "indexmem-kv-counts.h"

#include "indexmem-span.h"

#include <cmath>
#include <cstdarg>
#include <cstdio>

// rows of any type begin at multiples of 16 bytes then
static constexpr uint32_t N_FRONT_PAD = 8;

// of slots where layers have budgets of their own: what ops that read keys in tiles like, and where it takes little, what the fast
// kernels of CUDA's flash attention want
static constexpr uint32_t N_SLOTS_PAD  = 64;
static constexpr uint32_t N_SLOTS_MANY = 4096;

// An eviction takes the longer the more entries it ranks. So the larger a budget, the more leave at once, and a token pays the same.
static constexpr uint32_t EVICT_STEP  = 32;
static constexpr uint32_t EVICT_SHARE = 128;

#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
static std::string text(const char * format, ...) {
    char buf[512];
    va_list args;
    va_start(args, format);
    vsnprintf(buf, sizeof(buf), format, args);
    va_end(args);
    return buf;
}

static uint32_t pad(uint32_t n, uint32_t to) {
    return (n + to - 1)/to*to;
}

indexmem_kv_counts::geometry indexmem_kv_counts::geometry::of(const limits & lim, uint32_t n_ubatch, uint32_t n_latent,
        uint32_t n_queries, bool indexer, bool recalls, bool evicts) {
    geometry res = {};
    res.n_latent = n_latent;
    res.n_front  = pad(n_latent, N_FRONT_PAD);

    const bool several = lim.n_classes() > 1;
    for (uint32_t c = 0; c < N_CLASSES_MAX; ++c) {
        const uint32_t n_entries = lim.budget_of(std::min(c, lim.n_classes() - 1)) - n_latent + n_ubatch;
        res.n_slots[c] = slots_of(n_entries, n_latent, several);
        res.n_pad[c]   = pad_of(n_entries, several);
    }

    res.n_ring  = n_queries > 0 ? n_queries + N_RING_SLACK : 0;
    res.n_wait  = indexer ? std::clamp(lim.budget/WAIT_SHARE, N_WAIT_MIN, N_WAIT_MAX) : 0;
    res.recalls = recalls;
    res.evicts  = evicts;
    return res;
}

uint32_t indexmem_kv_counts::geometry::pad_of(uint32_t n_entries, bool several) {
    return several && n_entries < N_SLOTS_MANY ? N_SLOTS_PAD : N_KV_PAD;
}

// Attention looks at a multiple of N_KV_PAD rows from row n_front on, or with the slots of the memory from row 0 on. Where
// layers differ, padding like that would take more than their budgets differ by: the last multiple may be cut off there.
uint32_t indexmem_kv_counts::geometry::slots_of(uint32_t n_entries, uint32_t n_latent, bool several) {
    const uint32_t n_pad   = pad_of(n_entries, several);
    const uint32_t n_front = pad(n_latent, N_FRONT_PAD);
    return std::max(pad(n_entries, n_pad), pad(n_front + n_entries, n_pad) - n_front);
}

uint32_t indexmem_kv_counts::geometry::n_kv(uint32_t cls, uint32_t n, bool recall) const {
    return std::min(pad(n + (recall ? n_front : 0), N_KV_PAD), n_kv_max(cls, recall));
}

indexmem_kv_counts::seq_state indexmem_kv_counts::seq_state::of(uint32_t cls) const {
    seq_state res = *this;
    if (cls > 0) {
        res.n_used  = others[cls - 1].n_used;
        res.n_fixed = others[cls - 1].n_fixed;
    }
    return res;
}

void indexmem_kv_counts::seq_state::put(uint32_t cls, uint32_t used, uint32_t fixed) {
    (cls == 0 ? n_used  : others[cls - 1].n_used)  = used;
    (cls == 0 ? n_fixed : others[cls - 1].n_fixed) = fixed;
}

void indexmem_kv_counts::seq_state::append(int32_t n) {
    n_seen += n;
    n_used += (uint32_t) n;
    n_last += (uint32_t) n;
    for (auto & o : others) {
        o.n_used += (uint32_t) n;
    }
}

indexmem_kv_counts::step indexmem_kv_counts::step::of(uint32_t cls) const {
    step res = *this;
    res.n_kv[0] = n_kv[cls];
    for (auto * states : { &res.before, &res.after }) {
        for (auto & seq : *states) {
            seq = seq.of(cls);
        }
    }
    return res;
}

indexmem_kv_counts::indexmem_kv_counts(const limits & lim, const geometry & geo, uint32_t n_seq_max) :
    lim(lim), geo(geo), seqs(n_seq_max) {
    for (uint32_t s = 0; s < n_seq_max; ++s) {
        reset(s);
    }
}

//
// budget arithmetic
//

uint64_t indexmem_kv_counts::budget_min(uint64_t sinks, uint64_t pin, uint64_t window, uint64_t n_latent) {
    return std::max(sinks, pin) + window + n_latent + 1;
}

uint32_t indexmem_kv_counts::budget_mean(const seq_state & seq) const {
    uint64_t res = lim.budget;
    if (lim.ratio > 0.0) {
        const uint64_t min = budget_min(lim.sinks, seq.pin, lim.window, geo.n_latent);
        res = std::min(res, std::max<uint64_t>((uint64_t) std::ceil(lim.ratio*seq.n_seen), min));
    }
    return (uint32_t) res - geo.n_latent;
}

uint32_t indexmem_kv_counts::budget_of(const seq_state & seq, uint32_t cls) const {
    const uint64_t now = budget_mean(seq) + geo.n_latent;
    uint64_t res = lim.budget_of(cls);
    if (now < lim.budget) { // of what is not protected the class has its share
        const uint64_t min  = budget_min(lim.sinks, seq.pin, lim.window, geo.n_latent);
        const uint64_t mine = budget_min(0, n_protected(seq, cls), lim.window, geo.n_latent);
        res = std::min(res, lim.budgets.empty() ? now : mine + (now - min)*(res - mine)/(lim.budget - min));
    }
    return (uint32_t) res - geo.n_latent;
}

uint32_t indexmem_kv_counts::n_protected(const seq_state & seq, uint32_t cls) const {
    const uint32_t n    = std::max(lim.sinks, seq.pin);
    const uint32_t room = pin_room(lim.budget_of(cls));
    return n <= room ? n : std::max(lim.sinks, room - room/PIN_SPARE);
}

uint32_t indexmem_kv_counts::n_protected(const seq_state & seq) const {
    return n_protected(seq, 0); // budgets ascend
}

uint32_t indexmem_kv_counts::room_of(const seq_state & seq) const {
    uint32_t res = UINT32_MAX;
    for (uint32_t c = 0; c < lim.n_classes(); ++c) {
        res = std::min(res, room_of(seq, c));
    }
    return res;
}

bool indexmem_kv_counts::is_over(const seq_state & seq, uint32_t n) const {
    bool res = false;
    for (uint32_t c = 0; c < lim.n_classes(); ++c) {
        res = res || seq.of(c).n_used + n > budget_of(seq, c);
    }
    return res;
}

int32_t indexmem_kv_counts::pos_tail(const seq_state & seq) const {
    int32_t res = 0;
    for (uint32_t c = 0; c < lim.n_classes(); ++c) {
        res = std::max(res, seq.of(c).pos_tail());
    }
    return res;
}

// The newest tokens are what most of the next ones depend on, and what ranks were not made for: they see a token as it is read. What heads
// have on average says how many, as text at hand is as long whichever heads need more of the past; small heads keep half for other things.
uint32_t indexmem_kv_counts::window_of(const seq_state & seq) const {
    if (!lim.window_grows) {
        return lim.window;
    }
    return std::max(lim.window, std::min(room_mean(seq)/WINDOW_SHARE, room_of(seq)/2));
}

// All classes evict at the same time. What heads have on average says how often, or the smallest would make it every token or two;
// these keep half of what they choose from.
uint32_t indexmem_kv_counts::evict_step_of(const seq_state & seq) const {
    const uint32_t window  = window_of(seq);
    const uint32_t room    = room_of(seq) - window;
    const uint32_t of_mean = room_mean(seq) - window;
    const uint32_t chosen  = std::min(std::min(std::max(EVICT_STEP, of_mean/EVICT_SHARE), of_mean/8), room/2);
    return std::max(1u, std::min(lim.evict_step > 0 ? lim.evict_step : chosen, room));
}

uint32_t indexmem_kv_counts::evict_max(uint32_t n_tokens) const {
    if (lim.ratio > 0.0) {
        return lim.budget_of(lim.n_classes() - 1) + n_tokens; // a shorter pin, or a state of a larger ratio, can leave far more than is now allowed
    }
    return n_tokens + (lim.evict_step > 0 ? std::min(lim.evict_step, lim.budget) : std::max(EVICT_STEP, lim.budget/EVICT_SHARE));
}

uint32_t indexmem_kv_counts::n_drafts(const seq_state & seq, uint32_t n) const {
    if (seq.broken) {
        return 0;
    }
    const auto last = [&](const seq_state & next) { // whether there is more to do than to append it, as a single token
        return is_over(next, geo.n_wait > 0 ? 1 : 0) || (geo.n_wait > 0 && next.n_pending() >= geo.n_wait) ||
            (lim.span > 0 && next.rotary_next() > (int64_t) lim.span);
    };
    seq_state next = seq;
    for (uint32_t i = 0; i <= n; ++i) {
        next.append(1);
        if (last(next)) {
            return std::max(i, 1u) - 1;
        }
    }
    return n;
}

//
// steps
//

std::vector<indexmem_kv_counts::step> indexmem_kv_counts::prepare(const std::vector<tokens> & ubatches, std::string & error) const {
    std::vector<step> res;

    std::vector<seq_state> state = seqs;

    for (const tokens & ub : ubatches) {
        step st = {};
        st.s0       = ub.s0;
        st.n_seq    = ub.n_seq;
        st.n_tokens = ub.n_tokens;
        if (ub.s0 + ub.n_seq > state.size()) {
            error = text("there is no sequence %u (n_seq_max is %zu)", ub.s0 + ub.n_seq - 1, state.size());
            return {};
        }

        std::array<uint32_t, N_CLASSES_MAX> n_top = {};
        for (uint32_t i = 0; i < ub.n_seq; ++i) {
            seq_state & seq = state[ub.s0 + i];
            if (seq.broken) {
                error = broken_text(ub.s0 + i);
                return {};
            }
            for (uint32_t t = 0; t < ub.n_tokens; ++t) {
                const int32_t found = ub.pos[i*ub.n_tokens + t], expected = seq.n_seen + (int32_t) t;
                if (found != expected) {
                    error = text("sequence %u goes on at position %d, the batch has %d there: a bounded KV cache takes each position "
                            "once, in order", ub.s0 + i, expected, found);
                    return {};
                }
            }
            if (lim.span > 0 && (int64_t) seq.rotary_next() + ub.n_tokens > lim.span) {
                rebase(ub.n_tokens, seq);
            }
            st.rotary = st.rotary || seq.n_rebases > 0;
            st.before.push_back(seq);
            for (uint32_t c = 0; c < N_CLASSES_MAX; ++c) {
                n_top[c] = std::max(n_top[c], seq.of(c).n_used + ub.n_tokens);
            }
            if (!advance(ub.s0 + i, ub.n_tokens, seq, st, error)) {
                return {};
            }
        }
        score(st, state);
        for (uint32_t i = 0; i < ub.n_seq; ++i) {
            seq_state & seq = state[ub.s0 + i];
            const uint32_t n_written = geo.n_wait == 0 ? ub.n_tokens : st.score ? (uint32_t) (seq.n_seen - st.before[i].n_scored) : 0;
            if (!keep_queries(ub.s0 + i, n_written, st.before[i], seq, error)) {
                return {};
            }
            st.after.push_back(seq);
        }

        for (uint32_t c = 0; c < N_CLASSES_MAX; ++c) {
            st.n_kv[c] = geo.n_kv(c, n_top[c], st.recall);
        }
        res.push_back(std::move(st));
    }

    return res;
}

void indexmem_kv_counts::rebase(uint32_t n_tokens, seq_state & seq) const {
    uint32_t n_most = 0;
    for (uint32_t c = 0; c < N_CLASSES_MAX; ++c) {
        const uint32_t n_used = seq.of(c).n_used;
        seq.put(c, n_used, n_used); // what is held cannot be taken back
        n_most = std::max(n_most, n_used);
    }
    seq.shift   = seq.n_seen - indexmem_span_end(lim.span, n_most, n_tokens);
    seq.n_first = std::min(seq.n_first, n_protected(seq));
    seq.n_rebases++;
}

bool indexmem_kv_counts::advance(uint32_t s, uint32_t n_tokens, seq_state & seq, step & st, std::string & error) const {
    st.recall = st.recall || (geo.recalls && seq.n_evictions > 0);

    for (uint32_t c = 0; c < lim.n_classes(); ++c) {
        const uint32_t n_used = seq.of(c).n_used;
        if (n_used + n_tokens > geo.n_slots[c]) {
            error = text("%u tokens at once do not fit: %u of %u slots are in use", n_tokens, n_used, geo.n_slots[c]);
            return false;
        }
    }
    seq.append((int32_t) n_tokens);
    seq.n_first = seq.n_evictions == 0 && seq.n_rebases == 0 ? (uint32_t) seq.n_seen : seq.n_first;

    if (!is_over(seq)) {
        return true;
    }
    st.evict = true;
    return evict(s, seq, error);
}

bool indexmem_kv_counts::evict(uint32_t s, seq_state & seq, std::string & error) const {
    if (!geo.evicts) {
        error = text("the budget of %u entries is used up by sequence %u, and the policy is to evict nothing", budget_of(seq), s);
        return false;
    }
    const uint32_t n_step = evict_step_of(seq);
    const uint32_t window = window_of(seq);
    for (uint32_t c = 0; c < N_CLASSES_MAX; ++c) {
        const uint32_t cls    = std::min(c, lim.n_classes() - 1);
        const uint32_t n_used = seq.of(c).n_used;
        const uint32_t budget = budget_of(seq, cls);
        // one that still has room makes as much of it as the others do, so that it is not full long before them
        uint32_t n_left = n_used > budget ? std::min(budget, n_used - n_step) : std::min(n_used, budget + 1 - n_step);
        n_left = std::min(n_used, std::max(n_left, n_protected(seq, cls) + window));
        if (n_left < n_used) {
            seq.put(c, n_left, n_left);
        }
    }
    seq.n_first = std::min(seq.n_first, n_protected(seq));
    seq.n_last  = std::min(seq.n_last, window);
    seq.n_evictions++;
    return true;
}

bool indexmem_kv_counts::fit(uint32_t s, const seq_state & state, step & st, std::string & error) const {
    st = {};
    st.s0     = s;
    st.n_seq  = 1;
    st.rotary = state.n_rebases > 0;
    st.recall = geo.recalls && state.n_evictions > 0;
    st.before = { state };
    st.after  = { state };

    // less room than a ratio leaves is no reason: the next step takes care of that
    seq_state & seq = st.after[0];
    for (uint32_t c = 0; c < lim.n_classes(); ++c) {
        st.evict = st.evict || seq.of(c).n_used > lim.budget_of(c) - geo.n_latent;
    }
    if (st.evict && !evict(s, seq, error)) {
        return false;
    }
    st.score = geo.n_wait > 0 && (st.evict || seq.n_pending() > geo.n_wait);
    if (st.score) {
        st.n_old = state.n_pending();
        seq.n_scored = seq.n_seen;
    }
    return keep_queries(s, st.n_old, state, seq, error);
}

// whether the indexer scores in this step, and what
void indexmem_kv_counts::score(step & st, std::vector<seq_state> & state) const {
    if (geo.n_wait == 0) {
        return;
    }
    const bool single = st.n_tokens == 1;

    st.score = st.evict;
    for (uint32_t i = 0; i < st.n_seq; ++i) {
        const seq_state & seq = state[st.s0 + i];
        // a single token that fills the budget scores what waits, so that the one after it, which evicts, has less to do
        const bool fills = single && !is_over(seq) && is_over(seq, 1);
        st.score = st.score || fills || seq.n_pending() > (single ? geo.n_wait - 1 : geo.n_wait);
    }
    for (uint32_t i = 0; i < st.n_seq && st.score; ++i) {
        st.n_old = std::max(st.n_old, st.before[i].n_pending());
        state[st.s0 + i].n_scored = state[st.s0 + i].n_seen;
    }
    if (single && st.score && (!st.evict || st.n_old > 0)) {
        st.n_old = std::max(st.n_old, geo.n_wait - 1); // so that the graph of single tokens that score is always the same
    }
}

// the ring after a step that writes the newest n_written queries into it; false if its eviction reads some that are lost
bool indexmem_kv_counts::keep_queries(uint32_t s, uint32_t n_written, const seq_state & before, seq_state & seq, std::string & error) const {
    if (geo.n_ring == 0) {
        return true;
    }
    const int32_t n_queries = (int32_t) (geo.n_ring - N_RING_SLACK); // that a rank reads: older ones of a step are not written
    if (n_written >= (uint32_t) n_queries) {
        seq.ring_from = seq.n_seen - n_queries;
    } else if (n_written > 0) {
        seq.ring_from = std::max(seq.ring_from, seq.n_seen - (int32_t) geo.n_ring);
    }
    if (seq.n_evictions > before.n_evictions && seq.ring_from > std::max(0, seq.n_seen - n_queries)) {
        error = text("sequence %u cannot evict: queries that the policy reads were overwritten before text was taken back, and the "
                "budget has become smaller since. Clear it, or load a state", s);
        return false;
    }
    return true;
}

void indexmem_kv_counts::finish(const step & st) {
    for (uint32_t i = 0; i < st.n_seq; ++i) {
        seqs[st.s0 + i] = st.after[i];
    }
}

// What a step without eviction writes lies behind the entries in use, or in rows of rings that nobody reads: the newest
// queries overwrite old ones, and n_ring back from its end the ring is as it was.
void indexmem_kv_counts::abandon(const step & st) {
    for (uint32_t i = 0; i < st.n_seq; ++i) {
        seq_state & seq = seqs[st.s0 + i];
        seq = st.before[i];
        seq.ring_from = std::min(seq.n_seen, std::max(seq.ring_from, st.after[i].n_seen - (int32_t) geo.n_ring));
        seq.ring_from = geo.n_ring > 0 ? seq.ring_from : 0;
        seq.broken    = st.after[i].n_evictions > st.before[i].n_evictions;
    }
}

//
// whole sequences
//

std::string indexmem_kv_counts::broken_text(uint32_t s) {
    return text("sequence %u is broken: evaluating it was interrupted after what it holds had been changed. Clear it, or load a state", s);
}

void indexmem_kv_counts::reset(uint32_t s) {
    seqs[s]     = {};
    seqs[s].pin = lim.pin;
}

uint32_t indexmem_kv_counts::pin_room(uint32_t budget) const {
    return budget - (uint32_t) budget_min(0, 0, lim.window, geo.n_latent); // at least the sinks: there is no smaller budget
}

bool indexmem_kv_counts::set_pin(uint32_t s, uint32_t n, std::string & error) {
    seq_state & seq = seqs[s];

    if (seq.broken) {
        error = broken_text(s);
        return false;
    }
    if (n > pin_room()) {
        const uint64_t min = budget_min(lim.sinks, n, lim.window, geo.n_latent);
        error = text("a pinned prefix of %u tokens needs a budget of at least %llu (max(sinks %u, pin %u) + window %u + %u slots of "
                "the memory + 1), the budget is %u", n, (unsigned long long) min, lim.sinks, n, lim.window, geo.n_latent, lim.budget);
        return false;
    }
    if (n == seq.pin) {
        return true;
    }
    const uint32_t n_sure = std::min(n_protected(seq), seq.n_first);
    if (seq.n_evictions > 0 && n > n_sure) {
        error = text("cannot pin %u tokens: entries have been evicted already, and only the first %u tokens are sure to be there", n, n_sure);
        return false;
    }
    seq.pin = n;
    return true;
}
