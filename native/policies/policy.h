#pragma once

// What a policy sees and does: ranks for the entries of some KV heads, each of one sequence.
//
// A policy is a function that all threads call at once, with rankings that differ in the thread alone. It goes through the
// entries in chunks, which are handed out to the threads:
//
//     ranking.each_chunk([&](const indexmem_rank_chunk & c) {
//         for (int64_t i = 0; i < c.n; ++i) {
//             c.rank[i] = ...;
//         }
//     });
//
// Invariants
//   - a rank is a pure function of what is shown: the same ranks, whatever the thread or the number of threads
//   - higher ranks stay; ties are broken later, by position (selection, not the policy)
//   - entries are in slot order, which is not position order
//   - what one call of each_chunk() or each_head() has written, all threads see in the next

#include <cstddef>
#include <cstdint>
#include <functional>

constexpr int     INDEXMEM_MAX_QUERIES = 32;
constexpr int64_t INDEXMEM_RANK_CHUNK  = 128; // entries

struct ggml_tensor;

// one KV head of one sequence
struct indexmem_rank_head {
    int64_t n;               // entries now in the cache, those of the current ubatch included
    float * rank;            // [n] to be written
    float * scratch;         // indexmem_rank_scratch() floats for the policy's own use

    const int32_t * pos;     // positions of slots [0, n_fixed); see position()
    int32_t         n_fixed;
    int32_t         pos_tail;
    int32_t         pos_last; // position of the newest entry
    int32_t         head;     // KV head

    const char * k;          // row 0 of the cached (post-RoPE) keys; null unless the policy needs them

    // queries of the group, null unless the policy needs them
    const char  * q;
    const float * sinks;     // [n_group] a logit of each query head whose attention goes nowhere, null: none

    const float * attention; // [n] if it is known, else null

    // what the indexer of a sidecar says of each entry, null unless the policy is `indexer`
    const char * terms;      // [n][n_terms] floats

    int32_t position(int64_t i) const {
        return i < n_fixed ? pos[i] : pos_tail + (int32_t) (i - n_fixed);
    }

    int64_t n_chunks() const { return (n + INDEXMEM_RANK_CHUNK - 1)/INDEXMEM_RANK_CHUNK; }
};

// What is the same for all heads of an op.
struct indexmem_rank_shape {
    const ggml_tensor * k;  // keys, or the terms of an indexer
    int64_t n_slots;
    int64_t n_embd;         // head size of the keys

    int64_t n_group;        // query heads that share a KV head
    int32_t n_queries;      // the latest queries, of policies.def
    int64_t n_ring;         // the query of position p is in ring row p % n_ring
    size_t  nb_ring;        // bytes between ring rows
    size_t  nb_head;        // bytes between query heads
    float   scale;          // of the attention logits
    float   softcap;        // of the attention logits, 0 = none

    size_t  nb_term;        // bytes between entries
    int32_t n_terms;        // 1, or 2 with a retention rate
    float   pos_slope;
    float   age_scale;

    uint64_t seed;
    int32_t  il;            // layer of the model
    bool     needs_keys;
    bool     attends;       // ranks come from indexmem_rank_attention(), which takes scratch
    bool     attended;      // attention is known
    int      n_threads;

    int64_t n_chunks() const { return (n_slots + INDEXMEM_RANK_CHUNK - 1)/INDEXMEM_RANK_CHUNK; }

    // the positions whose queries are read, [first, pos_last]
    int32_t query_first(const indexmem_rank_head & h) const { return h.pos_last < n_queries ? 0 : h.pos_last + 1 - n_queries; }

    // the query of head g of the group for position p in (pos_last - n_queries, pos_last]
    const float * query(const indexmem_rank_head & h, int64_t g, int32_t p) const {
        return (const float *) (h.q + (p % n_ring)*nb_ring + g*nb_head);
    }
};

// the queries of a head, those of each head of the group next to each other
struct indexmem_rank_queries {
    int32_t p0;     // position of the first of each head of the group
    int64_t n_each;
    int64_t n;

    indexmem_rank_queries(const indexmem_rank_shape & sh, const indexmem_rank_head & h) :
        p0(sh.query_first(h)), n_each(h.pos_last + 1 - p0), n(sh.n_group*n_each) {}

    int64_t group   (int64_t q) const { return q/n_each; }
    int32_t position(int64_t q) const { return p0 + (int32_t) (q % n_each); }
};

struct indexmem_rank_thread; // scratch of this thread

// entries [i0, i0 + n) of a head
struct indexmem_rank_chunk {
    const indexmem_rank_head   & head;
    const indexmem_rank_shape  & shape;
    const indexmem_rank_thread & thread;

    int64_t i0;
    int64_t n;
    float * rank;           // [n] to be written

    int64_t index() const { return i0/INDEXMEM_RANK_CHUNK; }

    void positions(int32_t * pos) const {
        const int64_t n_fixed = head.n_fixed - i0 < 0 ? 0 : head.n_fixed - i0 < n ? head.n_fixed - i0 : n;
        for (int64_t i = 0; i < n_fixed; ++i) {
            pos[i] = head.pos[i0 + i];
        }
        for (int64_t i = n_fixed; i < n; ++i) {
            pos[i] = head.position(i0 + i);
        }
    }

    // Of the keys, whatever their type. Results and weights have room for INDEXMEM_RANK_CHUNK values.
    void squares(float * out) const;                             // out[i] = |key i|^2
    void dots   (const float * x, float * out) const;            // out[i] = x . key i
    void add    (const float * weight, float * sum) const;       // sum += weight[i]*key i
};

class indexmem_ranking {
public:
    typedef std::function<void(const indexmem_rank_chunk &)> of_chunk;
    typedef std::function<void(const indexmem_rank_head &)>  of_head;

    virtual ~indexmem_ranking() = default;

    virtual const indexmem_rank_shape & shape() const = 0;

    // Returns when all threads are done.
    virtual void each_chunk(const of_chunk & f) = 0;

    // the same for heads
    virtual void each_head(const of_head & f) = 0;

    // Returns when this thread is done: the next each_chunk() goes on with the threads that are not busy.
    virtual void each_head_aside(const of_head & f) = 0;
};

typedef void (*indexmem_rank_t)(indexmem_ranking & ranking);

// Attention that the latest queries give to every entry they may see (position <= theirs), as probabilities over the entries
// now in the cache and the sink: the mean over queries and the group is the rank. Where it is known, what is known. `aside` is done once
// for each head, by one thread while others go on.
void indexmem_rank_attention(indexmem_ranking & ranking, const indexmem_ranking::of_head & aside = nullptr);

// What it takes of the scratch of a head, from the beginning, in floats.
size_t indexmem_rank_attention_scratch(const indexmem_rank_shape & shape);

// Scratch of a head, in floats: what attention takes and then [2][n_slots] if ranks come from it; [n_chunks + 1][n_embd] if the policy
// reads keys in another way.
size_t indexmem_rank_scratch(const indexmem_rank_shape & shape);

#define INDEXMEM_POLICY(name, needs_keys, n_queries, help) \
    void indexmem_rank_##name(indexmem_ranking & ranking);
#include "policies.def"
#undef INDEXMEM_POLICY
