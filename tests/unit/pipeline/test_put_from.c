// test_put_from.c - payloads that the caller does not write: read on a compute thread, brought by DMA, or made records by a
// device.
#include "fixture.h"

#include "kernels/seal.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

static bool resident(fixture_t *fixture, uint32_t key) {
    bkv_key_t full = fixture_key(key);
    return bkv_store_contains(fixture->store, &fixture->model.id, &full, fixture_now());
}

// What is stored under key is the raw record of payload, or near enough of another codec.
static void assert_stored(fixture_t *fixture, uint32_t key, const void *payload, bkv_codec_t codec) {
    bkv_key_t full = fixture_key(key);
    const bkv_deliver_range_t all = {0};
    bkv_delivery_t delivery;
    bkv_error_t err;
    cr_assert_eq(bkv_deliver(fixture->pipeline, &fixture->model.id, &full, &all, fixture_now(), &delivery, &err), BKV_OK, "%s",
                 err.message);
    cr_assert_eq(bkv_record_check(delivery.data, delivery.length, &err), BKV_OK, "%s", err.message);
    cr_assert_eq(((const bkv_record_header_t *)delivery.data)->codec, codec);
    if (codec == BKV_CODEC_RAW) {
        cr_assert_eq(memcmp(delivery.data + bkv_raw_payload(&fixture->model.shape), payload, fixture_bytes(fixture, 64)), 0);
    }
    bkv_delivery_release(fixture->pipeline, &delivery);
}

static bkv_ingest_t *begin(fixture_t *fixture, const bkv_ingest_args_t *args) {
    bkv_ingest_t *ingest;
    bkv_error_t err;
    cr_assert_eq(bkv_ingest_begin(fixture->pipeline, args, fixture_now(), &ingest, &err), BKV_OK, "%s", err.message);
    cr_assert_eq(bkv_ingest_bytes(ingest), args->payload_bytes);
    return ingest;
}

// ---- commit_from ----

typedef struct source {
    const uint8_t *bytes;
    uint64_t length; // that it brings
    bkv_status_t status;
    uint32_t calls;
} source_t;

static bkv_status_t bring(void *user, bkv_ingest_t *ingest, bkv_error_t *err) {
    source_t *source = user;
    source->calls++;
    if (source->status != BKV_OK) {
        return bkv_fail(err, source->status, "the link is gone");
    }
    uint64_t most = bkv_ingest_missing(ingest);
    return bkv_ingest_write(ingest, source->bytes, source->length < most ? source->length : most, err);
}

static bkv_status_t put_from(fixture_t *fixture, const bkv_ingest_args_t *args, source_t *source, outcome_t *outcome) {
    outcome_init(outcome);
    bkv_ingest_t *ingest = begin(fixture, args);
    cr_assert_eq(bkv_ingest_commit_from(ingest, bring, source, outcome_put_done, outcome, NULL), BKV_OK);
    outcome_wait(outcome);
    return outcome->error.status;
}

Test(pipeline_put_from, a_reader_brings_the_payload_on_a_compute_thread) {
    fixture_t fixture;
    fixture_open(&fixture, 0, 8);
    float *payload = fixture_payload(&fixture, 64, 1);
    source_t source = {.bytes = (uint8_t *)payload, .length = UINT64_MAX};
    outcome_t outcome;
    uint32_t key = 1;
    for (bkv_codec_t codec = BKV_CODEC_RAW; codec <= BKV_CODEC_BALANCE; codec++, key++) {
        bkv_ingest_args_t args = fixture_args(&fixture, key, 0, 64, codec);
        args.has_checksum = codec % 2 == 0;
        args.checksum = XXH3_64bits(payload, args.payload_bytes);
        cr_assert_eq(put_from(&fixture, &args, &source, &outcome), BKV_OK, "%s", outcome.error.message);
        cr_assert_eq(source.calls, key);
        assert_stored(&fixture, key, payload, codec);
    }
    bkv_ingest_args_t args = fixture_args(&fixture, 1, 0, 64, BKV_CODEC_RAW);
    cr_assert_eq(put_from(&fixture, &args, &source, &outcome), BKV_OK);
    cr_assert(outcome.put.duplicate);
    cr_assert_eq(source.calls, key - 1, "nothing need be read of a block that is there");
    free(payload);
    fixture_close(&fixture);
}

Test(pipeline_put_from, a_reader_that_fails_or_brings_too_little_keeps_nothing) {
    fixture_t fixture;
    fixture_open(&fixture, 0, 8);
    float *payload = fixture_payload(&fixture, 64, 1);
    outcome_t outcome;
    for (bkv_codec_t codec = BKV_CODEC_RAW; codec <= BKV_CODEC_DENSE8; codec++) {
        bkv_ingest_args_t args = fixture_args(&fixture, 1, 0, 64, codec);
        source_t broken = {.status = BKV_INTERNAL};
        cr_assert_eq(put_from(&fixture, &args, &broken, &outcome), BKV_INTERNAL);
        cr_assert_str_eq(outcome.error.message, "the link is gone");
        source_t little = {.bytes = (uint8_t *)payload, .length = args.payload_bytes - 3};
        cr_assert_eq(put_from(&fixture, &args, &little, &outcome), BKV_INVALID_ARGUMENT);
        cr_assert_not_null(strstr(outcome.error.message, "data: ended after"));
        payload[77] = NAN;
        source_t whole = {.bytes = (uint8_t *)payload, .length = UINT64_MAX};
        cr_assert_eq(put_from(&fixture, &args, &whole, &outcome), BKV_INVALID_ARGUMENT);
        payload[77] = 0;
        args.has_checksum = true;
        cr_assert_eq(put_from(&fixture, &args, &whole, &outcome), BKV_INVALID_ARGUMENT);
        cr_assert_not_null(strstr(outcome.error.message, "block.checksum:"));
        fixture_assert_idle(&fixture);
        cr_assert_eq(fixture_store_metrics(&fixture).slot_bytes, 0);
        cr_assert_not(resident(&fixture, 1));
    }
    free(payload);
    fixture_close(&fixture);
}

Test(pipeline_put_from, busy_leaves_the_ingest_to_its_caller_and_the_source_unread) {
    fixture_t fixture;
    fixture_open(&fixture, 1, 1);
    blocker_t blocker;
    blocker_start(&blocker, &fixture);
    blocker_t queued = {.job = blocker.job};
    sem_init(&queued.running, 0, 0);
    sem_init(&queued.release, 0, 1); // it ends as soon as it may run
    cr_assert_eq(bkv_pipeline_submit(fixture.pipeline, &queued.job, NULL), BKV_OK);
    float *payload = fixture_payload(&fixture, 64, 1);
    source_t source = {.bytes = (uint8_t *)payload, .length = UINT64_MAX};
    outcome_t outcome;
    outcome_init(&outcome);
    bkv_ingest_args_t args = fixture_args(&fixture, 1, 0, 64, BKV_CODEC_RAW);
    bkv_ingest_t *ingest = begin(&fixture, &args);
    cr_assert_eq(bkv_ingest_commit_from(ingest, bring, &source, outcome_put_done, &outcome, NULL), BKV_BUSY);
    cr_assert_eq(fixture_metrics(&fixture).busy_total, 1);
    sem_post(&blocker.release);
    cr_assert(bkv_pipeline_wait_idle(fixture.pipeline, 60000));
    cr_assert_eq(source.calls, 0);
    cr_assert_eq(bkv_ingest_commit_from(ingest, bring, &source, outcome_put_done, &outcome, NULL), BKV_OK);
    outcome_wait(&outcome);
    cr_assert_eq(outcome.error.status, BKV_OK);
    assert_stored(&fixture, 1, payload, BKV_CODEC_RAW);
    free(payload);
    fixture_close(&fixture);
}

// ---- by DMA ----

static bkv_status_t put_filled(fixture_t *fixture, const bkv_ingest_args_t *args, const void *payload, outcome_t *outcome) {
    outcome_init(outcome);
    bkv_ingest_t *ingest = begin(fixture, args);
    void *memory = bkv_ingest_memory(ingest);
    if (memory != NULL) {
        memcpy(memory, payload, args->payload_bytes);
    }
    bkv_ingest_filled(ingest);
    cr_assert_eq(bkv_ingest_missing(ingest), 0);
    cr_assert_eq(bkv_ingest_commit(ingest, outcome_put_done, outcome, NULL), BKV_OK);
    outcome_wait(outcome);
    return outcome->error.status;
}

Test(pipeline_put_from, what_dma_brought_is_looked_through) {
    fixture_t fixture;
    fixture_open(&fixture, 0, 8);
    float *payload = fixture_payload(&fixture, 64, 1);
    outcome_t outcome;
    for (bkv_codec_t codec = BKV_CODEC_RAW; codec <= BKV_CODEC_BALANCE; codec++) {
        bkv_ingest_args_t args = fixture_args(&fixture, 1, 0, 64, codec);
        payload[12287] = INFINITY; // the last value
        cr_assert_eq(put_filled(&fixture, &args, payload, &outcome), BKV_INVALID_ARGUMENT);
        payload[12287] = 1;
        args.has_checksum = true;
        args.checksum = XXH3_64bits(payload, args.payload_bytes) ^ 1;
        cr_assert_eq(put_filled(&fixture, &args, payload, &outcome), BKV_INVALID_ARGUMENT);
        cr_assert_not_null(strstr(outcome.error.message, "block.checksum:"));
        cr_assert_not(resident(&fixture, 1));
        cr_assert_eq(fixture_store_metrics(&fixture).slot_bytes, 0);
        args.checksum ^= 1;
        cr_assert_eq(put_filled(&fixture, &args, payload, &outcome), BKV_OK, "%s", outcome.error.message);
        assert_stored(&fixture, 1, payload, codec);
        cr_assert_eq(put_filled(&fixture, &args, payload, &outcome), BKV_OK);
        cr_assert(outcome.put.duplicate);
        cr_assert(bkv_store_drop(fixture.store, &args.spec_id, &args.key, fixture_now()));
    }
    free(payload);
    fixture_close(&fixture);
}

Test(pipeline_put_from, the_memory_for_dma_is_staging_or_the_arena) {
    fixture_t fixture;
    fixture_open(&fixture, 0, 8);
    void *arena, *staging;
    uint64_t arena_bytes, staging_bytes;
    bkv_store_memory(fixture.store, &arena, &arena_bytes);
    bkv_pipeline_staging(fixture.pipeline, &staging, &staging_bytes);
    cr_assert_eq(staging_bytes, FIXTURE_STAGING);
    for (bkv_codec_t codec = BKV_CODEC_RAW; codec <= BKV_CODEC_DENSE8; codec++) {
        bkv_ingest_args_t args = fixture_args(&fixture, 1, 0, 64, codec);
        bkv_ingest_t *ingest = begin(&fixture, &args);
        const uint8_t *memory = bkv_ingest_memory(ingest), *whole = codec == BKV_CODEC_RAW ? arena : staging;
        uint64_t bytes = codec == BKV_CODEC_RAW ? arena_bytes : staging_bytes;
        cr_assert(memory >= whole && memory + args.payload_bytes <= whole + bytes);
        bkv_ingest_abort(ingest);
    }
    fixture_close(&fixture);
}

// ---- made on a device ----

// What a device would do, done here: the record lies in the slot, without a checksum.
static uint64_t make_record(fixture_t *fixture, const bkv_ingest_device_t *device, const void *payload) {
    const bkv_backend_t *backend = fixture->pipeline->config.backend;
    void *workspace = aligned_alloc(64, (bkv_compress_workspace(backend, &device->shape, &device->params) + 63) / 64 * 64);
    bkv_block_t block;
    bkv_block_from_payload(&device->shape, payload, &block);
    size_t length;
    bkv_error_t err;
    cr_assert_eq(
        bkv_compress(backend, &block, &device->params, &device->id, device->record, device->capacity, workspace, &length, &err),
        BKV_OK, "%s", err.message);
    free(workspace);
    return length;
}

static bkv_ingest_args_t device_args(const fixture_t *fixture, uint32_t key, bkv_codec_t codec) {
    bkv_ingest_args_t args = fixture_args(fixture, key, 0, 64, codec);
    args.on_device = true;
    return args;
}

Test(pipeline_put_from, a_record_that_a_device_made_is_sealed_and_published) {
    fixture_t fixture;
    fixture_open(&fixture, 0, 8);
    float *payload = fixture_payload(&fixture, 64, 1);
    for (bkv_codec_t codec = BKV_CODEC_RAW; codec <= BKV_CODEC_BALANCE; codec++) {
        bkv_ingest_args_t args = device_args(&fixture, codec, codec);
        bkv_ingest_t *ingest = begin(&fixture, &args);
        cr_assert_eq(fixture_metrics(&fixture).staging_bytes, 0);
        bkv_ingest_device_t device;
        bkv_ingest_device(ingest, &device);
        cr_assert_not_null(device.record);
        cr_assert_geq(device.capacity, bkv_codec_bound(&device.shape, &device.params));
        cr_assert_eq(device.params.codec, codec);
        bkv_error_t err;
        cr_assert_eq(bkv_ingest_commit(ingest, outcome_put_done, NULL, &err), BKV_INVALID_ARGUMENT, "nothing was made yet");
        bkv_ingest_made(ingest, make_record(&fixture, &device, payload));
        outcome_t outcome;
        outcome_init(&outcome);
        cr_assert_eq(bkv_ingest_commit(ingest, outcome_put_done, &outcome, NULL), BKV_OK);
        outcome_wait(&outcome);
        cr_assert_eq(outcome.error.status, BKV_OK, "%s", outcome.error.message);
        assert_stored(&fixture, codec, payload, codec);
    }
    cr_assert_eq(fixture_metrics(&fixture).put_blocks_total, 4);
    free(payload);
    fixture_close(&fixture);
}

Test(pipeline_put_from, a_device_makes_nothing_of_a_block_that_is_there) {
    fixture_t fixture;
    fixture_open(&fixture, 0, 8);
    fixture_put_block(&fixture, 1, 0, 64, BKV_CODEC_DENSE8);
    bkv_ingest_args_t args = device_args(&fixture, 1, BKV_CODEC_DENSE8);
    bkv_ingest_t *ingest = begin(&fixture, &args);
    bkv_ingest_device_t device;
    bkv_ingest_device(ingest, &device);
    cr_assert_null(device.record);
    outcome_t outcome;
    outcome_init(&outcome);
    cr_assert_eq(bkv_ingest_commit(ingest, outcome_put_done, &outcome, NULL), BKV_OK);
    outcome_wait(&outcome);
    cr_assert(outcome.error.status == BKV_OK && outcome.put.duplicate);
    fixture_close(&fixture);
}

Test(pipeline_put_from, a_device_that_made_nonsense_stores_nothing) {
    fixture_t fixture;
    fixture_open(&fixture, 0, 8);
    float *payload = fixture_payload(&fixture, 64, 1);
    enum { WRONG_LENGTH, WRONG_HEADER_LENGTH, WRONG_MAGIC, WRONG_TENANT, ABORTED, WAYS };
    for (int way = 0; way < WAYS; way++) {
        bkv_ingest_args_t args = device_args(&fixture, 1, BKV_CODEC_DENSE8);
        bkv_ingest_t *ingest = begin(&fixture, &args);
        bkv_ingest_device_t device;
        bkv_ingest_device(ingest, &device);
        uint64_t length = make_record(&fixture, &device, payload);
        bkv_record_header_t *header = (bkv_record_header_t *)(void *)device.record;
        header->length = way == WRONG_HEADER_LENGTH ? UINT64_MAX : header->length;
        header->magic ^= way == WRONG_MAGIC;
        header->tenant ^= way == WRONG_TENANT;
        if (way == ABORTED) {
            bkv_ingest_abort(ingest);
        } else {
            bkv_ingest_made(ingest, way == WRONG_LENGTH ? length - 16 : length);
            outcome_t outcome;
            outcome_init(&outcome);
            cr_assert_eq(bkv_ingest_commit(ingest, outcome_put_done, &outcome, NULL), BKV_OK);
            outcome_wait(&outcome);
            cr_assert_neq(outcome.error.status, BKV_OK, "way %d", way);
        }
        cr_assert_not(resident(&fixture, 1));
        cr_assert_eq(fixture_store_metrics(&fixture).slot_bytes, 0);
    }
    free(payload);
    fixture_close(&fixture);
}

Test(pipeline_put_from, a_payload_on_a_device_is_announced_without_a_checksum) {
    fixture_t fixture;
    fixture_open(&fixture, 0, 8);
    bkv_ingest_args_t args = device_args(&fixture, 1, BKV_CODEC_RAW);
    args.has_checksum = true;
    bkv_ingest_t *ingest;
    bkv_error_t err;
    cr_assert_eq(bkv_ingest_begin(fixture.pipeline, &args, fixture_now(), &ingest, &err), BKV_INVALID_ARGUMENT);
    cr_assert_eq(strncmp(err.message, "block.has_checksum:", 19), 0, "%s", err.message);
    fixture_close(&fixture);
}
