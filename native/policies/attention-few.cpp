#include "attention.h"
#include "rank-keys.h"

#include <cmath>

// Attention of few queries (tova): lanes are entries.
//
// Each chunk of keys is multiplied with all queries, by the kernels of attention, and leaves e^(logit - max) with max and sum of
// the chunk; from these come the maximum and the sum of all, hence a factor of each chunk for each query.

using namespace indexmem_cpu;
using namespace indexmem_simd;

namespace {

// where what lies in the scratch of a head
struct few_layout {
    int64_t n_chunks;
    int64_t n_all;  // queries, at most
    int64_t stride; // between queries in the tables

    // offsets
    size_t weights; // [n_chunks][n_all][CHUNK]
    size_t max;     // [n_all][stride]
    size_t sum;     // the same
    size_t factor;  // the same
    size_t size;

    explicit few_layout(const indexmem_rank_shape & sh) {
        n_chunks = sh.n_chunks();
        n_all    = sh.n_group*sh.n_queries;
        stride   = GGML_PAD(n_chunks, 16);

        weights = 0;
        max     = weights + n_chunks*n_all*CHUNK;
        sum     = max     + n_all*stride;
        factor  = sum     + n_all*stride;
        size    = factor  + n_all*stride;
    }
};

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

// the rank from what all queries have left
void add_up(const indexmem_rank_chunk & c, const few_layout & lay, int64_t n_queries) {
    const float * weights = c.head.scratch + lay.weights + c.index()*lay.n_all*CHUNK;
    const float * factor  = c.head.scratch + lay.factor  + c.index();

    float rank[CHUNK] = {};
    constexpr int N = 8; // vectors at once: with the widest ones a chunk is read from one end to the other
    static_assert(CHUNK % (N*WIDTH) == 0, "");
    for (int64_t i = 0; i < CHUNK; i += N*WIDTH) {
        vec acc[N];
        for (int j = 0; j < N; ++j) {
            acc[j] = zero();
        }
        for (int64_t q = 0; q < n_queries; ++q) {
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

// the factor of each chunk for query q
void merge(const few_layout & lay, const indexmem_rank_queries & queries, const indexmem_rank_head & h, int64_t q) {
    const int64_t n      = h.n_chunks();
    const int64_t padded = GGML_PAD(n, WIDTH);

    float * max    = h.scratch + lay.max    + q*lay.stride;
    float * sum    = h.scratch + lay.sum    + q*lay.stride;
    float * factor = h.scratch + lay.factor + q*lay.stride;

    const float sink = h.sinks ? h.sinks[queries.group(q)] : -INFINITY;

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
    const float weight = 1.0f/((indexmem_simd::sum(total) + std::exp(sink - most))*(float) queries.n);
    for (int64_t c = 0; c < padded; c += WIDTH) {
        store(factor + c, mul(load(factor + c), set1(weight)));
    }
}

} // namespace

size_t indexmem_cpu::rank_attention_few_scratch(const indexmem_rank_shape & shape) {
    return few_layout(shape).size;
}

void indexmem_cpu::rank_attention_few(indexmem_ranking & ranking, const indexmem_ranking::of_head & aside) {
    const auto & sh = ranking.shape();
    const few_layout lay(sh);

    if (aside) {
        ranking.each_head_aside(aside);
    }
    ranking.each_chunk([&](const indexmem_rank_chunk & c) {
        const indexmem_rank_queries queries(sh, c.head);

        int32_t pos[CHUNK];
        c.positions(pos);
        const int32_t newest = *std::max_element(pos, pos + c.n);

        float * weights = c.head.scratch + lay.weights + c.index()*lay.n_all*CHUNK;
        rank_products(c, queries.n, [&](int64_t q) { return sh.query(c.head, queries.group(q), queries.position(q)); }, weights);
        for (int64_t q = 0; q < queries.n; ++q) {
            const size_t  at = q*lay.stride + c.index();
            const int32_t p  = queries.position(q);
            soften(c, pos, p, newest <= p, weights + q*CHUNK, c.head.scratch[lay.max + at], c.head.scratch[lay.sum + at]);
        }
    });
    ranking.each_head([&](const indexmem_rank_head & h) {
        const indexmem_rank_queries queries(sh, h);
        for (int64_t q = 0; q < queries.n; ++q) {
            merge(lay, queries, h, q);
        }
    });
    ranking.each_chunk([&](const indexmem_rank_chunk & c) { add_up(c, lay, indexmem_rank_queries(sh, c.head).n); });
}
