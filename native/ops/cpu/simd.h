#pragma once

// The vectors of our kernels: fp32 lanes and the ways in which values of a cache become fp32, for AVX-512, AVX2 and NEON, with
// a plain fallback of one lane. The types are those of the instructions, not ggml's GGML_F32_VEC: that one is SVE's where the
// compiler has SVE, of a size that is not known before the program runs. NEON is there as well.
//
// INDEXMEM_PLAIN asks for the fallback whatever the CPU has (the tests do).

#include "kernels.h"
#include "simd-mappings.h"
#include "vec.h"

#include <cmath>
#include <cstddef>
#include <cstdint>

namespace indexmem_simd {

#if defined(INDEXMEM_PLAIN)
#elif defined(__AVX512F__) && defined(__AVX512DQ__)
#    define INDEXMEM_AVX512
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#    define INDEXMEM_AVX2
#elif defined(__ARM_NEON) && defined(__aarch64__)
#    define INDEXMEM_NEON
#endif

#if defined(INDEXMEM_AVX512)

typedef __m512 vec;
constexpr const char * NAME  = "AVX-512";
constexpr int64_t      WIDTH = 16;

constexpr int TILE = 4; // rows that share what is loaded: their accumulators fit into the registers
constexpr int MANY = 6; // the same where nothing is converted

inline vec   zero()                        { return _mm512_setzero_ps(); }
inline vec   set1(float x)                 { return _mm512_set1_ps(x); }
inline vec   load(const float * p)         { return _mm512_loadu_ps(p); }
inline void  store(float * p, vec x)       { _mm512_storeu_ps(p, x); }
inline vec   mul_add(vec acc, vec a, vec b) { return _mm512_fmadd_ps(a, b, acc); }
inline vec   add(vec a, vec b) { return _mm512_add_ps(a, b); }
inline vec   mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
inline vec   exp(vec x)        { return ggml_v_expf(x); }
inline vec   div(vec a, vec b) { return _mm512_div_ps(a, b); }
inline vec   max(vec a, vec b) { return _mm512_max_ps(a, b); }
inline float sum(vec x)        { return _mm512_reduce_add_ps(x); }
inline float max_of(vec x)     { return _mm512_reduce_max_ps(x); }

// -inf where the bias is, whatever x is (NaN included); x + bias elsewhere
inline vec biased(vec x, vec bias) {
    return _mm512_mask_add_ps(bias, _mm512_cmp_ps_mask(bias, set1(-INFINITY), _CMP_NEQ_OQ), x, bias);
}

inline vec load_f16 (const void * p)    { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p)); }
inline vec load_bf16(const void * p)    { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *) p)), 16)); }
inline vec load_i8  (const int8_t * p)  { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) p))); }

// 4-bit values less 8: the low halves of WIDTH bytes, or the high ones
inline vec load_u4(const uint8_t * p, bool high) {
    const __m512i x = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *) p));
    const __m512i y = high ? _mm512_srli_epi32(x, 4) : _mm512_and_si512(x, _mm512_set1_epi32(0xF));
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(y, _mm512_set1_epi32(8)));
}

// the sums of the lanes of four vectors
inline void sums4(const vec * x, float * out) {
    const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
    const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
    const __m512 c = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xEE));
    const __m256 d = _mm256_add_ps(_mm512_castps512_ps256(c), _mm512_extractf32x8_ps(c, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(d), _mm256_extractf128_ps(d, 1)));
}

// the columns of WIDTH vectors as rows, `stride` values apart
inline void transpose(const vec * x, float * dst, int64_t stride) {
    __m512 a[16], b[16];
    for (int i = 0; i < 16; i += 4) { // 4 x 4 within lanes of 128 bits
        const __m512 r0 = x[i], r1 = x[i + 1], r2 = x[i + 2], r3 = x[i + 3];
        const __m512d lo01 = _mm512_castps_pd(_mm512_unpacklo_ps(r0, r1)), hi01 = _mm512_castps_pd(_mm512_unpackhi_ps(r0, r1));
        const __m512d lo23 = _mm512_castps_pd(_mm512_unpacklo_ps(r2, r3)), hi23 = _mm512_castps_pd(_mm512_unpackhi_ps(r2, r3));
        a[i]     = _mm512_castpd_ps(_mm512_unpacklo_pd(lo01, lo23));
        a[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(lo01, lo23));
        a[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(hi01, hi23));
        a[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(hi01, hi23));
    }
    for (int c = 0; c < 4; ++c) { // and those lanes
        b[c]      = _mm512_shuffle_f32x4(a[c],     a[c + 4],  0x88);
        b[c + 4]  = _mm512_shuffle_f32x4(a[c],     a[c + 4],  0xDD);
        b[c + 8]  = _mm512_shuffle_f32x4(a[c + 8], a[c + 12], 0x88);
        b[c + 12] = _mm512_shuffle_f32x4(a[c + 8], a[c + 12], 0xDD);
    }
    for (int c = 0; c < 4; ++c) {
        store(dst + c*stride,        _mm512_shuffle_f32x4(b[c],     b[c + 8],  0x88));
        store(dst + (c + 4)*stride,  _mm512_shuffle_f32x4(b[c + 4], b[c + 12], 0x88));
        store(dst + (c + 8)*stride,  _mm512_shuffle_f32x4(b[c],     b[c + 8],  0xDD));
        store(dst + (c + 12)*stride, _mm512_shuffle_f32x4(b[c + 4], b[c + 12], 0xDD));
    }
}

#elif defined(INDEXMEM_AVX2)

typedef __m256 vec;
constexpr const char * NAME  = "AVX2";
constexpr int64_t      WIDTH = 8;

constexpr int TILE = 2;
constexpr int MANY = 3;

inline vec   zero()                        { return _mm256_setzero_ps(); }
inline vec   set1(float x)                 { return _mm256_set1_ps(x); }
inline vec   load(const float * p)         { return _mm256_loadu_ps(p); }
inline void  store(float * p, vec x)       { _mm256_storeu_ps(p, x); }
inline vec   mul_add(vec acc, vec a, vec b) { return _mm256_fmadd_ps(a, b, acc); }
inline vec   add(vec a, vec b) { return _mm256_add_ps(a, b); }
inline vec   mul(vec a, vec b) { return _mm256_mul_ps(a, b); }
inline vec   exp(vec x)        { return ggml_v_expf(x); }
inline vec   div(vec a, vec b) { return _mm256_div_ps(a, b); }
inline vec   max(vec a, vec b) { return _mm256_max_ps(a, b); }

inline float sum(vec x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_shuffle_ps(y, y, 1)));
}

inline float max_of(vec x) {
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_shuffle_ps(y, y, 1)));
}

inline vec biased(vec x, vec bias) {
    return _mm256_blendv_ps(bias, _mm256_add_ps(x, bias), _mm256_cmp_ps(bias, set1(-INFINITY), _CMP_NEQ_OQ));
}

inline vec load_f16 (const void * p)    { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p)); }
inline vec load_bf16(const void * p)    { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *) p)), 16)); }
inline vec load_i8  (const int8_t * p)  { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *) p))); }

inline vec load_u4(const uint8_t * p, bool high) {
    const __m256i x = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *) p));
    const __m256i y = high ? _mm256_srli_epi32(x, 4) : _mm256_and_si256(x, _mm256_set1_epi32(0xF));
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(y, _mm256_set1_epi32(8)));
}

inline void sums4(const vec * x, float * out) {
    const __m256 y = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1)));
}

inline void transpose(const vec * x, float * dst, int64_t stride) {
    __m256 a[8];
    for (int i = 0; i < 8; i += 4) {
        const __m256 r0 = x[i], r1 = x[i + 1], r2 = x[i + 2], r3 = x[i + 3];
        const __m256d lo01 = _mm256_castps_pd(_mm256_unpacklo_ps(r0, r1)), hi01 = _mm256_castps_pd(_mm256_unpackhi_ps(r0, r1));
        const __m256d lo23 = _mm256_castps_pd(_mm256_unpacklo_ps(r2, r3)), hi23 = _mm256_castps_pd(_mm256_unpackhi_ps(r2, r3));
        a[i]     = _mm256_castpd_ps(_mm256_unpacklo_pd(lo01, lo23));
        a[i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(lo01, lo23));
        a[i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(hi01, hi23));
        a[i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(hi01, hi23));
    }
    for (int c = 0; c < 4; ++c) {
        store(dst + c*stride,       _mm256_permute2f128_ps(a[c], a[c + 4], 0x20));
        store(dst + (c + 4)*stride, _mm256_permute2f128_ps(a[c], a[c + 4], 0x31));
    }
}

#elif defined(INDEXMEM_NEON)

typedef float32x4_t vec;
constexpr const char * NAME  = "NEON";
constexpr int64_t      WIDTH = 4;

constexpr int TILE = 3;
constexpr int MANY = 6;

inline vec   zero()                        { return vdupq_n_f32(0.0f); }
inline vec   set1(float x)                 { return vdupq_n_f32(x); }
inline vec   load(const float * p)         { return vld1q_f32(p); }
inline void  store(float * p, vec x)       { vst1q_f32(p, x); }
inline vec   mul_add(vec acc, vec a, vec b) { return vfmaq_f32(acc, a, b); }
inline vec   add(vec a, vec b) { return vaddq_f32(a, b); }
inline vec   mul(vec a, vec b) { return vmulq_f32(a, b); }
inline vec   div(vec a, vec b) { return vdivq_f32(a, b); }
inline vec   max(vec a, vec b) { return vmaxq_f32(a, b); }
inline float sum(vec x)        { return vaddvq_f32(x); }
inline float max_of(vec x)     { return vmaxvq_f32(x); }

inline vec biased(vec x, vec bias) {
    return vbslq_f32(vceqq_f32(bias, set1(-INFINITY)), bias, vaddq_f32(x, bias));
}

// e^x = 2^n*e^r with |r| <= ln(2)/2: within an ulp, exactly 1 at 0, 0 and infinity beyond the range of floats, NaN at NaN. In
// the place of ggml_v_expf(), which takes vectors of SVE where the compiler has SVE.
inline vec exp(vec x) {
    x = vmaxq_f32(vminq_f32(x, set1(90.0f)), set1(-110.0f)); // the results are infinity and 0 already

    const vec n = vrndnq_f32(mul(x, set1(1.44269504f)));
    const vec r = vfmsq_f32(vfmsq_f32(x, n, set1(0x1.62e4p-1f)), n, set1(0x1.7f7d1cp-20f)); // ln(2) in two parts

    // the polynomial of Cephes' expf
    vec p = set1(1.9875691500e-4f);
    for (const float c : { 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f }) {
        p = vfmaq_f32(set1(c), p, r);
    }
    p = add(vfmaq_f32(r, p, mul(r, r)), set1(1.0f));

    // 2^n in two factors: n reaches beyond the exponents of normal numbers
    const int32x4_t i    = vcvtq_s32_f32(n);
    const int32x4_t half = vshrq_n_s32(i, 1);
    const auto power = [](int32x4_t k) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(k, vdupq_n_s32(127)), 23)); };
    return mul(mul(p, power(half)), power(vsubq_s32(i, half)));
}

inline vec load_f16 (const void * p)    { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *) p))); }
inline vec load_bf16(const void * p)    { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16((const uint16_t *) p), 16)); }

// four bytes as 32-bit lanes
inline uint32x4_t load_u8(const void * p) {
    uint32_t x;
    memcpy(&x, p, sizeof(x));
    return vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(x))));
}

inline vec load_i8(const int8_t * p) {
    return vcvtq_f32_s32(vshrq_n_s32(vshlq_n_s32(vreinterpretq_s32_u32(load_u8(p)), 24), 24));
}

inline vec load_u4(const uint8_t * p, bool high) {
    const uint32x4_t x = load_u8(p);
    const uint32x4_t y = high ? vshrq_n_u32(x, 4) : vandq_u32(x, vdupq_n_u32(0xF));
    return vcvtq_f32_s32(vsubq_s32(vreinterpretq_s32_u32(y), vdupq_n_s32(8)));
}

inline void sums4(const vec * x, float * out) {
    vst1q_f32(out, vpaddq_f32(vpaddq_f32(x[0], x[1]), vpaddq_f32(x[2], x[3])));
}

inline void transpose(const vec * x, float * dst, int64_t stride) {
    const float32x4x2_t a = vtrnq_f32(x[0], x[1]);
    const float32x4x2_t b = vtrnq_f32(x[2], x[3]);
    for (int c = 0; c < 2; ++c) {
        store(dst + c*stride,       vcombine_f32(vget_low_f32 (a.val[c]), vget_low_f32 (b.val[c])));
        store(dst + (c + 2)*stride, vcombine_f32(vget_high_f32(a.val[c]), vget_high_f32(b.val[c])));
    }
}

#else

typedef float vec;
constexpr const char * NAME  = "none";
constexpr int64_t      WIDTH = 1;

constexpr int TILE = 4;
constexpr int MANY = 4;

inline vec   zero()                     { return 0.0f; }
inline vec   set1(float x)              { return x; }
inline vec   load(const float * p)      { return *p; }
inline void  store(float * p, vec x)    { *p = x; }
inline vec   mul_add(vec acc, vec a, vec b) { return acc + a*b; }
inline vec   add(vec a, vec b)          { return a + b; }
inline vec   mul(vec a, vec b)          { return a*b; }
inline vec   div(vec a, vec b)          { return a/b; }
inline vec   exp(vec x)                 { return std::exp(x); }
inline vec   max(vec a, vec b)          { return a > b ? a : b; }
inline float sum(vec x)                 { return x; }
inline float max_of(vec x)              { return x; }
inline vec   biased(vec x, vec bias)    { return bias == -INFINITY ? bias : x + bias; }
inline vec   load_f16 (const void * p)  { return GGML_CPU_FP16_TO_FP32(*(const ggml_fp16_t *) p); }
inline vec   load_bf16(const void * p)  { return GGML_BF16_TO_FP32(*(const ggml_bf16_t *) p); }
inline vec   load_i8  (const int8_t * p) { return (float) *p; }
inline vec   load_u4  (const uint8_t * p, bool high) { return (float) ((high ? *p >> 4 : *p & 0xF) - 8); }

inline void transpose(const vec * x, float * dst, int64_t) { *dst = *x; }

inline void sums4(const vec * x, float * out) {
    for (int i = 0; i < 4; ++i) {
        out[i] = x[i];
    }
}

#endif

// How a row of a cache is read, in blocks of 32 values: scale() of the block that starts at d, then at(): WIDTH values from
// value i of that block on.
constexpr int64_t BLOCK = 32;

struct from_f32 {
    static vec scale(const char *, int64_t)                         { return zero(); }
    static vec at   (const char * row, int64_t d, int64_t i, vec)   { return load((const float *) row + d + i); }
};

struct from_f16 {
    static vec scale(const char *, int64_t)                         { return zero(); }
    static vec at   (const char * row, int64_t d, int64_t i, vec)   { return load_f16((const ggml_fp16_t *) row + d + i); }
};

struct from_bf16 {
    static vec scale(const char *, int64_t)                         { return zero(); }
    static vec at   (const char * row, int64_t d, int64_t i, vec)   { return load_bf16((const ggml_bf16_t *) row + d + i); }
};

struct from_q8_0 {
    static const block_q8_0 & block(const char * row, int64_t d)    { return ((const block_q8_0 *) row)[d/BLOCK]; }

    static vec scale(const char * row, int64_t d)                   { return set1(GGML_CPU_FP16_TO_FP32(block(row, d).d)); }
    static vec at   (const char * row, int64_t d, int64_t i, vec s) { return mul(s, load_i8(block(row, d).qs + i)); }
};

struct from_q4_0 {
    static const block_q4_0 & block(const char * row, int64_t d)    { return ((const block_q4_0 *) row)[d/BLOCK]; }

    static vec scale(const char * row, int64_t d)                   { return set1(GGML_CPU_FP16_TO_FP32(block(row, d).d)); }
    static vec at   (const char * row, int64_t d, int64_t i, vec s) { return mul(s, load_u4(block(row, d).qs + i % 16, i >= 16)); }
};

static_assert(QK8_0 == BLOCK && QK4_0 == BLOCK, "blocks of the quantised types");

} // namespace indexmem_simd
