#pragma once

// Contexts whose layers lie on a device that is the CPU in disguise, and what is compared of them. TEST_FILES: how the files of the
// program begin, since several may run at once.

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

constexpr uint32_t N_VOCAB = 96, N_LAYER = 2, N_HEAD = 4, N_HEAD_KV = 2, HEAD = 64, N_UBATCH = 16;
constexpr uint32_t N_EMBD = N_HEAD*HEAD;

constexpr const char * SIDECAR = TEST_FILES ".indexmem.gguf";

inline bool ours(const ggml_tensor * op) { return op->op == GGML_OP_INDEXMEM; }

inline void write_model(const char * path) {
    write_tiny_model(path, { N_VOCAB, N_EMBD, N_LAYER, N_HEAD, N_HEAD_KV, 96, 4096 }, tiny_random(0.1f));
}

inline llama_context * new_context(llama_model * model, const indexmem_params & request, uint32_t n_seq, ggml_type type, bool offload = true) {
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

// of a model on a device
struct fixture {
    fake_device   dev;
    llama_model * model;

    explicit fixture(std::function<bool(const ggml_tensor *)> lacks, llama_split_mode split = LLAMA_SPLIT_MODE_LAYER) : dev(lacks) {
        llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
        const char * path = TEST_FILES "-model.gguf";
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
        return new_context(model, request, n_seq, type, offload);
    }
};

inline llama_kv_cache_bounded & cache_of(llama_context * ctx) {
    return dynamic_cast<llama_kv_cache_bounded &>(*llama_get_memory(ctx));
}

inline bool on_device(const fixture & f, llama_context * ctx) {
    return ggml_backend_buffer_get_type(cache_of(ctx).get_layers()[0].k->buffer) == &f.dev.memory;
}

// without kernels of ours
inline bool stock(llama_context * ctx) { return cache_of(ctx).get_layers()[0].stock; }

inline indexmem_params request_of(const char * policy, const char * memory = nullptr, const char * sidecar = nullptr) {
    auto request = indexmem_default_params();
    request.budget  = 120;
    request.window  = 7;
    request.policy  = policy;
    request.memory  = memory;
    request.sidecar = sidecar;
    return request;
}

inline void write_sidecar(const char * kind, const char * memory) {
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

inline std::string shape_of(const ggml_tensor * t) {
    std::string res = std::string(" ") + ggml_type_name(t->type);
    for (int64_t n : t->ne) {
        res += "," + std::to_string(n);
    }
    return res;
}

// ops, shapes and types of all nodes that a device has to have kernels for
inline std::vector<std::string> list_of(ggml_cgraph * gf) {
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

inline void compare(fixture & f, const indexmem_params & request, uint32_t n_seq, uint32_t n_tokens, ggml_type type, bool offload) {
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

inline std::vector<float> decode(llama_context * ctx, int n, uint32_t seed) {
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

inline indexmem_stats stats_of(llama_context * ctx) {
    indexmem_stats stats = {};
    stats.struct_size = sizeof(stats);
    CHECK(indexmem_get_stats(ctx, 0, &stats));
    return stats;
}

inline uint64_t n_rebases(llama_context * ctx) {
    return stats_of(ctx).n_rebases;
}

// the same text, with the cache there and here
inline void compare_logits(fixture & f, const indexmem_params & request, ggml_type type,
        std::function<void(llama_context * there, llama_context * here)> also = nullptr) {
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
    if (also) {
        also(there, here);
    }
    llama_free(there);
    llama_free(here);
}
