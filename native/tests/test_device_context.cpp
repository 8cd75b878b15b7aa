// Contexts whose layers lie on a device that is the CPU in disguise: what a device is asked about is what the graphs hold, and
// a cache that it cannot compute lies in host memory.

#define TEST_FILES "test-device"
#include "device_context.h"

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
    CHECK(on_device(f, ctx) && !stock(ctx));
    llama_free(ctx);

    request.budget_ratio = 0.5; // now as much can leave at once as there is, which the CPU writes
    ctx = f.context(request);
    CHECK(on_device(f, ctx) && stock(ctx));
    decode(ctx, 260, 2);
    llama_free(ctx);

    request.memory = "off"; // and without a memory that is no matter
    ctx = f.context(request);
    CHECK(on_device(f, ctx) && !stock(ctx));
    llama_free(ctx);
}

TEST(a_limit_on_the_features) {
    for (size_t most : { 4, 3 }) {
        fixture f([most](const ggml_tensor * op) { return op_kind(op) == INDEXMEM_OP_RESIDUAL && (size_t) op->ne[0] > most; });
        write_sidecar("kvzap", "residual");
        llama_context * ctx = f.context(request_of(nullptr, nullptr, SIDECAR));
        CHECK(on_device(f, ctx) && stock(ctx) == (most == 3));
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
