#pragma once

#include "llama-graph.h"

#include "indexmem-graph.h"
#include "indexmem-mixed.h"

#include <memory>

//
// The inputs of graphs whose layers are of several kinds
//
// They stand where llama.cpp's own stand, and hold the input of the bounded cache in place of that of the full one.
//

// a window, and the bounded cache
class llm_graph_input_iswa_bounded : public llm_graph_input_attn_kv_iswa, public indexmem_bounded_input {
public:
    // mask: of the window
    llm_graph_input_iswa_bounded(const llm_graph_context & graph, const llama_memory_mixed_context * mixed, ggml_tensor * mask);

    void set_input(const llama_ubatch * ubatch) override;

    bool can_reuse(const llm_graph_params & params) override;

    llm_graph_input_attn_bounded & get_bounded() override { return *base; }

private:
    const std::unique_ptr<llm_graph_input_attn_bounded> base;

    const llama_memory_mixed_context * mixed;
};

// a bounded cache of latents (MLA), whose values are the front of its keys
class llm_graph_input_k_bounded : public llm_graph_input_attn_k, public indexmem_bounded_input {
public:
    explicit llm_graph_input_k_bounded(const llm_graph_context & graph);

    void set_input(const llama_ubatch * ubatch) override { base->set_input(ubatch); }

    bool can_reuse(const llm_graph_params & params) override { return base->can_reuse(params); }

    llm_graph_input_attn_bounded & get_bounded() override { return *base; }

private:
    const std::unique_ptr<llm_graph_input_attn_bounded> base;
};

// recurrent states, and one of: T = llm_graph_input_mem_hybrid, with the bounded cache; llm_graph_input_mem_hybrid_k, of latents;
// llm_graph_input_mem_hybrid_iswa, with a window as well
template <typename T, typename A>
class llm_graph_input_hybrid_bounded : public T, public indexmem_bounded_input {
public:
    llm_graph_input_hybrid_bounded(const llama_cparams & cparams, std::unique_ptr<A> attn, std::unique_ptr<llm_graph_input_rs> rs) :
        T(cparams, std::move(attn), std::move(rs), nullptr) {
    }

    void set_input(const llama_ubatch * ubatch) override {
        this->inp_attn->set_input(ubatch);
        this->inp_rs  ->set_input(ubatch);
    }

    bool can_reuse(const llm_graph_params & params) override {
        const auto * mixed = indexmem_mixed_context(params.mctx);
        const bool   same  = mixed && mixed->get_recurrent() && this->inp_attn->can_reuse(params);
        if (!same) {
            return false;
        }
        auto       & rs = *this->inp_rs;
        const auto & recurrent = *mixed->get_recurrent();
        rs.mctx = &recurrent;
        return rs.s_copy->ne[0] == recurrent.get_n_rs() && rs.s_copy_main->ne[0] == params.ubatch.n_seqs &&
            rs.head == recurrent.get_head() && rs.rs_z == recurrent.get_rs_z();
    }

    llm_graph_input_attn_bounded & get_bounded() override { return dynamic_cast<indexmem_bounded_input &>(*this->inp_attn).get_bounded(); }
};
