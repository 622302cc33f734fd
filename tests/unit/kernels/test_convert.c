// test_convert.c - kernels/convert.c against float64: every half, every bfloat16, rounding at and around every midpoint.
#include "convert.h"

#include "oracle.h"

#include <criterion/criterion.h>
#include <math.h>

static bool same(double a, double b) {
    return (isnan(a) && isnan(b)) || (a == b && signbit(a) == signbit(b));
}

Test(convert, every_half_reads_as_its_value) {
    for (uint32_t half = 0; half < 65536; half++) {
        cr_assert(same((double)bkv_half_to_float((uint16_t)half), oracle_half((uint16_t)half)), "half %04x", half);
    }
}

Test(convert, every_half_survives_the_round_trip) {
    for (uint32_t half = 0; half < 65536; half++) {
        double value = oracle_half((uint16_t)half);
        uint16_t back = bkv_float_to_half((float)value);
        if (isinf(value)) {
            cr_assert_eq(back, half - 1, "infinity saturates to the largest");
        } else if (isnan(value)) {
            cr_assert(isnan(oracle_half(back)));
        } else {
            cr_assert_eq(back, half);
        }
    }
}

Test(convert, halves_round_to_nearest_even) {
    // Between two neighbours the midpoint is exact in float; it goes to the even one, a hair beside it to the nearer one.
    for (uint32_t half = 0; half < 0x7bff; half++) {
        float middle = (float)((oracle_half((uint16_t)half) + oracle_half((uint16_t)(half + 1))) / 2);
        uint32_t even = half % 2 == 0 ? half : half + 1;
        cr_assert_eq(bkv_float_to_half(middle), even, "middle above %04x", half);
        cr_assert_eq(bkv_float_to_half(-middle), even | 0x8000);
        cr_assert_eq(bkv_float_to_half(nextafterf(middle, 0)), half);
        cr_assert_eq(bkv_float_to_half(nextafterf(middle, INFINITY)), half + 1);
    }
}

Test(convert, halves_saturate) {
    cr_assert_eq(bkv_float_to_half(65505.0f), 0x7bff);
    cr_assert_eq(bkv_float_to_half(65519.9f), 0x7bff);
    cr_assert_eq(bkv_float_to_half(-1e30f), 0xfbff);
    cr_assert_eq(bkv_float_to_half(INFINITY), 0x7bff);
}

Test(convert, bf16_rounds_to_nearest_even) {
    for (uint32_t bits = 0; bits < 0x7f80; bits++) {
        float low = bkv_bf16_to_float((uint16_t)bits), high = bkv_bf16_to_float((uint16_t)(bits + 1));
        cr_assert_eq(bkv_float_to_bf16(low), bits);
        cr_assert_eq(bkv_float_to_bf16(-low), bits | 0x8000);
        if (bits + 1 < 0x7f80) {
            float middle = (float)(((double)low + (double)high) / 2);
            cr_assert_eq(bkv_float_to_bf16(middle), bits % 2 == 0 ? bits : bits + 1);
            cr_assert_eq(bkv_float_to_bf16(nextafterf(middle, INFINITY)), bits + 1);
        }
    }
    cr_assert(isnan(bkv_bf16_to_float(bkv_float_to_bf16(NAN))));
    cr_assert(isinf(bkv_bf16_to_float(bkv_float_to_bf16(INFINITY))));
}

Test(convert, rows_equal_single_elements) {
    // One odd byte before the row: records and wire buffers promise no alignment to rows.
    uint8_t buffer[1 + 37 * 4];
    oracle_random_t random = {5};
    float out[37];
    for (int dtype = BKV_BF16; dtype <= BKV_FP32; dtype++) {
        bkv_block_t block = {.shape = {.dtype = (bkv_dtype_t)dtype}, .keys = buffer + 1};
        for (uint32_t i = 0; i < 37; i++) {
            oracle_put(&block, false, 0, 0, 0, i, (float)oracle_gauss(&random));
        }
        bkv_row_to_float((bkv_dtype_t)dtype, buffer + 1, 37, out);
        for (uint32_t i = 0; i < 37; i++) {
            cr_assert_eq((double)out[i], oracle_element(&block, false, 0, 0, 0, i));
        }
    }
}

Test(convert, the_scan_finds_one_bad_element_anywhere) {
    static const float bad[] = {NAN, -NAN, INFINITY, -INFINITY};
    for (int dtype = BKV_BF16; dtype <= BKV_FP32; dtype++) {
        uint8_t row[67 * 4] = {0};
        bkv_block_t block = {.shape = {.dtype = (bkv_dtype_t)dtype}, .keys = row};
        for (uint32_t i = 0; i < 67; i++) {
            oracle_put(&block, false, 0, 0, 0, i, i % 2 ? 60000.0f : -60000.0f);
        }
        cr_assert_not(bkv_row_exceeds((bkv_dtype_t)dtype, row, 67, false));
        cr_assert_not(bkv_row_exceeds((bkv_dtype_t)dtype, row, 67, true));
        for (uint32_t at = 0; at < 67; at++) {
            oracle_put(&block, false, 0, 0, 0, at, bad[at % 4]);
            cr_assert(bkv_row_exceeds((bkv_dtype_t)dtype, row, 67, false));
            oracle_put(&block, false, 0, 0, 0, at, -1.0f);
        }
    }
}

Test(convert, the_scan_knows_the_range_of_halves) {
    float fits[2] = {65504.0f, -65504.0f}, above[2] = {0, nextafterf(65504.0f, INFINITY)};
    cr_assert_not(bkv_row_exceeds(BKV_FP32, fits, 2, true));
    cr_assert(bkv_row_exceeds(BKV_FP32, above, 2, true));
    cr_assert_not(bkv_row_exceeds(BKV_FP32, above, 2, false));
    uint16_t bf16_fits = bkv_float_to_bf16(65280.0f), bf16_above = bkv_float_to_bf16(65536.0f);
    cr_assert_not(bkv_row_exceeds(BKV_BF16, &bf16_fits, 1, true));
    cr_assert(bkv_row_exceeds(BKV_BF16, &bf16_above, 1, true));
}
