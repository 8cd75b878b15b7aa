#pragma once

//
// Everything that llama.cpp's patched files call, and nothing else
//
// While a context is made: indexmem_check_request, then indexmem_create_memory where the ordinary KV cache would be made, alone or
// beside recurrent states and windows, then indexmem_check_made. So a bounded cache takes the place of these kinds of memory, and
// an architecture that makes another one is refused, whether anybody thought of it or not.
//

#include "indexmem-graph-cache.h" // a context keeps its graphs in one

#include "llama-memory.h"

#include "ggml.h"

#include <cstdint>
#include <memory>

class  llama_kv_cache_context;
class  llama_memory_recurrent_context;
struct llama_cparams;
struct llama_memory_params;
struct llama_model;
struct llama_ubatch;

struct llm_graph_context;
class  llm_graph_input_attn_kv;
class  llm_graph_input_attn_kv_iswa;
class  llm_graph_input_attn_k;
class  llm_graph_input_mem_hybrid;
class  llm_graph_input_mem_hybrid_k;
class  llm_graph_input_mem_hybrid_iswa;
class  llm_graph_input_i;
class  llm_graph_input_rs;

// Throws std::runtime_error when a bounded cache was asked for and is known to be impossible for the model: before anything
// is allocated, and with a better reason than indexmem_check_made has.
void indexmem_check_request(const llama_model & model);

// which layers attend and which are recurrent, as llama.cpp says it while it makes a memory; null: as the hyperparameters say
struct indexmem_layer_kinds {
    llama_memory_i::layer_filter_cb attends;
    llama_memory_i::layer_filter_cb recurrent;
    llama_memory_i::layer_reuse_cb  reuse; // the layer whose keys and values a layer reads, -1: its own
};

// The memory with a bounded cache asked for by indexmem_next_context(), or null if none was. Throws std::runtime_error when the
// model or the parameters do not allow one.
llama_memory_i * indexmem_create_memory(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams,
        const indexmem_layer_kinds & kinds);

// Throws std::runtime_error, and frees `made`, when a bounded cache was asked for and another memory was made.
void indexmem_check_made(const llama_model & model, llama_memory_i * made);

// nodes and views that a bounded memory adds to a graph at most, 0 for others
uint32_t indexmem_graph_nodes(const llama_memory_i * memory);

// The positions up to which a bounded memory rotates keys, else n_ctx: what frequencies are chosen by.
uint32_t indexmem_rope_length(const llama_memory_i * memory, uint32_t n_ctx);

// The ubatch with the positions that its keys and queries are rotated by; the same one unless the memory is bounded. Valid
// until the next call.
const llama_ubatch * indexmem_rotary_ubatch(const llama_memory_context_i * mctx, const llama_ubatch & ubatch);

// shows the bounded cache, if there is one, what the attention of layer il projects to Q, K and V
void indexmem_tap(const llm_graph_context & graph, ggml_tensor * hidden, int il);

// the same of a model that does not project them in the common place, by the name that it gives to what is read
void indexmem_tap_named(const llm_graph_context & graph, ggml_tensor * cur, const char * name, int il);

// the input of latent attention (MLA) if the memory is bounded, else null
std::unique_ptr<llm_graph_input_attn_k> indexmem_build_attn_inp_k(const llm_graph_context & graph);

// the input of ordinary attention if the memory is bounded, else null
std::unique_ptr<llm_graph_input_attn_kv> indexmem_build_attn_inp(const llm_graph_context & graph);

// Of a memory with a bounded cache: its recurrent states, its window; null if it has none.
const llama_memory_recurrent_context * indexmem_recurrent_of(const llama_memory_context_i * mctx);
const llama_kv_cache_context         * indexmem_window_of   (const llama_memory_context_i * mctx);

// The inputs of models that have those; mask: of the window.
std::unique_ptr<llm_graph_input_attn_kv_iswa>    indexmem_build_attn_inp_iswa  (const llm_graph_context & graph, ggml_tensor * mask);
std::unique_ptr<llm_graph_input_mem_hybrid>      indexmem_build_inp_hybrid     (const llm_graph_context & graph, std::unique_ptr<llm_graph_input_rs> rs);
std::unique_ptr<llm_graph_input_mem_hybrid_k>    indexmem_build_inp_hybrid_k   (const llm_graph_context & graph, std::unique_ptr<llm_graph_input_rs> rs);
std::unique_ptr<llm_graph_input_mem_hybrid_iswa> indexmem_build_inp_hybrid_iswa(const llm_graph_context & graph, std::unique_ptr<llm_graph_input_rs> rs,
        ggml_tensor * mask);

// attention if the input is of a bounded cache, and this a layer that has one, else null
ggml_tensor * indexmem_build_attn(
        const llm_graph_context & graph,
        llm_graph_input_i * inp,
        ggml_tensor * q_cur,
        ggml_tensor * k_cur,
        ggml_tensor * v_cur,
        ggml_tensor * kq_b,
        ggml_tensor * sinks,
        float kq_scale,
        int   il,
        ggml_tensor * v_mla = nullptr); // by which heads make their values of latents

// throws if the memory is bounded: `what` reads the original cache in a way the bounded one does not offer
void indexmem_refuse(const llama_memory_context_i * mctx, const char * what);
