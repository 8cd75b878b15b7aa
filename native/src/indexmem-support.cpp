#include "indexmem-support.h"

#include "llama-arch.h"
#include "llama-impl.h"
#include "llama-model.h"

// architectures whose cache is not the ordinary one although nothing in the hyperparameters says so
static const char * special_cache(llm_arch arch) {
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
            return "an encoder and relative position buckets";
        case LLM_ARCH_GROK:
            return "a scale and a soft cap on its attention that flash attention does not have";
        case LLM_ARCH_EAGLE3:
        case LLM_ARCH_DFLASH:
        case LLM_ARCH_GEMMA4_ASSISTANT:
            return "a draft head that shares the cache of another model";
        default:
            return nullptr;
    }
}

static std::string reason_without_arch(const llama_model & model) {
    const auto & hparams = model.hparams;

    if (hparams.vocab_only) {
        return "only its vocabulary is loaded";
    }
    if (const char * what = special_cache(model.arch)) {
        return what;
    }
    if (llm_arch_is_recurrent(model.arch)) {
        return "a recurrent model: its state has a fixed size already";
    }
    if (hparams.is_mla()) {
        return "multi-head latent attention (MLA): its cache holds compressed latents, not keys and values of heads";
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
    // of hybrids, the filters that their memory is made with know more
    uint32_t n_full = 0, n_window = 0;
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        if (hparams.has_kv(il) && hparams.n_head_kv(il) > 0) {
            (hparams.is_swa(il) ? n_window : n_full)++;
        }
    }
    if (n_full == 0) {
        return n_window > 0 ? "windows in all its layers: its cache has a fixed size already" : "no layer with a KV cache";
    }
    return "";
}

std::string indexmem_unsupported_reason(const llama_model & model) {
    const std::string reason = reason_without_arch(model);
    return reason.empty() ? "" : format("architecture '%s' has %s", llm_arch_name(model.arch), reason.c_str());
}
