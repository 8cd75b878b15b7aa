#pragma once

// llama models of a few kilobytes, written on the spot

#include "ggml.h"
#include "gguf.h"

#include <cmath>
#include <functional>
#include <random>
#include <string>
#include <vector>

// value(name, i): the i-th number of a tensor
using tiny_values = std::function<float(const std::string & name, int64_t i)>;

struct tiny_shape {
    uint32_t n_vocab, n_embd, n_layer, n_head, n_head_kv, n_ff, n_ctx;
};

// norms of 1, and else normal numbers
inline tiny_values tiny_random(float scale) {
    return [scale, rng = std::mt19937(0), normal = std::normal_distribution<float>()](const std::string & name, int64_t) mutable {
        return name.find("norm") != std::string::npos ? 1.0f : normal(rng)*scale;
    };
}

// a model file in the making
class tiny_file {
public:
    tiny_file(const std::string & arch, const tiny_shape & s, tiny_values value) :
        arch(arch), value(std::move(value)), ctx(ggml_init({ 4u << 20, nullptr, false })), gguf(gguf_init_empty()) {
        gguf_set_val_str(gguf, "general.architecture", arch.c_str());
        gguf_set_val_str(gguf, "tokenizer.ggml.model", "no_vocab");
        u32("vocab_size",              s.n_vocab);
        u32("context_length",          s.n_ctx);
        u32("embedding_length",        s.n_embd);
        u32("block_count",             s.n_layer);
        u32("feed_forward_length",     s.n_ff);
        u32("attention.head_count",    s.n_head);
        u32("attention.head_count_kv", s.n_head_kv);
        u32("rope.dimension_count",    s.n_embd/s.n_head);
        f32("attention.layer_norm_rms_epsilon", 1e-5f);
    }

    ~tiny_file() {
        gguf_free(gguf);
        ggml_free(ctx);
    }

    tiny_file(const tiny_file &) = delete;

    void u32(const std::string & key, uint32_t x) { gguf_set_val_u32(gguf, (arch + "." + key).c_str(), x); }
    void f32(const std::string & key, float x)    { gguf_set_val_f32(gguf, (arch + "." + key).c_str(), x); }

    // of each layer
    void u32(const std::string & key, const std::vector<uint32_t> & x) {
        gguf_set_arr_data(gguf, (arch + "." + key).c_str(), GGUF_TYPE_UINT32, x.data(), x.size());
    }
    void flags(const std::string & key, const std::vector<uint8_t> & x) {
        gguf_set_arr_data(gguf, (arch + "." + key).c_str(), GGUF_TYPE_BOOL, x.data(), x.size());
    }

    // ne1 0: of one dimension
    void add(const std::string & name, int64_t ne0, int64_t ne1 = 0) {
        ggml_tensor * t = ne1 > 0 ? ggml_new_tensor_2d(ctx, GGML_TYPE_F32, ne0, ne1) : ggml_new_tensor_1d(ctx, GGML_TYPE_F32, ne0);
        ggml_set_name(t, name.c_str());
        for (int64_t i = 0; i < ggml_nelements(t); ++i) {
            ((float *) t->data)[i] = value(name, i);
        }
        gguf_add_tensor(gguf, t);
    }

    // of a layer: a matrix that reads n_in numbers and gives n_out
    void add(uint32_t il, const std::string & name, int64_t n_in, int64_t n_out = 0) {
        add("blk." + std::to_string(il) + "." + name + ".weight", n_in, n_out);
    }

    void write(const std::string & path) const { gguf_write_to_file(gguf, path.c_str(), false); }

private:
    const std::string arch;

    tiny_values value;

    ggml_context * ctx;
    gguf_context * gguf;
};

// three matrices
inline void add_feed_forward(tiny_file & file, uint32_t il, const tiny_shape & s) {
    file.add(il, "ffn_gate", s.n_embd, s.n_ff);
    file.add(il, "ffn_up",   s.n_embd, s.n_ff);
    file.add(il, "ffn_down", s.n_ff,   s.n_embd);
}

inline void add_attention(tiny_file & file, uint32_t il, const tiny_shape & s) {
    const int64_t n_embd_kv = s.n_embd/s.n_head*s.n_head_kv;
    file.add(il, "attn_q",      s.n_embd, s.n_embd);
    file.add(il, "attn_k",      s.n_embd, n_embd_kv);
    file.add(il, "attn_v",      s.n_embd, n_embd_kv);
    file.add(il, "attn_output", s.n_embd, s.n_embd);
}

inline void write_tiny_model(const std::string & path, const tiny_shape & s, const tiny_values & value) {
    tiny_file file("llama", s, value);
    file.add("token_embd.weight",  s.n_embd, s.n_vocab);
    file.add("output_norm.weight", s.n_embd);
    for (uint32_t il = 0; il < s.n_layer; ++il) {
        file.add(il, "attn_norm", s.n_embd);
        add_attention(file, il, s);
        file.add(il, "ffn_norm", s.n_embd);
        add_feed_forward(file, il, s);
    }
    file.write(path);
}

// Four layers. "lfm2": the second and fourth attend, the others have a state. "cohere2": these attend to all, the others to a window
// of four. "gemma4": the same, and the last two read what the two before them have cached.
inline void write_tiny_mixed_model(const std::string & path, const std::string & arch, tiny_shape s, const tiny_values & value) {
    const bool hybrid = arch == "lfm2", shared = arch == "gemma4";

    s.n_layer = 4;
    tiny_file file(arch, s, value);
    if (hybrid) {
        file.u32("attention.head_count_kv", std::vector<uint32_t>{ 0, s.n_head_kv, 0, s.n_head_kv });
        file.u32("shortconv.l_cache", 4);
    } else {
        file.flags("attention.sliding_window_pattern", { 1, 0, 1, 0 });
        file.u32("attention.sliding_window", 4);
        file.f32("attention.layer_norm_epsilon", 1e-5f);
        file.f32("logit_scale", 1.0f);
    }
    const uint32_t n_head_dim = s.n_embd/s.n_head;
    if (shared) {
        file.u32("attention.shared_kv_layers", 2);
        file.u32("embedding_length_per_layer_input", 0);
        for (const char * key : { "key_length", "value_length" }) {
            file.u32(std::string("attention.") + key, n_head_dim);
            file.u32(std::string("attention.") + key + "_swa", n_head_dim);
        }
        file.u32("rope.dimension_count_swa", n_head_dim);
    }
    file.add("token_embd.weight", s.n_embd, s.n_vocab);
    file.add(hybrid ? "token_embd_norm.weight" : "output_norm.weight", s.n_embd);
    if (shared) {
        file.add("rope_freqs.weight", n_head_dim/2);
    }
    for (uint32_t il = 0; il < s.n_layer; ++il) {
        file.add(il, "attn_norm", s.n_embd);
        if (arch != "cohere2") {
            file.add(il, "ffn_norm", s.n_embd);
        }
        if (shared) {
            file.add(il, "post_attention_norm", s.n_embd);
            file.add(il, "post_ffw_norm",       s.n_embd);
        }
        if (hybrid && il % 2 == 0) {
            file.add(il, "shortconv.conv",     4,        s.n_embd);
            file.add(il, "shortconv.in_proj",  s.n_embd, 3*s.n_embd);
            file.add(il, "shortconv.out_proj", s.n_embd, s.n_embd);
        } else {
            add_attention(file, il, s);
        }
        if (arch != "cohere2" && !(hybrid && il % 2 == 0)) {
            file.add(il, "attn_q_norm", n_head_dim);
            file.add(il, "attn_k_norm", n_head_dim);
        }
        add_feed_forward(file, il, s);
    }
    file.write(path);
}
