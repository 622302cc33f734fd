// lanes_avx512.c - the inner loops with AVX-512: lanes_vector.h in vectors of 16, and codes packed by multiplying bytes. The backend
// `amx` is the same but for matrices (lanes_amx.c).
#include "lanes.h"

#if defined(__AVX512VBMI__)

#include "lanes_amx.h"
#include "lanes_vector.h"

#include <assert.h>

static void pack_two(const uint8_t *codes, uint32_t n, uint8_t *out) {
    for (uint32_t i = 0; i < n; i += 64) {
        __mmask64 there = n - i < 64 ? ((uint64_t)1 << (n - i)) - 1 : ~(uint64_t)0;
        __m512i bytes = _mm512_maskz_loadu_epi8(there, codes + i);
        __m512i pairs = _mm512_maddubs_epi16(bytes, _mm512_set1_epi16(0x0401));
        __m512i fours = _mm512_madd_epi16(pairs, _mm512_set1_epi32(0x00100001));
        uint32_t left = n - i < 64 ? (n - i) / 4 : 16;
        _mm_mask_storeu_epi8(out + i / 4, (__mmask16)((1u << left) - 1u), _mm512_cvtepi32_epi8(fours));
    }
}

static void pack_four(const uint8_t *codes, uint32_t n, uint8_t *out) {
    for (uint32_t i = 0; i < n; i += 64) {
        __mmask64 there = n - i < 64 ? ((uint64_t)1 << (n - i)) - 1 : ~(uint64_t)0;
        __m512i bytes = _mm512_maskz_loadu_epi8(there, codes + i);
        __m512i pairs = _mm512_maddubs_epi16(bytes, _mm512_set1_epi16(0x1001));
        __mmask32 half = n - i < 64 ? ((__mmask32)1 << (n - i) / 2) - 1 : ~(__mmask32)0;
        _mm256_mask_storeu_epi8(out + i / 2, half, _mm512_cvtepi16_epi8(pairs));
    }
}

// A group of 32 three-bit codes is six numbers of 16 bits (summary.h), each made in 64 bits: number h takes codes 5 h .. 5 h + 4
// and bit h / 2 of code 30 + h % 2, multiplied to their places: by 1 and 8 in a pair, then pairs by 1, 64 and 4096.
#define NUMBERS(of)  of(0), of(1), of(2), of(3), of(4), of(5)
#define CODES(h)     5 * (h), 5 * (h) + 1, 5 * (h) + 2, 5 * (h) + 3, 5 * (h) + 4, 30 + (h) % 2, 0, 0
#define USED_BITS(h) 7, 7, 7, 7, 7, 1 << (h) / 2, 0, 0
#define FACTORS(h)   1, 8, 1, 8, 1, 8 >> (h) / 2, 0, 0
static const uint8_t three_codes[64] = {NUMBERS(CODES)}, three_bits[64] = {NUMBERS(USED_BITS)};
static const uint8_t three_factors[64] = {NUMBERS(FACTORS)};

static void pack_three(const uint8_t *codes, uint32_t n, uint8_t *out) {
    const __m512i order = _mm512_loadu_si512(three_codes), bits = _mm512_loadu_si512(three_bits);
    const __m512i factors = _mm512_loadu_si512(three_factors), pairs = _mm512_set1_epi64(0x0000100000400001);
    uint32_t i = 0;
    for (; i + 32 <= n; i += 32, out += 12) {
        __m512i bytes = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(const void *)(codes + i)));
        bytes = _mm512_and_si512(_mm512_permutexvar_epi8(order, bytes), bits);
        __m512i number = _mm512_madd_epi16(_mm512_maddubs_epi16(bytes, factors), pairs);
        number = _mm512_or_si512(number, _mm512_srli_epi64(number, 32));
        _mm_mask_storeu_epi16(out, 0x3f, _mm512_cvtepi64_epi16(number));
    }
    bkv_codes_pack(codes + i, n - i, 3, out);
}

static void vec_pack(const uint8_t *codes, uint32_t n, uint32_t bits, uint8_t *out) {
    switch (bits) {
    case 2:
        pack_two(codes, n, out);
        return;
    case 3:
        pack_three(codes, n, out);
        return;
    case 4:
        pack_four(codes, n, out);
        return;
    case 8:
        memcpy(out, codes, n);
        return;
    default:
        assert(!"bits");
    }
}

const bkv_lanes_t bkv_lanes_avx512 = BKV_LANES_VECTOR(vector);

const bkv_lanes_t bkv_lanes_amx = BKV_LANES_VECTOR(bkv_amx);

#endif
