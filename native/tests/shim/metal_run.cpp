// Linked to a test of ops: nodes of GGML_OP_INDEXMEM are computed by the Metal kernels, on the CPU.

#include "../graph.h"
#include "indexmem-metal.h"
#include "launch.h"
#include "metal_shim.h"

#include "indexmem.metal"

#include "metal_end.h"

static constexpr size_t MAX_MEMORY = 32*1024; // of a group, the least that there is

struct metal_kernel {
    const char * name;
    decltype(&kernel_indexmem_select) run;
};

#define KERNEL(name) { #name, kernel_indexmem_##name }
static const metal_kernel metal_kernels[] = {
    KERNEL(rank_full), KERNEL(rank_streaming), KERNEL(rank_random), KERNEL(rank_indexer), KERNEL(rank_knorm), KERNEL(rank_keydiff),
    KERNEL(attention_sum), KERNEL(attention_mean), KERNEL(attention_smooth), KERNEL(attention_expected),
    KERNEL(pairwise), KERNEL(select), KERNEL(compact), KERNEL(compact_pos),
    KERNEL(centroid), KERNEL(residual), KERNEL(bias),
};
#undef KERNEL

static const metal_kernel & find_kernel(const char * name) {
    for (const metal_kernel & k : metal_kernels) {
        if (strcmp(k.name, name) == 0) {
            return k;
        }
    }
    GGML_ABORT("there is no kernel %s", name);
}

static bool run_on_metal_shim(ggml_tensor * op) {
    if (op->op != GGML_OP_INDEXMEM || !ggml_indexmem_metal_supports(op, MAX_MEMORY)) {
        return false;
    }
    indexmem_metal_args args = indexmem_metal_args_of(op);

    const indexmem_metal_types types = indexmem_metal_types_of(op);
    indexmem_type_k = types.k;
    indexmem_type_v = types.v;

    char * src[INDEXMEM_METAL_N_SRC];
    for (int i = 0; i < INDEXMEM_METAL_N_SRC; ++i) {
        src[i] = op->src[i] ? (char *) op->src[i]->data : nullptr;
    }
    std::vector<float> scratch(ggml_indexmem_metal_extra(op)/sizeof(float), NAN);

    for (const indexmem_metal_launch & launch : indexmem_metal_launches(op)) {
        const metal_kernel & k = find_kernel(launch.kernel);
        const shim::extent grid = { (uint32_t) launch.grid[0], (uint32_t) launch.grid[1], (uint32_t) launch.grid[2] };
        shim::run(grid, { INDEXMEM_METAL_THREADS }, launch.memory, shim::order_of_environment(), [&] {
            const shim::thread & t = shim::here();
            k.run(args, src[0], src[1], src[2], src[3], src[4], src[5], (char *) op->data, scratch.data(), (char *) t.memory,
                    { t.group.x, t.group.y, t.group.z }, t.flat, t.lane, t.simdgroup);
        });
    }
    return true;
}

static const bool installed = (op_elsewhere = run_on_metal_shim, true);
