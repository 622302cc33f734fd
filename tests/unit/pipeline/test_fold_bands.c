// test_fold_bands.c - folds by age, and what one more block costs: bands under one budget, each under its documented key, made
// once; nodes of the tree kept, lost and made anew without any difference in what is answered.
#include "fixture.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 64
#define MANY  100

static void put_prefix(fixture_t *fixture, uint32_t count, bkv_key_t *keys) {
    for (uint32_t i = 0; i < count; i++) {
        fixture_put_block(fixture, i, (uint64_t)BLOCK * i, BLOCK, BKV_CODEC_DENSE8);
        keys[i] = fixture_key(i);
    }
}

static bkv_status_t fold(fixture_t *fixture, bkv_fold_args_t args, const char *profile, outcome_t *outcome) {
    args.spec_id = fixture->model.id;
    cr_assert_eq(bkv_profile_parse(profile, &args.profile, NULL), BKV_OK);
    outcome_init(outcome);
    bkv_status_t status = bkv_fold_start(fixture->pipeline, &args, outcome_fold_done, outcome, &outcome->error);
    if (status == BKV_OK) {
        outcome_wait(outcome);
        status = outcome->error.status;
    }
    return status;
}

static const bkv_record_header_t *record_of(const outcome_t *outcome, uint32_t i) {
    return (const bkv_record_header_t *)outcome->fold.records[i].delivery.data;
}

// The records follow one another from position 0 to the end, and are the keys that they say. Returns their bytes.
static uint64_t assert_covers(const outcome_t *outcome, uint64_t tokens) {
    uint64_t position = 0, bytes = 0;
    for (uint32_t i = 0; i < outcome->fold.count; i++) {
        const bkv_record_header_t *header = record_of(outcome, i);
        cr_assert_eq(header->position, position);
        cr_assert_arr_eq(header->key, outcome->fold.records[i].key.bytes, BKV_KEY_BYTES);
        cr_assert_eq(header->flags & BKV_RECORD_FOLD, BKV_RECORD_FOLD);
        cr_assert_eq(bkv_record_check(header, header->length, NULL), BKV_OK);
        position += header->tokens;
        bytes += header->length;
    }
    cr_assert_eq(position, tokens);
    return bytes;
}

Test(fold_bands, one_record_each_within_the_budget) {
    fixture_t fixture;
    bkv_key_t keys[32];
    outcome_t first, second, third;
    fixture_open(&fixture, 0, 8);
    put_prefix(&fixture, 32, keys);
    const bkv_fold_args_t args = {.keys = keys, .count = 32, .budget = 60000};
    cr_assert_eq(fold(&fixture, args, "128:3,512:8,:24", &first), BKV_OK, "%s", first.error.message);
    cr_assert_eq(first.fold.count, 3);
    uint64_t bytes = assert_covers(&first, 32 * BLOCK);
    cr_assert(bytes <= 60000 && bytes > 50000, "%llu bytes", (unsigned long long)bytes);
    for (uint32_t i = 1; i < 3; i++) {
        const bkv_record_header_t *older = record_of(&first, i - 1), *newer = record_of(&first, i);
        cr_assert_gt(newer->length * older->tokens, older->length * newer->tokens, "newer bands are denser");
    }
    bkv_pipeline_metrics_t metrics = fixture_metrics(&fixture);
    cr_assert(metrics.folds_total == 3 && metrics.fold_hits_total == 0);

    cr_assert_eq(fold(&fixture, args, "128:3,512:8,:24", &second), BKV_OK);
    for (uint32_t i = 0; i < 3; i++) {
        cr_assert_eq(record_of(&second, i), record_of(&first, i), "the very same record");
    }
    metrics = fixture_metrics(&fixture);
    cr_assert(metrics.folds_total == 3 && metrics.fold_hits_total == 3);

    // A band is the fold of its own blocks under its own bytes: the oldest one again, asked for by itself.
    uint32_t oldest = record_of(&first, 0)->tokens / BLOCK;
    bkv_fold_args_t alone = {.keys = keys, .count = oldest};
    bool found = false;
    for (alone.budget = record_of(&first, 0)->length; alone.budget < 60000 && !found; alone.budget += 16) {
        bkv_key_t key;
        cr_assert_eq(bkv_fold_key(&fixture.model, keys, oldest, alone.budget, &key, NULL), BKV_OK);
        found = memcmp(key.bytes, first.fold.records[0].key.bytes, BKV_KEY_BYTES) == 0;
    }
    cr_assert(found, "the documented key, of some budget");
    alone.budget -= 16;
    cr_assert_eq(fold(&fixture, alone, "", &third), BKV_OK);
    cr_assert_eq(record_of(&third, 0), record_of(&first, 0));
    bkv_fold_release(fixture.pipeline, &first.fold);
    bkv_fold_release(fixture.pipeline, &second.fold);
    bkv_fold_release(fixture.pipeline, &third.fold);
    fixture_close(&fixture);
}

Test(fold_bands, rates_instead_of_bytes) {
    fixture_t fixture;
    bkv_key_t keys[16];
    outcome_t outcome;
    fixture_open(&fixture, 0, 8);
    put_prefix(&fixture, 16, keys);
    const uint64_t whole = 16ull * BLOCK * 2 * 2 * (32 + 16) * 2; // as bf16
    bkv_fold_args_t args = {.keys = keys, .count = 16, .rate = 8};
    cr_assert_eq(fold(&fixture, args, "", &outcome), BKV_OK, "%s", outcome.error.message);
    cr_assert_eq(outcome.fold.count, 1);
    cr_assert(assert_covers(&outcome, 16 * BLOCK) <= whole / 8);
    bkv_fold_release(fixture.pipeline, &outcome.fold);
    cr_assert_eq(fold(&fixture, args, "128:4,:16", &outcome), BKV_OK, "%s", outcome.error.message);
    cr_assert_eq(outcome.fold.count, 2);
    uint64_t bytes = assert_covers(&outcome, 16 * BLOCK);
    cr_assert(bytes <= whole / 8 && bytes > whole / 8 * 8 / 10);
    bkv_fold_release(fixture.pipeline, &outcome.fold);
    args.rate = 0; // nominal: 128 tokens at 4, the others at 16
    cr_assert_eq(fold(&fixture, args, "128:4,:16", &outcome), BKV_OK, "%s", outcome.error.message);
    cr_assert_eq(record_of(&outcome, 1)->tokens, 128);
    cr_assert_leq(record_of(&outcome, 1)->length, whole / 16 * 2 / 4);
    cr_assert_leq(record_of(&outcome, 0)->length, whole / 16 * 14 / 16);
    cr_assert_gt(record_of(&outcome, 0)->length, whole / 16 * 14 / 16 * 9 / 10);
    bkv_fold_release(fixture.pipeline, &outcome.fold);
    fixture_close(&fixture);
}

Test(fold_bands, attention_over_bands_is_that_over_their_union) {
    enum { ROWS = 2 * 4 * 3, VALUE_DIM = 16 };
    fixture_t fixture;
    bkv_key_t keys[24], bands[BKV_MAX_BANDS];
    outcome_t outcome, asked;
    fixture_open(&fixture, 0, 8);
    put_prefix(&fixture, 24, keys);
    cr_assert_eq(fold(&fixture, (bkv_fold_args_t){.keys = keys, .count = 24, .rate = 6}, "128:3,512:6,:12", &outcome), BKV_OK);
    cr_assert_eq(outcome.fold.count, 3);
    float q[2 * 4 * 3 * 32], together[ROWS * VALUE_DIM], lse[ROWS], sum[ROWS * VALUE_DIM], sum_lse[ROWS], out[ROWS * VALUE_DIM],
        part_lse[ROWS];
    for (size_t i = 0; i < sizeof q / sizeof *q; i++) {
        q[i] = (float)cos(0.9 * (double)i);
    }
    bkv_attend_args_t args = {.layers = 2, .query_heads = 4, .queries = 3, .q = q, .out = together, .lse = lse};
    for (uint32_t i = 0; i < 3; i++) {
        bands[i] = outcome.fold.records[i].key;
    }
    for (uint32_t i = 0; i <= 3; i++) { // all at once, then one by one
        outcome_init(&asked);
        cr_assert_eq(bkv_attend_start(fixture.pipeline, &fixture.model.id, i == 0 ? bands : &bands[i - 1], i == 0 ? 3 : 1,
                                      &args, fixture_now(), outcome_attend_done, &asked, &asked.error),
                     BKV_OK);
        outcome_wait(&asked);
        cr_assert_eq(asked.error.status, BKV_OK, "%s", asked.error.message);
        if (i == 1) {
            memcpy(sum, out, sizeof sum);
            memcpy(sum_lse, part_lse, sizeof sum_lse);
        } else if (i > 1) {
            bkv_attend_merge(sum, sum_lse, out, part_lse, ROWS, VALUE_DIM);
        }
        args.out = out;
        args.lse = part_lse;
    }
    for (size_t i = 0; i < ROWS * VALUE_DIM; i++) {
        cr_assert_float_eq(sum[i], together[i], 1e-5, "%g and %g", (double)sum[i], (double)together[i]);
    }
    for (size_t i = 0; i < ROWS; i++) {
        cr_assert_float_eq(sum_lse[i], lse[i], 1e-5);
    }
    bkv_fold_release(fixture.pipeline, &outcome.fold);
    fixture_close(&fixture);
}

// What a fold under a budget of a few blocks reads: see tests of cool.c for where the bound comes from.
Test(fold_bands, one_more_block_costs_a_logarithm) {
    fixture_t grown, fresh;
    bkv_key_t keys[MANY];
    outcome_t outcome, scratch;
    const uint64_t budget = 6000, node_bytes = bkv_cool_node_bytes(budget);
    fixture_open(&grown, 0, 8);
    put_prefix(&grown, MANY, keys);
    uint64_t block_bytes = fixture_store_metrics(&grown).resident_bytes / MANY, all = 0;
    for (uint32_t n = 1; n <= MANY; n++) {
        uint64_t before = fixture_metrics(&grown).fold_read_bytes_total, nodes = fixture_metrics(&grown).fold_nodes_total;
        cr_assert_eq(fold(&grown, (bkv_fold_args_t){.keys = keys, .count = n, .budget = budget}, "", &outcome), BKV_OK, "%s",
                     outcome.error.message);
        assert_covers(&outcome, (uint64_t)n * BLOCK);
        uint64_t read = fixture_metrics(&grown).fold_read_bytes_total - before;
        double log2n = log2(n);
        cr_assert_leq((double)read, 5 * (double)(node_bytes + block_bytes) * (log2n + 2), "%u blocks", n);
        cr_assert_leq((double)(fixture_metrics(&grown).fold_nodes_total - nodes), log2n);
        all += read;
        if (n < MANY) {
            bkv_fold_release(grown.pipeline, &outcome.fold);
        }
    }
    cr_assert_leq(all, MANY * 4 * (node_bytes + block_bytes), "on average");
    cr_assert_leq(all * 4, (uint64_t)MANY * MANY / 2 * block_bytes, "reading all blocks each time would be far more");

    fixture_open(&fresh, 0, 8);
    put_prefix(&fresh, MANY, keys);
    cr_assert_eq(fold(&fresh, (bkv_fold_args_t){.keys = keys, .count = MANY, .budget = budget}, "", &scratch), BKV_OK);
    cr_assert_eq(record_of(&outcome, 0)->length, record_of(&scratch, 0)->length);
    cr_assert_arr_eq(record_of(&outcome, 0), record_of(&scratch, 0), record_of(&scratch, 0)->length, "from scratch, the same");
    uint64_t once = fixture_metrics(&fresh).fold_read_bytes_total;
    cr_assert_leq(once, 3 * MANY * block_bytes, "all of it once: linear");
    bkv_fold_release(grown.pipeline, &outcome.fold);
    bkv_fold_release(fresh.pipeline, &scratch.fold);
    fixture_close(&grown);
    fixture_close(&fresh);
}

Test(fold_bands, lost_nodes_are_made_anew) {
    fixture_t fixture;
    bkv_key_t keys[MANY];
    outcome_t outcome;
    fixture_open(&fixture, 0, 8);
    put_prefix(&fixture, MANY, keys);
    const bkv_fold_args_t args = {.keys = keys, .count = MANY, .rate = 40, .ttl_ms = 1000};
    cr_assert_eq(fold(&fixture, args, "256:8,:60", &outcome), BKV_OK, "%s", outcome.error.message);
    cr_assert_eq(outcome.fold.count, 3, "4,096 tokens, what is left of the oldest band, and the newest one");
    uint64_t nodes = fixture_metrics(&fixture).fold_nodes_total, lengths[3];
    cr_assert_gt(nodes, 0);
    void *copies[3];
    for (uint32_t i = 0; i < 3; i++) {
        lengths[i] = record_of(&outcome, i)->length;
        copies[i] = malloc(lengths[i]);
        memcpy(copies[i], record_of(&outcome, i), lengths[i]);
    }
    bkv_fold_release(fixture.pipeline, &outcome.fold);
    fixture_advance(2000);
    bkv_store_tick(fixture.store, fixture_now(), UINT32_MAX);
    cr_assert_eq(fixture_store_metrics(&fixture).entries, MANY, "only the blocks are left");
    cr_assert_eq(fold(&fixture, args, "256:8,:60", &outcome), BKV_OK, "%s", outcome.error.message);
    cr_assert_eq(fixture_metrics(&fixture).fold_nodes_total, 2 * nodes);
    for (uint32_t i = 0; i < 3; i++) {
        cr_assert_eq(record_of(&outcome, i)->length, lengths[i]);
        cr_assert_arr_eq(record_of(&outcome, i), copies[i], lengths[i]);
        free(copies[i]);
    }
    bkv_fold_release(fixture.pipeline, &outcome.fold);
    fixture_close(&fixture);
}

// A fold's own records can be folded on with what came after them, and the blocks they were made from may go.
Test(fold_bands, folds_of_folds) {
    fixture_t fixture;
    bkv_key_t keys[32], mixed[16];
    outcome_t first, second;
    fixture_open(&fixture, 0, 8);
    put_prefix(&fixture, 32, keys);
    cr_assert_eq(fold(&fixture, (bkv_fold_args_t){.keys = keys, .count = 24, .rate = 8}, "256:4,:12", &first), BKV_OK);
    mixed[0] = first.fold.records[0].key;
    mixed[1] = first.fold.records[1].key;
    memcpy(&mixed[2], &keys[24], 8 * sizeof mixed[0]);
    bkv_fold_release(fixture.pipeline, &first.fold);
    for (uint32_t i = 0; i < 24; i++) {
        cr_assert(bkv_store_drop(fixture.store, &fixture.model.id, &keys[i], fixture_now()));
    }
    cr_assert_eq(fold(&fixture, (bkv_fold_args_t){.keys = mixed, .count = 10, .rate = 10}, "256:5,:16", &second), BKV_OK, "%s",
                 second.error.message);
    assert_covers(&second, 32 * BLOCK);
    bkv_fold_release(fixture.pipeline, &second.fold);
    fixture_close(&fixture);
}

static void refused(fixture_t *fixture, bkv_fold_args_t args, bkv_profile_t profile, const char *field) {
    outcome_t outcome;
    args.spec_id = fixture->model.id;
    args.profile = profile;
    outcome_init(&outcome);
    bkv_status_t status = bkv_fold_start(fixture->pipeline, &args, outcome_fold_done, &outcome, &outcome.error);
    if (status == BKV_OK) {
        outcome_wait(&outcome);
        status = outcome.error.status;
    }
    cr_assert_eq(status, BKV_INVALID_ARGUMENT, "%s", field);
    cr_assert_eq(strncmp(outcome.error.message, field, strlen(field)), 0, "%s: %s", field, outcome.error.message);
    cr_assert_eq(outcome.fold.count, 0);
}

Test(fold_bands, bad_requests_are_named) {
    fixture_t fixture;
    bkv_key_t keys[8];
    fixture_open(&fixture, 0, 8);
    put_prefix(&fixture, 8, keys);
    const bkv_fold_args_t args = {.keys = keys, .count = 8, .budget = 20000};
    const bkv_profile_t flat = {.count = 1, .bands = {{0, 8}}}, none = {.count = 0};
    refused(&fixture, args, (bkv_profile_t){.count = 9}, "profile: 9 bands");
    refused(&fixture, args, (bkv_profile_t){.count = UINT32_MAX}, "profile: 4294967295 bands");
    refused(&fixture, args, (bkv_profile_t){.count = 1, .bands = {{0, 0}}}, "profile[0].rate");
    refused(&fixture, args, (bkv_profile_t){.count = 2, .bands = {{64, 4}, {0, 5000}}}, "profile[1].rate");
    refused(&fixture, args, (bkv_profile_t){.count = 2, .bands = {{0, 4}, {0, 8}}}, "profile[0].age");
    refused(&fixture, args, (bkv_profile_t){.count = 2, .bands = {{64, 4}, {128, 8}}}, "profile[1].age");
    refused(&fixture, args, (bkv_profile_t){.count = 3, .bands = {{64, 4}, {32, 8}, {0, 16}}}, "profile[1].age");
    refused(&fixture, (bkv_fold_args_t){.keys = keys, .count = 8}, none, "budget_bytes");
    refused(&fixture, (bkv_fold_args_t){.keys = keys, .count = 8, .budget = 100}, flat, "budget_bytes");
    refused(&fixture, (bkv_fold_args_t){.keys = keys, .count = 8, .budget = 600}, flat, "budget_bytes: 600");
    refused(&fixture, (bkv_fold_args_t){.keys = keys, .count = 8, .budget = 20000, .rate = 8}, flat, "rate");
    refused(&fixture, (bkv_fold_args_t){.keys = keys, .count = 8, .rate = 1025}, none, "rate");
    // The gap lies between two bands, neither of which has one.
    bkv_key_t gap[7];
    memcpy(gap, keys, 6 * sizeof gap[0]);
    gap[6] = keys[7];
    const bkv_profile_t two = {.count = 2, .bands = {{64, 4}, {0, 8}}};
    refused(&fixture, (bkv_fold_args_t){.keys = gap, .count = 7, .budget = 20000}, two,
            "keys[6]: starts at position 448, not at 384");
    cr_assert_eq(fixture_store_metrics(&fixture).entries, 8);
    fixture_close(&fixture);
}
