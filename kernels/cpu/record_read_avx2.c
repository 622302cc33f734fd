// record_read_avx2.c - reading keys and values of a section eight at a time, to the same floats as record_read.c, which decides
// who reads and describes the result.
#include "record.h"

#if defined(__x86_64__)

#include "convert.h"

#include <immintrin.h>

// Codes are cut out of 32-bit lanes by a shift of its own in each lane.
static inline __m256i cut(uint32_t packed, const __m256i shifts, int mask) {
    return _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32((int)packed), shifts), _mm256_set1_epi32(mask));
}

static inline uint32_t load_few(const uint8_t *at, size_t bytes) {
    uint32_t word = 0;
    memcpy(&word, at, bytes);
    return word;
}

// Eight codes of eight lanes.
static inline __m256i eight_plain(const uint8_t *at, const uint32_t bits) {
    if (bits == 8) {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)at));
    }
    const __m256i ramp = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return cut(load_few(at, bits), _mm256_mullo_epi32(ramp, _mm256_set1_epi32((int)bits)), (1 << bits) - 1);
}

// A group of 32 three-bit codes: each lane gets the half that its code is in, and cuts it out.
static inline void group_of_three(const uint8_t *at, __m256i codes[4]) {
    const __m256i none = _mm256_set1_epi32((int)0x80808080u), seven = _mm256_set1_epi32(7);
    uint32_t word[3];
    memcpy(word, at, sizeof(word));
    __m256i halves = _mm256_broadcastsi128_si256(_mm_setr_epi32((int)word[0], (int)word[1], (int)word[2], 0));
    // Code 8 b + j is in half (8 b + j) / 5: its two bytes, the rest 0; and at 3 * ((8 b + j) % 5).
    const __m256i half[4] = {_mm256_setr_epi32(0x0100, 0x0100, 0x0100, 0x0100, 0x0100, 0x0302, 0x0302, 0x0302),
                             _mm256_setr_epi32(0x0302, 0x0302, 0x0504, 0x0504, 0x0504, 0x0504, 0x0504, 0x0706),
                             _mm256_setr_epi32(0x0706, 0x0706, 0x0706, 0x0706, 0x0908, 0x0908, 0x0908, 0x0908),
                             _mm256_setr_epi32(0x0908, 0x0b0a, 0x0b0a, 0x0b0a, 0x0b0a, 0x0b0a, 0, 0)};
    const __m256i shift[4] = {_mm256_setr_epi32(0, 3, 6, 9, 12, 0, 3, 6), _mm256_setr_epi32(9, 12, 0, 3, 6, 9, 12, 0),
                              _mm256_setr_epi32(3, 6, 9, 12, 0, 3, 6, 9), _mm256_setr_epi32(12, 0, 3, 6, 9, 12, 0, 0)};
    const __m256i upper = _mm256_slli_epi32(none, 16);
    for (uint32_t b = 0; b < 4; b++) {
        __m256i lanes = _mm256_shuffle_epi8(halves, _mm256_or_si256(half[b], upper));
        codes[b] = _mm256_and_si256(_mm256_srlv_epi32(lanes, shift[b]), seven);
    }
    uint32_t low = (word[0] >> 15 & 1) | (word[1] >> 14 & 2) | (word[2] >> 13 & 4);
    uint32_t high = word[0] >> 31 | (word[1] >> 30 & 2) | (word[2] >> 29 & 4);
    codes[3] = _mm256_insert_epi32(_mm256_insert_epi32(codes[3], (int)low, 6), (int)high, 7);
}

// Eight codes to floats. The products are rounded before the sums, as record_read.c does it.
static inline void eight_store(__m256i codes, __m256 scale, __m256 zero, float *out) {
    _mm256_storeu_ps(out, _mm256_add_ps(zero, _mm256_mul_ps(scale, _mm256_cvtepi32_ps(codes))));
}

// n codes with a scale and a zero each or, with `shared`, one for all.
static inline void codes_read(const uint8_t *at, uint32_t n, const uint32_t bits, const float *scale, const float *zero,
                              const bool shared, float *out) {
    uint32_t i = 0;
    __m256 one_scale = _mm256_set1_ps(scale[0]), one_zero = _mm256_set1_ps(zero[0]);
    for (; bits == 3 && i + 32 <= n; i += 32, at += 12) {
        __m256i codes[4];
        group_of_three(at, codes);
        for (uint32_t b = 0; b < 4; b++) {
            uint32_t first = i + 8 * b;
            eight_store(codes[b], shared ? one_scale : _mm256_loadu_ps(scale + first),
                        shared ? one_zero : _mm256_loadu_ps(zero + first), out + first);
        }
    }
    for (; i < n; i += 8, at += bits) {
        eight_store(eight_plain(at, bits), shared ? one_scale : _mm256_loadu_ps(scale + i),
                    shared ? one_zero : _mm256_loadu_ps(zero + i), out + i);
    }
}

static inline void codes_read_width(const uint8_t *at, uint32_t n, uint32_t bits, const float *scale, const float *zero,
                                    const bool shared, float *out) {
    switch (bits) {
    case 2:
        codes_read(at, n, 2, scale, zero, shared, out);
        return;
    case 3:
        codes_read(at, n, 3, scale, zero, shared, out);
        return;
    case 4:
        codes_read(at, n, 4, scale, zero, shared, out);
        return;
    default:
        codes_read(at, n, 8, scale, zero, shared, out);
        return;
    }
}

void bkv_avx2_read_keys(const bkv_section_view_t *view, uint32_t first, uint32_t count, float *k) {
    const bkv_plane_layout_t *layout = &view->layout;
    uint32_t dim = view->key_dim, loaded = UINT32_MAX;
    float scale[BKV_MAX_DIM], zero[BKV_MAX_DIM];
    for (uint32_t t = first; t < first + count; t++, k += dim) {
        uint32_t group = t / layout->key_group_tokens;
        if (group != loaded) {
            const uint8_t *params = view->key_plane + layout->key_params + 4ull * group * dim;
            for (uint32_t i = 0; i < dim; i++) {
                scale[i] = bkv_half_expand(bkv_load_u16(params + 4 * (size_t)i));
                zero[i] = bkv_half_expand(bkv_load_u16(params + 4 * (size_t)i + 2));
            }
            loaded = group;
        }
        codes_read_width(view->key_plane + layout->key_codes + (size_t)t * layout->key_row, dim, view->key_bits, scale, zero,
                         false, k);
    }
}

void bkv_avx2_read_values(const bkv_section_view_t *view, uint32_t first, uint32_t count, float *v) {
    const bkv_plane_layout_t *layout = &view->layout;
    uint32_t dim = view->value_dim, bits = view->value_bits;
    for (uint32_t t = first; t < first + count; t++, v += dim) {
        const uint8_t *params = view->value_plane + 4ull * t * layout->value_groups;
        const uint8_t *row = view->value_plane + layout->value_codes + (size_t)t * layout->value_row;
        for (uint32_t start = 0; start < dim; start += BKV_VALUE_GROUP_DIMS, params += 4) {
            uint32_t n = dim - start < BKV_VALUE_GROUP_DIMS ? dim - start : BKV_VALUE_GROUP_DIMS;
            float scale = bkv_half_expand(bkv_load_u16(params)), zero = bkv_half_expand(bkv_load_u16(params + 2));
            codes_read_width(row + (size_t)start * bits / 8, n, bits, &scale, &zero, true, v + start);
        }
    }
}

#endif
