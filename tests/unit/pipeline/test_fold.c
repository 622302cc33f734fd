// test_fold.c - one bounded record for a prefix, under the documented key, made once.
#include "fixture.h"

#include "kernels/seal.h"

#include <criterion/criterion.h>
#include <openssl/evp.h>
#include <stdlib.h>
#include <string.h>

#define BLOCKS 4

static void put_prefix(fixture_t *fixture, bkv_codec_t codec, bkv_key_t keys[BLOCKS]) {
    for (uint32_t i = 0; i < BLOCKS; i++) {
        fixture_put_block(fixture, i, 64 * i, 64, codec);
        keys[i] = fixture_key(i);
    }
}

static bkv_status_t fold(fixture_t *fixture, const bkv_key_t *keys, uint32_t count, uint64_t budget, outcome_t *outcome) {
    outcome_init(outcome);
    const bkv_fold_args_t args = {.spec_id = fixture->model.id, .keys = keys, .count = count, .budget = budget};
    bkv_status_t status = bkv_fold_start(fixture->pipeline, &args, outcome_fold_done, outcome, &outcome->error);
    if (status == BKV_OK) {
        outcome_wait(outcome);
        status = outcome->error.status;
    }
    return status;
}

static bkv_key_t documented_key(const fixture_t *fixture, const bkv_key_t *keys, uint32_t count, uint64_t budget) {
    uint8_t text[11 + 16 + 8 + 32 * BLOCKS], digest[32];
    memcpy(text, "bkv-fold-1\0", 11);
    memcpy(text + 11, fixture->model.id.bytes, 16);
    for (int i = 0; i < 8; i++) {
        text[27 + i] = (uint8_t)(budget >> (8 * i));
    }
    memcpy(text + 35, keys, 32 * count);
    EVP_Digest(text, 35 + 32 * count, digest, NULL, EVP_sha256(), NULL);
    bkv_key_t key;
    memcpy(key.bytes, digest, 32);
    return key;
}

Test(pipeline_fold, is_bounded_sealed_and_found_again) {
    fixture_t fixture;
    fixture_open(&fixture, 0, 8);
    bkv_key_t keys[BLOCKS];
    put_prefix(&fixture, BKV_CODEC_DENSE8, keys);
    const uint64_t budget = 9000;
    outcome_t first, second;
    cr_assert_eq(fold(&fixture, keys, BLOCKS, budget, &first), BKV_OK, "%s", first.error.message);
    bkv_key_t key = documented_key(&fixture, keys, BLOCKS, budget);
    cr_assert_arr_eq(first.fold.records[0].key.bytes, key.bytes, 32);
    cr_assert_leq(first.fold.records[0].delivery.length, budget);
    cr_assert_eq(bkv_record_verify(first.fold.records[0].delivery.data, first.fold.records[0].delivery.length, NULL), BKV_OK);
    cr_assert_eq(bkv_record_check(first.fold.records[0].delivery.data, first.fold.records[0].delivery.length, NULL), BKV_OK);
    const bkv_record_header_t *header = (const bkv_record_header_t *)first.fold.records[0].delivery.data;
    cr_assert_eq(header->flags & BKV_RECORD_FOLD, BKV_RECORD_FOLD);
    cr_assert_eq(header->tokens, 64 * BLOCKS);
    cr_assert_eq(header->position, 0);
    cr_assert_arr_eq(header->key, key.bytes, 32);
    cr_assert_eq(header->tenant, fixture.model.tenant);

    cr_assert_eq(fold(&fixture, keys, BLOCKS, budget, &second), BKV_OK);
    cr_assert_eq(second.fold.records[0].delivery.data, first.fold.records[0].delivery.data);
    bkv_pipeline_metrics_t metrics = fixture_metrics(&fixture);
    cr_assert_eq(metrics.folds_total, 1);
    cr_assert_eq(metrics.fold_hits_total, 1);
    bkv_fold_release(fixture.pipeline, &first.fold);
    bkv_fold_release(fixture.pipeline, &second.fold);
    fixture_close(&fixture);
}

// A budget of far more than the records need must not reserve (and evict for) all of it.
Test(pipeline_fold, huge_budget_is_harmless) {
    fixture_t fixture;
    fixture_open(&fixture, 0, 8);
    bkv_key_t keys[BLOCKS];
    put_prefix(&fixture, BKV_CODEC_RAW, keys);
    outcome_t outcome;
    cr_assert_eq(fold(&fixture, keys, BLOCKS, UINT64_MAX, &outcome), BKV_OK, "%s", outcome.error.message);
    cr_assert_eq(((const bkv_record_header_t *)outcome.fold.records[0].delivery.data)->tokens, 64 * BLOCKS);
    bkv_fold_release(fixture.pipeline, &outcome.fold);
    cr_assert_eq(fixture_store_metrics(&fixture).entries, BLOCKS + 1);
    fixture_close(&fixture);
}

Test(pipeline_fold, missing_key_is_named_and_nothing_stays_pinned) {
    fixture_t fixture;
    fixture_open(&fixture, 0, 8);
    bkv_key_t keys[BLOCKS];
    put_prefix(&fixture, BKV_CODEC_DENSE8, keys);
    keys[2] = fixture_key(77);
    outcome_t outcome;
    cr_assert_eq(fold(&fixture, keys, BLOCKS, 9000, &outcome), BKV_NOT_FOUND);
    cr_assert_eq(strncmp(outcome.error.message, "keys[2]: ", 9), 0, "%s", outcome.error.message);
    cr_assert_eq(outcome.fold.count, 0);
    cr_assert_eq(fixture_store_metrics(&fixture).entries, BLOCKS);
    fixture_close(&fixture);
}

Test(pipeline_fold, bad_requests) {
    fixture_t fixture;
    fixture_open(&fixture, 0, 8);
    bkv_key_t keys[FIXTURE_BATCH + 1];
    put_prefix(&fixture, BKV_CODEC_DENSE8, keys);
    for (uint32_t i = BLOCKS; i <= FIXTURE_BATCH; i++) {
        keys[i] = fixture_key(i);
    }
    outcome_t outcome;
    cr_assert_eq(fold(&fixture, keys, 0, 9000, &outcome), BKV_INVALID_ARGUMENT);
    cr_assert_eq(fold(&fixture, keys, FIXTURE_BATCH + 1, 9000, &outcome), BKV_RESOURCE_EXHAUSTED);
    cr_assert_not_null(strstr(outcome.error.message, "max_batch"));
    cr_assert_eq(fold(&fixture, keys, BLOCKS, 0, &outcome), BKV_INVALID_ARGUMENT);
    cr_assert_eq(strncmp(outcome.error.message, "budget_bytes:", 13), 0);
    cr_assert_eq(fold(&fixture, keys, BLOCKS, 200, &outcome), BKV_INVALID_ARGUMENT, "smaller than any record of this shape");
    bkv_key_t gap[2] = {keys[0], keys[2]};
    cr_assert_eq(fold(&fixture, gap, 2, 9000, &outcome), BKV_INVALID_ARGUMENT);
    bkv_key_t backwards[2] = {keys[1], keys[0]};
    cr_assert_eq(fold(&fixture, backwards, 2, 9000, &outcome), BKV_INVALID_ARGUMENT);
    cr_assert_eq(fixture_store_metrics(&fixture).entries, BLOCKS);
    bkv_pipeline_drain(fixture.pipeline);
    cr_assert_eq(fold(&fixture, keys, BLOCKS, 9000, &outcome), BKV_BUSY);
    fixture_close(&fixture);
}
