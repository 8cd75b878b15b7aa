// What a model answers with the CPU backend in use: a few greedy tokens, and all logits on the way, for comparing CPUs
// (tests/packaging/test_wheel.py).
//
//     demo_answer MODEL LOGITS [TOKENS]     TOKENS: an earlier answer, whose tokens are read instead of one's own
//
// With a bounded cache so small that the prompt evicts. Prints the variant and the tokens, which are the most likely ones;
// writes the logits as fp32. Few tokens, because emulated CPUs are a hundred times slower.

#include "indexmem.h"
#include "llama.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

static constexpr int N_ANSWER = 6;

static const char * const PROMPT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n";

[[noreturn]] static void fail(const std::string & text) {
    fprintf(stderr, "demo_answer: %s %s\n", text.c_str(), indexmem_last_error());
    exit(EXIT_FAILURE);
}

static std::vector<llama_token> tokenize(const llama_model * model) {
    const std::string text = PROMPT;
    std::vector<llama_token> tokens(text.size());
    const int n = llama_tokenize(llama_model_get_vocab(model), text.data(), (int) text.size(), tokens.data(),
            (int) tokens.size(), false, true);
    tokens.resize(std::max(n, 0));
    return tokens;
}

static llama_context * make_context(llama_model * model) {
    auto params = llama_context_default_params();
    params.n_ctx           = 256;
    params.n_batch         = 64;
    params.n_ubatch        = 16;
    params.n_threads       = params.n_threads_batch = 2;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;

    auto request = indexmem_default_params();
    request.budget = 20;
    request.window = 8;
    request.policy = "streaming"; // the others choose by numbers, which differ a little from CPU to CPU
    request.memory = "centroid";
    request.memory_slots = 4;
    indexmem_next_context(&request);
    llama_context * ctx = llama_init_from_model(model, params);
    if (!ctx) {
        fail("no context:");
    }
    return ctx;
}

int main(int argc, char ** argv) {
    if (argc < 3) {
        fail("MODEL LOGITS [TOKENS]");
    }
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_backend_init();
    const char * variant = indexmem_cpu_variant();
    if (!variant) {
        fail("");
    }
    printf("%s\n", variant);

    auto params = llama_model_default_params();
    params.n_gpu_layers = 0;
    llama_model * model = llama_model_load_from_file(argv[1], params);
    FILE * out = model ? fopen(argv[2], "wb") : nullptr;
    if (!out) {
        fail("cannot read the model, or not write the logits");
    }
    const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));

    llama_context * ctx = make_context(model);
    auto tokens = tokenize(model);
    for (int i = 0; i < N_ANSWER; ++i) {
        if (llama_decode(ctx, llama_batch_get_one(tokens.data(), (int) tokens.size())) != 0) {
            fail("cannot evaluate:");
        }
        const float * logits = llama_get_logits_ith(ctx, -1);
        fwrite(logits, sizeof(float), n_vocab, out);
        const auto best = (llama_token) (std::max_element(logits, logits + n_vocab) - logits);
        printf("%d ", best);
        tokens = { 3 + i < argc ? atoi(argv[3 + i]) : best };
    }
    llama_free(ctx);
    printf("\n");
    llama_model_free(model);
    return fclose(out) == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
