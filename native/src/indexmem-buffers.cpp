#include "indexmem-buffers.h"

#include "indexmem-error.h"

#include "ggml-alloc.h"
#include "llama-impl.h"
#include "llama-model.h"

indexmem_buffers::indexmem_buffers(const llama_model & model, bool offload, size_t n_tensors) :
    model(model), offload(offload), n_tensors(n_tensors) {
}

ggml_backend_buffer_type_t indexmem_buffers::type(uint32_t il) const {
    return offload ? ggml_backend_dev_buffer_type(model.dev_layer(il)) : ggml_backend_cpu_buffer_type();
}

ggml_context * indexmem_buffers::context(uint32_t il, ggml_backend_buffer_type_t buft) {
    buft = buft ? buft : type(il);

    auto & entry = ctxs[ggml_backend_buft_name(buft)];
    if (!entry.second) {
        entry.first = buft;
        entry.second.reset(ggml_init({ n_tensors*ggml_tensor_overhead(), nullptr, true }));
    }
    return entry.second.get();
}

void indexmem_buffers::alloc(const std::string & what) {
    for (auto & [name, entry] : ctxs) {
        auto & [buft, ctx] = entry;

        ggml_backend_buffer_t buf;
        if (model.hparams.no_alloc) {
            buf = ggml_backend_buft_alloc_buffer(buft, 0);
            for (ggml_tensor * t = ggml_get_first_tensor(ctx.get()); t; t = ggml_get_next_tensor(ctx.get(), t)) {
                t->buffer = buf;
            }
        } else {
            buf = ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft);
        }
        if (!buf) {
            indexmem_fail(INDEXMEM_ERROR_PARAMS, format("cannot allocate %s in %s memory", what.c_str(), name.c_str()));
        }
        ctxs_bufs.emplace_back(std::move(ctx), buf);
    }
    ctxs.clear();
}
