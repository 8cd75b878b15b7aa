// Products of weights in the buffer type "AMX" (ggml-cpu/amx) against double precision, while others use the tiles, too.
// test_amx runs the instructions; test_amx_software, with shim/amx/tiles.h before all else, the same sources in software.

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

#include "test.h"
#include "graph.h"

#include <atomic>
#include <cmath>
#include <random>
#include <thread>

#if !defined(INDEXMEM_SOFTWARE_TILES) && defined(__AMX_TILE__)
#    include <immintrin.h>
#endif

static ggml_backend_buffer_type_t amx_buffer_type() {
    return op_extra_buffer_type("AMX");
}

static const test_needs needs([]() -> const char * {
#if defined(INDEXMEM_SOFTWARE_TILES)
    if (!__builtin_cpu_supports("avx512f")  || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512vnni")) {
        return "this CPU has no AVX-512 with VNNI, which the products are made of beside the tiles";
    }
#endif
    return amx_buffer_type() ? nullptr : "this CPU has no AMX, or the build no products for it";
});

//
// Weights, activations, and what comes out exactly
//

struct weight_type {
    ggml_type type;
    int64_t   block; // n_in is a multiple of it
};

static const weight_type TYPES[] = {
    { GGML_TYPE_Q4_0, 32  }, { GGML_TYPE_Q4_1, 32  }, { GGML_TYPE_Q8_0, 32  }, { GGML_TYPE_Q4_K,   256 },
    { GGML_TYPE_Q5_K, 256 }, { GGML_TYPE_Q6_K, 256 }, { GGML_TYPE_IQ4_XS, 256 },
};

struct product {
    ggml_type type;
    int64_t   n_in, n_out;

    std::vector<uint8_t> weights;
    std::vector<float>   values; // of the weights
    std::vector<float>   minima; // of the blocks of Q4_1

    product(weight_type t, int64_t n_blocks, int64_t n_out) : type(t.type), n_in(n_blocks*t.block), n_out(n_out) {
        std::mt19937 rng((unsigned) (n_in + 31*n_out + 1000*type));
        std::normal_distribution<float> normal(0.5f, 1.0f); // so that minima and offsets count
        values.resize(n_in*n_out);
        for (auto & x : values) {
            x = normal(rng);
        }
        weights = to_type(type, values, n_in);
        values  = from_type(type, weights, n_in*n_out);
        if (type == GGML_TYPE_Q4_1) {
            for (size_t i = 0; i < values.size()/QK4_1; ++i) {
                minima.push_back(ggml_fp16_to_fp32(((const block_q4_1 *) weights.data())[i].data.data.m));
            }
        }
    }

    // Rows that the quants of every type hold exactly: a power of two times -127 to 127, which are both in each block.
    std::vector<float> exact_rows(int64_t n_rows) const {
        std::mt19937 rng((unsigned) n_rows);
        std::vector<float> rows(n_rows*n_in);
        for (size_t i = 0; i < rows.size(); ++i) {
            const int scale = (int) (i/n_in + i/256) % 5;
            const int quant = i % 32 == 0 ? 127 : i % 32 == 31 ? -127 : (int) (rng() % 255) - 127;
            rows[i] = std::ldexp((float) quant, -8 - scale);
        }
        return rows;
    }

    std::vector<float> normal_rows(int64_t n_rows) const {
        std::mt19937 rng((unsigned) n_rows);
        std::normal_distribution<float> normal;
        std::vector<float> rows(n_rows*n_in);
        for (auto & x : rows) {
            x = normal(rng);
        }
        return rows;
    }

    // What comes out, and what a sum of `found` may be away from it: rounding, and the quants of the activations if those
    // do not hold them exactly (half a step for each).
    void check(const std::vector<float> & rows, const std::vector<float> & found, bool exact, const char * when) const {
        const int64_t n_rows = (int64_t) rows.size()/n_in;
        double worst = 0.0;
        for (int64_t i = 0; i < n_rows; ++i) {
            std::vector<double> step(n_in/32, 0.0); // of the largest block that a type has, 256 where it can be that
            for (int64_t d = 0; d < n_in; ++d) {
                const int64_t first = n_in % 256 == 0 ? d/256*8 : d/32;
                for (int64_t b = first; b < first + (n_in % 256 == 0 ? 8 : 1); ++b) {
                    step[b] = std::max(step[b], std::fabs(rows[i*n_in + d])/127.0);
                }
            }
            for (int64_t r = 0; r < n_out; ++r) {
                double sum = 0.0, allowed = 1e-6;
                for (int64_t b = 0; b < n_in/32; ++b) {
                    const double m = minima.empty() ? 0.0 : minima[(r*n_in)/32 + b];
                    double of_block = 0.0;
                    for (int64_t d = 32*b; d < 32*b + 32; ++d) {
                        const double w = values[r*n_in + d], x = rows[i*n_in + d];
                        sum      += (w - m)*x;
                        of_block += x;
                        allowed  += 2e-6*(std::fabs((w - m)*x) + std::fabs(m*x)) + (exact ? 0.0 : 0.51*step[b]*std::fabs(w));
                    }
                    // Q4_1 takes the sum of a block in half precision
                    sum     += m*ggml_fp16_to_fp32(ggml_fp32_to_fp16((float) of_block));
                    allowed += exact ? 0.0 : std::fabs(m*of_block)*1e-3;
                }
                worst = std::max(worst, std::fabs(sum - found[i*n_out + r])/allowed);
            }
        }
        CHECK_MSG(worst < 1.0, "%s, %lld x %lld, %lld rows, %s: %g times what is allowed", ggml_type_name(type),
                (long long) n_in, (long long) n_out, (long long) n_rows, when, worst);
    }
};

// weights in a buffer of AMX
class amx_weights {
public:
    explicit amx_weights(const product & p) : ctx(ggml_init({ 2*ggml_tensor_overhead(), nullptr, true })) {
        tensor = ggml_new_tensor_2d(ctx, p.type, p.n_in, p.n_out);
        buffer = ggml_backend_alloc_ctx_tensors_from_buft(ctx, amx_buffer_type());
        ggml_backend_tensor_set(tensor, p.weights.data(), 0, p.weights.size());
    }

    ~amx_weights() {
        ggml_backend_buffer_free(buffer);
        ggml_free(ctx);
    }

    ggml_tensor * tensor;

private:
    ggml_context        * ctx;
    ggml_backend_buffer_t buffer;
};

static std::vector<float> multiply(ggml_tensor * weights, const std::vector<float> & rows, int n_threads, int64_t n_batch = 1) {
    op_graph g;
    ggml_tensor * x   = g.input(GGML_TYPE_F32, weights->ne[0], (int64_t) rows.size()/weights->ne[0]/n_batch, n_batch);
    ggml_tensor * res = ggml_mul_mat(g.ctx, weights, x);
    g.alloc();
    g.set(x, rows);
    g.compute({ res }, n_threads);
    return g.get<float>(res);
}

//
// Tests
//

TEST(every_type_and_shape) {
    for (const auto & type : TYPES) {
        for (int64_t n_blocks : { 1, 3 }) {
            for (int64_t n_out : { 32, 96, 160 }) {
                const product p(type, n_blocks, n_out);
                amx_weights weights(p);
                for (int64_t n_rows : { 1, 3, 16, 33, 70 }) {
                    const auto rows  = p.exact_rows(n_rows);
                    const auto found = multiply(weights.tensor, rows, 2);
                    p.check(rows, found, true, "exact rows");
                    CHECK(multiply(weights.tensor, rows, 1) == found);
                    CHECK(multiply(weights.tensor, rows, 5) == found);
                }
            }
        }
    }
}

TEST(several_batches_of_activations) {
    for (const auto & type : TYPES) {
        const product p(type, 2, 64);
        amx_weights weights(p);
        for (int64_t n_rows : { 4, 36, 66 }) {
            const auto rows = p.exact_rows(n_rows);
            p.check(rows, multiply(weights.tensor, rows, 2, 2), true, "in 2 batches");
        }
        const auto rows = p.exact_rows(3);
        p.check(rows, multiply(weights.tensor, rows, 2, 3), true, "in 3 batches of one row");
    }
}

TEST(activations_are_rounded_by_half_a_step) {
    for (const auto & type : TYPES) {
        const product p(type, type.block == 32 ? 17 : 3, 64);
        amx_weights weights(p);
        for (int64_t n_rows : { 1, 33 }) {
            const auto rows = p.normal_rows(n_rows);
            p.check(rows, multiply(weights.tensor, rows, 2), false, "normal rows");
        }
    }
}

#if defined(__AMX_TILE__)

// constant data, for compilers that drop stores to it (GCC bug 114098)
alignas(64) static const uint8_t other_tiles[64] = {
    1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4,  4, 0,  0,
};

static std::atomic<int> n_disturbed;

// in every thread of the pool, what other libraries do: release the tiles, or leave a configuration of their own behind
static void disturb(ggml_tensor * dst, const ggml_tensor * src, int ith, int nth, void *) {
    if (ith % 2 == 0) {
        _tile_release();
    } else {
        _tile_loadconfig(other_tiles);
    }
    n_disturbed++;
    const int64_t n = ggml_nelements(src);
    for (int64_t i = n*ith/nth; i < n*(ith + 1)/nth; ++i) {
        ((float *) dst->data)[i] = ((const float *) src->data)[i];
    }
}

// rows, disturbed, times weights, and once more
static void multiply_disturbed(const product & p, amx_weights & weights, int n_threads) {
    const auto rows = p.exact_rows(33);
    op_graph g;
    ggml_tensor * x      = g.input(GGML_TYPE_F32, p.n_in, 33);
    ggml_tensor * first  = ggml_mul_mat(g.ctx, weights.tensor, x);
    ggml_tensor * second = ggml_mul_mat(g.ctx, weights.tensor, ggml_map_custom1(g.ctx, x, disturb, GGML_N_TASKS_MAX, nullptr));
    g.alloc();
    g.set(x, rows);

    const int n_before = n_disturbed;
    g.compute({ first, second }, n_threads);
    CHECK(n_disturbed == n_before + test_threads(n_threads));
    p.check(rows, g.get<float>(first),  true, "before the tiles were disturbed");
    p.check(rows, g.get<float>(second), true, "after the tiles were disturbed");
}

TEST(others_use_the_tiles_in_between) {
    for (const auto & type : TYPES) {
        const product p(type, 2, 96);
        amx_weights weights(p);
        for (int n_threads : { 1, 2, 5 }) {
            multiply_disturbed(p, weights, n_threads);
            _tile_release();
            multiply_disturbed(p, weights, n_threads);
            _tile_loadconfig(other_tiles);
        }
    }
    _tile_release();
}

TEST(in_threads_that_come_and_go) {
    const product p(TYPES[0], 2, 64);
    amx_weights weights(p);
    for (int i = 0; i < 3; ++i) {
        std::thread([&] { multiply_disturbed(p, weights, 2); }).join();
        multiply_disturbed(p, weights, 2);
    }
}

// What a product leaves in its thread: palette, start row, 14 zeros; bytes of a row, 16 bits for each of 16 tiles, from 16
// on; rows from 48 on.
TEST(the_configuration_lies_where_the_instruction_reads_it) {
    uint8_t expected[64] = {};
    expected[0] = 1;
    for (int i = 0; i < 8; ++i) {
        expected[16 + 2*i] = i == 2 || i == 3 ? 32 : 64; // A has 32 values a row, B and C have 16 groups of four bytes
        expected[48 + i]   = i < 2 ? 8 : 16;             // B has the 32 values of a block in groups of four
    }
    const product p(TYPES[0], 1, 32);
    amx_weights weights(p);
    multiply(weights.tensor, p.exact_rows(2), 1);

    static volatile uint8_t found[64]; // volatile: the intrinsic tells compilers of 8 bytes (GCC bug 114098)
    _tile_storeconfig((void *) found);
    for (int i = 0; i < 64; ++i) {
        CHECK_MSG(found[i] == expected[i], "byte %d: %d instead of %d", i, found[i], expected[i]);
    }
}

#endif
