#pragma once

// The vectors of matmul.cpp, for AVX-512 with VNNI and for AVX2: a row of weights in each lane. Without either, and with
// INDEXMEM_PLAIN, there is no INDEXMEM_MATMUL, and llama.cpp's own products remain.

#include "kernels.h"

#if defined(INDEXMEM_PLAIN)
#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#    define INDEXMEM_MATMUL_VNNI
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#    define INDEXMEM_MATMUL_AVX2
#endif

#if defined(INDEXMEM_MATMUL_VNNI) || defined(INDEXMEM_MATMUL_AVX2)
#    define INDEXMEM_MATMUL
#endif

#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
#    pragma GCC diagnostic ignored "-Wmaybe-uninitialized" // in its own header of intrinsics
#endif

namespace indexmem_matmul {

#if defined(INDEXMEM_MATMUL_VNNI)

typedef __m512  vec;
typedef __m512i ivec;
constexpr int ROWS = 16;

inline vec  load   (const float * p)      { return _mm512_load_ps(p); }
inline ivec load   (const uint8_t * p)    { return _mm512_load_si512(p); }
inline vec  set1   (float x)              { return _mm512_set1_ps(x); }
inline ivec set1   (const int8_t * four)  { int32_t x; memcpy(&x, four, sizeof(x)); return _mm512_set1_epi32(x); }
inline vec  mul    (vec a, vec b)         { return _mm512_mul_ps(a, b); }
inline vec  mul_add(vec a, vec b, vec c)  { return _mm512_fmadd_ps(a, b, c); }
inline void store  (uint8_t * p, ivec x)  { _mm512_store_si512(p, x); }
inline ivec low4   (ivec x)               { return _mm512_and_si512(x, _mm512_set1_epi8(0xF)); }
inline ivec high4  (ivec x)               { return low4(_mm512_srli_epi16(x, 4)); }
inline ivec flip   (ivec x)               { return _mm512_xor_si512(x, _mm512_set1_epi8((char) 0x80)); }
inline ivec flip4  (ivec x)               { return _mm512_xor_si512(x, _mm512_set1_epi8((char) 0x88)); }
inline ivec lo32(ivec a, ivec b)          { return _mm512_unpacklo_epi32(a, b); }
inline ivec hi32(ivec a, ivec b)          { return _mm512_unpackhi_epi32(a, b); }
inline ivec lo64(ivec a, ivec b)          { return _mm512_unpacklo_epi64(a, b); }
inline ivec hi64(ivec a, ivec b)          { return _mm512_unpackhi_epi64(a, b); }

// rows i, i + 4, i + 8 and i + 12
template <typename W>
inline ivec load_rows(const W * const * x, int64_t ib, int i0, int i) {
    auto at = [&](int r) { return _mm_loadu_si128((const __m128i *) (x[r][ib].qs + i0)); };
    ivec res = _mm512_castsi128_si512(at(i));
    res = _mm512_inserti32x4(res, at(i + 4), 1);
    res = _mm512_inserti32x4(res, at(i + 8), 2);
    return _mm512_inserti32x4(res, at(i + 12), 3);
}

// 4 bytes of 16 rows that lie in two blocks of 8, from byte i0 on, and the 4 after them
template <typename X8>
inline void deinterleave(const X8 * const * x, int64_t ib, int i0, ivec * four) {
    const ivec even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const ivec a = _mm512_loadu_si512(x[0][ib].qs + i0);
    const ivec b = _mm512_loadu_si512(x[1][ib].qs + i0);
    four[0] = _mm512_permutex2var_epi32(a, even, b);
    four[1] = _mm512_permutex2var_epi32(a, _mm512_add_epi32(even, _mm512_set1_epi32(1)), b);
}

template <typename X8>
inline vec halves_of(const X8 * const * x, int64_t ib) {
    const __m128i a = _mm_loadu_si128((const __m128i *) x[0][ib].d);
    const __m128i b = _mm_loadu_si128((const __m128i *) x[1][ib].d);
    return _mm512_cvtph_ps(_mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1));
}

inline void store(float * p, vec x)       { _mm512_store_ps(p, x); }
inline vec  low_half (ivec x)             { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x)); }
inline vec  high_half(ivec x)             { return low_half(_mm512_srli_epi32(x, 16)); }

// the first ROWS of the floats, or of them n
inline void store_rows(float * p, vec x, int64_t n) {
    _mm512_mask_storeu_ps(p, n >= ROWS ? 0xFFFF : (1u << n) - 1, x);
}

typedef ivec isum;
inline isum no_sum()                      { return _mm512_setzero_si512(); }
inline isum add_products(isum acc, ivec q, ivec y) { return _mm512_dpbusd_epi32(acc, q, y); }
inline vec  to_f32(isum x, int32_t off)   { return _mm512_cvtepi32_ps(_mm512_sub_epi32(x, _mm512_set1_epi32(off))); }

#elif defined(INDEXMEM_MATMUL_AVX2)

typedef __m256  vec;
typedef __m256i ivec;
constexpr int ROWS = 8;

inline vec  load   (const float * p)      { return _mm256_load_ps(p); }
inline ivec load   (const uint8_t * p)    { return _mm256_load_si256((const __m256i *) p); }
inline vec  set1   (float x)              { return _mm256_set1_ps(x); }
inline ivec set1   (const int8_t * four)  { int32_t x; memcpy(&x, four, sizeof(x)); return _mm256_set1_epi32(x); }
inline vec  mul    (vec a, vec b)         { return _mm256_mul_ps(a, b); }
inline vec  mul_add(vec a, vec b, vec c)  { return _mm256_fmadd_ps(a, b, c); }
inline void store  (uint8_t * p, ivec x)  { _mm256_store_si256((__m256i *) p, x); }
inline ivec low4   (ivec x)               { return _mm256_and_si256(x, _mm256_set1_epi8(0xF)); }
inline ivec high4  (ivec x)               { return low4(_mm256_srli_epi16(x, 4)); }
inline ivec flip4  (ivec x)               { return _mm256_xor_si256(x, _mm256_set1_epi8((char) 0x88)); }
inline ivec lo32(ivec a, ivec b)          { return _mm256_unpacklo_epi32(a, b); }
inline ivec hi32(ivec a, ivec b)          { return _mm256_unpackhi_epi32(a, b); }
inline ivec lo64(ivec a, ivec b)          { return _mm256_unpacklo_epi64(a, b); }
inline ivec hi64(ivec a, ivec b)          { return _mm256_unpackhi_epi64(a, b); }

inline void store(float * p, vec x)       { _mm256_store_ps(p, x); }
inline vec  high_half(ivec x) {
    x = _mm256_srli_epi32(x, 16);
    return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)));
}
inline vec  low_half(ivec x)              { return high_half(_mm256_slli_epi32(x, 16)); }

// rows i and i + 4
template <typename W>
inline ivec load_rows(const W * const * x, int64_t ib, int i0, int i) {
    auto at = [&](int r) { return _mm_loadu_si128((const __m128i *) (x[r][ib].qs + i0)); };
    return _mm256_inserti128_si256(_mm256_castsi128_si256(at(i)), at(i + 4), 1);
}

// 4 bytes of 8 rows that lie in a block of 8, from byte i0 on, and the 4 after them
template <typename X8>
inline void deinterleave(const X8 * const * x, int64_t ib, int i0, ivec * four) {
    const __m256 a = _mm256_loadu_ps((const float *) (x[0][ib].qs + i0));
    const __m256 b = _mm256_loadu_ps((const float *) (x[0][ib].qs + i0 + 32));
    four[0] = _mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88)), 0xD8);
    four[1] = _mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xDD)), 0xD8);
}

template <typename X8>
inline vec halves_of(const X8 * const * x, int64_t ib) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) x[0][ib].d));
}

inline void store_rows(float * p, vec x, int64_t n) {
    if (n >= ROWS) {
        _mm256_storeu_ps(p, x);
        return;
    }
    alignas(32) float all[ROWS];
    _mm256_store_ps(all, x);
    memcpy(p, all, n*sizeof(float));
}

// 16 bits are enough for a block: 8 pairs of at most 2*15*127
typedef ivec isum;
inline isum no_sum()                      { return _mm256_setzero_si256(); }
inline isum add_products(isum acc, ivec q, ivec y) { return _mm256_add_epi16(acc, _mm256_maddubs_epi16(q, y)); }
inline vec  to_f32(isum x, int32_t off) {
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_madd_epi16(x, _mm256_set1_epi16(1)), _mm256_set1_epi32(off)));
}

#endif

} // namespace indexmem_matmul
