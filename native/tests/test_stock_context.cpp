// Contexts whose layers lie on a device without kernels of ours, the CPU in disguise: what is kept and answered is what the host keeps and
// answers with the kernels, and a cache that takes more lies in host memory.

#define TEST_FILES "test-stock"
#include "device_context.h"

TEST(what_is_asked_of_a_device_without_our_kernels_is_what_the_graph_holds) {
    fixture f(ours);
    for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
        for (const auto & [n_seq, n_tokens] : { std::pair<uint32_t, uint32_t>(1, N_UBATCH), { 1, 1 }, { 3, 5 } }) {
            for (const char * policy : { "streaming", "keydiff", "tova", "snapkv", "expected" }) {
                compare(f, request_of(policy, "off"),      n_seq, n_tokens, type, true);
                compare(f, request_of(policy, "centroid"), n_seq, n_tokens, type, true);
            }
            write_sidecar("pairwise", "residual");
            compare(f, request_of(nullptr, nullptr, SIDECAR), n_seq, n_tokens, type, true);
        }
    }
    remove(SIDECAR);
}

static void compare_kept(llama_context * a, llama_context * b) {
    for (size_t i = 0; i < N_LAYER; ++i) {
        const auto & there = cache_of(a).get_layers()[i];
        const auto & here  = cache_of(b).get_layers()[i];
        CHECK(there.stock && !here.stock);
        for (uint32_t h = 0; h < N_HEAD_KV; ++h) {
            CHECK(cache_of(a).get_positions(0, there, h) == cache_of(b).get_positions(0, here, h));
            CHECK(cache_of(a).get_rotary   (0, there, h) == cache_of(b).get_rotary   (0, here, h));
        }
    }
}

// Not knorm: keys of one token have one norm but for rounding, and which of them leave depends on that.
TEST(a_device_without_our_kernels_keeps_what_the_host_keeps) {
    fixture f(ours);
    for (uint32_t span : { INDEXMEM_SPAN_TRAINED, 160u }) {
        for (const char * policy : { "streaming", "random", "keydiff", "tova", "snapkv", "expected" }) {
            auto request = request_of(policy, "off");
            request.span = span;
            compare_logits(f, request, GGML_TYPE_F32, compare_kept);
        }
        for (int kind = 0; kind < indexmem_indexer_count(); ++kind) {
            write_sidecar(indexmem_indexer_name(kind), "none");
            auto request = request_of(nullptr, nullptr, SIDECAR);
            request.span = span;
            compare_logits(f, request, GGML_TYPE_F32, compare_kept);
        }
    }
    remove(SIDECAR);
}

// with a memory the CPU writes what leaves, and the device attends to it
TEST(a_device_without_our_kernels_has_a_memory) {
    fixture f(ours);
    write_sidecar("pairwise", "residual");
    for (const auto & request : { request_of("streaming", "centroid"), request_of("snapkv", "centroid"), request_of(nullptr, nullptr, SIDECAR) }) {
        compare_logits(f, request, GGML_TYPE_F32, compare_kept);
    }
    remove(SIDECAR);
}

// types that do not come through fp32 unchanged, and ops of ggml that the device lacks, too
TEST(what_a_device_cannot_compute_lies_on_the_host) {
    for (const auto & [policy, type, lacking] : { std::tuple<const char *, ggml_type, ggml_op>("streaming", GGML_TYPE_IQ4_NL, GGML_OP_COUNT),
            { "snapkv",   GGML_TYPE_F16, GGML_OP_SOFT_MAX },
            { "expected", GGML_TYPE_F16, GGML_OP_SUM_ROWS } }) {
        fixture f([lacking = lacking](const ggml_tensor * op) { return ours(op) || op->op == lacking; });
        llama_context * ctx = f.context(request_of(policy), 1, type);
        CHECK(!on_device(f, ctx) && !stock(ctx));
        decode(ctx, 260, 7);
        llama_free(ctx);
    }
}
