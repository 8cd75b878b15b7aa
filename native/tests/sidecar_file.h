#pragma once

// sidecars written byte by byte, right and wrong ones

#include "ggml.h"
#include "gguf.h"
#include "indexer.h"

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

struct gguf_file {
    struct key_value {
        std::string key;
        std::string bytes; // type and value
    };
    struct tensor {
        std::string           name;
        std::vector<uint64_t> ne;
        int32_t               type;
        std::string           data;
        int64_t               offset; // -1: after the one before
    };

    std::vector<key_value> keys;
    std::vector<tensor>    tensors;

    uint64_t n_keys    = UINT64_MAX; // what the header claims, if not the truth
    uint64_t n_tensors = UINT64_MAX;
    uint32_t version   = GGUF_VERSION;
    size_t   align     = GGUF_DEFAULT_ALIGNMENT;

    template <typename T>
    static std::string raw(T value) { return std::string((const char *) &value, sizeof(value)); }

    static std::string raw(const std::string & value) { return raw<uint64_t>(value.size()) + value; }

    void set(const std::string & key, const std::string & bytes) {
        for (auto & kv : keys) {
            if (kv.key == key) {
                kv.bytes = bytes;
                return;
            }
        }
        keys.push_back({ key, bytes });
    }
    void u32 (const std::string & key, uint32_t value) { set(key, raw<int32_t>(GGUF_TYPE_UINT32)  + raw(value)); }
    void f32 (const std::string & key, float value)    { set(key, raw<int32_t>(GGUF_TYPE_FLOAT32) + raw(value)); }
    void flag(const std::string & key, bool value)     { set(key, raw<int32_t>(GGUF_TYPE_BOOL)    + raw<int8_t>(value)); }
    void str (const std::string & key, const std::string & value) { set(key, raw<int32_t>(GGUF_TYPE_STRING) + raw(value)); }

    // elements as bytes
    void array(const std::string & key, int32_t type, const std::vector<std::string> & values) {
        std::string bytes = raw<int32_t>(GGUF_TYPE_ARRAY) + raw(type) + raw<uint64_t>(values.size());
        for (const auto & value : values) {
            bytes += value;
        }
        set(key, bytes);
    }

    void remove(const std::string & key) {
        for (size_t i = 0; i < keys.size(); ++i) {
            if (keys[i].key == key) {
                keys.erase(keys.begin() + i);
                return;
            }
        }
    }

    tensor & find(const std::string & name) {
        for (auto & t : tensors) {
            if (t.name == name) {
                return t;
            }
        }
        abort();
    }

    std::string header() const {
        std::string res = "GGUF" + raw(version);
        res += raw<uint64_t>(n_tensors == UINT64_MAX ? tensors.size() : n_tensors);
        res += raw<uint64_t>(n_keys    == UINT64_MAX ? keys.size()    : n_keys);
        for (const auto & kv : keys) {
            res += raw(kv.key) + kv.bytes;
        }
        uint64_t offset = 0;
        for (const auto & t : tensors) {
            res += raw(t.name) + raw<uint32_t>(t.ne.size());
            for (uint64_t n : t.ne) {
                res += raw(n);
            }
            res += raw(t.type) + raw<uint64_t>(t.offset >= 0 ? t.offset : offset);
            offset += GGML_PAD(t.data.size(), align);
        }
        res.resize(GGML_PAD(res.size(), align));
        return res;
    }

    std::string bytes() const {
        std::string res = header();
        for (const auto & t : tensors) {
            res += t.data;
            res.resize(GGML_PAD(res.size(), align));
        }
        return res;
    }
};

// small numbers, of any of the types a matrix may have
inline std::string tensor_data(ggml_type type, int64_t n, uint32_t seed) {
    std::string res;
    for (int64_t i = 0; i < n; ++i) {
        seed = seed*1664525 + 1013904223;
        const float x = (float) (seed >> 8)/(1 << 24) - 0.5f;
        switch (type) {
            case GGML_TYPE_F32: res += gguf_file::raw(x); break;
            case GGML_TYPE_F16: res += gguf_file::raw(ggml_fp32_to_fp16(x)); break;
            default: // Q8_0
                if (i % 32 == 0) {
                    res += gguf_file::raw(ggml_fp32_to_fp16(0.01f));
                }
                res += gguf_file::raw((int8_t) (x*100));
        }
    }
    return res;
}

struct sidecar_shape {
    uint32_t n_layer   = 2;
    uint32_t n_embd    = 32;
    uint32_t n_head_kv = 2;
};

// A whole sidecar. The shapes of its tensors are written here once more, so that they are compared with those of the code.
inline gguf_file sidecar_file(const std::string & kind, const std::string & memory = "none", ggml_type matrix = GGML_TYPE_F32,
                              bool small = false, const sidecar_shape & shape = {}) {
    gguf_file res;
    res.str("general.type", "adapter");
    res.str("general.architecture", "llama");
    res.str("adapter.type", "indexmem");
    res.u32("indexmem.schema_version", 1);
    res.u32("indexmem.block_count", shape.n_layer);
    res.u32("indexmem.embedding_length", shape.n_embd);
    res.u32("indexmem.attention.head_count_kv", shape.n_head_kv);
    res.str("indexmem.indexer.kind", kind);
    res.str("indexmem.indexer.input", "attention_input");
    res.str("indexmem.memory.kind", memory);
    res.str("indexmem.provenance.tool", "test");
    res.str("indexmem.provenance.source_format", "indexmem");
    for (const char * key : { "indexmem.provenance.source_files", "indexmem.provenance.source_sha256" }) {
        res.array(key, GGUF_TYPE_STRING, { gguf_file::raw(std::string("a")) });
    }

    struct spec { std::string name; std::vector<uint64_t> ne; bool matrix; };
    std::vector<spec> specs;

    const uint64_t d = shape.n_embd, H = shape.n_head_kv, w = small ? d : 32;
    if (kind == "retention") {
        res.str ("indexmem.retention.trunk", small ? "linear" : "mlp");
        res.u32 ("indexmem.retention.mid_dim", small ? 0 : (uint32_t) w);
        res.f32 ("indexmem.retention.norm_eps", 1e-5f);
        res.f32 ("indexmem.retention.pos_slope", 0.5f);
        res.f32 ("indexmem.retention.age_scale", 100.0f);
        res.flag("indexmem.retention.decay", !small);
        specs = { { "in_norm.weight", { d }, false }, { "in_norm.bias", { d }, false }, { "magnitude_proj.weight", { w, H }, false } };
        if (!small) {
            specs.insert(specs.end(), {
                { "input_proj.weight", { d, w }, true }, { "mid_norm.weight", { w }, false }, { "mid_norm.bias", { w }, false },
                { "retention_proj.weight", { w, H }, false }, { "retention_proj.bias", { H }, false } });
        }
    } else if (kind == "kvzap") {
        res.u32("indexmem.kvzap.mid_dim", small ? 0 : (uint32_t) w);
        specs = { { "out_proj.weight", { w, H }, false }, { "out_proj.bias", { H }, false } };
        if (!small) {
            specs.insert(specs.end(), { { "in_proj.weight", { d, w }, true }, { "in_proj.bias", { w }, false } });
        }
    } else if (kind == "fast_kvzip") {
        res.u32("indexmem.fast_kvzip.group_count", 2);
        res.u32("indexmem.fast_kvzip.dim", 4);
        res.u32("indexmem.fast_kvzip.base_count", 3);
        res.f32("indexmem.fast_kvzip.norm_eps", 1e-6f);
        specs = {
            { "q_proj.weight", { d, H*2*4 }, true }, { "q_proj.bias", { H*2*4 }, false }, { "k_proj.weight", { d, H*4 }, true },
            { "q_norm.weight", { 4 }, false }, { "k_norm.weight", { 4 }, false }, { "k_base", { 4, 3, H }, false }, { "b", { 2, H }, false } };
    } else if (kind == "pairwise") {
        res.u32("indexmem.pairwise.head_count", 2);
        res.u32("indexmem.pairwise.head_dim", 4);
        res.f32("indexmem.pairwise.norm_eps", 1e-5f);
        res.str("indexmem.pairwise.reduce", small ? "max" : "mean");
        res.u32("indexmem.pairwise.query_count", 8);
        specs = {
            { "w_q.weight", { d, 8 }, true }, { "w_q.bias", { 8 }, false }, { "w_k.weight", { d, 4 }, true }, { "w_k.bias", { 4 }, false },
            { "weights_proj.weight", { d, 2 }, false }, { "weights_proj.bias", { 2 }, false }, { "q_norm.weight", { 4 }, false },
            { "q_norm.bias", { 4 }, false }, { "k_norm.weight", { 4 }, false }, { "k_norm.bias", { 4 }, false } };
    }
    if (memory == "residual") {
        res.u32("indexmem.residual.feature_dim", 4);
        res.u32("indexmem.residual.head_dim", 8);
        res.f32("indexmem.residual.eps", 1e-6f);
        for (const char * key : { "gate_logit", "eta_raw", "decay_logit" }) {
            res.array(std::string("indexmem.residual.") + key, GGUF_TYPE_FLOAT32,
                    std::vector<std::string>(shape.n_layer, gguf_file::raw(0.5f)));
        }
        res.array("indexmem.residual.enabled", GGUF_TYPE_BOOL, std::vector<std::string>(shape.n_layer, gguf_file::raw((int8_t) 1)));
        specs.push_back({ "phi_proj.weight", { 8, 4 }, false });
    } else if (memory == "centroid") {
        res.u32("indexmem.centroid.slot_count", 3);
        res.array("indexmem.centroid.enabled", GGUF_TYPE_BOOL, std::vector<std::string>(shape.n_layer, gguf_file::raw((int8_t) 1)));
        res.array("indexmem.centroid.gate", GGUF_TYPE_FLOAT32, std::vector<std::string>(shape.n_layer, gguf_file::raw(0.5f)));
    }

    for (uint32_t il = 0; il < shape.n_layer; ++il) {
        for (const auto & spec : specs) {
            int64_t n = 1;
            for (uint64_t i : spec.ne) {
                n *= (int64_t) i;
            }
            const ggml_type type = spec.matrix ? matrix : GGML_TYPE_F32;
            res.tensors.push_back({ "blk." + std::to_string(il) + ".indexmem." + spec.name, spec.ne, type,
                    tensor_data(type, n, (uint32_t) (il*100 + res.tensors.size())), -1 });
        }
    }
    return res;
}
