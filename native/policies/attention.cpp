#include "rank-keys.h"

#include <cmath>

// Attention of the latest queries, for the policies that look at it: tova, snapkv.
//
// The queries of a head take turns of as many as fit into the scratch. In a turn each chunk of keys is multiplied with all its
// queries, by the kernels of attention, and leaves e^(logit - max) with max and sum of the chunk; from these come the
// maximum and the sum of all, hence a factor of each chunk for each query, with which the next turn begins by adding up what
// this one has left.

using namespace indexmem_cpu;
using namespace indexmem_simd;

namespace {

// Weights of a head in a turn, for each thread, if at least LEAST queries fit: they are read again soon, and what does not fit into the
// cache of a core takes longer than the products.
constexpr int64_t WEIGHTS = 3 << 16;
constexpr int64_t LEAST   = 2*MANY;

// where what lies in the scratch of a head
struct attention_layout {
    int64_t n_chunks;
    int64_t n_all;    // queries, at most
    int64_t n_turns;
    int64_t n_turn;   // queries of a turn
    int64_t stride;   // between queries in the tables

    // offsets
    size_t weights; // [n_chunks][n_turn][CHUNK]
    size_t max;     // [n_turn][stride]
    size_t sum;     // the same
    size_t factor;  // the same
    size_t size;

    explicit attention_layout(const indexmem_rank_shape & sh) {
        n_chunks = sh.n_chunks();
        n_all    = sh.n_group*sh.n_queries;
        const int64_t n_fit = std::max(sh.n_threads*WEIGHTS/(n_chunks*CHUNK), LEAST);
        n_turns = (n_all + n_fit - 1)/n_fit;
        n_turn  = (n_all + n_turns - 1)/n_turns;
        n_turn  = n_turns > 1 ? GGML_PAD(n_turn, MANY) : n_turn;
        n_turns = (n_all + n_turn - 1)/n_turn;
        stride  = GGML_PAD(n_chunks, 16);

        const size_t table = n_turn*stride;
        weights = 0;
        max     = weights + n_chunks*n_turn*CHUNK;
        sum     = max     + table;
        factor  = sum     + table;
        size    = factor  + table;
    }
};

// the queries of a head in a turn
struct attention_turn {
    int32_t p0; // position of the first query of each head of the group
    int64_t n_each;
    int64_t q0;
    int64_t n;

    attention_turn(const attention_layout & lay, const indexmem_rank_shape & sh, const indexmem_rank_head & h, int64_t turn) {
        p0     = sh.query_first(h);
        n_each = h.pos_last + 1 - p0;
        q0     = turn*lay.n_turn;
        n      = std::clamp<int64_t>(sh.n_group*n_each - q0, 0, lay.n_turn);
    }

    int64_t group   (int64_t i) const { return (q0 + i)/n_each; }
    int32_t position(int64_t i) const { return p0 + (int32_t) ((q0 + i) % n_each); }
};

// logits of the queries of a turn, [n][CHUNK]
void multiply(const indexmem_rank_chunk & c, const attention_turn & turn, float * logits) {
    rank_products(c, turn.n, [&](int64_t i) { return c.shape.query(c.head, turn.group(i), turn.position(i)); }, logits);
}

// logits to e^(logit - max), zeros where the query does not see the entry and beyond n
void soften(const indexmem_rank_chunk & c, const int32_t * pos, int32_t p, bool all_seen, float * l, float & max_out, float & sum_out) {
    float scale = c.shape.scale;
    if (c.shape.softcap != 0.0f) {
        attend_cap(l, c.n, scale, c.shape.softcap);
        scale = 1.0f;
    }
    if (!all_seen) {
        for (int64_t i = 0; i < c.n; ++i) {
            l[i] = pos[i] > p ? -INFINITY : l[i];
        }
    }
    std::fill(l + c.n, l + CHUNK, -INFINITY);

    vec top = set1(-INFINITY);
    for (int64_t i = 0; i < CHUNK; i += WIDTH) {
        top = indexmem_simd::max(top, mul(load(l + i), set1(scale)));
    }
    max_out = max_of(top);
    if (max_out == -INFINITY) {
        std::fill(l, l + CHUNK, 0.0f);
        sum_out = 0.0f;
        return;
    }
    vec total = zero();
    for (int64_t i = 0; i < CHUNK; i += WIDTH) {
        const vec x = indexmem_simd::exp(mul_add(set1(-max_out), load(l + i), set1(scale)));
        store(l + i, x);
        total = add(total, x);
    }
    sum_out = indexmem_simd::sum(total);
}

// rank (+)= what a turn has left
void add_up(const indexmem_rank_chunk & c, const attention_layout & lay, const attention_turn & turn, bool first) {
    const float * weights = c.head.scratch + lay.weights + c.index()*lay.n_turn*CHUNK;
    const float * factor  = c.head.scratch + lay.factor  + c.index();

    float rank[CHUNK];
    std::copy(c.rank, c.rank + (first ? 0 : c.n), rank);
    std::fill(rank + (first ? 0 : c.n), rank + CHUNK, 0.0f);
    constexpr int N = 2*VECS; // vectors at once: with the widest ones a chunk is read from one end to the other
    static_assert(CHUNK % (N*WIDTH) == 0, "");
    for (int64_t i = 0; i < CHUNK; i += N*WIDTH) {
        vec acc[N];
        for (int j = 0; j < N; ++j) {
            acc[j] = load(rank + i + j*WIDTH);
        }
        for (int64_t q = 0; q < turn.n; ++q) {
            const vec f = set1(factor[q*lay.stride]);
            for (int j = 0; j < N; ++j) {
                acc[j] = mul_add(acc[j], f, load(weights + q*CHUNK + i + j*WIDTH));
            }
        }
        for (int j = 0; j < N; ++j) {
            store(rank + i + j*WIDTH, acc[j]);
        }
    }
    std::copy(rank, rank + c.n, c.rank);
}

// the factor of each chunk for a query
void merge(const attention_layout & lay, const attention_turn & turn, const indexmem_rank_shape & sh, const indexmem_rank_head & h, int64_t q) {
    const int64_t n      = h.n_chunks();
    const int64_t padded = GGML_PAD(n, WIDTH);

    float * max    = h.scratch + lay.max    + q*lay.stride;
    float * sum    = h.scratch + lay.sum    + q*lay.stride;
    float * factor = h.scratch + lay.factor + q*lay.stride;

    const float sink = h.sinks ? h.sinks[turn.group(q)] : -INFINITY;

    float most = sink;
    for (int64_t c = 0; c < n; ++c) {
        most = std::max(most, max[c]);
    }
    if (most == -INFINITY) {
        std::fill(factor, factor + n, 0.0f); // sees nothing
        return;
    }
    std::fill(max + n, max + padded, -INFINITY);
    std::fill(sum + n, sum + padded, 0.0f);
    vec total = zero();
    for (int64_t c = 0; c < padded; c += WIDTH) {
        const vec x = indexmem_simd::exp(add(load(max + c), set1(-most)));
        store(factor + c, x);
        total = mul_add(total, x, load(sum + c));
    }
    const float weight = 1.0f/((indexmem_simd::sum(total) + std::exp(sink - most))*(float) (sh.n_group*turn.n_each));
    for (int64_t c = 0; c < padded; c += WIDTH) {
        store(factor + c, mul(load(factor + c), set1(weight)));
    }
}

} // namespace

size_t indexmem_rank_attention_scratch(const indexmem_rank_shape & shape) {
    return shape.attended ? 0 : attention_layout(shape).size;
}

void indexmem_rank_attention(indexmem_ranking & ranking) {
    const auto & sh = ranking.shape();
    if (sh.attended) {
        ranking.each_chunk([](const indexmem_rank_chunk & c) { std::copy_n(c.head.attention + c.i0, c.n, c.rank); });
        return;
    }
    const attention_layout lay(sh);

    for (int64_t t = 0; t <= lay.n_turns; ++t) {
        ranking.each_chunk([&](const indexmem_rank_chunk & c) {
            if (t > 0) {
                add_up(c, lay, attention_turn(lay, sh, c.head, t - 1), t == 1);
            }
            const attention_turn turn(lay, sh, c.head, t);
            if (t == lay.n_turns || turn.n == 0) {
                return;
            }
            int32_t pos[CHUNK];
            c.positions(pos);
            const int32_t newest = *std::max_element(pos, pos + c.n);

            float * weights = c.head.scratch + lay.weights + c.index()*lay.n_turn*CHUNK;
            multiply(c, turn, weights);
            for (int64_t q = 0; q < turn.n; ++q) {
                const size_t  at = q*lay.stride + c.index();
                const int32_t p  = turn.position(q);
                soften(c, pos, p, newest <= p, weights + q*CHUNK, c.head.scratch[lay.max + at], c.head.scratch[lay.sum + at]);
            }
        });
        if (t == lay.n_turns) {
            break;
        }
        ranking.each_head([&](const indexmem_rank_head & h) {
            const attention_turn turn(lay, sh, h, t);
            for (int64_t q = 0; q < turn.n; ++q) {
                merge(lay, turn, sh, h, q);
            }
        });
    }
}
