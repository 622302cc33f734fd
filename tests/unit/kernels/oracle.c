// oracle.c - see oracle.h.
#include "oracle.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

uint32_t oracle_next(oracle_random_t *random) {
    random->state = random->state * 6364136223846793005u + 1442695040888963407u;
    uint64_t x = random->state ^ (random->state >> 33);
    return (uint32_t)((x * 0xff51afd7ed558ccdu) >> 32);
}

double oracle_uniform(oracle_random_t *random) {
    return oracle_next(random) / 4294967296.0;
}

double oracle_gauss(oracle_random_t *random) {
    double u = oracle_uniform(random), v = oracle_uniform(random);
    return sqrt(-2 * log(1 - u)) * cos(2 * acos(-1.0) * v);
}

// Everything handed out, so that the leak checker finds it in use.
static void **handed_out;
static size_t handed_count;

void *oracle_exact(size_t bytes) {
    void *at = NULL;
    cr_assert_eq(posix_memalign(&at, 64, bytes ? bytes : 1), 0);
    handed_out = realloc(handed_out, (handed_count + 1) * sizeof(*handed_out));
    cr_assert(handed_out);
    handed_out[handed_count++] = at;
    return at;
}

void *oracle_alloc(size_t bytes) {
    size_t room = bytes + 64;
    void *at = oracle_exact(room);
    memset(at, 0, room);
    return at;
}

double oracle_half(uint16_t half) {
    int exponent = (half >> 10) & 31, mantissa = half & 1023;
    double sign = half & 0x8000 ? -1 : 1;
    if (exponent == 31) {
        return mantissa ? (double)NAN : sign * (double)INFINITY;
    }
    return sign * (exponent ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24));
}

static uint8_t *element_at(const bkv_block_t *block, bool values, uint32_t layer, uint32_t head, uint32_t token, uint32_t i) {
    const bkv_stride_t *stride = values ? &block->value_stride : &block->key_stride;
    int64_t bytes = block->shape.dtype == BKV_FP32 ? 4 : 2;
    return (uint8_t *)(uintptr_t)(values ? block->values : block->keys) + stride->layer * layer + stride->head * head +
           stride->token * token + bytes * i;
}

double oracle_element(const bkv_block_t *block, bool values, uint32_t layer, uint32_t head, uint32_t token, uint32_t i) {
    const uint8_t *at = element_at(block, values, layer, head, token, i);
    uint16_t half;
    float single;
    memcpy(&half, at, 2);
    if (block->shape.dtype == BKV_FP16) {
        return oracle_half(half);
    }
    if (block->shape.dtype == BKV_BF16) {
        uint32_t bits = (uint32_t)half << 16;
        memcpy(&single, &bits, 4);
        return (double)single;
    }
    memcpy(&single, at, 4);
    return (double)single;
}

void oracle_put(const bkv_block_t *block, bool values, uint32_t layer, uint32_t head, uint32_t token, uint32_t i, float value) {
    uint8_t *at = element_at(block, values, layer, head, token, i);
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (block->shape.dtype == BKV_FP32) {
        memcpy(at, &bits, 4);
        return;
    }
    uint16_t half;
    if (block->shape.dtype == BKV_BF16) {
        half = (uint16_t)(bits >> 16);
    } else if (isnan(value) || isinf(value)) {
        half = (uint16_t)(isnan(value) ? 0x7e00 : value > 0 ? 0x7c00 : 0xfc00);
    } else {
        int exponent;
        double fraction = frexp(fabs((double)value), &exponent); // [0.5, 1)
        int biased = exponent + 14;
        uint16_t sign = value < 0 ? 0x8000 : 0;
        if (biased <= 0) {
            half = (uint16_t)(sign | (uint16_t)ldexp(fraction, exponent + 24));
        } else {
            half = (uint16_t)(sign | (biased << 10) | ((int)ldexp(fraction, 11) & 1023));
        }
    }
    memcpy(at, &half, 2);
}

void oracle_block(const bkv_shape_t *shape, uint64_t seed, double scale, bkv_block_t *block) {
    oracle_random_t random = {seed};
    bkv_block_from_payload(shape, oracle_alloc((size_t)bkv_shape_bytes(shape)), block);
    for (uint32_t layer = 0; layer < shape->layers; layer++) {
        for (uint32_t head = 0; head < shape->heads; head++) {
            for (uint32_t token = 0; token < shape->tokens; token++) {
                for (uint32_t i = 0; i < shape->key_dim; i++) {
                    oracle_put(block, false, layer, head, token, i, (float)(scale * oracle_gauss(&random)));
                }
                for (uint32_t i = 0; i < shape->value_dim; i++) {
                    oracle_put(block, true, layer, head, token, i, (float)(scale * oracle_gauss(&random)));
                }
            }
        }
    }
}

static bkv_status_t compress(const bkv_backend_t *backend, const bkv_block_t *block, const bkv_codec_params_t *params,
                             uint64_t position, void **record, size_t *length, bkv_error_t *err) {
    bkv_record_id_t id = {.tenant = 7, .position = position};
    for (uint32_t i = 0; i < BKV_KEY_BYTES; i++) {
        id.key.bytes[i] = (uint8_t)(i + position);
        id.spec_id.bytes[i % BKV_SPEC_ID_BYTES] = (uint8_t)(3 * i);
    }
    size_t capacity = (size_t)bkv_codec_bound(&block->shape, params);
    // Exactly as much room as was promised to be enough, so that AddressSanitizer sees a byte more.
    *record = oracle_exact(capacity);
    size_t scratch = bkv_compress_workspace(backend, &block->shape, params);
    void *workspace = oracle_exact(scratch);
    memset(workspace, 0xff, scratch); // NaN, should anybody read it before writing
    bkv_status_t status = bkv_compress(backend, block, params, &id, *record, capacity, workspace, length, err);
    free(workspace);
    return status;
}

void *oracle_compress_by(const bkv_backend_t *backend, const bkv_block_t *block, const bkv_codec_params_t *params,
                         uint64_t position, size_t *length) {
    void *record;
    bkv_error_t err = {0};
    bkv_status_t status = compress(backend, block, params, position, &record, length, &err);
    cr_assert_eq(status, BKV_OK, "%s", err.message);
    status = bkv_record_check(record, *length, &err);
    cr_assert_eq(status, BKV_OK, "%s", err.message);
    return record;
}

void *oracle_compress(const bkv_block_t *block, const bkv_codec_params_t *params, uint64_t position, size_t *length) {
    return oracle_compress_by(bkv_backend_get("ref"), block, params, position, length);
}

bkv_status_t oracle_try(const bkv_block_t *block, const bkv_codec_params_t *params, uint64_t position, bkv_error_t *err) {
    void *record;
    size_t length;
    bkv_status_t status = compress(bkv_backend_get("ref"), block, params, position, &record, &length, err);
    free(record);
    return status;
}

static uint32_t u32_at(const uint8_t *at) {
    return at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
}

static uint16_t u16_at(const uint8_t *at) {
    return (uint16_t)(at[0] | at[1] << 8);
}

// `bits` bits from bit `first` on, one by one.
static uint32_t bits_at(const uint8_t *at, uint64_t first, uint32_t bits) {
    uint32_t code = 0;
    for (uint32_t i = 0; i < bits; i++) {
        code |= (uint32_t)((at[(first + i) / 8] >> ((first + i) % 8)) & 1) << i;
    }
    return code;
}

uint32_t oracle_code(const uint8_t *row, uint32_t dim, uint32_t bits, uint32_t i) {
    uint32_t group = i / 32, place = i % 32;
    if (bits != 3 || group == dim / 32) {
        return bits_at(row, (uint64_t)i * bits, bits); // the rest of a row begins where the groups of 32 codes end
    }
    row += (size_t)group * 12;
    if (place < 30) {
        return (uint32_t)u16_at(row + 2 * (size_t)(place / 5)) >> (place % 5 * 3) & 7u;
    }
    uint32_t code = 0;
    for (uint32_t bit = 0; bit < 3; bit++) {
        code |= (uint32_t)u16_at(row + 4 * (size_t)bit + 2 * (size_t)(place - 30)) >> 15 << bit;
    }
    return code;
}

static double native_at(const uint8_t *plane, uint8_t dtype, uint64_t number) {
    bkv_block_t one = {.shape = {.dtype = (bkv_dtype_t)dtype}, .keys = plane};
    return oracle_element(&one, false, 0, 0, 0, (uint32_t)number);
}

void oracle_read(const void *record, uint32_t layer, uint32_t head, oracle_section_t *section) {
    // Byte offsets of the header's fields, counted by hand.
    const uint8_t *bytes = record;
    uint8_t flags = bytes[7], dtype = bytes[104];
    uint32_t tokens = u32_at(bytes + 88), heads = u16_at(bytes + 94), key_dim = u16_at(bytes + 100),
             value_dim = u16_at(bytes + 102);
    const uint8_t *entry = bytes + 128 + 16 * ((size_t)layer * heads + head);
    const uint8_t *at = bytes + 16 * (size_t)u32_at(entry), *values = bytes + 16 * (size_t)u32_at(entry + 4);
    uint32_t m = u32_at(entry + 8), key_bits = entry[12], value_bits = entry[13];
    *section = (oracle_section_t){.m = m,
                                  .key_dim = key_dim,
                                  .value_dim = value_dim,
                                  .k = oracle_alloc((size_t)m * key_dim * sizeof(double)),
                                  .v = oracle_alloc((size_t)m * value_dim * sizeof(double)),
                                  .logw = oracle_alloc(m * sizeof(double)),
                                  .index = oracle_alloc(m * sizeof(uint32_t))};
    uint32_t n = 0;
    for (uint32_t t = 0; t < tokens && n < m; t++) {
        if (entry[14] == BKV_INDEX_ALL || (entry[14] == BKV_INDEX_BITMAP && bits_at(at, t, 1)) ||
            (entry[14] == BKV_INDEX_LIST && u32_at(at + 4 * (size_t)n) == t)) {
            section->index[n++] = t;
        }
    }
    cr_assert_eq(n, m);
    at += entry[14] == BKV_INDEX_ALL ? 0 : entry[14] == BKV_INDEX_BITMAP ? (tokens + 31) / 32 * 4 : m * 4;
    if (flags & BKV_RECORD_WEIGHTS) {
        for (uint32_t t = 0; t < m; t++) {
            section->logw[t] = oracle_half(u16_at(at)) + oracle_half(u16_at(at + 2)) * at[4 + t];
        }
        at += (4 + m + 3) / 4 * 4;
    }
    uint32_t groups = (m + 32) / 64 ? (m + 32) / 64 : 1, group_tokens = (m + groups - 1) / groups;
    const uint8_t *codes = at + (key_bits == 255 ? 0 : 4 * (size_t)groups * key_dim);
    for (uint32_t t = 0; t < m; t++) {
        for (uint32_t i = 0; i < key_dim; i++) {
            const uint8_t *param = at + 4 * ((size_t)(t / group_tokens) * key_dim + i);
            uint64_t number = (uint64_t)t * key_dim + i;
            section->k[number] = key_bits == 255
                                     ? native_at(codes, dtype, number)
                                     : oracle_half(u16_at(param + 2)) +
                                           oracle_half(u16_at(param)) *
                                               oracle_code(codes + (size_t)t * (key_dim * key_bits / 8), key_dim, key_bits, i);
        }
    }
    uint32_t value_groups = (value_dim + 63) / 64;
    codes = values + (value_bits == 255 ? 0 : 4 * (size_t)m * value_groups);
    for (uint32_t t = 0; t < m; t++) {
        for (uint32_t i = 0; i < value_dim; i++) {
            const uint8_t *param = values + 4 * ((size_t)t * value_groups + i / 64);
            uint64_t number = (uint64_t)t * value_dim + i;
            section->v[number] = value_bits == 255 ? native_at(codes, dtype, number)
                                                   : oracle_half(u16_at(param + 2)) +
                                                         oracle_half(u16_at(param)) *
                                                             oracle_code(codes + (size_t)t * (value_dim * value_bits / 8),
                                                                         value_dim, value_bits, i);
        }
    }
}

double oracle_attend(const oracle_section_t *sections, uint32_t count, const float *q, double scale, double *out) {
    double top = -INFINITY, sum = 0;
    for (uint32_t pass = 0; pass < 2; pass++) {
        for (uint32_t s = 0; s < count; s++) {
            const oracle_section_t *section = &sections[s];
            for (uint32_t t = 0; t < section->m; t++) {
                double logit = 0;
                for (uint32_t i = 0; i < section->key_dim; i++) {
                    logit += (double)q[i] * section->k[(size_t)t * section->key_dim + i];
                }
                logit = logit * scale + section->logw[t];
                if (pass == 0) {
                    top = fmax(top, logit);
                    continue;
                }
                sum += exp(logit - top);
                for (uint32_t i = 0; i < section->value_dim; i++) {
                    out[i] += exp(logit - top) * section->v[(size_t)t * section->value_dim + i];
                }
            }
        }
        for (uint32_t i = 0; i < sections[0].value_dim; i++) {
            out[i] = pass == 0 ? 0 : out[i] / sum;
        }
    }
    return top + log(sum);
}

void oracle_on_every_backend(void (*check)(const bkv_backend_t *backend)) {
    static const char *const names[] = {"ref", "avx2", "avx512", "amx"};
    for (int i = 0; i < 4; i++) {
        const bkv_backend_t *backend = bkv_backend_get(names[i]);
        if (backend) {
            check(backend);
        } else {
            fprintf(stderr, "SKIPPED: %s, which this machine does not have\n", names[i]);
        }
    }
}
