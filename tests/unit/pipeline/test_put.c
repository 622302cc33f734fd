// test_put.c - what is put is stored whole or not at all, once, and every refusal says why.
#include "fixture.h"

#include "kernels/seal.h"

#include <criterion/criterion.h>
#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

static bool resident(fixture_t *fixture, uint32_t key) {
    bkv_key_t full = fixture_key(key);
    return bkv_store_contains(fixture->store, &fixture->model.id, &full, fixture_now());
}

static bkv_delivery_t get(fixture_t *fixture, uint32_t key) {
    bkv_error_t err;
    bkv_delivery_t delivery;
    bkv_key_t full = fixture_key(key);
    const bkv_deliver_range_t all = {0};
    cr_assert_eq(bkv_deliver(fixture->pipeline, &fixture->model.id, &full, &all, fixture_now(), &delivery, &err), BKV_OK, "%s",
                 err.message);
    return delivery;
}

Test(pipeline_put, raw_comes_back_bit_for_bit) {
    fixture_t fixture;
    fixture_open(&fixture, 0, 8);
    float *payload = fixture_payload(&fixture, 50, 1);
    bkv_ingest_args_t args = fixture_args(&fixture, 1, 128, 50, 0);
    args.has_checksum = true;
    args.checksum = XXH3_64bits(payload, args.payload_bytes);
    outcome_t outcome;
    cr_assert_eq(fixture_put(&fixture, &args, payload, &outcome), BKV_OK, "%s", outcome.error.message);
    bkv_delivery_t delivery = get(&fixture, 1);
    cr_assert_eq(outcome.put.stored_bytes, delivery.length);
    cr_assert_eq(bkv_record_verify(delivery.data, delivery.length, NULL), BKV_OK);
    cr_assert_eq(bkv_record_check(delivery.data, delivery.length, NULL), BKV_OK);
    const bkv_record_header_t *header = (const bkv_record_header_t *)delivery.data;
    cr_assert_eq(header->position, 128);
    cr_assert_eq(header->tokens, 50);
    cr_assert_eq(header->tenant, fixture.model.tenant);
    cr_assert_arr_eq(header->key, args.key.bytes, BKV_KEY_BYTES);
    bkv_shape_t shape = fixture.model.shape;
    shape.tokens = 50;
    cr_assert_eq(memcmp(delivery.data + bkv_raw_payload(&shape), payload, args.payload_bytes), 0);
    bkv_delivery_release(fixture.pipeline, &delivery);
    cr_assert_eq(fixture_metrics(&fixture).put_blocks_total, 1);
    free(payload);
    fixture_close(&fixture);
}

Test(pipeline_put, dense8_is_close_and_smaller) {
    fixture_t fixture;
    fixture_open(&fixture, 0, 8);
    fixture_put_block(&fixture, 1, 0, 64, BKV_CODEC_DENSE8);
    float *payload = fixture_payload(&fixture, 64, 1);
    bkv_delivery_t delivery = get(&fixture, 1);
    cr_assert_lt(delivery.length, fixture_bytes(&fixture, 64) / 2);
    bkv_section_view_t view;
    bkv_record_section(delivery.data, 1, 1, &view);
    float k[64 * 32], v[64 * 16];
    bkv_section_read(&view, k, v, NULL, NULL);
    const size_t layer = 2 * 64 * 32 + 2 * 64 * 16;
    const float *true_k = payload + layer + 64 * 32, *true_v = payload + layer + 2 * 64 * 32 + 64 * 16;
    for (size_t i = 0; i < sizeof(k) / sizeof(k[0]); i++) {
        cr_assert_float_eq(k[i], true_k[i], 0.05);
    }
    for (size_t i = 0; i < sizeof(v) / sizeof(v[0]); i++) {
        cr_assert_float_eq(v[i], true_v[i], 0.05);
    }
    bkv_delivery_release(fixture.pipeline, &delivery);
    free(payload);
    fixture_close(&fixture);
}

Test(pipeline_put, duplicate_is_success_and_changes_nothing) {
    fixture_t fixture;
    fixture_open(&fixture, 0, 8);
    fixture_put_block(&fixture, 1, 0, 64, BKV_CODEC_RAW);
    bkv_delivery_t before = get(&fixture, 1);
    uint64_t checksum = ((const bkv_record_header_t *)before.data)->checksum, length = before.length;
    bkv_delivery_release(fixture.pipeline, &before);
    float *other = fixture_payload(&fixture, 64, 99);
    bkv_ingest_args_t args = fixture_args(&fixture, 1, 0, 64, BKV_CODEC_DENSE4);
    outcome_t outcome;
    cr_assert_eq(fixture_put(&fixture, &args, other, &outcome), BKV_OK, "%s", outcome.error.message);
    cr_assert(outcome.put.duplicate);
    cr_assert_eq(outcome.put.stored_bytes, length);
    bkv_delivery_t after = get(&fixture, 1);
    cr_assert_eq(((const bkv_record_header_t *)after.data)->checksum, checksum);
    bkv_delivery_release(fixture.pipeline, &after);
    cr_assert_eq(fixture_metrics(&fixture).put_duplicates_total, 1);
    free(other);
    fixture_close(&fixture);
}

// The key was there when the Put began, so the Put is a duplicate even if somebody drops the record before it ends.
Test(pipeline_put, duplicate_that_is_dropped_meanwhile) {
    fixture_t fixture;
    fixture_open(&fixture, 0, 8);
    fixture_put_block(&fixture, 1, 0, 64, BKV_CODEC_RAW);
    float *payload = fixture_payload(&fixture, 64, 1);
    bkv_ingest_args_t args = fixture_args(&fixture, 1, 0, 64, 0);
    bkv_ingest_t *ingest;
    outcome_t outcome;
    outcome_init(&outcome);
    cr_assert_eq(bkv_ingest_begin(fixture.pipeline, &args, fixture_now(), &ingest, NULL), BKV_OK);
    cr_assert_eq(bkv_ingest_write(ingest, payload, args.payload_bytes, NULL), BKV_OK);
    cr_assert(bkv_store_drop(fixture.store, &args.spec_id, &args.key, fixture_now()));
    cr_assert_eq(bkv_ingest_commit(ingest, outcome_put_done, &outcome, NULL), BKV_OK);
    outcome_wait(&outcome);
    cr_assert_eq(outcome.error.status, BKV_OK);
    cr_assert(outcome.put.duplicate);
    cr_assert_gt(outcome.put.stored_bytes, args.payload_bytes);
    cr_assert_not(resident(&fixture, 1));
    free(payload);
    fixture_close(&fixture);
}

static void refused(fixture_t *fixture, bkv_ingest_args_t args, bkv_status_t status, const char *message_start) {
    bkv_ingest_t *ingest;
    bkv_error_t err = {.message = ""};
    cr_assert_eq(bkv_ingest_begin(fixture->pipeline, &args, fixture_now(), &ingest, &err), status, "%s: %s", message_start,
                 err.message);
    cr_assert_eq(strncmp(err.message, message_start, strlen(message_start)), 0, "\"%s\", expected \"%s...\"", err.message,
                 message_start);
}

#define REFUSED(status, message, ...)                                                                                          \
    do {                                                                                                                       \
        bkv_ingest_args_t args = fixture_args(&fixture, 1, 0, 64, 0);                                                          \
        __VA_ARGS__;                                                                                                           \
        refused(&fixture, args, status, message);                                                                              \
        refusals++;                                                                                                            \
    } while (0)

Test(pipeline_put, bad_arguments_are_named) {
    fixture_t fixture;
    uint64_t refusals = 0;
    fixture_open(&fixture, 0, 8);
    REFUSED(BKV_NOT_FOUND, "spec_id:", args.spec_id.bytes[3] ^= 1);
    REFUSED(BKV_INVALID_ARGUMENT, "block.tokens: 0", args.tokens = 0);
    REFUSED(BKV_INVALID_ARGUMENT, "block.tokens: 65", args.tokens = 65);
    REFUSED(BKV_INVALID_ARGUMENT, "block.payload_bytes: 5", args.payload_bytes = 5);
    REFUSED(BKV_INVALID_ARGUMENT, "block.payload_bytes: 18446744073709551615", args.payload_bytes = UINT64_MAX);
    REFUSED(BKV_INVALID_ARGUMENT, "block.position:", args.position = UINT64_MAX - 3);
    REFUSED(BKV_INVALID_ARGUMENT, "block.", args.codec = 17);
    REFUSED(BKV_INVALID_ARGUMENT, "block.", args.codec = BKV_CODEC_BALANCE; args.rate = 1);
    fixture.pipeline->config.max_block_bytes = 1000;
    REFUSED(BKV_RESOURCE_EXHAUSTED, "block.payload_bytes: 49152 is more than 1000 (limits.max_block)", (void)args);
    cr_assert_eq(fixture_metrics(&fixture).put_failed_total, refusals);
    cr_assert_eq(fixture_store_metrics(&fixture).slot_bytes, 0);
    fixture_close(&fixture);
}

static void assert_nothing_kept(fixture_t *fixture, const bkv_ingest_args_t *args, const void *payload, const char *message) {
    outcome_t outcome;
    cr_assert_eq(fixture_put(fixture, args, payload, &outcome), BKV_INVALID_ARGUMENT, "%s", message);
    cr_assert_not_null(strstr(outcome.error.message, message), "\"%s\" does not say \"%s\"", outcome.error.message, message);
    fixture_assert_idle(fixture);
    cr_assert_eq(fixture_store_metrics(fixture).slot_bytes, 0);
    cr_assert_not(resident(fixture, 1));
}

Test(pipeline_put, wrong_checksum_keeps_nothing) {
    fixture_t fixture;
    fixture_open(&fixture, 0, 8);
    float *payload = fixture_payload(&fixture, 64, 1);
    for (bkv_codec_t codec = BKV_CODEC_RAW; codec <= BKV_CODEC_BALANCE; codec++) {
        bkv_ingest_args_t args = fixture_args(&fixture, 1, 0, 64, codec);
        args.has_checksum = true;
        args.checksum = XXH3_64bits(payload, args.payload_bytes) + 1;
        assert_nothing_kept(&fixture, &args, payload, "block.checksum:");
    }
    free(payload);
    fixture_close(&fixture);
}

Test(pipeline_put, nan_and_infinity_keep_nothing) {
    fixture_t fixture;
    fixture_open(&fixture, 0, 8);
    float *payload = fixture_payload(&fixture, 64, 1);
    for (bkv_codec_t codec = BKV_CODEC_RAW; codec <= BKV_CODEC_BALANCE; codec++) {
        bkv_ingest_args_t args = fixture_args(&fixture, 1, 0, 64, codec);
        size_t at = 2 * 64 * 32 + 64 * 16 + 5; // layer 0, a value of head 1
        float whole = payload[at];
        payload[at] = codec % 2 == 0 ? NAN : -INFINITY;
        assert_nothing_kept(&fixture, &args, payload, "layer 0");
        payload[at] = whole;
    }
    free(payload);
    fixture_close(&fixture);
}

Test(pipeline_put, too_few_or_too_many_bytes) {
    fixture_t fixture;
    fixture_open(&fixture, 0, 8);
    float *payload = fixture_payload(&fixture, 64, 1);
    for (bkv_codec_t codec = BKV_CODEC_RAW; codec <= BKV_CODEC_DENSE8; codec++) {
        bkv_ingest_args_t args = fixture_args(&fixture, 1, 0, 64, codec);
        bkv_ingest_t *ingest;
        bkv_error_t err;
        cr_assert_eq(bkv_ingest_begin(fixture.pipeline, &args, fixture_now(), &ingest, NULL), BKV_OK);
        cr_assert_eq(bkv_ingest_write(ingest, payload, args.payload_bytes - 1, NULL), BKV_OK);
        cr_assert_eq(bkv_ingest_missing(ingest), 1);
        cr_assert_eq(bkv_ingest_commit(ingest, outcome_put_done, NULL, &err), BKV_INVALID_ARGUMENT);
        cr_assert_not_null(strstr(err.message, "data: ended after 49151 of the 49152 bytes"));
        cr_assert_eq(bkv_ingest_write(ingest, payload, 2, &err), BKV_INVALID_ARGUMENT);
        cr_assert_eq(bkv_ingest_write(ingest, payload, SIZE_MAX, &err), BKV_INVALID_ARGUMENT);
        bkv_ingest_abort(ingest);
        fixture_assert_idle(&fixture);
        cr_assert_eq(fixture_store_metrics(&fixture).slot_bytes, 0);
        cr_assert_not(resident(&fixture, 1));
    }
    cr_assert_eq(fixture_metrics(&fixture).put_failed_total, 2);
    free(payload);
    fixture_close(&fixture);
}

Test(pipeline_put, staging_is_bounded) {
    fixture_t fixture;
    fixture_open(&fixture, 0, 8);
    enum { ROOM = FIXTURE_STAGING / BKV_STAGING_UNIT };
    bkv_ingest_t *ingests[ROOM], *refused_ingest;
    for (uint32_t i = 0; i < ROOM; i++) {
        bkv_ingest_args_t args = fixture_args(&fixture, i, 0, 64, BKV_CODEC_DENSE8);
        cr_assert_eq(bkv_ingest_begin(fixture.pipeline, &args, fixture_now(), &ingests[i], NULL), BKV_OK);
    }
    bkv_ingest_args_t args = fixture_args(&fixture, ROOM, 0, 64, BKV_CODEC_DENSE8);
    cr_assert_eq(bkv_ingest_begin(fixture.pipeline, &args, fixture_now(), &refused_ingest, NULL), BKV_BUSY);
    cr_assert_eq(fixture_metrics(&fixture).busy_total, 1);
    cr_assert_eq(fixture_metrics(&fixture).staging_bytes, FIXTURE_STAGING);
    bkv_ingest_abort(ingests[ROOM / 2]);
    cr_assert_eq(bkv_ingest_begin(fixture.pipeline, &args, fixture_now(), &ingests[ROOM / 2], NULL), BKV_OK);
    for (uint32_t i = 0; i < ROOM; i++) {
        bkv_ingest_abort(ingests[i]);
    }
    fixture_close(&fixture);
}

Test(pipeline_put, draining_takes_no_more_but_ends_what_began) {
    fixture_t fixture;
    fixture_open(&fixture, 0, 8);
    float *payload = fixture_payload(&fixture, 64, 1);
    bkv_ingest_args_t args = fixture_args(&fixture, 1, 0, 64, 0);
    bkv_ingest_t *ingest;
    outcome_t outcome;
    outcome_init(&outcome);
    cr_assert_eq(bkv_ingest_begin(fixture.pipeline, &args, fixture_now(), &ingest, NULL), BKV_OK);
    bkv_pipeline_drain(fixture.pipeline);
    refused(&fixture, args, BKV_BUSY, "draining");
    cr_assert_eq(bkv_ingest_write(ingest, payload, args.payload_bytes, NULL), BKV_OK);
    cr_assert_eq(bkv_ingest_commit(ingest, outcome_put_done, &outcome, NULL), BKV_OK);
    outcome_wait(&outcome);
    cr_assert_eq(outcome.error.status, BKV_OK);
    cr_assert(resident(&fixture, 1));
    free(payload);
    fixture_close(&fixture);
}

Test(pipeline_put, full_queue_is_busy_and_the_ingest_stays_the_callers) {
    fixture_t fixture;
    fixture_open(&fixture, 1, 1);
    blocker_t blocker;
    blocker_start(&blocker, &fixture);
    float *payload = fixture_payload(&fixture, 64, 1);
    bkv_ingest_t *ingests[2];
    outcome_t outcomes[2];
    for (uint32_t i = 0; i < 2; i++) {
        bkv_ingest_args_t args = fixture_args(&fixture, i, 0, 64, BKV_CODEC_DENSE4);
        outcome_init(&outcomes[i]);
        cr_assert_eq(bkv_ingest_begin(fixture.pipeline, &args, fixture_now(), &ingests[i], NULL), BKV_OK);
        cr_assert_eq(bkv_ingest_write(ingests[i], payload, args.payload_bytes, NULL), BKV_OK);
        cr_assert_eq(bkv_ingest_commit(ingests[i], outcome_put_done, &outcomes[i], NULL), i == 0 ? BKV_OK : BKV_BUSY);
    }
    cr_assert_eq(fixture_metrics(&fixture).jobs_queued, 1);
    sem_post(&blocker.release);
    outcome_wait(&outcomes[0]);
    cr_assert_eq(bkv_ingest_commit(ingests[1], outcome_put_done, &outcomes[1], NULL), BKV_OK);
    outcome_wait(&outcomes[1]);
    cr_assert(resident(&fixture, 0) && resident(&fixture, 1));
    free(payload);
    fixture_close(&fixture);
}

// A raw block is complete as soon as its bytes are: it waits for no compute thread.
Test(pipeline_put, raw_is_published_while_every_compute_thread_is_busy) {
    fixture_t fixture;
    fixture_open(&fixture, 1, 1);
    blocker_t blocker;
    blocker_start(&blocker, &fixture);
    float *payload = fixture_payload(&fixture, 64, 1);
    bkv_ingest_args_t args = fixture_args(&fixture, 1, 0, 64, BKV_CODEC_RAW);
    outcome_t outcome;
    cr_assert_eq(fixture_put(&fixture, &args, payload, &outcome), BKV_OK, "%s", outcome.error.message);
    cr_assert(resident(&fixture, 1));
    sem_post(&blocker.release);
    free(payload);
    fixture_close(&fixture);
}

static void *put_same(void *argument) {
    fixture_t *fixture = ((void **)argument)[0];
    outcome_t *outcome = ((void **)argument)[1];
    float *payload = fixture_payload(fixture, 64, 5);
    bkv_ingest_args_t args = fixture_args(fixture, 5, 0, 64, BKV_CODEC_DENSE4);
    cr_assert_eq(fixture_put(fixture, &args, payload, outcome), BKV_OK, "%s", outcome->error.message);
    free(payload);
    return NULL;
}

Test(pipeline_put, of_many_puts_of_one_key_one_wins) {
    enum { THREADS = 6 };
    fixture_t fixture;
    fixture_open(&fixture, 3, 8);
    pthread_t threads[THREADS];
    outcome_t outcomes[THREADS];
    void *arguments[THREADS][2];
    for (int i = 0; i < THREADS; i++) {
        arguments[i][0] = &fixture;
        arguments[i][1] = &outcomes[i];
        pthread_create(&threads[i], NULL, put_same, arguments[i]);
    }
    int winners = 0;
    for (int i = 0; i < THREADS; i++) {
        pthread_join(threads[i], NULL);
        winners += !outcomes[i].put.duplicate;
        cr_assert_eq(outcomes[i].put.stored_bytes, outcomes[0].put.stored_bytes);
    }
    cr_assert_eq(winners, 1);
    cr_assert_eq(fixture_store_metrics(&fixture).entries, 1);
    fixture_close(&fixture);
}

Test(pipeline_put, time_to_live) {
    fixture_t fixture;
    fixture_open(&fixture, 0, 8);
    float *payload = fixture_payload(&fixture, 64, 1);
    outcome_t outcome;
    for (uint32_t i = 0; i < 3; i++) {
        bkv_ingest_args_t args = fixture_args(&fixture, i, 0, 64, 0);
        args.ttl_ms = i == 0 ? 1000 : i == 1 ? UINT64_MAX : 0;
        bkv_pipeline_set_default_ttl(fixture.pipeline, 5000);
        cr_assert_eq(fixture_put(&fixture, &args, payload, &outcome), BKV_OK);
    }
    fixture_advance(2000);
    cr_assert(!resident(&fixture, 0) && resident(&fixture, 1) && resident(&fixture, 2));
    fixture_advance(4000);
    cr_assert(resident(&fixture, 1) && !resident(&fixture, 2));
    free(payload);
    fixture_close(&fixture);
}
