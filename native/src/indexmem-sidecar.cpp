#include "indexmem-sidecar.h"

#include "indexmem-gguf-check.h"
#include "indexmem-hash.h"
#include "indexmem-kv-counts.h"

#include "llama-impl.h"
#include "llama-mmap.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <set>
#include <unordered_map>

// what of it needs no model; the rest is indexmem-sidecar-load.cpp

static constexpr uint32_t SCHEMA_VERSION = 2;

static const char * const CONVERT = "convert it again with indexmem-convert";

// names of a table, and "none"
template <typename F>
static std::vector<const char *> kinds_of(F get) {
    std::vector<const char *> res;
    for (size_t i = 0; get(i); ++i) {
        res.push_back(get(i)->name);
    }
    res.push_back("none");
    return res;
}

// index of the first value that is not finite, or -1; data begins at a block
static int64_t find_nonfinite(ggml_type type, const uint8_t * data, size_t n) {
    const size_t size = ggml_type_size(type);
    for (size_t i = 0; i < n; i += size) {
        uint32_t bits = 0;
        memcpy(&bits, data + i, type == GGML_TYPE_F32 ? 4 : 2); // of Q8_0: the scale of the block
        const uint32_t exponent = type == GGML_TYPE_F32 ? 0x7F800000 : 0x7C00;
        if ((bits & exponent) == exponent) {
            return (int64_t) (i/size*ggml_blck_size(type));
        }
    }
    return -1;
}

static std::string tensor_name(uint32_t il, const std::string & name) {
    return format("blk.%u.indexmem.%s", il, name.c_str());
}

static std::string shape_text(const std::vector<int64_t> & ne) {
    std::string res;
    for (int64_t n : ne) {
        res += format("%s%lld", res.empty() ? "" : ", ", (long long) n);
    }
    return "[" + res + "]";
}

// whatever f throws leaves as an indexmem_sidecar_error that begins with `prefix`
template <typename F>
static void run(const std::string & prefix, F && f) {
    try {
        f();
    } catch (const std::bad_alloc &) {
        throw indexmem_sidecar_error(prefix + "not enough memory");
    } catch (const std::exception & err) {
        throw indexmem_sidecar_error(prefix + err.what());
    }
}

indexmem_sidecar::indexmem_sidecar(const std::string & path) : path(path) {
    std::unique_ptr<llama_file> file;
    gguf_context_ptr gguf;
    uint64_t data_offset = 0;

    run("cannot read " + path + ": ", [&] {
        // opening a pipe would wait for its other end
        const auto status = std::filesystem::status(std::filesystem::u8path(path));
        if (!std::filesystem::exists(status)) {
            throw indexmem_sidecar_error("there is no such file");
        }
        if (!std::filesystem::is_regular_file(status)) {
            throw indexmem_sidecar_error("it is not a regular file");
        }
        file = std::make_unique<llama_file>(path.c_str(), "rb");
        file_size = file->size();

        const auto header = indexmem_gguf_header(*file);
        data_offset = header.size();
        gguf.reset(gguf_init_from_buffer(header.data(), header.size(), { /*no_alloc =*/ true, /*ctx =*/ nullptr }));
        if (!gguf) {
            throw indexmem_sidecar_error("ggml cannot parse it as GGUF");
        }
    });
    run("sidecar " + path + ": ", [&] {
        const indexmem_metadata meta(gguf.get());
        check_type(meta);
        read_keys(gguf.get(), meta);

        const size_t i_indexer = meta.choice("indexmem.indexer.kind", kinds_of(indexmem_indexer_get));
        const size_t i_memory  = meta.choice("indexmem.memory.kind",  kinds_of(indexmem_memory_get));
        meta.choice("indexmem.indexer.input", { "attention_input" });

        if (const auto * info = indexmem_indexer_get(i_indexer)) {
            indexer = info->make(geometry, meta);
        }
        if (const auto * info = indexmem_memory_get(i_memory)) {
            memory = info->make(geometry, &meta);
        }
        if (!indexer && !memory) {
            throw indexmem_sidecar_error("it holds neither an indexer nor a memory");
        }
        read_layers(meta);
        read_needs(meta);
        if (memory && memory->n_embd_head() && n_embd_head && n_embd_head != memory->n_embd_head()) {
            throw indexmem_sidecar_error(format("key 'indexmem.%s.head_dim' is %u, and 'indexmem.attention.key_length' %u: %s",
                        memory->kind(), memory->n_embd_head(), n_embd_head, CONVERT));
        }
        check_tensors(gguf.get(), data_offset);
        hash_constants(gguf.get());

        const auto check_values = [](const tensor_info & info, size_t offset, const uint8_t * data, size_t n) {
            const int64_t i = find_nonfinite(info.type, data, n);
            if (i >= 0) {
                const int64_t i_first = (int64_t) (offset/ggml_type_size(info.type))*ggml_blck_size(info.type);
                throw indexmem_sidecar_error(format("tensor '%s' (%s) is not finite from value %lld on: training went wrong, or the "
                            "file is damaged", tensor_name(info.il, info.name).c_str(), ggml_type_name(info.type),
                            (long long) (i_first + i)));
            }
        };
        hash = read_data(*file, check_values);
    });
}

// is it a sidecar, and one that this version knows?
void indexmem_sidecar::check_type(const indexmem_metadata & meta) const {
    const auto refuse = [&](const char * key, const std::string & found, const char * expected, const char * what) {
        const std::string base = meta.has("general.architecture") ?
            format(" (general.architecture '%s')", indexmem_printable(meta.str("general.architecture")).c_str()) : "";
        throw indexmem_sidecar_error(format("%s is '%s', expected '%s': it is %s%s and not a sidecar; pass a file made by indexmem-convert",
                    key, indexmem_printable(found).c_str(), expected, what, base.c_str()));
    };
    const std::string type = meta.has("general.type") ? meta.str("general.type") : "";
    if (type != "adapter") {
        refuse("general.type", type, "adapter", type.empty() || type == "model" ? "a model" : "another kind of GGUF file");
    }
    const std::string adapter = meta.has("adapter.type") ? meta.str("adapter.type") : "";
    if (adapter != "indexmem") {
        refuse("adapter.type", adapter, "indexmem", adapter == "lora" ? "a LoRA" : "another kind of adapter");
    }

    const uint32_t version = meta.u32("indexmem.schema_version", 1, UINT32_MAX);
    if (version > SCHEMA_VERSION) {
        throw indexmem_sidecar_error(format("schema version %u, this version of indexmem-edge reads up to %u: update indexmem-edge",
                    version, SCHEMA_VERSION));
    }
}

// which layers it is for: in version 1 all
void indexmem_sidecar::read_layers(const indexmem_metadata & meta) {
    const bool some = meta.u32("indexmem.schema_version", 1, SCHEMA_VERSION) > 1;
    if (some != meta.has("indexmem.layers")) {
        throw indexmem_sidecar_error(format("key 'indexmem.layers' is %s a file of schema version %d: %s", some ? "missing in" : "there in",
                    some ? 2 : 1, CONVERT));
    }
    covered.assign(geometry.n_layer, !some);
    if (some) {
        for (uint32_t il : meta.ascending("indexmem.layers", geometry.n_layer)) {
            covered[il] = true;
        }
    }
    const std::string key = memory ? format("indexmem.%s.enabled", memory->kind()) : "";
    if (some && memory && meta.has(key.c_str())) {
        const auto enabled = meta.bools(key.c_str(), geometry.n_layer);
        for (uint32_t il = 0; il < geometry.n_layer; ++il) {
            if (enabled[il] && !covered[il]) {
                throw indexmem_sidecar_error(format("value %u of key '%s' is true, and the file is not for that layer (indexmem.layers): %s",
                            il, key.c_str(), CONVERT));
            }
        }
    }
}

void indexmem_sidecar::read_needs(const indexmem_metadata & meta) {
    constexpr const char * SHARE = "indexmem.budget_share";
    constexpr const char * LEAST = "indexmem.budget_least";
    constexpr float    MIN = 1.0f/64, MAX = 64.0f;
    constexpr uint32_t MOST = 1 << 20;
    if (!meta.has(SHARE) && !meta.has(LEAST)) {
        return;
    }
    if (!indexer) {
        throw indexmem_sidecar_error(format("key '%s' is there without an indexer, whose ranks it is measured with: %s",
                    meta.has(SHARE) ? SHARE : LEAST, CONVERT));
    }
    // one value for each layer, or for each KV head of each layer
    const size_t n_head = geometry.n_head_kv;
    const size_t n_all  = geometry.n_layer*n_head;
    const auto step_of = [&](const char * key) {
        return meta.has(key) && meta.size(key) == n_all ? (size_t) 1 : n_head; // values are this many heads apart
    };
    const size_t share_step = step_of(SHARE);
    const size_t least_step = step_of(LEAST);

    const auto shares = meta.has(SHARE) ? meta.f32s(SHARE, n_all/share_step) : std::vector<float>(geometry.n_layer, 1.0f);
    const auto least  = meta.has(LEAST) ? meta.counts(LEAST, n_all/least_step, MOST + 1) : std::vector<uint32_t>(geometry.n_layer, 0);
    for (size_t i = 0; i < shares.size(); ++i) {
        if (!(shares[i] >= MIN && shares[i] <= MAX)) {
            throw indexmem_sidecar_error(format("value %zu of key '%s' is %g, expected one from %g to %g: %s", i, SHARE, shares[i], MIN, MAX, CONVERT));
        }
    }
    std::set<indexmem_need> different;
    for (size_t i = 0; i < n_all; ++i) {
        needs.push_back({ shares[i/share_step], least[i/least_step] });
        if (!covered[i/n_head]) {
            continue;
        }
        different.insert(needs[i]);
        if (i % n_head > 0 && !(needs[i] == needs[i - 1]) && indexer->n_state_heads() == 1) {
            throw indexmem_sidecar_error(format("keys '%s' and '%s' tell KV heads of layer %zu apart, and the indexer '%s' ranks for all heads of "
                        "a layer together: give them the same, or one value a layer: %s", SHARE, LEAST, i/n_head, indexer->kind(), CONVERT));
        }
    }
    if (different.size() > indexmem_kv_counts::N_CLASSES_MAX) {
        throw indexmem_sidecar_error(format("keys '%s' and '%s' have %zu different pairs of values, expected at most %u: %s", SHARE, LEAST,
                    different.size(), indexmem_kv_counts::N_CLASSES_MAX, CONVERT));
    }
}

// what does not depend on the kind
void indexmem_sidecar::read_keys(const gguf_context * gguf, const indexmem_metadata & meta) {
    geometry.n_layer   = meta.u32("indexmem.block_count",             1, 4096);
    geometry.n_embd    = meta.u32("indexmem.embedding_length",        1, 1048576);
    geometry.n_head_kv = meta.u32("indexmem.attention.head_count_kv", 1, 4096);

    arch = meta.str("general.architecture");
    if (meta.has("indexmem.attention.head_count")) {
        n_head = meta.u32("indexmem.attention.head_count", 1, 65536);
    }
    if (meta.has("indexmem.attention.key_length")) {
        n_embd_head = meta.u32("indexmem.attention.key_length", 1, 65536);
    }
    if (meta.has("indexmem.base_model.norms_fnv1a64")) {
        fingerprint = meta.str("indexmem.base_model.norms_fnv1a64");
        if (fingerprint.size() != 16 || fingerprint.find_first_not_of("0123456789abcdef") != std::string::npos) {
            throw indexmem_sidecar_error(format("key 'indexmem.base_model.norms_fnv1a64' is '%s', expected 16 lower-case hexadecimal "
                        "digits: %s", indexmem_printable(fingerprint).c_str(), CONVERT));
        }
    }

    // provenance: of no use here, but a file without is not what indexmem-convert wrote
    meta.str("indexmem.provenance.tool");
    meta.str("indexmem.provenance.source_format");
    size_t n_files[2] = {};
    for (int i = 0; i < 2; ++i) {
        const char * key = i == 0 ? "indexmem.provenance.source_files" : "indexmem.provenance.source_sha256";
        const int64_t id = gguf_find_key(gguf, key);
        if (id < 0) {
            throw indexmem_sidecar_error(format("key '%s' is missing: %s", key, CONVERT));
        }
        if (gguf_get_kv_type(gguf, id) != GGUF_TYPE_ARRAY || gguf_get_arr_type(gguf, id) != GGUF_TYPE_STRING) {
            throw indexmem_sidecar_error(format("key '%s' is not an array of strings: %s", key, CONVERT));
        }
        n_files[i] = gguf_get_arr_n(gguf, id);
    }
    if (n_files[0] != n_files[1]) {
        throw indexmem_sidecar_error(format("keys 'indexmem.provenance.source_files' and '.source_sha256' have %zu and %zu values: %s",
                    n_files[0], n_files[1], CONVERT));
    }
}

// exactly the tensors of the kinds, in every layer; fills infos
void indexmem_sidecar::check_tensors(const gguf_context * gguf, uint64_t data_offset) {
    std::unordered_map<std::string, int64_t> ids;
    for (int64_t id = 0; id < gguf_get_n_tensors(gguf); ++id) {
        ids.emplace(gguf_get_tensor_name(gguf, id), id);
    }

    const auto take = [&](bool of_memory, uint32_t il, const indexmem_tensor_spec & spec) -> tensor_info {
        const std::string name = tensor_name(il, spec.name);
        const auto it = ids.find(name);
        if (it == ids.end()) {
            throw indexmem_sidecar_error(format("tensor '%s' is missing (indexmem.block_count is %u, with %zu tensors in the file): %s",
                        name.c_str(), geometry.n_layer, (size_t) gguf_get_n_tensors(gguf), CONVERT));
        }
        const int64_t   id   = it->second;
        const ggml_type type = gguf_get_tensor_type(gguf, id);
        ids.erase(it);

        if (type != GGML_TYPE_F32 && !(spec.matrix && (type == GGML_TYPE_F16 || type == GGML_TYPE_Q8_0))) {
            throw indexmem_sidecar_error(format("tensor '%s' is %s, expected %s: %s", name.c_str(), ggml_type_name(type),
                        spec.matrix ? "f32, f16 or q8_0" : "f32", CONVERT));
        }
        const int64_t * ne = gguf_get_tensor_ne(gguf, id);
        std::vector<int64_t> found(ne, ne + GGML_MAX_DIMS);
        while (found.size() > spec.ne.size() && found.back() == 1) {
            found.pop_back();
        }
        if (found != spec.ne) {
            throw indexmem_sidecar_error(format("tensor '%s' is %s, expected %s after the constants of the file: %s", name.c_str(),
                        shape_text(found).c_str(), shape_text(spec.ne).c_str(), CONVERT));
        }
        return { of_memory, il, spec.name, type, found, data_offset + gguf_get_tensor_offset(gguf, id), gguf_get_tensor_size(gguf, id) };
    };

    // by name, so that the hash does not depend on the order of the table in the code
    const auto sorted = [](std::vector<indexmem_tensor_spec> specs) {
        std::sort(specs.begin(), specs.end(), [](const auto & a, const auto & b) { return a.name < b.name; });
        return specs;
    };
    const auto of_indexer = sorted(indexer ? indexer->tensors() : std::vector<indexmem_tensor_spec>());
    const auto of_memory  = sorted(memory  ? memory ->tensors() : std::vector<indexmem_tensor_spec>());
    for (uint32_t il = 0; il < geometry.n_layer; ++il) {
        if (!covered[il]) {
            continue;
        }
        for (const auto & spec : of_indexer) {
            infos.push_back(take(false, il, spec));
        }
        for (const auto & spec : of_memory) {
            infos.push_back(take(true, il, spec));
        }
    }
    if (!ids.empty()) {
        // the first in the file, so that the same file always gives the same message
        const auto it = std::min_element(ids.begin(), ids.end(), [](const auto & a, const auto & b) { return a.second < b.second; });
        throw indexmem_sidecar_error(format("tensor '%s' does not belong to it: by its kinds and indexmem.block_count (%u) it has %zu "
                    "tensors, the file has %zu: %s", indexmem_printable(it->first).c_str(), geometry.n_layer,
                    infos.size(), (size_t) gguf_get_n_tensors(gguf), CONVERT));
    }
}

// of kinds and constants: what the weights are continued from
void indexmem_sidecar::hash_constants(const gguf_context * gguf) {
    const std::string kinds[] = { indexer ? indexer->kind() : "none", memory ? memory->kind() : "none" };

    std::vector<std::pair<std::string, int64_t>> keys;
    for (int64_t id = 0; id < gguf_get_n_kv(gguf); ++id) {
        const std::string key = gguf_get_key(gguf, id);
        for (const auto & kind : kinds) {
            const std::string prefix = "indexmem." + kind + ".";
            if (key.compare(0, prefix.size(), prefix) == 0) {
                keys.emplace_back(key, id);
                break;
            }
        }
    }
    std::sort(keys.begin(), keys.end());

    uint64_t res = INDEXMEM_HASH_INIT;
    for (const auto & kind : kinds) {
        res = indexmem_hash_str(res, kind);
    }
    for (const auto & [key, id] : keys) {
        const bool      is_array = gguf_get_kv_type(gguf, id) == GGUF_TYPE_ARRAY;
        const gguf_type type     = is_array ? gguf_get_arr_type(gguf, id) : gguf_get_kv_type(gguf, id);
        const size_t    n        = is_array ? gguf_get_arr_n(gguf, id) : 1;

        res = indexmem_hash_str(res, key);
        res = indexmem_hash_u64(res, is_array);
        res = indexmem_hash_u64(res, type);
        res = indexmem_hash_u64(res, n);
        if (type == GGUF_TYPE_STRING) {
            for (size_t i = 0; i < n; ++i) {
                res = indexmem_hash_str(res, is_array ? gguf_get_arr_str(gguf, id, i) : gguf_get_val_str(gguf, id));
            }
            continue;
        }
        res = indexmem_hash(res, is_array ? gguf_get_arr_data(gguf, id) : gguf_get_val_data(gguf, id),
                n*indexmem_gguf_value_size(type));
    }
    hash_head = res;
}

uint64_t indexmem_sidecar::read_data(llama_file & file, const data_fn & use) const {
    constexpr size_t n_blocks = 32768; // read at once

    uint64_t res = hash_head;
    std::vector<uint8_t> buf;
    for (const auto & info : infos) {
        res = indexmem_hash_u64(res, info.il);
        res = indexmem_hash_str(res, info.name);
        res = indexmem_hash_u64(res, info.type);
        for (int64_t n : info.ne) {
            res = indexmem_hash_u64(res, n);
        }
        const size_t n_max = n_blocks*ggml_type_size(info.type);
        for (size_t offset = 0; offset < info.size; offset += n_max) {
            const size_t n = std::min(n_max, info.size - offset);
            buf.resize(std::max(buf.size(), n));
            file.seek(info.offset + offset, SEEK_SET);
            file.read_raw(buf.data(), n);
            use(info, offset, buf.data(), n);
            res = indexmem_hash(res, buf.data(), n);
        }
    }
    return res == 0 ? 1 : res;
}
