#include "indexmem.h"

#include "indexmem-creation.h"
#include "indexmem-error.h"
#include "indexmem-hooks.h"
#include "indexmem-mixed.h"
#include "indexmem-support.h"

#include "llama-context.h"
#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <optional>
#include <stdexcept>

#ifndef INDEXMEM_VERSION
#define INDEXMEM_VERSION "dev"
#endif
#ifndef INDEXMEM_LLAMA_COMMIT
#define INDEXMEM_LLAMA_COMMIT "unknown"
#endif

// state of the calling thread
struct request {
    llama_kv_cache_bounded::config config;
    std::string policy;  // empty = the indexer of the sidecar, without one streaming
    std::string sidecar; // path, empty = none
    std::string memory;  // empty = that of the sidecar
    uint32_t    memory_slots;
    std::string layer_budgets; // empty = "sidecar"
    bool        can_stop = false; // what is computed, so that states that are overwritten need a way back
};

static thread_local std::optional<request> request_next;

int indexmem_api_version(void) {
    return INDEXMEM_API_VERSION;
}

const char * indexmem_build_info(void) {
    return "indexmem-edge " INDEXMEM_VERSION ", llama.cpp of llama-cpp-python 0.3.36 (" INDEXMEM_LLAMA_COMMIT ")";
}

indexmem_params indexmem_default_params(void) {
    indexmem_params params = {};
    params.struct_size = sizeof(params);
    params.sinks       = 4;
    params.span        = INDEXMEM_SPAN_TRAINED;
    return params;
}

// names of a table, for people
template <typename F>
static std::string names_of(F name) {
    std::string res;
    for (int i = 0; name(i); ++i) {
        res += std::string(i ? ", " : "") + name(i);
    }
    return res;
}

bool indexmem_next_context(const indexmem_params * params) {
    indexmem_clear_error();
    request_next.reset();
    if (!params) {
        return true;
    }
    if (params->struct_size != sizeof(*params)) {
        return indexmem_error_is(format("indexmem_params has %u bytes, this library expects %zu: caller and library are of different versions",
                    params->struct_size, sizeof(*params)));
    }
    if (params->budget == 0) {
        return true; // unbounded
    }

    const auto text = [](const char * s) { return std::string(s ? s : ""); };

    llama_kv_cache_bounded::config cfg = {};
    cfg.budget     = params->budget;
    cfg.sinks      = params->sinks;
    cfg.window     = params->window > 0 ? params->window : indexmem_kv_counts::WINDOW_LEAST;
    cfg.pin        = params->pin;
    cfg.evict_step = params->evict_step;
    cfg.ratio      = params->budget_ratio;
    cfg.seed       = params->seed;
    cfg.span       = params->span;
    cfg.window_grows = params->window == 0;
    cfg.span_asked = params->span != 0 && params->span != INDEXMEM_SPAN_TRAINED;

    const request req = { cfg, text(params->policy), text(params->sidecar), text(params->memory), params->memory_slots,
        text(params->layer_budgets) };
    if (!req.policy.empty() && indexmem_policy_find(req.policy.c_str()) < 0) {
        return indexmem_error_is(format("unknown policy '%s'; there are: %s", req.policy.c_str(), names_of(indexmem_policy_name).c_str()));
    }
    if (req.sidecar.empty() && req.policy == "indexer") {
        return indexmem_error_is("the policy 'indexer' needs a sidecar with a trained indexer");
    }
    if (!req.memory.empty() && req.memory != "off" && !indexmem_memory_find(req.memory)) {
        return indexmem_error_is(format("unknown memory '%s'; there are: off, %s", req.memory.c_str(), names_of(indexmem_memory_name).c_str()));
    }
    if (req.memory_slots > 0 && (req.memory == "off" || (req.memory.empty() && req.sidecar.empty()))) {
        return indexmem_error_is(format("%u slots for a memory that is off: choose a memory, or leave the number out", req.memory_slots));
    }
    if (!req.layer_budgets.empty() && req.layer_budgets != "sidecar" && req.layer_budgets != "equal") {
        return indexmem_error_is(format("unknown budgets of layers '%s'; there are: sidecar, equal", req.layer_budgets.c_str()));
    }
    if (!(cfg.ratio >= 0.0 && cfg.ratio <= 1.0)) {
        return indexmem_error_is(format("a budget ratio is a share of the tokens seen, above 0 and at most 1: it is %g", cfg.ratio));
    }

    const uint64_t min = indexmem_kv_counts::budget_min(cfg.sinks, cfg.pin, cfg.window, 0); // the cache knows of its memory
    if (cfg.budget < min) {
        return indexmem_error_is(format("a budget of %u is too small: at least %llu are needed (max(sinks %u, pin %u) + window %u + 1)",
                    cfg.budget, (unsigned long long) min, cfg.sinks, cfg.pin, cfg.window));
    }
    constexpr uint32_t BUDGET_MAX = 1u << 24;
    if (cfg.budget > BUDGET_MAX) {
        return indexmem_error_is(format("a budget of %u is too large: at most %u", cfg.budget, BUDGET_MAX));
    }

    request_next = req;
    return true;
}

indexmem_creation::indexmem_creation(const llama_model * model, bool can_stop) :
    requested(request_next.has_value()), dry(model && model->hparams.no_alloc) {
    if (requested) {
        request_next->can_stop = can_stop;
        indexmem_clear_error();
    }
}

indexmem_creation::~indexmem_creation() {
    if (requested && !dry) {
        request_next.reset();
    }
    if (requested && !done && indexmem_last_error_kind() == INDEXMEM_ERROR_NONE) {
        indexmem_error_is("llama.cpp refused the context before it came to the bounded KV cache: its log says why", INDEXMEM_ERROR_CONTEXT);
    }
}

void indexmem_creation::failed(const char * why) {
    if (requested && indexmem_last_error_kind() == INDEXMEM_ERROR_NONE) {
        indexmem_error_is(format("the context could not be created: %s", why), INDEXMEM_ERROR_CONTEXT);
    }
}

// What ranks and what remembers: fills policy, memory and sidecar.
static void choose_parts(const request & req, const llama_model & model, bool offload, llama_kv_cache_bounded::config & cfg) {
    std::shared_ptr<indexmem_sidecar> sidecar;
    if (!req.sidecar.empty()) {
        sidecar = std::make_shared<indexmem_sidecar>(req.sidecar);
    }
    const bool has_indexer = sidecar && sidecar->get_indexer();
    const auto of_sidecar  = sidecar ? sidecar->get_memory() : nullptr;

    const std::string policy = !req.policy.empty() ? req.policy : has_indexer ? "indexer" : "streaming";
    const std::string kind   = !req.memory.empty() ? req.memory : of_sidecar ? of_sidecar->kind() : "off";

    const bool uses_indexer = policy == "indexer";
    const bool uses_memory  = of_sidecar && kind == of_sidecar->kind();

    if (uses_indexer && !has_indexer) {
        throw indexmem_sidecar_error("the policy 'indexer' needs an indexer, and " + req.sidecar + " has a memory only: choose another policy");
    }
    if (has_indexer && !uses_indexer && !uses_memory) {
        indexmem_fail(INDEXMEM_ERROR_PARAMS, format("the policy '%s' would not use the indexer of the sidecar: leave out one of them",
                    policy.c_str()));
    }

    std::shared_ptr<indexmem_memory> memory;
    if (kind != "off") {
        memory = uses_memory ? of_sidecar : indexmem_memory_find(kind)->make({}, nullptr);
        if (req.memory_slots > 0 && !memory->set_slots(req.memory_slots)) {
            indexmem_fail(INDEXMEM_ERROR_PARAMS, format("the memory '%s' cannot have %u slots", kind.c_str(), req.memory_slots));
        }
    }
    if (uses_indexer || uses_memory) {
        sidecar->load(model, offload, uses_indexer, uses_memory);
        cfg.sidecar = sidecar;
    }
    cfg.policy = indexmem_policy_find(policy.c_str());
    cfg.memory = memory;
}

// positions that the model knows, as it is scaled now; 0 if it does not say
static uint32_t trained_length(const llama_model & model, const llama_cparams & cparams) {
    const auto & hparams = model.hparams;

    // as the file says: of YaRN, llama.cpp writes the length of the first such context into n_ctx_train, for all that follow
    const auto said = model.gguf_kv.find(format("%s.context_length", llm_arch_name(model.arch)));
    double res = said == model.gguf_kv.end() ? hparams.n_ctx_train : atof(said->second.c_str());
    if (cparams.rope_freq_scale > 0.0f && cparams.rope_freq_scale != hparams.rope_freq_scale_train) {
        res = cparams.rope_scaling_type == LLAMA_ROPE_SCALING_TYPE_YARN ? cparams.n_ctx_orig_yarn/(double) cparams.rope_freq_scale :
            res*std::max(1.0f, hparams.rope_freq_scale_train/cparams.rope_freq_scale);
    }
    // factors of the frequencies for short texts are used as long as the context is one
    if (!model.layers.empty() && model.layers[0].rope_short && cparams.n_ctx_seq <= hparams.n_ctx_orig_yarn) {
        res = std::min<double>(res, hparams.n_ctx_orig_yarn);
    }
    return (uint32_t) std::min<double>(res, INT32_MAX);
}

// why keys cannot get new positions, "" if they can as far as it is known before a graph is built
static std::string span_refused(const llama_model & model, const llama_kv_cache_bounded::config & cfg, ggml_type type_k, uint32_t n_ubatch) {
    if (model.pos_embd) {
        return "positions of the model are learned and added to its tokens, keys are not rotated by them: use a span of 0";
    }
    if (cfg.span == 0) {
        return "the model does not say what length it was trained for";
    }
    if (cfg.span > INT32_MAX) {
        return format("a span of %u positions: at most %d", cfg.span, INT32_MAX);
    }
    if ((uint64_t) cfg.budget + n_ubatch > cfg.span) {
        return format("a budget of %u and a ubatch of %u do not fit a span of %u positions: lower one of them, or use a larger span",
                cfg.budget, n_ubatch, cfg.span);
    }
    if (ggml_is_quantized(type_k) && type_k != GGML_TYPE_Q8_0) {
        return format("keys of type %s do not bear being turned again and again: use f16 or q8_0 for K", ggml_type_name(type_k));
    }
    if (cfg.memory && cfg.memory->keyed_state() < 0) {
        return format("what the memory '%s' has taken up cannot follow keys that are turned: use another memory, or a span of 0", cfg.memory->kind());
    }
    return "";
}

// What was asked for, as long as it can be; the default gives way.
static void choose_span(const llama_model & model, const llama_cparams & cparams, ggml_type type_k, llama_kv_cache_bounded::config & cfg) {
    if (cfg.span == 0) {
        return;
    }
    if (!cfg.span_asked) {
        cfg.span = trained_length(model, cparams);
    }
    cfg.span_reason = span_refused(model, cfg, type_k, cparams.n_ubatch);
    if (cfg.span_reason.empty()) {
        return;
    }
    if (cfg.span_asked) {
        indexmem_fail(INDEXMEM_ERROR_PARAMS, cfg.span_reason);
    }
    cfg.span = 0;
}

void indexmem_check_request(const llama_model & model) {
    if (!request_next) {
        return;
    }
    const std::string reason = indexmem_unsupported_reason(model);
    if (!reason.empty()) {
        indexmem_fail(INDEXMEM_ERROR_MODEL, "no bounded KV cache for this model: " + reason);
    }
}

void indexmem_check_made(const llama_model & model, llama_memory_i * made) {
    if (!request_next) {
        return;
    }
    delete made;
    indexmem_fail(INDEXMEM_ERROR_MODEL, format("no bounded KV cache for this model: architecture '%s' has a memory of its own in place of "
                "the ordinary KV cache", llm_arch_name(model.arch)));
}

// What the sidecar says of the budgets of layers and heads, if it is to be followed: it was measured with the ranks of its indexer.
static void choose_budgets(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams,
        const std::function<bool(uint32_t)> & is_bounded, llama_kv_cache_bounded::config & cfg) {
    const auto & hparams = model.hparams;
    if (!cfg.sidecar || cfg.sidecar->get_needs().empty() || strcmp(indexmem_policy_get(cfg.policy)->name, "indexer") != 0) {
        return;
    }
    const auto & of_heads = cfg.sidecar->get_needs();
    std::vector<indexmem_need> needs;
    std::vector<uint64_t>      row_bytes;
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        const uint32_t n_head = hparams.has_kv(il) && is_bounded(il) ? hparams.n_head_kv(il) : 0;
        for (const auto & slice : indexmem_slices_of(il, n_head > 0 ? &of_heads[il*n_head] : nullptr, n_head)) {
            cfg.slices.push_back(slice);
            needs.push_back(of_heads[il*n_head + slice.head]);
            row_bytes.push_back(slice.n_head*(ggml_row_size(params.type_k, hparams.n_embd_head_k(il)) +
                        (hparams.is_mla() ? 0 : ggml_row_size(params.type_v, hparams.n_embd_head_v(il)))));
        }
    }
    auto found = indexmem_budgets_of(cfg, cparams.n_ubatch, cfg.memory ? cfg.memory->n_slots() : 0, needs, row_bytes);
    for (size_t i = 0; i < cfg.slices.size(); ++i) {
        cfg.slices[i].cls = found.classes[i];
    }
    cfg.budgets = std::move(found.budgets);
}

// the bounded cache, and beside it what layers of other kinds need
static llama_memory_i * make_memory(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams,
        const indexmem_layer_kinds & kinds, llama_kv_cache_bounded::config cfg, const request & req) {
    const auto & hparams = model.hparams;

    const bool hybrid = llm_arch_is_hybrid(model.arch);
    const bool slides = hparams.swa_type != LLAMA_SWA_TYPE_NONE;

    const auto attends = [&](uint32_t il) {
        return il < hparams.n_layer() && (kinds.attends ? kinds.attends(il) : !hybrid || !hparams.is_recr(il));
    };
    const auto kind         = [&](uint32_t il) { return indexmem_layer_kind(model, il); };
    const auto is_full      = [&](uint32_t il) { return attends(il) && !(slides && hparams.is_swa(il)); };
    const auto is_window    = [&](uint32_t il) { return attends(il) && slides && hparams.is_swa(il); };
    const auto is_recurrent = [&](uint32_t il) { return kinds.recurrent ? kinds.recurrent(il) : hparams.is_recr(il); };

    // who asks about the model before there is a memory is told the same
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        const bool cached = hparams.has_kv(il) && hparams.n_head_kv(il) > 0;
        const uint32_t made = (cached && is_full(il) ? INDEXMEM_LAYER_BOUNDED : 0) | (cached && is_window(il) ? INDEXMEM_LAYER_WINDOW : 0) |
            (hybrid && is_recurrent(il) ? INDEXMEM_LAYER_RECURRENT : 0);
        if (made != (kind(il) & ~INDEXMEM_LAYER_READS)) {
            indexmem_fail(INDEXMEM_ERROR_MODEL, format("no bounded KV cache for this model: layer %u of architecture '%s' is of another kind (%u) than "
                        "was expected (%u)", il, llm_arch_name(model.arch), made, kind(il)));
        }
    }
    if (req.layer_budgets != "equal") {
        choose_budgets(model, params, cparams, is_full, cfg);
    }
    auto bounded = std::make_unique<llama_kv_cache_bounded>(model, params.type_k, params.type_v, cparams.offload_kqv, cparams.n_seq_max,
            cparams.n_ubatch, cfg, is_full, kinds.reuse);
    bounded->log_made();
    if (!hybrid && !slides) {
        return bounded.release();
    }
    std::unique_ptr<indexmem_window>        window;
    std::unique_ptr<indexmem_recurrent>     recurrent;
    if (slides) {
        window.reset(new indexmem_window(model, params.type_k, params.type_v, cparams.offload_kqv, cparams.n_seq_max, cparams.n_ubatch,
                    is_window, kinds.reuse));
    }
    if (hybrid) {
        // Without a way back llama.cpp chooses the rows of a ubatch, and moves states of other sequences for it, but not their snapshots.
        const bool way_back = req.can_stop || (cparams.n_rs_seq > 0 && cparams.n_seq_max > 2);
        recurrent.reset(new indexmem_recurrent(model, cparams.offload_kqv, cparams.n_seq_max, cparams.n_rs_seq, way_back, is_recurrent));
    }
    return new llama_memory_mixed(std::move(bounded), std::move(window), std::move(recurrent));
}

llama_memory_i * indexmem_create_memory(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams,
        const indexmem_layer_kinds & kinds) {
    if (!request_next) {
        return nullptr;
    }
    const request req = *request_next; // indexmem_creation uses it up

    auto refuse = [](const std::string & reason) {
        indexmem_fail(INDEXMEM_ERROR_PARAMS, reason);
    };

    if (params.ctx_type != LLAMA_CONTEXT_TYPE_DEFAULT) {
        refuse("a bounded KV cache is for ordinary contexts, not for draft (MTP) contexts");
    }
    if (model.split_mode() == LLAMA_SPLIT_MODE_TENSOR) {
        refuse("a bounded KV cache lies whole with its layer: the split mode can be none, layer or row, not tensor");
    }
    if (!cparams.flash_attn) {
        refuse("a bounded KV cache needs flash attention: switch it on");
    }
    if (!cparams.causal_attn) {
        refuse("a bounded KV cache needs causal attention");
    }
    if (cparams.embeddings) {
        refuse("a bounded KV cache does not serve embeddings: use a context without a budget");
    }
    if (cparams.kv_unified && cparams.n_seq_max > 1) {
        refuse(format("a bounded KV cache gives each of the %u sequences a budget of its own: switch kv_unified off", cparams.n_seq_max));
    }
    if (llm_arch_is_hybrid(model.arch) && cparams.n_rs_seq > 0 && cparams.n_ubatch <= cparams.n_rs_seq + 1) {
        refuse(format("states of recurrent layers that %u tokens can be taken out of need ubatches of at least %u tokens, found %u: make n_ubatch "
                    "larger", cparams.n_rs_seq, cparams.n_rs_seq + 2, cparams.n_ubatch));
    }
    llama_kv_cache_bounded::config cfg = req.config;
    try {
        choose_parts(req, model, cparams.offload_kqv, cfg);
    } catch (const indexmem_sidecar_error & err) {
        indexmem_fail(INDEXMEM_ERROR_SIDECAR, err.what());
    }
    choose_span(model, cparams, params.type_k, cfg);
    try {
        return make_memory(model, params, cparams, kinds, cfg, req);
    } catch (const std::exception & err) {
        if (indexmem_last_error_kind() != INDEXMEM_ERROR_NONE) {
            throw;
        }
        refuse(err.what());
    }
    return nullptr;
}
