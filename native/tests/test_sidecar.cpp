// Sidecars with wrong keys, constants, tensors and values. What is not a sidecar must be refused with an
// indexmem_sidecar_error that says so and can be printed; nothing else may come out of the loader.

#define SIDECAR_PATH "test-sidecar.indexmem.gguf"

#include "indexmem-gguf-check.h"
#include "sidecar_test.h"

#include <algorithm>
#include <cmath>
#include <limits>

static uint64_t hash_of(const std::string & bytes) {
    write(PATH, bytes);
    return indexmem_sidecar(PATH).get_hash();
}

TEST(every_kind_loads) {
    for (const char * kind : KINDS) {
        for (int i = 0; i < 18; ++i) {
            const char * const memories[] = { "none", "residual", "centroid" };
            const ggml_type types[] = { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0 };
            const auto file = sidecar_file(kind, memories[i % 3], types[i/6], i/3 % 2);
            const std::string error = open_bytes(file.bytes());
            CHECK_MSG(error.empty(), "%s", error.c_str());

            const indexmem_sidecar sidecar(PATH);
            CHECK(sidecar.get_indexer() && sidecar.get_indexer()->kind() == std::string(kind));
            CHECK(sidecar.get_geometry().n_layer == 2 && sidecar.get_geometry().n_embd == 32 && sidecar.get_geometry().n_head_kv == 2);
        }
    }
    for (const char * memory : { "residual", "centroid" }) {
        CHECK(open_bytes(sidecar_file("none", memory).bytes()).empty());
        CHECK(indexmem_sidecar(PATH).get_indexer() == nullptr);
        CHECK(indexmem_sidecar(PATH).get_memory()->kind() == std::string(memory));
        CHECK(indexmem_sidecar(PATH).get_memory()->enabled(1));
    }
    CHECK(indexmem_sidecar(PATH).get_memory()->n_slots() == 3);
    CHECK_FAILS(sidecar_file("none").bytes(), "neither an indexer nor a memory");
}

// the same file as ggml writes it
TEST(files_of_ggml_load) {
    const auto file = sidecar_file("pairwise", "residual", GGML_TYPE_Q8_0);
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

TEST(hash_tells_what_changes_ranks_and_memory) {
    const auto file = sidecar_file("retention", "residual");
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
    changed.find("blk.1.indexmem.phi_proj.weight").data[0] ^= 1; // of the memory
    CHECK(hash_of(changed.bytes()) != hash);
    changed = file;
    changed.f32("indexmem.residual.eps", 0.25f);
    CHECK(hash_of(changed.bytes()) != hash);

    changed = file;
    changed.str("general.name", "anything");
    changed.f32("indexmem.scores.recall", 0.5f);
    std::reverse(changed.keys.begin(), changed.keys.end());
    CHECK(hash_of(changed.bytes()) == hash);
}

// Every key missing, and of every other type: refused, or one of the few that may be missing.
TEST(keys_missing_or_of_another_type) {
    std::vector<gguf_file> files = { sidecar_file("none", "residual"), sidecar_file("none", "centroid") };
    for (const char * kind : KINDS) {
        files.push_back(sidecar_file(kind, "residual"));
        files.push_back(sidecar_file(kind, "none", GGML_TYPE_F32, true));
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

static gguf_file file_for(const std::vector<int32_t> & layers, const std::string & memory = "none") {
    gguf_file res = sidecar_file("kvzap", memory);
    std::vector<std::string> values;
    for (int32_t il : layers) {
        values.push_back(gguf_file::raw(il));
    }
    res.u32("indexmem.schema_version", 2);
    res.array("indexmem.layers", GGUF_TYPE_INT32, values);
    const auto is_listed = [&](const gguf_file::tensor & t) {
        return std::any_of(layers.begin(), layers.end(), [&](int32_t il) { return t.name.rfind("blk." + std::to_string(il) + ".", 0) == 0; });
    };
    res.tensors.erase(std::remove_if(res.tensors.begin(), res.tensors.end(), [&](const auto & t) { return !is_listed(t); }), res.tensors.end());
    return res;
}

TEST(files_for_some_layers) {
    CHECK(open_bytes(file_for({ 1 }).bytes()) == "");
    CHECK(open_bytes(file_for({ 0, 1 }).bytes()) == "");
    CHECK_FAILS(file_for({}).bytes(), "indexmem.layers");
    CHECK_FAILS(file_for({ 1, 0 }).bytes(), "expected numbers from 0 to 1 that ascend");
    CHECK_FAILS(file_for({ 1, 1 }).bytes(), "ascend");
    CHECK_FAILS(file_for({ -1, 1 }).bytes(), "is -1");
    CHECK_FAILS(file_for({ 0, 2 }).bytes(), "is 2");
    CHECK_FAILS(file_for({ 0, INT32_MAX }).bytes(), "ascend");

    auto file = file_for({ 1 });
    file.u32("indexmem.schema_version", 1);
    CHECK_FAILS(file.bytes(), "'indexmem.layers' is there in a file of schema version 1");
    file.u32("indexmem.schema_version", 2);
    file.u32("indexmem.layers", 1);
    CHECK_FAILS(file.bytes(), "indexmem.layers");
    file.remove("indexmem.layers");
    CHECK_FAILS(file.bytes(), "'indexmem.layers' is missing");

    file = file_for({ 0 });
    file.tensors.push_back(sidecar_file("kvzap").tensors.back()); // of layer 1
    CHECK_FAILS(file.bytes(), "does not belong");

    // what is switched on for a layer has to be there
    file = file_for({ 1 }, "residual");
    CHECK_FAILS(file.bytes(), "value 0 of key 'indexmem.residual.enabled' is true");
    file.array("indexmem.residual.enabled", GGUF_TYPE_BOOL, { gguf_file::raw((int8_t) 0), gguf_file::raw((int8_t) 1) });
    CHECK(open_bytes(file.bytes()) == "");
}

TEST(needs_of_layers_and_heads) {
    const auto file_with = [](const char * key, int32_t type, const auto & values, const char * indexer) {
        auto file = sidecar_file(indexer, "residual");
        std::vector<std::string> raws;
        for (const auto value : values) {
            raws.push_back(gguf_file::raw(value));
        }
        file.array(key, type, raws);
        return file.bytes();
    };
    const auto with = [&](const std::vector<float> & values, const char * indexer = "kvzap", int32_t type = GGUF_TYPE_FLOAT32) {
        return file_with("indexmem.budget_share", type, values, indexer);
    };
    const float inf = std::numeric_limits<float>::infinity();
    write(PATH, with({ 1.0f, 4.0f }));
    const indexmem_sidecar shared(PATH);
    CHECK(shared.get_needs().size() == 4 && shared.get_needs()[1].share == 1.0f); // two heads a layer
    CHECK(shared.get_needs()[2].share == 4.0f && shared.get_needs()[3] == shared.get_needs()[2] && shared.get_needs()[3].least == 0);

    write(PATH, with({ 1.0f, 4.0f, 2.0f, 1.0f })); // one value for each head
    const indexmem_sidecar heads(PATH);
    CHECK(heads.get_needs().size() == 4 && heads.get_needs()[1].share == 4.0f && heads.get_needs()[2].share == 2.0f);
    CHECK(heads.get_hash() == shared.get_hash());
    write(PATH, with({ 1.0f, 1.0f, 2.0f, 2.0f }, "pairwise"));
    CHECK(indexmem_sidecar(PATH).get_needs()[3].share == 2.0f);
    CHECK_FAILS(with({ 1.0f, 1.0f, 2.0f, 1.0f }, "pairwise"), "tell KV heads of layer 1 apart");

    write(PATH, sidecar_file("kvzap", "residual").bytes());
    const indexmem_sidecar plain(PATH);
    CHECK(plain.get_needs().empty() && plain.get_hash() == shared.get_hash()); // ranks are the same

    for (const auto & values : std::vector<std::vector<float>>{ {}, { 1.0f }, { 1.0f, 1.0f, 1.0f } }) {
        CHECK_FAILS(with(values), "indexmem.budget_share");
    }
    for (float value : { 0.0f, -1.0f, 0.015f, 64.5f, inf, -inf, std::nanf("") }) {
        CHECK_FAILS(with({ 1.0f, value }), "indexmem.budget_share");
    }
    CHECK_FAILS(with({ 1.0f, 2.0f }, "kvzap", GGUF_TYPE_INT32), "indexmem.budget_share");
    CHECK_FAILS(with({ 1.0f, 2.0f }, "none"), "without an indexer");

    const auto least = [&](const std::vector<int32_t> & values, const char * indexer = "kvzap") {
        return file_with("indexmem.budget_least", GGUF_TYPE_INT32, values, indexer);
    };
    write(PATH, least({ 0, 1 << 20 }));
    const indexmem_sidecar first(PATH);
    CHECK(first.get_needs()[0].share == 1.0f && first.get_needs()[3].least == 1 << 20 && first.get_hash() == plain.get_hash());
    write(PATH, least({ 0, 7, 0, 0 }));
    CHECK(indexmem_sidecar(PATH).get_needs()[1].least == 7 && indexmem_sidecar(PATH).get_needs()[2].least == 0);
    for (const auto & values : std::vector<std::vector<int32_t>>{ {}, { 1 }, { 1, 1, 1 }, { 0, -1 }, { 0, (1 << 20) + 1 } }) {
        CHECK_FAILS(least(values), "indexmem.budget_least");
    }
    CHECK_FAILS(least({ 0, 1 }, "none"), "without an indexer");
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
        auto file = sidecar_file(c.kind, "residual");
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
        auto file = sidecar_file("none", "residual");
        file.array(std::string("indexmem.residual.") + key, GGUF_TYPE_FLOAT32, { gguf_file::raw(0.0f), gguf_file::raw(std::nanf("")) });
        CHECK_FAILS(file.bytes(), "value 1");
        file.array(std::string("indexmem.residual.") + key, GGUF_TYPE_FLOAT32, { gguf_file::raw(0.0f) });
        CHECK_FAILS(file.bytes(), "expected 2");
    }

    for (float value : { 0.0f, -1.0f, std::nanf(""), inf }) { // 0 is what switching off is for
        auto file = sidecar_file("none", "centroid");
        file.array("indexmem.centroid.gate", GGUF_TYPE_FLOAT32, { gguf_file::raw(1.0f), gguf_file::raw(value) });
        CHECK_FAILS(file.bytes(), "indexmem.centroid.gate");
    }
    for (uint32_t n : { 0u, 4097u }) {
        auto file = sidecar_file("none", "centroid");
        file.u32("indexmem.centroid.slot_count", n);
        CHECK_FAILS(file.bytes(), "indexmem.centroid.slot_count");
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
        { "kvzap", "indexmem.memory.kind", "slots", "centroid, residual, none" },
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
        const auto file = sidecar_file(kind, "residual");
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
                broken.tensors[i].data.assign(file.tensors[i].data.size()/4*ggml_type_size(type), '\0');
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
            const auto file = sidecar_file(kind, "residual", type);
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
    auto file = sidecar_file("kvzap", "none", GGML_TYPE_F32, true, shape);
    CHECK(open_bytes(file.bytes()).empty());
    file.tensors[0].data.replace(40000*4, 4, bad32[0]);
    CHECK_FAILS(file.bytes(), "value 40000");
}
