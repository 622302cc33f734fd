// quant.c - quantising rows of keys and values, and packing codes. record_read.c does the way back to float.
//
// Keys are quantised per channel because after RoPE a few channels are an order of magnitude larger than the others;
// values have no such channels and are quantised per token (the finding of KIVI, arXiv 2402.02750).
#include "quant.h"

#include "codec.h"
#include "convert.h"

#include <assert.h>
#include <string.h>

void bkv_codes_pack(const uint8_t *codes, uint32_t n, uint32_t bits, uint8_t *out) {
    assert(n % 8 == 0 && bits >= 1 && bits <= 8);
    for (uint32_t i = 0; i < n; i += 8) {
        uint64_t word = 0;
        for (uint32_t j = 0; j < 8; j++) {
            word |= (uint64_t)codes[i + j] << (j * bits);
        }
        memcpy(out, &word, bits); // 8 codes of `bits` bits are `bits` bytes
        out += bits;
    }
}

static void unpack4(const uint8_t *packed, uint32_t n, uint8_t *codes) {
    for (uint32_t i = 0; i < n / 2; i++) {
        codes[2 * i] = packed[i] & 15u;
        codes[2 * i + 1] = packed[i] >> 4;
    }
}

static void unpack2(const uint8_t *packed, uint32_t n, uint8_t *codes) {
    for (uint32_t i = 0; i < n / 4; i++) {
        codes[4 * i] = packed[i] & 3u;
        codes[4 * i + 1] = (packed[i] >> 2) & 3u;
        codes[4 * i + 2] = (packed[i] >> 4) & 3u;
        codes[4 * i + 3] = packed[i] >> 6;
    }
}

static void unpack3(const uint8_t *packed, uint32_t n, uint8_t *codes) {
    for (uint32_t i = 0; i < n; i += 8, packed += 3) {
        uint32_t word = packed[0] | (uint32_t)packed[1] << 8 | (uint32_t)packed[2] << 16;
        for (uint32_t j = 0; j < 8; j++) {
            codes[i + j] = (word >> (3 * j)) & 7u;
        }
    }
}

void bkv_codes_unpack(const uint8_t *packed, uint32_t n, uint32_t bits, uint8_t *codes) {
    assert(n % 8 == 0);
    switch (bits) {
    case 2:
        unpack2(packed, n, codes);
        return;
    case 3:
        unpack3(packed, n, codes);
        return;
    case 4:
        unpack4(packed, n, codes);
        return;
    case 8:
        memcpy(codes, packed, n);
        return;
    default:
        assert(!"bits");
    }
}

static float clamp_half(float value) {
    return value > BKV_HALF_MAX ? BKV_HALF_MAX : value < -BKV_HALF_MAX ? -BKV_HALF_MAX : value;
}

// Scale and zero as they are stored, so that codes are chosen against what the reader will see.
static void params_choose(float low, float high, uint32_t bits, uint8_t *params, float *inverse, float *zero) {
    uint16_t zero_half = bkv_float_to_half(low);
    *zero = bkv_half_expand(zero_half);
    float range = clamp_half(high) - *zero;
    uint16_t scale_half = bkv_float_to_half(range > 0 ? range / (float)((1u << bits) - 1u) : 0.0f);
    float scale = bkv_half_expand(scale_half);
    *inverse = scale > 0 ? 1.0f / scale : 0.0f;
    bkv_store_u16(params, scale_half);
    bkv_store_u16(params + 2, zero_half);
}

static uint8_t code_of(float value, float inverse, float zero, float top) {
    float code = (value - zero) * inverse + 0.5f;
    code = code < 0 ? 0 : code;
    code = code > top ? top : code;
    return (uint8_t)(int32_t)code;
}

void bkv_quant_key_group(const float *rows, uint32_t count, uint32_t dim, uint32_t bits, uint8_t *params, uint8_t *codes,
                         float *scratch) {
    float *low = scratch, *high = scratch + dim, *inverse = scratch + 2 * (size_t)dim, *zero = scratch + 3 * (size_t)dim;
    if (count == 0) {
        memset(params, 0, 4 * (size_t)dim);
        return;
    }
    memcpy(low, rows, dim * sizeof(float));
    memcpy(high, rows, dim * sizeof(float));
    for (uint32_t t = 1; t < count; t++) {
        const float *row = rows + (size_t)t * dim;
        for (uint32_t i = 0; i < dim; i++) {
            low[i] = row[i] < low[i] ? row[i] : low[i];
            high[i] = row[i] > high[i] ? row[i] : high[i];
        }
    }
    for (uint32_t i = 0; i < dim; i++) {
        params_choose(low[i], high[i], bits, params + 4 * (size_t)i, &inverse[i], &zero[i]);
    }
    float top = (float)((1u << bits) - 1u);
    uint8_t row_codes[BKV_MAX_DIM];
    for (uint32_t t = 0; t < count; t++) {
        const float *row = rows + (size_t)t * dim;
        for (uint32_t i = 0; i < dim; i++) {
            row_codes[i] = code_of(row[i], inverse[i], zero[i], top);
        }
        bkv_codes_pack(row_codes, dim, bits, codes + (size_t)t * (dim * bits / 8));
    }
}

void bkv_quant_value_row(const float *row, uint32_t dim, uint32_t bits, uint8_t *params, uint8_t *codes) {
    float top = (float)((1u << bits) - 1u);
    uint8_t row_codes[BKV_MAX_DIM];
    for (uint32_t first = 0; first < dim; first += BKV_VALUE_GROUP_DIMS, params += 4) {
        uint32_t end = first + BKV_VALUE_GROUP_DIMS < dim ? first + BKV_VALUE_GROUP_DIMS : dim;
        float low = row[first], high = row[first], inverse, zero;
        for (uint32_t i = first; i < end; i++) {
            low = row[i] < low ? row[i] : low;
            high = row[i] > high ? row[i] : high;
        }
        params_choose(low, high, bits, params, &inverse, &zero);
        for (uint32_t i = first; i < end; i++) {
            row_codes[i] = code_of(row[i], inverse, zero, top);
        }
    }
    bkv_codes_pack(row_codes, dim, bits, codes);
}
