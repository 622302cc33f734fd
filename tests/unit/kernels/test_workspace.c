// test_workspace.c - what a caller's workspace and record memory held before must not show in the result: nothing is read that was
// not written first.
#include "codec.h"

#include "oracle.h"

#include <criterion/criterion.h>
#include <string.h>

// Zeros, NaNs, ones, large floats, and small ones.
static const uint8_t fillings[] = {0x00, 0xff, 0x3f, 0x7e, 0x01};
enum { FILLINGS = sizeof(fillings) };

static const bkv_record_id_t id = {.position = 512};

static uint8_t *compress_over(const bkv_block_t *block, const bkv_codec_params_t *params, uint8_t filling, size_t *length) {
    const bkv_backend_t *ref = bkv_backend_get("ref");
    size_t capacity = (size_t)bkv_codec_bound(&block->shape, params),
           scratch = bkv_compress_workspace(ref, &block->shape, params);
    uint8_t *record = oracle_exact(capacity), *workspace = oracle_exact(scratch);
    memset(record, filling, capacity);
    memset(workspace, filling, scratch);
    bkv_error_t err = {0};
    cr_assert_eq(bkv_compress(ref, block, params, &id, record, capacity, workspace, length, &err), BKV_OK, "%s", err.message);
    cr_assert_eq(bkv_record_check(record, *length, &err), BKV_OK, "%s", err.message);
    return record;
}

static uint8_t *fold_over(const void *const *records, uint32_t count, uint64_t budget, uint8_t filling, size_t *length) {
    const bkv_backend_t *ref = bkv_backend_get("ref");
    size_t scratch = bkv_fold_workspace(ref, records, count, budget);
    uint8_t *record = oracle_exact((size_t)budget), *workspace = oracle_exact(scratch);
    memset(record, filling, (size_t)budget);
    memset(workspace, filling, scratch);
    bkv_error_t err = {0};
    cr_assert_eq(
        bkv_fold(ref, records, count, &id, &(bkv_fold_params_t){.budget = budget, .seed = 1}, record, workspace, length, &err),
        BKV_OK, "%s", err.message);
    cr_assert_eq(bkv_record_check(record, *length, &err), BKV_OK, "%s", err.message);
    return record;
}

Test(workspace, compress_reads_nothing_old) {
    static const bkv_codec_params_t params[] = {
        {.codec = BKV_CODEC_RAW},
        {.codec = BKV_CODEC_DENSE8},
        {.codec = BKV_CODEC_DENSE4},
        {.codec = BKV_CODEC_BALANCE, .rate = 4, .sink = 32, .seed = 3},
        {.codec = BKV_CODEC_BALANCE, .rate = 8, .sink = 32, .seed = 3},
        {.codec = BKV_CODEC_BALANCE, .rate = 16, .sink = 600, .seed = 3},
        {.codec = BKV_CODEC_BALANCE, .rate = 32, .sink = 32, .seed = 3},
    };
    static const bkv_shape_t shapes[] = {
        {2, 2, 256, 64, 64, BKV_BF16}, {1, 3, 193, 72, 40, BKV_FP16}, {1, 1, 131, 128, 8, BKV_FP32}};
    for (size_t s = 0; s < sizeof(shapes) / sizeof(shapes[0]); s++) {
        bkv_block_t block;
        oracle_block(&shapes[s], s + 1, 1, &block);
        for (size_t p = 0; p < sizeof(params) / sizeof(params[0]); p++) {
            size_t length;
            uint8_t *first = compress_over(&block, &params[p], fillings[0], &length);
            for (int f = 1; f < FILLINGS; f++) {
                size_t other_length;
                uint8_t *other = compress_over(&block, &params[p], fillings[f], &other_length);
                cr_assert_eq(other_length, length);
                cr_assert(memcmp(other, first, length) == 0, "shape %zu, params %zu, filling %02x", s, p, fillings[f]);
                free(other);
            }
            free(first);
        }
    }
}

Test(workspace, fold_reads_nothing_old) {
    const bkv_shape_t shape = {2, 2, 128, 64, 32, BKV_BF16};
    const bkv_codec_params_t children[] = {{.codec = BKV_CODEC_DENSE4}, {.codec = BKV_CODEC_BALANCE, .rate = 8, .seed = 1}};
    enum { COUNT = 5 };
    for (size_t c = 0; c < 2; c++) {
        void *records[COUNT];
        uint64_t bytes = 0;
        for (uint32_t i = 0; i < COUNT; i++) {
            bkv_block_t block;
            size_t length;
            oracle_block(&shape, 10 + i, 1, &block);
            records[i] = oracle_compress(&block, &children[c], 512 + 128ull * i, &length);
            bytes += bkv_shape_bytes(&shape);
        }
        for (uint64_t rate = 2; rate <= 32; rate *= 2) {
            uint64_t budget = bytes / rate / 16 * 16;
            size_t length;
            uint8_t *first = fold_over((const void *const *)records, COUNT, budget, fillings[0], &length);
            for (int f = 1; f < FILLINGS; f++) {
                size_t other_length;
                uint8_t *other = fold_over((const void *const *)records, COUNT, budget, fillings[f], &other_length);
                cr_assert_eq(other_length, length);
                cr_assert(memcmp(other, first, length) == 0, "children %zu, rate %llu, filling %02x", c,
                          (unsigned long long)rate, fillings[f]);
                free(other);
            }
            free(first);
        }
    }
}

Test(workspace, is_no_larger_than_promised) {
    // codec.h on folds; a compression needs what a fold of one record does.
    for (const bkv_backend_t *const *list = bkv_backend_list(); *list; list++) {
        for (uint32_t dim = 8; (*list)->checks_values && dim <= 1024; dim *= 2) { // CPU backends, whether they run here or not
            bkv_shape_t shape = {1, 1, 300, dim, 8, BKV_BF16};
            const bkv_codec_params_t balance = {.codec = BKV_CODEC_BALANCE, .rate = 8};
            cr_assert_leq((*list)->compress_workspace(&shape, &balance), 655360 + 6144 * (size_t)dim + 21 * 300 + 64 * 8,
                          "%s, %u", (*list)->name, dim);
        }
    }
}
