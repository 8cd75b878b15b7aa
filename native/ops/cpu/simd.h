#pragma once

// The few vector operations of our kernels, in terms of ggml's own mapping (AVX2, AVX-512, NEON, ...), with a plain
// fallback. Tiles of R rows keep a register each, so that a key or value loaded once serves all of them.

#include "simd-mappings.h"

#include <cstddef>
#include <cstdint>

namespace indexmem_simd {

#if defined(GGML_SIMD) && defined(GGML_F32_EPR) && !defined(__ARM_FEATURE_SVE)

typedef GGML_F32_VEC vec;
constexpr int64_t WIDTH = GGML_F32_EPR;

inline vec  zero()                     { return GGML_F32_VEC_ZERO; }
inline vec  set1(float x)              { return GGML_F32_VEC_SET1(x); }
inline vec  load(const float * p)      { return GGML_F32_VEC_LOAD(p); }
inline void store(float * p, vec x)    { GGML_F32_VEC_STORE(p, x); }
inline vec  fma(vec acc, vec a, vec b) { return GGML_F32_VEC_FMA(acc, a, b); }

inline float sum(vec x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(x);
#elif defined(__AVX__)
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_shuffle_ps(y, y, 1)));
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return vaddvq_f32(x);
#else
    float lanes[WIDTH];
    store(lanes, x);
    float res = 0.0f;
    for (int64_t i = 0; i < WIDTH; ++i) {
        res += lanes[i];
    }
    return res;
#endif
}

#else

typedef float vec;
constexpr int64_t WIDTH = 1;

inline vec   zero()                     { return 0.0f; }
inline vec   set1(float x)              { return x; }
inline vec   load(const float * p)      { return *p; }
inline void  store(float * p, vec x)    { *p = x; }
inline vec   fma(vec acc, vec a, vec b) { return acc + a*b; }
inline float sum(vec x)                 { return x; }

#endif

// Memory that will be read soon: row j of it is fetched while row j of something else is worked on.
struct ahead {
    const char * rows  = nullptr; // null: nothing
    size_t       bytes = 0;       // of a row, rows being contiguous

    void fetch(int64_t j) const {
#if defined(__GNUC__)
        for (size_t i = 0; rows && i < bytes; i += 64) {
            __builtin_prefetch(rows + j*bytes + i);
        }
#else
        (void) j;
#endif
    }
};

// out[r*ld + j] = a[r] . b[j]   for R rows a and n rows b of length D, contiguous
template <int R>
void dots(const float * const * a, const float * b, int64_t n, int64_t D, float * out, int64_t ld, ahead next) {
    const int64_t D0 = D/WIDTH*WIDTH;
    for (int64_t j = 0; j < n; ++j) {
        const float * row = b + j*D;
        next.fetch(j);
        vec acc[R];
        for (int r = 0; r < R; ++r) {
            acc[r] = zero();
        }
        for (int64_t d = 0; d < D0; d += WIDTH) {
            const vec x = load(row + d);
            for (int r = 0; r < R; ++r) {
                acc[r] = fma(acc[r], x, load(a[r] + d));
            }
        }
        for (int r = 0; r < R; ++r) {
            float res = sum(acc[r]);
            for (int64_t d = D0; d < D; ++d) {
                res += row[d]*a[r][d];
            }
            out[r*ld + j] = res;
        }
    }
}

// out[r] += sum over j of p[r*ld + j]*b[j]   for R rows of out and n rows b of length D, contiguous
template <int R>
void accumulate(const float * p, int64_t ld, const float * b, int64_t n, int64_t D, float * const * out, ahead next) {
    constexpr int NV = 4; // vectors of a row held in registers at once

    int64_t d = 0;
    for (; d + NV*WIDTH <= D; d += NV*WIDTH) {
        vec acc[R][NV];
        for (int r = 0; r < R; ++r) {
            for (int v = 0; v < NV; ++v) {
                acc[r][v] = load(out[r] + d + v*WIDTH);
            }
        }
        for (int64_t j = 0; j < n; ++j) {
            const float * row = b + j*D + d;
            if (d == 0) {
                next.fetch(j);
            }
            vec w[R];
            for (int r = 0; r < R; ++r) {
                w[r] = set1(p[r*ld + j]);
            }
            for (int v = 0; v < NV; ++v) {
                const vec x = load(row + v*WIDTH);
                for (int r = 0; r < R; ++r) {
                    acc[r][v] = fma(acc[r][v], w[r], x);
                }
            }
        }
        for (int r = 0; r < R; ++r) {
            for (int v = 0; v < NV; ++v) {
                store(out[r] + d + v*WIDTH, acc[r][v]);
            }
        }
    }
    for (; d < D; ++d) {
        for (int r = 0; r < R; ++r) {
            float res = out[r][d];
            for (int64_t j = 0; j < n; ++j) {
                res += p[r*ld + j]*b[j*D + d];
            }
            out[r][d] = res;
        }
    }
}

} // namespace indexmem_simd
