// vec.h - internal: vectors of floats as wide as the including file is compiled for, AVX2 or AVX-512, and the instructions that
// the two name differently. Empty for anything else. Arithmetic is the operators'.
#ifndef BKV_VEC_H
#define BKV_VEC_H

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include <immintrin.h>
#include <stdint.h>

#ifdef __AVX512F__
#define BKV_VEC 16
#else
#define BKV_VEC 8
#endif
typedef float vec_t __attribute__((vector_size(BKV_VEC * 4)));
typedef int32_t vec_int_t __attribute__((vector_size(BKV_VEC * 4)));

#ifdef __AVX512F__

static inline vec_t vec_set(float value) {
    return _mm512_set1_ps(value);
}

static inline vec_t vec_load(const float *at) {
    return _mm512_loadu_ps(at);
}

static inline void vec_store(float *at, vec_t value) {
    _mm512_storeu_ps(at, value);
}

static inline __mmask16 vec_mask(uint32_t n) {
    return (__mmask16)(n < BKV_VEC ? (1u << n) - 1u : 0xffffu);
}

// The first n lanes (all, where n is more), those of `other` behind them.
static inline vec_t vec_load_or(const float *at, uint32_t n, vec_t other) {
    return _mm512_mask_loadu_ps(other, vec_mask(n), at);
}

static inline void vec_store_part(float *at, uint32_t n, vec_t value) {
    _mm512_mask_storeu_ps(at, vec_mask(n), value);
}

static inline vec_t vec_fma(vec_t a, vec_t b, vec_t c) {
    return _mm512_fmadd_ps(a, b, c);
}

static inline vec_t vec_min(vec_t a, vec_t b) {
    return _mm512_min_ps(a, b);
}

static inline vec_t vec_max(vec_t a, vec_t b) {
    return _mm512_max_ps(a, b);
}

static inline float vec_sum(vec_t a) {
    return _mm512_reduce_add_ps(a);
}

static inline float vec_least(vec_t a) {
    return _mm512_reduce_min_ps(a);
}

static inline float vec_most(vec_t a) {
    return _mm512_reduce_max_ps(a);
}

static inline vec_t vec_from_bf16(const uint8_t *at) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)at));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

static inline vec_t vec_from_half(const uint8_t *at) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)at));
}

// To float16 and back, as float16 bits in the low half of each lane.
static inline vec_int_t vec_to_half(vec_t a) {
    return (vec_int_t)_mm512_cvtepu16_epi32(_mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}

static inline vec_t vec_half_to_float(vec_int_t a) {
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)a));
}

// a where the mask's lane is above 0, else 0.
static inline vec_t vec_where_positive(vec_t test, vec_t a) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(test, _mm512_setzero_ps(), _CMP_GT_OQ), a);
}

// Cuts lanes in 0..255 down to bytes.
static inline void vec_store_bytes(uint8_t *at, vec_t a) {
    _mm_storeu_si128((__m128i *)(void *)at, _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(a)));
}

// Turns a block of BKV_VEC rows into its columns.
static inline void vec_transpose(vec_t block[BKV_VEC]) {
    __m512d pair[16];
    for (uint32_t i = 0; i < 16; i += 4) { // of four rows, columns 4q..4q+3 of quarter q
        __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(block[i], block[i + 1]));
        __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(block[i], block[i + 1]));
        __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(block[i + 2], block[i + 3]));
        __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(block[i + 2], block[i + 3]));
        pair[i] = _mm512_unpacklo_pd(a, c);
        pair[i + 1] = _mm512_unpackhi_pd(a, c);
        pair[i + 2] = _mm512_unpacklo_pd(b, d);
        pair[i + 3] = _mm512_unpackhi_pd(b, d);
    }
    for (uint32_t c = 0; c < 4; c++) { // quarter q of pair[4g + c]: rows 4g..4g+3 of column 4q + c
        vec_t p0 = _mm512_castpd_ps(pair[c]), p1 = _mm512_castpd_ps(pair[4 + c]);
        vec_t p2 = _mm512_castpd_ps(pair[8 + c]), p3 = _mm512_castpd_ps(pair[12 + c]);
        vec_t even0 = _mm512_shuffle_f32x4(p0, p1, 0x88), odd0 = _mm512_shuffle_f32x4(p0, p1, 0xdd);
        vec_t even1 = _mm512_shuffle_f32x4(p2, p3, 0x88), odd1 = _mm512_shuffle_f32x4(p2, p3, 0xdd);
        block[c] = _mm512_shuffle_f32x4(even0, even1, 0x88);
        block[8 + c] = _mm512_shuffle_f32x4(even0, even1, 0xdd);
        block[4 + c] = _mm512_shuffle_f32x4(odd0, odd1, 0x88);
        block[12 + c] = _mm512_shuffle_f32x4(odd0, odd1, 0xdd);
    }
}

#else // AVX2: dims are multiples of 8, so that every vector is whole

static inline vec_t vec_set(float value) {
    return _mm256_set1_ps(value);
}

static inline vec_t vec_load(const float *at) {
    return _mm256_loadu_ps(at);
}

static inline void vec_store(float *at, vec_t value) {
    _mm256_storeu_ps(at, value);
}

static inline vec_t vec_load_or(const float *at, uint32_t n, vec_t other) {
    (void)n;
    (void)other;
    return vec_load(at);
}

static inline void vec_store_part(float *at, uint32_t n, vec_t value) {
    (void)n;
    vec_store(at, value);
}

static inline vec_t vec_fma(vec_t a, vec_t b, vec_t c) {
    return _mm256_fmadd_ps(a, b, c);
}

static inline vec_t vec_min(vec_t a, vec_t b) {
    return _mm256_min_ps(a, b);
}

static inline vec_t vec_max(vec_t a, vec_t b) {
    return _mm256_max_ps(a, b);
}

static inline float vec_sum(vec_t a) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

static inline float vec_least(vec_t a) {
    __m128 four = _mm_min_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    __m128 two = _mm_min_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_min_ss(two, _mm_movehdup_ps(two)));
}

static inline float vec_most(vec_t a) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

static inline vec_t vec_from_bf16(const uint8_t *at) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)at));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

static inline vec_t vec_from_half(const uint8_t *at) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)at));
}

static inline vec_int_t vec_to_half(vec_t a) {
    return (vec_int_t)_mm256_cvtepu16_epi32(_mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}

// Eight lanes of 0..65535 (0..255) as 16 (8) bit numbers.
static inline __m128i vec_narrow(__m256i a) {
    return _mm_packus_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
}

static inline vec_t vec_half_to_float(vec_int_t a) {
    return _mm256_cvtph_ps(vec_narrow((__m256i)a));
}

static inline vec_t vec_where_positive(vec_t test, vec_t a) {
    return _mm256_and_ps(_mm256_cmp_ps(test, _mm256_setzero_ps(), _CMP_GT_OQ), a);
}

static inline void vec_store_bytes(uint8_t *at, vec_t a) {
    __m128i sixteen = vec_narrow(_mm256_cvttps_epi32(a));
    _mm_storel_epi64((__m128i *)(void *)at, _mm_packus_epi16(sixteen, sixteen));
}

static inline void vec_transpose(vec_t block[BKV_VEC]) {
    vec_t four[8];
    for (uint32_t i = 0; i < 8; i += 4) { // of four rows, columns 4q..4q+3 of half q
        __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(block[i], block[i + 1]));
        __m256d b = _mm256_castps_pd(_mm256_unpackhi_ps(block[i], block[i + 1]));
        __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(block[i + 2], block[i + 3]));
        __m256d d = _mm256_castps_pd(_mm256_unpackhi_ps(block[i + 2], block[i + 3]));
        four[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c));
        four[i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
        four[i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d));
        four[i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
    }
    for (uint32_t c = 0; c < 4; c++) {
        block[c] = _mm256_permute2f128_ps(four[c], four[4 + c], 0x20);
        block[4 + c] = _mm256_permute2f128_ps(four[c], four[4 + c], 0x31);
    }
}

#endif

// The first n lanes, 0 behind them.
static inline vec_t vec_load_part(const float *at, uint32_t n) {
    return vec_load_or(at, n, vec_set(0));
}

// e^x to about 1e-7 of itself for x in [-80, 88]; below, e^-80. Cody and Waite's reduction, and the polynomial of Moshier's
// Cephes library for e^r - 1 - r on |r| <= log(2) / 2.
static inline vec_t vec_exp(vec_t x) {
    const float magic = 0x1.8p23f; // adding it rounds to an integer, which then stands in the low bits
    x = vec_max(x, vec_set(-80.0f));
    vec_t shifted = vec_fma(x, vec_set(1.44269504088896341f), vec_set(magic));
    vec_t n = shifted - vec_set(magic);
    vec_t r = vec_fma(n, vec_set(-0.693359375f), x);
    r = vec_fma(n, vec_set(2.12194440e-4f), r);
    vec_t p = vec_fma(vec_set(1.9875691500e-4f), r, vec_set(1.3981999507e-3f));
    p = vec_fma(p, r, vec_set(8.3334519073e-3f));
    p = vec_fma(p, r, vec_set(4.1665795894e-2f));
    p = vec_fma(p, r, vec_set(1.6666665459e-1f));
    p = vec_fma(p, r, vec_set(5.0000001201e-1f));
    p = vec_fma(p, r * r, r + vec_set(1.0f));
    return (vec_t)((vec_int_t)p + ((vec_int_t)shifted << 23));
}

#endif
#endif
