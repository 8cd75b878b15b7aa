#include "indexmem-kv-cache.h"

#include "indexmem-buffers.h"
#include "indexmem-device.h"
#include "indexmem-graph.h"
#include "indexmem-layer-nodes.h"

#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

// rows of any type begin at multiples of 16 bytes then
static constexpr uint32_t N_FRONT_PAD = 8;

static constexpr uint32_t EVICT_STEP_DEFAULT = 32;

std::vector<ggml_tensor *> llama_kv_cache_bounded::layer::tensors() const {
    std::vector<ggml_tensor *> res;
    for (ggml_tensor * t : { k, v, pos, q, state, pending, queries }) {
        if (t) {
            res.push_back(t);
        }
    }
    res.insert(res.end(), memory.begin(), memory.end());
    return res;
}

// the Hadamard rotation that llama.cpp applies to quantised caches: blocks of 64 values of V, of the largest power of two
// that divides the head for K (llama_kv_cache::build_input_k_rot)
static int64_t rotation_size(ggml_type type, int64_t n_embd_head, bool largest) {
    if (!ggml_is_quantized(type) || n_embd_head % 64 != 0) {
        return 0;
    }
    const char * disable = getenv("LLAMA_ATTN_ROT_DISABLE");
    if (disable && atoi(disable)) {
        return 0;
    }
    int64_t n = 64;
    while (largest && n_embd_head % (2*n) == 0) {
        n *= 2;
    }
    return n;
}

llama_kv_cache_bounded::llama_kv_cache_bounded(
        const llama_model & model,
                ggml_type   type_k,
                ggml_type   type_v,
                     bool   offload,
                 uint32_t   n_seq_max,
                 uint32_t   n_ubatch,
             const config & cfg) :
    model(model), cfg(cfg), seqs(n_seq_max) {
    const auto & hparams = model.hparams;

    const uint64_t min = budget_min(cfg.sinks, cfg.pin, cfg.window, get_n_latent());
    if (cfg.budget < min) {
        throw std::runtime_error(format("a budget of %u is too small: at least %llu are needed (max(sinks %u, pin %u) + window %u + "
                    "%u slots of the memory + 1)", cfg.budget, (unsigned long long) min, cfg.sinks, cfg.pin, cfg.window, get_n_latent()));
    }
    if (strcmp(get_policy().name, "indexer") == 0) {
        indexer = cfg.sidecar->get_indexer();
        n_wait  = std::min(std::max(cfg.budget/WAIT_SHARE, N_WAIT_MIN), N_WAIT_MAX);
    }

    // Attention looks at a multiple of N_KV_PAD rows from row n_front on, or with the slots of the memory from row 0 on.
    const uint32_t n_entries = cfg.budget - get_n_latent() + n_ubatch;
    n_front = GGML_PAD(get_n_latent(), N_FRONT_PAD);
    n_slots = std::max(GGML_PAD(n_entries, N_KV_PAD), GGML_PAD(n_front + n_entries, N_KV_PAD) - n_front);

    const uint32_t n_queries = indexer ? indexer->n_queries() : get_policy().n_queries;
    n_ring = n_queries > (indexer ? 0 : 1) ? n_queries + N_RING_SLACK : 0;

    indexmem_buffers buffers(model, offload, 10u*hparams.n_layer_all);

    // the head size all cached layers share, or 0: a rotation needs one size (as in llama_kv_cache)
    int64_t head_k = -1;
    int64_t head_v = -1;

    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        if (!hparams.has_kv(il) || hparams.n_head_kv(il) == 0) {
            continue;
        }
        const int64_t n_embd_k = hparams.n_embd_head_k(il);
        const int64_t n_embd_v = hparams.n_embd_head_v(il);

        head_k = head_k == -1 || head_k == n_embd_k ? n_embd_k : 0;
        head_v = head_v == -1 || head_v == n_embd_v ? n_embd_v : 0;

        // of the caches that this layer can have, the one that its device computes; the nodes are built as for the graph
        const auto nodes = [&](ggml_context * ctx) {
            const layer l = new_layer(ctx, il, type_k, type_v);
            auto res = indexmem_layer_nodes_of_all(ctx, hparams, *this, l, 1, n_ubatch);
            const auto single = indexmem_layer_nodes_of_all(ctx, hparams, *this, l, n_seq_max, 1);
            res.insert(res.end(), single.begin(), single.end());
            return res;
        };
        auto * buft = offload ? indexmem_device_buft(model.dev_layer(il), nodes) : nullptr;
        const layer l = new_layer(buffers.context(il, buft), il, type_k, type_v);

        map_layer_ids[il] = layers.size();
        layers.push_back(l);
    }

    buffers.alloc(format("the bounded KV cache (%u slots per KV head)", n_slots));
    ctxs_bufs = std::move(buffers.get());
    clear(true); // no NaN in slots not written yet, and an empty memory

    rot_k = rotation_size(type_k, std::max<int64_t>(head_k, 0), true);
    rot_v = rotation_size(type_v, std::max<int64_t>(head_v, 0), false);
    rot_k = head_k > 0 ? rot_k : 0;
    rot_v = head_v > 0 ? rot_v : 0;

    if (cfg.memory && rot_k > 0 && !cfg.memory->tensors().empty() && !hparams.no_alloc) {
        for (const auto & l : layers) {
            cfg.memory->rotate_weights(cfg.sidecar->get_layer(l.il), indexmem_hadamard(rot_k), rot_k);
        }
    }

    LLAMA_LOG_INFO("%s: policy %s, budget %u, %u slots, sinks %u, pin %u, window %u, %u layers, %u sequences\n", __func__,
            get_policy().name, cfg.budget, n_slots, cfg.sinks, cfg.pin, cfg.window, (uint32_t) layers.size(), n_seq_max);
    LLAMA_LOG_INFO("%s: K (%s) and V (%s) %.2f MiB, positions and policy state %.2f MiB, rotation K %d V %d\n", __func__,
            ggml_type_name(type_k), ggml_type_name(type_v), size_kv_bytes()/1024.0/1024.0, size_meta_bytes()/1024.0/1024.0,
            (int) rot_k, (int) rot_v);
    if (indexer) {
        LLAMA_LOG_INFO("%s: indexer %s of %s: weights %.2f MiB, state %.2f MiB\n", __func__, indexer->kind(),
                cfg.sidecar->get_path().c_str(), cfg.sidecar->size_bytes()/1024.0/1024.0, size_indexer_bytes()/1024.0/1024.0);
    }
    if (cfg.memory) {
        LLAMA_LOG_INFO("%s: memory %s: %u slots, state %.2f MiB\n", __func__, cfg.memory->kind(), get_n_latent(),
                size_memory_bytes()/1024.0/1024.0);
    }
}

//
// budget arithmetic
//

uint64_t llama_kv_cache_bounded::budget_min(uint64_t sinks, uint64_t pin, uint64_t window, uint64_t n_latent) {
    return std::max(sinks, pin) + window + n_latent + 1;
}

uint32_t llama_kv_cache_bounded::n_protected(const seq_state & seq) const {
    return std::max(cfg.sinks, seq.pin);
}

uint32_t llama_kv_cache_bounded::get_budget(const seq_state & seq) const {
    uint64_t res = cfg.budget;
    if (cfg.ratio > 0.0) {
        const uint64_t min = budget_min(cfg.sinks, seq.pin, cfg.window, get_n_latent());
        res = std::min<uint64_t>(res, std::max<uint64_t>((uint64_t) std::ceil(cfg.ratio*seq.n_seen), min));
    }
    return (uint32_t) res - get_n_latent();
}

uint32_t llama_kv_cache_bounded::get_evict_step(const seq_state & seq) const {
    const uint32_t room = get_budget(seq) - n_protected(seq) - cfg.window;
    const uint32_t want = cfg.evict_step > 0 ? cfg.evict_step : std::min(EVICT_STEP_DEFAULT, room/8);
    return std::max(1u, std::min(want, room));
}

uint32_t llama_kv_cache_bounded::get_evict_max(uint32_t n_tokens) const {
    if (cfg.ratio > 0.0) {
        return cfg.budget + n_tokens; // a shorter pin, or a state of a larger ratio, can leave far more than is now allowed
    }
    return n_tokens + (cfg.evict_step > 0 ? std::min(cfg.evict_step, cfg.budget) : EVICT_STEP_DEFAULT);
}

std::vector<llama_kv_cache_bounded::step> llama_kv_cache_bounded::prepare(const std::vector<llama_ubatch> & ubatches) const {
    std::vector<step> res;

    std::vector<seq_state> state = seqs;

    const bool evicts = strcmp(get_policy().name, "full") != 0;

    for (const auto & ubatch : ubatches) {
        step st = {};
        st.s0    = ubatch.seq_id_unq[0];
        st.n_seq = ubatch.n_seqs_unq;

        const uint32_t n_tokens = ubatch.n_tokens/ubatch.n_seqs_unq;

        uint32_t n_top = 0;
        for (uint32_t s = 0; s < st.n_seq; ++s) {
            GGML_ASSERT((uint32_t) ubatch.seq_id_unq[s] == st.s0 + s);
            GGML_ASSERT(st.s0 + s < state.size());

            seq_state & seq = state[st.s0 + s];
            st.before.push_back(seq);
            st.recall = st.recall || (cfg.memory && seq.n_evictions > 0);

            if (ubatch.pos[s*n_tokens] != seq.n_seen) {
                LLAMA_LOG_ERROR("%s: sequence %u continues at position %d, the batch starts at %d\n", __func__,
                        st.s0 + s, seq.n_seen, ubatch.pos[s*n_tokens]);
                return {};
            }

            seq.n_used += n_tokens;
            seq.n_seen += n_tokens;
            n_top = std::max(n_top, seq.n_used);
            GGML_ASSERT(seq.n_used <= n_slots);

            const uint32_t budget = get_budget(seq);
            if (seq.n_used > budget) {
                if (!evicts) {
                    LLAMA_LOG_INFO("%s: the budget of %u entries is used up and the policy is to evict nothing\n", __func__, budget);
                    return {};
                }
                const uint32_t n_left = std::min(budget, seq.n_used - get_evict_step(seq));
                seq.n_used  = std::max(n_left, n_protected(seq) + cfg.window);
                seq.n_fixed = seq.n_used;
                seq.n_evictions++;
                st.evict = true;
            }
        }

        if (get_indexer()) {
            st.score = st.evict;
            for (uint32_t s = 0; s < st.n_seq; ++s) {
                const seq_state & seq = state[st.s0 + s];
                // a single token that fills the budget scores what waits, so that the one after it, which evicts, has less to do
                const bool fills = n_tokens == 1 && seq.n_used == get_budget(seq);
                st.score = st.score || fills || seq.n_pending() > (n_tokens == 1 ? n_wait - 1 : n_wait);
            }
            for (uint32_t s = 0; s < st.n_seq && st.score; ++s) {
                st.n_old = std::max(st.n_old, st.before[s].n_pending());
                state[st.s0 + s].n_scored = state[st.s0 + s].n_seen;
            }
            if (n_tokens == 1 && st.score && (!st.evict || st.n_old > 0)) {
                st.n_old = std::max(st.n_old, n_wait - 1); // so that the graph of single tokens that score is always the same
            }
        }
        for (uint32_t s = 0; s < st.n_seq; ++s) {
            st.after.push_back(state[st.s0 + s]);
        }

        st.n_kv = GGML_PAD(n_top + (st.recall ? n_front : 0), N_KV_PAD);
        res.push_back(std::move(st));
    }

    return res;
}

void llama_kv_cache_bounded::apply(const step & st) {
    for (uint32_t s = 0; s < st.n_seq; ++s) {
        seqs[st.s0 + s] = st.after[s];
    }
}

//
// llama_memory_i
//

llama_memory_context_ptr llama_kv_cache_bounded::init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) {
    GGML_UNUSED(embd_all);

    balloc.split_reset();

    std::vector<llama_ubatch> ubatches;
    while (true) {
        auto ubatch = seqs.size() == 1 ? balloc.split_simple(n_ubatch) : balloc.split_equal(n_ubatch, true, 0);
        if (ubatch.n_tokens == 0) {
            break;
        }
        ubatches.push_back(std::move(ubatch)); // NOLINT
    }

    if (balloc.get_n_used() == balloc.get_n_tokens()) {
        auto steps = prepare(ubatches);
        if (!steps.empty()) {
            return std::make_unique<llama_kv_cache_bounded_context>(this, std::move(steps), std::move(ubatches));
        }
    }
    return std::make_unique<llama_kv_cache_bounded_context>(this, LLAMA_MEMORY_STATUS_FAILED_PREPARE);
}

llama_memory_context_ptr llama_kv_cache_bounded::init_full() {
    return std::make_unique<llama_kv_cache_bounded_context>(this);
}

llama_memory_context_ptr llama_kv_cache_bounded::init_update(llama_context * lctx, bool optimize) {
    GGML_UNUSED(optimize);
    // Copies move rows between sequences that no graph refers to by value: existing graphs stay valid, so this is never
    // reported as an update (which would reserve the worst-case graph again).
    if (!copies.empty()) {
        llama_synchronize(lctx);
        apply_copies();
    }
    return std::make_unique<llama_kv_cache_bounded_context>(this, LLAMA_MEMORY_STATUS_NO_UPDATE);
}

std::map<ggml_backend_buffer_type_t, size_t> llama_kv_cache_bounded::memory_breakdown() const {
    std::map<ggml_backend_buffer_type_t, size_t> res;
    for (const auto & [ctx, buf] : ctxs_bufs) {
        auto * buft = ggml_backend_buffer_get_type(buf.get());
        res[buft] += model.hparams.no_alloc ?
            ggml_backend_alloc_ctx_tensors_from_buft_size(ctx.get(), buft) : ggml_backend_buffer_get_size(buf.get());
    }
    return res;
}

//
// specific API
//

const llama_kv_cache_bounded::layer * llama_kv_cache_bounded::get_layer(int32_t il) const {
    const auto it = map_layer_ids.find(il);
    return it == map_layer_ids.end() ? nullptr : &layers[it->second];
}

size_t llama_kv_cache_bounded::size_kv_bytes() const {
    size_t size = 0;
    for (const auto & l : layers) {
        size += ggml_nbytes(l.k) + ggml_nbytes(l.v);
    }
    return size;
}

size_t llama_kv_cache_bounded::size_meta_bytes() const {
    size_t size = 0;
    for (const auto & l : layers) {
        for (const ggml_tensor * t : l.tensors()) {
            size += ggml_nbytes(t);
        }
    }
    return size - size_kv_bytes();
}

size_t llama_kv_cache_bounded::size_indexer_bytes() const {
    size_t size = 0;
    for (const auto & l : layers) {
        for (const ggml_tensor * t : { l.state, l.pending, l.queries }) {
            size += t ? ggml_nbytes(t) : 0;
        }
    }
    return size;
}

size_t llama_kv_cache_bounded::size_memory_bytes() const {
    size_t size = 0;
    for (const auto & l : layers) {
        for (const ggml_tensor * t : l.memory) {
            size += ggml_nbytes(t);
        }
    }
    return size;
}
