#pragma once

// Memory that a context with a bounded cache takes beside the cache

#include <cstddef>

struct llama_context;
class  llama_kv_cache_bounded;

// Compute buffers of the context, those of the graphs that are kept included. Each kind of kept graph gets its own when it
// first occurs.
size_t indexmem_compute_bytes(const llama_context & ctx);

// What the CPU takes for one op of the cache at most, with as many threads as the context has now, for caches in host memory.
// All ops of a graph share that memory, and it is taken when the first one runs.
size_t indexmem_work_bytes(const llama_context & ctx, const llama_kv_cache_bounded & kv);
