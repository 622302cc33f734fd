// quant.c - quantising rows of keys and values, and packing codes. record_read.c does the way back to float.
//
// Keys are quantised per channel because after RoPE a few channels are an order of magnitude larger than the others;
// values have no such channels and are quantised per token (the finding of KIVI, arXiv 2402.02750).
#include "quant.h"

#include "codec.h"
#include "convert.h"

#include <assert.h>
#include <string.h>

// Eight codes at once: a word of eight bytes, whose unused bits are squeezed out between bytes, then between pairs of bytes,
// then between fours. Called with a constant width, so that shifts and copies are constants too.
static inline void pack_width(const uint8_t *codes, uint32_t n, const uint32_t bits, uint8_t *out) {
    for (uint32_t i = 0; i < n; i += 8, out += bits) {
        uint64_t word;
        memcpy(&word, codes + i, sizeof(word));
        word = (word & 0x00ff00ff00ff00ffu) | (word >> 8 & 0x00ff00ff00ff00ffu) << bits;
        word = (word & 0x0000ffff0000ffffu) | (word >> 16 & 0x0000ffff0000ffffu) << 2 * bits;
        word = (word & 0x00000000ffffffffu) | word >> 32 << 4 * bits;
        memcpy(out, &word, bits); // 8 codes of `bits` bits are `bits` bytes
    }
}

// The same way back.
static inline void unpack_width(const uint8_t *packed, uint32_t n, const uint32_t bits, uint8_t *codes) {
    const uint64_t four = (1ull << 4 * bits) - 1;
    const uint64_t two = ((1ull << 2 * bits) - 1) * 0x0000000100000001u;
    const uint64_t one = ((1ull << bits) - 1) * 0x0001000100010001u;
    for (uint32_t i = 0; i < n; i += 8, packed += bits) {
        uint64_t word = 0;
        memcpy(&word, packed, bits);
        word = (word & four) | (word >> 4 * bits & four) << 32;
        word = (word & two) | (word >> 2 * bits & two) << 16;
        word = (word & one) | (word >> bits & one) << 8;
        memcpy(codes + i, &word, sizeof(word));
    }
}

// Three-bit codes by groups of 32: each 16-bit half of three words takes five codes in its low 15 bits, and the six bits that
// are left over are codes 30 and 31. Two codes of one number in both halves come out by one mask, which is what a GPU and a
// vector unit want; a bit string would put every code at a place of its own.
#define GROUP 32

static void pack_three(const uint8_t *codes, uint32_t n, uint8_t *out) {
    uint32_t whole = n / GROUP * GROUP;
    for (uint32_t i = 0; i < whole; i += GROUP) {
        for (uint32_t half = 0; half < 6; half++, out += 2) {
            const uint8_t *five = codes + i + (size_t)half * 5;
            uint32_t top = (uint32_t)codes[i + 30 + half % 2] >> half / 2;
            uint32_t bits = five[0] | (uint32_t)five[1] << 3 | (uint32_t)five[2] << 6 | (uint32_t)five[3] << 9 |
                            (uint32_t)five[4] << 12 | (top & 1u) << 15;
            bkv_store_u16(out, (uint16_t)bits);
        }
    }
    pack_width(codes + whole, n - whole, 3, out);
}

static void unpack_three(const uint8_t *packed, uint32_t n, uint8_t *codes) {
    uint32_t whole = n / GROUP * GROUP;
    for (uint32_t i = 0; i < whole; i += GROUP) {
        codes[i + 30] = codes[i + 31] = 0;
        for (uint32_t half = 0; half < 6; half++, packed += 2) {
            uint32_t bits = bkv_load_u16(packed);
            for (uint32_t p = 0; p < 5; p++) {
                codes[i + half * 5 + p] = bits >> 3 * p & 7;
            }
            codes[i + 30 + half % 2] = (uint8_t)(codes[i + 30 + half % 2] | bits >> 15 << half / 2);
        }
    }
    unpack_width(packed, n - whole, 3, codes + whole);
}

void bkv_codes_pack(const uint8_t *codes, uint32_t n, uint32_t bits, uint8_t *out) {
    assert(n % 8 == 0);
    switch (bits) {
    case 2:
        pack_width(codes, n, 2, out);
        return;
    case 3:
        pack_three(codes, n, out);
        return;
    case 4:
        pack_width(codes, n, 4, out);
        return;
    case 8:
        memcpy(out, codes, n);
        return;
    default:
        assert(!"bits");
    }
}

void bkv_codes_unpack(const uint8_t *packed, uint32_t n, uint32_t bits, uint8_t *codes) {
    assert(n % 8 == 0);
    switch (bits) {
    case 2:
        unpack_width(packed, n, 2, codes);
        return;
    case 3:
        unpack_three(packed, n, codes);
        return;
    case 4:
        unpack_width(packed, n, 4, codes);
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
    code = code > 0 ? code : 0; // also where it is NaN, which no cast may meet
    code = code < top ? code : top;
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
    uint8_t row_codes[BKV_MAX_DIM] = {0};
    for (uint32_t t = 0; t < count; t++) {
        const float *row = rows + (size_t)t * dim;
        for (uint32_t i = 0; i < dim; i++) {
            row_codes[i] = code_of(row[i], inverse[i], zero[i], top);
        }
        bkv_codes_pack(row_codes, dim, bits, codes + (size_t)t * (dim * bits / 8));
    }
}

// Smallest and largest of n elements, a multiple of 8: in eight lanes, as the compiler may not reorder floats by itself.
static void row_range(const float *row, uint32_t n, float *low, float *high) {
    float least[8], most[8];
    memcpy(least, row, sizeof(least));
    memcpy(most, row, sizeof(most));
    for (uint32_t i = 8; i < n; i += 8) {
        for (uint32_t j = 0; j < 8; j++) {
            least[j] = row[i + j] < least[j] ? row[i + j] : least[j];
            most[j] = row[i + j] > most[j] ? row[i + j] : most[j];
        }
    }
    *low = least[0];
    *high = most[0];
    for (uint32_t j = 1; j < 8; j++) {
        *low = least[j] < *low ? least[j] : *low;
        *high = most[j] > *high ? most[j] : *high;
    }
}

void bkv_quant_value_row(const float *row, uint32_t dim, uint32_t bits, uint8_t *params, uint8_t *codes) {
    float top = (float)((1u << bits) - 1u);
    uint8_t row_codes[BKV_MAX_DIM];
    for (uint32_t first = 0; first < dim; first += BKV_VALUE_GROUP_DIMS, params += 4) {
        uint32_t end = first + BKV_VALUE_GROUP_DIMS < dim ? first + BKV_VALUE_GROUP_DIMS : dim;
        float low, high, inverse, zero;
        row_range(row + first, end - first, &low, &high);
        params_choose(low, high, bits, params, &inverse, &zero);
        for (uint32_t i = first; i < end; i++) {
            row_codes[i] = code_of(row[i], inverse, zero, top);
        }
    }
    bkv_codes_pack(row_codes, dim, bits, codes);
}
