#include "indexmem-options.h"

#include "indexmem.h"

#include "arg.h"
#include "common.h"
#include "log.h"

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

static const int32_t LOGICAL_MAX = 1 << 21; // tokens of a conversation: a limit on positions, not on memory

// a whole number from `least` on, or std::invalid_argument, which the parser of options turns into a message
static int64_t whole(const std::string & name, const std::string & value, int64_t least, int64_t most = INT32_MAX) {
    size_t  used = 0;
    int64_t n    = 0;
    try {
        n = std::stoll(value, &used);
    } catch (const std::exception &) {
        used = 0;
    }
    if (used == 0 || used != value.size() || n < least || n > most) {
        throw std::invalid_argument(string_format("%s must be a whole number from %lld to %lld, found '%s'", name.c_str(),
                    (long long) least, (long long) most, value.c_str()));
    }
    return n;
}

static std::string names(int count, const char * (*name)(int)) {
    std::string res;
    for (int i = 0; i < count; ++i) {
        res += (i > 0 ? ", " : "") + std::string(name(i));
    }
    return res;
}

void indexmem_add_options(common_params_context & context) {
    const auto add = [&](const char * flag, const char * env, const char * hint, const std::string & help,
                         void (*handler)(common_params &, const std::string &)) {
        context.options.push_back(common_arg({ flag }, hint, help, handler).set_env(env));
    };
    add("--kv-budget", "LLAMA_ARG_KV_BUDGET", "N",
        "entries that each KV head of each conversation keeps, however long it gets; 0: all (default: 0)",
        [](common_params & p, const std::string & v) { p.indexmem.budget = (uint32_t) whole("--kv-budget", v, 0); });
    add("--kv-budget-ratio", "LLAMA_ARG_KV_BUDGET_RATIO", "SHARE", "keep no more than this share of the tokens seen, either",
        [](common_params & p, const std::string & v) {
            char * end = nullptr;
            p.indexmem.budget_ratio = strtod(v.c_str(), &end);
            if (end == v.c_str() || *end || !(p.indexmem.budget_ratio > 0 && p.indexmem.budget_ratio <= 1)) {
                throw std::invalid_argument("--kv-budget-ratio must be above 0 and at most 1, found '" + v + "'");
            }
        });
    add("--kv-policy", "LLAMA_ARG_KV_POLICY", "NAME",
        "which entries leave: " + names(indexmem_policy_count(), indexmem_policy_name) + " (default: indexer with a sidecar, else streaming)",
        [](common_params & p, const std::string & v) { p.indexmem.policy = v; });
    add("--indexmem", "LLAMA_ARG_INDEXMEM", "FILE", "sidecar of the model: a trained indexer or memory",
        [](common_params & p, const std::string & v) { p.indexmem.sidecar = v; });
    add("--memory", "LLAMA_ARG_KV_MEMORY", "KIND",
        "what becomes of evicted entries: off, " + names(indexmem_memory_count(), indexmem_memory_name) + " (default: as in the sidecar)",
        [](common_params & p, const std::string & v) { p.indexmem.memory = v; });
    add("--memory-slots", "LLAMA_ARG_KV_MEMORY_SLOTS", "N", "slots of the memory, part of the budget",
        [](common_params & p, const std::string & v) { p.indexmem.memory_slots = (uint32_t) whole("--memory-slots", v, 1); });
    add("--kv-sinks", "LLAMA_ARG_KV_SINKS", "N", "first tokens that are never evicted (default: 4)",
        [](common_params & p, const std::string & v) { p.indexmem.sinks = (int32_t) whole("--kv-sinks", v, 0); });
    add("--kv-window", "LLAMA_ARG_KV_WINDOW", "N", "most recent tokens that are never evicted (default: a quarter of the budget, at least 128)",
        [](common_params & p, const std::string & v) { p.indexmem.window = (int32_t) whole("--kv-window", v, 0); });
    add("--kv-pin", "LLAMA_ARG_KV_PIN", "N|auto", "length of a prefix that is never evicted; auto: the system prompt (default)",
        [](common_params & p, const std::string & v) { p.indexmem.pin = v == "auto" ? -1 : (int32_t) whole("--kv-pin", v, 0); });
    add("--kv-evict-step", "LLAMA_ARG_KV_EVICT_STEP", "N", "entries evicted at once while generating (default: chosen from the budget)",
        [](common_params & p, const std::string & v) { p.indexmem.evict_step = (uint32_t) whole("--kv-evict-step", v, 0); });
    add("--kv-seed", "LLAMA_ARG_KV_SEED", "N", "for policies that draw numbers (default: 0)",
        [](common_params & p, const std::string & v) { p.indexmem.seed = (uint64_t) whole("--kv-seed", v, 0, INT64_MAX); });
    add("--kv-span", "LLAMA_ARG_KV_SPAN", "N",
        "positions that are used before kept keys are rotated to smaller ones; 0: they grow (default: as many as the model was trained for)",
        [](common_params & p, const std::string & v) { p.indexmem.span = whole("--kv-span", v, 0); });
    add("--kv-layer-budgets", "LLAMA_ARG_KV_LAYER_BUDGETS", "sidecar|equal",
        "whether layers share what all may keep as the sidecar of the indexer says, if it does (default: sidecar)",
        [](common_params & p, const std::string & v) { p.indexmem.layer_budgets = v; });
    add("--kv-budget-draft", "LLAMA_ARG_KV_BUDGET_DRAFT", "N", "the same as --kv-budget for the draft model; 0: it keeps all tokens (default: 0)",
        [](common_params & p, const std::string & v) { p.indexmem.draft_budget = (uint32_t) whole("--kv-budget-draft", v, 0); });
}

static bool is_asked(const indexmem_options & o) {
    return o.budget_ratio > 0 || !o.policy.empty() || !o.sidecar.empty() || !o.memory.empty() || o.memory_slots > 0 || o.sinks >= 0 ||
        o.window >= 0 || o.pin >= 0 || o.evict_step > 0 || o.span > 0 || !o.layer_budgets.empty() || o.draft_budget > 0;
}

[[noreturn]] static void stop(const std::string & why) {
    fprintf(stderr, "error: %s\n", why.c_str()); // the log is written by another thread, which does not see the end
    exit(1);
}

static std::atomic<bool> pins_system = false; // in this process, which has one model

bool indexmem_pins_system() {
    return pins_system;
}

bool indexmem_ask(const indexmem_options & o, llama_flash_attn_type & flash_attn) {
    if (o.budget == 0) {
        if (is_asked(o)) {
            stop("options of the bounded cache (--kv-..., --indexmem, --memory) need a --kv-budget");
        }
        return false;
    }
    auto request = indexmem_default_params();
    request.budget       = o.budget;
    request.budget_ratio = o.budget_ratio;
    request.policy       = o.policy.empty()  ? nullptr : o.policy.c_str();
    request.sidecar      = o.sidecar.empty() ? nullptr : o.sidecar.c_str();
    request.memory       = o.memory.empty()  ? nullptr : o.memory.c_str();
    request.memory_slots = o.memory_slots;
    request.sinks        = o.sinks  < 0 ? request.sinks  : o.sinks;
    request.window       = o.window < 0 ? request.window : o.window;
    request.pin          = o.pin    < 0 ? 0 : o.pin;
    request.evict_step   = o.evict_step;
    request.seed         = o.seed;
    request.span         = o.span   < 0 ? request.span : (uint32_t) o.span;
    request.layer_budgets = o.layer_budgets.empty() ? nullptr : o.layer_budgets.c_str();
    if (!indexmem_next_context(&request)) {
        stop(indexmem_last_error());
    }
    if (flash_attn == LLAMA_FLASH_ATTN_TYPE_DISABLED) {
        stop("a --kv-budget needs flash attention: leave -fa out");
    }
    flash_attn = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    return true;
}

void indexmem_prepare(common_params & params) {
    pins_system = params.indexmem.budget > 0 && params.indexmem.pin < 0;
    if (!indexmem_ask(params.indexmem, params.flash_attn_type)) {
        return;
    }
    const bool has_draft = params.speculative.has_dft(), bounded_draft = params.indexmem.draft_budget > 0;
    if (bounded_draft && !has_draft) {
        stop("--kv-budget-draft is for a draft model, and there is none: name it with --model-draft");
    }
    if (has_draft && !bounded_draft && params.n_ctx == 0) {
        stop("the draft model keeps all tokens: give it a --kv-budget-draft, or say with -c how many, of all conversations together");
    }
    params.kv_unified = false; // each conversation has a budget of its own
    params.ctx_shift  = false; // positions are renewed inside of the cache
    if (params.n_ctx == 0) {
        params.n_ctx = LOGICAL_MAX*std::min(std::max(params.n_parallel, 1), 512);
        params.fit_params_min_ctx = UINT32_MAX; // there is no memory to win by less
    }
}

void indexmem_prepare_draft(const indexmem_options & o, llama_context_params & cparams) {
    if (o.draft_budget == 0) {
        return;
    }
    indexmem_options own;
    own.budget = o.draft_budget;
    own.pin    = 0;
    indexmem_ask(own, cparams.flash_attn_type);
}

void indexmem_explain() {
    if (const char * why = indexmem_last_error(); why && *why) {
        LOG_ERR("error: %s\n", why);
    }
}
