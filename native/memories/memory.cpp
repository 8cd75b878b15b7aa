#include "memory.h"

#define INDEXMEM_MEMORY(name, help) \
    std::unique_ptr<indexmem_memory> indexmem_make_memory_##name(const indexmem_geometry & geometry, const indexmem_metadata * meta);
#include "memories.def"
#undef INDEXMEM_MEMORY

static const indexmem_memory_info memories[] = {
#define INDEXMEM_MEMORY(name, help) { #name, help, indexmem_make_memory_##name },
#include "memories.def"
#undef INDEXMEM_MEMORY
};

const indexmem_memory_info * indexmem_memory_get(size_t i) {
    return i < sizeof(memories)/sizeof(memories[0]) ? &memories[i] : nullptr;
}

const indexmem_memory_info * indexmem_memory_find(const std::string & name) {
    for (size_t i = 0; indexmem_memory_get(i); ++i) {
        if (name == memories[i].name) {
            return &memories[i];
        }
    }
    return nullptr;
}
