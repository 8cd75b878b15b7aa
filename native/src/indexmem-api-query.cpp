#include "indexmem.h"

#include "indexmem-error.h"
#include "indexmem-mixed.h"
#include "indexmem-support.h"
#include "indexmem-work.h"

#include "llama-context.h"
#include "llama-ext.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <set>
#include <string>

// what can be asked about files, models and contexts, and the tables

// entries of a table
template <typename F>
static int count_of(F get) {
    int n = 0;
    while (get(n)) {
        ++n;
    }
    return n;
}

static llama_kv_cache_bounded * bounded_of(const llama_context * ctx) {
    return ctx ? indexmem_bounded(ctx->get_memory()) : nullptr;
}

bool indexmem_sidecar_check(const char * path, const llama_model * model) {
    indexmem_clear_error();
    try {
        const indexmem_sidecar sidecar(path);
        if (model) {
            sidecar.check_model(*model);
        }
        return true;
    } catch (const std::exception & err) {
        return indexmem_error_is(err.what(), INDEXMEM_ERROR_SIDECAR);
    }
}

void indexmem_model_fingerprint(const llama_model * model, char out[17]) {
    snprintf(out, 17, "%s", indexmem_fingerprint(*model).c_str());
}

int indexmem_indexer_count(void) {
    return count_of(indexmem_indexer_get);
}

const char * indexmem_indexer_name(int i) {
    const auto * info = i < 0 ? nullptr : indexmem_indexer_get(i);
    return info ? info->name : nullptr;
}

const char * indexmem_indexer_help(int i) {
    const auto * info = i < 0 ? nullptr : indexmem_indexer_get(i);
    return info ? info->help : nullptr;
}

int indexmem_memory_count(void) {
    return count_of(indexmem_memory_get);
}

const char * indexmem_memory_name(int i) {
    const auto * info = i < 0 ? nullptr : indexmem_memory_get(i);
    return info ? info->name : nullptr;
}

const char * indexmem_memory_help(int i) {
    const auto * info = i < 0 ? nullptr : indexmem_memory_get(i);
    return info ? info->help : nullptr;
}

bool indexmem_model_supported(const llama_model * model, char * reason, size_t reason_size) {
    const std::string text = indexmem_unsupported_reason(*model);
    if (reason && reason_size > 0) {
        snprintf(reason, reason_size, "%s", text.c_str());
    }
    return text.empty();
}

int32_t indexmem_model_layer(const llama_model * model, int32_t il) {
    return il < 0 || il >= (int32_t) model->hparams.n_layer() ? -1 : (int32_t) indexmem_layer_kind(*model, il);
}

uint32_t indexmem_model_row(const llama_model * model, int32_t il, bool values) {
    const auto & hparams = model->hparams;
    const int32_t kind = indexmem_model_layer(model, il);
    if (kind <= 0 || !(kind & (INDEXMEM_LAYER_BOUNDED | INDEXMEM_LAYER_WINDOW)) || (values && hparams.is_mla())) {
        return 0;
    }
    return values ? hparams.n_embd_v_gqa(il) : hparams.n_embd_k_gqa(il);
}

const char * indexmem_architecture(int i) {
    return i < 0 || i >= LLM_ARCH_UNKNOWN ? nullptr : llm_arch_name((llm_arch) i);
}

const char * indexmem_architecture_refused(int i) {
    return i < 0 || i >= LLM_ARCH_UNKNOWN ? "" : indexmem_unsupported_arch((llm_arch) i);
}

bool indexmem_is_bounded(const llama_context * ctx) {
    return bounded_of(ctx) != nullptr;
}

uint64_t indexmem_cache_bytes(const llama_context * ctx) {
    uint64_t res = 0;
    if (const auto * memory = ctx->get_memory()) {
        for (const auto & [buft, size] : memory->memory_breakdown()) {
            res += size;
        }
    }
    return res;
}

uint64_t indexmem_model_bytes(const llama_context * ctx) {
    const auto & model = ctx->get_model();
    uint64_t res = 0;
    for (const auto & [buft, size] : model.memory_breakdown()) {
        res += size;
    }
    if (!model.hparams.no_alloc) {
        return res;
    }
    // a tensor that is used as two, such as an embedding that is the output matrix, too, is in a mapped file once
    std::set<std::pair<std::string, ggml_backend_buffer_type_t>> seen;
    for (const auto & [name, t] : model.tensors_by_name) {
        ggml_backend_buffer_type_t buft = t->buffer ? ggml_backend_buffer_get_type(t->buffer) : nullptr;
        if (buft && ggml_backend_buft_is_host(buft) && !seen.emplace(name, buft).second) {
            res -= ggml_backend_buft_get_alloc_size(buft, t);
        }
    }
    return res;
}

uint64_t indexmem_compute_bytes(const llama_context * ctx) {
    uint64_t res = 0;
    for (const auto & [buft, size] : ctx->memory_breakdown()) {
        res += size.compute;
    }
    return res;
}

bool indexmem_get_stats(llama_context * ctx, int32_t seq_id, indexmem_stats * stats) {
    indexmem_clear_error();

    const auto * kv = bounded_of(ctx);
    if (!kv) {
        return indexmem_error_is("the context has no bounded KV cache");
    }
    const auto * seq = kv->get_seq(seq_id);
    if (!seq) {
        return indexmem_error_is(format("there is no sequence %d (n_seq_max is %u)", seq_id, kv->get_n_seq_max()));
    }
    if (stats->struct_size != sizeof(*stats)) {
        return indexmem_error_is(format("indexmem_stats has %u bytes, this library expects %zu", stats->struct_size, sizeof(*stats)));
    }
    llama_synchronize(ctx);

    // where KV heads differ: means, rounded up
    const auto mean = [&](auto of_class) {
        uint64_t sum = 0, n = 0;
        for (const auto & l : kv->get_layers()) {
            sum += l.n_head()*(uint64_t) of_class(l.cls);
            n   += l.n_head();
        }
        return n > 0 ? (uint32_t) ((sum + n - 1)/n) : 0;
    };
    const auto & counts = kv->get_counts();

    stats->budget      = kv->get_config().budget;
    stats->n_slots     = mean([&](uint32_t c) { return kv->get_geometry().n_slots[c]; });
    stats->budget_now  = mean([&](uint32_t c) { return counts.budget_of(*seq, c); }) + kv->get_n_latent();
    stats->n_kept      = mean([&](uint32_t c) { return seq->of(c).n_used; });
    stats->n_seen      = seq->n_seen;
    stats->n_evicted   = seq->n_seen - stats->n_kept;
    stats->room        = UINT32_MAX;
    stats->n_classes   = kv->get_config().n_classes();
    for (uint32_t c = 0; c < indexmem_kv_counts::N_CLASSES_MAX; ++c) {
        const bool there = c < stats->n_classes;
        stats->class_budget[c] = there ? kv->get_config().budget_of(c) : 0;
        stats->class_kept[c]   = there ? seq->of(c).n_used : 0;
        stats->class_heads[c]  = 0;
        if (there) {
            const uint32_t budget = counts.budget_of(*seq, c);
            stats->room = std::min(stats->room, budget - std::min(budget, seq->of(c).n_used));
        }
    }
    for (const auto & l : kv->get_layers()) {
        stats->class_heads[l.cls] += (uint32_t) l.n_head();
    }
    stats->sinks       = kv->get_config().sinks;
    stats->window      = kv->get_counts().window_of(*seq);
    stats->pin         = seq->pin;
    stats->n_first     = counts.n_protected(*seq);
    stats->evict_step  = kv->get_counts().evict_step_of(*seq);
    stats->kv_bytes    = kv->size_kv_bytes();
    stats->meta_bytes  = kv->size_meta_bytes();
    stats->evict_us    = kv->evict_us;
    stats->n_evictions = seq->n_evictions;
    stats->broken      = seq->broken;

    const auto * sidecar = kv->get_config().sidecar.get();
    const auto * memory  = kv->get_memory();
    stats->memory_slots  = kv->get_n_latent();
    stats->memory_bytes  = kv->size_memory_bytes();
    stats->memory_layers = 0;
    for (const auto & l : kv->get_layers()) {
        stats->memory_layers += memory && l.head == 0 && memory->enabled(l.il);
    }
    snprintf(stats->memory, sizeof(stats->memory), "%s", memory ? memory->kind() : "off");
    stats->indexer_bytes = kv->size_indexer_bytes();
    stats->sidecar_bytes = sidecar ? sidecar->size_bytes() : 0;
    stats->sidecar_hash  = sidecar ? sidecar->get_hash()   : 0;
    stats->compute_bytes = indexmem_compute_bytes(ctx) + kv->size_rotator_bytes();
    stats->work_bytes    = indexmem_work_bytes(*ctx, *kv);
    stats->n_rebases     = seq->n_rebases;
    stats->next_position = seq->rotary_next();
    stats->rebase_us     = kv->rebase_us;
    stats->span          = kv->get_span();

    const auto * mixed = dynamic_cast<const llama_memory_mixed *>(ctx->get_memory());
    stats->window_bytes    = mixed ? mixed->size_window_bytes()    : 0;
    stats->recurrent_bytes = mixed ? mixed->size_recurrent_bytes() : 0;
    return true;
}

// get: of a sequence, layer and head
template <typename F>
static int32_t get_table(llama_context * ctx, int32_t seq_id, int32_t il, int32_t head, int32_t * pos, int32_t capacity, F get) {
    indexmem_clear_error();

    const auto * kv = bounded_of(ctx);
    if (!kv) {
        indexmem_error_is("the context has no bounded KV cache");
        return -1;
    }
    const auto * seq   = kv->get_seq(seq_id);
    const auto * layer = head < 0 ? nullptr : kv->get_layer(il, head);
    if (!seq || !layer) {
        indexmem_error_is(format("there is no KV head %d in layer %d of sequence %d", head, il, seq_id));
        return -1;
    }
    if (seq->broken) {
        indexmem_error_is(indexmem_kv_counts::broken_text(seq_id));
        return -1;
    }
    if (!pos) {
        return (int32_t) seq->of(layer->cls).n_used;
    }
    llama_synchronize(ctx);

    const auto res = get(*kv, *layer); // what is copied, and not another count of it, has to fit
    if (capacity < 0 || (size_t) capacity < res.size()) {
        indexmem_error_is(format("room for %d positions, %zu are needed", capacity, res.size()));
        return -1;
    }
    std::copy(res.begin(), res.end(), pos);
    return (int32_t) res.size();
}

int32_t indexmem_get_positions(llama_context * ctx, int32_t seq_id, int32_t il, int32_t head, int32_t * pos, int32_t capacity) {
    return get_table(ctx, seq_id, il, head, pos, capacity, [&](const llama_kv_cache_bounded & kv, const llama_kv_cache_bounded::layer & l) {
        return kv.get_positions(seq_id, l, head - l.head);
    });
}

int32_t indexmem_get_rotary(llama_context * ctx, int32_t seq_id, int32_t il, int32_t head, int32_t * pos, int32_t capacity) {
    return get_table(ctx, seq_id, il, head, pos, capacity, [&](const llama_kv_cache_bounded & kv, const llama_kv_cache_bounded::layer & l) {
        return kv.get_rotary(seq_id, l, head - l.head);
    });
}

const char * indexmem_span_reason(const llama_context * ctx) {
    const auto * kv = bounded_of(ctx);
    return kv ? kv->get_span_reason().c_str() : "";
}

int32_t indexmem_n_head_kv(const llama_context * ctx, int32_t il) {
    const auto * kv = bounded_of(ctx);
    if (!kv || il < 0 || il >= (int32_t) ctx->get_model().hparams.n_layer()) {
        return -1;
    }
    return (int32_t) kv->get_n_head_kv(il);
}

bool indexmem_set_pin(llama_context * ctx, int32_t seq_id, uint32_t n) {
    indexmem_clear_error();

    auto * kv = bounded_of(ctx);
    if (!kv) {
        return indexmem_error_is("the context has no bounded KV cache");
    }
    std::string error;
    return kv->set_pin(seq_id, n, error) || indexmem_error_is(error);
}

uint32_t indexmem_pin_room(const llama_context * ctx) {
    const auto * kv = bounded_of(ctx);
    return kv ? kv->pin_room() : 0;
}

uint32_t indexmem_draft_room(const llama_context * ctx, int32_t seq_id, uint32_t n) {
    return indexmem_n_drafts(ctx->get_memory(), seq_id, n, false);
}

uint32_t indexmem_draft_room_copied(const llama_context * ctx, int32_t seq_id, uint32_t n) {
    return indexmem_n_drafts(ctx->get_memory(), seq_id, n, true);
}

bool indexmem_set_load_pin(llama_context * ctx, int32_t n) {
    indexmem_clear_error();

    auto * kv = bounded_of(ctx);
    if (!kv) {
        return indexmem_error_is("the context has no bounded KV cache");
    }
    kv->set_load_pin(n);
    return true;
}

int indexmem_policy_count(void) {
    return count_of(indexmem_policy_get);
}

const char * indexmem_policy_name(int i) {
    const auto * info = indexmem_policy_get(i);
    return info ? info->name : nullptr;
}

const char * indexmem_policy_help(int i) {
    const auto * info = indexmem_policy_get(i);
    return info ? info->help : nullptr;
}
