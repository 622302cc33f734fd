// test_record_read.c - kernels/record_read.c and record_write.c: reading and slicing against the bit-by-bit reader.
#include "record.h"

#include "oracle.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>

static const bkv_codec_params_t codecs[] = {
    {.codec = BKV_CODEC_RAW},
    {.codec = BKV_CODEC_DENSE8},
    {.codec = BKV_CODEC_DENSE4},
    {.codec = BKV_CODEC_BALANCE, .rate = 5, .sink = 3, .seed = 1},  // 4 bits
    {.codec = BKV_CODEC_BALANCE, .rate = 16, .sink = 0, .seed = 2}, // 3 bits
    {.codec = BKV_CODEC_BALANCE, .rate = 2, .sink = 0, .seed = 3},  // every token, 8 and 4 bits
};

static void expect_section(const void *record, uint32_t layer, uint32_t head, const oracle_section_t *wanted) {
    bkv_section_view_t view;
    bkv_record_section(record, layer, head, &view);
    cr_assert_eq(view.tokens, wanted->m);
    float *k = oracle_alloc(view.tokens * view.key_dim * sizeof(float));
    float *v = oracle_alloc(view.tokens * view.value_dim * sizeof(float));
    float *logw = oracle_alloc(view.tokens * sizeof(float));
    uint32_t *index = oracle_alloc(view.tokens * sizeof(uint32_t));
    bkv_section_read(&view, k, v, logw, index);
    for (uint32_t t = 0; t < view.tokens; t++) {
        cr_assert_eq(index[t], wanted->index[t]);
        cr_assert(fabs((double)logw[t] - wanted->logw[t]) < 1e-6 * (1 + fabs(wanted->logw[t])));
        for (uint32_t i = 0; i < view.key_dim; i++) {
            double exact = wanted->k[t * view.key_dim + i];
            cr_assert(fabs((double)k[t * view.key_dim + i] - exact) <= 1e-6 * (1 + fabs(exact)));
        }
        for (uint32_t i = 0; i < view.value_dim; i++) {
            double exact = wanted->v[t * view.value_dim + i];
            cr_assert(fabs((double)v[t * view.value_dim + i] - exact) <= 1e-6 * (1 + fabs(exact)));
        }
    }
    // However it is read, every float is the same.
    float *plain = oracle_alloc(view.tokens * (view.key_dim + view.value_dim) * sizeof(float));
    if (view.key_bits != BKV_BITS_NATIVE) {
        bkv_ref_read_keys(&view, 0, view.tokens, plain);
        bkv_ref_read_values(&view, 0, view.tokens, plain + view.tokens * view.key_dim);
        cr_assert_arr_eq(plain, k, view.tokens * view.key_dim * sizeof(float));
        cr_assert_arr_eq(plain + view.tokens * view.key_dim, v, view.tokens * view.value_dim * sizeof(float));
    }
    free(plain);
    // Any range gives the same rows.
    for (uint32_t first = 0; first < view.tokens; first += 17) {
        uint32_t count = view.tokens - first < 29 ? view.tokens - first : 29;
        float *part = oracle_alloc(count * view.key_dim * sizeof(float));
        bkv_section_read_range(&view, first, count, part, NULL, NULL);
        cr_assert_arr_eq(part, k + first * view.key_dim, count * view.key_dim * sizeof(float));
        free(part);
    }
    free(k);
    free(v);
    free(logw);
    free(index);
}

Test(record_read, every_codec_and_dtype_reads_as_described) {
    for (int dtype = BKV_BF16; dtype <= BKV_FP32; dtype++) {
        for (size_t c = 0; c < sizeof(codecs) / sizeof(codecs[0]); c++) {
            bkv_shape_t shape = {2, 2, 203, 64, 104, (bkv_dtype_t)dtype}; // 104: three groups of 32, and a rest
            bkv_block_t block;
            oracle_block(&shape, c, 2, &block);
            size_t length;
            void *record = oracle_compress(&block, &codecs[c], 1000, &length);
            for (uint32_t i = 0; i < 4; i++) {
                oracle_section_t section;
                oracle_read(record, i / 2, i % 2, &section);
                expect_section(record, i / 2, i % 2, &section);
            }
        }
    }
}

Test(record_read, the_header_says_what_was_given) {
    bkv_shape_t shape = {3, 2, 100, 32, 16, BKV_FP16}, back;
    bkv_block_t block;
    oracle_block(&shape, 1, 1, &block);
    size_t length;
    bkv_record_header_t *header = oracle_compress(&block, &codecs[3], 4096, &length);
    bkv_record_shape(header, &back);
    cr_assert(back.layers == 3 && back.heads == 2 && back.tokens == 100 && back.key_dim == 32 && back.value_dim == 16 &&
              back.dtype == BKV_FP16);
    cr_assert_eq(header->length, length);
    cr_assert_eq(header->position, 4096);
    cr_assert_eq(header->tenant, 7);
    cr_assert_eq(header->rate, 5);
    cr_assert_eq(header->seed, 1);
    cr_assert_eq(header->key[5], (uint8_t)(5 + 4096));
    cr_assert_eq(header->checksum, 0);
    cr_assert_eq(header->flags, BKV_RECORD_WEIGHTS);
}

Test(record_read, a_slice_holds_the_same_sections) {
    for (size_t c = 0; c < sizeof(codecs) / sizeof(codecs[0]); c++) {
        bkv_shape_t shape = {4, 3, 130, 64, 32, BKV_BF16};
        bkv_block_t block;
        oracle_block(&shape, 9, 1, &block);
        size_t length, size = 0;
        void *record = oracle_compress(&block, &codecs[c], 0, &length);
        cr_assert_eq(bkv_record_slice(record, 1, 2, 1, 2, NULL, &size, NULL), BKV_OK);
        void *slice = oracle_exact(size);
        cr_assert_eq(bkv_record_slice(record, 1, 2, 1, 2, slice, &size, NULL), BKV_OK);
        bkv_error_t err = {0};
        cr_assert_eq(bkv_record_check(slice, size, &err), BKV_OK, "%s", err.message);
        const bkv_record_header_t *header = slice;
        cr_assert(header->first_layer == 1 && header->first_head == 1 && header->layers == 2 && header->heads == 2);
        cr_assert(header->flags & BKV_RECORD_SLICE);
        for (uint32_t i = 0; i < 4; i++) {
            oracle_section_t section;
            oracle_read(record, 1 + i / 2, 1 + i % 2, &section);
            expect_section(slice, i / 2, i % 2, &section);
        }
        // A slice of the slice counts from the model's first layer and head.
        size_t inner = 0;
        cr_assert_eq(bkv_record_slice(slice, 1, 1, 1, 1, NULL, &inner, NULL), BKV_OK);
        void *last = oracle_exact(inner);
        cr_assert_eq(bkv_record_slice(slice, 1, 1, 1, 1, last, &inner, NULL), BKV_OK);
        header = last;
        cr_assert(header->first_layer == 2 && header->first_head == 2);
        oracle_section_t section;
        oracle_read(record, 2, 2, &section);
        expect_section(last, 0, 0, &section);
    }
}

Test(record_read, the_whole_slice_is_the_record) {
    bkv_shape_t shape = {2, 2, 64, 32, 32, BKV_BF16};
    bkv_block_t block;
    oracle_block(&shape, 9, 1, &block);
    size_t length, size = 0;
    void *record = oracle_compress(&block, &codecs[0], 0, &length);
    cr_assert_eq(bkv_record_slice(record, 0, 2, 0, 2, NULL, &size, NULL), BKV_OK);
    cr_assert_eq(size, length);
    void *slice = oracle_exact(size);
    cr_assert_eq(bkv_record_slice(record, 0, 2, 0, 2, slice, &size, NULL), BKV_OK);
    cr_assert_arr_eq(slice, record, length);
}

Test(record_read, slices_outside_are_refused) {
    static const uint32_t bad[][4] = {{0, 0, 0, 1}, {0, 1, 0, 0}, {2, 1, 0, 1},          {0, 3, 0, 1},
                                      {0, 1, 2, 1}, {1, 2, 0, 1}, {1, UINT32_MAX, 0, 1}, {0, 1, UINT32_MAX, 1}};
    bkv_shape_t shape = {2, 2, 8, 8, 8, BKV_BF16};
    bkv_block_t block;
    oracle_block(&shape, 9, 1, &block);
    size_t length, size = 0;
    void *record = oracle_compress(&block, &codecs[0], 0, &length);
    for (int i = 0; i < 8; i++) {
        bkv_error_t err = {0};
        cr_assert_eq(bkv_record_slice(record, bad[i][0], bad[i][1], bad[i][2], bad[i][3], NULL, &size, &err),
                     BKV_INVALID_ARGUMENT);
        cr_assert(err.message[0] == 'l' || err.message[0] == 'h');
    }
    bkv_error_t err = {0};
    size = 100;
    cr_assert_eq(bkv_record_slice(record, 0, 1, 0, 1, oracle_alloc(1000), &size, &err), BKV_INVALID_ARGUMENT);
    cr_assert_eq(err.message[0], 'l');
}
