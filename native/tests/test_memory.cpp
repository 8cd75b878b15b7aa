// The ops of the latent memories against their references.

#include "test.h"

#include "graph.h"
#include "indexmem-ops.h"
#include "reference.h"

#include <random>

typedef std::vector<std::vector<float>> rows;

struct memory_case {
    int64_t n_embd_k, n_embd_v, n_latent, n_head, n_seq; // n_latent: slots of a centroid memory, features of a residual one
    std::vector<int32_t> n_evict; // of each eviction in turn
    bool equal_keys;
    int  n_threads;
    int32_t n_missing = 0; // ctl asks for so many more than the plan has
};

static const memory_case memory_cases[] = {
    { 64, 64, 64, 3, 1, { 512, 32, 32, 1 },    false, 2 }, // the usual
    { 16, 16,  8, 5, 1, { 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1 }, false, 3 }, // one at a time
    { 33,  7,  5, 2, 2, { 3, 1, 4 },           false, 2 }, // odd sizes, filled in the middle of an eviction
    { 32, 32, 64, 1, 1, { 10 },                false, 1 }, // more slots than entries
    { 32, 32,  1, 2, 1, { 1, 5, 9 },           false, 2 }, // one slot
    { 32, 32,  4, 2, 1, { 7, 7 },              true,  2 }, // all keys equal: the first of equals
    { 32, 32, 70, 1, 1, { 70, 9 },             true,  2 }, // the same among many slots
    { 32, 64,  4, 2, 3, { 0, 6, 0, 6 },        false, 4 }, // nothing leaves
    { 128, 128, 70, 2, 1, { 40, 3 },           false, 2 },
    { 16, 16, 600, 1, 1, { 290, 300, 40 },     false, 2 }, // more slots than a group has threads
    { 16, 16,  9, 2, 1, { 4000, 1 },           false, 2 }, // far more than a cache of ordinary size lets go
    { 32, 32,  4, 2, 1, { 5, 0, 7 },           false, 2, 2 }, // fewer leave than asked for
    { 32, 32,  4, 1, 1, { 5, 9 },              false, 1, 9 }, // the plan holds fewer
};

// A cache of which some rows leave; those that stay are poisoned.
struct leaving {
    const memory_case & c;
    ggml_type type;
    int64_t   n_evict_max, n_slots;

    ggml_tensor * k;
    ggml_tensor * v;
    ggml_tensor * plan;
    ggml_tensor * ctl;

    leaving(op_graph & g, const memory_case & c, ggml_type type) : c(c), type(type) {
        n_evict_max = *std::max_element(c.n_evict.begin(), c.n_evict.end()) + 3;
        n_slots     = std::max<int64_t>(640, 2*n_evict_max);

        k    = g.input(type, c.n_embd_k, n_slots, c.n_head, c.n_seq);
        v    = g.input(type, c.n_embd_v, n_slots, c.n_head, c.n_seq);
        plan = g.input(GGML_TYPE_I32, n_evict_max, 3, c.n_head, c.n_seq);
        ctl  = g.input(GGML_TYPE_I32, INDEXMEM_CTL_SIZE, c.n_seq);
    }

    std::vector<float> values(std::mt19937 & rng, int64_t n, bool equal) const {
        std::normal_distribution<float> normal;
        std::vector<float> res(n);
        for (auto & x : res) {
            x = equal ? 0.5f : normal(rng);
        }
        return res;
    }

    // writes n_evict entries of each head, and returns their keys and values as the cache holds them
    std::vector<std::pair<rows, rows>> fill(op_graph & g, std::mt19937 & rng, int32_t n_evict) const {
        std::vector<std::pair<rows, rows>> res(c.n_head*c.n_seq);
        std::vector<uint8_t> k_bytes(ggml_nbytes(k), 0xFF), v_bytes(ggml_nbytes(v), 0xFF);
        std::vector<int32_t> plan_data(ggml_nelements(plan), -1);

        const auto put = [&](std::vector<uint8_t> & bytes, size_t i, int64_t n, bool equal) {
            const auto packed = to_type(type, values(rng, n, equal), n);
            std::copy(packed.begin(), packed.end(), bytes.begin() + i*packed.size());
            return from_type(type, packed, n);
        };
        for (size_t row = 0; row < res.size(); ++row) {
            std::vector<int32_t> slots(n_slots);
            for (int64_t i = 0; i < n_slots; ++i) {
                slots[i] = (int32_t) i;
            }
            std::shuffle(slots.begin(), slots.end(), rng);
            std::sort(slots.begin(), slots.begin() + n_evict);
            for (int32_t i = 0; i < n_evict; ++i) {
                plan_data[row*3*n_evict_max + i] = slots[i];
                res[row].first .push_back(put(k_bytes, row*n_slots + slots[i], c.n_embd_k, c.equal_keys));
                res[row].second.push_back(put(v_bytes, row*n_slots + slots[i], c.n_embd_v, false));
            }
        }
        std::vector<int32_t> ctl_data(ggml_nelements(ctl), 0);
        for (int64_t s = 0; s < c.n_seq; ++s) {
            ctl_data[s*INDEXMEM_CTL_SIZE + INDEXMEM_CTL_N_EVICT] = n_evict + c.n_missing;
        }
        g.set(k,    k_bytes);
        g.set(v,    v_bytes);
        g.set(plan, plan_data);
        g.set(ctl,  ctl_data);
        return res;
    }
};

static void run_centroid(const memory_case & c, ggml_type type) {
    const int64_t n_rows = c.n_head*c.n_seq;
    const int64_t n_embd = c.n_embd_k + c.n_embd_v;

    std::mt19937 rng(5);

    std::vector<float> means(n_embd*c.n_latent*n_rows, NAN); // what an empty slot holds does not matter
    std::vector<float> counts(c.n_latent*n_rows, 0.0f);

    std::vector<indexmem_reference_centroid> reference(n_rows,
            { std::vector<std::vector<double>>(c.n_latent, std::vector<double>(n_embd)), std::vector<double>(c.n_latent) });

    for (int32_t n_evict : c.n_evict) {
        op_graph g;
        const leaving cache(g, c, type);
        ggml_tensor * m   = g.input(GGML_TYPE_F32, n_embd, c.n_latent, c.n_head, c.n_seq);
        ggml_tensor * n   = g.input(GGML_TYPE_F32, c.n_latent, c.n_head, c.n_seq);
        ggml_tensor * res = ggml_indexmem_centroid(g.ctx, m, n, cache.k, cache.v, cache.plan, cache.ctl);
        g.alloc();

        const auto entries = cache.fill(g, rng, n_evict);
        for (int64_t row = 0; row < n_rows; ++row) {
            rows both = entries[row].first;
            for (size_t i = 0; i < both.size(); ++i) {
                both[i].insert(both[i].end(), entries[row].second[i].begin(), entries[row].second[i].end());
            }
            reference[row].absorb(both, c.n_embd_k);
        }
        g.set(m, means);
        g.set(n, counts);
        g.compute({ res }, c.n_threads);
        means  = g.get<float>(m);
        counts = g.get<float>(n);

        for (int64_t row = 0; row < n_rows; ++row) {
            for (int64_t r = 0; r < c.n_latent; ++r) {
                const float found = counts[row*c.n_latent + r];
                CHECK_MSG(found == (float) reference[row].counts[r], "row %d slot %d holds %g, expected %g", (int) row, (int) r,
                        found, reference[row].counts[r]);
                for (int64_t d = 0; d < n_embd && found > 0.0f; ++d) {
                    CHECK(std::fabs(means[(row*c.n_latent + r)*n_embd + d] - reference[row].means[r][d]) < 1e-5);
                }
            }
        }
    }
}

TEST(centroid_equals_the_reference) {
    for (const auto & c : memory_cases) {
        run_centroid(c, GGML_TYPE_F32);
        run_centroid(c, GGML_TYPE_F16);
    }
    run_centroid(memory_cases[0], GGML_TYPE_BF16);
    run_centroid(memory_cases[0], GGML_TYPE_Q8_0);
    run_centroid(memory_cases[0], GGML_TYPE_Q4_0);
}

static void run_residual(const memory_case & c, ggml_type type) {
    const int64_t n_rows    = c.n_head*c.n_seq;
    const int64_t n_feature = c.n_latent;
    const float   rate      = 0.25f;
    const float   decay     = 0.75f;

    std::mt19937 rng(6);

    std::vector<float> state(n_feature*(c.n_embd_v + 1)*n_rows, 0.0f);
    std::vector<indexmem_reference_residual> reference(n_rows,
            { std::vector<std::vector<double>>(c.n_embd_v + 1, std::vector<double>(n_feature)) });

    for (int32_t n_evict : c.n_evict) {
        op_graph g;
        const leaving cache(g, c, type);
        ggml_tensor * s   = g.input(GGML_TYPE_F32, n_feature, c.n_embd_v + 1, c.n_head, c.n_seq);
        ggml_tensor * phi = g.input(GGML_TYPE_F32, c.n_embd_k, n_feature);
        ggml_tensor * res = ggml_indexmem_residual(g.ctx, s, phi, cache.k, cache.v, cache.plan, cache.ctl, rate, decay);
        g.alloc();

        rows phi_rows;
        std::vector<float> phi_data;
        for (int64_t j = 0; j < n_feature; ++j) {
            phi_rows.push_back(cache.values(rng, c.n_embd_k, false));
            phi_data.insert(phi_data.end(), phi_rows.back().begin(), phi_rows.back().end());
        }
        const auto entries = cache.fill(g, rng, n_evict);
        for (int64_t row = 0; row < n_rows; ++row) {
            reference[row].absorb(entries[row].first, entries[row].second, phi_rows, rate, decay);
        }
        g.set(s,   state);
        g.set(phi, phi_data);
        g.compute({ res }, c.n_threads);
        state = g.get<float>(s);

        for (int64_t row = 0; row < n_rows; ++row) {
            for (int64_t d = 0; d <= c.n_embd_v; ++d) {
                for (int64_t j = 0; j < n_feature; ++j) {
                    const double expected = reference[row].state[d][j];
                    const float  found    = state[(row*(c.n_embd_v + 1) + d)*n_feature + j];
                    // terms of either sign are added up in fp32
                    const double rounding = 1e-4*(1.0 + std::fabs(expected)) + 2e-7*n_evict;
                    CHECK_MSG(std::fabs(found - expected) < rounding, "row %d component %d feature %d is %g, expected %g",
                            (int) row, (int) d, (int) j, found, expected);
                }
            }
        }
    }
}

TEST(residual_equals_the_reference) {
    for (const auto & c : memory_cases) {
        run_residual(c, GGML_TYPE_F32);
        run_residual(c, GGML_TYPE_F16);
    }
    run_residual(memory_cases[0], GGML_TYPE_BF16);
    run_residual(memory_cases[0], GGML_TYPE_Q8_0);
    run_residual(memory_cases[0], GGML_TYPE_Q4_0);
}

TEST(bias_of_each_head) {
    const int64_t n_kv = 256, n_tokens = 5, n_latent = 7, n_head = 3, n_seq = 2;

    op_graph g;
    ggml_tensor * mask  = g.input(GGML_TYPE_F16, n_kv, n_tokens, 1, n_seq);
    ggml_tensor * count = g.input(GGML_TYPE_F32, n_latent, n_head, n_seq);
    ggml_tensor * res   = ggml_indexmem_bias(g.ctx, mask, count);
    g.alloc();

    std::vector<float> mask_data(ggml_nelements(mask)), counts(ggml_nelements(count));
    for (size_t i = 0; i < mask_data.size(); ++i) {
        mask_data[i] = i % 11 == 0 ? -INFINITY : 0.0f;
    }
    for (size_t i = 0; i < counts.size(); ++i) {
        counts[i] = i % 4 == 0 ? 0.0f : i % 4 == 1 ? 1.0f : i % 4 == 2 ? 3.0f : 1e9f; // empty, few and absurdly many
    }
    std::vector<ggml_fp16_t> mask_f16(mask_data.size());
    ggml_fp32_to_fp16_row(mask_data.data(), mask_f16.data(), mask_data.size());
    g.set(mask, mask_f16);
    g.set(count, counts);
    g.compute({ res }, 3);

    const auto found = g.get<ggml_fp16_t>(res);
    for (int64_t s = 0; s < n_seq; ++s) {
        for (int64_t h = 0; h < n_head; ++h) {
            for (int64_t t = 0; t < n_tokens; ++t) {
                for (int64_t i = 0; i < n_kv; ++i) {
                    float expected = mask_data[(s*n_tokens + t)*n_kv + i];
                    if (i < n_latent) {
                        expected += std::log(counts[(s*n_head + h)*n_latent + i]);
                    }
                    const float value = ggml_fp16_to_fp32(found[((s*n_head + h)*n_tokens + t)*n_kv + i]);
                    CHECK(value == ggml_fp16_to_fp32(ggml_fp32_to_fp16(expected)));
                }
            }
        }
    }
}
