// The ops between an indexer and the selection, against their reference: ranks from terms, and pairwise scores.

#include "test.h"

#include "graph.h"
#include "indexmem-ops.h"
#include "reference.h"

#include <cmath>
#include <random>

struct ctl_of_seq {
    int32_t n_used, n_evict, pos_last;
};

static std::vector<int32_t> make_ctl(const std::vector<ctl_of_seq> & seqs) {
    std::vector<int32_t> data(INDEXMEM_CTL_SIZE*seqs.size(), 0);
    for (size_t s = 0; s < seqs.size(); ++s) {
        int32_t * c = data.data() + s*INDEXMEM_CTL_SIZE;
        c[INDEXMEM_CTL_N_USED]   = seqs[s].n_used;
        c[INDEXMEM_CTL_N_EVICT]  = seqs[s].n_evict;
        c[INDEXMEM_CTL_N_FIXED]  = seqs[s].n_used;
        c[INDEXMEM_CTL_POS_LAST] = seqs[s].pos_last;
    }
    return data;
}

struct pairwise_case {
    int64_t n_embd, n_head, n_slots, n_queries, n_ring;
    std::vector<ctl_of_seq> seqs;
    int n_threads;
};

static const pairwise_case pairwise_cases[] = {
    { 16, 4, 256, 128, 160, { { 200, 8, 1000 } },                    2 }, // the usual
    {  1, 1, 256,   1,   1, { {   1, 1, 0 } },                       1 }, // one of everything
    {  5, 3, 256,   7,   9, { {  65, 1, 30 } },                      3 }, // one more than a block, odd sizes
    { 16, 4, 256, 128, 160, { {  64, 4, 49 } },                      2 }, // fewer tokens than queries
    { 16, 4, 256,   1,   4, { { 100, 1, 80 } },                      2 }, // one query: even the maximum is often negative
    { 16, 4, 512,  32,  64, { { 400, 8, 63 }, { 3, 1, 2 } },         2 }, // two sequences, ring full and almost empty
    { 16, 4, 256, 128, 160, { {  90, 0, 300 }, { 129, 2, 159 } },    5 }, // one of them evicts nothing
};

static void run_pairwise(const pairwise_case & c, indexmem_reduce reduce) {
    const int64_t n_seq = c.seqs.size();
    const int64_t n_row = c.n_head*(c.n_embd + 1);

    op_graph g;
    ggml_tensor * keys    = g.input(GGML_TYPE_F32, c.n_embd, c.n_slots, 1, n_seq);
    ggml_tensor * queries = g.input(GGML_TYPE_F32, n_row, c.n_ring, 1, n_seq);
    ggml_tensor * ctl     = g.input(GGML_TYPE_I32, INDEXMEM_CTL_SIZE, n_seq);
    ggml_tensor * res     = ggml_indexmem_pairwise(g.ctx, keys, queries, ctl, (int) c.n_head, (int) c.n_queries, reduce);
    g.alloc();

    std::mt19937 rng(7);
    std::normal_distribution<float> normal;

    // slots and ring rows that are not in use are poisoned
    std::vector<float> data_k(ggml_nelements(keys), NAN);
    std::vector<float> data_q(ggml_nelements(queries), NAN);
    for (int64_t s = 0; s < n_seq; ++s) {
        for (int64_t i = 0; i < c.seqs[s].n_used*c.n_embd; ++i) {
            data_k[s*c.n_slots*c.n_embd + i] = normal(rng);
        }
        for (int64_t p = std::max<int64_t>(0, c.seqs[s].pos_last + 1 - c.n_queries); p <= c.seqs[s].pos_last; ++p) {
            for (int64_t i = 0; i < n_row; ++i) {
                data_q[(s*c.n_ring + p % c.n_ring)*n_row + i] = normal(rng);
            }
        }
    }
    g.set(keys, data_k);
    g.set(queries, data_q);
    g.set(ctl, make_ctl(c.seqs));
    g.compute({ res }, c.n_threads);

    const auto out = g.get<float>(res);
    for (int64_t s = 0; s < n_seq; ++s) {
        if (c.seqs[s].n_evict == 0) {
            continue;
        }
        std::vector<std::vector<float>> k, q;
        for (int64_t i = 0; i < c.seqs[s].n_used; ++i) {
            const float * row = data_k.data() + (s*c.n_slots + i)*c.n_embd;
            k.emplace_back(row, row + c.n_embd);
        }
        for (int64_t p = std::max<int64_t>(0, c.seqs[s].pos_last + 1 - c.n_queries); p <= c.seqs[s].pos_last; ++p) {
            const float * row = data_q.data() + (s*c.n_ring + p % c.n_ring)*n_row;
            q.emplace_back(row, row + n_row);
        }
        const auto expected = indexmem_reference_pairwise(k, q, c.n_head, reduce == INDEXMEM_REDUCE_MAX);
        for (size_t i = 0; i < expected.size(); ++i) {
            const double error = std::fabs(out[s*c.n_slots + i] - expected[i]);
            CHECK_MSG(error <= 1e-4*(1.0 + std::fabs(expected[i])), "slot %zu: %g, expected %g", i, out[s*c.n_slots + i], expected[i]);
        }
    }
}

TEST(pairwise_scores) {
    for (const auto & c : pairwise_cases) {
        run_pairwise(c, INDEXMEM_REDUCE_MEAN);
        run_pairwise(c, INDEXMEM_REDUCE_MAX);
    }
}

// a second opinion: ggml's op for the same kind of score
TEST(pairwise_scores_agree_with_ggml) {
    const int64_t n_embd = 16, n_head = 4, n_slots = 256, n_queries = 24;

    op_graph g;
    ggml_tensor * keys    = g.input(GGML_TYPE_F32, n_embd, n_slots, 1, 1);
    ggml_tensor * queries = g.input(GGML_TYPE_F32, n_head*(n_embd + 1), n_queries, 1, 1);
    ggml_tensor * ctl     = g.input(GGML_TYPE_I32, INDEXMEM_CTL_SIZE, 1);
    ggml_tensor * mask    = g.input(GGML_TYPE_F16, n_slots, n_queries, 1, 1);

    const size_t nb = queries->nb[1];
    ggml_tensor * q = ggml_view_4d(g.ctx, queries, n_embd, n_head, n_queries, 1, n_embd*sizeof(float), nb, nb*n_queries, 0);
    ggml_tensor * w = ggml_view_4d(g.ctx, queries, n_head, n_queries, 1, 1, nb, nb*n_queries, nb*n_queries, n_head*n_embd*sizeof(float));
    ggml_tensor * k = ggml_view_4d(g.ctx, keys, n_embd, 1, n_slots, 1, keys->nb[1], keys->nb[1], keys->nb[2], 0);

    ggml_tensor * ours   = ggml_indexmem_pairwise(g.ctx, keys, queries, ctl, n_head, n_queries, INDEXMEM_REDUCE_MEAN);
    ggml_tensor * theirs = ggml_lightning_indexer(g.ctx, q, k, w, mask);
    if (!g.has(theirs)) {
        printf("no second opinion: the device has ggml's op for other shapes only\n");
        return;
    }
    g.alloc();

    std::mt19937 rng(3);
    std::normal_distribution<float> normal;
    auto random = [&](ggml_tensor * t) {
        std::vector<float> data(ggml_nelements(t));
        for (auto & x : data) {
            x = normal(rng);
        }
        g.set(t, data);
    };
    random(keys);
    random(queries);
    g.set(mask, std::vector<ggml_fp16_t>(ggml_nelements(mask), ggml_fp32_to_fp16(0.0f)));
    g.set(ctl, make_ctl({ { (int32_t) n_slots, 1, (int32_t) n_queries - 1 } }));
    g.compute({ ours, theirs }, 2);

    const auto a = g.get<float>(ours);
    const auto b = g.get<float>(theirs); // [n_slots, n_queries]
    for (int64_t i = 0; i < n_slots; ++i) {
        double mean = 0.0;
        for (int64_t s = 0; s < n_queries; ++s) {
            mean += b[s*n_slots + i]/(double) n_queries;
        }
        CHECK_MSG(std::fabs(a[i] - mean) <= 1e-4*(1.0 + std::fabs(mean)), "slot %d: %g, ggml says %g", (int) i, a[i], mean);
    }
}

static void run_terms(int64_t n_terms, int64_t n_head_terms, int n_threads) {
    const int64_t n_slots = 256, n_head = 3, n_used = 100;
    const int32_t pos_last = 70000;
    const float   slope = 1e-3f, age = 96.0f;

    op_graph g;
    ggml_tensor * all   = g.input(GGML_TYPE_F32, n_terms, n_slots + 8, n_head_terms, 2); // a view of more rows, as in the cache
    ggml_tensor * terms = ggml_view_4d(g.ctx, all, n_terms, n_slots, n_head_terms, 2, all->nb[1], all->nb[2], all->nb[3], 0);
    ggml_tensor * pos   = g.input(GGML_TYPE_I32, n_slots, n_head, 2);
    ggml_tensor * ctl   = g.input(GGML_TYPE_I32, INDEXMEM_CTL_SIZE, 2);
    ggml_tensor * rank  = ggml_indexmem_rank_terms(g.ctx, terms, pos, ctl, slope, age);
    g.alloc();

    std::mt19937 rng(11);
    std::normal_distribution<float> normal;
    std::vector<float>   data(ggml_nelements(all), NAN);
    std::vector<int32_t> data_pos(ggml_nelements(pos), -7);
    auto term = [&](int64_t s, int64_t h, int64_t i) { return data.data() + ((s*n_head_terms + h % n_head_terms)*(n_slots + 8) + i)*n_terms; };
    for (int64_t s = 0; s < 2; ++s) {
        for (int64_t h = 0; h < n_head; ++h) {
            for (int64_t i = 0; i < n_used; ++i) {
                data_pos[(s*n_head + h)*n_slots + i] = (int32_t) (rng() % pos_last);
                for (int64_t t = 0; t < n_terms; ++t) {
                    term(s, h, i)[t] = t == 0 ? normal(rng) : -std::fabs(normal(rng));
                }
            }
        }
    }
    g.set(all, data);
    g.set(pos, data_pos);
    g.set(ctl, make_ctl({ { (int32_t) n_used, 3, pos_last }, { (int32_t) n_used, 1, pos_last - 5 } }));
    g.compute({ rank }, n_threads);

    const auto out = g.get<float>(rank);
    for (int64_t s = 0; s < 2; ++s) {
        for (int64_t h = 0; h < n_head; ++h) {
            for (int64_t i = 0; i < n_used; ++i) {
                const std::vector<float> of_entry(term(s, h, i), term(s, h, i) + n_terms);
                const int64_t at       = (s*n_head + h)*n_slots + i;
                const float   expected = indexmem_reference_rank_terms(of_entry, data_pos[at], pos_last - (s ? 5 : 0), slope, age);
                CHECK_MSG(std::fabs(out[at] - expected) <= 1e-5f*(1.0f + std::fabs(expected)), "%g, expected %g", out[at], expected);
            }
        }
    }
}

TEST(ranks_from_terms) {
    for (int n_threads = 1; n_threads <= 3; ++n_threads) {
        run_terms(1, 3, n_threads);
        run_terms(2, 3, n_threads);
        run_terms(1, 1, n_threads);
    }
}

struct retention_case {
    int64_t n_embd, n_mid, n_head, n_tokens; // n_mid 0: linear
    bool    decay;
    ggml_type type; // of the first matrix
};

static void run_retention(const retention_case & c, int n_threads, std::vector<float> * out = nullptr) {
    op_graph g;
    const int64_t n_trunk = c.n_mid ? c.n_mid : c.n_embd;
    ggml_tensor * hidden = g.input(GGML_TYPE_F32, c.n_embd, c.n_tokens);

    ggml_indexmem_retention_weights w = {};
    w.in_norm      = g.input(GGML_TYPE_F32, c.n_embd);
    w.in_norm_bias = g.input(GGML_TYPE_F32, c.n_embd);
    if (c.n_mid) {
        w.input         = g.input(c.type, c.n_embd, c.n_mid);
        w.mid_norm      = g.input(GGML_TYPE_F32, c.n_mid);
        w.mid_norm_bias = g.input(GGML_TYPE_F32, c.n_mid);
    }
    w.magnitude = g.input(GGML_TYPE_F32, n_trunk, c.n_head);
    if (c.decay) {
        w.retention      = g.input(GGML_TYPE_F32, n_trunk, c.n_head);
        w.retention_bias = g.input(GGML_TYPE_F32, c.n_head);
    }
    ggml_tensor * res = ggml_indexmem_retention(g.ctx, hidden, &w, 1e-5f);
    g.alloc();
    if (op_elsewhere || !g.has(res)) {
        return; // the CPU's alone
    }

    std::mt19937 rng(3);
    std::normal_distribution<float> normal;
    const auto fill = [&](ggml_tensor * t) {
        std::vector<float> x(t ? ggml_nelements(t) : 0);
        for (auto & y : x) {
            y = normal(rng);
        }
        if (t) {
            const auto data = to_type(t->type, x, t->ne[0]);
            g.set(t, data);
            x = from_type(t->type, data, (int64_t) x.size());
        }
        return x;
    };
    const auto x = fill(hidden), wi = fill(w.in_norm), bi = fill(w.in_norm_bias), a = fill(w.input), wm = fill(w.mid_norm);
    const auto bm = fill(w.mid_norm_bias), m = fill(w.magnitude), p = fill(w.retention), bp = fill(w.retention_bias);

    g.compute({ res }, n_threads);
    const auto found = g.get<float>(res);
    if (out) {
        *out = found;
    }

    const auto norm = [](std::vector<double> y, const std::vector<float> & weight, const std::vector<float> & bias) {
        double mean = 0.0, var = 0.0;
        for (double v : y) {
            mean += v/y.size();
        }
        for (double v : y) {
            var += (v - mean)*(v - mean)/y.size();
        }
        for (size_t i = 0; i < y.size(); ++i) {
            y[i] = (y[i] - mean)/std::sqrt(var + 1e-5)*weight[i] + bias[i];
        }
        return y;
    };
    const auto dot = [](const std::vector<float> & matrix, int64_t row, const std::vector<double> & y) {
        double sum = 0.0;
        for (size_t i = 0; i < y.size(); ++i) {
            sum += matrix[row*y.size() + i]*y[i];
        }
        return sum;
    };
    for (int64_t t = 0; t < c.n_tokens; ++t) {
        auto y = norm(std::vector<double>(x.begin() + t*c.n_embd, x.begin() + (t + 1)*c.n_embd), wi, bi);
        if (c.n_mid) {
            const ggml_type seen = c.type; // what the product takes: for these types, the same
            const auto rounded = from_type(seen, to_type(seen, std::vector<float>(y.begin(), y.end()), c.n_embd), c.n_embd);
            std::vector<double> z;
            for (int64_t i = 0; i < c.n_mid; ++i) {
                z.push_back(dot(a, i, std::vector<double>(rounded.begin(), rounded.end())));
            }
            y = norm(z, wm, bm);
            for (double & v : y) {
                v = 0.5*v*(1.0 + std::erf(v/std::sqrt(2.0)));
            }
        }
        for (int64_t h = 0; h < c.n_head; ++h) {
            const float * f = found.data() + (t*c.n_head + h)*(c.decay ? 2 : 1);
            CHECK_MSG(std::abs(f[0] - dot(m, h, y)) < 2e-3, "magnitude %g, expected %g", f[0], dot(m, h, y));
            if (c.decay) {
                const double l = -std::log1p(std::exp(dot(p, h, y) + bp[h]));
                CHECK_MSG(std::abs(f[1] - l) < 2e-3, "decay %g, expected %g", f[1], l);
            }
        }
    }
}

TEST(retention) {
    for (ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
        for (int64_t n_tokens : { 1, 3, 33, 64 }) {
            for (bool decay : { false, true }) {
                run_retention({ 96, 16, 3, n_tokens, decay, type }, 2);
                run_retention({ 64, 1,  1, n_tokens, decay, type }, 1);
                run_retention({ 96, 0,  2, n_tokens, decay, type }, 3);
            }
        }
    }
}

TEST(retention_is_the_same_with_any_number_of_threads) {
    std::vector<float> one, five;
    run_retention({ 576, 16, 3, 31, true, GGML_TYPE_Q8_0 }, 1, &one);
    run_retention({ 576, 16, 3, 31, true, GGML_TYPE_Q8_0 }, 5, &five);
    CHECK(one == five);
}
