#include "indexmem-support.h"

#include "llama-arch.h"
#include "llama-impl.h"
#include "llama-model.h"

// architectures whose cache is not the ordinary one, whatever the hyperparameters say
const char * indexmem_unsupported_arch(llm_arch arch) {
    if (llm_arch_is_recurrent(arch)) {
        return "a recurrent model: its state has a fixed size already";
    }
    switch (arch) {
        case LLM_ARCH_DREAM:
        case LLM_ARCH_LLADA:
        case LLM_ARCH_LLADA_MOE:
        case LLM_ARCH_RND1:
            return "a diffusion model without a KV cache";
        case LLM_ARCH_MINIMAX_M3:
        case LLM_ARCH_GLM_DSA:
        case LLM_ARCH_GLM5_NEXT:
        case LLM_ARCH_DEEPSEEK32:
        case LLM_ARCH_DEEPSEEK4:
        case LLM_ARCH_DOTS3NOTE:
        case LLM_ARCH_HY_V4:
        case LLM_ARCH_QWEN4EXP:
            return "sparse attention with an indexer of its own";
        case LLM_ARCH_T5:
        case LLM_ARCH_T5ENCODER:
            return "an encoder and relative position buckets";
        case LLM_ARCH_LLAMA_EMBED:
            return "attention without a cache (an encoder)";
        case LLM_ARCH_GROK:
            return "a scale and a soft cap on its attention that flash attention does not have";
        case LLM_ARCH_EAGLE3:
        case LLM_ARCH_DFLASH:
        case LLM_ARCH_GEMMA4_ASSISTANT:
            return "a draft head that shares the cache of another model";
        default:
            return "";
    }
}

// As create_memory of llama-model.cpp divides them; indexmem_create_memory compares.
uint32_t indexmem_layer_kind(const llama_model & model, uint32_t il) {
    const auto & hparams = model.hparams;

    bool attends   = true;
    bool recurrent = false;
    if (llm_arch_is_hybrid(model.arch)) {
        const bool both = model.arch == LLM_ARCH_FALCON_H1;
        const bool only_feed_forward = (model.arch == LLM_ARCH_NEMOTRON_H || model.arch == LLM_ARCH_NEMOTRON_H_MOE) && hparams.n_ff(il) > 0;
        recurrent = (both || hparams.is_recr(il)) && !only_feed_forward;
        attends   = (both || !hparams.is_recr(il)) && !only_feed_forward;
    }
    const bool reads  = attends && !hparams.has_kv(il);
    const bool cached = attends && !reads && hparams.n_head_kv(il) > 0;
    const bool window = hparams.swa_type != LLAMA_SWA_TYPE_NONE && hparams.is_swa(il);

    return (cached && !window ? INDEXMEM_LAYER_BOUNDED : 0) | (cached && window ? INDEXMEM_LAYER_WINDOW : 0) |
        (recurrent ? INDEXMEM_LAYER_RECURRENT : 0) | (reads ? INDEXMEM_LAYER_READS : 0);
}

static std::string reason_without_arch(const llama_model & model) {
    const auto & hparams = model.hparams;

    if (hparams.vocab_only) {
        return "only its vocabulary is loaded";
    }
    if (const std::string what = indexmem_unsupported_arch(model.arch); !what.empty()) {
        return what;
    }
    if (!hparams.causal_attn) {
        return "attention that is not causal (an encoder)";
    }
    if (hparams.f_max_alibi_bias > 0.0f) {
        return "ALiBi position biases, which need the distance to every key";
    }
    if (hparams.router_layer >= 0) {
        return "a router layer behind its last layer, with a cache of its own";
    }
    if (hparams.ple_n_heads > 0) {
        return "n-gram embeddings that read past tokens from the cache";
    }
    if ((model.arch == LLM_ARCH_QWEN3VL || model.arch == LLM_ARCH_QWEN3VLMOE) && hparams.n_deepstack_layers >= hparams.n_layer()) {
        return "parts of images in its last layer, which llama.cpp's graph aborts at"; // an assertion: outputs are fewer than tokens there
    }
    uint32_t kinds = 0;
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        kinds |= indexmem_layer_kind(model, il);
    }
    if (!(kinds & INDEXMEM_LAYER_BOUNDED)) {
        return kinds & INDEXMEM_LAYER_WINDOW ? "windows in all its layers that attend: its cache has a fixed size already" : "no layer with a KV cache";
    }
    return "";
}

std::string indexmem_unsupported_reason(const llama_model & model) {
    const std::string reason = reason_without_arch(model);
    return reason.empty() ? "" : format("architecture '%s' has %s", llm_arch_name(model.arch), reason.c_str());
}
