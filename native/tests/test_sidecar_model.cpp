// Sidecars and models: weights that get to where they belong, and sidecars of other models.

#define SIDECAR_PATH "test-sidecar-model.indexmem.gguf"

#include "sidecar_test.h"
#include "tiny_model.h"

#include "llama.h"
#include "llama-model.h"

static constexpr int N_VOCAB = 32, N_EMBD = 32, N_LAYER = 2, N_HEAD = 4, N_HEAD_KV = 2, N_FF = 32;

// `fine_tuned`: one number in one norm is another
static llama_model * make_model(bool fine_tuned, bool no_alloc = false) {
    const std::string path = "test-sidecar-base.gguf";
    write_tiny_model(path, { N_VOCAB, N_EMBD, N_LAYER, N_HEAD, N_HEAD_KV, N_FF, 64 }, [&](const std::string & name, int64_t i) {
        return fine_tuned && i == 3 && name == "blk.1.ffn_norm.weight" ? 1.5f : 1.0f;
    });

    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_backend_init();
    auto params = llama_model_default_params();
    params.n_gpu_layers = 0;
    params.no_alloc     = no_alloc;
    params.load_mode    = LLAMA_LOAD_MODE_NONE;
    llama_model * res = llama_model_load_from_file(path.c_str(), params);
    remove(path.c_str());
    return res;
}

static std::string load_error(const gguf_file & file, const llama_model * model) {
    write(PATH, file.bytes());
    indexmem_sidecar sidecar(PATH);
    try {
        sidecar.load(*model, false, true, true);
    } catch (const indexmem_sidecar_error & err) {
        CHECK(sidecar.size_bytes() == 0);
        return err.what();
    }
    return "";
}

TEST(weights_of_a_model) {
    llama_model * model = make_model(false);
    CHECK(model != nullptr);
    for (const char * kind : KINDS) {
        for (ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
            const auto file = sidecar_file(kind, "residual", type);
            write(PATH, file.bytes());
            indexmem_sidecar sidecar(PATH);
            const bool with_memory = type != GGML_TYPE_F16;
            sidecar.load(*model, type == GGML_TYPE_F32, true, with_memory);
            sidecar.load(*model, type == GGML_TYPE_F32, true, with_memory); // twice is as good as once

            size_t size = 0, n = 0;
            for (const auto & t : file.tensors) {
                const uint32_t il = (uint32_t) (t.name[4] - '0');
                const std::string name = t.name.substr(strlen("blk.0.indexmem."));
                if (name == "phi_proj.weight" && !with_memory) {
                    CHECK(sidecar.get_layer(il).count(name) == 0);
                    continue;
                }
                const ggml_tensor * loaded = sidecar.get_layer(il).at(name);
                std::string data(ggml_nbytes(loaded), '\0');
                ggml_backend_tensor_get(loaded, &data[0], 0, data.size());
                CHECK(data == t.data && loaded->type == t.type && loaded->ne[0] == (int64_t) t.ne[0]);
                CHECK(loaded->ne[1] == (int64_t) (t.ne.size() > 1 ? t.ne[1] : 1) && loaded->ne[2] == (int64_t) (t.ne.size() > 2 ? t.ne[2] : 1));
                size += data.size();
                n++;
            }
            CHECK(sidecar.get_layer(0).size() + sidecar.get_layer(1).size() == n);
            CHECK(sidecar.size_bytes() == size);
        }
    }
    CHECK(load_error(sidecar_file("none", "residual"), model).empty());

    // a file that changes between the check and the reading
    const auto file = sidecar_file("kvzap");
    auto other = file;
    other.tensors[1].data[0] ^= 1;
    for (const std::string & bytes : { other.bytes(), file.bytes() + "x", file.bytes().substr(0, 100), std::string() }) {
        write(PATH, file.bytes());
        indexmem_sidecar sidecar(PATH);
        write(PATH, bytes);
        try {
            sidecar.load(*model, false, true, true);
            CHECK_MSG(false, "a file of %zu bytes, %zu expected", bytes.size(), file.bytes().size());
        } catch (const indexmem_sidecar_error & err) {
            CHECK_MSG(has(err.what(), "has changed"), "%s", err.what());
        }
        remove(PATH.c_str());
        try {
            sidecar.load(*model, false, true, true);
            CHECK_MSG(false, "no file");
        } catch (const indexmem_sidecar_error & err) {
            CHECK_MSG(has(err.what(), "cannot read"), "%s", err.what());
        }
    }
    llama_model_free(model);
}

TEST(sidecars_of_other_models) {
    llama_model * model = make_model(false);
    llama_model * tuned = make_model(true);
    llama_model * dry   = make_model(false, true);
    CHECK(model && tuned && dry);

    auto file = sidecar_file("kvzap");
    file.str("general.architecture", "unknown");
    CHECK(load_error(file, model).empty());
    file.str("general.architecture", "llama");
    file.u32("indexmem.attention.head_count", N_HEAD);
    file.u32("indexmem.attention.key_length", N_EMBD/N_HEAD);
    file.str("indexmem.base_model.norms_fnv1a64", indexmem_fingerprint(*model));
    CHECK(load_error(file, model).empty());
    CHECK(load_error(file, dry).empty());
    CHECK(has(load_error(file, tuned), "--no-fingerprint") && has(load_error(file, tuned), indexmem_fingerprint(*tuned)));

    auto & n_head_kv = model->hparams.n_head_kv_arr[1];
    n_head_kv = 1;
    CHECK(has(load_error(file, model), "2 KV heads in layer 0 and 1 in layer 1"));
    n_head_kv = 0; // a layer without a cache
    CHECK(load_error(file, model).empty());
    n_head_kv = N_HEAD_KV;

    // FNV-1a of the five norms, which are all ones, and of their names
    uint64_t hash = 0xcbf29ce484222325ull;
    for (const char * name : { "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "blk.1.attn_norm.weight", "blk.1.ffn_norm.weight", "output_norm.weight" }) {
        std::string bytes = std::string(name) + '\0';
        for (int i = 0; i < N_EMBD; ++i) {
            bytes += gguf_file::raw(1.0f);
        }
        for (const char c : bytes) {
            hash = (hash ^ (uint8_t) c)*0x100000001b3ull;
        }
    }
    char expected[17];
    snprintf(expected, sizeof(expected), "%016llx", (unsigned long long) hash);
    CHECK(indexmem_fingerprint(*model) == expected);
    CHECK(indexmem_fingerprint(*tuned) != expected);

    auto other = file;
    other.str("general.architecture", "qwen3");
    CHECK(has(load_error(other, model), "architecture 'qwen3', this model has 'llama'"));
    other.str("general.architecture", "\x1b[2J");
    CHECK(has(load_error(other, model), "'\\x1b[2J'"));
    other = file;
    other.u32("indexmem.attention.head_count", 8);
    CHECK(has(load_error(other, model), "attention.head_count 8, this model has 4"));
    other = file;
    other.u32("indexmem.attention.key_length", 64);
    CHECK(has(load_error(other, model), "attention.key_length 64, this model has 8"));

    for (int i = 0; i < 3; ++i) {
        sidecar_shape shape;
        (i == 0 ? shape.n_layer : i == 1 ? shape.n_embd : shape.n_head_kv) = 1;
        const char * names[] = { "block_count 1, this model has 2", "embedding_length 1, this model has 32", "head_count_kv 1, this model has 2" };
        CHECK(has(load_error(sidecar_file("pairwise", "none", GGML_TYPE_F32, false, shape), model), names[i]));
    }
    for (llama_model * m : { model, tuned, dry }) {
        llama_model_free(m);
    }
}
