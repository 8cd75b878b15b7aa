// Files that are, nearly are, and are not sidecars, byte by byte: each must be refused with an indexmem_sidecar_error that
// can be printed, or load.

#define SIDECAR_PATH "test-sidecar-bytes.indexmem.gguf"

#include "sidecar_test.h"

#ifndef _WIN32
#include <sys/stat.h>
#endif

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
    other.u32("indexmem.schema_version", 3);
    CHECK_FAILS(other.bytes(), "update indexmem-edge");
    other.u32("indexmem.schema_version", 0);
    CHECK_FAILS(other.bytes(), "schema_version");
}

TEST(numbers_that_lie) {
    const auto file = sidecar_file("fast_kvzip", "residual");
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
    const auto file = sidecar_file("kvzap", "residual", GGML_TYPE_Q8_0);
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
    for (const auto & file : { sidecar_file("retention", "residual"), sidecar_file("pairwise", "none", GGML_TYPE_F16, true) }) {
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

TEST(names_beyond_ascii) {
    const std::string name = "test-sidecar \xC3\xA9 \xD0\xBC\xD0\xB8\xD1\x80 \xE6\xA8\xA1.gguf"; // UTF-8, on Windows too
    const auto path = std::filesystem::u8path(name);
    std::ofstream(path, std::ios::binary) << sidecar_file("kvzap").bytes();
    CHECK(std::filesystem::is_regular_file(path));
    CHECK_MSG(open_path(name).empty(), "%s", open_path(name).c_str());
    std::filesystem::remove(path);
}

TEST(corpus_of_the_fuzzer) {
    size_t n = 0, n_loaded = 0;
    for (const auto & entry : std::filesystem::directory_iterator(INDEXMEM_CORPUS)) {
        n_loaded += open_path(entry.path().string()).empty();
        n++;
    }
    CHECK(n > 100 && n_loaded > 20);
}
