// The vectors of simd.h, lane by lane, as this program is compiled: with the options of ggml-cpu, or of another build of our
// kernels (builds.cmake).

#include "test.h"

#include "attend-lanes.h"
#include "graph.h"
#include "simd.h"
#include "vectors.h"

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

using namespace indexmem_simd;

static float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

static bool same(float a, float b) {
    return memcmp(&a, &b, sizeof(a)) == 0 || (std::isnan(a) && std::isnan(b));
}

TEST(the_cpu_backend_has_the_same_vectors) {
    CHECK_MSG(cpu_vectors() == NAME, "%s and %s", cpu_vectors().c_str(), NAME);
    CHECK((WIDTH == 1) == (std::string(NAME) == "none"));
}

// in units in the last place: ggml says at most 1.95 of its own, which for AVX-512 is a little more; ours is NEON's
static double exp_tolerance() {
    const std::string name = NAME;
    return name == "AVX-512" ? 2.2 : name == "NEON" ? 1.0 : 2.0;
}

static void check_exp(const std::vector<float> & x) {
    const double tolerance = exp_tolerance();
    for (size_t i = 0; i < x.size(); i += WIDTH) {
        float found[WIDTH];
        store(found, indexmem_simd::exp(load(x.data() + i)));
        for (int64_t l = 0; l < WIDTH; ++l) {
            const double exact = std::exp((double) x[i + l]);
            const float  near  = (float) exact;
            if (same(near, found[l]) || (x[i + l] > 88.37f && std::isinf(found[l]))) { // ggml's is infinite a little early
                continue;
            }
            const double ulp = (double) std::nextafter(near, INFINITY) - near;
            CHECK_MSG(std::abs(found[l] - exact) <= tolerance*ulp, "exp(%a) is %a, and not %a", x[i + l], found[l], near);
        }
    }
}

TEST(exp_is_right_to_a_unit_or_two_in_the_last_place) {
    std::vector<float> x = { 0.0f, -0.0f, INFINITY, -INFINITY, NAN, -NAN, 1.0f, -1.0f, 88.72284f, 88.8f, 90.5f, 128.0f, 3e38f,
        -87.33655f, -87.4f, -103.0f, -103.97f, -104.5f, -150.0f, -3e38f, 1e-45f, -1e-45f, 1e-38f, 0.34657359f, -0.34657359f };
    for (uint64_t bits = 0; bits < 1ull << 32; bits += 4099) { // of every kind and size
        x.push_back(float_of((uint32_t) bits));
    }
    for (float y = -104.0f; y < 88.0f; y += 0.00123f) { // and where weights are
        x.push_back(y);
    }
    x.resize(x.size()/WIDTH*WIDTH);
    check_exp(x);

    std::vector<float> one(WIDTH, 0.0f);
    store(one.data(), indexmem_simd::exp(zero()));
    for (float y : one) {
        CHECK(y == 1.0f);
    }
}

TEST(halves_are_converted_exactly) {
    for (uint32_t bits = 0; bits < 1 << 16; bits += WIDTH) {
        uint16_t halves[WIDTH];
        float    f16[WIDTH], bf16[WIDTH];
        for (int64_t l = 0; l < WIDTH; ++l) {
            halves[l] = (uint16_t) (bits + l);
        }
        store(f16,  load_f16 (halves));
        store(bf16, load_bf16(halves));
        for (int64_t l = 0; l < WIDTH; ++l) {
            CHECK(same(f16 [l], ggml_fp16_to_fp32(halves[l])));
            CHECK(same(bf16[l], float_of((uint32_t) halves[l] << 16)));
        }
    }
}

TEST(quants_are_converted_exactly) {
    for (int bits = 0; bits < 256; bits += WIDTH) {
        uint8_t bytes[WIDTH];
        float   i8[WIDTH], low[WIDTH], high[WIDTH];
        for (int64_t l = 0; l < WIDTH; ++l) {
            bytes[l] = (uint8_t) (bits + l);
        }
        store(i8,   load_i8((const int8_t *) bytes));
        store(low,  load_u4(bytes, false));
        store(high, load_u4(bytes, true));
        for (int64_t l = 0; l < WIDTH; ++l) {
            CHECK(i8  [l] == (float) (int8_t) bytes[l]);
            CHECK(low [l] == (float) ((bytes[l] & 0xF) - 8));
            CHECK(high[l] == (float) ((bytes[l] >> 4)  - 8));
        }
    }
}

TEST(arithmetic_and_sums) {
    std::mt19937 rng(5);
    const auto random = [&] {
        std::vector<float> x(WIDTH);
        for (auto & y : x) {
            y = (float) ((int) (rng() % 2001) - 1000); // sums and products are exact in any order
        }
        return x;
    };
    for (int n = 0; n < 100; ++n) {
        const auto a = random(), b = random(), c = random();
        const vec  x = load(a.data()), y = load(b.data()), z = load(c.data());

        float found[5][WIDTH];
        store(found[0], add(x, y));
        store(found[1], mul(x, y));
        store(found[2], div(x, set1(8.0f)));
        store(found[3], indexmem_simd::max(x, y));
        store(found[4], mul_add(z, x, y));
        float total = 0.0f, largest = -INFINITY;
        for (int64_t l = 0; l < WIDTH; ++l) {
            CHECK(found[0][l] == a[l] + b[l]);
            CHECK(found[1][l] == a[l]*b[l]);
            CHECK(found[2][l] == a[l]/8.0f);
            CHECK(found[3][l] == std::max(a[l], b[l]));
            CHECK(found[4][l] == c[l] + a[l]*b[l]);
            total  += a[l];
            largest = std::max(largest, a[l]);
        }
        CHECK(sum(x) == total);
        CHECK(max_of(x) == largest);

        const vec four[4] = { x, y, z, zero() };
        float     sums[4];
        sums4(four, sums);
        CHECK(sums[0] == sum(x) && sums[1] == sum(y) && sums[2] == sum(z) && sums[3] == 0.0f);
    }
}

TEST(columns_become_rows) {
    constexpr int64_t STRIDE = WIDTH + 3;

    vec   rows[WIDTH];
    float columns[WIDTH*STRIDE];
    for (int64_t r = 0; r < WIDTH; ++r) {
        float x[WIDTH];
        for (int64_t l = 0; l < WIDTH; ++l) {
            x[l] = (float) (100*r + l);
        }
        rows[r] = load(x);
    }
    transpose(rows, columns, STRIDE);
    for (int64_t r = 0; r < WIDTH; ++r) {
        for (int64_t l = 0; l < WIDTH; ++l) {
            CHECK(columns[l*STRIDE + r] == (float) (100*r + l));
        }
    }
}

TEST(a_bias_of_minus_infinity_hides_everything) {
    for (const float x : { 0.0f, 3.0f, INFINITY, -INFINITY, NAN }) {
        for (const float bias : { 0.0f, 2.0f, -INFINITY }) {
            float found[WIDTH];
            store(found, biased(set1(x), set1(bias)));
            for (float y : found) {
                CHECK(same(y, bias == -INFINITY ? bias : x + bias));
            }
        }
    }
}

// The products of attend-lanes.h, each against a sum in double. Rows behind the keys hold NaN, which nobody may look at.
template <typename From>
static void check_lanes(ggml_type type, int64_t n, int64_t n_embd) {
    using namespace indexmem_cpu;

    std::mt19937 rng(11);
    std::normal_distribution<float> normal;
    std::vector<float> values(n*n_embd), columns(n_embd*LANES), found((n + 1)*LANES, -7.0f);
    for (auto * x : { &values, &columns }) {
        for (auto & y : *x) {
            y = normal(rng);
        }
    }
    auto       keys  = to_type(type, values, n_embd);
    const auto exact = from_type(type, keys, n*n_embd);
    keys.resize(keys.size() + LANE_KEYS*ggml_row_size(type, n_embd), 0xFF);

    attend_dots_lanes<From>({ (const char *) keys.data(), ggml_row_size(type, n_embd) }, n, n_embd, columns.data(), found.data(), {});

    for (int64_t j = 0; j < n; ++j) {
        for (int64_t l = 0; l < LANES; ++l) {
            double sum = 0.0, size = 0.0;
            for (int64_t d = 0; d < n_embd; ++d) {
                const double x = (double) exact[j*n_embd + d]*columns[d*LANES + l];
                sum  += x;
                size += std::abs(x);
            }
            CHECK_MSG(std::abs(found[j*LANES + l] - sum) <= 1e-6*size, "%s, key %d of %d, lane %d: %g, expected %g", ggml_type_name(type),
                    (int) j, (int) n, (int) l, found[j*LANES + l], sum);
        }
    }
    for (int64_t l = 0; l < LANES; ++l) {
        CHECK(found[n*LANES + l] == -7.0f); // nothing is written behind them
    }
}

TEST(products_with_a_query_in_each_lane) {
    for (int64_t n : { 1, 5, 8, 127, 128 }) {
        for (int64_t n_embd : { 32, 64, 96 }) {
            check_lanes<from_f32> (GGML_TYPE_F32,  n, n_embd);
            check_lanes<from_f16> (GGML_TYPE_F16,  n, n_embd);
            check_lanes<from_bf16>(GGML_TYPE_BF16, n, n_embd);
            check_lanes<from_q8_0>(GGML_TYPE_Q8_0, n, n_embd);
            check_lanes<from_q4_0>(GGML_TYPE_Q4_0, n, n_embd);
        }
        check_lanes<from_f16>(GGML_TYPE_F16, n, 48); // half a block at the end
    }
}
