#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

// FNV-1a, 64 bits
static constexpr uint64_t INDEXMEM_HASH_INIT = 0xcbf29ce484222325ull;

inline uint64_t indexmem_hash(uint64_t hash, const void * data, size_t n) {
    const uint8_t * p = (const uint8_t *) data;
    for (size_t i = 0; i < n; ++i) {
        hash = (hash ^ p[i])*0x100000001b3ull;
    }
    return hash;
}

inline uint64_t indexmem_hash_u64(uint64_t hash, uint64_t value) {
    return indexmem_hash(hash, &value, sizeof(value));
}

// with its length, so that two strings in a row cannot be taken for two others
inline uint64_t indexmem_hash_str(uint64_t hash, const std::string & value) {
    return indexmem_hash(indexmem_hash_u64(hash, value.size()), value.data(), value.size());
}
