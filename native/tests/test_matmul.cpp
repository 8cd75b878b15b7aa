// products of quantised weights with rows of activations against double precision

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

#include "test.h"
#include "graph.h"
#include "vectors.h"

#include <cmath>
#include <random>

#if defined(__linux__)
#    include <pthread.h>
#endif

struct matmul_case {
    int64_t n_in, n_out, n_cols;
    int64_t n_batch = 1; // of the activations
};

// matmul.cpp has vectors of x86 only
static bool products_are_ours() {
    return cpu_vectors().rfind("AVX", 0) == 0;
}

static std::vector<float> random_values(std::mt19937 & rng, int64_t n) {
    std::normal_distribution<float> normal;
    std::vector<float> x(n);
    for (auto & y : x) {
        y = normal(rng);
    }
    return x;
}

static std::vector<float> multiply(ggml_type type, const matmul_case & c, const std::vector<uint8_t> & weights,
        const std::vector<float> & rows, int n_threads) {
    op_graph g;
    ggml_tensor * w   = g.input(type, c.n_in, c.n_out);
    ggml_tensor * x   = g.input(GGML_TYPE_F32, c.n_in, c.n_cols, c.n_batch);
    ggml_tensor * res = ggml_mul_mat(g.ctx, w, x);
    g.alloc();
    g.set(w, weights);
    g.set(x, rows);
    g.compute({ res }, n_threads);
    return g.get<float>(res);
}

// What dot products take: quants in blocks of 32. Sums of blocks are used by Q4_1 alone, for its minima.
struct activations {
    std::vector<float> values;
    std::vector<float> sums;

    activations(ggml_type type, const std::vector<float> & rows) : values(rows.size()), sums(rows.size()/QK8_1) {
        op_graph g;
        ggml_tensor * x       = g.input(GGML_TYPE_F32, (int64_t) rows.size());
        ggml_tensor * rounded = ggml_cast(g.ctx, x, GGML_TYPE_Q8_1);
        g.alloc();
        g.set(x, rows);
        g.compute({ rounded }, 1);
        const auto blocks = g.get<block_q8_1>(rounded);
        for (size_t i = 0; i < rows.size(); ++i) {
            const auto & b = blocks[i/QK8_1];
            values[i] = ggml_fp16_to_fp32(b.data.data.d)*b.qs[i % QK8_1];
        }
        for (size_t i = 0; i < sums.size(); ++i) {
            sums[i] = type == GGML_TYPE_Q4_1 ? ggml_fp16_to_fp32(blocks[i].data.data.s) : 0.0f;
        }
    }
};

static void run_matmul(ggml_type type, const matmul_case & c) {
    std::mt19937 rng((unsigned) (c.n_in + 31*c.n_out + 7*c.n_cols));
    auto w = random_values(rng, c.n_in*c.n_out);
    for (int64_t i = 0; i < c.n_in && i < 32; ++i) {
        w[i] = 0.0f; // a block without a scale
    }
    for (auto & x : w) {
        x += 0.5f; // so that minima and offsets count
    }
    const auto weights  = to_type(type, w, c.n_in);
    const auto rows     = random_values(rng, c.n_in*c.n_cols*c.n_batch);
    auto       exact    = from_type(type, weights, c.n_in*c.n_out);
    const activations seen(type, rows);

    std::vector<float> minima(exact.size()/QK4_1);
    for (size_t i = 0; type == GGML_TYPE_Q4_1 && i < exact.size(); ++i) {
        minima[i/QK4_1] = ggml_fp16_to_fp32(((const block_q4_1 *) weights.data())[i/QK4_1].data.data.m);
        exact[i] -= minima[i/QK4_1];
    }

    std::vector<double> sums, sizes;
    for (int64_t i = 0; i < c.n_cols*c.n_batch; ++i) {
        for (int64_t r = 0; r < c.n_out; ++r) {
            double sum = 0.0, size = 1e-6;
            const auto add = [&](double x) {
                sum  += x;
                size += std::abs(x);
            };
            for (int64_t d = 0; d < c.n_in; ++d) {
                add((double) exact[r*c.n_in + d]*seen.values[i*c.n_in + d]);
            }
            for (int64_t d = 0; d < c.n_in; d += QK4_1) {
                add((double) minima[(r*c.n_in + d)/QK4_1]*seen.sums[(i*c.n_in + d)/QK8_1]);
            }
            sums .push_back(sum);
            sizes.push_back(size);
        }
    }
    std::vector<float> first;
    for (int n_threads : { 2, 1, 5 }) {
        if (test_threads(n_threads) != n_threads) {
            continue; // of as many as another case
        }
        const auto found = multiply(type, c, weights, rows, n_threads);

        double worst = 0.0;
        for (size_t i = 0; i < found.size(); ++i) {
            const double error = std::abs(sums[i] - found[i])/sizes[i];
            worst = error <= worst ? worst : error; // NaN, too
        }
        CHECK_MSG(worst < 2e-6, "%s, %lld x %lld, %lld rows, %d threads: %g", ggml_type_name(type),
                (long long) c.n_in, (long long) c.n_out, (long long) (c.n_cols*c.n_batch), n_threads, worst);

        // llama.cpp's own promise no such thing: with i8mm on ARM, pairs of rows of one thread are summed in another order
        first = first.empty() ? found : first;
        CHECK(found == first || !products_are_ours());
    }
}

static const ggml_type TYPES[] = { GGML_TYPE_Q4_0, GGML_TYPE_Q4_1, GGML_TYPE_Q8_0 };

TEST(awkward_shapes) {
    for (ggml_type type : TYPES) {
        for (int64_t n_in : { 32, 96, 1024, 1056, 2080 }) { // around a panel of blocks
            for (int64_t n_out : { 1, 16, 33, 100 }) {
                for (int64_t n_cols : { 1, 2, 7, 8, 9, 19 }) {
                    run_matmul(type, { n_in, n_out, n_cols });
                }
            }
        }
    }
}

TEST(several_batches) {
    for (ggml_type type : TYPES) {
        run_matmul(type, { 64, 40, 3, 2 });
        run_matmul(type, { 64, 40, 1, 4 });
    }
}

// the extremes of quants and activations: sums that would not fit into 16 bits
TEST(nothing_saturates) {
    for (ggml_type type : TYPES) {
        const matmul_case c = { 1024, 17, 3 };
        std::vector<float> w(c.n_in*c.n_out);
        for (size_t i = 0; i < w.size(); ++i) {
            w[i] = i % 32 == 0 ? -8.0f : 7.0f; // the block of 4 bits then spans 0 to 15
        }
        const std::vector<float> rows(c.n_in*c.n_cols, 1.0f);
        const auto weights = to_type(type, w, c.n_in);
        const auto exact   = from_type(type, weights, c.n_in*c.n_out);
        const auto found   = multiply(type, c, weights, rows, 1);

        double sum = 0.0;
        for (int64_t d = 0; d < c.n_in; ++d) {
            sum += exact[d];
        }
        for (float x : found) {
            CHECK_MSG(std::abs(x - sum) < 1e-3*sum, "%s: %g instead of %g", ggml_type_name(type), x, sum);
        }
    }
}

// what else is in the ubatch changes no bit of a row
TEST(rows_do_not_see_each_other) {
    std::mt19937 rng(1);
    for (ggml_type type : TYPES) {
        const auto weights = to_type(type, random_values(rng, 576*50), 576);
        const auto rows    = random_values(rng, 576*19);
        const auto all     = multiply(type, { 576, 50, 19 }, weights, rows, 2);
        for (int64_t n : { 2, 3, 8, 11 }) {
            const std::vector<float> first(rows.begin(), rows.begin() + 576*n);
            const auto some = multiply(type, { 576, 50, n }, weights, first, 2);
            CHECK(std::equal(some.begin(), some.end(), all.begin()));
        }
    }
}

// a weight that is not a number spoils its own row and no other
TEST(nan_stays_where_it_is) {
    std::mt19937 rng(2);
    for (ggml_type type : TYPES) {
        const matmul_case c = { 96, 35, 9 };
        auto weights = to_type(type, random_values(rng, c.n_in*c.n_out), c.n_in);
        const size_t row = ggml_row_size(type, c.n_in);
        std::fill(weights.begin() + 17*row, weights.begin() + 18*row, 0xFF);
        const auto found = multiply(type, c, weights, random_values(rng, c.n_in*c.n_cols), 2);
        for (size_t i = 0; i < found.size(); ++i) {
            CHECK(std::isnan(found[i]) == (i % c.n_out == 17));
        }
    }
}

#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) // those enlarge every frame

// Threads of musl have 128 kB, of which a product may take a quarter, with all that calls it.
TEST(small_stacks) {
    static constexpr size_t SIZE = 1 << 20, MOST = 32*1024;
    static uint8_t * bottom = (uint8_t *) ggml_aligned_malloc(SIZE);
    static size_t used;
    std::fill(bottom, bottom + SIZE, 0xA5);
    const auto run = [](void *) -> void * {
        uint8_t top_byte = 0, * top = &top_byte;
        static std::mt19937 rng(5);
        for (ggml_type type : TYPES) {
            for (int64_t n_cols : { 1, 8, 40 }) {
                const matmul_case c = { 9024, 70, n_cols };
                const auto weights = to_type(type, random_values(rng, c.n_in*c.n_out), c.n_in);
                const auto found   = multiply(type, c, weights, random_values(rng, c.n_in*c.n_cols), 1);
                CHECK(found.size() == (size_t) (c.n_out*c.n_cols));
            }
        }
        used = top - std::find_if(bottom, top, [](uint8_t x) { return x != 0xA5; });
        return nullptr;
    };
    pthread_attr_t attr;
    pthread_t      thread;
    pthread_attr_init(&attr);
    CHECK(pthread_attr_setstack(&attr, bottom, SIZE) == 0);
    CHECK(pthread_create(&thread, &attr, run, nullptr) == 0);
    pthread_join(thread, nullptr);
    pthread_attr_destroy(&attr);
    ggml_aligned_free(bottom, SIZE);
    CHECK_MSG(used > 0 && used <= MOST, "%zu bytes", used);
}

#endif

// where llama.cpp interleaves rows of weights, if it does on this machine
static ggml_backend_buffer_type_t repacking_buffer_type() {
    return op_extra_buffer_type("CPU_REPACK");
}

// whether it does with weights of that shape: without dot products of bytes, as on the first ARMv8, it does not
static bool is_repacked(const matmul_case & c) {
    ggml_context * ctx = ggml_init({ 4*ggml_tensor_overhead(), nullptr, true });
    ggml_tensor  * w   = ggml_new_tensor_2d(ctx, GGML_TYPE_Q4_0, c.n_in, c.n_out);
    ggml_tensor  * res = ggml_mul_mat(ctx, w, ggml_new_tensor_2d(ctx, GGML_TYPE_F32, c.n_in, c.n_cols));
    w->buffer = ggml_backend_buft_alloc_buffer(repacking_buffer_type(), 0);
    const bool is = ggml_backend_dev_supports_op(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU), res);
    ggml_backend_buffer_free(w->buffer);
    ggml_free(ctx);
    return is;
}

static std::vector<float> multiply_repacked(const matmul_case & c, const std::vector<uint8_t> & weights,
        const std::vector<float> & rows, int n_threads) {
    ggml_context * ctx = ggml_init({ 2*ggml_tensor_overhead(), nullptr, true });
    ggml_tensor  * w   = ggml_new_tensor_2d(ctx, GGML_TYPE_Q4_0, c.n_in, c.n_out);
    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors_from_buft(ctx, repacking_buffer_type());
    std::vector<float> found;
    if (w->extra) { // without AVX2 these weights stay as they are: there is nothing to compare
        ggml_backend_tensor_set(w, weights.data(), 0, weights.size());
        op_graph g;
        ggml_tensor * x   = g.input(GGML_TYPE_F32, c.n_in, c.n_cols, c.n_batch);
        ggml_tensor * res = ggml_mul_mat(g.ctx, w, x);
        g.alloc();
        g.set(x, rows);
        g.compute({ res }, n_threads);
        found = g.get<float>(res);
    }
    ggml_backend_buffer_free(buffer);
    ggml_free(ctx);
    return found;
}

TEST(interleaved_rows) {
    if (!repacking_buffer_type()) {
        return;
    }
    std::mt19937 rng(4);
    for (int64_t n_in : { 32, 96, 1056 }) {
        for (int64_t n_out : { 8, 16, 24, 136 }) {
            for (int64_t n_cols : { 1, 2, 8, 19 }) {
                const matmul_case c = { n_in, n_out, n_cols };
                if (!is_repacked(c)) {
                    continue;
                }
                const auto weights  = to_type(GGML_TYPE_Q4_0, random_values(rng, n_in*n_out), n_in);
                const auto rows     = random_values(rng, n_in*n_cols);
                const auto expected = multiply(GGML_TYPE_Q4_0, c, weights, rows, 1);
                const auto found    = multiply_repacked(c, weights, rows, 2);
                for (size_t i = 0; i < found.size(); ++i) {
                    CHECK_MSG(std::abs(found[i] - expected[i]) < 1e-5*(double) n_in, "%lld x %lld, %lld rows: %g instead of %g",
                            (long long) n_in, (long long) n_out, (long long) n_cols, found[i], expected[i]);
                }
            }
        }
    }
}
