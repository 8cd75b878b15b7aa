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

// Keeps what is told of the conversations. Only the thread that the context belongs to may ask it, while it does not decode;
// others are told what it said last.
void indexmem_observe(llama_context * ctx, int32_t n_slots);

// of a conversation, for /slots: kept, evicted, ...; null without a budget
common_json indexmem_slot_json(llama_seq_id id);

// the options, for /props; null without a budget
common_json indexmem_props_json(const indexmem_options & options);

// of all conversations, for /metrics: lines of Prometheus; empty without a budget
std::string indexmem_metrics();

// The text of a prompt that its system messages alone decide: what it shares with a prompt of another message of the user. Empty
// without a system message, or when nobody asked for a budget with --kv-pin auto.
std::string indexmem_system_text(const common_chat_templates * templates, common_chat_templates_inputs inputs, const std::string & prompt);

// how many of the first tokens of a prompt are of that text
uint32_t indexmem_count_tokens(const llama_vocab * vocab, const std::string & text, const llama_tokens & prompt);

// Of n drafts behind the next token of a conversation, how many can be taken back without a trace, by the cache (indexmem_draft_room) or
// by putting a copy of its state back. n without a context.
int32_t indexmem_draft_max(const llama_context * ctx, llama_seq_id id, int32_t n, bool copied);

// The first position from which on a conversation can be taken back in the cache and, where the draft model has a budget of its own,
// in that one as well. `draft` may be null.
llama_pos indexmem_pos_min(llama_context * ctx, llama_context * draft, llama_seq_id id);

// Why a conversation cannot have so many tokens pinned: the budget has no room for them. Empty if it can.
std::string indexmem_pin_refusal(const llama_context * ctx, uint32_t n);

// Pins so many tokens, the text of the system messages (0: there are none). Where entries have left already the pin stays what it was.
void indexmem_pin(llama_context * ctx, llama_seq_id id, uint32_t n);
