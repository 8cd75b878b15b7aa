#include "indexmem.h"

#include "indexmem-error.h"
#include "indexmem-kv-cache.h"
#include "indexmem-support.h"

#include "llama-context.h"
#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <cstring>
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
};

static thread_local std::string            error_last;
static thread_local indexmem_error         error_last_kind;
static thread_local std::optional<request> request_next;

static void set_error(indexmem_error kind, const std::string & text) {
    error_last_kind = kind;
    error_last      = text;
}

void indexmem_fail(indexmem_error kind, const std::string & text) {
    set_error(kind, text);
    throw std::runtime_error(text);
}

static void clear_error() {
    set_error(INDEXMEM_ERROR_NONE, "");
}

static bool fail(const std::string & text, indexmem_error kind = INDEXMEM_ERROR_PARAMS) {
    set_error(kind, text);
    return false;
}

static llama_kv_cache_bounded * bounded_of(const llama_context * ctx) {
    return ctx ? dynamic_cast<llama_kv_cache_bounded *>(ctx->get_memory()) : nullptr;
}

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
    params.window      = 128;
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
    clear_error();
    request_next.reset();
    if (!params) {
        return true;
    }
    if (params->struct_size != sizeof(*params)) {
        return fail(format("indexmem_params has %u bytes, this library expects %zu: caller and library are of different versions",
                    params->struct_size, sizeof(*params)));
    }
    if (params->budget == 0) {
        return true; // unbounded
    }

    const auto text = [](const char * s) { return std::string(s ? s : ""); };

    llama_kv_cache_bounded::config cfg = {};
    cfg.budget     = params->budget;
    cfg.sinks      = params->sinks;
    cfg.window     = params->window;
    cfg.pin        = params->pin;
    cfg.evict_step = params->evict_step;
    cfg.ratio      = params->budget_ratio;
    cfg.seed       = params->seed;

    const request req = { cfg, text(params->policy), text(params->sidecar), text(params->memory), params->memory_slots };
    if (!req.policy.empty() && indexmem_policy_find(req.policy.c_str()) < 0) {
        return fail(format("unknown policy '%s'; there are: %s", req.policy.c_str(), names_of(indexmem_policy_name).c_str()));
    }
    if (req.sidecar.empty() && req.policy == "indexer") {
        return fail("the policy 'indexer' needs a sidecar with a trained indexer");
    }
    if (!req.memory.empty() && req.memory != "off" && !indexmem_memory_find(req.memory)) {
        return fail(format("unknown memory '%s'; there are: off, %s", req.memory.c_str(), names_of(indexmem_memory_name).c_str()));
    }
    if (req.memory_slots > 0 && (req.memory == "off" || (req.memory.empty() && req.sidecar.empty()))) {
        return fail(format("%u slots for a memory that is off: choose a memory, or leave the number out", req.memory_slots));
    }
    if (!(cfg.ratio >= 0.0 && cfg.ratio <= 1.0)) {
        return fail(format("a budget ratio is a share of the tokens seen, above 0 and at most 1: it is %g", cfg.ratio));
    }
    if (cfg.window == 0) {
        return fail("the window must hold at least the newest token: it is 0");
    }

    const uint64_t min = llama_kv_cache_bounded::budget_min(cfg.sinks, cfg.pin, cfg.window, 0); // the cache knows of its memory
    if (cfg.budget < min) {
        return fail(format("a budget of %u is too small: at least %llu are needed (max(sinks %u, pin %u) + window %u + 1)",
                    cfg.budget, (unsigned long long) min, cfg.sinks, cfg.pin, cfg.window));
    }
    constexpr uint32_t BUDGET_MAX = 1u << 24;
    if (cfg.budget > BUDGET_MAX) {
        return fail(format("a budget of %u is too large: at most %u", cfg.budget, BUDGET_MAX));
    }

    request_next = req;
    return true;
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

llama_memory_i * indexmem_create_memory(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams) {
    if (!request_next) {
        return nullptr;
    }
    const request req = *request_next;
    request_next.reset();

    auto refuse = [](const std::string & reason) {
        indexmem_fail(INDEXMEM_ERROR_PARAMS, reason);
    };

    const std::string reason = indexmem_unsupported_reason(model);
    if (!reason.empty()) {
        indexmem_fail(INDEXMEM_ERROR_MODEL, "no bounded KV cache for this model: " + reason);
    }
    if (params.ctx_type != LLAMA_CONTEXT_TYPE_DEFAULT) {
        refuse("a bounded KV cache is for ordinary contexts, not for draft (MTP) contexts");
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
    llama_kv_cache_bounded::config cfg = req.config;
    try {
        choose_parts(req, model, cparams.offload_kqv, cfg);
    } catch (const indexmem_sidecar_error & err) {
        indexmem_fail(INDEXMEM_ERROR_SIDECAR, err.what());
    }
    try {
        return new llama_kv_cache_bounded(model, params.type_k, params.type_v, cparams.offload_kqv,
                cparams.n_seq_max, cparams.n_ubatch, cfg);
    } catch (const std::exception & err) {
        refuse(err.what());
    }
    return nullptr;
}

const char * indexmem_last_error(void) {
    return error_last.c_str();
}

indexmem_error indexmem_last_error_kind(void) {
    return error_last_kind;
}

bool indexmem_sidecar_check(const char * path, const llama_model * model) {
    clear_error();
    try {
        const indexmem_sidecar sidecar(path);
        if (model) {
            sidecar.check_model(*model);
        }
        return true;
    } catch (const std::exception & err) {
        return fail(err.what(), INDEXMEM_ERROR_SIDECAR);
    }
}

void indexmem_model_fingerprint(const llama_model * model, char out[17]) {
    snprintf(out, 17, "%s", indexmem_fingerprint(*model).c_str());
}

int indexmem_indexer_count(void) {
    int n = 0;
    while (indexmem_indexer_get(n)) {
        ++n;
    }
    return n;
}

const char * indexmem_indexer_name(int i) {
    const auto * info = i < 0 ? nullptr : indexmem_indexer_get(i);
    return info ? info->name : nullptr;
}

const char * indexmem_indexer_help(int i) {
    const auto * info = i < 0 ? nullptr : indexmem_indexer_get(i);
    return info ? info->help : nullptr;
}

int indexmem_memory_count(void) {
    int n = 0;
    while (indexmem_memory_get(n)) {
        ++n;
    }
    return n;
}

const char * indexmem_memory_name(int i) {
    const auto * info = i < 0 ? nullptr : indexmem_memory_get(i);
    return info ? info->name : nullptr;
}

const char * indexmem_memory_help(int i) {
    const auto * info = i < 0 ? nullptr : indexmem_memory_get(i);
    return info ? info->help : nullptr;
}

bool indexmem_model_supported(const llama_model * model, char * reason, size_t reason_size) {
    const std::string text = indexmem_unsupported_reason(*model);
    if (reason && reason_size > 0) {
        snprintf(reason, reason_size, "%s", text.c_str());
    }
    return text.empty();
}

bool indexmem_is_bounded(const llama_context * ctx) {
    return bounded_of(ctx) != nullptr;
}

bool indexmem_get_stats(llama_context * ctx, int32_t seq_id, indexmem_stats * stats) {
    clear_error();

    const auto * kv = bounded_of(ctx);
    if (!kv) {
        return fail("the context has no bounded KV cache");
    }
    const auto * seq = kv->get_seq(seq_id);
    if (!seq) {
        return fail(format("there is no sequence %d (n_seq_max is %u)", seq_id, kv->get_n_seq_max()));
    }
    if (stats->struct_size != sizeof(*stats)) {
        return fail(format("indexmem_stats has %u bytes, this library expects %zu", stats->struct_size, sizeof(*stats)));
    }
    llama_synchronize(ctx);

    stats->budget      = kv->get_config().budget;
    stats->n_slots     = kv->get_n_slots();
    stats->budget_now  = kv->get_budget(*seq) + kv->get_n_latent();
    stats->n_kept      = seq->n_used;
    stats->n_seen      = seq->n_seen;
    stats->n_evicted   = seq->n_seen - seq->n_used;
    stats->sinks       = kv->get_config().sinks;
    stats->window      = kv->get_config().window;
    stats->pin         = seq->pin;
    stats->evict_step  = kv->get_evict_step(*seq);
    stats->kv_bytes    = kv->size_kv_bytes();
    stats->meta_bytes  = kv->size_meta_bytes();
    stats->evict_us    = kv->evict_us;
    stats->n_evictions = seq->n_evictions;

    const auto * sidecar = kv->get_config().sidecar.get();
    const auto * memory  = kv->get_memory();
    stats->memory_slots  = kv->get_n_latent();
    stats->memory_bytes  = kv->size_memory_bytes();
    stats->memory_layers = 0;
    for (const auto & l : kv->get_layers()) {
        stats->memory_layers += memory && memory->enabled(l.il);
    }
    snprintf(stats->memory, sizeof(stats->memory), "%s", memory ? memory->kind() : "off");
    stats->indexer_bytes = kv->size_indexer_bytes();
    stats->sidecar_bytes = sidecar ? sidecar->size_bytes() : 0;
    stats->sidecar_hash  = sidecar ? sidecar->get_hash()   : 0;
    return true;
}

int32_t indexmem_get_positions(llama_context * ctx, int32_t seq_id, int32_t il, int32_t head, int32_t * pos, int32_t capacity) {
    clear_error();

    const auto * kv = bounded_of(ctx);
    if (!kv) {
        fail("the context has no bounded KV cache");
        return -1;
    }
    const auto * seq   = kv->get_seq(seq_id);
    const auto * layer = kv->get_layer(il);
    if (!seq || !layer || head < 0 || head >= layer->k->ne[2]) {
        fail(format("there is no KV head %d in layer %d of sequence %d", head, il, seq_id));
        return -1;
    }
    if (!pos) {
        return (int32_t) seq->n_used;
    }
    if (capacity < (int32_t) seq->n_used) {
        fail(format("room for %d positions, %u are needed", capacity, seq->n_used));
        return -1;
    }
    llama_synchronize(ctx);

    const auto res = kv->get_positions(seq_id, *layer, head);
    std::copy(res.begin(), res.end(), pos);
    return (int32_t) res.size();
}

int32_t indexmem_n_head_kv(const llama_context * ctx, int32_t il) {
    const auto * kv = bounded_of(ctx);
    if (!kv || il < 0 || il >= (int32_t) ctx->get_model().hparams.n_layer()) {
        return -1;
    }
    const auto * layer = kv->get_layer(il);
    return layer ? (int32_t) layer->k->ne[2] : 0;
}

bool indexmem_set_pin(llama_context * ctx, int32_t seq_id, uint32_t n) {
    clear_error();

    auto * kv = bounded_of(ctx);
    if (!kv) {
        return fail("the context has no bounded KV cache");
    }
    std::string error;
    return kv->set_pin(seq_id, n, error) || fail(error);
}

int indexmem_policy_count(void) {
    int n = 0;
    while (indexmem_policy_get(n)) {
        ++n;
    }
    return n;
}

const char * indexmem_policy_name(int i) {
    const auto * info = indexmem_policy_get(i);
    return info ? info->name : nullptr;
}

const char * indexmem_policy_help(int i) {
    const auto * info = indexmem_policy_get(i);
    return info ? info->help : nullptr;
}
