#pragma once

// Opens files as sidecars. SIDECAR_PATH is the file that the program may write.

#include "test.h"

#include "indexmem-sidecar.h"
#include "sidecar_file.h"

#include <algorithm>
#include <filesystem>
#include <fstream>

static const char * const KINDS[] = { "retention", "kvzap", "fast_kvzip", "pairwise" };

static const std::string PATH = SIDECAR_PATH;

// over what is there: file systems flush a file that is truncated first, and there are thousands
inline void write(const std::string & path, const std::string & bytes) {
    if (!std::filesystem::exists(path)) {
        std::ofstream(path, std::ios::binary);
    }
    std::fstream(path, std::ios::binary | std::ios::in | std::ios::out).write(bytes.data(), (std::streamsize) bytes.size());
    std::filesystem::resize_file(path, bytes.size());
}

// "" if it loads, else the error
inline std::string open_path(const std::string & path) {
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

inline std::string open_bytes(const std::string & bytes) {
    write(PATH, bytes);
    return open_path(PATH);
}

inline bool has(const std::string & text, const std::string & part) {
    return text.find(part) != std::string::npos;
}

#define CHECK_FAILS(bytes, part) \
    do { \
        const std::string error_ = open_bytes(bytes); \
        CHECK_MSG(has(error_, part), "'%s' is not in '%s'", std::string(part).c_str(), error_.c_str()); \
    } while (0)

struct cleanup {
    ~cleanup() { remove(PATH.c_str()); }
} static remove_file;
