#include "indexmem-sidecar.h"

#include "indexmem-buffers.h"
#include "indexmem-gguf-check.h"
#include "indexmem-hash.h"
#include "indexmem-support.h"

#include "llama-impl.h"
#include "llama-mmap.h"
#include "llama-model.h"

#include <map>

// what of a sidecar needs the model it is for

void indexmem_sidecar::check_model(const llama_model & model) const {
    const auto & hparams = model.hparams;

    const auto refuse = [&](const std::string & what) {
        throw indexmem_sidecar_error("sidecar " + path + ": " + what + ": use the sidecar that was made for this model");
    };
    const auto compare = [&](const char * what, uint32_t in_file, uint32_t in_model) {
        if (in_file != in_model) {
            refuse(format("it is for a model with %s %u, this model has %u", what, in_file, in_model));
        }
    };

    const std::string arch_model = llm_arch_name(model.arch);
    if (arch != "unknown" && arch != arch_model) {
        refuse(format("it is for architecture '%s', this model has '%s'", indexmem_printable(arch).c_str(), arch_model.c_str()));
    }
    compare("block_count",      geometry.n_layer, hparams.n_layer());
    compare("embedding_length", geometry.n_embd,  hparams.n_embd);

    // the others have nothing to rank
    std::vector<uint32_t> cached;
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        if (indexmem_layer_kind(model, il) & INDEXMEM_LAYER_BOUNDED) {
            cached.push_back(il);
        }
    }
    for (uint32_t il : cached) {
        if (!covered[il]) {
            refuse(format("it holds nothing for layer %u, whose cache a budget bounds", il));
        }
    }
    for (uint32_t il : cached) {
        if (hparams.n_head_kv(il) != hparams.n_head_kv(cached[0])) {
            throw indexmem_sidecar_error(format("sidecar %s: this model has %u KV heads in layer %u and %u in layer %u, and a sidecar "
                        "is for one number: use a policy without a sidecar", path.c_str(),
                        hparams.n_head_kv(cached[0]), cached[0], hparams.n_head_kv(il), il));
        }
    }
    for (uint32_t il : cached) {
        compare("attention.head_count_kv", geometry.n_head_kv, hparams.n_head_kv(il));
        if (n_head) {
            compare("attention.head_count", n_head, hparams.n_head(il));
        }
        if (n_embd_head) {
            compare("attention.key_length", n_embd_head, hparams.n_embd_head_k(il));
        }
        if (memory && memory->n_embd_head()) {
            compare("heads of size", memory->n_embd_head(), hparams.n_embd_head_k(il));
        }
    }

    if (!fingerprint.empty() && !hparams.no_alloc) { // a dry run has no norms to look at
        const std::string found = indexmem_fingerprint(model);
        if (found != fingerprint) {
            throw indexmem_sidecar_error(format("sidecar %s: made for a model with fingerprint %s, this one has %s: it is another model, "
                        "or a fine-tune of it; convert the sidecar with --no-fingerprint if that is meant", path.c_str(),
                        fingerprint.c_str(), found.c_str()));
        }
    }
}

void indexmem_sidecar::load(const llama_model & model, bool offload, bool with_indexer, bool with_memory) {
    check_model(model);

    const auto & hparams = model.hparams;

    std::vector<indexmem_weights> weights(geometry.n_layer);
    n_bytes = 0;

    indexmem_buffers buffers(model, offload, infos.size());
    for (const auto & info : infos) {
        if (!(info.memory ? with_memory : with_indexer)) {
            continue;
        }
        ggml_tensor * t = ggml_new_tensor(buffers.context(info.il), info.type, (int) info.ne.size(), info.ne.data());
        ggml_format_name(t, "blk.%u.indexmem.%s", info.il, info.name.c_str());
        weights[info.il][info.name] = t;
        n_bytes += info.size;
    }
    try {
        buffers.alloc("the weights of sidecar " + path);
    } catch (const std::runtime_error & err) {
        throw indexmem_sidecar_error(err.what());
    }
    for (auto & [_, buf] : buffers.get()) {
        ggml_backend_buffer_set_usage(buf.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS); // compute where they are
    }

    if (!hparams.no_alloc) {
        uint64_t found = 0;
        bool     same  = false;
        try {
            llama_file file(path.c_str(), "rb");
            same = file.size() == file_size;
            if (same) {
                found = read_data(file, [&](const tensor_info & info, size_t offset, const uint8_t * data, size_t n) {
                    const auto it = weights[info.il].find(info.name);
                    if (it != weights[info.il].end()) {
                        ggml_backend_tensor_set(it->second, data, offset, n);
                    }
                });
            }
        } catch (const std::exception & err) {
            throw indexmem_sidecar_error("cannot read " + path + ": " + err.what());
        }
        if (!same || found != hash) {
            throw indexmem_sidecar_error("sidecar " + path + ": the file has changed since it was checked: try again when "
                    "nothing writes to it");
        }
    }

    layers    = std::move(weights);
    ctxs_bufs = std::move(buffers.get());
}

std::string indexmem_fingerprint(const llama_model & model) {
    static const std::string suffix = "norm.weight";

    std::map<std::string, const ggml_tensor *> norms; // std::string compares bytes as unsigned
    for (const auto & [name, t] : model.tensors_by_name) {
        if (t->type == GGML_TYPE_F32 && name.size() >= suffix.size() &&
                name.compare(name.size() - suffix.size(), suffix.size(), suffix) == 0) {
            norms.emplace(name, t);
        }
    }

    uint64_t res = INDEXMEM_HASH_INIT;
    std::vector<uint8_t> data;
    for (const auto & [name, t] : norms) {
        data.resize(ggml_nbytes(t));
        ggml_backend_tensor_get(t, data.data(), 0, data.size());
        res = indexmem_hash(res, name.c_str(), name.size() + 1); // with its zero byte
        res = indexmem_hash(res, data.data(), data.size());
    }
    return format("%016llx", (unsigned long long) res);
}
