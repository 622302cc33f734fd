// test_device_cache.c - Attend over copies of records in a fake GPU's memory is what it is over the records themselves, whatever
// comes and goes there meanwhile; and goes on without the GPU when it must.
#include "fixture.h"

#include "tests/unit/transport/fake_gpu.h"

#include <criterion/criterion.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define QUERY_HEADS 4
#define QUERIES     3
#define LAYERS      2
#define KEY_DIM     32
#define VALUE_DIM   16
#define ROWS        (LAYERS * QUERY_HEADS * QUERIES)
#define BLOCK       64 // tokens; its raw record takes about 48 KiB

typedef struct answer {
    float q[ROWS * KEY_DIM], out[ROWS * VALUE_DIM], lse[ROWS];
    bkv_attend_args_t args;
} answer_t;

static answer_t *answer_new(uint32_t first_layer, uint32_t layers) {
    answer_t *answer = calloc(1, sizeof(*answer));
    for (size_t i = 0; i < ROWS * KEY_DIM; i++) {
        answer->q[i] = (float)(i * 2654435761u % 1000) / 500.0f - 1.0f;
    }
    answer->args = (bkv_attend_args_t){.first_layer = first_layer,
                                       .layers = layers,
                                       .query_heads = QUERY_HEADS,
                                       .queries = QUERIES,
                                       .q = answer->q,
                                       .out = answer->out,
                                       .lse = answer->lse};
    return answer;
}

static void attend(fixture_t *fixture, const uint32_t *numbers, uint32_t count, answer_t *answer) {
    bkv_key_t keys[FIXTURE_BATCH];
    outcome_t outcome;
    for (uint32_t i = 0; i < count; i++) {
        keys[i] = fixture_key(numbers[i]);
    }
    outcome_init(&outcome);
    cr_assert_eq(bkv_attend_start(fixture->pipeline, &fixture->model.id, keys, count, &answer->args, fixture_now(),
                                  outcome_attend_done, &outcome, &outcome.error),
                 BKV_OK, "%s", outcome.error.message);
    outcome_wait(&outcome);
    cr_assert_eq(outcome.error.status, BKV_OK, "%s", outcome.error.message);
}

// The same by the reference backend over the records in the store.
static void expect(fixture_t *fixture, const uint32_t *numbers, uint32_t count, const answer_t *answer) {
    answer_t *right = answer_new(answer->args.first_layer, answer->args.layers);
    const bkv_backend_t *ref = bkv_backend_get("ref");
    bkv_pin_t pins[FIXTURE_BATCH];
    const void *records[FIXTURE_BATCH];
    for (uint32_t i = 0; i < count; i++) {
        bkv_key_t key = fixture_key(numbers[i]);
        cr_assert_eq(bkv_store_pin(fixture->store, &fixture->model.id, &key, fixture_now(), &pins[i], NULL), BKV_OK);
        records[i] = pins[i].data;
    }
    void *workspace = aligned_alloc(64, (bkv_attend_workspace(ref, records, count, &right->args) + 63) / 64 * 64);
    cr_assert_eq(bkv_attend(ref, records, count, &right->args, workspace, NULL), BKV_OK);
    const size_t rows = (size_t)answer->args.layers * QUERY_HEADS * QUERIES;
    for (size_t i = 0; i < rows; i++) {
        cr_assert_float_eq(answer->lse[i], right->lse[i], 1e-4);
        for (size_t j = 0; j < VALUE_DIM; j++) {
            cr_assert_float_eq(answer->out[i * VALUE_DIM + j], right->out[i * VALUE_DIM + j], 1e-4);
        }
    }
    for (uint32_t i = 0; i < count; i++) {
        bkv_store_unpin(fixture->store, &pins[i]);
    }
    free(workspace);
    free(right);
}

static void attend_and_expect(fixture_t *fixture, const uint32_t *numbers, uint32_t count, uint32_t first_layer,
                              uint32_t layers) {
    answer_t *answer = answer_new(first_layer, layers);
    attend(fixture, numbers, count, answer);
    expect(fixture, numbers, count, answer);
    free(answer);
}

Test(device_cache, a_gpu_that_is_not_there_is_a_wrong_configuration) {
    bkv_device_cache_t *cache;
    bkv_error_t err;
    cr_assert_eq(bkv_device_cache_create(1 << 20, &cache, &err), BKV_UNIMPLEMENTED);
    fixture_t fixture;
    fixture_open(&fixture, 1, 8); // without one nothing is asked of a GPU
    bkv_key_t key = fixture_key(1);
    cr_assert_eq(bkv_warm_start(fixture.pipeline, &fixture.model.id, &key, 1, NULL, NULL, &err), BKV_UNIMPLEMENTED);
    bkv_pipeline_config_t config = fixture.pipeline->config;
    bkv_pipeline_t *pipeline;
    config.gpu_cache_bytes = 1 << 20;
    cr_assert_eq(bkv_pipeline_create(&config, &pipeline, &err), BKV_INVALID_ARGUMENT);
    cr_assert_not_null(strstr(err.message, "compute.gpu_cache: "), "%s", err.message);
    fixture_close(&fixture);
}

Test(device_cache, records_are_brought_once) {
    fixture_t fixture;
    fake_gpu_plug(1);
    fixture_open_gpu(&fixture, 2, 64, 4 << 20);
    const uint32_t numbers[] = {1, 2, 3, 4, 5, 3}; // one of them twice
    fixture_put_block(&fixture, 1, 0, BLOCK, BKV_CODEC_RAW);
    fixture_put_block(&fixture, 2, BLOCK, BLOCK, BKV_CODEC_DENSE8);
    fixture_put_block(&fixture, 3, 2 * BLOCK, BLOCK, BKV_CODEC_DENSE4);
    fixture_put_block(&fixture, 4, 3 * BLOCK, BLOCK, BKV_CODEC_RAW);
    fixture_put_block(&fixture, 5, 4 * BLOCK, 7, BKV_CODEC_RAW);
    attend_and_expect(&fixture, numbers, 4, 0, 2);
    bkv_pipeline_metrics_t metrics = fixture_metrics(&fixture);
    cr_assert_eq(metrics.gpu_loads_total, 4);
    cr_assert_eq(metrics.gpu_hits_total, 0);
    attend_and_expect(&fixture, numbers, 6, 1, 1);
    metrics = fixture_metrics(&fixture);
    cr_assert_eq(metrics.gpu_loads_total, 5);
    cr_assert_eq(metrics.gpu_hits_total, 5);
    cr_assert_eq(metrics.gpu_records, 5);
    cr_assert_eq(metrics.attends_total, 2);
    cr_assert_eq(metrics.attends_gpu_total, 2);
    cr_assert_eq(fake_gpu_counts().attends, 3, "a call of the kernel for each layer");
    fixture_close(&fixture);
    cr_assert_eq(fake_gpu_counts().memory, 0);
}

static void warmed(void *user, const bkv_error_t *error, uint32_t count) {
    cr_assert_eq(count, 2);
    outcome_attend_done(user, error);
}

Test(device_cache, they_can_be_brought_ahead) {
    fixture_t fixture;
    fake_gpu_plug(1);
    fixture_open_gpu(&fixture, 1, 64, 4 << 20);
    fixture_put_block(&fixture, 1, 0, BLOCK, BKV_CODEC_RAW);
    fixture_put_block(&fixture, 2, BLOCK, BLOCK, BKV_CODEC_RAW);
    const bkv_key_t keys[] = {fixture_key(1), fixture_key(9), fixture_key(2)}; // the second is not there
    outcome_t outcome;
    outcome_init(&outcome);
    cr_assert_eq(bkv_warm_start(fixture.pipeline, &fixture.model.id, keys, 3, warmed, &outcome, NULL), BKV_OK);
    outcome_wait(&outcome);
    cr_assert_eq(outcome.error.status, BKV_OK);
    cr_assert_eq(fixture_metrics(&fixture).gpu_records, 2);
    attend_and_expect(&fixture, (const uint32_t[]){1, 2}, 2, 0, 2);
    cr_assert_eq(fixture_metrics(&fixture).gpu_loads_total, 2);
    fixture_close(&fixture);
}

// A copy of what was dropped and put anew, under the same key, is not taken for it.
Test(device_cache, another_record_under_the_same_name_is_another) {
    fixture_t fixture;
    fake_gpu_plug(1);
    fixture_open_gpu(&fixture, 1, 64, 4 << 20);
    const uint32_t number = 1;
    bkv_key_t key = fixture_key(number);
    fixture_put_block(&fixture, number, 0, BLOCK, BKV_CODEC_RAW);
    attend_and_expect(&fixture, &number, 1, 0, 2);
    cr_assert(bkv_store_drop(fixture.store, &fixture.model.id, &key, fixture_now()));
    fixture_put_block(&fixture, number, 0, BLOCK / 2, BKV_CODEC_RAW);
    attend_and_expect(&fixture, &number, 1, 0, 2);
    bkv_pipeline_metrics_t metrics = fixture_metrics(&fixture);
    cr_assert_eq(metrics.gpu_loads_total, 2);
    cr_assert_eq(metrics.gpu_records, 1);
    fixture_close(&fixture);
}

// Far more records than fit, of several sizes, in any order: what came first goes first, and no answer is wrong.
Test(device_cache, what_came_first_makes_room) {
    fixture_t fixture;
    fake_gpu_plug(1);
    fixture_open_gpu(&fixture, 1, 64, 300 << 10);
    for (uint32_t i = 0; i < 24; i++) {
        fixture_put_block(&fixture, i, i * BLOCK, 16 * (1 + i % 4), BKV_CODEC_RAW);
    }
    uint32_t random = 1;
    for (uint32_t turn = 0; turn < 150; turn++) {
        uint32_t numbers[4], count = 1 + turn % 4;
        for (uint32_t i = 0; i < count; i++) {
            random = random * 1664525u + 1013904223u;
            numbers[i] = random >> 16;
            numbers[i] %= 24;
        }
        attend_and_expect(&fixture, numbers, count, 0, 2);
        cr_assert_leq(fixture_metrics(&fixture).gpu_bytes, 300 << 10);
    }
    bkv_pipeline_metrics_t metrics = fixture_metrics(&fixture);
    cr_assert_eq(metrics.attends_gpu_total, 150);
    cr_assert_gt(metrics.gpu_loads_total, 50);
    cr_assert_gt(metrics.gpu_hits_total, 50);
    fixture_close(&fixture);
}

Test(device_cache, more_than_fits_at_once_is_the_cpus) {
    fixture_t fixture;
    fake_gpu_plug(1);
    fixture_open_gpu(&fixture, 1, 64, 100 << 10);
    const uint32_t numbers[] = {1, 2, 3};
    for (uint32_t i = 1; i <= 3; i++) {
        fixture_put_block(&fixture, i, i * BLOCK, BLOCK, BKV_CODEC_RAW);
    }
    attend_and_expect(&fixture, numbers, 3, 0, 2);
    cr_assert_eq(fixture_metrics(&fixture).attends_gpu_total, 0);
    attend_and_expect(&fixture, numbers, 2, 0, 2);
    cr_assert_eq(fixture_metrics(&fixture).attends_gpu_total, 1);
    fixture_close(&fixture);
}

Test(device_cache, a_gpu_that_fails_is_gone_round) {
    fixture_t fixture;
    fake_gpu_plug(1);
    fixture_open_gpu(&fixture, 1, 64, 4 << 20);
    const uint32_t number = 1;
    fixture_put_block(&fixture, number, 0, BLOCK, BKV_CODEC_RAW);
    attend_and_expect(&fixture, &number, 1, 0, 2);
    fake_gpu_break(true);
    attend_and_expect(&fixture, &number, 1, 0, 2);
    attend_and_expect(&fixture, &number, 1, 0, 2);
    cr_assert_eq(fixture_metrics(&fixture).attends_gpu_total, 1);
    fixture_close(&fixture);
}

// Somebody else in the process resets the device: what lay there must not be used, nor given back.
Test(device_cache, a_reset_closes_it) {
    fixture_t fixture;
    fake_gpu_plug(1);
    fixture_open_gpu(&fixture, 1, 64, 4 << 20);
    const uint32_t number = 1;
    fixture_put_block(&fixture, number, 0, BLOCK, BKV_CODEC_RAW);
    attend_and_expect(&fixture, &number, 1, 0, 2);
    bkv_pipeline_device_lost(fixture.pipeline);
    cr_assert_eq(bkv_gpu_reset(0), 0);
    attend_and_expect(&fixture, &number, 1, 0, 2);
    cr_assert_eq(fixture_metrics(&fixture).attends_gpu_total, 1);
    fixture_close(&fixture);
}

#define THREADS 4

typedef struct asker {
    fixture_t *fixture;
    uint32_t seed;
    pthread_t thread;
} asker_t;

static void *ask(void *argument) {
    asker_t *asker = argument;
    uint32_t random = asker->seed;
    for (uint32_t turn = 0; turn < 60; turn++) {
        uint32_t numbers[3];
        for (uint32_t i = 0; i < 3; i++) {
            random = random * 1664525u + 1013904223u;
            numbers[i] = (random >> 16) % 12;
        }
        attend_and_expect(asker->fixture, numbers, 3, 0, 2);
    }
    return NULL;
}

Test(device_cache, many_at_once) {
    fixture_t fixture;
    asker_t askers[THREADS];
    fake_gpu_plug(1);
    fixture_open_gpu(&fixture, THREADS, 64, 400 << 10);
    for (uint32_t i = 0; i < 12; i++) {
        fixture_put_block(&fixture, i, i * BLOCK, BLOCK - i % 3, BKV_CODEC_RAW);
    }
    for (uint32_t i = 0; i < THREADS; i++) {
        askers[i] = (asker_t){.fixture = &fixture, .seed = i + 1};
        cr_assert_eq(pthread_create(&askers[i].thread, NULL, ask, &askers[i]), 0);
    }
    for (uint32_t i = 0; i < THREADS; i++) {
        pthread_join(askers[i].thread, NULL);
    }
    cr_assert_gt(fixture_metrics(&fixture).attends_gpu_total, 0);
    fixture_close(&fixture);
}
