#include "attention.h"
#include "attend-lanes.h"
#include "rank-keys.h"

#include <cfloat>
#include <cmath>

// Attention of many queries (snapkv): lanes are queries.
//
// The queries of a head are cut into sets of LANES, which take turns: as many sets at a time as leave their weights in the cache of
// a core. In a turn each chunk of keys is multiplied with all its sets, and leaves e^(logit - max) with max and sum of the chunk;
// from these come the maximum and the sum of all, hence a factor of each chunk for each query, with which the next turn begins by
// adding up what this one has left. Sets are added one after the other, so that it makes no difference which of them share a turn.

using namespace indexmem_cpu;
using namespace indexmem_simd;

namespace {

// Weights of a head in a turn, for each thread, unless they are of a single set: they are read again soon, and what has to come
// from further away takes longer than what a turn more costs.
constexpr int64_t WEIGHTS = 3 << 16;

// In the place of -inf, from which it could not be subtracted.
constexpr float LEAST = -FLT_MAX;

// where what lies in the scratch of a head
struct many_layout {
    int64_t wide;   // values of a key
    int64_t n_sets;
    int64_t n_turns;
    int64_t n_turn; // sets of a turn

    // offsets
    size_t columns; // [n_sets][wide][LANES] the queries times scale
    size_t weights; // [n_chunks][n_turn][CHUNK][LANES]
    size_t factor;  // [n_chunks][n_turn][LANES], the maxima until all are known
    size_t sum;     // the same
    size_t size;

    explicit many_layout(const indexmem_rank_shape & sh) {
        const int64_t n_chunks = sh.n_chunks();
        const int64_t n_fit    = std::max<int64_t>(sh.n_threads*WEIGHTS/(n_chunks*CHUNK*LANES), 1);

        wide    = rank_wide(sh);
        n_sets  = (sh.n_group*sh.n_queries + LANES - 1)/LANES;
        n_turns = (n_sets + n_fit - 1)/n_fit;
        n_turn  = (n_sets + n_turns - 1)/n_turns;

        columns = 0;
        weights = columns + n_sets*wide*LANES;
        factor  = weights + n_chunks*n_turn*CHUNK*LANES;
        sum     = factor  + n_chunks*n_turn*LANES;
        size    = sum     + n_chunks*n_turn*LANES;
    }

    int64_t first(int64_t turn) const { return turn*n_turn; }
    int64_t count(int64_t turn) const { return std::min(n_turn, n_sets - first(turn)); }
};

// the queries of a set the other way around, zeros in lanes that have none
void lay_out(const many_layout & lay, const indexmem_rank_shape & sh, const indexmem_rank_head & h, int64_t set) {
    const indexmem_rank_queries queries(sh, h);

    float * columns = h.scratch + lay.columns + set*lay.wide*LANES;
    std::fill(columns, columns + lay.wide*LANES, 0.0f);
    for (int64_t l = 0; l < LANES && set*LANES + l < queries.n; ++l) {
        const int64_t q = set*LANES + l;
        const float * x = sh.query(h, queries.group(q), queries.position(q));
        for (int64_t d = 0; d < sh.n_embd; ++d) {
            columns[d*LANES + l] = sh.scale*x[d];
        }
    }
}

// -inf where a query of the set does not see the entry
void hide(const indexmem_rank_chunk & c, const indexmem_rank_queries & queries, int64_t set, const int32_t * pos, float * logits) {
    int32_t upto[LANES];
    for (int64_t l = 0; l < LANES; ++l) {
        upto[l] = queries.position(set*LANES + l);
    }
    for (int64_t i = 0; i < c.n; ++i) {
        for (int64_t l = 0; l < LANES; ++l) {
            logits[i*LANES + l] = pos[i] > upto[l] ? -INFINITY : logits[i*LANES + l];
        }
    }
}

// n x LANES logits to e^(logit - max)
void soften(int64_t n, float * logits, float * max_out, float * sum_out) {
    vec top[LANE_VECS];
    for (int v = 0; v < LANE_VECS; ++v) {
        top[v] = set1(LEAST);
    }
    for (int64_t i = 0; i < n; ++i) {
        for (int v = 0; v < LANE_VECS; ++v) {
            top[v] = indexmem_simd::max(top[v], load(logits + i*LANES + v*WIDTH));
        }
    }
    vec less [LANE_VECS];
    vec total[LANE_VECS];
    for (int v = 0; v < LANE_VECS; ++v) {
        less [v] = mul(top[v], set1(-1.0f));
        total[v] = zero();
        store(max_out + v*WIDTH, top[v]);
    }
    for (int64_t i = 0; i < n; ++i) {
        for (int v = 0; v < LANE_VECS; ++v) {
            float   * l = logits + i*LANES + v*WIDTH;
            const vec x = indexmem_simd::exp(add(load(l), less[v]));
            store(l, x);
            total[v] = add(total[v], x);
        }
    }
    for (int v = 0; v < LANE_VECS; ++v) {
        store(sum_out + v*WIDTH, total[v]);
    }
}

// rank (+)= what a set has left
void add_up(const indexmem_rank_chunk & c, const float * weights, const float * factor, bool first) {
    vec f[LANE_VECS];
    for (int v = 0; v < LANE_VECS; ++v) {
        f[v] = load(factor + v*WIDTH);
    }
    float sums[CHUNK];
    for (int64_t i = 0; i < c.n; i += KEYS) {
        vec acc[KEYS];
        for (int j = 0; j < KEYS; ++j) {
            const float * w = weights + std::min(i + j, c.n - 1)*LANES;
            acc[j] = mul(f[0], load(w));
            for (int v = 1; v < LANE_VECS; ++v) {
                acc[j] = mul_add(acc[j], f[v], load(w + v*WIDTH));
            }
        }
        sums4(acc, sums + i);
    }
    for (int64_t i = 0; i < c.n; ++i) {
        c.rank[i] = first ? sums[i] : c.rank[i] + sums[i];
    }
}

// the factor of each chunk for the queries of a set, which is number i of its turn
void merge(const many_layout & lay, const indexmem_rank_shape & sh, const indexmem_rank_head & h, int64_t set, int64_t i) {
    const indexmem_rank_queries queries(sh, h);

    const int64_t stride = lay.n_turn*LANES; // between chunks
    const int64_t n      = h.n_chunks()*stride;

    float * factor = h.scratch + lay.factor + i*LANES;
    float * sum    = h.scratch + lay.sum    + i*LANES;

    for (int64_t l = 0; l < LANES; l += WIDTH) {
        float sink[WIDTH];
        for (int64_t j = 0; j < WIDTH; ++j) {
            const int64_t q = set*LANES + l + j;
            sink[j] = h.sinks && q < queries.n ? h.sinks[queries.group(q)] : -INFINITY;
        }
        vec most = indexmem_simd::max(set1(LEAST), load(sink));
        for (int64_t c = 0; c < n; c += stride) {
            most = indexmem_simd::max(most, load(factor + c + l));
        }
        const vec less  = mul(most, set1(-1.0f));
        vec       total = indexmem_simd::exp(add(load(sink), less));
        for (int64_t c = 0; c < n; c += stride) {
            const vec x = indexmem_simd::exp(add(load(factor + c + l), less));
            store(factor + c + l, x);
            total = mul_add(total, x, load(sum + c + l));
        }
        float weight[WIDTH];
        store(weight, total);
        for (int64_t j = 0; j < WIDTH; ++j) { // nothing of who sees nothing, and of lanes without a query
            weight[j] = set*LANES + l + j < queries.n && weight[j] > 0.0f ? 1.0f/(weight[j]*(float) queries.n) : 0.0f;
        }
        for (int64_t c = 0; c < n; c += stride) {
            store(factor + c + l, mul(load(factor + c + l), load(weight)));
        }
    }
}

} // namespace

size_t indexmem_cpu::rank_attention_many_scratch(const indexmem_rank_shape & shape) {
    return many_layout(shape).size;
}

void indexmem_cpu::rank_attention_many(indexmem_ranking & ranking, const indexmem_ranking::of_head & aside) {
    const auto & sh = ranking.shape();
    const many_layout lay(sh);

    ranking.each_head([&](const indexmem_rank_head & h) {
        for (int64_t set = 0; set < lay.n_sets; ++set) {
            lay_out(lay, sh, h, set);
        }
    });
    if (aside) {
        ranking.each_head_aside(aside);
    }
    for (int64_t t = 0; t <= lay.n_turns; ++t) {
        ranking.each_chunk([&](const indexmem_rank_chunk & c) {
            float * scratch = c.head.scratch;
            float * weights = scratch + lay.weights + c.index()*lay.n_turn*CHUNK*LANES;
            float * factor  = scratch + lay.factor  + c.index()*lay.n_turn*LANES;
            float * sum     = scratch + lay.sum     + c.index()*lay.n_turn*LANES;

            for (int64_t i = 0; t > 0 && i < lay.count(t - 1); ++i) {
                add_up(c, weights + i*CHUNK*LANES, factor + i*LANES, t == 1 && i == 0);
            }
            if (t == lay.n_turns) {
                return;
            }
            const indexmem_rank_queries queries(sh, c.head);

            int32_t pos[CHUNK];
            c.positions(pos);
            const bool all_seen = *std::max_element(pos, pos + c.n) <= queries.p0;

            const rank_keys keys(c);
            for (int64_t i = 0; i < lay.count(t); ++i) {
                const int64_t set     = lay.first(t) + i;
                const float * columns = scratch + lay.columns + set*lay.wide*LANES;
                float       * logits  = weights + i*CHUNK*LANES;
                attend_with(keys.type, [&](auto from) {
                    attend_dots_lanes<decltype(from)>(keys.rows, c.n, lay.wide, columns, logits, i == 0 ? keys.next : attend_ahead());
                });
                if (sh.softcap != 0.0f) {
                    attend_cap(logits, c.n*LANES, 1.0f, sh.softcap);
                }
                if (!all_seen) {
                    hide(c, queries, set, pos, logits);
                }
                soften(c.n, logits, factor + i*LANES, sum + i*LANES);
            }
        });
        if (t == lay.n_turns) {
            break;
        }
        ranking.each_head([&](const indexmem_rank_head & h) {
            for (int64_t i = 0; i < lay.count(t); ++i) {
                merge(lay, sh, h, lay.first(t) + i, i);
            }
        });
    }
}
