#pragma once

// Ranks of the policies, computed in some way and compared with plain versions in double. Slots and rows of queries that are not in use
// hold NaN.

#include "test.h"

#include "graph.h"
#include "indexmem-ops.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <random>
#include <string>

struct rank_case {
    int64_t n_embd, n_slots, n_head, n_group;
    std::vector<int32_t> n_used; // of each sequence; 0: nothing leaves it
    int32_t n_fixed;             // at most: slots whose positions stand in the table
    float   softcap;
    int     n_threads;
    bool    sinks = false;
};

inline const rank_case rank_cases[] = {
    {  64, 256, 3, 2, { 200 },      100,  0.0f, 2 }, // the usual
    { 128, 256, 1, 4, { 256, 97 },  256,  0.0f, 3 }, // a full cache; two sequences
    {  32, 256, 2, 1, { 40, 0, 1 }, 20,  30.0f, 2 }, // softcap; one sequence evicts nothing, one has one entry
    {  96, 512, 2, 3, { 321 },      0,   20.0f, 1 }, // nothing but the tail
    {  64, 256, 2, 3, { 130, 9 },   50,   0.0f, 2, true }, // sinks
    {  80, 512, 1, 7, { 500, 131 }, 400,  0.0f, 5 }, // heads that end with half a block; several threads to a head
    { 112, 256, 2, 1, { 129 },      128,  0.0f, 2, true },
    {  40, 256, 1, 3, { 255 },      200, 25.0f, 3 }, // heads without kernels of their own
    {  32, 1024, 9, 2, { 1000, 77 }, 900, 0.0f, 3 }, // many heads
    {  64, 256, 4, 3, { 9, 31 },    9,   15.0f, 2, true }, // fewer queries than are looked at, and the first of them may see nothing
    {  64, 256, 4, 1, { 7 },        7,    0.0f, 2 },
    { 128, 256, 1, 17, { 70 },      50,   0.0f, 3, true }, // many heads of a group: half of all lanes with one query each
    {  64, 256, 1, 5, { 3, 1, 2 },  3,    0.0f, 2 }, // fewer queries than lanes; some that see nothing
};

inline constexpr int32_t IL    = 5;
inline constexpr uint64_t SEED = 42;
inline constexpr float SCALE  = 0.3f;

// one KV head of one sequence
struct entries {
    std::vector<int32_t>            pos;
    std::vector<std::vector<float>> keys;
    std::vector<std::vector<std::vector<float>>> queries; // [group][position - p0]
    int32_t head, p0, pos_last;
    float   softcap;
    std::vector<float> sinks; // [group]

    size_t size() const { return pos.size(); }
};

inline double product(const std::vector<float> & a, const std::vector<float> & b) {
    return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
}

typedef std::vector<double> ranks;

inline ranks plain_full(const entries & e) {
    return ranks(e.size(), 0.0);
}

// position 2^30 is the first normal number, and each position the float after that of the one before
inline ranks plain_streaming(const entries & e) {
    const double zero = std::ldexp(1.0, 30), first = std::ldexp(1.0, -126), steps = std::ldexp(1.0, 23);
    ranks res;
    for (int32_t p : e.pos) {
        const double distance = p >= zero ? p - zero : zero - 1 - p;
        const double exponent = std::floor(distance/steps);
        const double size     = std::ldexp(first*(1.0 + distance/steps - exponent), (int) exponent);
        res.push_back(p >= zero ? size : -size);
    }
    return res;
}

inline ranks plain_random(const entries & e) {
    ranks res;
    for (int32_t p : e.pos) {
        uint64_t x = SEED + 0x9E3779B97F4A7C15u*(1 + (uint64_t) p + (((uint64_t) IL*4096 + e.head) << 32));
        x = (x ^ x >> 30)*0xBF58476D1CE4E5B9u;
        x = (x ^ x >> 27)*0x94D049BB133111EBu;
        res.push_back((double) ((x ^ x >> 31) >> 40)*std::pow(2.0, -24));
    }
    return res;
}

inline ranks plain_knorm(const entries & e) {
    ranks res;
    for (const auto & k : e.keys) {
        res.push_back(-std::sqrt(product(k, k)));
    }
    return res;
}

inline ranks plain_keydiff(const entries & e) {
    const size_t n_embd = e.keys[0].size();
    std::vector<double> mean(n_embd);
    for (const auto & k : e.keys) {
        const double norm = std::sqrt(product(k, k));
        for (size_t d = 0; d < n_embd && norm > 0.0; ++d) {
            mean[d] += k[d]/norm/(double) e.size();
        }
    }
    ranks res;
    for (const auto & k : e.keys) {
        const double length = std::sqrt(product(k, k)*std::inner_product(mean.begin(), mean.end(), mean.begin(), 0.0));
        res.push_back(length > 0.0 ? -std::inner_product(k.begin(), k.end(), mean.begin(), 0.0)/length : 0.0);
    }
    return res;
}

// mean over the last n queries and the group
inline ranks plain_attention(const entries & e, int32_t n) {
    ranks res(e.size());
    const int32_t p0 = std::max(0, e.pos_last + 1 - n);
    const double weight = 1.0/(double) (e.queries.size()*(e.pos_last + 1 - p0));
    for (size_t ig = 0; ig < e.queries.size(); ++ig) {
        const auto & of_head = e.queries[ig];
        for (int32_t p = p0; p <= e.pos_last; ++p) {
            ranks prob(e.size());
            for (size_t i = 0; i < e.size(); ++i) {
                double x = SCALE*product(of_head[p - e.p0], e.keys[i]);
                x = e.softcap > 0.0f ? e.softcap*std::tanh(x/e.softcap) : x;
                prob[i] = e.pos[i] <= p ? std::exp(x) : 0.0;
            }
            const double sum = std::accumulate(prob.begin(), prob.end(), e.sinks.empty() ? 0.0 : std::exp(e.sinks[ig]));
            for (size_t i = 0; i < e.size() && sum > 0.0; ++i) {
                res[i] += prob[i]/sum*weight;
            }
        }
    }
    return res;
}

inline ranks plain_tova(const entries & e) {
    return plain_attention(e, 1);
}

inline ranks plain_snapkv(const entries & e) {
    const ranks mean = plain_attention(e, 32);
    std::vector<size_t> order(e.size());
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return e.pos[a] < e.pos[b]; });

    ranks res(e.size());
    for (size_t place = 0; place < order.size(); ++place) {
        double sum = 0.0;
        int    n   = 0;
        for (size_t other = place - std::min<size_t>(place, 3); other < std::min(place + 4, order.size()); ++other) {
            sum += mean[order[other]];
            ++n;
        }
        res[order[place]] = sum/n;
    }
    return res;
}

// the queries are those that the op is given: where they would be later is not its affair
inline ranks plain_expected(const entries & e) {
    const int32_t p0 = std::max(0, e.pos_last + 1 - 32);
    const int32_t n  = e.pos_last + 1 - p0;
    ranks res(e.size());
    for (const auto & of_head : e.queries) {
        for (int32_t p = p0; p <= e.pos_last; ++p) {
            for (size_t i = 0; i < e.size(); ++i) {
                res[i] += SCALE*product(of_head[p - e.p0], e.keys[i])/(n*(double) e.queries.size());
            }
        }
    }
    return res;
}

inline const struct {
    const char * name;
    ranks (*plain)(const entries &);
    double tolerance; // relative
    double least;     // to values of at least so much
} policies[] = {
    { "full",      plain_full,      0.0,  1e-3 },
    { "streaming", plain_streaming, 0.0,  1e-3 },
    { "random",    plain_random,    0.0,  1e-3 },
    { "knorm",     plain_knorm,     1e-6, 1e-3 },
    { "keydiff",   plain_keydiff,   1e-4, 1e-2 }, // sums of terms that cancel each other
    { "tova",      plain_tova,      1e-4, 1e-6 },
    { "snapkv",    plain_snapkv,    1e-4, 1e-6 },
    { "expected",  plain_expected,  1e-4, 1e-2 }, // sums of terms that cancel each other
};

struct rank_inputs {
    ggml_tensor * k, * pos, * ctl, * q, * sinks; // as ggml_indexmem_rank() takes them
    int   policy;
    float softcap;
};

// how ranks are computed
struct rank_way {
    std::function<ggml_tensor *(ggml_context * ctx, const rank_inputs & in)> build;
    std::function<void(const std::vector<int32_t> & ctl)> set_input;
    double tolerance = 1.0; // so many times that of the policy
};

inline rank_way rank_by_our_op() {
    return { [](ggml_context * ctx, const rank_inputs & in) {
        return ggml_indexmem_rank(ctx, in.k, in.pos, in.ctl, in.q, in.sinks, in.policy, IL, SEED, SCALE, in.softcap);
    }, [](const std::vector<int32_t> &) {} };
}

// nothing if the device of the tests lacks the last op
inline void run_rank(const rank_case & c, ggml_type type, int i_policy, std::vector<float> * out = nullptr,
        const rank_way & way = rank_by_our_op()) {
    const int64_t n_seq  = c.n_used.size();
    const int     policy = indexmem_policy_find(policies[i_policy].name);
    const auto  * info   = indexmem_policy_get(policy);
    const int64_t n_ring = info->n_queries > 1 ? 48 : 1;

    op_graph g;
    ggml_tensor * k   = g.input(type, c.n_embd, c.n_slots, c.n_head, n_seq);
    ggml_tensor * pos = g.input(GGML_TYPE_I32, c.n_slots, c.n_head, n_seq);
    ggml_tensor * ctl = g.input(GGML_TYPE_I32, INDEXMEM_CTL_SIZE, n_seq);
    ggml_tensor * q   = info->n_queries > 0 ? g.input(GGML_TYPE_F32, c.n_embd, n_ring, c.n_head*c.n_group, n_seq) : nullptr;
    ggml_tensor * sinks = q && c.sinks ? g.input(GGML_TYPE_F32, c.n_head*c.n_group) : nullptr;
    ggml_tensor * res = way.build(g.ctx, { k, pos, ctl, q, sinks, policy, c.softcap });
    if (!g.has(res)) {
        return;
    }
    g.alloc();

    std::mt19937 rng(23);
    std::normal_distribution<float> normal;

    // slots and ring rows that are not in use are poisoned
    std::vector<uint8_t> data_k(ggml_nbytes(k), 0xFF);
    std::vector<int32_t> data_pos(ggml_nelements(pos), -9);
    std::vector<int32_t> data_ctl(ggml_nelements(ctl), 0);
    std::vector<float>   data_q(q ? ggml_nelements(q) : 0, NAN);
    std::vector<entries> rows;
    std::vector<float>   data_sinks(c.n_head*c.n_group);
    for (size_t i = 0; i < data_sinks.size(); ++i) {
        data_sinks[i] = -1.0f + 2.5f*(float) i; // small beside the logits, and large
    }
    const size_t row_size = ggml_row_size(type, c.n_embd);
    for (int64_t s = 0; s < n_seq; ++s) {
        const int32_t n_used  = c.n_used[s];
        const int32_t n_fixed = std::min(n_used, c.n_fixed);
        const int32_t n_past  = 2*n_fixed;
        int32_t * ctl_s = data_ctl.data() + s*INDEXMEM_CTL_SIZE;
        ctl_s[INDEXMEM_CTL_N_USED]   = n_used;
        ctl_s[INDEXMEM_CTL_N_EVICT]  = n_used > 0;
        ctl_s[INDEXMEM_CTL_N_FIXED]  = n_fixed;
        ctl_s[INDEXMEM_CTL_POS_TAIL] = n_past;
        ctl_s[INDEXMEM_CTL_POS_LAST] = n_past + n_used - n_fixed - 1;

        for (int64_t h = 0; h < c.n_head; ++h) {
            entries e;
            e.head     = (int32_t) h;
            e.pos_last = ctl_s[INDEXMEM_CTL_POS_LAST];
            e.p0       = std::max(0, e.pos_last + 1 - 32);
            e.softcap  = c.softcap;
            e.pos.resize(n_past);
            std::iota(e.pos.begin(), e.pos.end(), 0);
            std::shuffle(e.pos.begin(), e.pos.end(), rng);
            e.pos.resize(n_fixed);
            std::copy(e.pos.begin(), e.pos.end(), data_pos.begin() + (s*c.n_head + h)*c.n_slots);
            for (int32_t i = n_fixed; i < n_used; ++i) {
                e.pos.push_back(n_past + i - n_fixed);
            }
            for (int32_t i = 0; i < n_used; ++i) {
                std::vector<float> key(c.n_embd);
                for (auto & x : key) {
                    x = i == 3 ? 0.0f : normal(rng);
                }
                const auto packed = to_type(type, key, c.n_embd);
                std::copy(packed.begin(), packed.end(), data_k.begin() + ((s*c.n_head + h)*c.n_slots + i)*row_size);
                e.keys.push_back(from_type(type, packed, c.n_embd));
            }
            for (int64_t ig = 0; ig < c.n_group; ++ig) {
                e.queries.emplace_back();
                for (int32_t p = e.p0; p <= e.pos_last; ++p) {
                    std::vector<float> query(c.n_embd);
                    for (auto & x : query) {
                        x = normal(rng);
                    }
                    if (q && p > e.pos_last - info->n_queries) {
                        std::copy(query.begin(), query.end(),
                                data_q.begin() + (((s*c.n_head + h)*c.n_group + ig)*n_ring + p % n_ring)*c.n_embd);
                    }
                    e.queries.back().push_back(query);
                }
            }
            if (sinks) {
                e.sinks.assign(data_sinks.begin() + h*c.n_group, data_sinks.begin() + (h + 1)*c.n_group);
            }
            rows.push_back(e);
        }
    }
    g.set(k,   data_k);
    g.set(pos, data_pos);
    g.set(ctl, data_ctl);
    if (q) {
        g.set(q, data_q);
    }
    if (sinks) {
        g.set(sinks, data_sinks);
    }
    way.set_input(data_ctl);
    g.compute({ res }, c.n_threads);

    const auto found = g.get<float>(res);
    if (out) {
        *out = found;
        for (size_t row = 0; row < rows.size(); ++row) { // what lies beyond the entries is undefined
            std::fill(out->begin() + row*c.n_slots + rows[row].size(), out->begin() + (row + 1)*c.n_slots, 0.0f);
        }
    }
    for (size_t row = 0; row < rows.size(); ++row) {
        if (rows[row].size() == 0) {
            continue;
        }
        const ranks expected = policies[i_policy].plain(rows[row]);
        for (size_t i = 0; i < expected.size(); ++i) {
            const float x = found[row*c.n_slots + i];
            CHECK_MSG(std::fabs(x - expected[i]) <= way.tolerance*policies[i_policy].tolerance*std::max(policies[i_policy].least, std::fabs(expected[i])),
                    "%s, %s, row %zu, entry %zu: %g, expected %g", policies[i_policy].name, ggml_type_name(type), row, i, x, expected[i]);
        }
    }
}

