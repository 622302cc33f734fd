// attend_float.h - internal: the inner loops of attention over floats, for whichever vectors the including file is compiled
// for: AVX-512 or AVX2 with FMA. Rows are padded with zeros to whole vectors.
#ifndef BKV_ATTEND_FLOAT_H
#define BKV_ATTEND_FLOAT_H
#if defined(__AVX2__) && defined(__FMA__) // empty for anything else

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __AVX512F__
#define BKV_WIDE 16
#else
#define BKV_WIDE 8
#endif

typedef float bkv_wide_t __attribute__((vector_size(BKV_WIDE * sizeof(float))));
typedef float bkv_wide_loose_t __attribute__((vector_size(BKV_WIDE * sizeof(float)), aligned(4), may_alias));
typedef uint32_t bkv_wide_bits_t __attribute__((vector_size(BKV_WIDE * sizeof(uint32_t))));

static inline uint32_t bkv_wide_pad(uint32_t n) {
    return (n + BKV_WIDE - 1) / BKV_WIDE * BKV_WIDE;
}

static inline bkv_wide_t bkv_wide_load(const float *at) {
    return *(const bkv_wide_loose_t *)at;
}

static inline void bkv_wide_store(float *at, bkv_wide_t value) {
    *(bkv_wide_loose_t *)at = value;
}

static inline bkv_wide_t bkv_wide_set(float value) {
    return value - (bkv_wide_t){0};
}

static inline bkv_wide_t bkv_wide_fma(bkv_wide_t a, bkv_wide_t b, bkv_wide_t c) {
#ifdef __AVX512F__
    return (bkv_wide_t)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    return (bkv_wide_t)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#endif
}

static inline bkv_wide_t bkv_wide_max(bkv_wide_t a, bkv_wide_t b) {
#ifdef __AVX512F__
    return (bkv_wide_t)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return (bkv_wide_t)_mm256_max_ps((__m256)a, (__m256)b);
#endif
}

static inline float bkv_wide_sum(bkv_wide_t v) {
#ifdef __AVX512F__
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
#else
    __m256 half = (__m256)v;
#endif
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

// e^x for x <= 0, to 2e-7 of itself; 0 for x below this, so that what is multiplied by it does not fall below normal floats,
// which are slow.
#define BKV_LEAST_EXPONENT -60.0f

static inline bkv_wide_t bkv_wide_exp(bkv_wide_t x) {
#ifdef __AVX512F__
    __m512 t = _mm512_mul_ps((__m512)x, _mm512_set1_ps(0x1.715476p+0f));
    __mmask16 some = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(BKV_LEAST_EXPONENT), _CMP_GT_OQ);
    __m512 n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_sub_ps(t, n);
    // 2^f for |f| <= 1/2: Taylor
    __m512 y = _mm512_fmadd_ps(f, _mm512_set1_ps(0x1.430912p-13f), _mm512_set1_ps(0x1.5d87fep-10f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0x1.3b2ab6p-7f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0x1.c6b08ep-5f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0x1.ebfbep-3f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0x1.62e43p-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0f));
    return (bkv_wide_t)_mm512_maskz_scalef_ps(some, y, n);
#else
    bkv_wide_bits_t some = (bkv_wide_bits_t)(x > BKV_LEAST_EXPONENT); // false for NaN, too
    x = (bkv_wide_t)((bkv_wide_bits_t)x & some);
    const bkv_wide_t rounder = bkv_wide_set(0x1.8p23f); // adding it rounds to an integer, which is then in the low bits
    bkv_wide_t shifted = bkv_wide_fma(x, bkv_wide_set(0x1.715476p+0f), rounder);
    bkv_wide_t n = shifted - rounder;
    bkv_wide_t r = bkv_wide_fma(n, bkv_wide_set(-0x1.62e4p-1f), x); // log 2 in two parts, the first of which is exact
    r = bkv_wide_fma(n, bkv_wide_set(-0x1.7f7d1cp-20f), r);
    bkv_wide_t y = bkv_wide_fma(r, bkv_wide_set(0x1.6c16c2p-10f), bkv_wide_set(0x1.111112p-7f)); // Taylor: |r| <= log(2) / 2
    y = bkv_wide_fma(y, r, bkv_wide_set(0x1.555556p-5f));
    y = bkv_wide_fma(y, r, bkv_wide_set(0x1.555556p-3f));
    y = bkv_wide_fma(y, r, bkv_wide_set(0.5f));
    y = bkv_wide_fma(y, r, bkv_wide_set(1.0f));
    y = bkv_wide_fma(y, r, bkv_wide_set(1.0f));
    bkv_wide_bits_t power = ((bkv_wide_bits_t)shifted << 23) + (bkv_wide_bits_t)y; // the exponent goes up by n
    return (bkv_wide_t)(power & some);
#endif
}

// logits[r][t] = scale * <q_r, k_t> + logw[t] for r < rows, t < count. q, k: rows of `row` floats, whole vectors.
static inline void bkv_float_scores(const float *q, uint32_t rows, const float *k, uint32_t count, uint32_t row, float scale,
                                    const float *logw, float *logits, size_t stride) {
    for (uint32_t t = 0; t < count; t += 4) {
        // The last four may overlap those before; where there are fewer than four, the last stands in for the missing.
        uint32_t last = count - 1;
        const uint32_t token[4] = {t, t + 1 < count ? t + 1 : last, t + 2 < count ? t + 2 : last, t + 3 < count ? t + 3 : last};
        for (uint32_t r = 0; r < rows; r += 2) {
            const float *q0 = q + (size_t)r * row, *q1 = r + 1 < rows ? q0 + row : q0;
            bkv_wide_t sum[8] = {{0}};
            for (uint32_t i = 0; i < row; i += BKV_WIDE) {
                bkv_wide_t a = bkv_wide_load(q0 + i), b = bkv_wide_load(q1 + i);
                for (uint32_t j = 0; j < 4; j++) {
                    bkv_wide_t key = bkv_wide_load(k + (size_t)token[j] * row + i);
                    sum[j] = bkv_wide_fma(a, key, sum[j]);
                    sum[4 + j] = bkv_wide_fma(b, key, sum[4 + j]);
                }
            }
            for (uint32_t j = 0; j < 4; j++) {
                logits[r * stride + token[j]] = scale * bkv_wide_sum(sum[j]) + logw[token[j]];
                if (r + 1 < rows) {
                    logits[(r + 1) * stride + token[j]] = scale * bkv_wide_sum(sum[4 + j]) + logw[token[j]];
                }
            }
        }
    }
}

// out[r] += sum over t of p[r][t] * v_t, for r < rows, t < count. v, out: rows of `row` floats, whole vectors.
static inline void bkv_float_mix(const float *p, size_t stride, uint32_t rows, const float *v, uint32_t count, uint32_t row,
                                 float *out) {
    for (uint32_t r = 0; r < rows; r += 4) {
        uint32_t live = rows - r < 4 ? rows - r : 4;
        const float *weight[4];
        float *sum[4];
        for (uint32_t j = 0; j < 4; j++) { // the last row stands in for the missing, and is written last
            uint32_t at = r + (j < live ? j : live - 1);
            weight[j] = p + at * stride;
            sum[j] = out + (size_t)at * row;
        }
        for (uint32_t i = 0; i < row; i += BKV_WIDE) {
            bkv_wide_t acc[4];
            for (uint32_t j = 0; j < 4; j++) {
                acc[j] = bkv_wide_load(sum[j] + i);
            }
            for (uint32_t t = 0; t < count; t++) {
                bkv_wide_t value = bkv_wide_load(v + (size_t)t * row + i);
                for (uint32_t j = 0; j < 4; j++) {
                    acc[j] = bkv_wide_fma(bkv_wide_set(weight[j][t]), value, acc[j]);
                }
            }
            for (uint32_t j = 0; j < 4; j++) {
                bkv_wide_store(sum[j] + i, acc[j]);
            }
        }
    }
}

// logits[0, count) become exp(logit - top); returns their sum. Whole vectors: logits beyond count must be -INFINITY.
static inline float bkv_float_exp(float *logits, uint32_t count, float top) {
    bkv_wide_t sum = {0};
    for (uint32_t t = 0; t < count; t += BKV_WIDE) {
        bkv_wide_t p = bkv_wide_exp(bkv_wide_load(logits + t) - top);
        bkv_wide_store(logits + t, p);
        sum += p;
    }
    return bkv_wide_sum(sum);
}

// The largest of whole vectors of logits.
static inline float bkv_float_top(const float *logits, uint32_t count) {
    bkv_wide_t top = bkv_wide_load(logits);
    for (uint32_t t = BKV_WIDE; t < count; t += BKV_WIDE) {
        top = bkv_wide_max(top, bkv_wide_load(logits + t));
    }
#ifdef __AVX512F__
    return _mm512_reduce_max_ps((__m512)top);
#else
    __m128 most = _mm_max_ps(_mm256_castps256_ps128((__m256)top), _mm256_extractf128_ps((__m256)top, 1));
    most = _mm_max_ps(most, _mm_movehl_ps(most, most));
    return _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
#endif
}

#endif
#endif
