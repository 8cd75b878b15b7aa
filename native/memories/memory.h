#pragma once

// A kind of latent memory: what is evicted is written into a state of fixed size, which every later query reads.
//
//   before the entries that leave are overwritten
//     -> build_write   plan, K, V -> state
//   in attention, from the first eviction on
//     -> build_count   slots of the memory in the softmax: entries that each stands for
//     -> build_add     or: what the memory adds to the output of attention
//
// Invariants
//   - a kind is one file that defines indexmem_make_memory_<kind>(), and one line of memories.def
//   - a kind holds constants only; its state lies in tensors of the cache, which copies, clears, saves and counts them
//   - an all-zero state is an empty memory, and reading it changes nothing
//   - the state is fp32; a sequence of which nothing leaves keeps its state bit for bit
//   - graphs consist of ops that every backend has, or GGML_OP_INDEXMEM
//
// H KV heads, S sequences of the ubatch, R slots

#include "indexmem-metadata.h"

#include "ggml.h"

#include <memory>

// F32 [ne0, ne1] of each KV head of each sequence
struct indexmem_memory_shape {
    int64_t ne0;
    int64_t ne1;
};

// views of a layer for the sequences of an ubatch
struct indexmem_memory_view {
    uint32_t il;

    std::vector<ggml_tensor *> state; // F32 [ne0, ne1, H, S] as listed by shapes()

    const indexmem_weights * weights; // of the layer; null if the kind has none
};

// what leaves, in the cache and before it is compacted
struct indexmem_memory_leaving {
    ggml_tensor * k;    // [n_embd_k, n_slots, H, S]
    ggml_tensor * v;    // [n_embd_v, n_slots, H, S]
    ggml_tensor * plan; // I32 [n_evict_max, 3, H, S]
    ggml_tensor * ctl;  // I32 [INDEXMEM_CTL_SIZE, S]

    // of a kind with slots
    ggml_tensor * k_slots; // [n_embd_k, R, H, S] rows that attention reads
    ggml_tensor * v_slots; // [n_embd_v, R, H, S]
    ggml_tensor * rows;    // I64 [R] their indices: 0, 1, ...
};

class indexmem_memory {
public:
    virtual ~indexmem_memory() = default;

    virtual const char * kind() const = 0;

    virtual bool enabled(uint32_t il) const = 0; // a layer that is not neither writes nor reads

    // R: the slots at the front of K and V that belong to the memory, and are part of the budget
    virtual uint32_t n_slots() const { return 0; }

    // false if it has no slots whose number could be chosen
    virtual bool set_slots(uint32_t n) { GGML_UNUSED(n); return false; }

    // weights in the sidecar, and the head size they are for (0: any)
    virtual std::vector<indexmem_tensor_spec> tensors() const { return {}; }
    virtual uint32_t n_embd_head() const { return 0; }

    // Keys and queries of a quantised cache are rotated by an orthonormal matrix of size n in each block of n values: the
    // weights of a layer that act on them have to follow.
    virtual void rotate_weights(const indexmem_weights & weights, const std::vector<float> & rotation, int64_t n) const {
        GGML_UNUSED(weights); GGML_UNUSED(rotation); GGML_UNUSED(n);
    }

    // The state whose rows begin with a key: keys can be turned to other positions. -1: there is none, and what has been
    // taken up could not follow.
    virtual int keyed_state() const { return -1; }

    virtual std::vector<indexmem_memory_shape> shapes(int64_t n_embd_k, int64_t n_embd_v) const = 0;

    // nodes to be computed in this order
    virtual std::vector<ggml_tensor *> build_write(ggml_context * ctx, const indexmem_memory_view & m, const indexmem_memory_leaving & e) const = 0;

    // F32 [R, H, S] entries that each slot stands for in the softmax, 0 = empty; null of a kind without slots
    virtual ggml_tensor * build_count(ggml_context * ctx, const indexmem_memory_view & m) const {
        GGML_UNUSED(ctx); GGML_UNUSED(m);
        return nullptr;
    }

    // q F32 [n_embd_k, T, G, H*S], cur F32 [n_embd_v, G, T, H*S] the output of attention -> the same with the memory's part
    virtual ggml_tensor * build_add(ggml_context * ctx, const indexmem_memory_view & m, ggml_tensor * q, ggml_tensor * cur) const {
        GGML_UNUSED(ctx); GGML_UNUSED(m); GGML_UNUSED(q);
        return cur;
    }
};

struct indexmem_memory_info {
    const char * name;
    const char * help;

    // from a sidecar, or without one (meta null): throws indexmem_sidecar_error if it cannot be
    std::unique_ptr<indexmem_memory> (*make)(const indexmem_geometry & geometry, const indexmem_metadata * meta);
};

// the table; null out of range
const indexmem_memory_info * indexmem_memory_get(size_t i);

// null if there is none of that name
const indexmem_memory_info * indexmem_memory_find(const std::string & name);
