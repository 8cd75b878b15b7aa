// The ranks of every policy against plain ones in double precision, over awkward caches: shuffled slots, a tail, several
// sequences of which one evicts nothing, every type that devices read.

#include "test.h"

#include "graph.h"
#include "indexmem-ops.h"

#include <algorithm>
#include <cmath>
#include <random>

struct rank_case {
    int64_t n_embd, n_slots, n_head, n_group;
    int32_t n_used, n_fixed;
    float   softcap;
    std::vector<int32_t> n_evict; // of each sequence
};

static const rank_case rank_cases[] = {
    {  64, 256, 2, 3,  77,  70,  0.0f, { 1 } },
    {  32, 256, 3, 1, 150, 150,  5.0f, { 4, 0, 9 } }, // no tail; one of the sequences evicts nothing
    { 128, 256, 1, 2,  20,   0,  0.0f, { 2 } },       // fewer tokens than snapkv has queries, a tail only
    { 160, 256, 2, 1, 256, 129, 30.0f, { 8 } },       // a full cache
    {  96, 256, 1, 1,   1,   1,  0.0f, { 1 } },       // one entry
};

// one KV head of one sequence
struct plain_head {
    std::vector<std::vector<double>> k;                // [entry][n_embd]
    std::vector<std::vector<std::vector<double>>> q;   // [query head of the group][latest query, oldest first][n_embd]
    std::vector<int32_t> pos;
    int32_t pos_last;
    double  scale, softcap;
    int64_t head;

    static double dot(const std::vector<double> & a, const std::vector<double> & b) {
        double sum = 0.0;
        for (size_t d = 0; d < a.size(); ++d) {
            sum += a[d]*b[d];
        }
        return sum;
    }

    std::vector<double> attention() const {
        std::vector<double> mean(k.size(), 0.0);
        for (const auto & queries : q) {
            for (size_t j = 0; j < queries.size(); ++j) {
                const int32_t p = pos_last - (int32_t) (queries.size() - 1 - j);
                std::vector<double> prob(k.size(), 0.0);
                double sum = 0.0;
                for (size_t i = 0; i < k.size(); ++i) {
                    double logit = scale*dot(queries[j], k[i]);
                    logit = softcap > 0.0 ? softcap*std::tanh(logit/softcap) : logit;
                    prob[i] = pos[i] <= p ? std::exp(logit) : 0.0;
                    sum += prob[i];
                }
                for (size_t i = 0; i < k.size() && sum > 0.0; ++i) {
                    mean[i] += prob[i]/sum/(double) (q.size()*queries.size());
                }
            }
        }
        return mean;
    }

    std::vector<double> rank(const std::string & policy, int il, uint64_t seed) const {
        const size_t n = k.size();
        std::vector<double> res(n, 0.0);
        if (policy == "streaming") {
            res.assign(pos.begin(), pos.end());
        } else if (policy == "random") {
            for (size_t i = 0; i < n; ++i) {
                uint64_t x = seed + 0x9E3779B97F4A7C15ull*(1 + pos[i] + ((head + ((uint64_t) il << 12)) << 32));
                x = (x ^ x >> 30)*0xBF58476D1CE4E5B9ull;
                x = (x ^ x >> 27)*0x94D049BB133111EBull;
                res[i] = (double) ((x ^ x >> 31) >> 40)/16777216.0;
            }
        } else if (policy == "knorm") {
            std::transform(k.begin(), k.end(), res.begin(), [](const auto & x) { return -std::sqrt(dot(x, x)); });
        } else if (policy == "keydiff") {
            std::vector<double> sum(k[0].size(), 0.0);
            for (const auto & x : k) {
                const double norm = std::sqrt(dot(x, x));
                for (size_t d = 0; d < x.size() && norm > 0.0; ++d) {
                    sum[d] += x[d]/norm;
                }
            }
            for (size_t i = 0; i < n; ++i) {
                const double len = std::sqrt(dot(k[i], k[i])*dot(sum, sum));
                res[i] = len > 0.0 ? -dot(k[i], sum)/len : 0.0;
            }
        } else if (policy == "tova") {
            res = attention();
        } else if (policy == "snapkv") {
            const std::vector<double> mean = attention();
            for (size_t i = 0; i < n; ++i) {
                const auto place = [&](size_t e) { return std::count_if(pos.begin(), pos.end(), [&](int32_t p) { return p < pos[e]; }); };
                double sum = 0.0;
                int    count = 0;
                for (size_t e = 0; e < n; ++e) {
                    if (std::abs(place(e) - place(i)) <= 3) {
                        sum += mean[e];
                        ++count;
                    }
                }
                res[i] = sum/count;
            }
        }
        return res;
    }
};

static void run_rank(const rank_case & c, int policy, ggml_type type) {
    const indexmem_policy_info * info = indexmem_policy_get(policy);

    const int      il     = 3;
    const uint64_t seed   = 0xFEDCBA9876543210ull;
    const float    scale  = 1.0f/std::sqrt((float) c.n_embd);
    const int64_t  n_seq  = c.n_evict.size();
    const int64_t  n_ring = info->n_queries + (info->n_queries > 1 ? 5 : 0);
    const int32_t  n_past = 2*c.n_fixed + 1;
    const int32_t  pos_last = c.n_used > c.n_fixed ? n_past + (c.n_used - c.n_fixed) - 1 : n_past - 1;

    op_graph g;
    ggml_tensor * k   = g.input(type, c.n_embd, c.n_slots, c.n_head, n_seq);
    ggml_tensor * pos = g.input(GGML_TYPE_I32, c.n_slots, c.n_head, n_seq);
    ggml_tensor * ctl = g.input(GGML_TYPE_I32, INDEXMEM_CTL_SIZE, n_seq);
    ggml_tensor * q   = n_ring > 0 ? g.input(GGML_TYPE_F32, c.n_embd, n_ring, c.n_head*c.n_group, n_seq) : nullptr;
    ggml_tensor * res = ggml_indexmem_rank(g.ctx, k, pos, ctl, q, policy, il, seed, scale, c.softcap);
    g.alloc();

    std::mt19937 rng(policy*100 + type);
    std::normal_distribution<float> normal;

    std::vector<uint8_t> data_k(ggml_nbytes(k), 0xFF); // what is not in use is poisoned
    std::vector<int32_t> data_pos(ggml_nelements(pos), -9), data_ctl(ggml_nelements(ctl), 0);
    std::vector<float>   data_q(q ? ggml_nelements(q) : 0, NAN);
    std::vector<plain_head> heads;

    const size_t row_size = ggml_row_size(type, c.n_embd);
    const auto random_row = [&](float mean) {
        std::vector<float> row(c.n_embd);
        for (auto & x : row) {
            x = mean + normal(rng);
        }
        return row;
    };
    for (int64_t s = 0; s < n_seq; ++s) {
        int32_t * ctl_s = data_ctl.data() + s*INDEXMEM_CTL_SIZE;
        ctl_s[INDEXMEM_CTL_N_USED]   = c.n_used;
        ctl_s[INDEXMEM_CTL_N_EVICT]  = c.n_evict[s];
        ctl_s[INDEXMEM_CTL_N_FIXED]  = c.n_fixed;
        ctl_s[INDEXMEM_CTL_POS_TAIL] = n_past;
        ctl_s[INDEXMEM_CTL_POS_LAST] = pos_last;
        for (int64_t h = 0; h < c.n_head; ++h) {
            plain_head plain = { {}, {}, {}, pos_last, scale, c.softcap, h };
            for (int32_t p = 0; p < n_past; ++p) {
                plain.pos.push_back(p);
            }
            std::shuffle(plain.pos.begin(), plain.pos.end(), rng);
            plain.pos.resize(c.n_fixed);
            std::copy(plain.pos.begin(), plain.pos.end(), data_pos.begin() + (s*c.n_head + h)*c.n_slots);
            for (int32_t i = c.n_fixed; i < c.n_used; ++i) {
                plain.pos.push_back(n_past + i - c.n_fixed);
            }
            for (int64_t i = 0; i < c.n_used; ++i) {
                const auto packed = to_type(type, i == 5 ? std::vector<float>(c.n_embd, 0.0f) : random_row(0.3f), c.n_embd);
                std::copy(packed.begin(), packed.end(), data_k.begin() + ((s*c.n_head + h)*c.n_slots + i)*row_size);
                const auto row = from_type(type, packed, c.n_embd);
                plain.k.emplace_back(row.begin(), row.end());
            }
            for (int64_t j = 0; q && j < c.n_group; ++j) {
                plain.q.emplace_back();
                for (int32_t p = std::max(0, pos_last + 1 - info->n_queries); p <= pos_last; ++p) {
                    const auto row = random_row(0.0f);
                    std::copy(row.begin(), row.end(), data_q.begin() + (((s*c.n_head + h)*c.n_group + j)*n_ring + p % n_ring)*c.n_embd);
                    plain.q.back().emplace_back(row.begin(), row.end());
                }
            }
            heads.push_back(plain);
        }
    }
    g.set(k, data_k);
    g.set(pos, data_pos);
    g.set(ctl, data_ctl);
    if (q) {
        g.set(q, data_q);
    }
    g.compute({ res }, 2);

    const bool exact = strcmp(info->name, "streaming") == 0 || strcmp(info->name, "random") == 0;
    const auto found = g.get<float>(res);
    for (size_t row = 0; row < heads.size(); ++row) {
        if (c.n_evict[row/c.n_head] == 0) {
            continue;
        }
        const auto expected = heads[row].rank(info->name, il, seed);
        for (int32_t i = 0; i < c.n_used; ++i) {
            const double error = std::fabs(found[row*c.n_slots + i] - expected[i]);
            CHECK_MSG(error <= (exact ? 0.0 : 1e-4*std::fabs(expected[i]) + 1e-6), "%s of %s, row %zu, entry %d: %g, expected %g",
                    info->name, ggml_type_name(type), row, i, found[row*c.n_slots + i], expected[i]);
        }
    }
}

TEST(ranks_of_every_policy) {
    for (int policy = 0; indexmem_policy_get(policy); ++policy) {
        if (strcmp(indexmem_policy_get(policy)->name, "indexer") == 0) {
            continue; // ranks terms, not keys: test_indexer.cpp
        }
        for (ggml_type type : { GGML_TYPE_F32, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
            run_rank(rank_cases[0], policy, type);
        }
        for (const auto & c : rank_cases) {
            run_rank(c, policy, GGML_TYPE_F16);
        }
    }
}
