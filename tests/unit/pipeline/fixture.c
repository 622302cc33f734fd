// fixture.c - see fixture.h.
#include "fixture.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static _Atomic uint64_t clock_ms = 1000000;

uint64_t fixture_now(void) {
    return atomic_load(&clock_ms);
}

void fixture_advance(uint64_t ms) {
    atomic_fetch_add(&clock_ms, ms);
}

void fixture_open(fixture_t *fixture, uint32_t threads, uint32_t max_jobs) {
    fixture_open_gpu(fixture, threads, max_jobs, 0);
}

void fixture_open_gpu(fixture_t *fixture, uint32_t threads, uint32_t max_jobs, uint64_t gpu_cache_bytes) {
    bkv_error_t err;
    *fixture = (fixture_t){.store = NULL};
    const bkv_store_config_t store = {.arena_bytes = FIXTURE_ARENA, .slab_bytes = 8 << 20, .arena_fd = -1};
    cr_assert_eq(bkv_store_create(&store, fixture_now(), &fixture->store, NULL, &err), BKV_OK, "%s", err.message);
    const bkv_pipeline_config_t config = {
        .store = fixture->store,
        .backend = bkv_backend_get("ref"),
        .compute_threads = threads != 0 ? threads : 2,
        .max_jobs = max_jobs,
        .staging_bytes = FIXTURE_STAGING,
        .max_block_bytes = FIXTURE_STAGING,
        .gpu_cache_bytes = gpu_cache_bytes,
        .max_specs = 4,
        .max_batch = FIXTURE_BATCH,
        .now_ms = fixture_now,
    };
    cr_assert_eq(bkv_pipeline_create(&config, &fixture->pipeline, &err), BKV_OK, "%s", err.message);
    fixture->model = (bkv_model_t){
        .name = "test",
        .shape = {.layers = 2, .heads = 2, .tokens = 64, .key_dim = 32, .value_dim = 16, .dtype = BKV_FP32},
        .params = {.codec = BKV_CODEC_RAW, .sink = 4, .seed = 11},
    };
    cr_assert_eq(bkv_model_complete(&fixture->model, &err), BKV_OK, "%s", err.message);
    cr_assert_eq(bkv_model_table_add(bkv_pipeline_models(fixture->pipeline), &fixture->model, &err), BKV_OK);
}

void fixture_close(fixture_t *fixture) {
    fixture_assert_idle(fixture);
    bkv_pipeline_destroy(fixture->pipeline);
    bkv_store_destroy(fixture->store);
}

bkv_key_t fixture_key(uint32_t number) {
    bkv_key_t key;
    memset(key.bytes, 0x5a, sizeof(key.bytes));
    memcpy(key.bytes, &number, sizeof(number));
    return key;
}

uint64_t fixture_bytes(const fixture_t *fixture, uint32_t tokens) {
    bkv_shape_t shape = fixture->model.shape;
    shape.tokens = tokens;
    return bkv_shape_bytes(&shape);
}

// splitmix64 and Box-Muller.
static double uniform(uint64_t *state) {
    uint64_t z = *state += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return ((double)((z ^ (z >> 31)) >> 11) + 0.5) * 0x1p-53;
}

float *fixture_payload(const fixture_t *fixture, uint32_t tokens, uint64_t seed) {
    size_t numbers = fixture_bytes(fixture, tokens) / sizeof(float);
    float *payload = malloc(numbers * sizeof(float));
    uint64_t state = seed;
    for (size_t i = 0; i < numbers; i++) {
        double radius = sqrt(-2 * log(uniform(&state)));
        payload[i] = (float)(radius * cos(6.283185307179586 * uniform(&state)));
    }
    return payload;
}

bkv_ingest_args_t fixture_args(const fixture_t *fixture, uint32_t key, uint64_t position, uint32_t tokens, bkv_codec_t codec) {
    return (bkv_ingest_args_t){.spec_id = fixture->model.id,
                               .key = fixture_key(key),
                               .position = position,
                               .tokens = tokens,
                               .payload_bytes = fixture_bytes(fixture, tokens),
                               .codec = codec};
}

void outcome_init(outcome_t *outcome) {
    *outcome = (outcome_t){.calls = 0};
    sem_init(&outcome->called, 0, 0);
}

void outcome_wait(outcome_t *outcome) {
    while (sem_wait(&outcome->called) != 0) {
    }
    cr_assert_eq(outcome->calls, 1);
}

static void outcome_note(outcome_t *outcome, const bkv_error_t *error) {
    outcome->calls++;
    outcome->error = *error;
    sem_post(&outcome->called);
}

void outcome_put_done(void *user, const bkv_error_t *error, const bkv_ingest_result_t *result) {
    outcome_t *outcome = user;
    outcome->put = *result;
    outcome_note(outcome, error);
}

void outcome_fold_done(void *user, const bkv_error_t *error, bkv_fold_result_t *result) {
    outcome_t *outcome = user;
    outcome->fold = *result;
    outcome_note(outcome, error);
}

void outcome_attend_done(void *user, const bkv_error_t *error) {
    outcome_note(user, error);
}

bkv_status_t fixture_put(fixture_t *fixture, const bkv_ingest_args_t *args, const void *payload, outcome_t *outcome) {
    outcome_init(outcome);
    bkv_ingest_t *ingest;
    bkv_status_t status = bkv_ingest_begin(fixture->pipeline, args, fixture_now(), &ingest, &outcome->error);
    if (status != BKV_OK) {
        return status;
    }
    const uint8_t *bytes = payload;
    while (bkv_ingest_missing(ingest) > 0) {
        uint64_t piece = bkv_ingest_missing(ingest) < 1013 ? bkv_ingest_missing(ingest) : 1013;
        cr_assert_eq(bkv_ingest_write(ingest, bytes, piece, &outcome->error), BKV_OK, "%s", outcome->error.message);
        bytes += piece;
    }
    status = bkv_ingest_commit(ingest, outcome_put_done, outcome, &outcome->error);
    if (status != BKV_OK) {
        bkv_ingest_abort(ingest);
        return status;
    }
    outcome_wait(outcome);
    return outcome->error.status;
}

void fixture_put_block(fixture_t *fixture, uint32_t key, uint64_t position, uint32_t tokens, bkv_codec_t codec) {
    bkv_ingest_args_t args = fixture_args(fixture, key, position, tokens, codec);
    float *payload = fixture_payload(fixture, tokens, key);
    outcome_t outcome;
    cr_assert_eq(fixture_put(fixture, &args, payload, &outcome), BKV_OK, "%s", outcome.error.message);
    cr_assert_not(outcome.put.duplicate);
    free(payload);
}

bkv_store_metrics_t fixture_store_metrics(fixture_t *fixture) {
    bkv_store_metrics_t metrics;
    bkv_store_metrics(fixture->store, &metrics);
    return metrics;
}

bkv_pipeline_metrics_t fixture_metrics(fixture_t *fixture) {
    bkv_pipeline_metrics_t metrics;
    bkv_pipeline_metrics(fixture->pipeline, &metrics);
    return metrics;
}

void fixture_assert_idle(fixture_t *fixture) {
    cr_assert(bkv_pipeline_wait_idle(fixture->pipeline, 60000));
    cr_assert_eq(fixture_store_metrics(fixture).pinned, 0);
    cr_assert_eq(fixture_metrics(fixture).staging_bytes, 0);
}

static void blocker_run(bkv_job_t *job, bkv_scratch_t *scratch) {
    (void)scratch;
    blocker_t *blocker = (blocker_t *)job;
    sem_post(&blocker->running);
    while (sem_wait(&blocker->release) != 0) {
    }
}

static void blocker_cancel(bkv_job_t *job) {
    (void)job;
}

void blocker_start(blocker_t *blocker, fixture_t *fixture) {
    *blocker = (blocker_t){.job = {.run = blocker_run, .cancel = blocker_cancel}};
    sem_init(&blocker->running, 0, 0);
    sem_init(&blocker->release, 0, 0);
    cr_assert_eq(bkv_pool_submit(fixture->pipeline->pool, &blocker->job, NULL), BKV_OK);
    while (sem_wait(&blocker->running) != 0) {
    }
}
