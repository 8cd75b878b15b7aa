// The ops of the centroid memory against their reference.

#include "test.h"

#include "graph.h"
#include "indexmem-ops.h"
#include "reference.h"

#include <random>

struct absorb_case {
    int64_t n_embd_k, n_embd_v, n_latent, n_head, n_seq;
    std::vector<int32_t> n_evict; // of each eviction in turn
    bool equal_keys;
    int  n_threads;
};

static const absorb_case absorb_cases[] = {
    { 64, 64, 64, 3, 1, { 512, 32, 32, 1 },    false, 2 }, // the usual
    { 16, 16,  8, 5, 1, { 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1 }, false, 3 }, // one at a time
    { 33,  7,  5, 2, 2, { 3, 1, 4 },           false, 2 }, // odd sizes, filled in the middle of an eviction
    { 32, 32, 64, 1, 1, { 10 },                false, 1 }, // more slots than entries
    { 32, 32,  1, 2, 1, { 1, 5, 9 },           false, 2 }, // one slot
    { 32, 32,  4, 2, 1, { 7, 7 },              true,  2 }, // all keys equal: the first of equals
    { 32, 64,  4, 2, 3, { 0, 6, 0, 6 },        false, 4 }, // nothing leaves
};

static void run_absorb(const absorb_case & c, ggml_type type) {
    const int64_t n_slots     = 640;
    const int64_t n_evict_max = *std::max_element(c.n_evict.begin(), c.n_evict.end()) + 3;
    const int64_t n_rows      = c.n_head*c.n_seq;
    const int64_t n_embd      = c.n_embd_k + c.n_embd_v;

    std::mt19937 rng(5);
    std::normal_distribution<float> normal;

    std::vector<float> means(n_embd*c.n_latent*n_rows, NAN); // what an empty slot holds does not matter
    std::vector<float> counts(c.n_latent*n_rows, 17.0f);     // left over: the first eviction clears it

    std::vector<indexmem_reference_memory> reference(n_rows,
            { std::vector<std::vector<double>>(c.n_latent, std::vector<double>(n_embd)), std::vector<double>(c.n_latent) });

    bool fresh = true;
    for (int32_t n_evict : c.n_evict) {
        op_graph g;
        ggml_tensor * m    = g.input(GGML_TYPE_F32, n_embd, c.n_latent, c.n_head, c.n_seq);
        ggml_tensor * n    = g.input(GGML_TYPE_F32, c.n_latent, c.n_head, c.n_seq);
        ggml_tensor * k    = g.input(type, c.n_embd_k, n_slots, c.n_head, c.n_seq);
        ggml_tensor * v    = g.input(type, c.n_embd_v, n_slots, c.n_head, c.n_seq);
        ggml_tensor * plan = g.input(GGML_TYPE_I32, n_evict_max, 3, c.n_head, c.n_seq);
        ggml_tensor * ctl  = g.input(GGML_TYPE_I32, INDEXMEM_CTL_SIZE, c.n_seq);
        ggml_tensor * res  = ggml_indexmem_absorb(g.ctx, m, n, k, v, plan, ctl);
        g.alloc();

        // rows that do not leave are poisoned
        std::vector<uint8_t> k_bytes(ggml_nbytes(k), 0xFF), v_bytes(ggml_nbytes(v), 0xFF);
        std::vector<int32_t> plan_data(ggml_nelements(plan), -1);
        for (int64_t row = 0; row < n_rows; ++row) {
            std::vector<int32_t> slots(n_slots);
            for (int64_t i = 0; i < n_slots; ++i) {
                slots[i] = (int32_t) i;
            }
            std::shuffle(slots.begin(), slots.end(), rng);
            std::sort(slots.begin(), slots.begin() + n_evict);

            std::vector<std::vector<float>> entries;
            for (int32_t i = 0; i < n_evict; ++i) {
                plan_data[row*3*n_evict_max + i] = slots[i];
                std::vector<float> entry;
                for (auto [bytes, n_values, is_key] : { std::tuple{ &k_bytes, c.n_embd_k, true }, std::tuple{ &v_bytes, c.n_embd_v, false } }) {
                    std::vector<float> values(n_values);
                    for (auto & x : values) {
                        x = is_key && c.equal_keys ? 0.5f : normal(rng);
                    }
                    const auto packed = to_type(type, values, n_values);
                    std::copy(packed.begin(), packed.end(), bytes->begin() + (row*n_slots + slots[i])*packed.size());
                    values = from_type(type, packed, n_values);
                    entry.insert(entry.end(), values.begin(), values.end());
                }
                entries.push_back(std::move(entry));
            }
            reference[row].absorb(entries, c.n_embd_k);
        }
        std::vector<int32_t> ctl_data(ggml_nelements(ctl), 0);
        for (int64_t s = 0; s < c.n_seq; ++s) {
            ctl_data[s*INDEXMEM_CTL_SIZE + INDEXMEM_CTL_N_EVICT] = n_evict;
            ctl_data[s*INDEXMEM_CTL_SIZE + INDEXMEM_CTL_FRESH]   = fresh;
        }
        fresh = fresh && n_evict == 0;

        g.set(m, means);
        g.set(n, counts);
        g.set(k, k_bytes);
        g.set(v, v_bytes);
        g.set(plan, plan_data);
        g.set(ctl, ctl_data);
        g.compute({ res }, c.n_threads);
        means  = g.get<float>(m);
        counts = g.get<float>(n);
        if (fresh) {
            continue;
        }
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

TEST(absorb_equals_the_reference) {
    for (const auto & c : absorb_cases) {
        run_absorb(c, GGML_TYPE_F32);
        run_absorb(c, GGML_TYPE_F16);
    }
    run_absorb(absorb_cases[0], GGML_TYPE_Q8_0);
    run_absorb(absorb_cases[0], GGML_TYPE_Q4_0);
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
