#include "indexmem.h"

#include "indexmem-kv-cache.h"

#include "llama-context.h"

#include <atomic>
#include <cstdint>

// stopping a computation from another thread, and what of it can be taken back

static_assert(sizeof(std::atomic<int32_t>) == sizeof(int32_t) && alignof(std::atomic<int32_t>) == alignof(int32_t),
        "the flag is the caller's plain int32_t");

static bool is_set(void * flag) {
    return static_cast<const std::atomic<int32_t> *>(flag)->load(std::memory_order_relaxed) != 0;
}

void indexmem_set_cancel(llama_context * ctx, const int32_t * flag) {
    llama_set_abort_callback(ctx, flag ? is_set : nullptr, const_cast<int32_t *>(flag));
}

int32_t indexmem_tail_max(const llama_context * ctx) {
    const auto * kv = ctx ? dynamic_cast<const llama_kv_cache_bounded *>(ctx->get_memory()) : nullptr;
    return kv && kv->get_n_ring() > 0 ? (int32_t) llama_kv_cache_bounded::N_RING_SLACK : INT32_MAX;
}
