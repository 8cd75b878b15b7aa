#pragma once

//
// What the server says of the bounded cache, and asks of it
//

#include "chat.h"
#include "common.h"
#include "json.h"
#include "llama.h"

#include <cstdint>
#include <string>

struct indexmem_options;
struct llama_vocab;

// Tokens that a conversation can have, as far as its positions go: those that the model was trained for, or without end where the
// cache renews them.
int32_t indexmem_length(llama_context * ctx, int32_t n_trained);

// of a conversation, for /slots: kept, evicted, ...; null without a budget
common_json indexmem_slot_json(llama_context * ctx, llama_seq_id id);

// the options, for /props; null without a budget
common_json indexmem_props_json(const indexmem_options & options);

// of all conversations, for /metrics: lines of Prometheus; empty without a budget
std::string indexmem_metrics(llama_context * ctx, int32_t n_slots);

// the same as it was when it was asked for last, for a server that sleeps
std::string indexmem_last_metrics();

// Throws std::invalid_argument for JSON that is nested so deep that functions which call themselves for each level, of which
// llama.cpp has many, would run out of stack.
void indexmem_check_body(const std::string & body);

// The text of a prompt that its system messages alone decide: what it shares with a prompt of another message of the user. Empty
// without a system message, or when nobody asked for a budget with --kv-pin auto.
std::string indexmem_system_text(const common_chat_templates * templates, common_chat_templates_inputs inputs, const std::string & prompt);

// how many of the first tokens of a prompt are of that text
uint32_t indexmem_count_tokens(const llama_vocab * vocab, const std::string & text, const llama_tokens & prompt);

// Of n drafts behind the next token of a conversation, how many the cache can take back without a trace (indexmem_draft_room). n
// without a context.
int32_t indexmem_draft_max(const llama_context * ctx, llama_seq_id id, int32_t n);

// Why a conversation cannot have so many tokens pinned: the budget has no room for them. Empty if it can.
std::string indexmem_pin_refusal(const llama_context * ctx, uint32_t n);

// Pins so many tokens, the text of the system messages (0: there are none). Where entries have left already the pin stays what it was.
void indexmem_pin(llama_context * ctx, llama_seq_id id, uint32_t n);
