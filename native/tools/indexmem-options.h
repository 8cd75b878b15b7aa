#pragma once

//
// The bounded cache in llama.cpp's own programs (server, perplexity, ...): the options have the names that they have elsewhere
//

#include "llama.h"

#include <cstdint>
#include <string>

struct common_params;
struct common_params_context;

struct indexmem_options {
    uint32_t    budget       = 0; // entries per KV head; 0: llama.cpp's own cache
    double      budget_ratio = 0;
    std::string policy;           // empty: the indexer with a sidecar, else streaming
    std::string sidecar;
    std::string memory;           // empty: that of the sidecar
    uint32_t    memory_slots = 0;
    int32_t     sinks        = -1; // -1: the library's default
    int32_t     window       = -1;
    int32_t     pin          = -1; // -1: the system prompt of each conversation
    uint32_t    evict_step   = 0;
    uint64_t    seed         = 0;
    int64_t     span         = -1; // -1: as many positions as the model was trained for
    std::string layer_budgets;    // empty: as the sidecar says
    uint32_t    draft_budget = 0; // of a draft model; 0: it keeps all tokens
};

void indexmem_add_options(common_params_context & context);

// Before a context is made: asks for the bounded cache, if there is a budget, and turns on flash attention, which it needs. Ends the
// program when an option is impossible.
bool indexmem_ask(const indexmem_options & options, llama_flash_attn_type & flash_attn);

// The same for the parameters of most programs, of which the cache needs more.
void indexmem_prepare(common_params & params);

// Before the context of a draft model is made: asks for its own bounded cache, if it is to have one.
void indexmem_prepare_draft(const indexmem_options & options, llama_context_params & cparams);

// whether a budget was asked for, and that the system prompt of each conversation stays
bool indexmem_pins_system();

// After a context could not be made: why, if it was the cache's fault.
void indexmem_explain();
