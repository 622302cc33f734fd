// test_summary.c - kernels/summary.c: names, limits and sizes, with layouts computed by hand.
#include "summary.h"

#include <criterion/criterion.h>
#include <string.h>

Test(summary, names_parse_back) {
    bkv_dtype_t dtype;
    bkv_codec_t codec;
    for (int i = 1; i <= 3; i++) {
        cr_assert(bkv_dtype_parse(bkv_dtype_name((bkv_dtype_t)i), &dtype) && dtype == (bkv_dtype_t)i);
    }
    for (int i = 1; i <= 4; i++) {
        cr_assert(bkv_codec_parse(bkv_codec_name((bkv_codec_t)i), &codec) && codec == (bkv_codec_t)i);
    }
    cr_assert_null(bkv_dtype_name((bkv_dtype_t)0));
    cr_assert_null(bkv_dtype_name((bkv_dtype_t)4));
    cr_assert_null(bkv_codec_name((bkv_codec_t)5));
    cr_assert_not(bkv_dtype_parse("BF16", &dtype));
    cr_assert_not(bkv_codec_parse("", &codec));
    cr_assert_not(bkv_codec_parse("balance ", &codec));
}

static void refused(bkv_shape_t shape, const char *field) {
    bkv_error_t err = {0};
    cr_assert_eq(bkv_shape_check(&shape, &err), BKV_INVALID_ARGUMENT, "%s", field);
    cr_assert_eq(strncmp(err.message, field, strlen(field)), 0, "'%s' does not name %s", err.message, field);
}

Test(summary, shapes_have_limits) {
    bkv_shape_t good = {8, 2, 256, 128, 64, BKV_BF16}, shape;
    cr_assert_eq(bkv_shape_check(&good, NULL), BKV_OK);
    static const uint32_t bad_dims[] = {0, 4, 12, 1032, 0x80000000u, UINT32_MAX};
    for (int i = 0; i < 6; i++) {
        shape = good, shape.key_dim = bad_dims[i], refused(shape, "key_dim");
        shape = good, shape.value_dim = bad_dims[i], refused(shape, "value_dim");
    }
    shape = good, shape.layers = 0, refused(shape, "layers");
    shape = good, shape.layers = 1025, refused(shape, "layers");
    shape = good, shape.layers = UINT32_MAX, refused(shape, "layers");
    shape = good, shape.heads = 0, refused(shape, "heads");
    shape = good, shape.heads = UINT32_MAX, refused(shape, "heads");
    shape = good, shape.layers = 1024, shape.heads = 65, refused(shape, "layers * heads");
    shape = good, shape.tokens = 0, refused(shape, "tokens");
    shape = good, shape.tokens = BKV_MAX_TOKENS + 1, refused(shape, "tokens");
    shape = good, shape.dtype = (bkv_dtype_t)0, refused(shape, "dtype");
    shape = good, shape.dtype = (bkv_dtype_t)4, refused(shape, "dtype");
    bkv_shape_t largest = {1024, 64, BKV_MAX_TOKENS, 1024, 1024, BKV_FP32};
    cr_assert_eq(bkv_shape_check(&largest, NULL), BKV_OK);
    cr_assert_eq(bkv_shape_bytes(&largest), 1ull << 53);
}

Test(summary, bytes_of_a_block) {
    bkv_shape_t shape = {8, 2, 256, 128, 64, BKV_BF16};
    cr_assert_eq(bkv_shape_bytes(&shape), 8ull * 2 * 256 * 192 * 2);
    shape.dtype = BKV_FP32;
    cr_assert_eq(bkv_shape_bytes(&shape), 8ull * 2 * 256 * 192 * 4);
}

Test(summary, the_index_is_stored_the_shorter_way) {
    cr_assert_eq(bkv_index_choose(256, 256), BKV_INDEX_ALL);
    cr_assert_eq(bkv_index_choose(1, 1), BKV_INDEX_ALL);
    cr_assert_eq(bkv_index_choose(256, 8), BKV_INDEX_BITMAP); // 32 bytes either way
    cr_assert_eq(bkv_index_choose(256, 7), BKV_INDEX_LIST);   // 28 against 32
    cr_assert_eq(bkv_index_choose(256, 255), BKV_INDEX_BITMAP);
}

Test(summary, layout_of_a_balance_section) {
    bkv_plane_layout_t layout;
    // 100 of 256 tokens, 128 and 72 dims, 3 and 4 bits, bitmap, weights.
    bkv_plane_layout(256, 100, 128, 72, 3, 4, BKV_INDEX_BITMAP, true, BKV_BF16, &layout);
    cr_assert_eq(layout.index_bytes, 32);
    cr_assert_eq(layout.weights, 32);
    cr_assert_eq(layout.key_params, 32 + 104);
    cr_assert_eq(layout.key_groups, 2); // (100 + 32) / 64
    cr_assert_eq(layout.key_group_tokens, 50);
    cr_assert_eq(layout.key_codes, 136 + 2 * 128 * 4);
    cr_assert_eq(layout.key_row, 48);
    cr_assert_eq(layout.key_bytes, 5968); // 136 + 1024 + 4800 = 5960, to a multiple of 16
    cr_assert_eq(layout.value_groups, 2); // 72 channels: 64 and 8
    cr_assert_eq(layout.value_codes, 800);
    cr_assert_eq(layout.value_row, 36);
    cr_assert_eq(layout.value_bytes, 4400);
}

Test(summary, layout_of_a_raw_section) {
    bkv_plane_layout_t layout;
    bkv_plane_layout(3, 3, 8, 24, BKV_BITS_NATIVE, BKV_BITS_NATIVE, BKV_INDEX_ALL, false, BKV_FP32, &layout);
    cr_assert_eq(layout.key_codes, 0);
    cr_assert_eq(layout.key_bytes, 96);
    cr_assert_eq(layout.value_codes, 0);
    cr_assert_eq(layout.value_bytes, 288);
    cr_assert_eq(layout.key_groups, 0);
}

Test(summary, key_groups_are_about_64_tokens) {
    static const uint32_t expected[][3] = {{1, 1, 1},    {95, 1, 95},  {96, 2, 48},       {159, 2, 80},
                                           {160, 3, 54}, {256, 4, 64}, {64065, 1001, 65}, {65536, 1024, 64}};
    for (int i = 0; i < 8; i++) {
        bkv_plane_layout_t layout;
        bkv_plane_layout(65536, expected[i][0], 8, 8, 4, 4, BKV_INDEX_BITMAP, true, BKV_BF16, &layout);
        cr_assert_eq(layout.key_groups, expected[i][1]);
        cr_assert_eq(layout.key_group_tokens, expected[i][2]);
    }
}

Test(summary, more_tokens_never_take_fewer_bytes) {
    uint64_t before = 0;
    for (uint32_t m = 1; m <= 70000; m++) {
        bkv_plane_layout_t layout;
        bkv_plane_layout(70000, m, 64, 64, 3, 3, bkv_index_choose(70000, m), true, BKV_BF16, &layout);
        uint64_t bytes = layout.key_bytes + layout.value_bytes;
        cr_assert(bytes >= before || m == 70000, "%u tokens", m); // all tokens need no index
        before = bytes;
    }
}
