#include "indexmem-work.h"

#include "indexmem-layer-nodes.h"

#include "ggml-cpp.h"
#include "llama-context.h"
#include "llama-cparams.h"
#include "llama-model.h"

#include <algorithm>

// the CPU backend's own answer; it may be a library that was loaded while the program runs
typedef size_t (*work_size_t)(const ggml_tensor * op, int n_tasks);

static work_size_t find_work_size() {
    ggml_backend_dev_t dev = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    ggml_backend_reg_t reg = dev ? ggml_backend_dev_backend_reg(dev) : nullptr;
    return reg ? (work_size_t) ggml_backend_reg_get_proc_address(reg, "ggml_indexmem_cpu_work_size") : nullptr;
}

size_t indexmem_work_bytes(const llama_context & ctx, const llama_kv_cache_bounded & kv) {
    const work_size_t work_size = find_work_size();
    if (!work_size) {
        return 0;
    }
    const auto & cparams = ctx.get_cparams();

    const int      n_threads = std::max(cparams.n_threads, cparams.n_threads_batch);
    const uint32_t n_tokens  = std::min(cparams.n_ctx, cparams.n_ubatch);

    if (kv.work_threads == n_threads) {
        return kv.work_bytes;
    }
    size_t res = 0;
    for (const auto & l : kv.get_layers()) {
        if (!ggml_backend_buffer_is_host(l.k->buffer) && !l.stock) {
            continue;
        }
        for (const auto & [n_seq, n] : { std::pair<uint32_t, uint32_t>(1, n_tokens), { kv.get_n_seq_max(), 1 } }) {
            ggml_context_ptr nodes(ggml_init({ indexmem_layer_nodes::N_TENSORS*ggml_tensor_overhead(), nullptr, true }));
            indexmem_layer_nodes_of_all(nodes.get(), ctx.get_model().hparams, kv, l, n_seq, n);
            for (ggml_tensor * t = ggml_get_first_tensor(nodes.get()); t; t = ggml_get_next_tensor(nodes.get(), t)) {
                res = std::max(res, t->op == GGML_OP_INDEXMEM ? work_size(t, n_threads) : 0);
            }
        }
    }
    kv.work_threads = n_threads;
    kv.work_bytes   = res;
    return res;
}
