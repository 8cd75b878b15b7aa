// Contexts whose layers lie on a device that is the CPU in disguise: what a device is asked about is what the graphs hold, and
// a cache that it cannot compute lies in host memory.

#include "fake_device.h"
#include "sidecar_file.h"
#include "test.h"
#include "tiny_model.h"

#include "indexmem-kv-cache.h"
#include "indexmem-layer-nodes.h"
#include "indexmem.h"

#include "llama-context.h"
#include "llama-model.h"
#include "llama.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <random>

static constexpr uint32_t N_VOCAB = 96, N_LAYER = 2, N_HEAD = 4, N_HEAD_KV = 2, HEAD = 64, N_UBATCH = 16;
static constexpr uint32_t N_EMBD = N_HEAD*HEAD;

static const char * const SIDECAR = "test-device.indexmem.gguf";

static void write_model(const char * path) {
    write_tiny_model(path, { N_VOCAB, N_EMBD, N_LAYER, N_HEAD, N_HEAD_KV, 96, 4096 }, tiny_random(0.1f));
}

// of a model on a device
struct fixture {
    fake_device   dev;
    llama_model * model;

    explicit fixture(std::function<bool(const ggml_tensor *)> lacks, llama_split_mode split = LLAMA_SPLIT_MODE_LAYER) : dev(lacks) {
        llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
        const char * path = "test-device-model.gguf";
        write_model(path);
        ggml_backend_dev_t devices[] = { &dev.device, nullptr };
        auto params = llama_model_default_params();
        params.devices      = devices;
        params.n_gpu_layers = 99;
        params.split_mode   = split;
        model = llama_model_load_from_file(path, params);
        CHECK(model != nullptr);
        remove(path);
    }

    ~fixture() { llama_model_free(model); }

    llama_context * context(const indexmem_params & request, uint32_t n_seq = 1, ggml_type type = GGML_TYPE_F16, bool offload = true) {
        auto params = llama_context_default_params();
        params.n_ctx       = 4096;
        params.n_batch     = 64;
        params.n_ubatch    = N_UBATCH;
        params.n_seq_max   = n_seq;
        params.n_threads   = params.n_threads_batch = 2;
        params.type_k      = params.type_v = type;
        params.offload_kqv = offload;
        params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
        indexmem_next_context(&request);
        llama_context * ctx = llama_init_from_model(model, params);
        CHECK_MSG(ctx, "%s", indexmem_last_error());
        indexmem_next_context(nullptr);
        return ctx;
    }
};

static llama_kv_cache_bounded & cache_of(llama_context * ctx) {
    return dynamic_cast<llama_kv_cache_bounded &>(*llama_get_memory(ctx));
}

static bool on_device(const fixture & f, llama_context * ctx) {
    return ggml_backend_buffer_get_type(cache_of(ctx).get_layers()[0].k->buffer) == &f.dev.memory;
}

static indexmem_params request_of(const char * policy, const char * memory = nullptr, const char * sidecar = nullptr) {
    auto request = indexmem_default_params();
    request.budget  = 120;
    request.window  = 7;
    request.policy  = policy;
    request.memory  = memory;
    request.sidecar = sidecar;
    return request;
}

static void write_sidecar(const char * kind, const char * memory) {
    gguf_file file = sidecar_file(kind, memory, GGML_TYPE_F16, false, { N_LAYER, N_EMBD, N_HEAD_KV });
    if (std::string(memory) == "residual") {
        file.u32("indexmem.residual.head_dim", HEAD);
        for (auto & t : file.tensors) {
            if (t.name.find("phi_proj") != std::string::npos) {
                t.ne[0] = HEAD;
                t.data  = tensor_data(GGML_TYPE_F32, HEAD*4, 1);
            }
        }
    }
    std::ofstream(SIDECAR, std::ios::binary) << file.bytes();
}

static std::string shape_of(const ggml_tensor * t) {
    std::string res = std::string(" ") + ggml_type_name(t->type);
    for (int64_t n : t->ne) {
        res += "," + std::to_string(n);
    }
    return res;
}

// ops, shapes and types of all nodes that a device has to have kernels for
static std::vector<std::string> list_of(ggml_cgraph * gf) {
    std::vector<std::string> res;
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        const ggml_tensor * node = ggml_graph_node(gf, i);
        if (node->op != GGML_OP_INDEXMEM && node->op != GGML_OP_SET_ROWS && node->op != GGML_OP_FLASH_ATTN_EXT) {
            continue;
        }
        res.push_back(std::string(ggml_op_name(node->op)) + std::to_string(op_kind(node)) + shape_of(node));
        for (int j = 0; j < GGML_MAX_SRC && node->src[j]; ++j) {
            res.back() += shape_of(node->src[j]);
        }
    }
    std::sort(res.begin(), res.end());
    return res;
}

static void compare(fixture & f, const indexmem_params & request, uint32_t n_seq, uint32_t n_tokens, ggml_type type, bool offload) {
    llama_context * ctx = f.context(request, n_seq, type, offload);
    if (!ctx) {
        return;
    }
    const auto & kv = cache_of(ctx);
    CHECK(on_device(f, ctx) == offload);

    ggml_context * asked_ctx = ggml_init({ 4096*ggml_tensor_overhead() + ggml_graph_overhead_custom(4096, false), nullptr, true });
    ggml_cgraph  * asked     = ggml_new_graph_custom(asked_ctx, 4096, false);
    for (const auto & l : kv.get_layers()) {
        for (ggml_tensor * node : indexmem_layer_nodes_of_all(asked_ctx, f.model->hparams, kv, l, n_seq, n_tokens)) {
            ggml_build_forward_expand(asked, node);
        }
    }
    const auto mctx = const_cast<llama_kv_cache_bounded &>(kv).init_full();
    const auto built = list_of(ctx->graph_reserve(n_seq*n_tokens, n_seq, n_seq, mctx.get(), true));
    const auto want  = list_of(asked);
    CHECK(!built.empty());
    CHECK_MSG(built == want, "policy %s, memory %s, %zu nodes asked about, %zu built", kv.get_policy().name,
            request.memory ? request.memory : "off", want.size(), built.size());
    for (size_t i = 0; built != want && i < std::max(built.size(), want.size()); ++i) {
        fprintf(stderr, "  asked %s\n  built %s\n", i < want.size() ? want[i].c_str() : "-", i < built.size() ? built[i].c_str() : "-");
    }
    ggml_free(asked_ctx);
    llama_free(ctx);
}

TEST(what_is_asked_is_what_the_graph_holds) {
    fixture f([](const ggml_tensor *) { return false; });
    for (const auto & [type, offload] : { std::pair<ggml_type, bool>(GGML_TYPE_F16, true), { GGML_TYPE_Q8_0, true }, { GGML_TYPE_F16, false } }) {
        for (const auto & [n_seq, n_tokens] : { std::pair<uint32_t, uint32_t>(1, N_UBATCH), { 1, 1 }, { 3, 1 }, { 3, 5 } }) {
            for (const char * policy : { "streaming", "keydiff", "tova", "snapkv", "expected" }) {
                for (const char * memory : { "off", "centroid" }) {
                    compare(f, request_of(policy, memory), n_seq, n_tokens, type, offload);
                }
            }
            for (int kind = 0; kind < indexmem_indexer_count(); ++kind) {
                for (const char * memory : { "none", "centroid", "residual" }) {
                    write_sidecar(indexmem_indexer_name(kind), memory);
                    compare(f, request_of(nullptr, nullptr, SIDECAR), n_seq, n_tokens, type, offload);
                }
            }
        }
    }
    remove(SIDECAR);
}

static std::vector<float> decode(llama_context * ctx, int n, uint32_t seed) {
    std::mt19937 rng(seed);
    std::vector<float> logits;
    for (int i = 0; i < n; i += 13) {
        llama_batch batch = llama_batch_init(13, 0, 1);
        batch.n_tokens = 13;
        for (int j = 0; j < 13; ++j) {
            batch.token[j]     = (llama_token) (rng() % N_VOCAB);
            batch.pos[j]       = i + j;
            batch.n_seq_id[j]  = 1;
            batch.seq_id[j][0] = 0;
            batch.logits[j]    = j == 12;
        }
        CHECK(llama_decode(ctx, batch) == 0);
        const float * row = llama_get_logits_ith(ctx, -1);
        logits.insert(logits.end(), row, row + N_VOCAB);
        llama_batch_free(batch);
    }
    return logits;
}

static indexmem_stats stats_of(llama_context * ctx) {
    indexmem_stats stats = {};
    stats.struct_size = sizeof(stats);
    CHECK(indexmem_get_stats(ctx, 0, &stats));
    return stats;
}

static uint64_t n_rebases(llama_context * ctx) {
    return stats_of(ctx).n_rebases;
}

// the same text, with the cache there and here
static void compare_logits(fixture & f, const indexmem_params & request, ggml_type type) {
    llama_context * there = f.context(request, 1, type);
    llama_context * here  = f.context(request, 1, type, false);
    CHECK(on_device(f, there) && !on_device(f, here));
    const auto a = decode(there, 260, 1), b = decode(here, 260, 1);
    float worst = 0.0f;
    for (size_t i = 0; i < a.size(); ++i) {
        worst = std::max(worst, std::isfinite(a[i]) ? std::fabs(a[i] - b[i]) : INFINITY);
    }
    CHECK_MSG(worst < 0.01f, "logits differ by %g", worst);
    CHECK(n_rebases(there) == n_rebases(here));
    CHECK((n_rebases(there) > 0) == (request.span < 260));
    llama_free(there);
    llama_free(here);
}

TEST(a_device_computes_what_the_host_does) {
    fixture f([](const ggml_tensor * op) { return op_kind(op) == INDEXMEM_OP_ATTEND; });
    write_sidecar("pairwise", "residual");
    for (const auto & request : { request_of("snapkv"), request_of("expected"), request_of("streaming", "centroid"), request_of(nullptr, nullptr, SIDECAR) }) {
        compare_logits(f, request, GGML_TYPE_F32); // flash attention sums in half precision otherwise
    }
    remove(SIDECAR);
}

// the next n tokens, one by one
static std::vector<float> steps(llama_context * ctx, int n, uint32_t seed) {
    std::mt19937 rng(seed);
    std::vector<float> logits;
    for (int i = 0; i < n; ++i) {
        llama_token token = (llama_token) (rng() % N_VOCAB);
        CHECK(llama_decode(ctx, llama_batch_get_one(&token, 1)) == 0);
        const float * row = llama_get_logits_ith(ctx, -1);
        logits.insert(logits.end(), row, row + N_VOCAB);
    }
    return logits;
}

// Scoring, evicting and neither come back, whichever was before, as graphs of the host do.
TEST(graphs_of_decode_are_built_once) {
    fixture f([](const ggml_tensor * op) { return op_kind(op) == INDEXMEM_OP_ATTEND; });
    write_sidecar("retention", "none");
    for (auto request : { request_of("streaming"), request_of("expected"), request_of("keydiff", "centroid"), request_of(nullptr, nullptr, SIDECAR) }) {
        request.evict_step = 7;
        llama_context * there = f.context(request, 1, GGML_TYPE_F32);
        llama_context * here  = f.context(request, 1, GGML_TYPE_F32, false);
        CHECK(on_device(f, there) && !on_device(f, here));
        decode(there, 156, 6);
        decode(here,  156, 6);
        steps(there, 70, 7);
        steps(here,  70, 7);

        const int      n_reused    = llama_perf_context(there).n_reused;
        const uint64_t n_evictions = stats_of(there).n_evictions;
        const auto a = steps(there, 130, 8), b = steps(here, 130, 8);
        CHECK_MSG(llama_perf_context(there).n_reused == n_reused + 130, "%d graphs of 130 came back", llama_perf_context(there).n_reused - n_reused);
        CHECK(stats_of(there).n_evictions > n_evictions + 5);

        float worst = 0.0f;
        for (size_t i = 0; i < a.size(); ++i) {
            worst = std::max(worst, std::isfinite(a[i]) ? std::fabs(a[i] - b[i]) : INFINITY);
        }
        CHECK_MSG(worst < 0.01f, "logits differ by %g", worst);
        llama_free(there);
        llama_free(here);
    }
    remove(SIDECAR);
}

// where they lie, or on the host if the device cannot
TEST(a_device_turns_keys_as_the_host_does) {
    for (ggml_op lacking : { GGML_OP_COUNT, GGML_OP_ROPE, GGML_OP_GET_ROWS }) {
        fixture f([lacking](const ggml_tensor * op) { return op_kind(op) == INDEXMEM_OP_ATTEND || op->op == lacking; });
        for (auto request : { request_of("snapkv"), request_of("expected"), request_of("streaming", "centroid") }) {
            request.span = 160;
            compare_logits(f, request, GGML_TYPE_F32);
        }
    }
}

static std::vector<uint8_t> state_of(llama_context * ctx) {
    std::vector<uint8_t> res(llama_state_seq_get_size(ctx, 0));
    CHECK(llama_state_seq_get_data(ctx, res.data(), res.size(), 0) == res.size());
    return res;
}

// What is too much leaves on the CPU, wherever cache and weights lie; weights of a device are read again, and turned with the keys.
TEST(a_state_that_does_not_fit_is_fitted_on_the_host) {
    fixture f([](const ggml_tensor * op) { return op_kind(op) == INDEXMEM_OP_ATTEND; });
    write_sidecar("pairwise", "residual");
    for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
        for (auto request : { request_of("snapkv"), request_of("expected"), request_of("streaming", "centroid"), request_of(nullptr, nullptr, SIDECAR) }) {
            request.memory_slots = request.memory ? 8 : 0;
            llama_context * large = f.context(request, 1, type, false);
            decode(large, 260, 5);
            const auto state = state_of(large);
            llama_free(large);

            request.budget = 60;
            llama_context * there = f.context(request, 1, type);
            llama_context * here  = f.context(request, 1, type, false);
            CHECK(on_device(f, there) && !on_device(f, here));
            for (llama_context * ctx : { there, here }) {
                CHECK_MSG(llama_state_seq_set_data(ctx, state.data(), state.size(), 0) > 0, "%s", indexmem_last_error());
            }
            CHECK(state_of(there).size() < state.size() && state_of(there) == state_of(here));
            llama_free(there);
            llama_free(here);
        }
    }
    // and if they are gone, the state is refused with a reason
    auto request = request_of(nullptr, nullptr, SIDECAR);
    llama_context * large = f.context(request);
    decode(large, 260, 5);
    request.budget = 60;
    llama_context * small = f.context(request);
    remove(SIDECAR);
    const auto state = state_of(large);
    CHECK(llama_state_seq_set_data(small, state.data(), state.size(), 0) == 0 && strstr(indexmem_last_error(), SIDECAR));
    llama_free(large);
    llama_free(small);
}

// as Metal's kernels have: numbers that a group of threads has to hold in its 32 KiB
static constexpr size_t GROUP = 32768;

TEST(a_limit_on_what_leaves_at_once) {
    fixture f([](const ggml_tensor * op) {
        return op_kind(op) == INDEXMEM_OP_CENTROID && (8 + 256 + 2*op->src[4]->ne[0])*sizeof(float) > GROUP;
    });
    auto request = request_of("streaming", "centroid");
    request.budget = 5000;
    llama_context * ctx = f.context(request);
    CHECK(on_device(f, ctx));
    llama_free(ctx);

    request.budget_ratio = 0.5; // now as much can leave at once as there is
    ctx = f.context(request);
    CHECK(!on_device(f, ctx));
    decode(ctx, 260, 2);
    llama_free(ctx);

    request.memory = "off"; // and without a memory that is no matter
    ctx = f.context(request);
    CHECK(on_device(f, ctx));
    llama_free(ctx);
}

TEST(a_limit_on_the_features) {
    for (size_t most : { 4, 3 }) {
        fixture f([most](const ggml_tensor * op) { return op_kind(op) == INDEXMEM_OP_RESIDUAL && (size_t) op->ne[0] > most; });
        write_sidecar("kvzap", "residual");
        llama_context * ctx = f.context(request_of(nullptr, nullptr, SIDECAR));
        CHECK(on_device(f, ctx) == (most == 4));
        decode(ctx, 260, 3);
        llama_free(ctx);
        remove(SIDECAR);
    }
}

// what a pairwise indexer computes from its own keys may be computed elsewhere
TEST(not_all_has_to_be_there) {
    fixture f([](const ggml_tensor * op) { return op_kind(op) == INDEXMEM_OP_PAIRWISE || op->op == GGML_OP_MUL_MAT; });
    write_sidecar("pairwise", "none");
    llama_context * ctx = f.context(request_of(nullptr, nullptr, SIDECAR));
    CHECK(on_device(f, ctx));
    decode(ctx, 260, 4);
    llama_free(ctx);
    remove(SIDECAR);
}

TEST(layers_split_by_tensors_are_refused) {
    fixture f([](const ggml_tensor *) { return false; }, LLAMA_SPLIT_MODE_TENSOR);
    auto params = llama_context_default_params();
    params.n_ctx = 256;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    const auto request = request_of("streaming");
    CHECK(indexmem_next_context(&request));
    CHECK(llama_init_from_model(f.model, params) == nullptr);
    CHECK_MSG(strstr(indexmem_last_error(), "split mode"), "%s", indexmem_last_error());
}
