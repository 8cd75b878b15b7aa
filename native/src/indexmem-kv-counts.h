#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <vector>

//
// What the host knows about a bounded cache: counts
//
// How many entries each sequence holds, which of them may leave, and what each ubatch does to them. Nothing here knows of
// tensors, graphs or models: which tokens the slots hold is known to the device alone.
//
// Invariants
//   - a step counts when it has been computed (finish), not before. One that was not (abandon) leaves a sequence as it was, or,
//     where entries may have moved already, broken: nothing but clearing or replacing it is possible then
//   - slots [0, n_used) of every head are in use. Slots [0, n_fixed) have their position in a table on the device; slot
//     n_fixed + i, appended since the last eviction or rebase, holds position n_seen - (n_used - n_fixed) + i
//   - after every step n_used <= budget_of(seq)
//   - layers may be of several classes, each with a budget of its own (indexmem-kv-shares.h). They have seen the same tokens, and
//     evict, score and are rebased in the same steps: n_used and n_fixed alone differ, and of() gives those of one class, for
//     which the rest of this list holds
//   - with an indexer, entries at positions [n_scored, n_seen) are pending: their hidden states lie in a ring of n_wait rows.
//     What is ranked has been scored, so pending entries are the last ones, in order
//   - an entry of index j was rotated for a position r of its own. Those of slots from n_fixed on have r = j - shift, and the next
//     token has r = n_seen - shift; with a span, no r comes up to it (indexmem-span.h)
//   - with a ring of queries, it holds those of positions [ring_from, n_seen) at least, as far as they have been written.
//     Taking tokens back cannot lose queries that an eviction reads later, because that needs more tokens than there were;
//     only a smaller budget (a shorter pin with a ratio, a state of another context) can, and is told
//   - every head holds the tokens [0, n_first), rotated by their own indices, and [n_seen - n_last, n_seen). Of a state that was
//     made with fewer sinks, or a smaller window, these are fewer than are protected: what is gone does not come back
//

class indexmem_kv_counts {
public:
    // Attention looks at a multiple of so many rows: kernels of some backends want that, and it bounds how often the graph
    // changes while the cache fills.
    static constexpr uint32_t N_KV_PAD = 256;

    // queries kept beyond those that a rank reads
    static constexpr uint32_t N_RING_SLACK = 32;

    // Tokens that can wait to be scored: a small network costs less per token when it sees many. Of a small budget they are a
    // small share too, because their hidden states take more bytes than entries do.
    static constexpr uint32_t N_WAIT_MAX = 32;
    static constexpr uint32_t N_WAIT_MIN = 4;
    static constexpr uint32_t WAIT_SHARE = 32; // of the budget

    // classes of layers at most
    static constexpr uint32_t N_CLASSES_MAX = 4;

    // a window that nobody chose
    static constexpr uint32_t WINDOW_LEAST = 128;
    static constexpr uint32_t WINDOW_SHARE = 4; // of what may leave or be in it
    static constexpr uint32_t PIN_SPARE    = 8; // of what could be pinned, where all that is to be does not fit

    // what is asked for
    struct limits {
        uint32_t budget;
        uint32_t sinks;
        uint32_t window;     // at least
        uint32_t pin;
        uint32_t evict_step; // 0 = from the room in the budget
        double   ratio;      // of the tokens seen, 0 = none
        uint32_t span;       // rotary positions that are used, 0 = they grow without end

        bool window_grows = false; // with the budget, see window_of

        std::vector<uint32_t> budgets; // of each class of layers, ascending; empty: one class, which has the budget

        uint32_t n_classes() const { return budgets.empty() ? 1 : (uint32_t) budgets.size(); }
        uint32_t budget_of(uint32_t cls) const { return budgets.empty() ? budget : budgets[cls]; }
    };

    // what follows from it, from the size of ubatches, and from what ranks and remembers
    struct geometry {
        uint32_t n_latent; // slots of a latent memory
        uint32_t n_front;  // the same, padded: rows of K and V in front of the entries
        std::array<uint32_t, N_CLASSES_MAX> n_slots; // of entries: the budget of each class and room for one ubatch, padded
        std::array<uint32_t, N_CLASSES_MAX> n_pad;   // to a multiple of these
        uint32_t n_ring;   // rows for the newest queries, 0 = none are kept
        uint32_t n_wait;   // rows for hidden states that wait to be scored, 0 = no indexer
        bool     recalls;  // what is evicted goes into a latent memory, which is read from then on
        bool     evicts;   // false: steps that would have to evict are refused

        // n_queries: kept queries that a rank reads, 0 = none
        static geometry of(const limits & lim, uint32_t n_ubatch, uint32_t n_latent, uint32_t n_queries, bool indexer,
                bool recalls, bool evicts);

        // slots for that many entries, and what they are a multiple of; several: of a cache with several classes of layers
        static uint32_t pad_of(uint32_t n_entries, bool several);
        static uint32_t slots_of(uint32_t n_entries, uint32_t n_latent, bool several);

        // rows that attention looks at in a class, of n entries or of all slots, and of the memory if it is read
        uint32_t n_kv(uint32_t cls, uint32_t n, bool recall) const;
        uint32_t n_kv_max(uint32_t cls, bool recall) const { return ((recall ? n_front : 0) + n_slots[cls])/n_pad[cls]*n_pad[cls]; }
    };

    struct seq_state {
        int32_t  n_seen  = 0;
        uint32_t n_used  = 0; // of the first class of layers
        uint32_t n_fixed = 0;

        struct held { uint32_t n_used = 0, n_fixed = 0; };
        std::array<held, N_CLASSES_MAX - 1> others; // of the other classes; those that do not exist hold what the last one does

        uint32_t pin     = 0;
        int32_t  n_scored  = 0;
        int32_t  ring_from = 0;

        uint32_t n_first = 0;
        uint32_t n_last  = 0;

        uint64_t n_evictions = 0; // steps that evicted

        int32_t  shift     = 0;
        uint64_t n_rebases = 0; // times that all entries got new rotary positions

        bool broken = false;

        int32_t  pos_tail()  const { return n_seen - (int32_t) (n_used - n_fixed); }
        uint32_t n_pending() const { return (uint32_t) (n_seen - n_scored); }
        int32_t  rotary_next() const { return n_seen - shift; }

        // the same with what one class of layers holds, and that put back
        seq_state of(uint32_t cls) const;
        void put(uint32_t cls, uint32_t n_used, uint32_t n_fixed);

        // more tokens, in all classes; fewer if n is negative
        void append(int32_t n);

        // forgets the entries from p0 on, which lie behind the tables of all classes
        void truncate(int32_t p0) {
            append(p0 - n_seen);
            n_first   = std::min(n_first, (uint32_t) p0);
            n_scored  = std::min(n_scored, p0);
            ring_from = std::min(ring_from, p0);
        }
    };

    // tokens of a ubatch: n_tokens of each of n_seq consecutive sequences, one sequence after the other
    struct tokens {
        uint32_t        s0;
        uint32_t        n_seq;
        uint32_t        n_tokens;
        const int32_t * pos; // [n_seq*n_tokens]
    };

    // what one ubatch does, decided before any ubatch of the batch runs
    struct step {
        uint32_t s0;       // first sequence of the ubatch
        uint32_t n_seq;    // consecutive sequences
        uint32_t n_tokens; // of each
        std::array<uint32_t, N_CLASSES_MAX> n_kv; // slots that attention looks at, of each class
        bool     evict;    // some sequence evicts
        bool     rotary;   // some sequence has been rebased: the rotary positions of what it holds are kept in a table
        bool     recall;   // some sequence has evicted before, and the memory is read
        bool     score;    // the indexer scores what is pending and the new tokens; if not, the new tokens become pending
        uint32_t n_old;    // pending entries scored, the most of any sequence

        std::vector<seq_state> before; // [n_seq] after the rebase that has to come first, if one has
        std::vector<seq_state> after;  // [n_seq]

        step of(uint32_t cls) const; // for one class of layers
    };

    indexmem_kv_counts(const limits & lim, const geometry & geo, uint32_t n_seq_max);

    const limits   & get_limits()   const { return lim; }
    const geometry & get_geometry() const { return geo; }

    uint32_t n_seq_max() const { return (uint32_t) seqs.size(); }

    const seq_state * get(int64_t s) const { return s >= 0 && s < (int64_t) seqs.size() ? &seqs[s] : nullptr; } // null out of range

    //
    // budget arithmetic
    //

    // smallest budget that leaves room to evict, with so many slots of a memory
    static uint64_t budget_min(uint64_t sinks, uint64_t pin, uint64_t window, uint64_t n_latent);

    // entries that a sequence may keep at its present length in a class of layers, the slots of the memory not counted
    uint32_t budget_of(const seq_state & seq, uint32_t cls = 0) const;

    // whether it holds more than that in some class, with n more tokens
    bool is_over(const seq_state & seq, uint32_t n = 0) const;

    // the first position from which on all classes hold every token where it was appended
    int32_t pos_tail(const seq_state & seq) const;

    // Length of the protected prefix in a class. One that has no room for all of a pinned prefix keeps its beginning, and leaves an
    // eighth of that room to what ranks high.
    uint32_t n_protected(const seq_state & seq, uint32_t cls) const;

    uint32_t n_protected(const seq_state & seq) const; // in all of them

    // what classes have on average at this length, without the slots of a memory
    uint32_t budget_mean(const seq_state & seq) const;

    // newest tokens that never leave
    uint32_t window_of(const seq_state & seq) const;

    // entries that leave at once: at least the step, and never into what is protected
    uint32_t evict_step_of(const seq_state & seq) const;

    // entries that leave at once at most, after n_tokens more
    uint32_t evict_max(uint32_t n_tokens) const;

    // Of n drafts, guesses at what follows the next token, how many a batch may have behind that token so that they can be taken
    // back, and nothing is left of them: no entry leaves, gets a new position or is scored before it is known to stay.
    uint32_t n_drafts(const seq_state & seq, uint32_t n) const;

    // Without a span rotary positions go on growing, also of sequences that have been rebased.
    void drop_span() { lim.span = 0; }

    //
    // steps
    //

    // What the ubatches of a batch do. Empty, with the reason in `error`, when that is impossible; nothing has changed then.
    std::vector<step> prepare(const std::vector<tokens> & ubatches, std::string & error) const;

    // What a state that was read does before it can be used, as a step of no tokens: entries leave, or, with an indexer, what is
    // pending is scored, or both; after == before if nothing has to. False with an error.
    bool fit(uint32_t s, const seq_state & state, step & st, std::string & error) const;

    void finish (const step & st); // it has been computed
    void abandon(const step & st); // it has been begun, and perhaps computed in part

    //
    // whole sequences and their ends
    //

    // whether a tail can be taken back exactly: every removed entry is still where it was appended
    bool can_remove(const seq_state & seq, int32_t p0) const { return !seq.broken && p0 >= pos_tail(seq); }

    void truncate(uint32_t s, int32_t p0) { seqs[s].truncate(p0); }
    void reset   (uint32_t s); // empty, with the pin that was asked for
    void assign  (uint32_t s, const seq_state & state) { seqs[s] = state; }

    // what everybody is told who asks more of a broken sequence than to be cleared or replaced
    static std::string broken_text(uint32_t s);

    // false when pin, sinks and window leave no room, or when evicted entries would have to be pinned
    bool set_pin(uint32_t s, uint32_t n, std::string & error);

    // the longest prefix that can be pinned: what there is room for where all classes have as much
    uint32_t pin_room() const { return pin_room(lim.budget); }

private:
    // new rotary positions for all that a sequence holds, so that n_tokens more stay inside the span
    void rebase(uint32_t n_tokens, seq_state & seq) const;

    // one sequence of a step; false with an error
    bool advance(uint32_t s, uint32_t n_tokens, seq_state & seq, step & st, std::string & error) const;

    // entries leave, because there are more than the budget of some class has; false with an error
    bool evict(uint32_t s, seq_state & seq, std::string & error) const;

    void score(step & st, std::vector<seq_state> & state) const;

    uint32_t pin_room(uint32_t budget) const;

    // what a class can have beside what is protected
    uint32_t room_of(const seq_state & seq, uint32_t cls) const { return budget_of(seq, cls) - n_protected(seq, cls); }
    uint32_t room_of(const seq_state & seq) const; // the least
    uint32_t room_mean(const seq_state & seq) const { return budget_mean(seq) - std::max(lim.sinks, seq.pin); }

    bool keep_queries(uint32_t s, uint32_t n_written, const seq_state & before, seq_state & seq, std::string & error) const;

    limits   lim;
    geometry geo;

    std::vector<seq_state> seqs; // [n_seq_max]
};
