#pragma once

#include "indexer.h"
#include "indexmem-kv-shares.h"
#include "memory.h"

#include "ggml-cpp.h"

#include <functional>

struct llama_file;
struct llama_model;

//
// A sidecar file (docs/sidecar.md)
//
// Invariants
//   - files are untrusted: every failure is an indexmem_sidecar_error, whatever the bytes
//   - nothing is allocated for weights before the whole file has been checked, the weights' values included, and, in
//     load(), compared with the model; what parsing takes is bounded by the size of the file
//   - nothing is read from a sidecar after load()
//
class indexmem_sidecar {
public:
    // parses and checks a file by itself
    explicit indexmem_sidecar(const std::string & path);

    // throws unless the file is for this model
    void check_model(const llama_model & model) const;

    // check_model, then the weights of the parts that are used into memory next to the layers of the model
    void load(const llama_model & model, bool offload, bool with_indexer, bool with_memory);

    const std::string & get_path() const { return path; }

    const indexmem_geometry & get_geometry() const { return geometry; }

    const indexmem_indexer * get_indexer() const { return indexer.get(); } // null if the sidecar has none

    const std::shared_ptr<indexmem_memory> & get_memory() const { return memory; } // likewise

    const indexmem_weights & get_layer(uint32_t il) const { return layers[il]; } // after load(); empty if it is not for the layer

    // what of a budget each KV head of the model needs, [n_layer][n_head_kv], with shares above 0; empty: all the same
    const std::vector<indexmem_need> & get_needs() const { return needs; }

    // identity of what changes ranks and memory: kinds, constants and weights; never 0
    uint64_t get_hash() const { return hash; }

    size_t size_bytes() const { return n_bytes; } // weights in memory

    mutable bool rotated = false; // weights of the memory, once, for keys that are (indexmem_memory::rotate_weights)

private:
    struct tensor_info {
        bool        memory; // of the memory; otherwise of the indexer
        uint32_t    il;
        std::string name;   // in the spec
        ggml_type   type;
        std::vector<int64_t> ne;
        uint64_t    offset; // in the file
        size_t      size;
    };

    // n bytes of a tensor, from `offset` of it on
    using data_fn = std::function<void(const tensor_info & info, size_t offset, const uint8_t * data, size_t n)>;

    void check_type    (const indexmem_metadata & meta) const;
    void read_layers   (const indexmem_metadata & meta);
    void read_needs    (const indexmem_metadata & meta);
    void read_keys     (const gguf_context * gguf, const indexmem_metadata & meta);
    void check_tensors (const gguf_context * gguf, uint64_t data_offset);
    void hash_constants(const gguf_context * gguf);

    // passes all data through `use`; returns the hash
    uint64_t read_data(llama_file & file, const data_fn & use) const;

    std::string path;

    indexmem_geometry geometry = {};

    std::vector<bool> covered; // [n_layer] the layers that it is for

    std::vector<indexmem_need> needs; // get_needs()

    std::string arch;        // "unknown" if it does not say
    std::string fingerprint; // empty if it does not say
    uint32_t    n_head      = 0; // 0 if it does not say
    uint32_t    n_embd_head = 0;

    std::unique_ptr<indexmem_indexer> indexer;
    std::shared_ptr<indexmem_memory>  memory;

    uint64_t file_size = 0;

    std::vector<tensor_info>      infos;  // by layer and name
    std::vector<indexmem_weights> layers; // [n_layer]

    size_t n_bytes = 0; // of weights in memory

    uint64_t hash_head = 0; // of kinds and constants
    uint64_t hash      = 0; // continued over the weights

    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> ctxs_bufs;
};

// fingerprint of a model, as in docs/sidecar.md
std::string indexmem_fingerprint(const llama_model & model);
