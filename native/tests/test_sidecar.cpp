// Files that are, nearly are, and are not sidecars. What is not one must be refused with an indexmem_sidecar_error that can
// be printed; nothing else may come out of the loader, whatever the bytes.

#include "test.h"

#include "indexmem-gguf-check.h"
#include "indexmem-sidecar.h"
#include "sidecar_file.h"

#include "llama.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <limits>

#ifndef _WIN32
#include <sys/stat.h>
#endif

static const std::string PATH = "test-sidecar.indexmem.gguf";

static const char * const KINDS[] = { "retention", "kvzap", "fast_kvzip", "pairwise" };

static void write(const std::string & path, const std::string & bytes) {
    std::ofstream(path, std::ios::binary).write(bytes.data(), (std::streamsize) bytes.size());
}

// "" if it loads, else the error
static std::string open_path(const std::string & path) {
    std::string res;
    try {
        const indexmem_sidecar sidecar(path);
        CHECK(sidecar.get_hash() != 0);
        CHECK(sidecar.size_bytes() == 0);
    } catch (const indexmem_sidecar_error & err) {
        res = err.what();
        CHECK(!res.empty());
        CHECK_MSG(std::all_of(res.begin(), res.end(), [](char c) { return c >= 0x20 && c < 0x7F; }), "not printable");
        CHECK_MSG(res.find(path) != std::string::npos, "%s", res.c_str());
    } catch (const std::exception & err) {
        CHECK_MSG(false, "another exception: %s", err.what());
    }
    return res;
}

static std::string open_bytes(const std::string & bytes) {
    write(PATH, bytes);
    return open_path(PATH);
}

static bool has(const std::string & text, const std::string & part) {
    return text.find(part) != std::string::npos;
}

#define CHECK_FAILS(bytes, part) \
    do { \
        const std::string error_ = open_bytes(bytes); \
        CHECK_MSG(has(error_, part), "'%s' is not in '%s'", std::string(part).c_str(), error_.c_str()); \
    } while (0)

static uint64_t hash_of(const std::string & bytes) {
    write(PATH, bytes);
    return indexmem_sidecar(PATH).get_hash();
}

struct cleanup {
    ~cleanup() { remove(PATH.c_str()); }
} static remove_file;

TEST(every_kind_loads) {
    for (const char * kind : KINDS) {
        for (int i = 0; i < 12; ++i) {
            const ggml_type types[] = { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0 };
            const auto file = sidecar_file(kind, i & 1, types[i/4], i & 2);
            const std::string error = open_bytes(file.bytes());
            CHECK_MSG(error.empty(), "%s", error.c_str());

            const indexmem_sidecar sidecar(PATH);
            CHECK(sidecar.get_indexer() && sidecar.get_indexer()->kind() == std::string(kind));
            CHECK(sidecar.get_geometry().n_layer == 2 && sidecar.get_geometry().n_embd == 32 && sidecar.get_geometry().n_head_kv == 2);
        }
    }
    CHECK(open_bytes(sidecar_file("none", true).bytes()).empty());
    CHECK(indexmem_sidecar(PATH).get_indexer() == nullptr);
    CHECK_FAILS(sidecar_file("none").bytes(), "neither an indexer nor a memory");
}

// the same file as ggml writes it
TEST(files_of_ggml_load) {
    const auto file = sidecar_file("pairwise", true, GGML_TYPE_Q8_0);
    write(PATH, file.bytes());

    ggml_context * ctx = nullptr;
    gguf_context * gguf = gguf_init_from_file(PATH.c_str(), { false, &ctx });
    CHECK(gguf != nullptr);
    const uint64_t expected = hash_of(file.bytes());
    gguf_context * copy = gguf_init_empty();
    gguf_set_kv(copy, gguf);
    for (int64_t i = gguf_get_n_tensors(gguf) - 1; i >= 0; --i) { // in another order
        gguf_add_tensor(copy, ggml_get_tensor(ctx, gguf_get_tensor_name(gguf, i)));
    }
    CHECK(gguf_write_to_file(copy, PATH.c_str(), false));
    CHECK(indexmem_sidecar(PATH).get_hash() == expected);
    gguf_free(copy);
    gguf_free(gguf);
    ggml_free(ctx);
}

TEST(hash_tells_what_changes_ranks) {
    const auto file = sidecar_file("retention", true);
    const uint64_t hash = hash_of(file.bytes());

    auto changed = file;
    changed.f32("indexmem.retention.pos_slope", 0.25f);
    CHECK(hash_of(changed.bytes()) != hash);
    changed = file;
    changed.find("blk.1.indexmem.mid_norm.bias").data[0] ^= 1;
    CHECK(hash_of(changed.bytes()) != hash);
    changed = file;
    std::swap(changed.find("blk.0.indexmem.mid_norm.bias").data, changed.find("blk.1.indexmem.mid_norm.bias").data);
    CHECK(hash_of(changed.bytes()) != hash);

    changed = file;
    changed.str("general.name", "anything");
    changed.f32("indexmem.scores.recall", 0.5f);
    changed.find("blk.1.indexmem.phi_proj.weight").data[0] ^= 1; // of the memory
    std::reverse(changed.keys.begin(), changed.keys.end());
    CHECK(hash_of(changed.bytes()) == hash);
}

TEST(what_is_no_sidecar) {
    CHECK(has(open_path("there-is-no-such.gguf"), "no such file"));
    CHECK(has(open_path("."), "not a regular file"));
    CHECK(!open_path(std::string(5000, 'x')).empty());
#ifndef _WIN32
    const std::string fifo = "test-sidecar-fifo";
    remove(fifo.c_str());
    CHECK(mkfifo(fifo.c_str(), 0600) == 0);
    CHECK(has(open_path(fifo), "not a regular file"));
    remove(fifo.c_str());
    CHECK(has(open_path("/dev/zero"), "not a regular file"));
#endif
    CHECK_FAILS("", "empty");
    CHECK_FAILS("GGU", "not a GGUF file");
    CHECK_FAILS("PK\x03\x04" "1234567890", "starts with 'PK\\x03\\x04'");
    CHECK_FAILS(std::string("\x80\x02}q\0", 5), "\\x80\\x02}q");
    CHECK_FAILS("GGUF", "ends within its version");

    gguf_file file = sidecar_file("kvzap");
    for (uint32_t version : { 0u, 1u, 4u, 0x03000000u, UINT32_MAX }) {
        file.version = version;
        CHECK_FAILS(file.bytes(), version == 0x03000000u ? "byte order" : "of GGUF");
    }

    gguf_file other;
    other.str("general.architecture", "llama");
    CHECK_FAILS(other.bytes(), "it is a model (general.architecture 'llama')");
    other.str("general.type", "model");
    CHECK_FAILS(other.bytes(), "it is a model");
    other.str("general.type", "mmproj");
    CHECK_FAILS(other.bytes(), "another kind of GGUF file");
    other.str("general.type", "adapter");
    CHECK_FAILS(other.bytes(), "another kind of adapter");
    other.str("adapter.type", "lora");
    CHECK_FAILS(other.bytes(), "it is a LoRA");
    other.str("adapter.type", "indexmem");
    CHECK_FAILS(other.bytes(), "schema_version");
    other.u32("indexmem.schema_version", 2);
    CHECK_FAILS(other.bytes(), "update indexmem-edge");
    other.u32("indexmem.schema_version", 0);
    CHECK_FAILS(other.bytes(), "schema_version");
}

// Every key missing, and of every other type: refused, or one of the few that may be missing.
TEST(keys_missing_or_of_another_type) {
    std::vector<gguf_file> files = { sidecar_file("none", true) };
    for (const char * kind : KINDS) {
        files.push_back(sidecar_file(kind, true));
        files.push_back(sidecar_file(kind, false, GGML_TYPE_F32, true));
    }
    for (const auto & file : files) {
        for (const auto & kv : file.keys) {
            gguf_file broken = file;
            broken.remove(kv.key);
            CHECK_FAILS(broken.bytes(), kv.key);

            for (int32_t type = 0; type < GGUF_TYPE_COUNT; ++type) {
                int32_t found;
                memcpy(&found, kv.bytes.data(), sizeof(found));
                if (type != found && type != GGUF_TYPE_ARRAY) {
                    broken.set(kv.key, gguf_file::raw(type) + std::string(type == GGUF_TYPE_STRING ? 8 : indexmem_gguf_value_size(type), '\0'));
                    CHECK_FAILS(broken.bytes(), kv.key);
                }
                if (type != GGUF_TYPE_ARRAY) { // arrays of no values
                    broken.array(kv.key, type, {});
                    CHECK_FAILS(broken.bytes(), kv.key.substr(0, kv.key.rfind('.')));
                }
            }
        }
    }
}

TEST(constants_out_of_range) {
    struct change { const char * kind; const char * key; uint32_t value; };
    const change changes[] = {
        { "kvzap", "indexmem.block_count", 0 }, { "kvzap", "indexmem.block_count", 4097 }, { "kvzap", "indexmem.block_count", UINT32_MAX },
        { "kvzap", "indexmem.block_count", 1 }, { "kvzap", "indexmem.block_count", 3 }, { "kvzap", "indexmem.block_count", 4096 },
        { "kvzap", "indexmem.embedding_length", 0 }, { "kvzap", "indexmem.embedding_length", 1048577 },
        { "kvzap", "indexmem.embedding_length", 1048576 }, { "kvzap", "indexmem.attention.head_count_kv", 0 },
        { "kvzap", "indexmem.attention.head_count_kv", 4097 }, { "kvzap", "indexmem.attention.head_count_kv", 1 },
        { "kvzap", "indexmem.attention.head_count", 0 }, { "kvzap", "indexmem.attention.key_length", 0 },
        { "kvzap", "indexmem.attention.key_length", 16 }, // the memory says 8
        { "kvzap", "indexmem.kvzap.mid_dim", 0 }, { "kvzap", "indexmem.kvzap.mid_dim", UINT32_MAX },
        { "retention", "indexmem.retention.mid_dim", 0 }, { "retention", "indexmem.retention.mid_dim", 31 },
        { "fast_kvzip", "indexmem.fast_kvzip.group_count", 0 }, { "fast_kvzip", "indexmem.fast_kvzip.dim", 0 },
        { "fast_kvzip", "indexmem.fast_kvzip.base_count", 0 }, { "fast_kvzip", "indexmem.fast_kvzip.base_count", 4096 },
        { "pairwise", "indexmem.pairwise.head_count", 0 }, { "pairwise", "indexmem.pairwise.head_dim", 1025 },
        { "pairwise", "indexmem.pairwise.query_count", 0 }, { "pairwise", "indexmem.pairwise.query_count", 1025 },
        { "pairwise", "indexmem.residual.feature_dim", 0 }, { "pairwise", "indexmem.residual.head_dim", 5 },
    };
    for (const auto & c : changes) {
        auto file = sidecar_file(c.kind, true);
        file.u32(c.key, c.value);
        CHECK_MSG(!open_bytes(file.bytes()).empty(), "%s %s = %u", c.kind, c.key, c.value);
    }

    const float inf = std::numeric_limits<float>::infinity();
    for (const char * key : { "norm_eps", "pos_slope", "age_scale" }) {
        for (float value : { inf, -inf, std::nanf(""), 0.0f, -1.0f }) {
            auto file = sidecar_file("retention");
            file.f32(std::string("indexmem.retention.") + key, value);
            const bool ok = std::isfinite(value) && key == std::string("pos_slope");
            CHECK(open_bytes(file.bytes()).empty() == ok);
        }
    }
    for (const char * key : { "gate_logit", "eta_raw", "decay_logit" }) {
        auto file = sidecar_file("none", true);
        file.array(std::string("indexmem.residual.") + key, GGUF_TYPE_FLOAT32, { gguf_file::raw(0.0f), gguf_file::raw(std::nanf("")) });
        CHECK_FAILS(file.bytes(), "value 1");
        file.array(std::string("indexmem.residual.") + key, GGUF_TYPE_FLOAT32, { gguf_file::raw(0.0f) });
        CHECK_FAILS(file.bytes(), "expected 2");
    }

    struct text { const char * kind; const char * key; std::string value; const char * error; };
    const text texts[] = {
        { "kvzap", "indexmem.indexer.kind", "kvzip", "retention, kvzap, fast_kvzip, pairwise, none" },
        { "kvzap", "indexmem.indexer.kind", "", "retention, kvzap" },
        { "kvzap", "indexmem.indexer.kind", "../../etc/passwd", "'../../etc/passwd'" },
        { "kvzap", "indexmem.indexer.kind", "\x1b[31mred\x1b[0m\r\n\x07", "'\\x1b[31mred\\x1b[0m\\x0d\\x0a\\x07'" },
        { "kvzap", "indexmem.indexer.kind", "caf\xc3\xa9 \\", "caf\\xc3\\xa9 \\\\" },
        { "kvzap", "indexmem.indexer.kind", std::string(100000, 'x'), "xxx...'" },
        { "kvzap", "indexmem.indexer.kind", std::string("kvzap\0", 6), "zero byte" },
        { "kvzap", "indexmem.indexer.input", "hidden", "attention_input" },
        { "kvzap", "indexmem.memory.kind", "slots", "none, residual" },
        { "kvzap", "indexmem.base_model.norms_fnv1a64", "0123456789ABCDEF", "lower-case" },
        { "kvzap", "indexmem.base_model.norms_fnv1a64", "0123", "16" },
        { "retention", "indexmem.retention.trunk", "conv", "linear, mlp" },
        { "retention", "indexmem.retention.trunk", "linear", "mid_dim" },
        { "pairwise", "indexmem.pairwise.reduce", "sum", "mean, max" },
    };
    for (const auto & t : texts) {
        auto file = sidecar_file(t.kind);
        file.str(t.key, t.value);
        CHECK_FAILS(file.bytes(), t.error);
    }
}

TEST(tensors_missing_surplus_or_wrong) {
    for (const char * kind : KINDS) {
        const auto file = sidecar_file(kind, true);
        for (size_t i = 0; i < file.tensors.size(); ++i) {
            const std::string name = file.tensors[i].name;
            auto broken = file;
            broken.tensors.erase(broken.tensors.begin() + i);
            CHECK_FAILS(broken.bytes(), "'" + name + "' is missing");

            broken = file;
            broken.tensors[i].name += "s";
            CHECK_FAILS(broken.bytes(), "'" + name + "' is missing");

            broken = file;
            auto & t = broken.tensors[i];
            t.ne[0] /= 2;
            t.ne.push_back(2); // the same number of values
            CHECK_FAILS(broken.bytes(), "expected [");

            const bool matrix = t.ne.size() == 3 && t.ne[0] >= 16 && has(name, "weight") && !has(name, "magnitude") &&
                !has(name, "retention_proj") && !has(name, "out_proj") && !has(name, "weights_proj");
            for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_F64, GGML_TYPE_I32, GGML_TYPE_I8 }) {
                broken = file;
                broken.tensors[i].type = type;
                broken.tensors[i].data.resize(file.tensors[i].data.size()/4*ggml_type_size(type));
                const std::string error = open_bytes(broken.bytes());
                CHECK_MSG(error.empty() == (matrix && type == GGML_TYPE_F16), "%s %s: %s", name.c_str(), ggml_type_name(type), error.c_str());
            }
        }

        const std::string names[] = { "blk.2.indexmem.b", "blk.0.indexmem.in_norm.weights", "x", "../../x", "blk.00.indexmem.b",
            "\x1b]0;title\x07", "\xff\xfe", std::string(63, 'y') };
        for (const auto & name : names) {
            auto broken = file;
            broken.tensors.push_back({ name, { 1 }, GGML_TYPE_F32, gguf_file::raw(0.0f), -1 });
            CHECK_FAILS(broken.bytes(), "tensor '" + indexmem_printable(name) + "'");
        }
        const std::string impossible[] = { "", std::string(64, 'y'), std::string(1 << 20, 'y'), std::string("blk\0.", 5) };
        for (const auto & name : impossible) {
            auto broken = file;
            broken.tensors.push_back({ name, { 1 }, GGML_TYPE_F32, gguf_file::raw(0.0f), -1 });
            CHECK_FAILS(broken.bytes(), name.find('\0') == std::string::npos ? "has a name of" : "zero byte");
        }
    }
}

TEST(weights_that_are_not_finite) {
    const std::string bad32[] = { gguf_file::raw(std::numeric_limits<float>::infinity()), gguf_file::raw(-std::numeric_limits<float>::infinity()),
        gguf_file::raw(std::nanf("")), gguf_file::raw(0x7F800001u), gguf_file::raw(0xFFFFFFFFu) };
    const std::string bad16[] = { gguf_file::raw((uint16_t) 0x7C00), gguf_file::raw((uint16_t) 0xFC00), gguf_file::raw((uint16_t) 0x7E00),
        gguf_file::raw((uint16_t) 0xFFFF) };

    for (const char * kind : KINDS) {
        for (ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
            const auto file = sidecar_file(kind, true, type);
            for (size_t i = 0; i < file.tensors.size(); ++i) {
                const auto & t = file.tensors[i];
                const size_t size  = ggml_type_size((ggml_type) t.type);
                const size_t n     = t.data.size()/size;
                const size_t where = i % 3 == 0 ? 0 : i % 3 == 1 ? n/2 : n - 1;
                for (int j = 0; j < 4; ++j) {
                    auto broken = file;
                    const auto & bad = t.type == GGML_TYPE_F32 ? bad32[j] : bad16[j];
                    broken.tensors[i].data.replace(where*size, bad.size(), bad);
                    CHECK_FAILS(broken.bytes(), "'" + t.name + "' (" + ggml_type_name((ggml_type) t.type) + ") is not finite from value " +
                            std::to_string(where*ggml_blck_size((ggml_type) t.type)));
                }
            }
        }
    }

    // beyond what is read at once
    sidecar_shape shape;
    shape.n_layer   = 1;
    shape.n_embd    = 65536;
    shape.n_head_kv = 1;
    auto file = sidecar_file("kvzap", false, GGML_TYPE_F32, true, shape);
    CHECK(open_bytes(file.bytes()).empty());
    file.tensors[0].data.replace(40000*4, 4, bad32[0]);
    CHECK_FAILS(file.bytes(), "value 40000");
}

TEST(numbers_that_lie) {
    const auto file = sidecar_file("fast_kvzip", true);
    const uint64_t counts[] = { 0, 1, 13, 65535, 65536, 65537, 1ull << 31, 1ull << 32, 1ull << 62, INT64_MAX, 1ull << 63, UINT64_MAX - 1 };
    for (uint64_t n : counts) {
        auto broken = file;
        broken.n_tensors = n;
        CHECK(!open_bytes(broken.bytes()).empty());
        broken = file;
        broken.n_keys = n;
        CHECK(!open_bytes(broken.bytes()).empty());
    }
    for (uint64_t n : counts) {
        for (size_t i : { (size_t) 0, file.tensors.size()/2, file.tensors.size() - 1 }) {
            for (size_t dim = 0; dim < file.tensors[i].ne.size(); ++dim) {
                auto broken = file;
                broken.tensors[i].ne[dim] = n;
                if (n != file.tensors[i].ne[dim]) {
                    CHECK(!open_bytes(broken.bytes()).empty());
                }
            }
            auto broken = file;
            broken.tensors[i].ne = { n, n, n, n };
            CHECK(!open_bytes(broken.bytes()).empty());
            broken.tensors[i].ne = std::vector<uint64_t>(n % 7, 1); // also of 0 and 5 dimensions
            CHECK(!open_bytes(broken.bytes()).empty());

            broken = file;
            broken.tensors[i].type = (int32_t) n;
            if (broken.tensors[i].type != file.tensors[i].type && n != 1) {
                CHECK(!open_bytes(broken.bytes()).empty());
            }
        }

        // strings and arrays
        auto broken = file;
        broken.set("x", gguf_file::raw<int32_t>(GGUF_TYPE_STRING) + gguf_file::raw(n | 1ull << 20));
        CHECK(!open_bytes(broken.bytes()).empty());
        for (int32_t type = 0; type < GGUF_TYPE_COUNT + 2; ++type) {
            broken.set("x", gguf_file::raw<int32_t>(GGUF_TYPE_ARRAY) + gguf_file::raw(type) + gguf_file::raw(n | 1ull << 20));
            CHECK(!open_bytes(broken.bytes()).empty());
        }
        broken.set("x", gguf_file::raw((int32_t) (n + GGUF_TYPE_COUNT)));
        CHECK(!open_bytes(broken.bytes()).empty());
    }

    for (int64_t delta : { -32, -1, 1, 32, 1 << 20 }) { // overlapping, out of line, with a hole
        auto broken = file;
        broken.tensors[2].offset = GGML_PAD(file.tensors[0].data.size(), 32) + GGML_PAD(file.tensors[1].data.size(), 32) + delta;
        CHECK_FAILS(broken.bytes(), "lies at offset");
    }
    {
        auto broken = file;
        broken.tensors[2].offset = INT64_MAX;
        CHECK_FAILS(broken.bytes(), "lies at offset");
        broken.tensors[2].offset = 0;
        CHECK_FAILS(broken.bytes(), "lies at offset");
        broken = file;
        broken.tensors.push_back(broken.tensors[3]);
        CHECK_FAILS(broken.bytes(), "there twice");
        broken = file;
        broken.keys.push_back(broken.keys[3]);
        CHECK_FAILS(broken.bytes(), "there twice");
        broken = file;
        broken.str("", "x");
        CHECK_FAILS(broken.bytes(), "a name of 0 bytes");
        broken = file;
        broken.str(std::string("general.type\0x", 14), "model");
        CHECK_FAILS(broken.bytes(), "zero byte");
        broken = file;
        broken.str("\x1b[2J", "x");
        broken.keys.push_back(broken.keys.back());
        CHECK_FAILS(broken.bytes(), "\\x1b[2J");
    }
    for (uint32_t align : { 0u, 1u, 4u, 7u, 24u, 33u, 1u << 17, 1u << 31, UINT32_MAX }) {
        auto broken = file;
        broken.u32("general.alignment", align);
        CHECK_FAILS(broken.bytes(), "alignment");
    }
    for (uint32_t align : { 8u, 64u, 65536u }) {
        auto other = file;
        other.u32("general.alignment", align);
        other.align = align;
        CHECK(open_bytes(other.bytes()).empty());
    }

    // what a reader must not mind
    auto other = file;
    other.str("indexmem.scores.x\x1b[2J", "\x1b[2J");
    other.array("general.tags", GGUF_TYPE_STRING, { gguf_file::raw(std::string("a")), gguf_file::raw(std::string()) });
    other.array("something.else", GGUF_TYPE_FLOAT64, {});
    CHECK(open_bytes(other.bytes()).empty());

    // a header that only costs memory
    other.array("large", GGUF_TYPE_STRING, std::vector<std::string>((17 << 20)/8, gguf_file::raw<uint64_t>(0)));
    CHECK_FAILS(other.bytes(), "no sidecar needs that many");
}

TEST(truncated_everywhere) {
    const auto file = sidecar_file("kvzap", true, GGML_TYPE_Q8_0);
    const std::string bytes = file.bytes();
    const size_t n_header = file.header().size();
    const size_t n_last   = file.tensors.back().data.size();
    const size_t n_needed = bytes.size() - GGML_PAD(n_last, file.align) + n_last;
    for (size_t n = 0; n < bytes.size(); n += n < n_header || n > n_needed - 64 ? 1 : 37) {
        CHECK_MSG(open_bytes(bytes.substr(0, n)).empty() == (n >= n_needed), "%zu of %zu bytes", n, bytes.size());
    }
}

// nothing to expect of each, but to be refused or to load
TEST(every_byte_of_the_header_flipped) {
    size_t n_loaded = 0, n_refused = 0;
    for (const auto & file : { sidecar_file("retention", true), sidecar_file("pairwise", false, GGML_TYPE_F16, true) }) {
        std::string bytes = file.bytes();
        const size_t n_header = file.header().size();
        for (size_t i = 0; i < n_header; ++i) {
            const char was = bytes[i];
            for (int value : { was ^ 1, was ^ 0x80, 0, 0xFF }) {
                bytes[i] = (char) value;
                (open_bytes(bytes).empty() ? n_loaded : n_refused)++;
            }
            bytes[i] = was;
        }
        for (size_t i = n_header; i < bytes.size(); i += 11) {
            const char was = bytes[i];
            bytes[i] = (char) 0xFF;
            (open_bytes(bytes).empty() ? n_loaded : n_refused)++;
            bytes[i] = was;
        }
    }
    CHECK(n_loaded > 0 && n_refused > n_loaded);
}

TEST(corpus_of_the_fuzzer) {
    size_t n = 0, n_loaded = 0;
    for (const auto & entry : std::filesystem::directory_iterator(INDEXMEM_CORPUS)) {
        n_loaded += open_path(entry.path().string()).empty();
        n++;
    }
    CHECK(n > 100 && n_loaded > 20);
}

//
// with a model
//

static constexpr int N_VOCAB = 32, N_EMBD = 32, N_LAYER = 2, N_HEAD = 4, N_FF = 32;

// `fine_tuned`: one number in one norm is another; `n_head_kv`: of each layer
static llama_model * make_model(bool fine_tuned, std::vector<int32_t> n_head_kv, bool no_alloc = false) {
    ggml_context * ctx  = ggml_init({ 1u << 20, nullptr, false });
    gguf_context * gguf = gguf_init_empty();

    const auto add = [&](const std::string & name, int64_t ne0, int64_t ne1) {
        ggml_tensor * t = ne1 > 0 ? ggml_new_tensor_2d(ctx, GGML_TYPE_F32, ne0, ne1) : ggml_new_tensor_1d(ctx, GGML_TYPE_F32, ne0);
        ggml_set_name(t, name.c_str());
        for (int64_t i = 0; i < ggml_nelements(t); ++i) {
            ((float *) t->data)[i] = fine_tuned && i == 3 && name == "blk.1.ffn_norm.weight" ? 1.5f : 1.0f;
        }
        gguf_add_tensor(gguf, t);
    };
    add("token_embd.weight",  N_EMBD, N_VOCAB);
    add("output_norm.weight", N_EMBD, 0);
    for (int il = 0; il < N_LAYER; ++il) {
        const std::string blk = "blk." + std::to_string(il) + ".";
        add(blk + "attn_norm.weight",   N_EMBD, 0);
        add(blk + "attn_q.weight",      N_EMBD, N_EMBD);
        add(blk + "attn_k.weight",      N_EMBD, N_EMBD/N_HEAD*n_head_kv[il]);
        add(blk + "attn_v.weight",      N_EMBD, N_EMBD/N_HEAD*n_head_kv[il]);
        add(blk + "attn_output.weight", N_EMBD, N_EMBD);
        add(blk + "ffn_norm.weight",    N_EMBD, 0);
        add(blk + "ffn_gate.weight",    N_EMBD, N_FF);
        add(blk + "ffn_up.weight",      N_EMBD, N_FF);
        add(blk + "ffn_down.weight",    N_FF, N_EMBD);
    }
    gguf_set_val_str(gguf, "general.architecture", "llama");
    gguf_set_val_str(gguf, "tokenizer.ggml.model", "no_vocab");
    gguf_set_val_u32(gguf, "llama.vocab_size", N_VOCAB);
    gguf_set_val_u32(gguf, "llama.context_length", 64);
    gguf_set_val_u32(gguf, "llama.embedding_length", N_EMBD);
    gguf_set_val_u32(gguf, "llama.block_count", N_LAYER);
    gguf_set_val_u32(gguf, "llama.feed_forward_length", N_FF);
    gguf_set_val_u32(gguf, "llama.attention.head_count", N_HEAD);
    gguf_set_arr_data(gguf, "llama.attention.head_count_kv", GGUF_TYPE_INT32, n_head_kv.data(), n_head_kv.size());
    gguf_set_val_u32(gguf, "llama.rope.dimension_count", N_EMBD/N_HEAD);
    gguf_set_val_f32(gguf, "llama.attention.layer_norm_rms_epsilon", 1e-5f);

    const std::string path = "test-sidecar-model.gguf";
    gguf_write_to_file(gguf, path.c_str(), false);
    gguf_free(gguf);
    ggml_free(ctx);

    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    auto params = llama_model_default_params();
    params.n_gpu_layers = 0;
    params.no_alloc     = no_alloc;
    params.use_mmap     = params.use_mmap && !no_alloc;
    llama_model * res = llama_model_load_from_file(path.c_str(), params);
    remove(path.c_str());
    return res;
}

static std::string load_error(const gguf_file & file, const llama_model * model) {
    write(PATH, file.bytes());
    indexmem_sidecar sidecar(PATH);
    try {
        sidecar.load(*model, false);
    } catch (const indexmem_sidecar_error & err) {
        CHECK(sidecar.size_bytes() == 0);
        return err.what();
    }
    return "";
}

TEST(weights_of_a_model) {
    llama_model * model = make_model(false, { 2, 2 });
    CHECK(model != nullptr);
    for (const char * kind : KINDS) {
        for (ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
            const auto file = sidecar_file(kind, true, type);
            write(PATH, file.bytes());
            indexmem_sidecar sidecar(PATH);
            sidecar.load(*model, type == GGML_TYPE_F32);
            sidecar.load(*model, type == GGML_TYPE_F32); // twice is as good as once

            size_t size = 0, n = 0;
            for (const auto & t : file.tensors) {
                const uint32_t il = (uint32_t) (t.name[4] - '0');
                const std::string name = t.name.substr(strlen("blk.0.indexmem."));
                if (name == "phi_proj.weight") {
                    CHECK(sidecar.get_layer(il).count(name) == 0);
                    continue;
                }
                const ggml_tensor * loaded = sidecar.get_layer(il).at(name);
                std::string data(ggml_nbytes(loaded), '\0');
                ggml_backend_tensor_get(loaded, &data[0], 0, data.size());
                CHECK(data == t.data && loaded->type == t.type && loaded->ne[0] == (int64_t) t.ne[0]);
                CHECK(loaded->ne[1] == (int64_t) (t.ne.size() > 1 ? t.ne[1] : 1) && loaded->ne[2] == (int64_t) (t.ne.size() > 2 ? t.ne[2] : 1));
                size += data.size();
                n++;
            }
            CHECK(sidecar.get_layer(0).size() + sidecar.get_layer(1).size() == n);
            CHECK(sidecar.size_bytes() == size);
        }
    }
    CHECK(load_error(sidecar_file("none", true), model).empty());

    // a file that changes between the check and the reading
    const auto file = sidecar_file("kvzap");
    auto other = file;
    other.tensors[1].data[0] ^= 1;
    for (const std::string & bytes : { other.bytes(), file.bytes() + "x", file.bytes().substr(0, 100), std::string() }) {
        write(PATH, file.bytes());
        indexmem_sidecar sidecar(PATH);
        write(PATH, bytes);
        try {
            sidecar.load(*model, false);
            CHECK_MSG(false, "a file of %zu bytes, %zu expected", bytes.size(), file.bytes().size());
        } catch (const indexmem_sidecar_error & err) {
            CHECK_MSG(has(err.what(), "has changed"), "%s", err.what());
        }
        remove(PATH.c_str());
        try {
            sidecar.load(*model, false);
            CHECK_MSG(false, "no file");
        } catch (const indexmem_sidecar_error & err) {
            CHECK_MSG(has(err.what(), "cannot read"), "%s", err.what());
        }
    }
    llama_model_free(model);
}

TEST(sidecars_of_other_models) {
    llama_model * model = make_model(false, { 2, 2 });
    llama_model * tuned = make_model(true,  { 2, 2 });
    llama_model * mixed = make_model(false, { 2, 1 });
    llama_model * dry   = make_model(false, { 2, 2 }, true);
    CHECK(model && tuned && mixed && dry);

    auto file = sidecar_file("kvzap");
    file.str("general.architecture", "unknown");
    CHECK(load_error(file, model).empty());
    file.str("general.architecture", "llama");
    file.u32("indexmem.attention.head_count", N_HEAD);
    file.u32("indexmem.attention.key_length", N_EMBD/N_HEAD);
    file.str("indexmem.base_model.norms_fnv1a64", indexmem_fingerprint(*model));
    CHECK(load_error(file, model).empty());
    CHECK(load_error(file, dry).empty());
    CHECK(has(load_error(file, tuned), "--no-fingerprint") && has(load_error(file, tuned), indexmem_fingerprint(*tuned)));
    CHECK(has(load_error(file, mixed), "2 KV heads in layer 0 and 1 in layer 1"));

    // FNV-1a of the five norms, which are all ones, and of their names
    uint64_t hash = 0xcbf29ce484222325ull;
    for (const char * name : { "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "blk.1.attn_norm.weight", "blk.1.ffn_norm.weight", "output_norm.weight" }) {
        std::string bytes = std::string(name) + '\0';
        for (int i = 0; i < N_EMBD; ++i) {
            bytes += gguf_file::raw(1.0f);
        }
        for (const char c : bytes) {
            hash = (hash ^ (uint8_t) c)*0x100000001b3ull;
        }
    }
    char expected[17];
    snprintf(expected, sizeof(expected), "%016llx", (unsigned long long) hash);
    CHECK(indexmem_fingerprint(*model) == expected);
    CHECK(indexmem_fingerprint(*tuned) != expected);

    auto other = file;
    other.str("general.architecture", "qwen3");
    CHECK(has(load_error(other, model), "architecture 'qwen3', this model has 'llama'"));
    other.str("general.architecture", "\x1b[2J");
    CHECK(has(load_error(other, model), "'\\x1b[2J'"));
    other = file;
    other.u32("indexmem.attention.head_count", 8);
    CHECK(has(load_error(other, model), "attention.head_count 8, this model has 4"));
    other = file;
    other.u32("indexmem.attention.key_length", 64);
    CHECK(has(load_error(other, model), "attention.key_length 64, this model has 8"));

    for (int i = 0; i < 3; ++i) {
        sidecar_shape shape;
        (i == 0 ? shape.n_layer : i == 1 ? shape.n_embd : shape.n_head_kv) = 1;
        const char * names[] = { "block_count 1, this model has 2", "embedding_length 1, this model has 32", "head_count_kv 1, this model has 2" };
        CHECK(has(load_error(sidecar_file("pairwise", false, GGML_TYPE_F32, false, shape), model), names[i]));
    }
    for (llama_model * m : { model, tuned, mixed, dry }) {
        llama_model_free(m);
    }
}
