#include "ggml-backend-impl.h"
#include "ggml-impl.h"
#include "ggml-metal/ggml-metal-device.h"
#include "indexmem-metal.h"
#include "launch.h"

#include <cstdio>

// Ops may be encoded to run side by side; the backend finds out from the ranges of memory that they read (sources) and
// write (results). An op that writes one of its sources, as the counts of a centroid memory, or that takes several kernels,
// says nothing of that there, so barriers enclose what we encode. (Ops are put into another order before, by their sources: nothing may
// read counts behind the op that writes them, in one graph.)

static ggml_metal_buffer_id buffer_of(const ggml_tensor * t) {
    ggml_backend_buffer_t buffer = t->view_src ? t->view_src->buffer : t->buffer;
    return ggml_metal_buffer_get_id((ggml_metal_buffer_t) buffer->context, t);
}

static ggml_metal_pipeline_with_params pipeline_of(ggml_metal_library_t lib, const char * kernel, indexmem_metal_types types) {
    char base[128];
    char name[256];
    snprintf(base, sizeof(base), "kernel_indexmem_%s", kernel);
    snprintf(name, sizeof(name), "%s_k=%d_v=%d", base, types.k, types.v);

    ggml_metal_pipeline_with_params res = ggml_metal_library_get_pipeline(lib, name);
    if (!res.pipeline) {
        ggml_metal_cv_t cv = ggml_metal_cv_init();
        ggml_metal_cv_set_int32(cv, types.k, INDEXMEM_METAL_TYPE_K);
        ggml_metal_cv_set_int32(cv, types.v, INDEXMEM_METAL_TYPE_V);
        res = ggml_metal_library_compile_pipeline(lib, base, name, cv);
        ggml_metal_cv_free(cv);
    }
    GGML_ASSERT(res.pipeline);
    GGML_ASSERT(ggml_metal_pipeline_max_theads_per_threadgroup(res) >= INDEXMEM_METAL_THREADS);
    return res;
}

void ggml_indexmem_metal_encode(ggml_metal_library_t lib, ggml_metal_encoder_t enc, ggml_tensor * op) {
    indexmem_metal_args args = indexmem_metal_args_of(op);

    const ggml_metal_buffer_id dst = buffer_of(op);

    ggml_metal_buffer_id scratch = dst;
    if (args.scratch_row > 0) {
        scratch.offs = GGML_PAD(dst.offs + ggml_nbytes(op), 16);
    }

    ggml_metal_encoder_memory_barrier(enc);
    for (const auto & launch : indexmem_metal_launches(op)) {
        ggml_metal_encoder_set_pipeline(enc, pipeline_of(lib, launch.kernel, indexmem_metal_types_of(op)));
        ggml_metal_encoder_set_bytes   (enc, &args, sizeof(args), 0);
        for (int i = 0; i < INDEXMEM_METAL_N_SRC; ++i) {
            // a kernel does not touch a source that is not there
            ggml_metal_encoder_set_buffer(enc, op->src[i] ? buffer_of(op->src[i]) : dst, 1 + i);
        }
        ggml_metal_encoder_set_buffer(enc, dst,     1 + INDEXMEM_METAL_N_SRC);
        ggml_metal_encoder_set_buffer(enc, scratch, 2 + INDEXMEM_METAL_N_SRC);
        ggml_metal_encoder_set_threadgroup_memory_size(enc, launch.memory, 0);
        ggml_metal_encoder_dispatch_threadgroups(
                enc, launch.grid[0], launch.grid[1], launch.grid[2], INDEXMEM_METAL_THREADS, 1, 1);
        ggml_metal_encoder_memory_barrier(enc);
    }
}
