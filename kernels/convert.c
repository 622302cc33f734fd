// convert.c - float16 and bfloat16 to and from float, whole rows of a dtype to float, and the scan for values that a
// record may not hold. Integer tests instead of isfinite(), so that the compiler vectorises them.
#include "convert.h"

#include "codec.h"

#include <assert.h>

float bkv_half_to_float(uint16_t half) {
    return bkv_half_expand(half);
}

float bkv_bf16_to_float(uint16_t bits) {
    return bkv_bf16_expand(bits);
}

uint16_t bkv_float_to_half(float value) {
    uint32_t bits = bkv_float_to_bits(value);
    uint32_t sign = (bits >> 16) & 0x8000u;
    uint32_t magnitude = bits & 0x7fffffffu;
    uint32_t half;
    if (magnitude > 0x7f800000u) {
        half = 0x7e00u; // NaN stays NaN
    } else if (magnitude >= 0x477fe000u) {
        half = 0x7bffu; // 65504 and above, infinity included
    } else if (magnitude >= 0x38800000u) {
        // Normal: rebias the exponent by -112 and round away 13 bits, ties to even.
        half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
        half = half > 0x7bffu ? 0x7bffu : half; // rounded up past the largest
    } else {
        // Subnormal: adding 0.5 makes the FPU round to multiples of 2^-24, which is exactly a half's last place.
        half = bkv_float_to_bits(bkv_float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
    }
    return (uint16_t)(sign | half);
}

uint16_t bkv_float_to_bf16(float value) {
    uint32_t bits = bkv_float_to_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return (uint16_t)((bits >> 16) | 0x40u); // NaN stays NaN, whichever bits rounding would clear
    }
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

void bkv_halves_to_float(const uint8_t *src, size_t n, float *out) {
    for (size_t i = 0; i < n; i++) {
        out[i] = bkv_half_expand(bkv_load_u16(src + 2 * i));
    }
}

void bkv_row_to_float(bkv_dtype_t dtype, const void *src, size_t n, float *out) {
    const uint8_t *bytes = src;
    switch (dtype) {
    case BKV_BF16:
        for (size_t i = 0; i < n; i++) {
            out[i] = bkv_bf16_expand(bkv_load_u16(bytes + 2 * i));
        }
        return;
    case BKV_FP16:
        bkv_halves_to_float(bytes, n, out);
        return;
    case BKV_FP32:
        memcpy(out, bytes, n * sizeof(float));
        return;
    }
    assert(!"dtype");
}

// The scan of what arrives should run at the speed of the memory, and SSE2 alone does not: the loader picks a variant.
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) && !defined(__clang__)
#define WIDE __attribute__((target_clones("avx2", "default")))
#else
#define WIDE
#endif

// Adding (top bit - limit) to a magnitude sets the top bit exactly when the magnitude reaches the limit.
WIDE static bool exceeds_u16(const uint8_t *src, size_t n, uint16_t limit) {
    uint16_t seen = 0;
    uint16_t lift = (uint16_t)(0x8000u - limit);
    for (size_t i = 0; i < n; i++) {
        seen = (uint16_t)(seen | (uint16_t)((bkv_load_u16(src + 2 * i) & 0x7fffu) + lift));
    }
    return (seen & 0x8000u) != 0;
}

WIDE static bool exceeds_u32(const uint8_t *src, size_t n, uint32_t limit) {
    uint32_t seen = 0;
    uint32_t lift = 0x80000000u - limit;
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, src + 4 * i, sizeof(bits));
        seen |= (bits & 0x7fffffffu) + lift;
    }
    return (seen & 0x80000000u) != 0;
}

bool bkv_row_exceeds(bkv_dtype_t dtype, const void *src, size_t n, bool half_range) {
    switch (dtype) {
    case BKV_BF16:
        return exceeds_u16(src, n, half_range ? 0x4780u : 0x7f80u); // 65536, the first bfloat16 above 65504
    case BKV_FP16:
        return exceeds_u16(src, n, 0x7c00u);
    case BKV_FP32:
        return exceeds_u32(src, n, half_range ? 0x477fe001u : 0x7f800000u); // the first float above 65504
    }
    assert(!"dtype");
    return true;
}
