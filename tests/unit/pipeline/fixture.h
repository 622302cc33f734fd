// fixture.h - a pipeline over a small store, with a fake clock, for the tests of this room.
#ifndef BKV_TEST_PIPELINE_FIXTURE_H
#define BKV_TEST_PIPELINE_FIXTURE_H

#include "daemon/pipeline/internal.h"

#include <semaphore.h>

#define FIXTURE_ARENA   (UINT64_C(64) << 20)
#define FIXTURE_STAGING (UINT64_C(4) << 20)
#define FIXTURE_BATCH   128

typedef struct fixture {
    bkv_store_t *store;
    bkv_pipeline_t *pipeline;
    bkv_model_t model;
} fixture_t;

// 2 layers, 2 KV heads, key_dim 32, value_dim 16, fp32, blocks of at most 64 tokens, codec raw. threads 0 means 2.
void fixture_open(fixture_t *fixture, uint32_t threads, uint32_t max_jobs);
// The same with a cache of records in memory of the fake GPU, which must be there.
void fixture_open_gpu(fixture_t *fixture, uint32_t threads, uint32_t max_jobs, uint64_t gpu_cache_bytes);
void fixture_close(fixture_t *fixture);

// The pipeline's clock.
uint64_t fixture_now(void);
void fixture_advance(uint64_t ms);

// A key that is different for each number.
bkv_key_t fixture_key(uint32_t number);

// K and V of a block as a payload, normal numbers from the seed; malloc'ed.
float *fixture_payload(const fixture_t *fixture, uint32_t tokens, uint64_t seed);
uint64_t fixture_bytes(const fixture_t *fixture, uint32_t tokens);

// Arguments of a Put of such a block.
bkv_ingest_args_t fixture_args(const fixture_t *fixture, uint32_t key, uint64_t position, uint32_t tokens, bkv_codec_t codec);

// What a done callback said.
typedef struct outcome {
    sem_t called;
    uint32_t calls;
    bkv_error_t error;
    bkv_ingest_result_t put;
    bkv_fold_result_t fold;
} outcome_t;

void outcome_init(outcome_t *outcome);
void outcome_wait(outcome_t *outcome); // asserts that it is called exactly once so far
void outcome_put_done(void *user, const bkv_error_t *error, const bkv_ingest_result_t *result);
void outcome_fold_done(void *user, const bkv_error_t *error, bkv_fold_result_t *result);
void outcome_attend_done(void *user, const bkv_error_t *error);

// Begin, write in uneven pieces, commit, wait.
bkv_status_t fixture_put(fixture_t *fixture, const bkv_ingest_args_t *args, const void *payload, outcome_t *outcome);

// The same, and asserts that it worked: a block of `tokens` tokens from seed = key.
void fixture_put_block(fixture_t *fixture, uint32_t key, uint64_t position, uint32_t tokens, bkv_codec_t codec);

bkv_store_metrics_t fixture_store_metrics(fixture_t *fixture);
bkv_pipeline_metrics_t fixture_metrics(fixture_t *fixture);

// Asserts that nothing is held: no pin, no staging memory, no job.
void fixture_assert_idle(fixture_t *fixture);

// A job that keeps a compute thread until it is released.
typedef struct blocker {
    bkv_job_t job;
    sem_t running, release;
} blocker_t;

void blocker_start(blocker_t *blocker, fixture_t *fixture); // returns once it runs

#endif
