#pragma once

#include "indexmem-latent.h"
#include "indexmem-scoring.h"
#include "indexmem-stock.h"

#include <vector>

//
// The nodes that the bounded cache of a layer adds to a graph
//
// The graph of a model is built with them, and a device is asked about the same ones, without data (indexmem-device.h). So
// what is asked about is what runs.
//
class indexmem_layer_nodes {
public:
    // the most tensors that indexmem_layer_nodes_of_all() makes
    static constexpr size_t N_TENSORS = 512;

    // for n_tokens a sequence, of the sequences [s0, s0 + n_seq)
    indexmem_layer_nodes(ggml_context * ctx, const llama_kv_cache_bounded & kv, const llama_kv_cache_bounded::layer & l,
            uint32_t s0, int64_t n_seq, int64_t n_tokens);

    // puts what is new into its slots, and the latest queries into the ring if there is one (rings: else null);
    // *_cur F32 [n_embd_head, n_head, n_tokens*n_seq]
    std::vector<ggml_tensor *> store(ggml_tensor * k_cur, ggml_tensor * v_cur, ggml_tensor * q_cur, ggml_tensor * slots, ggml_tensor * rings) const;

    // n rows of K or V from row i0 on, (KV head, sequence) as dimension 3
    ggml_tensor * streams(ggml_tensor * t, int64_t n, int64_t i0) const;

    // Attention where there is no kernel of ours, to n_kv rows from row i0 on, q_cur F32 [n_embd_head_k, G*H, T*S] -> F32
    // [n_embd_head_v, G*H, T, S]: as a model without our cache has it, so that devices take the same kernels.
    ggml_tensor * flash_by_token(ggml_tensor * q_cur, int64_t n_kv, int64_t i0, ggml_tensor * mask, float scale, float softcap) const;

    // The same for masks of (KV head, sequence), as beside a memory, whose slots weigh in each head what they do; count: of these slots,
    // or null. `op` is the node that attends, the result, F32 [n_embd_head_v, G, T, H*S], may be made of it.
    ggml_tensor * flash(ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * mask, ggml_tensor * count,
            float scale, float softcap, ggml_tensor *& op) const;

    // The eviction, in the order in which it is computed: ranks, plan, what becomes of those that leave, who moves. Of q_cur the
    // newest query of each sequence is read, by policies that keep no ring. ctl_rotary: for the table of rotary positions, or null.
    // stock: of a layer whose device has no kernels of ours (l.stock), else not read.
    std::vector<ggml_tensor *> evict(ggml_tensor * q_cur, ggml_tensor * ctl, ggml_tensor * ctl_rotary, float scale, float softcap,
            indexmem_latent * latent, indexmem_scoring * scoring, indexmem_stock * stock) const;

private:
    ggml_tensor * entries(ggml_tensor * t) const; // the slots of entries of K or V

    ggml_tensor * rank(ggml_tensor * pos, ggml_tensor * q_cur, ggml_tensor * ctl, float scale, float softcap, indexmem_scoring * scoring,
            indexmem_stock * stock) const;

    ggml_context * ctx;

    const llama_kv_cache_bounded        & kv;
    const llama_kv_cache_bounded::layer & l;

    const uint32_t s0;
    const int64_t  n_seq;
    const int64_t  n_tokens;
};

// What graphs of n_tokens a sequence, of the first n_seq sequences, do with the layer at most: storing, scoring, attending,
// remembering, evicting. Its inputs are tensors without data. A layer that has no memory yet is one of a device.
std::vector<ggml_tensor *> indexmem_layer_nodes_of_all(ggml_context * ctx, const llama_hparams & hparams, const llama_kv_cache_bounded & kv,
        const llama_kv_cache_bounded::layer & l, uint32_t n_seq, uint32_t n_tokens);
