// Keys that are turned to other positions, again and again: against exact ones, in every type that a cache may turn.

#include "indexmem-nodes.h"
#include "indexmem-rotator.h"

#include "test.h"
#include "tiny_model.h"

#include "ggml-alloc.h"
#include "ggml-cpp.h"
#include "llama-context.h"
#include "llama.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

static constexpr int64_t HEAD = 64, N_ROWS = 3000; // more than are turned at a time

// a context to turn keys of; its own cache is of no matter
struct fixture {
    llama_model   * model;
    llama_context * ctx;

    fixture() {
        llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
        const char * path = "test-rotator-model.gguf";
        write_tiny_model(path, { 24, 16, 1, 2, 2, 16, 256 }, [](const std::string &, int64_t) { return 0.1f; });
        auto params = llama_model_default_params();
        params.n_gpu_layers = 0;
        model = llama_model_load_from_file(path, params);
        remove(path);
        auto cparams = llama_context_default_params();
        cparams.n_ctx     = 256;
        cparams.n_threads = cparams.n_threads_batch = 2;
        ctx = llama_init_from_model(model, cparams);
        CHECK(ctx != nullptr);
    }

    ~fixture() {
        llama_free(ctx);
        llama_model_free(model);
    }
};

// rows of keys as a cache holds them, rotated by a Hadamard matrix if it does that, beside exact ones
struct keys {
    ggml_context_ptr        ctx;
    ggml_backend_buffer_ptr buf;
    ggml_tensor           * t;

    int64_t rot;

    std::vector<double>  exact;    // [N_ROWS][HEAD], at position 0
    std::vector<int64_t> position; // [N_ROWS]

    explicit keys(ggml_type type) :
        ctx(ggml_init({ 4*ggml_tensor_overhead(), nullptr, true })), rot(ggml_is_quantized(type) ? HEAD : 0), position(N_ROWS) {
        t = ggml_new_tensor_2d(ctx.get(), type, HEAD, N_ROWS);
        buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), ggml_backend_cpu_buffer_type()));

        std::mt19937 rng(type);
        std::normal_distribution<float> normal;
        std::vector<float> data(HEAD*N_ROWS);
        for (size_t i = 0; i < data.size(); ++i) {
            data[i] = normal(rng)*(i % HEAD == 5 || i % HEAD == 40 ? 8.0f : 1.0f); // some dimensions of keys are large
        }
        exact.assign(data.begin(), data.end());
        data = mixed(data);
        std::vector<uint8_t> bytes(ggml_nbytes(t));
        ggml_quantize_chunk(type, data.data(), bytes.data(), 0, N_ROWS, HEAD, nullptr);
        if (type == GGML_TYPE_F32) {
            memcpy(bytes.data(), data.data(), bytes.size());
        }
        ggml_backend_tensor_set(t, bytes.data(), 0, bytes.size());
    }

    // by the Hadamard matrix, which is its own inverse
    std::vector<float> mixed(const std::vector<float> & x) const {
        if (rot == 0) {
            return x;
        }
        const auto h = indexmem_hadamard(rot);
        std::vector<float> res(x.size());
        for (size_t i = 0; i < x.size(); ++i) {
            for (int64_t j = 0; j < rot; ++j) {
                res[i] += h[(i % rot)*rot + j]*x[i/rot*rot + j];
            }
        }
        return res;
    }

    // what is there, against what should be: the length of the difference, as a share
    double error(const indexmem_rotation & r) const {
        std::vector<uint8_t> bytes(ggml_nbytes(t));
        std::vector<float>   data(HEAD*N_ROWS);
        ggml_backend_tensor_get(t, bytes.data(), 0, bytes.size());
        if (t->type == GGML_TYPE_F32) {
            memcpy(data.data(), bytes.data(), bytes.size());
        } else {
            ggml_get_type_traits(t->type)->to_float(bytes.data(), data.data(), (int64_t) data.size());
        }
        data = mixed(data);

        double wrong = 0.0, all = 0.0;
        for (int64_t i = 0; i < N_ROWS; ++i) {
            const double * key = exact.data() + i*HEAD;
            std::vector<double> want(key, key + HEAD);
            for (int d = 0; d < r.n_dims/2; ++d) {
                const bool neox = r.mode == GGML_ROPE_TYPE_NEOX;
                const int  a = r.n_offset + (neox ? d : 2*d), b = neox ? a + r.n_dims/2 : a + 1;
                const double angle = (double) position[i]*r.freq_scale*std::pow((double) r.freq_base, -2.0*d/r.n_dims)/(r.factors.empty() ? 1.0 : r.factors[d]);
                want[a] = key[a]*std::cos(angle) - key[b]*std::sin(angle);
                want[b] = key[a]*std::sin(angle) + key[b]*std::cos(angle);
            }
            for (int64_t d = 0; d < HEAD; ++d) {
                const double x = data[i*HEAD + d] - want[d];
                wrong += x*x;
                all   += want[d]*want[d];
            }
        }
        return std::sqrt(wrong/all);
    }
};

static indexmem_rotation rotation_of(int mode, int n_dims, int n_offset = 0, float scale = 1.0f, bool factors = false) {
    indexmem_rotation r;
    r.rotates    = true;
    r.mode       = mode;
    r.n_dims     = n_dims;
    r.n_offset   = n_offset;
    r.freq_base  = 10000.0f;
    r.freq_scale = scale;
    r.beta_fast  = 32.0f;
    r.beta_slow  = 1.0f;
    for (int d = 0; factors && d < n_dims/2; ++d) {
        r.factors.push_back(1.0f + 0.25f*d);
    }
    return r;
}

// every other row, to anywhere in a span; three rows in front never
static void turn_some(fixture & f, indexmem_rotator & rotator, keys & k, const indexmem_rotation & r, std::mt19937 & rng, int64_t span) {
    indexmem_turn what;
    for (int64_t i = 3; i < N_ROWS; ++i) {
        const int64_t to = rng() % 2 ? (int64_t) (rng() % span) : k.position[i];
        what.add(i, (int32_t) (to - k.position[i]));
        k.position[i] = to;
    }
    std::string error;
    CHECK_MSG(rotator.turn(*f.ctx, k.t, HEAD, r, k.rot, what, error), "%s", error.c_str());
}

TEST(keys_come_where_they_should) {
    fixture f;
    indexmem_rotator rotator;
    std::mt19937 rng(0);
    for (const auto & r : { rotation_of(GGML_ROPE_TYPE_NORMAL, 64), rotation_of(GGML_ROPE_TYPE_NEOX, 64), rotation_of(GGML_ROPE_TYPE_NEOX, 16),
                            rotation_of(GGML_ROPE_TYPE_NORMAL, 32, 32), rotation_of(GGML_ROPE_TYPE_NEOX, 64, 0, 0.25f, true) }) {
        keys k(GGML_TYPE_F32);
        for (int i = 0; i < 3; ++i) {
            turn_some(f, rotator, k, r, rng, 100000);
            CHECK_MSG(k.error(r) < 5e-3, "%g", k.error(r)); // angles are in single precision
        }
    }
}

TEST(rows_that_do_not_move_keep_their_bits) {
    fixture f;
    indexmem_rotator rotator;
    std::mt19937 rng(1);
    keys k(GGML_TYPE_Q8_0);
    const size_t size = ggml_row_size(k.t->type, HEAD);
    std::vector<uint8_t> before(3*size), after(3*size);
    rotator.reserve(*f.ctx, k.t, HEAD, rotation_of(GGML_ROPE_TYPE_NEOX, 64), k.rot);
    const size_t bytes = rotator.size_bytes(); // never more
    ggml_backend_tensor_get(k.t, before.data(), 0, before.size());
    turn_some(f, rotator, k, rotation_of(GGML_ROPE_TYPE_NEOX, 64), rng, 4096);
    ggml_backend_tensor_get(k.t, after.data(), 0, after.size());
    CHECK(before == after);
    turn_some(f, rotator, k, rotation_of(GGML_ROPE_TYPE_NEOX, 64), rng, 4096);
    CHECK(rotator.size_bytes() == bytes);
    std::string error;
    CHECK(rotator.turn(*f.ctx, k.t, HEAD, rotation_of(GGML_ROPE_TYPE_NEOX, 64), k.rot, {}, error)); // nothing
    CHECK(rotator.turn(*f.ctx, k.t, HEAD, {}, k.rot, {}, error));
}

// Each turn rounds. After 250 of them, as in a million tokens with a span of 8192, an f16 key is as good as new, and one of
// q8_0 as good as one of q4_0 is from the beginning.
TEST(drift_of_250_rebases) {
    fixture f;
    indexmem_rotator rotator;
    const auto r = rotation_of(GGML_ROPE_TYPE_NEOX, 64);
    for (const auto & [type, most] : { std::pair<ggml_type, double>(GGML_TYPE_F32, 1e-3), { GGML_TYPE_F16, 5e-3 },
                                       { GGML_TYPE_BF16, 4e-2 }, { GGML_TYPE_Q8_0, 8e-2 } }) {
        keys k(type);
        std::mt19937 rng(2);
        const double first = k.error(r);
        for (int i = 0; i < 500; ++i) { // of which each row takes part in every other
            turn_some(f, rotator, k, r, rng, 8192);
        }
        CHECK(k.error(r) < keys(GGML_TYPE_Q4_0).error(r));
        printf("  %s: error of keys %.2g, after 250 turns %.2g\n", ggml_type_name(type), first, k.error(r));
        CHECK_MSG(k.error(r) < most, "%s: %g", ggml_type_name(type), k.error(r));
    }
}
