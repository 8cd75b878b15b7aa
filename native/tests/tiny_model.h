#pragma once

// llama models of a few kilobytes, written on the spot

#include "ggml.h"
#include "gguf.h"

#include <functional>
#include <string>

struct tiny_shape {
    uint32_t n_vocab, n_embd, n_layer, n_head, n_head_kv, n_ff, n_ctx;
};

// value(name, i): the i-th number of a tensor
inline void write_tiny_model(const std::string & path, const tiny_shape & shape,
        const std::function<float(const std::string & name, int64_t i)> & value) {
    ggml_context * ctx  = ggml_init({ 4u << 20, nullptr, false });
    gguf_context * gguf = gguf_init_empty();

    const auto add = [&](const std::string & name, int64_t ne0, int64_t ne1) {
        ggml_tensor * t = ne1 > 0 ? ggml_new_tensor_2d(ctx, GGML_TYPE_F32, ne0, ne1) : ggml_new_tensor_1d(ctx, GGML_TYPE_F32, ne0);
        ggml_set_name(t, name.c_str());
        for (int64_t i = 0; i < ggml_nelements(t); ++i) {
            ((float *) t->data)[i] = value(name, i);
        }
        gguf_add_tensor(gguf, t);
    };
    const int64_t n_embd    = shape.n_embd;
    const int64_t n_embd_kv = n_embd/shape.n_head*shape.n_head_kv;
    add("token_embd.weight",  n_embd, shape.n_vocab);
    add("output_norm.weight", n_embd, 0);
    for (uint32_t il = 0; il < shape.n_layer; ++il) {
        const std::string blk = "blk." + std::to_string(il) + ".";
        add(blk + "attn_norm.weight",   n_embd, 0);
        add(blk + "attn_q.weight",      n_embd, n_embd);
        add(blk + "attn_k.weight",      n_embd, n_embd_kv);
        add(blk + "attn_v.weight",      n_embd, n_embd_kv);
        add(blk + "attn_output.weight", n_embd, n_embd);
        add(blk + "ffn_norm.weight",    n_embd, 0);
        add(blk + "ffn_gate.weight",    n_embd, shape.n_ff);
        add(blk + "ffn_up.weight",      n_embd, shape.n_ff);
        add(blk + "ffn_down.weight",    shape.n_ff, n_embd);
    }

    gguf_set_val_str(gguf, "general.architecture", "llama");
    gguf_set_val_str(gguf, "tokenizer.ggml.model", "no_vocab");
    gguf_set_val_u32(gguf, "llama.vocab_size", shape.n_vocab);
    gguf_set_val_u32(gguf, "llama.context_length", shape.n_ctx);
    gguf_set_val_u32(gguf, "llama.embedding_length", shape.n_embd);
    gguf_set_val_u32(gguf, "llama.block_count", shape.n_layer);
    gguf_set_val_u32(gguf, "llama.feed_forward_length", shape.n_ff);
    gguf_set_val_u32(gguf, "llama.attention.head_count", shape.n_head);
    gguf_set_val_u32(gguf, "llama.attention.head_count_kv", shape.n_head_kv);
    gguf_set_val_u32(gguf, "llama.rope.dimension_count", shape.n_embd/shape.n_head);
    gguf_set_val_f32(gguf, "llama.attention.layer_norm_rms_epsilon", 1e-5f);

    gguf_write_to_file(gguf, path.c_str(), false);
    gguf_free(gguf);
    ggml_free(ctx);
}
