#pragma once

// Contexts with a bounded cache of every kind that states differ in, of models of a few kilobytes; and what must hold whatever
// bytes are loaded into them.

#include "sidecar_file.h"
#include "tiny_model.h"

#include "indexmem.h"
#include "llama.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

struct state_kind {
    const char * name;
    const char * policy;
    const char * memory;   // null: as in the sidecar
    const char * indexer;  // of a sidecar, null: none
    const char * residual; // memory in that sidecar
    ggml_type    cache;
    double       ratio;
    uint32_t     span;     // 32: full when so many tokens have been seen as in test_state.cpp
    const char * arch;     // of write_tiny_mixed_model, null: all layers attend to everything
};

inline const state_kind STATE_KINDS[] = {
    { "plain",      "streaming", "off",      nullptr,     "none",     GGML_TYPE_F16,  0.0, 0,  nullptr },
    { "ring",       "snapkv",    "off",      nullptr,     "none",     GGML_TYPE_F16,  0.0, 32, nullptr },
    { "centroid",   "keydiff",   "centroid", nullptr,     "none",     GGML_TYPE_F32,  0.0, 32, nullptr },
    { "retention",  "indexer",   nullptr,    "retention", "none",     GGML_TYPE_F16,  0.5, 32, nullptr },
    { "pairwise",   "indexer",   nullptr,    "pairwise",  "residual", GGML_TYPE_BF16, 0.0, INDEXMEM_SPAN_TRAINED, nullptr },
    { "hybrid",     "streaming", "off",      nullptr,     "none",     GGML_TYPE_F16,  0.0, 32, "lfm2" },
    { "window",     "snapkv",    "off",      nullptr,     "none",     GGML_TYPE_F16,  0.0, 32, "cohere2" },
    { "shared",     "keydiff",   "centroid", nullptr,     "none",     GGML_TYPE_F32,  0.0, 32, "gemma4" },
};
inline constexpr int N_STATE_KINDS = sizeof(STATE_KINDS)/sizeof(STATE_KINDS[0]);
inline constexpr int N_PLAIN_KINDS = 5; // the first ones, whose models have layers of one kind

inline constexpr int STATE_N_LAYER = 4; // at most
inline constexpr uint32_t STATE_N_SEQ = 3, STATE_BUDGET = 20, STATE_LARGE = 44, STATE_SINKS = 2, STATE_WINDOW = 4;

using bytes = std::vector<uint8_t>;

class state_contexts {
public:
    // folder: where the files it needs may be written; they are gone when this returns. device: where all layers lie, null: the host
    explicit state_contexts(const std::string & folder, ggml_backend_dev_t device = nullptr) {
        static constexpr tiny_shape shape = { 24, 16, 2, 2, 2, 16, 4096 };

        llama_log_set([](ggml_log_level level, const char * text, void * data) {
            ((state_contexts *) data)->log += level == GGML_LOG_LEVEL_ERROR ? text : "";
        }, this);
        llama_backend_init();

        const std::string path = folder + "test-state-model.gguf";
        for (const auto & kind : STATE_KINDS) {
            if (models.empty() || kind.arch) {
                kind.arch ? write_tiny_mixed_model(path, kind.arch, shape, tiny_random(0.3f)) : write_tiny_model(path, shape, tiny_random(0.3f));
                ggml_backend_dev_t devices[] = { device, nullptr };
                auto params = llama_model_default_params();
                params.devices      = device ? devices : nullptr;
                params.n_gpu_layers = device ? 99 : 0;
                models.push_back(llama_model_load_from_file(path.c_str(), params));
                remove(path.c_str());
            }
            llama_model * model = models.back();
            const std::string sidecar = folder + "test-state.indexmem.gguf";
            if (kind.indexer) {
                const sidecar_shape sizes = { shape.n_layer, shape.n_embd, shape.n_head_kv };
                std::ofstream(sidecar, std::ios::binary) << sidecar_file(kind.indexer, kind.residual, GGML_TYPE_F32, true, sizes).bytes();
            }
            auto request = indexmem_default_params();
            request.budget       = STATE_BUDGET;
            request.sinks        = STATE_SINKS;
            request.window       = STATE_WINDOW;
            request.policy       = kind.policy;
            request.memory       = kind.memory;
            request.memory_slots = kind.memory && kind.memory == std::string("centroid") ? 3 : 0;
            request.budget_ratio = kind.ratio;
            request.span         = kind.span;
            request.sidecar      = kind.indexer ? sidecar.c_str() : nullptr;
            contexts.push_back(make(model, request, kind.cache));
            request.budget = STATE_LARGE;
            request.span   = kind.span > 0 ? INDEXMEM_SPAN_TRAINED : 0;
            large.push_back(make(model, request, kind.cache));
            remove(sidecar.c_str());
        }
    }

    ~state_contexts() {
        for (const auto & list : { contexts, large }) {
            for (llama_context * ctx : list) {
                llama_free(ctx);
            }
        }
        for (llama_model * model : models) {
            llama_model_free(model);
        }
        llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    }

    llama_context * get(int kind) const { return contexts[kind]; }

    llama_context * get_large(int kind) const { return large[kind]; } // the same with a larger budget

    std::string take_log() { return std::exchange(log, {}); } // errors since the last call

private:
    llama_context * make(llama_model * model, const indexmem_params & request, ggml_type cache) {
        auto params = llama_context_default_params();
        params.n_ctx     = 4096;
        params.n_batch   = 32;
        params.n_ubatch  = 8;
        params.n_seq_max = STATE_N_SEQ;
        params.n_threads = params.n_threads_batch = 1;
        params.type_k    = params.type_v = cache;
        params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
        indexmem_next_context(&request);
        llama_context * ctx = model ? llama_init_from_model(model, params) : nullptr;
        indexmem_next_context(nullptr);
        if (!ctx) {
            throw std::runtime_error("no context: " + std::string(indexmem_last_error()) + log);
        }
        return ctx;
    }

    std::vector<llama_model *>   models;
    std::vector<llama_context *> contexts;
    std::vector<llama_context *> large;

    std::string log;
};

inline llama_pos n_seen(llama_context * ctx, llama_seq_id seq) {
    return llama_memory_seq_pos_max(llama_get_memory(ctx), seq) + 1;
}

inline bool decode(llama_context * ctx, llama_seq_id seq, int n, uint32_t seed = 0) {
    const llama_pos p0 = n_seen(ctx, seq);
    llama_batch batch = llama_batch_init(n, 0, 1);
    batch.n_tokens = n;
    for (int i = 0; i < n; ++i) {
        batch.token[i]     = (llama_token) ((seed*7 + 5*(uint32_t) i + (uint32_t) p0) % 24);
        batch.pos[i]       = p0 + i;
        batch.n_seq_id[i]  = 1;
        batch.seq_id[i][0] = seq;
        batch.logits[i]    = i == n - 1;
    }
    const bool ok = llama_decode(ctx, batch) == 0;
    llama_batch_free(batch);
    return ok;
}

// A state may say that it lacks queries, as after text was taken back: what would rank by them is refused then.
inline bool lacks_queries(const std::string & log) {
    return log.find("cannot evict: queries") != std::string::npos;
}

// of a sequence, or (-1) of the context
inline bytes save(llama_context * ctx, llama_seq_id seq) {
    bytes res(seq == -1 ? llama_state_get_size(ctx) : llama_state_seq_get_size(ctx, seq));
    const size_t n = seq == -1 ? llama_state_get_data(ctx, res.data(), res.size())
                               : llama_state_seq_get_data(ctx, res.data(), res.size(), seq);
    if (n != res.size()) {
        throw std::runtime_error("a state has another size than was counted");
    }
    return res;
}

inline bool load(llama_context * ctx, llama_seq_id seq, const uint8_t * data, size_t size) {
    return (seq == -1 ? llama_state_set_data(ctx, data, size) : llama_state_seq_set_data(ctx, data, size, seq)) > 0;
}

inline bool load(llama_context * ctx, llama_seq_id seq, const bytes & state) {
    return load(ctx, seq, state.data(), state.size());
}

// What llama_state_save_file() and llama_state_seq_save_file() put before a state, without tokens. What a buffer with the
// state of a sequence begins with, its magic and id, is not in a file.
inline bytes file_of(llama_seq_id seq, const uint8_t * data, size_t size) {
    const uint32_t head[] = {
        seq == -1 ? (uint32_t) LLAMA_SESSION_MAGIC   : (uint32_t) LLAMA_STATE_SEQ_MAGIC,
        seq == -1 ? (uint32_t) LLAMA_SESSION_VERSION : (uint32_t) LLAMA_STATE_SEQ_VERSION,
        0,
    };
    const size_t n_skip = seq == -1 ? 0 : std::min<size_t>(size, 8);
    bytes res(sizeof(head) + size - n_skip);
    memcpy(res.data(), head, sizeof(head));
    std::copy(data + n_skip, data + size, res.data() + sizeof(head));
    return res;
}

inline bool load_file(llama_context * ctx, llama_seq_id seq, const std::string & path) {
    llama_token token;
    size_t n_tokens = 0;
    return seq == -1 ? llama_state_load_file(ctx, path.c_str(), &token, 1, &n_tokens)
                     : llama_state_seq_load_file(ctx, path.c_str(), seq, &token, 1, &n_tokens) > 0;
}

// what holds of a sequence, whatever cache its state came from
inline void check_counts(llama_context * ctx, llama_seq_id seq) {
    indexmem_stats stats = {};
    stats.struct_size = sizeof(stats);
    if (!indexmem_get_stats(ctx, seq, &stats)) {
        throw std::runtime_error("no stats");
    }
    if (stats.n_kept > stats.budget || stats.n_kept + stats.n_evicted != stats.n_seen ||
            (int64_t) stats.n_seen != n_seen(ctx, seq)) {
        throw std::runtime_error("impossible counts");
    }
    if (stats.next_position > stats.n_seen || (stats.n_rebases == 0 && stats.next_position != stats.n_seen)) {
        throw std::runtime_error("impossible positions");
    }
    for (int il = 0; il < STATE_N_LAYER; ++il) {
        for (int h = 0; h < indexmem_n_head_kv(ctx, il); ++h) {
            std::vector<int32_t> pos(stats.n_kept);
            std::vector<int32_t> rotary(stats.n_kept);
            indexmem_get_positions(ctx, seq, il, h, pos.data(), (int32_t) pos.size());
            indexmem_get_rotary(ctx, seq, il, h, rotary.data(), (int32_t) rotary.size());
            for (size_t i = 0; i < pos.size(); ++i) {
                for (size_t j = 0; j < i; ++j) {
                    if ((pos[i] < pos[j]) != (rotary[i] < rotary[j])) {
                        throw std::runtime_error("rotary positions are in another order");
                    }
                }
                if (rotary[i] < 0 || rotary[i] >= (int64_t) stats.next_position || (stats.n_rebases == 0 && rotary[i] != pos[i])) {
                    throw std::runtime_error("an impossible rotary position");
                }
            }
            std::sort(pos.begin(), pos.end());
            if (std::adjacent_find(pos.begin(), pos.end()) != pos.end()) {
                throw std::runtime_error("a position is there twice");
            }
        }
    }
}

// and what is protected is there, if it came from one of these
inline void check_sequence(llama_context * ctx, llama_seq_id seq) {
    check_counts(ctx, seq);
    for (int il = 0; il < STATE_N_LAYER; ++il) {
        for (int h = 0; h < indexmem_n_head_kv(ctx, il); ++h) {
            std::vector<int32_t> pos(indexmem_get_positions(ctx, seq, il, h, nullptr, 0));
            indexmem_get_positions(ctx, seq, il, h, pos.data(), (int32_t) pos.size());
            std::sort(pos.begin(), pos.end());
            const int32_t n = n_seen(ctx, seq);
            for (int32_t p : { 0, n - 1, n - (int32_t) STATE_WINDOW, (int32_t) STATE_SINKS - 1 }) {
                if (p >= 0 && p < n && !std::binary_search(pos.begin(), pos.end(), p)) {
                    throw std::runtime_error("a protected position is missing");
                }
            }
        }
    }
}
