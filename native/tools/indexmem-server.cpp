#include "indexmem-server.h"

#include "indexmem-options.h"
#include "indexmem.h"

#include <algorithm>
#include <mutex>
#include <vector>

static bool stats_of(llama_context * ctx, llama_seq_id id, indexmem_stats & stats) {
    stats = {};
    stats.struct_size = sizeof(stats);
    return ctx && indexmem_is_bounded(ctx) && indexmem_get_stats(ctx, id, &stats);
}

static uint64_t bytes_of(const indexmem_stats & stats) {
    return stats.kv_bytes + stats.meta_bytes + stats.window_bytes + stats.recurrent_bytes;
}

int32_t indexmem_length(llama_context * ctx, int32_t n_trained) {
    indexmem_stats stats;
    return stats_of(ctx, 0, stats) && stats.span > 0 ? INT32_MAX : n_trained;
}

static std::mutex                  told_mutex; // those who ask while a decode is running, or the server sleeps, are other threads
static std::vector<indexmem_stats> told;       // of each conversation

void indexmem_observe(llama_context * ctx, int32_t n_slots) {
    if (!ctx) {
        return; // the server sleeps: what was told stays
    }
    std::vector<indexmem_stats> found(n_slots);
    for (int32_t id = 0; id < n_slots; ++id) {
        if (!stats_of(ctx, id, found[id])) {
            found.clear();
            break;
        }
    }
    const std::lock_guard<std::mutex> lock(told_mutex);
    told = std::move(found);
}

static std::vector<indexmem_stats> observed() {
    const std::lock_guard<std::mutex> lock(told_mutex);
    return told;
}

common_json indexmem_slot_json(llama_seq_id id) {
    const auto slots = observed();
    if ((size_t) id >= slots.size()) {
        return nullptr;
    }
    const auto & stats = slots[id];
    return {
        { "budget",        stats.budget },
        { "kept",          stats.n_kept },
        { "seen",          stats.n_seen },
        { "evicted",       stats.n_evicted },
        { "evictions",     stats.n_evictions },
        { "rebases",       stats.n_rebases },
        { "next_position", stats.next_position },
        { "span",          stats.span },
        { "pin",           stats.pin },
        { "bytes",         bytes_of(stats) }, // of all slots together: it is one buffer
    };
}

common_json indexmem_props_json(const indexmem_options & o) {
    if (o.budget == 0) {
        return nullptr;
    }
    return {
        { "budget",       o.budget },
        { "budget_ratio", o.budget_ratio },
        { "policy",       !o.policy.empty() ? o.policy : o.sidecar.empty() ? "streaming" : "as the sidecar has it" },
        { "sidecar",      o.sidecar },
        { "memory",       o.memory },
    };
}

std::string indexmem_metrics() {
    const auto slots = observed();
    if (slots.empty()) {
        return "";
    }
    uint64_t kept = 0, seen = 0, evicted = 0, rebases = 0;
    for (const auto & stats : slots) {
        kept    += stats.n_kept;
        seen    += stats.n_seen;
        evicted += stats.n_evicted;
        rebases += stats.n_rebases;
    }
    std::string res;
    const auto add = [&](const char * name, const char * help, uint64_t value) {
        const std::string full = std::string("llamacpp:kv_") + name;
        res += "# HELP " + full + " " + help + "\n# TYPE " + full + " gauge\n" + full + " " + std::to_string(value) + "\n";
    };
    add("kept",    "Entries held per KV head, of the conversations in all slots",   kept);
    add("seen",    "Tokens of these conversations",                                 seen);
    add("evicted", "Entries of these conversations that were evicted per KV head",  evicted);
    add("rebases", "Times that entries of these conversations got new positions",   rebases);
    add("bytes",   "Bytes of the cache of all slots; fixed",                        bytes_of(slots[0]));
    return res;
}

std::string indexmem_system_text(const common_chat_templates * templates, common_chat_templates_inputs inputs, const std::string & prompt) {
    size_t n = 0;
    while (n < inputs.messages.size() && (inputs.messages[n].role == "system" || inputs.messages[n].role == "developer")) {
        ++n;
    }
    if (n == 0 || n == inputs.messages.size() || !indexmem_pins_system()) {
        return "";
    }
    common_chat_msg other;
    other.role    = "user";
    other.content = "\x02"; // which nobody types
    inputs.messages.resize(n);
    inputs.messages.push_back(other);
    inputs.add_generation_prompt  = false;
    inputs.continue_final_message = COMMON_CHAT_CONTINUATION_NONE;
    std::string text;
    try {
        text = common_chat_templates_apply(templates, inputs).prompt;
    } catch (const std::exception &) {
        return ""; // a template that wants other messages
    }
    const auto end = std::mismatch(text.begin(), text.end(), prompt.begin(), prompt.end()).first;
    return std::string(text.begin(), end);
}

uint32_t indexmem_count_tokens(const llama_vocab * vocab, const std::string & text, const llama_tokens & prompt) {
    if (text.empty()) {
        return 0;
    }
    const auto tokens = common_tokenize(vocab, text, true, true);
    return (uint32_t) (std::mismatch(tokens.begin(), tokens.end(), prompt.begin(), prompt.end()).first - tokens.begin());
}

int32_t indexmem_draft_max(const llama_context * ctx, llama_seq_id id, int32_t n, bool copied) {
    if (!ctx || n <= 0) {
        return n;
    }
    return (int32_t) (copied ? indexmem_draft_room_copied : indexmem_draft_room)(ctx, id, (uint32_t) n);
}

llama_pos indexmem_pos_min(llama_context * ctx, llama_context * draft, llama_seq_id id) {
    const llama_pos pos = llama_memory_seq_pos_min(llama_get_memory(ctx), id);
    return draft && indexmem_is_bounded(draft) ? std::max(pos, llama_memory_seq_pos_min(llama_get_memory(draft), id)) : pos;
}

std::string indexmem_pin_refusal(const llama_context * ctx, uint32_t n) {
    if (!indexmem_is_bounded(ctx)) {
        return "";
    }
    const uint32_t room = indexmem_pin_room(ctx);
    if (n <= room) {
        return "";
    }
    return "the system prompt, its tools included, has " + std::to_string(n) + " tokens, and of the budget at most " + std::to_string(room) +
        " can be pinned: start the server with a larger --kv-budget, or with --kv-pin 0, which lets the prompt be evicted like other text";
}

void indexmem_pin(llama_context * ctx, llama_seq_id id, uint32_t n) {
    indexmem_stats stats;
    if (indexmem_pins_system() && stats_of(ctx, id, stats) && stats.n_evicted == 0 && stats.pin != n) {
        indexmem_set_pin(ctx, id, n); // there is room: indexmem_pin_refusal
    }
}
