// test_fold.c - kernels/cpu/fold.c: budgets hold, what fits is concatenated, indices and weights speak of source tokens.
#include "codec.h"

#include "oracle.h"
#include "record.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define COUNT 6

static const bkv_codec_params_t kinds[] = {{.codec = BKV_CODEC_RAW},
                                           {.codec = BKV_CODEC_DENSE8},
                                           {.codec = BKV_CODEC_DENSE4},
                                           {.codec = BKV_CODEC_BALANCE, .rate = 8, .sink = 4, .seed = 1},
                                           {.codec = BKV_CODEC_BALANCE, .rate = 16, .sink = 4, .seed = 1}};

// Consecutive blocks of one sequence; kind 5 mixes all codecs.
static void children(const bkv_shape_t *shape, int kind, uint64_t position, const void **records) {
    for (uint32_t i = 0; i < COUNT; i++) {
        bkv_block_t block;
        size_t length;
        oracle_block(shape, i + 10, 1, &block);
        records[i] = oracle_compress(&block, &kinds[kind == 5 ? i % 5 : (uint32_t)kind], position + i * shape->tokens, &length);
    }
}

static bkv_status_t fold(const void *const *records, uint32_t count, uint64_t budget, uint64_t seed, void **record,
                         size_t *length, bkv_error_t *err) {
    const bkv_backend_t *backend = bkv_backend_get("ref");
    bkv_record_id_t id = {.tenant = 3};
    const bkv_fold_params_t params = {.budget = budget, .seed = seed};
    void *workspace = oracle_exact(bkv_fold_workspace(backend, records, count, budget));
    *record = oracle_exact((size_t)budget);
    bkv_status_t status = bkv_fold(backend, records, count, &id, &params, *record, workspace, length, err);
    free(workspace);
    if (status == BKV_OK) {
        bkv_error_t why = {0};
        cr_assert_eq(bkv_record_check(*record, *length, &why), BKV_OK, "%s", why.message);
        cr_assert(*length <= budget);
    }
    return status;
}

static uint64_t total_length(const void *const *records) {
    uint64_t sum = 0;
    for (uint32_t i = 0; i < COUNT; i++) {
        sum += ((const bkv_record_header_t *)records[i])->length;
    }
    return sum;
}

Test(fold, never_answers_more_than_its_budget) {
    bkv_shape_t shape = {2, 2, 150, 64, 48, BKV_BF16};
    oracle_random_t random = {1};
    uint32_t made = 0;
    for (int kind = 0; kind <= 5; kind++) {
        const void *records[COUNT];
        children(&shape, kind, 0, records);
        for (int i = 0; i < 12; i++) {
            uint64_t budget = (uint64_t)(1 + oracle_uniform(&random) * 1.2 * (double)total_length(records)) >> (i % 6);
            void *record;
            size_t length;
            bkv_error_t err = {0};
            bkv_status_t status = fold(records, COUNT, budget, 1, &record, &length, &err);
            cr_assert(status == BKV_OK || (budget < 4000 && strncmp(err.message, "budget", 6) == 0), "%s", err.message);
            made += status == BKV_OK;
        }
    }
    cr_assert(made > 50);
}

Test(fold, the_header_covers_all_children) {
    bkv_shape_t shape = {2, 2, 150, 64, 48, BKV_FP16};
    const void *records[COUNT];
    children(&shape, 3, 300, records);
    void *record;
    size_t length;
    cr_assert_eq(fold(records, COUNT, 20000, 5, &record, &length, NULL), BKV_OK);
    const bkv_record_header_t *header = record;
    cr_assert_eq(header->tokens, COUNT * 150);
    cr_assert_eq(header->position, 300);
    cr_assert_eq(header->codec, BKV_CODEC_BALANCE);
    cr_assert_eq(header->flags, BKV_RECORD_FOLD | BKV_RECORD_WEIGHTS);
    cr_assert_eq(header->rate, 0);
    cr_assert_eq(header->seed, 5);
    cr_assert_eq(header->tenant, 3);
    cr_assert_eq(header->checksum, 0);
}

Test(fold, weights_add_up_to_the_source_tokens) {
    bkv_shape_t shape = {1, 2, 150, 64, 48, BKV_BF16};
    for (int kind = 0; kind <= 5; kind++) {
        const void *records[COUNT];
        children(&shape, kind, 0, records);
        for (uint64_t budget = 6000; budget < 60000; budget *= 3) {
            void *record;
            size_t length;
            cr_assert_eq(fold(records, COUNT, budget, 1, &record, &length, NULL), BKV_OK);
            for (uint32_t head = 0; head < 2; head++) {
                oracle_section_t section;
                oracle_read(record, 0, head, &section);
                double sum = 0;
                for (uint32_t t = 0; t < section.m; t++) {
                    sum += exp(section.logw[t]);
                }
                cr_assert(fabs(sum - COUNT * 150) < 0.02 * COUNT * 150, "%g", sum);
            }
        }
    }
}

Test(fold, children_that_fit_are_concatenated) {
    bkv_shape_t shape = {2, 2, 150, 64, 48, BKV_BF16};
    for (int kind = 0; kind <= 5; kind++) {
        const void *records[COUNT];
        children(&shape, kind, 0, records);
        void *record;
        size_t length;
        cr_assert_eq(fold(records, COUNT, 600000, 1, &record, &length, NULL), BKV_OK);
        for (uint32_t i = 0; i < 4; i++) {
            oracle_section_t whole, part;
            oracle_read(record, i / 2, i % 2, &whole);
            uint32_t row = 0;
            for (uint32_t child = 0; child < COUNT; child++) {
                oracle_read(records[child], i / 2, i % 2, &part);
                for (uint32_t t = 0; t < part.m; t++, row++) {
                    cr_assert_eq(whole.index[row], child * 150 + part.index[t]);
                    cr_assert(fabs(whole.logw[row] - part.logw[t]) < 0.01);
                    for (uint32_t d = 0; d < 64; d++) {
                        cr_assert(fabs(whole.k[row * 64 + d] - part.k[t * 64 + d]) < 0.03); // int8 over about 8 sigma
                    }
                    for (uint32_t d = 0; d < 48; d++) {
                        cr_assert(fabs(whole.v[row * 48 + d] - part.v[t * 48 + d]) < 0.03);
                    }
                }
            }
            cr_assert_eq(row, whole.m);
        }
    }
}

Test(fold, one_record_that_fits_is_itself) {
    bkv_shape_t shape = {1, 1, 150, 64, 48, BKV_BF16};
    const void *records[COUNT];
    children(&shape, 1, 0, records);
    void *record;
    size_t length;
    cr_assert_eq(fold(records, 1, 100000, 1, &record, &length, NULL), BKV_OK);
    oracle_section_t a, b;
    oracle_read(record, 0, 0, &a);
    oracle_read(records[0], 0, 0, &b);
    cr_assert_eq(a.m, b.m);
}

Test(fold, is_deterministic) {
    bkv_shape_t shape = {1, 2, 150, 64, 48, BKV_BF16};
    const void *records[COUNT];
    children(&shape, 5, 0, records);
    void *a, *b, *c;
    size_t length, again;
    cr_assert_eq(fold(records, COUNT, 10000, 1, &a, &length, NULL), BKV_OK);
    cr_assert_eq(fold(records, COUNT, 10000, 1, &b, &again, NULL), BKV_OK);
    cr_assert(length == again && memcmp(a, b, length) == 0);
    cr_assert_eq(fold(records, COUNT, 10000, 2, &c, &again, NULL), BKV_OK);
    cr_assert(memcmp((uint8_t *)a + 128, (uint8_t *)c + 128, length - 128) != 0);
}

Test(fold, folds_fold_again) {
    bkv_shape_t shape = {1, 2, 150, 64, 48, BKV_BF16};
    const void *records[COUNT], *halves[2];
    children(&shape, 3, 0, records);
    size_t length;
    cr_assert_eq(fold(records, 3, 16000, 1, (void **)&halves[0], &length, NULL), BKV_OK);
    cr_assert_eq(fold(records + 3, 3, 16000, 1, (void **)&halves[1], &length, NULL), BKV_OK);
    void *record;
    cr_assert_eq(fold(halves, 2, 12000, 1, &record, &length, NULL), BKV_OK);
    const bkv_record_header_t *header = record;
    cr_assert_eq(header->tokens, COUNT * 150);
    oracle_section_t section;
    oracle_read(record, 0, 1, &section);
    double sum = 0;
    bool second_half = false;
    for (uint32_t t = 0; t < section.m; t++) {
        sum += exp(section.logw[t]);
        second_half = second_half || section.index[t] >= 450;
    }
    cr_assert(fabs(sum - 900) < 30, "%g", sum);
    cr_assert(second_half && section.index[0] < 450);
}

Test(fold, slices_fold_like_their_part) {
    bkv_shape_t shape = {2, 2, 150, 64, 48, BKV_BF16};
    const void *records[COUNT], *slices[COUNT];
    children(&shape, 3, 0, records);
    for (uint32_t i = 0; i < COUNT; i++) {
        size_t size = 0;
        cr_assert_eq(bkv_record_slice(records[i], 1, 1, 1, 1, NULL, &size, NULL), BKV_OK);
        void *slice = oracle_exact(size);
        cr_assert_eq(bkv_record_slice(records[i], 1, 1, 1, 1, slice, &size, NULL), BKV_OK);
        slices[i] = slice;
    }
    void *record;
    size_t length;
    cr_assert_eq(fold(slices, COUNT, 8000, 1, &record, &length, NULL), BKV_OK);
    const bkv_record_header_t *header = record;
    cr_assert(header->first_layer == 1 && header->first_head == 1 && header->layers == 1 && header->heads == 1);
    cr_assert(header->flags & BKV_RECORD_SLICE && header->flags & BKV_RECORD_FOLD);
}

// Attention error of a fold against the exact tokens, for random queries.
static double attention_error(const void *const *raw, const void *record) {
    oracle_section_t whole[COUNT], kept;
    for (uint32_t i = 0; i < COUNT; i++) {
        oracle_read(raw[i], 0, 0, &whole[i]);
    }
    oracle_read(record, 0, 0, &kept);
    oracle_random_t random = {1};
    double error = 0, norm = 0, a[48], b[48];
    for (uint32_t n = 0; n < 50; n++) {
        float q[64];
        for (uint32_t i = 0; i < 64; i++) {
            q[i] = (float)oracle_gauss(&random);
        }
        double x = oracle_attend(&kept, 1, q, 0.125, a), y = oracle_attend(whole, COUNT, q, 0.125, b);
        cr_assert(fabs(x - y) < 1, "log-sum-exp %g against %g", x, y);
        for (uint32_t i = 0; i < 48; i++) {
            error += (a[i] - b[i]) * (a[i] - b[i]);
            norm += b[i] * b[i];
        }
    }
    return sqrt(error / norm);
}

Test(fold, a_larger_budget_is_a_smaller_error) {
    bkv_shape_t shape = {1, 1, 150, 64, 48, BKV_BF16};
    const void *raw[COUNT];
    children(&shape, 0, 0, raw);
    double before = INFINITY;
    for (uint64_t budget = 4000; budget <= 128000; budget *= 2) {
        void *record;
        size_t length;
        cr_assert_eq(fold(raw, COUNT, budget, 1, &record, &length, NULL), BKV_OK);
        double error = attention_error(raw, record);
        cr_assert(error < before * 1.5, "%g after %g", error, before);
        before = error;
    }
    cr_assert(before < 0.05, "%g", before);
}

static void refused(const void *const *records, uint32_t count, uint64_t budget, const char *field) {
    void *record;
    size_t length;
    bkv_error_t err = {0};
    cr_assert_eq(fold(records, count, budget, 1, &record, &length, &err), BKV_INVALID_ARGUMENT, "%s", field);
    cr_assert_eq(strncmp(err.message, field, strlen(field)), 0, "'%s' does not name %s", err.message, field);
}

Test(fold, bad_arguments_name_their_field) {
    bkv_shape_t shape = {1, 2, 150, 64, 48, BKV_BF16};
    const void *records[COUNT];
    children(&shape, 5, 0, records);
    refused(records, 0, 10000, "records");
    refused(records, COUNT, 0, "budget");
    refused(records, COUNT, 200, "budget");
    const void *gap[] = {records[0], records[2]}, *backwards[] = {records[1], records[0]}, *twice[] = {records[0], records[0]};
    refused(gap, 2, 10000, "records");
    refused(backwards, 2, 10000, "records");
    refused(twice, 2, 10000, "records");
    bkv_shape_t others[] = {{2, 2, 150, 64, 48, BKV_BF16},
                            {1, 1, 150, 64, 48, BKV_BF16},
                            {1, 2, 150, 72, 48, BKV_BF16},
                            {1, 2, 150, 64, 56, BKV_BF16},
                            {1, 2, 150, 64, 48, BKV_FP32}};
    for (int i = 0; i < 5; i++) {
        const void *stranger[COUNT];
        children(&others[i], 0, 150, stranger);
        const void *mixed[] = {records[0], stranger[0]};
        refused(mixed, 2, 10000, "records");
    }
}

Test(fold, unquantised_children_beyond_float16_are_refused) {
    bkv_shape_t shape = {1, 1, 150, 64, 48, BKV_FP32};
    bkv_block_t block;
    size_t length;
    oracle_block(&shape, 1, 1, &block);
    oracle_put(&block, false, 0, 0, 9, 9, 1e6f);
    const void *records[] = {oracle_compress(&block, &kinds[0], 0, &length)};
    refused(records, 1, 100000, "records: 0 has a key beyond 65504");
}
