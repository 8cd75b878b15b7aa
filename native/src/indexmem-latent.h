#pragma once

#include "indexmem-kv-cache.h"

//
// The latent memory of a bounded cache in the compute graph: what is specific to a kind is in native/memories/
//
// Invariants
//   - read only by steps that recall, written only by steps that evict, per layer, and the reading comes first
//   - the slots of a layer that is switched off stay empty: it reads rows that are masked
//
class indexmem_latent {
public:
    // for ubatches that do what the step does
    indexmem_latent(const llama_kv_cache_bounded & kv, const llama_kv_cache_bounded::step & st);

    void set_input();

    // F32 [R, H, n_seq] entries that each slot of the memory stands for, 0 = masked; null if attention reads no slots
    ggml_tensor * build_count(ggml_context * ctx, const llama_kv_cache_bounded::layer & l) const;

    // q F32 [n_embd_k, T, G, H*n_seq], cur F32 [n_embd_v, G, T, H*n_seq] -> the output with the memory's part in it. Some
    // models scale the query and not its products: q_scale undoes that, for memories are trained on the query itself.
    ggml_tensor * build_add(ggml_context * ctx, const llama_kv_cache_bounded::layer & l, ggml_tensor * q, float q_scale, ggml_tensor * cur) const;

    // nodes that write what leaves; k, v: entries of the sequences
    std::vector<ggml_tensor *> build_write(ggml_context * ctx, const llama_kv_cache_bounded::layer & l,
            ggml_tensor * k, ggml_tensor * v, ggml_tensor * plan, ggml_tensor * ctl);

private:
    indexmem_memory_view view(ggml_context * ctx, const llama_kv_cache_bounded::layer & l) const;

    const llama_kv_cache_bounded & kv;
    const indexmem_memory        & memory;

    const uint32_t s0;
    const int64_t  n_seq;
    const bool     recall;

    ggml_tensor * rows = nullptr; // I64 [R] 0, 1, ..., once a layer writes slots
};
