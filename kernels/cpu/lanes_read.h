// lanes_read.h - internal: rows of a section back to floats, in the vectors that the including file is compiled for. The same
// floats, bit by bit, as record_read.c gives.
#ifndef BKV_LANES_READ_H
#define BKV_LANES_READ_H

#include "convert.h"
#include "record.h"
#include "vec.h"

#ifdef BKV_VEC

// The same shift in each half of a register, or in quarters of 8 lanes.
#define BKV_EIGHT(step) 0, (step), 2 * (step), 3 * (step), 4 * (step), 5 * (step), 6 * (step), 7 * (step)

// Of three-bit groups: which number code i is in, and how far up.
#define BKV_NUMBER(i)      (i) / 5
#define BKV_PLACE(i)       (i) % 5 * 3
#define BKV_FROM(of, i)    of(i), of((i) + 1), of((i) + 2), of((i) + 3), of((i) + 4), of((i) + 5), of((i) + 6), of((i) + 7)
#define BKV_THIRTY_TWO(of) BKV_FROM(of, 0), BKV_FROM(of, 8), BKV_FROM(of, 16), BKV_FROM(of, 24)
static const int32_t three_numbers[32] = {BKV_THIRTY_TWO(BKV_NUMBER)}, three_places[32] = {BKV_THIRTY_TWO(BKV_PLACE)};

// Up to 8 bytes, the rest zero.
static inline uint64_t bytes_load(const uint8_t *at, uint32_t bytes) {
    uint64_t word = 0;
    memcpy(&word, at, bytes);
    return word;
}

// Code 30 (31) of a group, from a bit for each number's top: those of even (odd) numbers.
static inline int top_code(uint32_t tops) {
    return (int)((tops & 1u) | (tops >> 1 & 2u) | (tops >> 2 & 4u));
}

#ifdef __AVX512F__

// Codes [i, i + 16) of a row, i a multiple of 16; where the row ends after 8, the others are anything.
static inline __m512i codes_three(const uint8_t *row, uint32_t dim, uint32_t i) {
    const __m512i seven = _mm512_set1_epi32(7);
    if (i / 32 == dim / 32) { // the rest of a row, a string of bits
        uint64_t word = bytes_load(row + i / 8 * 3, dim - i < 16 ? 3 : 6);
        const __m256i places = _mm256_setr_epi32(BKV_EIGHT(3));
        __m256i low = _mm256_srlv_epi32(_mm256_set1_epi32((int)(word & 0xffffffu)), places);
        __m256i high = _mm256_srlv_epi32(_mm256_set1_epi32((int)(word >> 24)), places);
        return _mm512_and_si512(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1), seven);
    }
    __m128i numbers = _mm_maskz_loadu_epi8(0xfff, row + i / 32 * 12);
    __m512i wide = _mm512_castsi256_si512(_mm256_cvtepu16_epi32(numbers));
    wide = _mm512_permutexvar_epi32(_mm512_loadu_si512(three_numbers + i % 32), wide);
    wide = _mm512_and_si512(_mm512_srlv_epi32(wide, _mm512_loadu_si512(three_places + i % 32)), seven);
    if (i % 32 != 0) {
        uint32_t tops = _mm_movepi16_mask(numbers);
        wide = _mm512_mask_set1_epi32(wide, 1u << 14, top_code(tops));
        wide = _mm512_mask_set1_epi32(wide, 1u << 15, top_code(tops >> 1));
    }
    return wide;
}

static inline vec_t vec_codes(const uint8_t *row, uint32_t dim, uint32_t bits, uint32_t i) {
    uint32_t n = dim - i < 16 ? 8 : 16;
    __m512i codes;
    if (bits == 8) {
        codes = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(vec_mask(n), row + i));
    } else if (bits == 4) { // a byte in 64 bits, its upper half moved into the upper 32
        __m512i bytes = _mm512_cvtepu8_epi64(_mm_cvtsi64_si128((long long)bytes_load(row + i / 2, n / 2)));
        codes = _mm512_and_si512(_mm512_or_si512(bytes, _mm512_slli_epi64(bytes, 28)), _mm512_set1_epi32(15));
    } else if (bits == 3) {
        codes = codes_three(row, dim, i);
    } else {
        const __m512i places = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        codes = _mm512_srlv_epi32(_mm512_set1_epi32((int)bytes_load(row + i / 4, n / 4)), places);
        codes = _mm512_and_si512(codes, _mm512_set1_epi32(3));
    }
    return _mm512_cvtepi32_ps(codes);
}

#else

static inline __m256i codes_three(const uint8_t *row, uint32_t dim, uint32_t i) {
    const __m256i seven = _mm256_set1_epi32(7);
    if (i / 32 == dim / 32) {
        __m256i word = _mm256_set1_epi32((int)bytes_load(row + i / 8 * 3, 3));
        return _mm256_and_si256(_mm256_srlv_epi32(word, _mm256_setr_epi32(BKV_EIGHT(3))), seven);
    }
    const uint8_t *group = row + i / 32 * 12;
    __m128i numbers = _mm_set_epi64x((long long)bytes_load(group + 8, 4), (long long)bytes_load(group, 8));
    const __m256i order = _mm256_loadu_si256((const __m256i *)(const void *)(three_numbers + i % 32));
    const __m256i places = _mm256_loadu_si256((const __m256i *)(const void *)(three_places + i % 32));
    __m256i wide = _mm256_permutevar8x32_epi32(_mm256_cvtepu16_epi32(numbers), order);
    wide = _mm256_and_si256(_mm256_srlv_epi32(wide, places), seven);
    if (i % 32 == 24) {
        uint32_t tops = (uint32_t)_mm_movemask_epi8(_mm_packs_epi16(numbers, numbers));
        wide = _mm256_insert_epi32(wide, top_code(tops), 6);
        wide = _mm256_insert_epi32(wide, top_code(tops >> 1), 7);
    }
    return wide;
}

static inline vec_t vec_codes(const uint8_t *row, uint32_t dim, uint32_t bits, uint32_t i) {
    __m256i codes;
    if (bits == 8) {
        codes = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)bytes_load(row + i, 8)));
    } else if (bits == 3) {
        codes = codes_three(row, dim, i);
    } else {
        __m256i word = _mm256_set1_epi32((int)bytes_load(row + i * bits / 8, bits));
        const __m256i twos = _mm256_setr_epi32(BKV_EIGHT(2)), fours = _mm256_setr_epi32(BKV_EIGHT(4));
        codes = _mm256_and_si256(_mm256_srlv_epi32(word, bits == 2 ? twos : fours), _mm256_set1_epi32(bits == 2 ? 3 : 15));
    }
    return _mm256_cvtepi32_ps(codes);
}

#endif

// Scale in the lower and zero in the upper half of each lane.
static inline void pair_split(vec_int_t pair, vec_t *scale, vec_t *zero) {
    *scale = vec_half_to_float(pair & 0xffff);
    *zero = vec_half_to_float((pair >> 16) & 0xffff);
}

// Rows of one key group: channels outside, so that scales and zeros are read once.
static inline __attribute__((always_inline)) void group_read(const uint8_t *params, const uint8_t *rows, uint32_t count,
                                                             uint32_t dim, const uint32_t bits, float *k) {
    for (uint32_t i = 0; i < dim; i += BKV_VEC) {
        vec_int_t pair = {0};
        vec_t scale, zero;
        memcpy(&pair, params + 4 * (size_t)i, 4 * (size_t)(dim - i < BKV_VEC ? dim - i : BKV_VEC));
        pair_split(pair, &scale, &zero);
        for (uint32_t t = 0; t < count; t++) {
            vec_t code = vec_codes(rows + (size_t)t * (dim * bits / 8), dim, bits, i);
            vec_store_part(k + (size_t)t * dim + i, dim - i, zero + scale * code);
        }
    }
}

static inline __attribute__((always_inline)) void rows_read(const uint8_t *params, const uint8_t *rows, uint32_t count,
                                                            uint32_t dim, const uint32_t bits, float *v) {
    for (uint32_t t = 0; t < count; t++, rows += dim * bits / 8, v += dim) {
        for (uint32_t first = 0; first < dim; first += BKV_VALUE_GROUP_DIMS, params += 4) {
            vec_t scale = vec_set(bkv_half_expand(bkv_load_u16(params))),
                  zero = vec_set(bkv_half_expand(bkv_load_u16(params + 2)));
            for (uint32_t i = first; i < dim && i < first + BKV_VALUE_GROUP_DIMS; i += BKV_VEC) {
                vec_store_part(v + i, dim - i, zero + scale * vec_codes(rows, dim, bits, i));
            }
        }
    }
}

static void vector_read_keys(const bkv_section_view_t *view, uint32_t first, uint32_t count, float *k) {
    const bkv_plane_layout_t *layout = &view->layout;
    uint32_t dim = view->key_dim, step = layout->key_group_tokens;
    while (view->key_bits != BKV_BITS_NATIVE && count > 0) {
        uint32_t group = first / step, left = (group + 1) * step - first, part = count < left ? count : left;
        const uint8_t *params = view->key_plane + layout->key_params + 4ull * group * dim;
        const uint8_t *rows = view->key_plane + layout->key_codes + (size_t)first * layout->key_row;
        switch (view->key_bits) {
        case 2:
            group_read(params, rows, part, dim, 2, k);
            break;
        case 3:
            group_read(params, rows, part, dim, 3, k);
            break;
        case 4:
            group_read(params, rows, part, dim, 4, k);
            break;
        default:
            group_read(params, rows, part, dim, 8, k);
        }
        first += part;
        count -= part;
        k += (size_t)part * dim;
    }
    if (count > 0) {
        vector_to_float(view->dtype, view->key_plane + layout->key_codes + (size_t)first * layout->key_row, (size_t)count * dim,
                        k);
    }
}

static void vector_read_values(const bkv_section_view_t *view, uint32_t first, uint32_t count, float *v) {
    const bkv_plane_layout_t *layout = &view->layout;
    const uint8_t *params = view->value_plane + 4ull * first * layout->value_groups;
    const uint8_t *rows = view->value_plane + layout->value_codes + (size_t)first * layout->value_row;
    switch (view->value_bits) {
    case 2:
        rows_read(params, rows, count, view->value_dim, 2, v);
        return;
    case 3:
        rows_read(params, rows, count, view->value_dim, 3, v);
        return;
    case 4:
        rows_read(params, rows, count, view->value_dim, 4, v);
        return;
    case 8:
        rows_read(params, rows, count, view->value_dim, 8, v);
        return;
    default:
        vector_to_float(view->dtype, rows, (size_t)count * view->value_dim, v);
    }
}

#endif
#endif
