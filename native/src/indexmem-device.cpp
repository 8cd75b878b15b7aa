#include "indexmem-device.h"

#include "indexmem-ops.h"
#include "indexmem.h"

#include "ggml-cpp.h"
#include "llama-hparams.h"
#include "llama-impl.h"

#include <cstring>
#include <set>
#include <string>
#include <utility>
#include <vector>

indexmem_device_needs indexmem_device_needs::of_layer(
        const llama_hparams & hparams, uint32_t il, ggml_type type_k, ggml_type type_v, int policy) {
    const int64_t n_head_kv = hparams.n_head_kv(il);
    const int64_t n_group   = hparams.n_head(il)/n_head_kv;
    return { type_k, type_v, hparams.n_embd_head_k(il), hparams.n_embd_head_v(il), n_head_kv, n_group, policy };
}

// Builds the nodes that the graphs are made of, without memory, and asks for each.
const char * indexmem_device_lacks(ggml_backend_dev_t dev, const indexmem_device_needs & n) {
    constexpr int64_t n_slots = 512, n_evict = 32, n_latent = 16, n_ring = 64, n_query = 2, n_state = 2;

    ggml_context_ptr owner(ggml_init({ 64*ggml_tensor_overhead(), nullptr, true }));
    ggml_context * ctx = owner.get();

    const auto tensor = [&](ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2, int64_t ne3 = 1) {
        return ggml_new_tensor_4d(ctx, type, ne0, ne1, ne2, ne3);
    };
    const int64_t H = n.n_head_kv;

    ggml_tensor * k     = tensor(n.type_k,      n.n_embd_k, n_slots, H);
    ggml_tensor * v     = tensor(n.type_v,      n.n_embd_v, n_slots, H);
    ggml_tensor * k_cur = tensor(GGML_TYPE_F32, n.n_embd_k, n_query, H);
    ggml_tensor * v_cur = tensor(GGML_TYPE_F32, n.n_embd_v, n_query, H);
    ggml_tensor * rows  = tensor(GGML_TYPE_I64, n_query, 1, 1);
    ggml_tensor * pos   = tensor(GGML_TYPE_I32, n_slots, H, 1);
    ggml_tensor * ctl   = tensor(GGML_TYPE_I32, INDEXMEM_CTL_SIZE, 1, 1);
    ggml_tensor * q     = tensor(GGML_TYPE_F32, n.n_embd_k, n_ring, H*n.n_group);
    ggml_tensor * mask  = tensor(GGML_TYPE_F16, n_slots, n_query, 1);
    ggml_tensor * terms = tensor(GGML_TYPE_F32, n_state, n_slots, H);
    ggml_tensor * means = tensor(GGML_TYPE_F32, n.n_embd_k + n.n_embd_v, n_latent, H);
    ggml_tensor * count = tensor(GGML_TYPE_F32, n_latent, H, 1);
    ggml_tensor * phi   = tensor(GGML_TYPE_F32, n.n_embd_k, n_latent, 1);
    ggml_tensor * sums  = tensor(GGML_TYPE_F32, n_latent, n.n_embd_v + 1, H);
    ggml_tensor * query = tensor(GGML_TYPE_F32, n.n_embd_k, n_query, n.n_group, H);

    const auto streams = [&](ggml_tensor * t) {
        return ggml_view_4d(ctx, t, t->ne[0], t->ne[1], 1, H, t->nb[1], t->nb[2], t->nb[2], 0);
    };
    const auto * policy = indexmem_policy_get(n.policy);

    ggml_tensor * rank = strcmp(policy->name, "indexer") == 0 ?
        ggml_indexmem_rank_terms(ctx, terms, pos, ctl, 0.0f, 1.0f) :
        ggml_indexmem_rank(ctx, k, pos, ctl, policy->n_queries > 0 ? q : nullptr, n.policy, 0, 0, 1.0f, 0.0f);
    ggml_tensor * plan   = ggml_indexmem_select(ctx, rank, pos, ctl, n_evict);
    ggml_tensor * biased = ggml_indexmem_bias(ctx, mask, count);
    ggml_tensor * attend = ggml_flash_attn_ext(ctx, query, streams(k), streams(v), biased, 1.0f, 0.0f, 0.0f);
    ggml_prec_set_acc(attend, GGML_PREC_F32);

    const std::pair<const char *, ggml_tensor *> nodes[] = {
        { "storing keys of this type",   ggml_set_rows(ctx, k, k_cur, rows)                                  },
        { "storing values of this type", ggml_set_rows(ctx, v, v_cur, rows)                                  },
        { "flash attention",             attend                                                              },
        { "masks with biases",           biased                                                              },
        { "the policy",                  rank                                                                },
        { "selection",                   plan                                                                },
        { "compaction of keys",          ggml_indexmem_compact(ctx, k, plan, ctl)                            },
        { "compaction of values",        ggml_indexmem_compact(ctx, v, plan, ctl)                            },
        { "compaction of states",        ggml_indexmem_compact(ctx, terms, plan, ctl)                        },
        { "compaction of positions",     ggml_indexmem_compact_pos(ctx, pos, plan, ctl)                      },
        { "centroid memories",           ggml_indexmem_centroid(ctx, means, count, k, v, plan, ctl)          },
        { "residual memories",           ggml_indexmem_residual(ctx, sums, phi, k, v, plan, ctl, 1.0f, 1.0f) },
    };
    for (const auto & [what, node] : nodes) {
        if (!ggml_backend_dev_supports_op(dev, node)) {
            return what;
        }
    }
    return nullptr;
}

ggml_backend_buffer_type_t indexmem_device_buft(ggml_backend_dev_t dev, const indexmem_device_needs & needs) {
    ggml_backend_buffer_type_t buft = ggml_backend_dev_buffer_type(dev);
    if (ggml_backend_buft_is_host(buft)) {
        return buft;
    }
    const char * what = indexmem_device_lacks(dev, needs);
    if (!what) {
        return buft;
    }
    static thread_local std::set<std::pair<ggml_backend_dev_t, std::string>> told;
    if (told.emplace(dev, what).second) {
        LLAMA_LOG_WARN("%s: %s has no kernel for %s: bounded caches of its layers lie in host memory\n", __func__,
                ggml_backend_dev_name(dev), what);
    }
    return ggml_backend_cpu_buffer_type();
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

bool indexmem_device_supported(size_t i) {
    if (i >= ggml_backend_dev_count()) {
        return false;
    }
    for (int policy = 0; indexmem_policy_get(policy); ++policy) {
        if (indexmem_device_lacks(ggml_backend_dev_get(i), { GGML_TYPE_F16, GGML_TYPE_F16, 128, 128, 8, 4, policy })) {
            return false;
        }
    }
    return true;
}
