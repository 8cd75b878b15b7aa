#include "indexmem.h"

#include "llama.h"

#include <atomic>
#include <cstdint>

// stopping a computation from another thread

static_assert(sizeof(std::atomic<int32_t>) == sizeof(int32_t) && alignof(std::atomic<int32_t>) == alignof(int32_t),
        "the flag is the caller's plain int32_t");

static bool is_set(void * flag) {
    return static_cast<const std::atomic<int32_t> *>(flag)->load(std::memory_order_relaxed) != 0;
}

void indexmem_set_cancel(llama_context * ctx, const int32_t * flag) {
    llama_set_abort_callback(ctx, flag ? is_set : nullptr, const_cast<int32_t *>(flag));
}
