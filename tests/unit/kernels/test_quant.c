// test_quant.c - kernels/quant.c: packing against a bit-by-bit reader, error bounds in float64 for every width.
#include "quant.h"

#include "oracle.h"

#include <criterion/criterion.h>
#include <math.h>
#include <string.h>

static const uint32_t widths[] = {2, 3, 4, 8};

Test(quant, rows_are_packed_as_documented) {
    oracle_random_t random = {1};
    for (uint32_t w = 0; w < 4; w++) {
        for (uint32_t n = 8; n <= 1024; n += 40) {
            uint32_t bits = widths[w];
            uint8_t codes[1024], back[1024], packed[1025];
            for (uint32_t i = 0; i < n; i++) {
                codes[i] = (uint8_t)(oracle_next(&random) & ((1u << bits) - 1));
            }
            packed[n * bits / 8] = 0xa5;
            bkv_codes_pack(codes, n, bits, packed);
            cr_assert_eq(packed[n * bits / 8], 0xa5, "one byte too many");
            for (uint32_t i = 0; i < n; i++) {
                cr_assert_eq(oracle_code(packed, n, bits, i), codes[i], "%u bits, code %u of %u", bits, i, n);
            }
            bkv_codes_unpack(packed, n, bits, back);
            cr_assert_arr_eq(back, codes, n);
        }
    }
}

// What a reader makes of row t, channel i of a key group.
static double key_read(const uint8_t *params, const uint8_t *codes, uint32_t dim, uint32_t bits, uint32_t t, uint32_t i) {
    uint16_t scale, zero;
    memcpy(&scale, params + 4 * i, 2);
    memcpy(&zero, params + 4 * i + 2, 2);
    uint32_t code = oracle_code(codes + (size_t)t * (dim * bits / 8), dim, bits, i);
    return oracle_half(zero) + oracle_half(scale) * code;
}

// Half a step; plus what the rounding of zero and scale to 11 bits may move the ends of the range by.
static double bound(double low, double high, uint32_t bits) {
    double step = (high - low) / ((1u << bits) - 1);
    return step / 2 * 1.001 + (fabs(low) + (high - low)) / 1024 + 1e-4;
}

Test(quant, key_groups_keep_within_half_a_step) {
    oracle_random_t random = {2};
    const uint32_t dim = 40;
    static float rows[95 * 40], scratch[4 * 40];
    static uint8_t params[4 * 40], codes[95 * 40];
    for (uint32_t w = 0; w < 4; w++) {
        for (uint32_t count = 1; count <= 95; count += 13) {
            for (uint32_t i = 0; i < count * dim; i++) {
                rows[i] = (float)(oracle_gauss(&random) * (i % dim == 7 ? 900 : 3) + i % dim);
            }
            bkv_quant_key_group(rows, count, dim, widths[w], params, codes, scratch);
            for (uint32_t i = 0; i < dim; i++) {
                double low = INFINITY, high = -INFINITY;
                for (uint32_t t = 0; t < count; t++) {
                    low = fmin(low, (double)rows[t * dim + i]);
                    high = fmax(high, (double)rows[t * dim + i]);
                }
                for (uint32_t t = 0; t < count; t++) {
                    double error = fabs(key_read(params, codes, dim, widths[w], t, i) - (double)rows[t * dim + i]);
                    cr_assert(error <= bound(low, high, widths[w]), "%u bits, %u rows: %g", widths[w], count, error);
                }
            }
        }
    }
}

Test(quant, value_rows_keep_within_half_a_step_per_64_channels) {
    oracle_random_t random = {3};
    static const uint32_t dims[] = {8, 64, 72, 200, 1024};
    float row[1024];
    uint8_t params[4 * 16], codes[1024];
    for (uint32_t w = 0; w < 4; w++) {
        for (uint32_t d = 0; d < 5; d++) {
            for (uint32_t i = 0; i < dims[d]; i++) {
                row[i] = (float)(oracle_gauss(&random) * (1 + 50 * (i / 64)));
            }
            bkv_quant_value_row(row, dims[d], widths[w], params, codes);
            for (uint32_t i = 0; i < dims[d]; i++) {
                double low = INFINITY, high = -INFINITY;
                for (uint32_t j = i / 64 * 64; j < dims[d] && j < i / 64 * 64 + 64; j++) {
                    low = fmin(low, (double)row[j]);
                    high = fmax(high, (double)row[j]);
                }
                uint8_t expanded[4 * 1024]; // the key reader wants params per channel
                memcpy(expanded + 4 * i, params + 4 * (i / 64), 4);
                double error = fabs(key_read(expanded, codes, dims[d], widths[w], 0, i) - (double)row[i]);
                cr_assert(error <= bound(low, high, widths[w]), "%u bits, dim %u: %g", widths[w], dims[d], error);
            }
        }
    }
}

Test(quant, constant_channels_are_exact_to_half_precision) {
    float rows[3 * 8], scratch[4 * 8];
    uint8_t params[4 * 8], codes[3 * 8];
    for (uint32_t i = 0; i < 24; i++) {
        rows[i] = (float)(i % 8) * 0.5f - 1;
    }
    bkv_quant_key_group(rows, 3, 8, 2, params, codes, scratch);
    for (uint32_t t = 0; t < 3; t++) {
        for (uint32_t i = 0; i < 8; i++) {
            cr_assert_eq(key_read(params, codes, 8, 2, t, i), (double)rows[t * 8 + i]);
        }
    }
}

Test(quant, extremes_stay_finite) {
    static const float extremes[] = {65504.0f, -65504.0f, 1e-8f, -1e-38f, 0.0f, 3e38f, -3e38f, 6e-5f};
    float scratch[4 * 8], rows[2 * 8];
    uint8_t params[4 * 8], codes[2 * 8];
    for (uint32_t w = 0; w < 4; w++) {
        for (uint32_t shift = 0; shift < 8; shift++) {
            for (uint32_t i = 0; i < 16; i++) {
                rows[i] = extremes[(i + (i / 8) * shift) % 8];
            }
            bkv_quant_key_group(rows, 2, 8, widths[w], params, codes, scratch);
            for (uint32_t i = 0; i < 16; i++) {
                double value = key_read(params, codes, 8, widths[w], i / 8, i % 8);
                double wanted = fmax(-65504, fmin(65504, (double)rows[i]));
                cr_assert(isfinite(value));
                cr_assert(fabs(value - wanted) <= 131008.0 / ((1u << widths[w]) - 1) / 2 + 130, "%g for %g", value, wanted);
            }
        }
    }
}

Test(quant, an_empty_group_has_zero_params) {
    uint8_t params[4 * 8], zero[4 * 8] = {0};
    float scratch[4 * 8];
    memset(params, 0xff, sizeof(params));
    bkv_quant_key_group(NULL, 0, 8, 4, params, NULL, scratch);
    cr_assert_arr_eq(params, zero, sizeof(zero));
}
