// A model on a real device, the one that INDEXMEM_TEST_DEVICE names: what it keeps and answers is what the CPU keeps and answers.

#define TEST_FILES "test-on-device"
#include "device_context.h"

#include <set>

static const char * const DEVICE = getenv("INDEXMEM_TEST_DEVICE");

static test_needs needs([] { return DEVICE ? nullptr : "INDEXMEM_TEST_DEVICE names no device"; });

static constexpr int N_TEXT = 170; // tokens

static const char * const MODEL = TEST_FILES "-model.gguf";

static llama_model * load(bool on_device) {
    llama_log_set([](ggml_log_level level, const char * text, void *) {
        if (level >= GGML_LOG_LEVEL_ERROR) {
            fputs(text, stderr);
        }
    }, nullptr);
    ggml_backend_load_all();
    ggml_backend_dev_t devices[] = { on_device ? ggml_backend_dev_by_name(DEVICE) : nullptr, nullptr };
    CHECK_MSG(devices[0] || !on_device, "there is no device %s", DEVICE);
    auto params = llama_model_default_params();
    params.devices      = devices;
    params.n_gpu_layers = on_device ? 99 : 0;
    llama_model * res = llama_model_load_from_file(MODEL, params);
    CHECK(res != nullptr);
    return res;
}

// texts of n_seq sequences of different length, in steps of many tokens and then of one; the logits of the last tokens
static std::vector<float> decode(llama_context * ctx, int n_seq) {
    std::mt19937 rng(7);
    std::vector<float> logits;
    for (int i = 0, step = 13; i < N_TEXT; i += step) {
        step = i < N_TEXT - 40 ? 13 : 1;
        llama_batch batch = llama_batch_init(step*n_seq, 0, 1);
        for (int s = 0; s < n_seq; ++s) {
            for (int j = 0; j < step && i < N_TEXT - 40*s; ++j) {
                const int at = batch.n_tokens++;
                batch.token[at]     = (llama_token) (rng() % N_VOCAB);
                batch.pos[at]       = i + j;
                batch.n_seq_id[at]  = 1;
                batch.seq_id[at][0] = s;
                batch.logits[at]    = j == step - 1;
            }
        }
        CHECK(llama_decode(ctx, batch) == 0);
        const float * row = llama_get_logits_ith(ctx, step - 1);
        logits.insert(logits.end(), row, row + N_VOCAB);
        llama_batch_free(batch);
    }
    return logits;
}

static double distance(const std::vector<float> & a, const std::vector<float> & b) {
    double res = 0.0, size = 0.0;
    for (size_t i = 0; i < a.size(); ++i) {
        res  += (a[i] - b[i])*(a[i] - b[i]);
        size += b[i]*b[i];
    }
    return std::sqrt(res/size);
}

// share of entries that both keep
static double kept_alike(llama_context * a, llama_context * b, int n_seq) {
    size_t n = 0, n_alike = 0;
    for (int s = 0; s < n_seq; ++s) {
        for (size_t i = 0; i < N_LAYER; ++i) {
            for (uint32_t h = 0; h < N_HEAD_KV; ++h) {
                const auto there = cache_of(a).get_positions(s, cache_of(a).get_layers()[i], h);
                const auto here  = cache_of(b).get_positions(s, cache_of(b).get_layers()[i], h);
                CHECK(there.size() == here.size());
                const std::set<int32_t> found(there.begin(), there.end());
                CHECK(found.size() == there.size());
                n       += here.size();
                n_alike += std::count_if(here.begin(), here.end(), [&](int32_t p) { return found.count(p) > 0; });
            }
        }
    }
    return (double) n_alike/(double) n;
}

static bool on_device(llama_context * ctx) {
    ggml_backend_buffer_type_t buft = ggml_backend_buffer_get_type(cache_of(ctx).get_layers()[0].k->buffer);
    return ggml_backend_buft_get_device(buft) == ggml_backend_dev_by_name(DEVICE);
}

// alike: how much of what is kept has to be the same. Ranks that read keys or hidden states follow their rounding.
static void compare(llama_model * there, llama_model * here, indexmem_params request, int n_seq, ggml_type type, double alike) {
    request.budget = 70;
    request.window = 7;
    request.memory = request.memory ? request.memory : "off";
    llama_context * a = new_context(there, request, n_seq, type);
    llama_context * b = new_context(here,  request, n_seq, type);
    CHECK_MSG(on_device(a), "policy %s", request.policy ? request.policy : "indexer");
    const double d = distance(decode(a, n_seq), decode(b, n_seq));
    const double k = kept_alike(a, b, n_seq);
    printf("  %-10s %-5s %d sequences: logits differ by %.2g, kept alike %.4f\n", request.policy ? request.policy : "indexer",
            ggml_type_name(type), n_seq, d, k);
    CHECK_MSG(k >= alike, "policy %s, %s: of what is kept %g are the same", request.policy, ggml_type_name(type), k);
    const double most = k < 1.0 ? 0.5 : type == GGML_TYPE_Q4_0 ? 0.2 : 0.05; // a step of q4_0 is a seventh of the largest value
    CHECK_MSG(d < most, "policy %s, %s: logits differ by %g", request.policy, ggml_type_name(type), d);
    llama_free(a);
    llama_free(b);
}

TEST(a_device_keeps_what_the_cpu_keeps) {
    write_model(MODEL);
    llama_model * there = load(true), * here = load(false);
    remove(MODEL);
    for (const auto & [policy, alike] : { std::pair<const char *, double>("streaming", 1.0), { "random", 1.0 }, { "knorm", 0.9 },
            { "keydiff", 0.9 }, { "tova", 0.9 }, { "snapkv", 0.9 }, { "expected", 0.9 } }) {
        auto request = indexmem_default_params();
        request.policy = policy;
        compare(there, here, request, 1, GGML_TYPE_F16, alike);
        compare(there, here, request, 3, GGML_TYPE_F16, alike);
    }
    for (ggml_type type : { GGML_TYPE_F32, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
        auto request = indexmem_default_params();
        request.policy = "streaming";
        compare(there, here, request, 1, type, 1.0);
    }
    auto remembers = indexmem_default_params();
    remembers.policy       = "streaming";
    remembers.memory       = "centroid";
    remembers.memory_slots = 8;
    compare(there, here, remembers, 1, GGML_TYPE_F16, 1.0);
    for (int kind = 0; kind < indexmem_indexer_count(); ++kind) {
        const gguf_file file = sidecar_file(indexmem_indexer_name(kind), "none", GGML_TYPE_F16, false, { N_LAYER, N_EMBD, N_HEAD_KV });
        std::ofstream(SIDECAR, std::ios::binary) << file.bytes();
        auto request = indexmem_default_params();
        request.policy  = nullptr;
        request.sidecar = SIDECAR;
        compare(there, here, request, 1, GGML_TYPE_F16, 0.9);
        remove(SIDECAR);
    }
    llama_model_free(there);
    llama_model_free(here);
}

// keys are turned to new positions where they lie
TEST(a_device_turns_keys) {
    write_model(MODEL);
    llama_model * there = load(true), * here = load(false);
    remove(MODEL);
    auto request = indexmem_default_params();
    request.policy = "streaming";
    request.span   = 110;
    for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
        compare(there, here, request, 1, type, 1.0);
    }
    llama_model_free(there);
    llama_model_free(here);
}
