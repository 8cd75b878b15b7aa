// The memory class as programs use it, with a tiny random model written on the spot: long random runs of every operation.
// What the cache keeps and answers is compared with a plain reference by tests/; this program is for the sanitizers, and
// checks the invariants that need no reference.

#include "sidecar_file.h"
#include "test.h"
#include "tiny_model.h"
#include "vectors.h"

#include "ggml-impl.h"
#include "indexmem-ops.h"
#include "indexmem.h"
#include "llama.h"

#include <algorithm>
#include <fstream>
#include <random>
#include <string>
#include <vector>

static constexpr int N_VOCAB = 96, N_EMBD = 64, N_LAYER = 2, N_HEAD = 4, N_HEAD_KV = 2, N_FF = 96;

static std::string write_model() {
    std::mt19937 rng(0);
    std::normal_distribution<float> normal;

    const std::string path = "test-cache-model.gguf";
    write_tiny_model(path, { N_VOCAB, N_EMBD, N_LAYER, N_HEAD, N_HEAD_KV, N_FF, 4096 }, [&](const std::string & name, int64_t) {
        const bool is_norm = name.find("norm") != std::string::npos;
        const bool is_qk   = name.find("attn_q") != std::string::npos || name.find("attn_k") != std::string::npos;
        return is_norm ? 1.0f : normal(rng)*(name == "token_embd.weight" ? 1.0f : is_qk ? 0.3f : 0.1f);
    });
    return path;
}

struct fixture {
    llama_model * model;

    fixture() {
        llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
        llama_backend_init();
        const std::string path = write_model();
        auto params = llama_model_default_params();
        params.n_gpu_layers = 0;
        model = llama_model_load_from_file(path.c_str(), params);
        remove(path.c_str());
    }

    ~fixture() {
        llama_model_free(model);
        llama_backend_free();
    }

    llama_context * context(const indexmem_params & request, uint32_t n_seq, ggml_backend_sched_eval_callback see = nullptr, void * data = nullptr) {
        auto params = llama_context_default_params();
        params.cb_eval           = see;
        params.cb_eval_user_data = data;
        params.n_ctx = 4096;
        params.n_batch = 64;
        params.n_ubatch = 16;
        params.n_seq_max = n_seq;
        params.n_threads = params.n_threads_batch = 2;
        params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
        indexmem_next_context(&request);
        llama_context * ctx = llama_init_from_model(model, params);
        indexmem_next_context(nullptr);
        return ctx;
    }
};

static bool decode(llama_context * ctx, std::mt19937 & rng, llama_seq_id seq, int n) {
    const llama_pos p0 = llama_memory_seq_pos_max(llama_get_memory(ctx), seq) + 1;
    llama_batch batch = llama_batch_init(n, 0, 1);
    batch.n_tokens = n;
    for (int i = 0; i < n; ++i) {
        batch.token[i]     = (llama_token) (rng() % N_VOCAB);
        batch.pos[i]       = p0 + i;
        batch.n_seq_id[i]  = 1;
        batch.seq_id[i][0] = seq;
        batch.logits[i]    = i == n - 1;
    }
    const bool ok = llama_decode(ctx, batch) == 0;
    const float * logits = ok ? llama_get_logits_ith(ctx, -1) : nullptr;
    for (int i = 0; logits && i < N_VOCAB; ++i) {
        CHECK(logits[i] == logits[i]);
    }
    llama_batch_free(batch);
    return ok;
}

static void check(llama_context * ctx, llama_seq_id seq) {
    indexmem_stats stats = {};
    stats.struct_size = sizeof(stats);
    CHECK(indexmem_get_stats(ctx, seq, &stats));
    CHECK(stats.n_kept <= stats.budget);
    CHECK(stats.n_kept + stats.n_evicted == stats.n_seen);
    for (int il = 0; il < N_LAYER; ++il) {
        for (int h = 0; h < indexmem_n_head_kv(ctx, il); ++h) {
            std::vector<int32_t> pos(stats.n_kept);
            CHECK(indexmem_get_positions(ctx, seq, il, h, pos.data(), (int32_t) pos.size()) == (int32_t) stats.n_kept);
            std::sort(pos.begin(), pos.end());
            CHECK(std::adjacent_find(pos.begin(), pos.end()) == pos.end());
            CHECK(pos.empty() || (pos.front() == 0 && pos.back() == (int32_t) stats.n_seen - 1));
        }
    }
}

// a long random run of every operation
static void run_random(fixture & f, indexmem_params request, uint32_t seed) {
    constexpr uint32_t n_seq = 3;

    std::mt19937 rng(seed);
    request.budget = 40;
    request.sinks  = 3;
    request.window = 7;
    request.seed   = 11;
    llama_context * ctx = f.context(request, n_seq);
    CHECK_MSG(ctx != nullptr, "%s", indexmem_last_error());
    if (!ctx) {
        return;
    }
    llama_memory_t mem = llama_get_memory(ctx);

    for (int i = 0; i < 150; ++i) {
        const llama_seq_id a = rng() % n_seq;
        const llama_seq_id b = rng() % n_seq;
        switch (rng() % 8) {
            case 0: case 1: case 2: CHECK(decode(ctx, rng, a, 1 + rng() % 50));               break;
            case 3:                 CHECK(decode(ctx, rng, a, 1));                            break;
            case 4: llama_memory_seq_rm(mem, a, std::max(0, llama_memory_seq_pos_max(mem, a) - (int) (rng() % 5)), -1); break;
            case 5: llama_memory_seq_cp(mem, a, b, -1, -1);                                   break;
            case 6:
                {
                    std::vector<uint8_t> state(llama_state_seq_get_size(ctx, a));
                    CHECK(llama_state_seq_get_data(ctx, state.data(), state.size(), a) == state.size());
                    if (i % 2) {
                        CHECK(llama_state_seq_set_data(ctx, state.data(), state.size(), b) == state.size());
                        break;
                    }
                    // a bit of it flipped: refused, or (in a key or value) accepted and then not trusted
                    state[rng() % state.size()] ^= 1 << rng() % 8;
                    if (llama_state_seq_set_data(ctx, state.data(), state.size(), b) > 0) {
                        llama_memory_seq_rm(mem, b, -1, -1);
                    }
                } break;
            case 7: if (rng() % 4 == 0) { llama_memory_clear(mem, rng() % 2); } else { indexmem_set_pin(ctx, a, rng() % 12); } break;
        }
        for (uint32_t s = 0; s < n_seq; ++s) {
            check(ctx, s);
        }
    }
    llama_free(ctx);
}

TEST(random_operations_under_every_policy) {
    fixture f;
    CHECK(f.model != nullptr);

    for (int policy = 1; policy < indexmem_policy_count(); ++policy) { // all that evict
        auto request = indexmem_default_params();
        request.policy = indexmem_policy_name(policy);
        if (std::string(request.policy) != "indexer") {
            run_random(f, request, policy);
        }
    }
}

TEST(random_operations_with_every_indexer) {
    fixture f;

    for (int kind = 0; kind < indexmem_indexer_count(); ++kind) {
        for (bool small : { false, true }) {
            for (double ratio : { 0.0, 0.5 }) {
                const char * path = "test-cache.indexmem.gguf";
                const std::string bytes = sidecar_file(indexmem_indexer_name(kind), "none", small ? GGML_TYPE_Q8_0 : GGML_TYPE_F16,
                        small, { N_LAYER, N_EMBD, N_HEAD_KV }).bytes();
                std::ofstream(path, std::ios::binary) << bytes;
                auto request = indexmem_default_params();
                request.sidecar      = path;
                request.budget_ratio = ratio;
                run_random(f, request, 100 + kind);
                remove(path);
            }
        }
    }
}

TEST(full_policy_fails_cleanly) {
    fixture f;
    std::mt19937 rng(1);
    auto request = indexmem_default_params();
    request.budget = 40;
    request.sinks  = 3;
    request.window = 7;
    request.policy = "full";
    llama_context * ctx = f.context(request, 1);
    CHECK(decode(ctx, rng, 0, 40));
    CHECK(!decode(ctx, rng, 0, 1));
    check(ctx, 0);
    llama_memory_clear(llama_get_memory(ctx), false);
    CHECK(decode(ctx, rng, 0, 30));
    llama_free(ctx);
}

// nodes of attention in the graphs that were computed
struct attention_nodes {
    int ours = 0, flash = 0, biases = 0;

    static bool see(ggml_tensor * t, bool, void * data) {
        auto & seen = *(attention_nodes *) data;
        const int kind = t->op == GGML_OP_INDEXMEM ? ggml_get_op_params_i32(t, INDEXMEM_PARAM_OP) : -1;
        seen.ours   += kind == INDEXMEM_OP_ATTEND;
        seen.biases += kind == INDEXMEM_OP_BIAS;
        seen.flash  += t->op == GGML_OP_FLASH_ATTN_EXT;
        return false;
    }
};

TEST(flash_attention_where_the_kernels_have_no_vectors) {
    CHECK(cpu_vectors() != "unknown");
    const bool none = cpu_vectors() == "none";

    fixture f;
    for (const char * memory : { "off", "centroid" }) {
        const bool counts = std::string(memory) == "centroid";
        std::mt19937 rng(3);
        auto request = indexmem_default_params();
        request.budget = 60;
        request.sinks  = 3;
        request.window = 7;
        request.memory = memory;
        request.memory_slots = 16;
        attention_nodes seen;
        llama_context * ctx = f.context(request, 2, attention_nodes::see, &seen);
        CHECK(decode(ctx, rng, 0, 100));
        CHECK(decode(ctx, rng, 0, 1));
        check(ctx, 0);
        CHECK((seen.ours   > 0) == !none);
        CHECK((seen.flash  > 0) == none);
        CHECK((seen.biases > 0) == (none && counts));
        llama_free(ctx);
    }
}
