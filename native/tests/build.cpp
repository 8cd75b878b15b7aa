// Linked into tests of the ops together with another build of our kernels than ggml-cpu's (builds.cmake): is it the one that
// ggml-cpu calls? The functions below stand before that build, whose own have been renamed, and count.

#define TEST_NO_MAIN
#include "test.h"
#include "graph.h"

#include "indexmem-cpu.h"
#include "indexmem-ops.h"
#include "vectors.h"

#include <atomic>

static std::atomic<int> n_ops;
static std::atomic<int> n_products;

extern "C" {

void build_compute_forward_indexmem(const ggml_compute_params * params, ggml_tensor * dst);
bool build_indexmem_mul_mat(const ggml_compute_params * params, ggml_tensor * dst, const void * rows);
bool build_indexmem_mul_mat_q4_0x8(const ggml_compute_params * params, ggml_tensor * dst);

void ggml_compute_forward_indexmem(const ggml_compute_params * params, ggml_tensor * dst) {
    ++n_ops;
    build_compute_forward_indexmem(params, dst);
}

bool ggml_indexmem_mul_mat(const ggml_compute_params * params, ggml_tensor * dst, const void * rows) {
    ++n_products;
    return build_indexmem_mul_mat(params, dst, rows);
}

bool ggml_indexmem_mul_mat_q4_0x8(const ggml_compute_params * params, ggml_tensor * dst) {
    ++n_products;
    return build_indexmem_mul_mat_q4_0x8(params, dst);
}

}

TEST(ggml_cpu_calls_this_build) {
    CHECK_MSG(cpu_vectors() == INDEXMEM_BUILD, "%s", cpu_vectors().c_str());

    op_graph g;
    ggml_tensor * mask    = g.input(GGML_TYPE_F16, 64, 2, 1, 1);
    ggml_tensor * count   = g.input(GGML_TYPE_F32, 8, 3, 1);
    ggml_tensor * weights = g.input(GGML_TYPE_Q4_0, 64, 8);
    ggml_tensor * rows    = g.input(GGML_TYPE_F32, 64, 4);
    ggml_tensor * biased  = ggml_indexmem_bias(g.ctx, mask, count);
    ggml_tensor * product = ggml_mul_mat(g.ctx, weights, rows);
    g.alloc();
    g.set(mask,    std::vector<ggml_fp16_t>(ggml_nelements(mask)));
    g.set(count,   std::vector<float>(ggml_nelements(count), 1.0f));
    g.set(weights, std::vector<uint8_t>(ggml_nbytes(weights)));
    g.set(rows,    std::vector<float>(ggml_nelements(rows), 1.0f));

    const int ops = n_ops, products = n_products;
    g.compute({ biased, product }, 1);
    CHECK(n_ops == ops + 1);
    CHECK(n_products == products + 1);
}
