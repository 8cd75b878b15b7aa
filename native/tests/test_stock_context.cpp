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

static void compare_kept_of(llama_seq_id s, llama_context * a, llama_context * b) {
    for (size_t i = 0; i < N_LAYER; ++i) {
        const auto & there = cache_of(a).get_layers()[i];
        const auto & here  = cache_of(b).get_layers()[i];
        CHECK(there.stock && !here.stock);
        for (uint32_t h = 0; h < N_HEAD_KV; ++h) {
            CHECK(cache_of(a).get_positions(s, there, h) == cache_of(b).get_positions(s, here, h));
            CHECK(cache_of(a).get_rotary   (s, there, h) == cache_of(b).get_rotary   (s, here, h));
        }
    }
}

static void compare_kept(llama_context * a, llama_context * b) { compare_kept_of(0, a, b); }

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

// three texts that end one after the other, five tokens of each at a time; the logits behind the last step
static std::vector<float> decode_three(llama_context * ctx) {
    std::mt19937 rng(2);
    for (int i = 0; i < 250; i += 5) {
        llama_batch batch = llama_batch_init(15, 0, 1);
        for (int s = 0; s < 3; ++s) {
            for (int j = 0; j < 5 && i < 250 - 45*s; ++j) {
                const int at = batch.n_tokens++;
                batch.token[at]     = (llama_token) (rng() % N_VOCAB);
                batch.pos[at]       = i + j;
                batch.n_seq_id[at]  = 1;
                batch.seq_id[at][0] = s;
                batch.logits[at]    = j == 4;
            }
        }
        CHECK(llama_decode(ctx, batch) == 0);
        llama_batch_free(batch);
    }
    const float * row = llama_get_logits_ith(ctx, -1);
    return std::vector<float>(row, row + N_VOCAB);
}

TEST(of_several_sequences_each_keeps_what_it_keeps_on_the_host) {
    fixture f(ours);
    for (const char * policy : { "keydiff", "tova", "snapkv", "expected" }) {
        llama_context * there = f.context(request_of(policy), 3, GGML_TYPE_F32);
        llama_context * here  = f.context(request_of(policy), 3, GGML_TYPE_F32, false);
        const auto a = decode_three(there), b = decode_three(here);
        for (llama_seq_id s = 0; s < 3; ++s) {
            compare_kept_of(s, there, here);
        }
        for (size_t i = 0; i < a.size(); ++i) {
            CHECK_MSG(std::fabs(a[i] - b[i]) < 0.01f, "%s: %g, on the host %g", policy, a[i], b[i]);
        }
        llama_free(there);
        llama_free(here);
    }
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
