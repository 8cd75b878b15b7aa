// attention against a plain reference in double precision, and its error beside that of ggml's flash attention

#include "test.h"
#include "graph.h"

#include "indexmem-ops.h"

#include <cmath>
#include <random>

struct attend_case {
    int64_t n_embd_k, n_embd_v, n_kv, n_tokens, n_group, n_stream;
    int64_t n_used;  // slots in use; the others are poisoned
    bool    per_stream_mask;
    float   softcap;
    int64_t n_latent = 0; // of the used slots, the first ones; every third of them is empty, hence poisoned as well
    bool    sinks = false;
};

static void run_attend(const attend_case & c, ggml_type type, int n_threads, std::vector<float> * out = nullptr) {
    std::mt19937 rng(c.n_kv + c.n_tokens*31 + c.n_group);
    std::normal_distribution<float> normal;

    op_graph g;
    ggml_tensor * q    = g.input(GGML_TYPE_F32, c.n_embd_k, c.n_tokens, c.n_group, c.n_stream);
    ggml_tensor * k    = g.input(type, c.n_embd_k, c.n_kv, 1, c.n_stream);
    ggml_tensor * v    = g.input(type, c.n_embd_v, c.n_kv, 1, c.n_stream);
    ggml_tensor * mask = g.input(GGML_TYPE_F16, c.n_kv, c.n_tokens, 1, c.per_stream_mask ? c.n_stream : 1);
    ggml_tensor * count = c.n_latent > 0 ? g.input(GGML_TYPE_F32, c.n_latent, c.n_stream, 1) : nullptr;
    const int64_t n_head = c.n_group*(c.n_stream % 2 == 0 ? c.n_stream/2 : c.n_stream); // of a sequence: there are two, or one
    ggml_tensor * sinks = c.sinks ? g.input(GGML_TYPE_F32, n_head) : nullptr;
    ggml_tensor * res  = ggml_indexmem_attend(g.ctx, q, k, v, mask, count, sinks, 0.3f, c.softcap);
    g.alloc();

    auto random = [&](int64_t n) {
        std::vector<float> x(n);
        for (auto & y : x) {
            y = normal(rng);
        }
        return x;
    };
    const auto q_data = random(ggml_nelements(q));
    auto k_bytes = to_type(type, random(ggml_nelements(k)), c.n_embd_k);
    auto v_bytes = to_type(type, random(ggml_nelements(v)), c.n_embd_v);
    const auto k_data = from_type(type, k_bytes, ggml_nelements(k));
    const auto v_data = from_type(type, v_bytes, ggml_nelements(v));

    // poison what is not in use: all ones is NaN in every float type and in the scales of quantised blocks
    for (int64_t s = 0; s < c.n_stream; ++s) {
        for (auto [bytes, n_embd] : { std::pair{ &k_bytes, c.n_embd_k }, std::pair{ &v_bytes, c.n_embd_v } }) {
            const size_t row = ggml_row_size(type, n_embd);
            std::fill(bytes->begin() + (s*c.n_kv + c.n_used)*row, bytes->begin() + (s + 1)*c.n_kv*row, 0xFF);
        }
    }

    std::vector<float> n(c.n_latent*c.n_stream);
    for (int64_t i = 0; i < (int64_t) n.size(); ++i) {
        n[i] = i % 3 == 1 ? 0.0f : (float) (1 + i*i*i);
        for (auto [bytes, n_embd] : { std::pair{ &k_bytes, c.n_embd_k }, std::pair{ &v_bytes, c.n_embd_v } }) {
            const size_t row = ggml_row_size(type, n_embd);
            if (n[i] == 0.0f) {
                std::fill_n(bytes->begin() + (i/c.n_latent*c.n_kv + i % c.n_latent)*row, row, 0xFF);
            }
        }
    }

    // causal tail, a finite bias here and there, and (if a mask per stream) a hole at slot 1
    std::vector<float> bias(ggml_nelements(mask), -INFINITY);
    for (int64_t s = 0; s < mask->ne[3]; ++s) {
        for (int64_t t = 0; t < c.n_tokens; ++t) {
            for (int64_t i = 0; i < c.n_used - c.n_tokens + t + 1; ++i) {
                bias[(s*c.n_tokens + t)*c.n_kv + i] = i % 5 == 3 ? 0.5f*(float) (s + 1) : 0.0f;
            }
            if (c.per_stream_mask && c.n_used > 2) {
                bias[(s*c.n_tokens + t)*c.n_kv + 1] = -INFINITY;
            }
        }
    }
    std::vector<ggml_fp16_t> mask_data(bias.size());
    ggml_fp32_to_fp16_row(bias.data(), mask_data.data(), bias.size());

    g.set(q, q_data);
    g.set(k, k_bytes);
    g.set(v, v_bytes);
    g.set(mask, mask_data);
    if (count) {
        g.set(count, n);
    }
    auto sink = random(n_head);
    for (int64_t i = 0; i < n_head; ++i) {
        sink[i] = i % 4 == 3 ? -INFINITY : 3.0f*sink[i];
    }
    if (sinks) {
        g.set(sinks, sink);
    }
    g.compute({ res }, n_threads);
    const auto found = g.get<float>(res);
    if (out) {
        *out = found;
    }

    double worst = 0.0;
    for (int64_t s = 0; s < c.n_stream; ++s) {
        for (int64_t gq = 0; gq < c.n_group; ++gq) {
            for (int64_t t = 0; t < c.n_tokens; ++t) {
                const float * qr = q_data.data() + ((s*c.n_group + gq)*c.n_tokens + t)*c.n_embd_k;
                const float * br = bias.data() + ((s % mask->ne[3])*c.n_tokens + t)*c.n_kv;
                std::vector<double> logit(c.n_used);
                double max = -INFINITY;
                for (int64_t i = 0; i < c.n_used; ++i) {
                    double dot = 0.0;
                    for (int64_t d = 0; d < c.n_embd_k; ++d) {
                        dot += (double) qr[d]*k_data[(s*c.n_kv + i)*c.n_embd_k + d];
                    }
                    dot *= 0.3f;
                    if (c.softcap != 0.0f) {
                        dot = c.softcap*std::tanh(dot/c.softcap);
                    }
                    logit[i] = dot + br[i];
                    if (i < c.n_latent) {
                        logit[i] = n[s*c.n_latent + i] == 0.0f ? -INFINITY : logit[i] + std::log(n[s*c.n_latent + i]);
                    }
                    max = std::max(max, logit[i]);
                }
                const double s_logit = sinks ? sink[(s*c.n_group + gq) % n_head] : -INFINITY;
                max = std::max(max, s_logit);
                double sum = max > -INFINITY ? std::exp(s_logit - max) : 0.0;
                std::vector<double> expected(c.n_embd_v, 0.0);
                for (int64_t i = 0; i < c.n_used && max > -INFINITY; ++i) {
                    const double p = std::exp(logit[i] - max);
                    sum += p;
                    for (int64_t d = 0; d < c.n_embd_v && p > 0.0; ++d) {
                        expected[d] += p*v_data[(s*c.n_kv + i)*c.n_embd_v + d];
                    }
                }
                const float * f = found.data() + ((s*c.n_tokens + t)*c.n_group + gq)*c.n_embd_v;
                for (int64_t d = 0; d < c.n_embd_v; ++d) {
                    const double e = sum > 0.0 ? expected[d]/sum : 0.0;
                    worst = std::max(worst, std::abs(e - f[d]));
                    CHECK(std::isfinite(f[d]));
                }
            }
        }
    }
    CHECK_MSG(worst < 2e-5, "%s, n_kv %d: error %g", ggml_type_name(type), (int) c.n_kv, worst);
}

static const attend_case attend_cases[] = {
    //  K    V   n_kv   T  G  streams used  per-stream softcap
    {  64,  64,   256,  1, 3, 3,       1, false,  0.0f },
    {  64,  64,   256,  1, 3, 3,     200, false,  0.0f },
    {  64,  64,  1280,  1, 3, 3,    1025, false,  0.0f },
    {  64,  64,   256,  5, 1, 2,     129, false,  0.0f },
    { 128,  96,   512, 17, 4, 2,     300, true,   0.0f },
    {  96, 128,   256,  2, 2, 6,     255, true,  30.0f },
    {  32,  32,   127,  1, 1, 1,     127, false,  0.0f }, // no padding at all, an odd number of keys
    { 256, 256,   130, 63, 2, 1,     130, false,  0.0f },
    {  64,  64,   512,  1, 3, 3,     300, false,  0.0f,  64 }, // latent slots
    {  64,  32,   512,  7, 2, 2,     301, true,  20.0f, 129 }, // more of them than one chunk
    {  32,  32,   256,  1, 1, 2,       3, false,  0.0f,   2 }, // one that holds something, one empty
    {  64,  64,  1280,  8, 3, 3,    1100, false,  0.0f },      // several tokens share a tile
    {  80,  48,   300, 33, 3, 2,     290, true,   0.0f,  40 }, // padded rows, blocks that begin within a token
    {  64,  64,  9000,  3, 2, 4,    8500, false,  0.0f },      // spans of several chunks
    {  64,  64,   768,150, 2, 2,     700, false,  0.0f },      // several blocks, each with its own end
    {  64,  64,   256,  1, 3, 3,     200, false,  0.0f,   0, true }, // sinks: one sequence
    {  64,  32,   512, 17, 4, 4,     301, true,   0.0f,  20, true }, // two, with latent slots
    {  64,  64,  9000,  3, 8, 2,    8500, false, 30.0f,   0, true }, // spans of several chunks
    {  80, 112,   512,  1, 3, 3,     500, false,  0.0f },      // rows that end with half a block: few queries,
    { 112,  80,   768, 40, 2, 2,     700, true,   0.0f },      // and many
    {  16,  48,   256,  2, 1, 2,     200, false, 30.0f,  20, true },
    {  40,  72,   512,  1, 3, 2,     500, false,  0.0f },      // rows that are padded
    {  40,  88,   512, 50, 1, 2,     500, true,   0.0f },
};

TEST(attention_equals_the_reference) {
    for (const auto & c : attend_cases) {
        for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_F32, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
            if (c.n_embd_k % ggml_blck_size(type) == 0 && c.n_embd_v % ggml_blck_size(type) == 0) {
                run_attend(c, type, 2);
            }
        }
    }
}

TEST(attention_is_the_same_with_any_number_of_threads) {
    for (const auto & c : attend_cases) {
        if (c.n_kv < 512) {
            continue;
        }
        std::vector<float> first;
        run_attend(c, GGML_TYPE_F16, 1, &first);
        for (int n_threads = 2; n_threads <= 7 && test_threads(n_threads) == n_threads; ++n_threads) {
            std::vector<float> other;
            run_attend(c, GGML_TYPE_F16, n_threads, &other);
            CHECK(first == other);
        }
    }
}

// root mean square of the errors of our op and of flash attention, against double precision on the same inputs
static void compare_errors(ggml_type type, int64_t n_tokens) {
    constexpr int64_t D = 64, KV = 1024, G = 3;
    std::mt19937 rng(7);
    std::normal_distribution<float> normal;

    op_graph g;
    ggml_tensor * q    = g.input(GGML_TYPE_F32, D, n_tokens, G, 1);
    ggml_tensor * k    = g.input(type, D, KV, 1, 1);
    ggml_tensor * v    = g.input(type, D, KV, 1, 1);
    ggml_tensor * mask = g.input(GGML_TYPE_F16, KV, n_tokens, 1, 1);
    ggml_tensor * ours  = ggml_indexmem_attend(g.ctx, q, k, v, mask, nullptr, nullptr, 0.125f, 0.0f);
    ggml_tensor * flash = ggml_flash_attn_ext(g.ctx, q, k, v, mask, 0.125f, 0.0f, 0.0f);
    ggml_prec_set_acc(flash, GGML_PREC_F32);
    g.alloc();

    auto random = [&](int64_t n) {
        std::vector<float> x(n);
        for (auto & y : x) {
            y = 2.0f*normal(rng);
        }
        return x;
    };
    const auto q_data  = random(ggml_nelements(q));
    const auto k_bytes = to_type(type, random(ggml_nelements(k)), D);
    const auto v_bytes = to_type(type, random(ggml_nelements(v)), D);
    const auto k_data  = from_type(type, k_bytes, ggml_nelements(k));
    const auto v_data  = from_type(type, v_bytes, ggml_nelements(v));
    g.set(q, q_data);
    g.set(k, k_bytes);
    g.set(v, v_bytes);
    g.set(mask, std::vector<ggml_fp16_t>(ggml_nelements(mask), ggml_fp32_to_fp16(0.0f)));
    if (!g.has(flash)) {
        return;
    }
    g.compute({ ours, flash }, 2);
    const auto found_ours  = g.get<float>(ours);
    const auto found_flash = g.get<float>(flash);

    double error_ours = 0.0, error_flash = 0.0;
    for (int64_t t = 0; t < n_tokens; ++t) {
        for (int64_t h = 0; h < G; ++h) {
            double sum = 0.0;
            std::vector<double> expected(D, 0.0);
            for (int64_t i = 0; i < KV; ++i) {
                double dot = 0.0;
                for (int64_t d = 0; d < D; ++d) {
                    dot += (double) q_data[(h*n_tokens + t)*D + d]*k_data[i*D + d];
                }
                const double p = std::exp(0.125*dot);
                sum += p;
                for (int64_t d = 0; d < D; ++d) {
                    expected[d] += p*v_data[i*D + d];
                }
            }
            for (int64_t d = 0; d < D; ++d) {
                const int64_t at = (t*G + h)*D + d;
                error_ours  += std::pow(found_ours [at] - expected[d]/sum, 2);
                error_flash += std::pow(found_flash[at] - expected[d]/sum, 2);
            }
        }
    }
    CHECK_MSG(error_ours <= error_flash, "%s, %d tokens: squared error %g, of flash attention %g", ggml_type_name(type),
            (int) n_tokens, error_ours, error_flash);
}

TEST(attention_is_no_less_exact_than_flash_attention) {
    for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
        for (int64_t n_tokens : { 1, 8, 80 }) {
            compare_errors(type, n_tokens);
        }
    }
}

// a row that sees nothing gives zeros, not NaN
TEST(a_row_that_sees_nothing) {
    run_attend({ 64, 64, 256, 3, 1, 1, 2, false, 0.0f }, GGML_TYPE_F16, 2);
}

// Tokens that see more and more keys, as drafts do: all at once, and one by one.
TEST(drafts_get_the_bits_of_single_tokens) {
    constexpr int64_t D = 64, KV = 1280, G = 3, H = 2, T = 13;
    std::mt19937 rng(11);
    std::normal_distribution<float> normal;

    op_graph g;
    auto * q      = g.input(GGML_TYPE_F32, D, T, G, H);
    auto * k      = g.input(GGML_TYPE_F16, D, KV, 1, H);
    auto * v      = g.input(GGML_TYPE_F16, D, KV, 1, H);
    auto * mask   = g.input(GGML_TYPE_F16, KV, T);
    auto * at_once = ggml_indexmem_attend(g.ctx, q, k, v, mask, nullptr, nullptr, 0.125f, 0.0f);
    auto * alone   = ggml_indexmem_attend(g.ctx, q, k, v, mask, nullptr, nullptr, 0.125f, 0.0f);
    ggml_indexmem_attend_alone(alone, KV*H, 1);

    std::vector<ggml_tensor *> outputs = { at_once, alone };
    for (int64_t t = 0; t < T; ++t) {
        auto * qt = ggml_view_4d(g.ctx, q, D, 1, G, H, q->nb[1], q->nb[2], q->nb[3], t*q->nb[1]);
        auto * mt = ggml_view_4d(g.ctx, mask, KV, 1, 1, 1, mask->nb[1], mask->nb[2], mask->nb[3], t*mask->nb[1]);
        outputs.push_back(ggml_indexmem_attend(g.ctx, qt, k, v, mt, nullptr, nullptr, 0.125f, 0.0f));
    }
    g.alloc();
    const auto random = [&](int64_t n) {
        std::vector<float> x(n);
        for (auto & y : x) {
            y = 2.0f*normal(rng);
        }
        return x;
    };
    g.set(q, random(ggml_nelements(q)));
    g.set(k, to_type(GGML_TYPE_F16, random(ggml_nelements(k)), D));
    g.set(v, to_type(GGML_TYPE_F16, random(ggml_nelements(v)), D));
    std::vector<ggml_fp16_t> data(ggml_nelements(mask), ggml_fp32_to_fp16(-INFINITY));
    for (int64_t t = 0; t < T; ++t) {
        std::fill_n(data.begin() + t*KV, 1015 + t, ggml_fp32_to_fp16(0.0f)); // some end in a chunk that others do not reach
    }
    g.set(mask, data);
    g.compute(outputs, 2);

    const auto together = g.get<float>(alone);
    for (int64_t t = 0; t < T; ++t) {
        const auto single = g.get<float>(outputs[2 + t]); // [D, G, 1, H]
        for (int64_t h = 0; h < H; ++h) {
            const float * expected = single.data() + h*G*D;
            CHECK(std::equal(expected, expected + G*D, together.data() + (h*T + t)*G*D));
        }
    }
    const auto usual = g.get<float>(at_once);
    double worst = 0.0;
    for (size_t i = 0; i < usual.size(); ++i) {
        worst = std::max(worst, (double) std::abs(usual[i] - together[i]));
    }
    CHECK(worst < 1e-5);
}

// The same keys in a cache that is longer, because more tokens came with this one, and in one that is read for other sequences as well.
TEST(other_tokens_and_sequences_change_no_bit) {
    constexpr int64_t D = 64, KV = 6144, SEEN = 5800, H = 8, S = 4;
    std::mt19937 rng(12);
    std::normal_distribution<float> normal;
    const auto random = [&](int64_t n) {
        std::vector<float> x(n);
        for (auto & y : x) {
            y = 2.0f*normal(rng);
        }
        return x;
    };

    op_graph g;
    auto * q    = g.input(GGML_TYPE_F32, D, 1, 1, H*S);
    auto * k    = g.input(GGML_TYPE_F16, D, KV, 1, H*S);
    auto * v    = g.input(GGML_TYPE_F16, D, KV, 1, H*S);
    auto * mask = g.input(GGML_TYPE_F16, KV, 1);
    std::vector<ggml_tensor *> outputs;
    for (const auto & [n_kv, n_seq] : { std::pair<int64_t, int64_t>{ 5888, 1 }, { KV, 1 }, { KV, S } }) {
        const auto of = [&](ggml_tensor * t, int64_t n) { return ggml_view_4d(g.ctx, t, D, n, 1, H*n_seq, t->nb[1], t->nb[2], t->nb[3], 0); };
        auto * m = ggml_view_4d(g.ctx, mask, n_kv, 1, 1, 1, mask->nb[1], mask->nb[2], mask->nb[3], 0);
        outputs.push_back(ggml_indexmem_attend(g.ctx, of(q, 1), of(k, n_kv), of(v, n_kv), m, nullptr, nullptr, 0.125f, 0.0f));
        ggml_indexmem_attend_alone(outputs.back(), KV*H, S);
    }
    g.alloc();
    g.set(q, random(ggml_nelements(q)));
    g.set(k, to_type(GGML_TYPE_F16, random(ggml_nelements(k)), D));
    g.set(v, to_type(GGML_TYPE_F16, random(ggml_nelements(v)), D));
    std::vector<ggml_fp16_t> seen(KV, ggml_fp32_to_fp16(-INFINITY));
    std::fill_n(seen.begin(), SEEN, ggml_fp32_to_fp16(0.0f));
    g.set(mask, seen);
    g.compute(outputs, 2);

    const auto expected = g.get<float>(outputs[0]);
    for (size_t i : { 1, 2 }) {
        const auto found = g.get<float>(outputs[i]);
        CHECK(std::equal(expected.begin(), expected.end(), found.begin()));
    }
}
