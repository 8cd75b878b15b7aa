// What becomes of a request: one creation uses it up, a dry run does not, and whoever refuses the context leaves a text.

#include "test.h"
#include "tiny_model.h"

#include "indexmem.h"
#include "llama.h"

#include <cstring>

static const tiny_shape SHAPE = { 96, 160, 2, 2, 1, 96, 4096 }; // heads of 80: no block of q8_0 divides them

struct fixture {
    llama_model * model;

    explicit fixture(bool dry = false) {
        llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
        const char * path = "test-request-model.gguf";
        write_tiny_model(path, SHAPE, [](const std::string & name, int64_t i) {
            return name.find("norm") != std::string::npos ? 1.0f : 0.01f*(float) (i % 7 - 3);
        });
        auto params = llama_model_default_params();
        params.n_gpu_layers = 0;
        params.no_alloc     = dry;
        params.load_mode    = dry ? LLAMA_LOAD_MODE_NONE : params.load_mode;
        model = llama_model_load_from_file(path, params);
        CHECK(model != nullptr);
        remove(path);
    }

    ~fixture() { llama_model_free(model); }

    llama_context * context(const std::function<void(llama_context_params &)> & change = {}) {
        auto params = llama_context_default_params();
        params.n_ctx    = 1024;
        params.n_ubatch = 32;
        params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
        if (change) {
            change(params);
        }
        return llama_init_from_model(model, params);
    }
};

static void ask(uint32_t budget = 200) {
    auto request = indexmem_default_params();
    request.budget = budget;
    CHECK(indexmem_next_context(&request));
}

// whether a context is made, and a bounded one
static bool bounded(llama_context * ctx) {
    CHECK(ctx != nullptr);
    CHECK_MSG(strcmp(indexmem_last_error(), "") == 0, "%s", indexmem_last_error());
    const bool res = indexmem_is_bounded(ctx);
    llama_free(ctx);
    return res;
}

TEST(a_request_is_for_one_context) {
    fixture f;
    ask();
    CHECK(bounded(f.context()));
    CHECK(!bounded(f.context()));
}

TEST(a_dry_run_leaves_it_standing) {
    fixture real, dry(true);
    ask();
    CHECK(bounded(dry.context()));
    CHECK(bounded(dry.context()));
    CHECK(bounded(real.context()));
    CHECK(!bounded(real.context()));
    CHECK(!bounded(dry.context()));

    // also one that fails
    ask(100000);
    CHECK(!dry.context([](llama_context_params & params) { params.n_batch = params.n_ubatch = 0; }));
    CHECK(bounded(dry.context()));
    indexmem_next_context(nullptr);
    CHECK(!bounded(real.context()));
}

static void refused(fixture & f, indexmem_error kind, const char * text, const std::function<void(llama_context_params &)> & change) {
    ask();
    CHECK(strcmp(indexmem_last_error(), "") == 0);
    llama_context * ctx = f.context(change);
    CHECK(ctx == nullptr);
    CHECK_MSG(strstr(indexmem_last_error(), text), "'%s' is not in '%s'", text, indexmem_last_error());
    CHECK(indexmem_last_error_kind() == kind);
    CHECK_MSG(!strchr(indexmem_last_error(), '\n'), "more than a line: %s", indexmem_last_error());
    CHECK(!bounded([&] { indexmem_next_context(nullptr); return f.context(); }()));
}

TEST(llama_refuses_before_it_comes_to_the_cache) {
    fixture f;
    const char * text = "refused the context before it came to the bounded KV cache";
    refused(f, INDEXMEM_ERROR_CONTEXT, text, [](llama_context_params & params) { params.type_k = params.type_v = GGML_TYPE_Q8_0; });
    refused(f, INDEXMEM_ERROR_CONTEXT, text, [](llama_context_params & params) { params.n_batch = params.n_ubatch = 0; });
    refused(f, INDEXMEM_ERROR_CONTEXT, text, [](llama_context_params & params) {
        params.type_v = GGML_TYPE_Q8_0;
        params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    });
    ask();
    CHECK(!llama_init_from_model(nullptr, llama_context_default_params()));
    CHECK(strstr(indexmem_last_error(), text));
}

TEST(llama_throws) {
    fixture f;
    refused(f, INDEXMEM_ERROR_CONTEXT, "n_seq_max must be <=", [](llama_context_params & params) { params.n_seq_max = 100000; });
}

TEST(the_cache_refuses) {
    fixture f;
    refused(f, INDEXMEM_ERROR_PARAMS, "flash attention", [](llama_context_params & params) {
        params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    });
    refused(f, INDEXMEM_ERROR_PARAMS, "embeddings", [](llama_context_params & params) { params.embeddings = true; });
}

TEST(a_creation_that_fails_uses_it_up) {
    fixture f;
    ask();
    CHECK(!f.context([](llama_context_params & params) { params.n_batch = params.n_ubatch = 0; }));
    llama_context * ctx = f.context();
    CHECK(ctx && !indexmem_is_bounded(ctx));
    llama_free(ctx);
}

#ifndef __SANITIZE_ADDRESS__ // which ends the program at such a size
TEST(there_is_not_enough_memory) {
    fixture f;
    ask(1u << 24);
    CHECK(!f.context([](llama_context_params & params) {
        params.n_seq_max  = 256; // some petabytes
        params.kv_unified = false;
        params.n_ctx      = 256*1024;
        params.type_k = params.type_v = GGML_TYPE_F32;
    }));
    CHECK_MSG(strstr(indexmem_last_error(), "cannot allocate the bounded KV cache"), "%s", indexmem_last_error());
}
#endif

TEST(without_a_request_nothing_is_said) {
    fixture f;
    indexmem_next_context(nullptr);
    CHECK(!f.context([](llama_context_params & params) { params.n_batch = params.n_ubatch = 0; }));
    CHECK(strcmp(indexmem_last_error(), "") == 0);
}
