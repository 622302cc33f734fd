// convert.h - internal: elements of every source dtype to and from float, inline so that row loops vectorise.
#ifndef BKV_CONVERT_H
#define BKV_CONVERT_H

#include "summary.h"

#include <string.h>

// What a quantised record can hold: its scales and zeros are float16.
#define BKV_HALF_MAX 65504.0f

static inline float bkv_float_from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

static inline uint32_t bkv_float_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
}

// Half to float without a branch: moving exponent and mantissa into place leaves a value 2^112 too small, subnormals
// included; the multiplication mends that exactly. Infinity and NaN keep their all-ones exponent.
static inline float bkv_half_expand(uint16_t half) {
    uint32_t magnitude = (uint32_t)(half & 0x7fffu) << 13;
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
    float scaled = bkv_float_from_bits(magnitude) * 0x1p112f;
    uint32_t special = (half & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
    return bkv_float_from_bits(bkv_float_to_bits(scaled) | special | sign);
}

static inline float bkv_bf16_expand(uint16_t bits) {
    return bkv_float_from_bits((uint32_t)bits << 16);
}

// `n` elements at `src`, which need only the alignment of a byte, to float.
void bkv_row_to_float(bkv_dtype_t dtype, const void *src, size_t n, float *out);

// `n` little-endian halves at `src` (any alignment) to float.
void bkv_halves_to_float(const uint8_t *src, size_t n, float *out);

// True when one of the `n` elements at `src` is NaN or infinite or, with `half_range`, beyond +-65504.
bool bkv_row_exceeds(bkv_dtype_t dtype, const void *src, size_t n, bool half_range);

static inline uint16_t bkv_load_u16(const uint8_t *at) {
    uint16_t value;
    memcpy(&value, at, sizeof(value));
    return value;
}

static inline void bkv_store_u16(uint8_t *at, uint16_t value) {
    memcpy(at, &value, sizeof(value));
}

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "records are little-endian and are read in place");

#endif
