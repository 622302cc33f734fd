// lanes_avx2.c - the inner loops with AVX2, FMA and F16C: lanes_vector.h in vectors of 8.
#include "lanes.h"

#if defined(__AVX2__)

#include "lanes_vector.h"

static void pack_four(const uint8_t *codes, uint32_t n, uint8_t *out) {
    uint32_t i = 0;
    for (; i + 32 <= n; i += 32) {
        __m256i bytes = _mm256_loadu_si256((const __m256i *)(const void *)(codes + i));
        __m256i pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x1001));
        __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi16(pairs, pairs), 0x08);
        _mm_storeu_si128((__m128i *)(void *)(out + i / 2), _mm256_castsi256_si128(packed));
    }
    bkv_codes_pack(codes + i, n - i, 4, out + i / 2);
}

static void vec_pack(const uint8_t *codes, uint32_t n, uint32_t bits, uint8_t *out) {
    if (bits == 4) {
        pack_four(codes, n, out);
    } else {
        bkv_codes_pack(codes, n, bits, out);
    }
}

const bkv_lanes_t bkv_lanes_avx2 = BKV_LANES_VECTOR(vector);

#endif
