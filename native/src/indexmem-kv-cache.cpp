#include "indexmem-kv-cache.h"

#include "indexmem-buffers.h"
#include "indexmem-device.h"
#include "indexmem-error.h"
#include "indexmem-layer-nodes.h"
#include "indexmem-nodes.h"

#include "llama-context.h"
#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <stdexcept>

std::vector<ggml_tensor *> llama_kv_cache_bounded::layer::tensors() const {
    std::vector<ggml_tensor *> res;
    for (ggml_tensor * t : { k, has_values() ? v : nullptr, pos, rotary, q, state, pending, queries }) {
        if (t) {
            res.push_back(t);
        }
    }
    res.insert(res.end(), memory.begin(), memory.end());
    return res;
}

ggml_tensor * llama_kv_cache_bounded::layer::of_heads(ggml_context * ctx, ggml_tensor * t, int64_t n_head_kv) const {
    if (whole || !t) {
        return t;
    }
    const int64_t n = t->ne[1]/n_head_kv; // rows for each of them
    return ggml_view_3d(ctx, t, t->ne[0], n*n_head(), t->ne[2], t->nb[1], t->nb[2], head*n*t->nb[1]);
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

static bool ranks_by_indexer(const llama_kv_cache_bounded::config & cfg) {
    return strcmp(indexmem_policy_get(cfg.policy)->name, "indexer") == 0;
}

static uint64_t next_id() {
    static std::atomic<uint64_t> n = 0;
    return ++n;
}

static indexmem_kv_counts::geometry geometry_of(const llama_kv_cache_bounded::config & cfg, uint32_t n_ubatch) {
    const uint32_t n_latent = cfg.memory ? cfg.memory->n_slots() : 0;

    const uint64_t min = indexmem_kv_counts::budget_min(cfg.sinks, cfg.pin, cfg.window, n_latent);
    if (cfg.budget_of(0) < min) {
        throw std::runtime_error(format("a budget of %u is too small: at least %llu are needed (max(sinks %u, pin %u) + window %u + "
                    "%u slots of the memory + 1)", cfg.budget_of(0), (unsigned long long) min, cfg.sinks, cfg.pin, cfg.window, n_latent));
    }
    const auto * policy = indexmem_policy_get(cfg.policy);
    const bool indexer  = ranks_by_indexer(cfg);

    // a policy that reads one query takes that of the ubatch
    const uint32_t n_queries = indexer ? cfg.sidecar->get_indexer()->n_queries() : policy->n_queries > 1 ? policy->n_queries : 0;

    return indexmem_kv_counts::geometry::of(cfg, n_ubatch, n_latent, n_queries, indexer, cfg.memory != nullptr,
            strcmp(policy->name, "full") != 0);
}

llama_kv_cache_bounded::llama_kv_cache_bounded(
        const llama_model & model,
                ggml_type   type_k,
                ggml_type   type_v,
                     bool   offload,
                 uint32_t   n_seq_max,
                 uint32_t   n_ubatch,
             const config & cfg,
    const layer_filter_cb & filter,
    const layer_reuse_cb  & reuse) :
    model(model), cfg(cfg), id(next_id()), counts(cfg, geometry_of(cfg, n_ubatch), n_seq_max), span_reason(cfg.span_reason) {
    const auto & hparams = model.hparams;

    if (cfg.memory && hparams.is_mla()) {
        throw std::runtime_error(format("the memory '%s' keeps values beside keys, and in this model (MLA) both are one: use no memory",
                    cfg.memory->kind()));
    }
    if (ranks_by_indexer(cfg)) {
        indexer = cfg.sidecar->get_indexer();
    }

    std::map<uint32_t, std::vector<indexmem_slice>> slices;
    for (const auto & slice : cfg.slices) {
        slices[slice.il].push_back(slice);
    }
    indexmem_buffers buffers(model, offload, 13u*std::max<size_t>(hparams.n_layer_all, cfg.slices.size()));

    // the head size all cached layers share, or 0: a rotation needs one size (as in llama_kv_cache)
    int64_t head_k = -1;
    int64_t head_v = -1;

    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        if (!hparams.has_kv(il) || hparams.n_head_kv(il) == 0 || (filter && !filter(il))) {
            continue;
        }
        const int64_t n_embd_k = hparams.n_embd_head_k(il);
        const int64_t n_embd_v = hparams.n_embd_head_v(il);

        head_k = head_k == -1 || head_k == n_embd_k ? n_embd_k : 0;
        head_v = head_v == -1 || head_v == n_embd_v ? n_embd_v : 0;

        if (slices[il].empty()) {
            slices[il].push_back({ il, 0, hparams.n_head_kv(il) });
        }
        for (const auto & slice : slices[il]) {
            // of the caches that this slice can have, the one that its device computes; the nodes are built as for the graph
            const auto nodes = [&](ggml_context * ctx, ggml_context * host) {
                const layer l = new_layer(ctx, host, slice, type_k, type_v);
                auto res = indexmem_layer_nodes_of_all(ctx, hparams, *this, l, 1, n_ubatch);
                const auto single = indexmem_layer_nodes_of_all(ctx, hparams, *this, l, n_seq_max, 1);
                res.insert(res.end(), single.begin(), single.end());
                return res;
            };
            bool stock = false;
            auto * buft = offload ? indexmem_device_buft(model.dev_layer(il), nodes, stock) : nullptr;
            auto * ctx  = buffers.context(il, buft);
            const layer l = new_layer(ctx, stock ? buffers.context(il, ggml_backend_cpu_buffer_type()) : ctx, slice, type_k, type_v);

            map_layer_ids[il].push_back(layers.size());
            layers.push_back(l);
        }
    }
    for (uint32_t il = 0; il < hparams.n_layer() && reuse; ++il) {
        const auto source = map_layer_ids.find(reuse(il));
        if (!hparams.has_kv(il) && (!filter || filter(il)) && source != map_layer_ids.end()) {
            map_layer_ids[il] = source->second;
            for (size_t i : source->second) {
                layers[i].last = il;
            }
        }
    }

    buffers.alloc(format("the bounded KV cache (%u slots per KV head)", get_geometry().n_slots[0]));
    ctxs_bufs = std::move(buffers.get());
    for (auto & l : layers) {
        l.attends = indexmem_device_attends(l.k);
    }
    clear(true); // no NaN in slots not written yet, and an empty memory

    rot_k = rotation_size(type_k, std::max<int64_t>(head_k, 0), true);
    rot_v = rotation_size(type_v, std::max<int64_t>(head_v, 0), false);
    rot_k = head_k > 0 && !hparams.is_mla() ? rot_k : 0; // llama.cpp rotates no latents
    rot_v = head_v > 0 && !hparams.is_mla() ? rot_v : 0;

    if (cfg.memory && rot_k > 0 && !cfg.memory->tensors().empty() && !hparams.no_alloc && !cfg.sidecar->rotated) {
        for (const auto & l : layers) {
            if (l.head == 0) { // once for each layer, whose slices share its weights
                cfg.memory->rotate_weights(cfg.sidecar->get_layer(l.il), indexmem_hadamard(rot_k), rot_k);
            }
        }
        cfg.sidecar->rotated = true;
    }
}

void llama_kv_cache_bounded::log_made() const {
    const uint32_t n_seq_max = get_n_seq_max();
    const uint32_t n_layer   = std::count_if(layers.begin(), layers.end(), [](const layer & l) { return l.head == 0; });
    const auto type_of = [&](ggml_tensor * layer::*t) { return layers.empty() ? "none" : ggml_type_name((layers[0].*t)->type); };

    LLAMA_LOG_INFO("%s: policy %s, budget %u, %u slots, sinks %u, pin %u, window %u, %u layers, %u sequences\n", __func__,
            get_policy().name, cfg.budget, get_geometry().n_slots[0], cfg.sinks, cfg.pin, cfg.window, n_layer, n_seq_max);
    for (uint32_t c = 0; c < cfg.budgets.size(); ++c) {
        uint32_t n = 0;
        for (const auto & l : layers) {
            n += l.cls == c ? (uint32_t) l.n_head() : 0;
        }
        LLAMA_LOG_INFO("%s: budget %u, %u slots in %u KV heads\n", __func__, cfg.budgets[c], get_geometry().n_slots[c], n);
    }
    if (cfg.span > 0) {
        LLAMA_LOG_INFO("%s: rotary positions stay below %u\n", __func__, cfg.span);
    }
    LLAMA_LOG_INFO("%s: K (%s) and V (%s) %.2f MiB, positions and policy state %.2f MiB, rotation K %d V %d\n", __func__,
            type_of(&layer::k), type_of(&layer::v), size_kv_bytes()/1024.0/1024.0, size_meta_bytes()/1024.0/1024.0,
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

void llama_kv_cache_bounded::learn_scale(uint32_t il, float scale, float softcap) {
    for (size_t i : map_layer_ids.at(il)) {
        layers[i].scale   = scale;
        layers[i].softcap = softcap;
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
        auto ubatch = get_n_seq_max() == 1 ? balloc.split_simple(n_ubatch) : balloc.split_equal(n_ubatch, true, 0);
        if (ubatch.n_tokens == 0) {
            break;
        }
        ubatches.push_back(std::move(ubatch)); // NOLINT
    }

    if (balloc.get_n_used() < balloc.get_n_tokens()) {
        return std::make_unique<llama_kv_cache_bounded_context>(this, LLAMA_MEMORY_STATUS_FAILED_PREPARE);
    }

    std::vector<step> steps;
    const auto status = prepare(ubatches, steps);
    if (llama_memory_status_is_fail(status)) {
        return std::make_unique<llama_kv_cache_bounded_context>(this, status);
    }
    return std::make_unique<llama_kv_cache_bounded_context>(this, std::move(steps), std::move(ubatches));
}

llama_memory_status llama_kv_cache_bounded::prepare(const std::vector<llama_ubatch> & ubatches, std::vector<step> & steps) const {
    const auto refuse = [](const std::string & why, llama_memory_status status) {
        LLAMA_LOG_ERROR("prepare: %s\n", why.c_str());
        indexmem_error_is(why);
        return status;
    };
    if (!unusable.empty()) {
        return refuse(unusable, LLAMA_MEMORY_STATUS_FAILED_COMPUTE);
    }

    bool broken = false; // one of the sequences: nothing that the caller changes about the batch helps
    std::vector<indexmem_kv_counts::tokens> tokens;
    for (const auto & ubatch : ubatches) {
        if (!ubatch.token && model.hparams.n_pos_per_embd() > 1) {
            return refuse("a bounded KV cache takes text only from a model with positions of several dimensions (M-RoPE): the batch "
                    "holds embeddings, as of an image", LLAMA_MEMORY_STATUS_FAILED_COMPUTE);
        }
        for (uint32_t s = 0; s < ubatch.n_seqs_unq; ++s) {
            GGML_ASSERT(ubatch.seq_id_unq[s] == ubatch.seq_id_unq[0] + (llama_seq_id) s);
            broken = broken || get_seq(ubatch.seq_id_unq[s])->broken;
        }
        tokens.push_back({ (uint32_t) ubatch.seq_id_unq[0], ubatch.n_seqs_unq, ubatch.n_tokens/ubatch.n_seqs_unq, ubatch.pos });
    }
    std::string error;
    steps = counts.prepare(tokens, error);
    if (steps.empty()) {
        return refuse(error, broken ? LLAMA_MEMORY_STATUS_FAILED_COMPUTE : LLAMA_MEMORY_STATUS_FAILED_PREPARE);
    }
    return LLAMA_MEMORY_STATUS_SUCCESS;
}

llama_memory_context_ptr llama_kv_cache_bounded::init_full() {
    return std::make_unique<llama_kv_cache_bounded_context>(this);
}

llama_memory_context_ptr llama_kv_cache_bounded::init_update(llama_context * lctx, bool optimize) {
    GGML_UNUSED(optimize);

    // What a program can change after the context was made. Every batch asks for updates before it is prepared.
    unusable = lctx->get_cparams().causal_attn ? "" :
        "a bounded KV cache needs causal attention, and it was switched off after the context was made: switch it on again";

    if (!this->lctx) {
        this->lctx = lctx;
        reserve_rotator();
    }

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

std::vector<const llama_kv_cache_bounded::layer *> llama_kv_cache_bounded::get_sources(int32_t il) const {
    std::vector<const layer *> res;
    const auto it = map_layer_ids.find(il);
    if (it != map_layer_ids.end()) {
        for (size_t i : it->second) {
            res.push_back(&layers[i]);
        }
    }
    return res;
}

// asked for each head of a state, so without a list
const llama_kv_cache_bounded::layer * llama_kv_cache_bounded::get_layer(int32_t il, uint32_t head) const {
    const auto it = map_layer_ids.find(il);
    if (it == map_layer_ids.end()) {
        return nullptr;
    }
    for (size_t i : it->second) {
        const layer & l = layers[i];
        if (l.il == (uint32_t) il && head >= l.head && head < l.head + l.n_head()) {
            return &l;
        }
    }
    return nullptr;
}

uint32_t llama_kv_cache_bounded::get_n_head_kv(int32_t il) const {
    return get_layer(il) ? model.hparams.n_head_kv(il) : 0;
}

size_t llama_kv_cache_bounded::size_kv_bytes() const {
    size_t size = 0;
    for (const auto & l : layers) {
        size += ggml_nbytes(l.k) + (l.has_values() ? ggml_nbytes(l.v) : 0);
    }
    return size;
}

size_t llama_kv_cache_bounded::size_meta_bytes() const {
    size_t size = 0;
    for (const auto & l : layers) {
        for (const ggml_tensor * t : l.tensors()) {
            size += ggml_nbytes(t);
        }
        size += l.ahead ? ggml_nbytes(l.ahead) : 0;
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
