#pragma once

// Memory that the ops of a bounded cache take beside the cache, and beside the compute buffers of its context

#include <cstddef>

struct llama_context;
class  llama_kv_cache_bounded;

// What the CPU takes for one op of the cache at most, with as many threads as the context has now, for caches in host memory.
// All ops of a graph share that memory, and it is taken when the first one runs.
size_t indexmem_work_bytes(const llama_context & ctx, const llama_kv_cache_bounded & kv);
