#pragma once

#include "indexmem-ops.h"

#include "ggml.h"

#include <map>
#include <vector>

//
// Evictions on devices that have no kernels of ours: Vulkan, SYCL, ...
//
// Keys and values lie in the memory of the device, and what it computes of an eviction are ops of ggml. What is small lies in the
// host's memory, next to our kernels of the CPU: positions, the state of an indexer or a memory, ranks and the plan. So it is the same
// selection as everywhere, with the same ties. Between device and host go ranks and row indices, a few values for each slot, and with
// a memory the rows that leave and masks with its biases; the cache itself never does.
//
//   rank     ops of ggml if the policy reads keys; else our kernel, on the CPU
//   select   our kernel, on the CPU
//   moves    our kernel, on the CPU: the plan as row indices
//   memory   our kernel, on the CPU, of rows that the device gathers
//   compact  K, V: get_rows, set_rows on the device; positions, state: our kernel, on the CPU
//
// Invariants
//   - rows come through fp32 bit for bit, or the type is not exact
//   - what has no form in ops of ggml stays a kernel of ours, which the device is then found to lack
//

// Whether rows of this type are the same after get_rows and set_rows. Quantised types are where a block has a scale alone and its largest
// value takes the last step of it: read as fp32 it has the same scale again.
bool indexmem_stock_exact(ggml_type type);

// cache [n_embd, n_slots, H, S], moves of ggml_indexmem_moves(); returns a view of `cache`
ggml_tensor * indexmem_stock_compact(ggml_context * ctx, ggml_tensor * cache, ggml_tensor * moves);

// The rows of `cache` that leave, for a memory: F32 [n_embd, n_evict_max, H, S], and a plan by which all of them leave. Of that the evicted
// slots alone are a plan's.
ggml_tensor * indexmem_stock_leaving(ggml_context * ctx, ggml_tensor * cache, ggml_tensor * moves);
ggml_tensor * indexmem_stock_leaving_plan(ggml_context * ctx, ggml_tensor * moves);

// Ranks that need keys, and the inputs for them (indexmem-stock-rank.cpp). What reads queries is products of matrices. Who sees what
// depends on positions, which lie with the host: it sends the ages of entries, and gets attention back, whose neighbours in the order of
// positions it smooths (snapkv).
class indexmem_stock {
public:
    explicit indexmem_stock(int64_t n_seq) : n_seq(n_seq) {}

    // whether build_rank() knows the policy
    static bool ranks(int policy);

    // keys [n_embd, n_slots, H, S] -> F32 [n_slots, H, S], the other arguments those of ggml_indexmem_rank()
    ggml_tensor * build_rank(ggml_context * ctx, ggml_tensor * keys, ggml_tensor * pos, ggml_tensor * ctl, ggml_tensor * q, ggml_tensor * sinks,
            int policy, float scale, float softcap);

    // from the values of ctl, I32 [INDEXMEM_CTL_SIZE, S]
    void set_input(const std::vector<int32_t> & ctl);

private:
    ggml_tensor * get_weights(ggml_context * ctx, int64_t n_slots);
    ggml_tensor * get_shares (ggml_context * ctx, int64_t n_queries);

    ggml_tensor * build_keydiff(ggml_context * ctx, ggml_tensor * keys);

    ggml_tensor * build_queries(ggml_context * ctx, ggml_tensor * ring, int64_t n_queries, int64_t H);
    ggml_tensor * build_used(ggml_context * ctx, int64_t n_slots, int64_t H);
    ggml_tensor * build_seen(ggml_context * ctx, ggml_tensor * ages, int64_t n_queries);
    ggml_tensor * build_attention(ggml_context * ctx, ggml_tensor * keys, ggml_tensor * q, ggml_tensor * seen, ggml_tensor * sinks,
            float scale, float softcap);
    ggml_tensor * build_expected(ggml_context * ctx, ggml_tensor * keys, ggml_tensor * q, int64_t n_queries, float scale);

    const int64_t n_seq;

    int64_t n_ring = 0;

    // Slots that are not in use may hold anything. They are read as slot 0, and count nothing. Likewise queries where there are fewer.
    std::map<int64_t, ggml_tensor *> rows;      // H -> I32 [n_slots, H, S]
    std::map<int64_t, ggml_tensor *> ring_rows; // H*G -> I32 [n_queries, H*G, S]
    ggml_tensor * weights = nullptr; // F32 [1, n_slots, 1, S]
    ggml_tensor * shares  = nullptr; // F32 [n_queries, 1, 1, S]
    ggml_tensor * newer   = nullptr; // F32 [1, n_queries]        what is younger is not seen
};
