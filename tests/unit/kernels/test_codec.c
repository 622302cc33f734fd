// test_codec.c - kernels/codec.c and dense.c: what goes in comes out within its bound, rates hold, bad input is named.
#include "codec.h"

#include "oracle.h"
#include "record.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const bkv_codec_params_t raw = {.codec = BKV_CODEC_RAW};
static const bkv_codec_params_t dense8 = {.codec = BKV_CODEC_DENSE8};
static const bkv_codec_params_t dense4 = {.codec = BKV_CODEC_DENSE4};
static const bkv_codec_params_t balance8 = {.codec = BKV_CODEC_BALANCE, .rate = 8, .sink = 4, .seed = 1};

Test(codec, raw_is_the_payload) {
    for (int dtype = BKV_BF16; dtype <= BKV_FP32; dtype++) {
        bkv_shape_t shape = {3, 2, 33, 24, 40, (bkv_dtype_t)dtype};
        bkv_block_t block;
        oracle_block(&shape, 1, 1, &block);
        size_t length;
        const uint8_t *record = oracle_compress(&block, &raw, 0, &length);
        cr_assert_eq(length, bkv_raw_payload(&shape) + bkv_shape_bytes(&shape));
        cr_assert_eq(length, bkv_codec_bound(&shape, &raw));
        cr_assert_arr_eq(record + bkv_raw_payload(&shape), block.keys, bkv_shape_bytes(&shape));
    }
}

Test(codec, raw_received_in_place_is_the_same_record) {
    bkv_shape_t shape = {3, 2, 33, 24, 40, BKV_BF16};
    bkv_block_t block, inside;
    oracle_block(&shape, 1, 1, &block);
    size_t length, again;
    const uint8_t *record = oracle_compress(&block, &raw, 0, &length);
    uint8_t *other = oracle_exact(length);
    memcpy(other + bkv_raw_payload(&shape), block.keys, bkv_shape_bytes(&shape));
    bkv_block_from_payload(&shape, other + bkv_raw_payload(&shape), &inside);
    bkv_record_id_t id;
    const bkv_record_header_t *header = (const bkv_record_header_t *)record;
    memcpy(id.key.bytes, header->key, sizeof(id.key));
    memcpy(id.spec_id.bytes, header->spec_id, sizeof(id.spec_id));
    id.tenant = header->tenant;
    id.position = header->position;
    bkv_status_t status = bkv_compress(bkv_backend_get(NULL), &inside, &raw, &id, other, length, NULL, &again, NULL);
    cr_assert_eq(status, BKV_OK);
    cr_assert_eq(again, length);
    cr_assert_arr_eq(other, record, length);
}

// The largest error of a section, in units of its largest element.
static double worst_error(const bkv_block_t *block, const void *record, uint32_t layer, uint32_t head) {
    oracle_section_t section;
    oracle_read(record, layer, head, &section);
    double worst = 0, largest = 0;
    for (uint32_t t = 0; t < section.m; t++) {
        for (uint32_t i = 0; i < section.key_dim; i++) {
            double exact = oracle_element(block, false, layer, head, section.index[t], i);
            worst = fmax(worst, fabs(section.k[t * section.key_dim + i] - exact));
            largest = fmax(largest, fabs(exact));
        }
        for (uint32_t i = 0; i < section.value_dim; i++) {
            double exact = oracle_element(block, true, layer, head, section.index[t], i);
            worst = fmax(worst, fabs(section.v[t * section.value_dim + i] - exact));
            largest = fmax(largest, fabs(exact));
        }
    }
    return worst / largest;
}

Test(codec, dense_errors_stay_within_half_a_step) {
    for (int dtype = BKV_BF16; dtype <= BKV_FP32; dtype++) {
        bkv_shape_t shape = {2, 3, 101, 48, 72, (bkv_dtype_t)dtype};
        bkv_block_t block;
        oracle_block(&shape, 7, 3, &block);
        size_t length;
        // The range is at most twice the largest element.
        void *record = oracle_compress(&block, &dense8, 0, &length);
        cr_assert_eq(length, bkv_codec_bound(&shape, &dense8));
        for (uint32_t i = 0; i < 6; i++) {
            cr_assert(worst_error(&block, record, i / 3, i % 3) < 1.0 / 255 + 0.002);
        }
        record = oracle_compress(&block, &dense4, 0, &length);
        cr_assert_eq(length, bkv_codec_bound(&shape, &dense4));
        for (uint32_t i = 0; i < 6; i++) {
            double error = worst_error(&block, record, i / 3, i % 3);
            cr_assert(error < 1.0 / 15 + 0.002 && error > 0.02, "%g", error);
        }
    }
}

Test(codec, strides_do_not_matter) {
    static const bkv_codec_params_t *all[] = {&raw, &dense8, &dense4, &balance8};
    bkv_shape_t shape = {2, 3, 70, 16, 24, BKV_FP16};
    bkv_block_t block, spread;
    oracle_block(&shape, 2, 1, &block);
    // [token][head][layer][dim] with gaps: what an engine's own pages look like.
    spread = block;
    spread.key_stride = (bkv_stride_t){.layer = 2 * 16 + 6, .head = 2 * (2 * 16 + 6), .token = 6 * (2 * 16 + 6) + 10};
    spread.value_stride = (bkv_stride_t){.layer = 2 * 24 + 2, .head = 2 * (2 * 24 + 2), .token = 6 * (2 * 24 + 2) + 4};
    spread.keys = oracle_alloc(70 * (size_t)spread.key_stride.token);
    spread.values = oracle_alloc(70 * (size_t)spread.value_stride.token);
    for (uint32_t n = 0; n < 2 * 3 * 70; n++) {
        uint32_t layer = n / 210, head = n / 70 % 3, token = n % 70;
        for (uint32_t i = 0; i < 24; i++) {
            if (i < 16) {
                oracle_put(&spread, false, layer, head, token, i, (float)oracle_element(&block, false, layer, head, token, i));
            }
            oracle_put(&spread, true, layer, head, token, i, (float)oracle_element(&block, true, layer, head, token, i));
        }
    }
    for (int i = 0; i < 4; i++) {
        size_t a_length, b_length;
        void *a = oracle_compress(&block, all[i], 0, &a_length), *b = oracle_compress(&spread, all[i], 0, &b_length);
        cr_assert_eq(a_length, b_length);
        cr_assert_arr_eq(a, b, a_length);
    }
}

Test(codec, nan_and_infinity_are_named) {
    static const bkv_codec_params_t *all[] = {&raw, &dense8, &dense4, &balance8};
    for (int dtype = BKV_BF16; dtype <= BKV_FP32; dtype++) {
        for (int c = 0; c < 4; c++) {
            bkv_shape_t shape = {3, 2, 96, 16, 24, (bkv_dtype_t)dtype};
            bkv_block_t block;
            bkv_error_t err = {0};
            oracle_block(&shape, 3, 1, &block);
            oracle_put(&block, c % 2, 2, 1, 40 + (uint32_t)c, 15, c < 2 ? NAN : -INFINITY);
            cr_assert_eq(oracle_try(&block, all[c], 0, &err), BKV_INVALID_ARGUMENT);
            char wanted[80];
            snprintf(wanted, sizeof(wanted), "%s: NaN or infinity at layer 2, head 1, token %d", c % 2 ? "v" : "k", 40 + c);
            cr_assert_str_eq(err.message, wanted);
        }
    }
}

Test(codec, what_float16_cannot_hold_is_for_raw_alone) {
    bkv_shape_t shape = {1, 1, 96, 16, 16, BKV_FP32};
    bkv_block_t block;
    bkv_error_t err = {0};
    oracle_block(&shape, 3, 1, &block);
    oracle_put(&block, true, 0, 0, 5, 3, 65505.0f);
    cr_assert_eq(oracle_try(&block, &raw, 0, &err), BKV_OK);
    cr_assert_eq(oracle_try(&block, &dense8, 0, &err), BKV_INVALID_ARGUMENT);
    cr_assert(strstr(err.message, "v: a value beyond 65504 at layer 0, head 0, token 5"), "%s", err.message);
    cr_assert_eq(oracle_try(&block, &balance8, 0, &err), BKV_INVALID_ARGUMENT);
    oracle_put(&block, true, 0, 0, 5, 3, -65504.0f);
    cr_assert_eq(oracle_try(&block, &dense8, 0, &err), BKV_OK);
    cr_assert_eq(oracle_try(&block, &balance8, 0, &err), BKV_OK);
}

Test(codec, rates_hold_for_all_shapes) {
    static const uint32_t rates[] = {2, 3, 4, 8, 16, 32, 64};
    static const uint32_t dims[][2] = {{128, 128}, {64, 192}, {576, 512}, {8, 8}, {256, 64}};
    static const uint32_t tokens[] = {7, 64, 192, 256, 700};
    oracle_random_t random = {1};
    uint32_t made = 0, refused = 0;
    for (int d = 0; d < 5; d++) {
        for (int t = 0; t < 5; t++) {
            bkv_shape_t shape = {1 + oracle_next(&random) % 3,  1 + oracle_next(&random) % 2, tokens[t], dims[d][0], dims[d][1],
                                 (bkv_dtype_t)(1 + (d + t) % 3)};
            bkv_block_t block;
            oracle_block(&shape, 5, 2, &block);
            uint64_t bf16 = 2ull * shape.layers * shape.heads * shape.tokens * (shape.key_dim + shape.value_dim);
            for (int r = 0; r < 7; r++) {
                bkv_codec_params_t params = {.codec = BKV_CODEC_BALANCE, .rate = rates[r], .sink = 32, .seed = 9};
                bkv_error_t err = {0};
                if (oracle_try(&block, &params, 0, &err) != BKV_OK) {
                    cr_assert(strstr(err.message, "too few for rate"), "%s", err.message);
                    cr_assert(shape.tokens < 256 || shape.key_dim == 8 || rates[r] > 16, "%u tokens at %u", shape.tokens,
                              rates[r]);
                    refused++;
                    continue;
                }
                size_t length;
                oracle_compress(&block, &params, 0, &length);
                cr_assert((uint64_t)length * rates[r] <= bf16);
                cr_assert(length <= bkv_codec_bound(&shape, &params));
                // And the bytes are used: rounding, and tokens being whole, cost little in blocks of usual size.
                if (shape.tokens >= 256 && shape.key_dim >= 64 && rates[r] > 4 && rates[r] <= 16) {
                    cr_assert((double)length * rates[r] > 0.9 * (double)bf16, "%zu of %g", length * rates[r], (double)bf16);
                }
                made++;
            }
        }
    }
    cr_assert(made > 100 && refused > 10, "%u made, %u refused", made, refused);
}

Test(codec, the_same_input_gives_the_same_bytes) {
    bkv_shape_t shape = {2, 2, 256, 64, 64, BKV_BF16};
    bkv_block_t block;
    oracle_block(&shape, 6, 2, &block);
    size_t length, again;
    void *a = oracle_compress(&block, &balance8, 256, &length), *b = oracle_compress(&block, &balance8, 256, &again);
    cr_assert_eq(length, again);
    cr_assert_arr_eq(a, b, length);
    bkv_codec_params_t params = balance8;
    params.seed = 2;
    void *c = oracle_compress(&block, &params, 256, &again);
    cr_assert_eq(length, again);
    cr_assert(memcmp((uint8_t *)a + 128, (uint8_t *)c + 128, length - 128) != 0, "the seed does nothing");
}

Test(codec, a_section_depends_on_nothing_but_itself) {
    bkv_shape_t shape = {2, 2, 256, 64, 64, BKV_BF16};
    bkv_block_t block;
    oracle_block(&shape, 6, 2, &block);
    size_t length;
    void *a = oracle_compress(&block, &balance8, 256, &length);
    for (uint32_t token = 0; token < 256; token++) {
        oracle_put(&block, false, 1, 0, token, 3, 9);
    }
    void *b = oracle_compress(&block, &balance8, 256, &length);
    for (uint32_t i = 0; i < 4; i++) {
        oracle_section_t x, y;
        oracle_read(a, i / 2, i % 2, &x);
        oracle_read(b, i / 2, i % 2, &y);
        bool same = memcmp(x.k, y.k, x.m * 64 * sizeof(double)) == 0;
        cr_assert_eq(same, i != 2);
    }
}

static void refused(const bkv_block_t *block, const bkv_codec_params_t *params, uint64_t position, const char *field) {
    bkv_error_t err = {0};
    size_t length;
    bkv_record_id_t id = {.position = position};
    void *record = oracle_alloc(1 << 20);
    bkv_status_t status =
        bkv_compress(bkv_backend_get("ref"), block, params, &id, record, 1 << 20, oracle_alloc(1 << 22), &length, &err);
    cr_assert_eq(status, BKV_INVALID_ARGUMENT, "%s", field);
    cr_assert_eq(strncmp(err.message, field, strlen(field)), 0, "'%s' does not name %s", err.message, field);
}

Test(codec, bad_arguments_name_their_field) {
    bkv_shape_t shape = {1, 1, 64, 16, 16, BKV_BF16};
    bkv_block_t good, block;
    oracle_block(&shape, 6, 2, &good);
    bkv_codec_params_t params;
    block = good, block.shape.key_dim = 20, refused(&block, &raw, 0, "key_dim");
    block = good, block.shape.tokens = 0, refused(&block, &raw, 0, "tokens");
    params = raw, params.codec = (bkv_codec_t)9, refused(&good, &params, 0, "codec");
    params = balance8, params.rate = 1, refused(&good, &params, 0, "rate");
    params = balance8, params.rate = 65, refused(&good, &params, 0, "rate");
    refused(&good, &raw, UINT64_MAX, "position");
    block = good, block.shape.layers = 1024, block.shape.heads = 64, block.shape.tokens = 1 << 24,
    refused(&block, &raw, 0, "tokens");
    bkv_error_t err = {0};
    size_t length;
    bkv_record_id_t id = {0};
    uint64_t bound = bkv_codec_bound(&shape, &raw);
    cr_assert_eq(bkv_compress(bkv_backend_get("ref"), &good, &raw, &id, oracle_alloc(8192), bound - 1, NULL, &length, &err),
                 BKV_INVALID_ARGUMENT);
    cr_assert_eq(strncmp(err.message, "capacity", 8), 0);
}

Test(codec, backends_are_found_by_name) {
    cr_assert_str_eq(bkv_backend_get("ref")->name, "ref");
    cr_assert_not_null(bkv_backend_get(NULL));
    cr_assert_eq(bkv_backend_get("auto"), bkv_backend_get(NULL));
    cr_assert_null(bkv_backend_get("none of ours"));
    const bkv_backend_t *const *list = bkv_backend_list();
    cr_assert_not_null(list[0]);
    for (; *list; list++) {
        if ((*list)->available()) {
            cr_assert_eq(bkv_backend_get((*list)->name), *list);
        }
    }
}

Test(codec, a_raw_record_may_begin_before_its_payload_is_there) {
    bkv_shape_t shape = {2, 3, 20, 16, 24, BKV_FP16};
    bkv_block_t block;
    oracle_block(&shape, 1, 1, &block);
    size_t length;
    const uint8_t *record = oracle_compress(&block, &raw, 64, &length);
    const bkv_record_header_t *header = (const bkv_record_header_t *)record;
    bkv_record_id_t id = {.tenant = header->tenant, .position = header->position};
    memcpy(id.key.bytes, header->key, sizeof(id.key));
    memcpy(id.spec_id.bytes, header->spec_id, sizeof(id.spec_id));
    uint8_t *other = oracle_exact(length);
    cr_assert_eq(bkv_raw_begin(&shape, &id, other), length);
    memcpy(other + bkv_raw_payload(&shape), block.keys, bkv_shape_bytes(&shape));
    cr_assert_arr_eq(other, record, length);
    cr_assert(bkv_values_finite(BKV_FP16, block.keys, 64));
    oracle_put(&block, false, 0, 0, 1, 2, INFINITY);
    cr_assert_not(bkv_values_finite(BKV_FP16, block.keys, 64));
}
