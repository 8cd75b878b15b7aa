#pragma once

// The two matrix products of attention, for a tile of up to TILE queries and a chunk of keys. What is loaded of a key or a
// value, and converted on the way, serves all queries of the tile. For one set of arguments the order of additions is the
// same whatever type the rows have, so a chunk converted beforehand gives the same bits.
//
// Rows of K, V, q and outputs have a multiple of HALF values, of types in blocks of BLOCK a multiple of that.

#include "simd.h"

#include <type_traits>

namespace indexmem_cpu {

constexpr int64_t HALF = indexmem_simd::BLOCK/2; // a multiple of every WIDTH

constexpr int64_t CHUNK = 128; // keys, a multiple of KEYS and of every WIDTH
constexpr int     KEYS  = 4;  // worked on at once

// rows of any type, at equal distances
struct attend_rows {
    const char * data   = nullptr;
    size_t       stride = 0; // bytes

    const char * row(int64_t i) const { return data + i*stride; }
};

// Rows that will be read soon.
struct attend_ahead {
    attend_rows rows;
    int64_t     n = 0;

    void fetch(int64_t j) const {
#if defined(__GNUC__)
        for (size_t i = 0; j < n && i < rows.stride; i += 64) {
            __builtin_prefetch(rows.row(j) + i);
        }
#else
        (void) j;
#endif
    }
};

// calls f(d, size) for the blocks of a row, size being a constant: the last may be HALF
template <typename F>
inline void attend_blocks(int64_t n_embd, const F & f) {
    int64_t d = 0;
    for (; d + indexmem_simd::BLOCK <= n_embd; d += indexmem_simd::BLOCK) {
        f(d, std::integral_constant<int64_t, indexmem_simd::BLOCK>());
    }
    if (d < n_embd) {
        f(d, std::integral_constant<int64_t, HALF>());
    }
}

// out[r*CHUNK + j] = q[r] . row j, for n rows; what is beyond n, up to a multiple of KEYS, is undefined
template <typename From, int R>
void attend_dots(const float * const * q, const attend_rows & k, int64_t n, int64_t n_embd, float * out, const attend_ahead & next) {
    using namespace indexmem_simd;

    for (int64_t j = 0; j < n; j += KEYS) {
        const char * row[KEYS];
        for (int i = 0; i < KEYS; ++i) {
            row[i] = k.row(std::min(j + i, n - 1));
            next.fetch(j + i);
        }
        vec acc[R][KEYS];
        for (int r = 0; r < R; ++r) {
            for (int i = 0; i < KEYS; ++i) {
                acc[r][i] = zero();
            }
        }
        const auto block = [&](int64_t d, auto size) {
            vec scale[KEYS];
            for (int i = 0; i < KEYS; ++i) {
                scale[i] = From::scale(row[i], d);
            }
            for (int64_t b = 0; b < size; b += WIDTH) {
                vec x[R];
                for (int r = 0; r < R; ++r) {
                    x[r] = load(q[r] + d + b);
                }
                for (int i = 0; i < KEYS; ++i) {
                    const vec y = From::at(row[i], d, b, scale[i]);
                    for (int r = 0; r < R; ++r) {
                        acc[r][i] = mul_add(acc[r][i], x[r], y);
                    }
                }
            }
        };
        attend_blocks(n_embd, block);
        for (int r = 0; r < R; ++r) {
            sums4(acc[r], out + r*CHUNK + j);
        }
    }
}

// columns [d, d + SIZE) of attend_accumulate, SIZE being HALF or a multiple of BLOCK
template <typename From, int R, int64_t SIZE>
void attend_accumulate_columns(const float * p, const attend_rows & v, int64_t n, int64_t d, float * const * out, const attend_ahead & next) {
    using namespace indexmem_simd;

    constexpr int N = (int) (std::min(BLOCK, SIZE)/WIDTH); // vectors of a block
    constexpr int B = (int) ((SIZE + BLOCK - 1)/BLOCK);

    vec acc[R][B*N];
    for (int r = 0; r < R; ++r) {
        for (int i = 0; i < B*N; ++i) {
            acc[r][i] = load(out[r] + d + i*WIDTH);
        }
    }
    for (int64_t j = 0; j < n; ++j) {
        const char * row = v.row(j);
        next.fetch(j);
        vec w[R];
        for (int r = 0; r < R; ++r) {
            w[r] = set1(p[r*CHUNK + j]);
        }
        for (int b = 0; b < B; ++b) {
            const vec scale = From::scale(row, d + b*BLOCK);
            for (int i = 0; i < N; ++i) {
                const vec y = From::at(row, d + b*BLOCK, i*WIDTH, scale);
                for (int r = 0; r < R; ++r) {
                    acc[r][b*N + i] = mul_add(acc[r][b*N + i], w[r], y);
                }
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int i = 0; i < B*N; ++i) {
            store(out[r] + d + i*WIDTH, acc[r][i]);
        }
    }
}

// out[r] += sum over j of p[r*CHUNK + j]*row j, for n rows
template <typename From, int R>
void attend_accumulate(const float * p, const attend_rows & v, int64_t n, int64_t n_embd, float * const * out, const attend_ahead & next) {
    constexpr int B = indexmem_simd::WIDTH >= 16 ? 2 : 1; // blocks held in registers

    int64_t d = 0;
    for (; d + B*indexmem_simd::BLOCK <= n_embd; d += B*indexmem_simd::BLOCK) {
        attend_accumulate_columns<From, R, B*indexmem_simd::BLOCK>(p, v, n, d, out, d == 0 ? next : attend_ahead());
    }
    for (; d + indexmem_simd::BLOCK <= n_embd; d += indexmem_simd::BLOCK) {
        attend_accumulate_columns<From, R, indexmem_simd::BLOCK>(p, v, n, d, out, {});
    }
    if (d < n_embd) {
        attend_accumulate_columns<From, R, HALF>(p, v, n, d, out, {});
    }
}

// logits l[n] become softcap*tanh(scale*l/softcap)
inline void attend_cap(float * l, int64_t n, float scale, float softcap) {
    using namespace indexmem_simd;

    // tanh(x) = 1 - 2/(exp(2x) + 1): exact enough beside a cap, also where exp overflows
    const vec twice = set1(2.0f*scale/softcap);
    for (int64_t i = 0; i < n; i += WIDTH) {
        const vec e = indexmem_simd::exp(mul(load(l + i), twice));
        store(l + i, mul_add(set1(softcap), set1(-2.0f*softcap), div(set1(1.0f), add(e, set1(1.0f)))));
    }
}

typedef void (*attend_dots_t)      (const float * const * q, const attend_rows & k, int64_t n, int64_t n_embd, float * out, const attend_ahead & next);
typedef void (*attend_accumulate_t)(const float * p, const attend_rows & v, int64_t n, int64_t n_embd, float * const * out, const attend_ahead & next);

// [number of rows]
struct attend_kernels {
    attend_dots_t       dots      [5];
    attend_accumulate_t accumulate[5];
};

template <typename From>
const attend_kernels * attend_kernels_from() {
    constexpr int T = indexmem_simd::TILE; // tiles of more rows never occur
    static_assert(T <= 4, "");
    static const attend_kernels res = {
        { nullptr, attend_dots<From, 1>, attend_dots<From, 2>, attend_dots<From, std::min(3, T)>, attend_dots<From, std::min(4, T)> },
        { nullptr, attend_accumulate<From, 1>, attend_accumulate<From, 2>, attend_accumulate<From, std::min(3, T)>, attend_accumulate<From, std::min(4, T)> },
    };
    return &res;
}

// calls `use` with what reads rows of the type, or returns false
template <typename Use>
bool attend_with(ggml_type type, const Use & use) {
    switch (type) {
        case GGML_TYPE_F32:  use(indexmem_simd::from_f32());  return true;
        case GGML_TYPE_F16:  use(indexmem_simd::from_f16());  return true;
        case GGML_TYPE_BF16: use(indexmem_simd::from_bf16()); return true;
        case GGML_TYPE_Q8_0: use(indexmem_simd::from_q8_0()); return true;
        case GGML_TYPE_Q4_0: use(indexmem_simd::from_q4_0()); return true;
        default:             return false;
    }
}

// null if rows of the type have to be converted to fp32 beforehand
inline const attend_kernels * attend_kernels_of(ggml_type type) {
    const attend_kernels * res = nullptr;
    attend_with(type, [&](auto from) { res = attend_kernels_from<decltype(from)>(); });
    return res;
}

} // namespace indexmem_cpu
