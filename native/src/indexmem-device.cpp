#include "indexmem-device.h"

#include "indexmem-ops.h"
#include "indexmem-stock.h"
#include "indexmem.h"

#include "ggml-cpp.h"
#include "ggml-impl.h"
#include "llama-impl.h"

#include <cstring>
#include <set>
#include <utility>

// the nodes of a layer for two kinds of ubatches, with all tensors that they are made of
static constexpr size_t N_TENSORS = 1024;

static int kind_of(const ggml_tensor * node) {
    return node->op == GGML_OP_INDEXMEM ? ggml_get_op_params_i32(node, INDEXMEM_PARAM_OP) : -1;
}

// another way to look at a tensor: nothing to compute
static bool is_view(const ggml_tensor * node) {
    switch (node->op) {
        case GGML_OP_NONE:
        case GGML_OP_VIEW:
        case GGML_OP_RESHAPE:
        case GGML_OP_PERMUTE:
        case GGML_OP_TRANSPOSE:
            return true;
        default:
            return false;
    }
}

// whether it has to be computed by the device in whose memory the cache lies
static bool is_bound(const ggml_tensor * node) {
    if (is_view(node)) {
        return false;
    }
    switch (node->op) {
        case GGML_OP_INDEXMEM:
            return kind_of(node) != INDEXMEM_OP_PAIRWISE && kind_of(node) != INDEXMEM_OP_RETENTION;
        case GGML_OP_FLASH_ATTN_EXT:
            return true;
        default:
            return node->view_src != nullptr; // in place
    }
}

// the same without kernels of ours
static bool is_bound_stock(const ggml_tensor * node, const std::set<const ggml_tensor *> & host) {
    if (is_view(node)) {
        return false;
    }
    switch (kind_of(node)) {
        case INDEXMEM_OP_RANK:
            return indexmem_policy_get(ggml_get_op_params_i32(node, INDEXMEM_PARAM_POLICY))->needs_keys;
        case INDEXMEM_OP_SELECT:
        case INDEXMEM_OP_MOVES:
        case INDEXMEM_OP_AGES:
        case INDEXMEM_OP_ATTENDED:
        case INDEXMEM_OP_PAIRWISE:
        case INDEXMEM_OP_RETENTION:
        case INDEXMEM_OP_BIAS:
        case INDEXMEM_OP_CENTROID: // both of rows that were gathered
        case INDEXMEM_OP_RESIDUAL:
            return false;
        default:
            return !node->view_src || host.count(node->view_src) == 0; // ggml keeps the tensor that a view is of in the end
    }
}

static std::string words_for(const ggml_tensor * node) {
    if (node->op == GGML_OP_SET_ROWS) {
        return format("storing rows of type %s", ggml_type_name(node->type));
    }
    if (node->op == GGML_OP_GET_ROWS) {
        return format("reading rows of type %s", ggml_type_name(node->src[0]->type));
    }
    if (node->op == GGML_OP_FLASH_ATTN_EXT) {
        return format("flash attention with heads of %d", (int) node->src[0]->ne[0]);
    }
    switch (kind_of(node)) {
        case INDEXMEM_OP_RANK:        return "the policy";
        case INDEXMEM_OP_SELECT:      return format("selection of %d entries", (int) node->ne[0]);
        case INDEXMEM_OP_COMPACT:     return format("compaction of rows of type %s", ggml_type_name(node->type));
        case INDEXMEM_OP_COMPACT_POS: return "compaction of positions";
        case INDEXMEM_OP_CENTROID:    return format("centroid memories of which %d entries are written at once", (int) node->src[4]->ne[0]);
        case INDEXMEM_OP_RESIDUAL:    return format("residual memories with %d features", (int) node->ne[0]);
        case INDEXMEM_OP_BIAS:        return "masks with biases";
        default:                      return ggml_op_desc(node);
    }
}

static ggml_context_ptr without_memory() {
    return ggml_context_ptr(ggml_init({ N_TENSORS*ggml_tensor_overhead() + ggml_graph_overhead_custom(N_TENSORS, false), nullptr, true }));
}

// the first node that is bound and not supported, in words
static std::string first_lacking(ggml_backend_dev_t dev, ggml_context * ctx, const std::vector<ggml_tensor *> & nodes,
        const std::function<bool(const ggml_tensor *)> & bound) {
    ggml_cgraph * gf = ggml_new_graph_custom(ctx, N_TENSORS, false);
    for (ggml_tensor * node : nodes) {
        ggml_build_forward_expand(gf, node);
    }
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        const ggml_tensor * node = ggml_graph_node(gf, i);
        if (bound(node) && !ggml_backend_dev_supports_op(dev, node)) {
            return words_for(node);
        }
    }
    return "";
}

std::string indexmem_device_lacks(ggml_backend_dev_t dev, const indexmem_device_question & question) {
    const auto ctx = without_memory();
    return first_lacking(dev, ctx.get(), question(ctx.get(), ctx.get()), is_bound);
}

std::string indexmem_device_lacks_stock(ggml_backend_dev_t dev, const indexmem_device_question & question) {
    const auto ctx   = without_memory();
    const auto host  = without_memory();
    const auto nodes = question(ctx.get(), host.get());

    std::set<const ggml_tensor *> there;
    for (ggml_tensor * t = ggml_get_first_tensor(host.get()); t; t = ggml_get_next_tensor(host.get(), t)) {
        there.insert(t);
    }
    return first_lacking(dev, ctx.get(), nodes, [&](const ggml_tensor * node) { return is_bound_stock(node, there); });
}

ggml_backend_buffer_type_t indexmem_device_buft(ggml_backend_dev_t dev, const indexmem_device_question & question, bool & stock) {
    stock = false;
    ggml_backend_buffer_type_t buft = ggml_backend_dev_buffer_type(dev);
    if (ggml_backend_buft_is_host(buft)) {
        return buft;
    }
    static thread_local std::set<std::pair<ggml_backend_dev_t, std::string>> told;
    const auto tell = [&](const std::string & what) { return told.emplace(dev, what).second; };

    // the meta device says yes for the devices that it is made of, and cannot split our op between them
    if (ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_META) {
        if (tell("")) {
            LLAMA_LOG_WARN("%s: %s splits layers between devices: bounded caches of its layers lie in host memory\n", __func__,
                    ggml_backend_dev_name(dev));
        }
        return ggml_backend_cpu_buffer_type();
    }
    const std::string what = indexmem_device_lacks(dev, question);
    if (what.empty()) {
        return buft;
    }
    const std::string what_stock = indexmem_device_lacks_stock(dev, question);
    stock = what_stock.empty();
    if (stock && tell(what)) {
        LLAMA_LOG_INFO("%s: %s has no kernel for %s: bounded caches of its layers lie there, and the CPU selects what leaves\n", __func__,
                ggml_backend_dev_name(dev), what.c_str());
    }
    if (!stock && tell(what + what_stock)) {
        LLAMA_LOG_WARN("%s: %s has no kernel for %s, and without it none for %s: bounded caches of its layers lie in host memory\n", __func__,
                ggml_backend_dev_name(dev), what.c_str(), what_stock.c_str());
    }
    return stock ? buft : ggml_backend_cpu_buffer_type();
}

std::vector<ggml_tensor *> indexmem_device_usual(ggml_context * ctx, ggml_context * host, int policy) {
    constexpr ggml_type type = GGML_TYPE_F16;
    constexpr int64_t   n_embd = 128, H = 8, n_group = 4;
    constexpr int64_t   n_slots = 1536, n_evict = 512 + 32, n_latent = 64, n_ring = 64, n_query = 512, n_state = 2;

    const auto tensor = [&](ggml_type type, int64_t ne0, int64_t ne1 = 1, int64_t ne2 = 1, int64_t ne3 = 1) {
        return ggml_new_tensor_4d(ctx, type, ne0, ne1, ne2, ne3);
    };
    ggml_tensor * k     = tensor(type,          n_embd, n_slots, H);
    ggml_tensor * v     = tensor(type,          n_embd, n_slots, H);
    ggml_tensor * cur   = tensor(GGML_TYPE_F32, n_embd, n_query, H);
    ggml_tensor * rows  = tensor(GGML_TYPE_I64, n_query);
    ggml_tensor * pos   = ggml_new_tensor_2d(host, GGML_TYPE_I32, n_slots, H);
    ggml_tensor * ctl   = tensor(GGML_TYPE_I32, INDEXMEM_CTL_SIZE);
    ggml_tensor * q     = tensor(GGML_TYPE_F32, n_embd, n_ring, H*n_group);
    ggml_tensor * mask  = tensor(GGML_TYPE_F16, n_slots, n_query);
    ggml_tensor * terms = tensor(GGML_TYPE_F32, n_state, n_slots, H);
    ggml_tensor * means = tensor(GGML_TYPE_F32, 2*n_embd, n_latent, H);
    ggml_tensor * count = tensor(GGML_TYPE_F32, n_latent, H);
    ggml_tensor * phi   = tensor(GGML_TYPE_F32, n_embd, n_latent);
    ggml_tensor * sums  = tensor(GGML_TYPE_F32, n_latent, n_embd + 1, H);
    ggml_tensor * query = tensor(GGML_TYPE_F32, n_embd, n_query, n_group, H);

    const auto streams = [&](ggml_tensor * t) {
        return ggml_view_4d(ctx, t, t->ne[0], t->ne[1], 1, H, t->nb[1], t->nb[2], t->nb[2], 0);
    };
    const auto attention = [&](ggml_tensor * mask) {
        ggml_tensor * res = ggml_flash_attn_ext(ctx, query, streams(k), streams(v), mask, 1.0f, 0.0f, 0.0f);
        ggml_prec_set_acc(res, GGML_PREC_F32);
        return res;
    };
    const auto * info = indexmem_policy_get(policy);

    if (host != ctx) {
        indexmem_stock stock(1);
        ggml_tensor * rank  = indexmem_stock::ranks(policy) ? stock.build_rank(ctx, k, pos, ctl, q, nullptr, policy, 1.0f, 0.0f) :
            info->needs_keys ? ggml_indexmem_rank(ctx, k, pos, ctl, nullptr, nullptr, policy, 0, 0, 1.0f, 0.0f) : tensor(GGML_TYPE_F32, n_slots, H);
        ggml_tensor * moves = ggml_indexmem_moves(ctx, ggml_indexmem_select(ctx, rank, pos, ctl, n_evict));
        return {
            ggml_set_rows(ctx, k, cur, rows),
            ggml_set_rows(ctx, v, cur, rows),
            attention(mask),
            indexmem_stock_compact(ctx, k, moves),
            indexmem_stock_compact(ctx, v, moves),
        };
    }
    ggml_tensor * rank = strcmp(info->name, "indexer") == 0 ?
        ggml_indexmem_rank_terms(ctx, terms, pos, ctl, 0.0f, 1.0f) :
        ggml_indexmem_rank(ctx, k, pos, ctl, info->n_queries > 0 ? q : nullptr, nullptr, policy, 0, 0, 1.0f, 0.0f);
    ggml_tensor * plan = ggml_indexmem_select(ctx, rank, pos, ctl, n_evict);
    return {
        ggml_set_rows(ctx, k, cur, rows),
        ggml_set_rows(ctx, v, cur, rows),
        attention(ggml_indexmem_bias(ctx, mask, count)),
        plan,
        ggml_indexmem_compact(ctx, k, plan, ctl),
        ggml_indexmem_compact(ctx, v, plan, ctl),
        ggml_indexmem_compact(ctx, terms, plan, ctl),
        ggml_indexmem_compact_pos(ctx, pos, plan, ctl),
        ggml_indexmem_centroid(ctx, means, count, k, v, plan, ctl),
        ggml_indexmem_residual(ctx, sums, phi, k, v, plan, ctl, 1.0f, 1.0f),
    };
}

// asked by name: the CPU backend may be a library that is loaded while the program runs
static bool cpu_has_vectors() {
    ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    auto get = (const char * (*)()) ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu), "ggml_indexmem_cpu_vectors");
    return get && strcmp(get(), "none") != 0;
}

bool indexmem_device_attends(const ggml_tensor * k) {
    return ggml_backend_buffer_is_host(k->buffer) && cpu_has_vectors();
}

static indexmem_device_question usual_with(int policy) {
    return [policy](ggml_context * ctx, ggml_context * host) { return indexmem_device_usual(ctx, host, policy); };
}

bool indexmem_device_supported(size_t i) {
    if (i >= ggml_backend_dev_count()) {
        return false;
    }
    for (int policy = 0; indexmem_policy_get(policy); ++policy) {
        if (!indexmem_device_lacks(ggml_backend_dev_get(i), usual_with(policy)).empty()) {
            return false;
        }
    }
    return true;
}

bool indexmem_device_supported_policy(size_t i, int32_t policy) {
    if (i >= ggml_backend_dev_count() || !indexmem_policy_get(policy)) {
        return false;
    }
    const auto usual = usual_with(policy);
    ggml_backend_dev_t dev = ggml_backend_dev_get(i);
    return indexmem_device_lacks(dev, usual).empty() || indexmem_device_lacks_stock(dev, usual).empty();
}
