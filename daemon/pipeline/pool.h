// pool.h - compute threads and the bounded queue before them.
//
// A job is a struct of its owner's with a bkv_job_t as its first member: queueing it allocates nothing. Each thread keeps one
// scratch buffer, which kernels use as workspace; it grows to what the jobs need and stays.
#ifndef BKV_POOL_H
#define BKV_POOL_H

#include "kernels/status.h"

#include <stdbool.h>
#include <stdint.h>

typedef struct bkv_pool bkv_pool_t;
typedef struct bkv_job bkv_job_t;

// A thread's own workspace.
typedef struct bkv_scratch {
    void *memory;
    size_t bytes;
} bkv_scratch_t;

struct bkv_job {
    // Exactly one of the two is called, once, after which the pool does not touch the job: `run` on a compute thread, `cancel`
    // on the destroying thread for a job that was still queued.
    void (*run)(bkv_job_t *job, bkv_scratch_t *scratch);
    void (*cancel)(bkv_job_t *job);
    bkv_job_t *next; // the pool's
};

typedef struct bkv_pool_state {
    uint32_t queued, running;
    uint64_t ended; // jobs that have run, ever
} bkv_pool_state_t;

// At least `bytes` bytes, 64-byte aligned, contents undefined; NULL without memory. Valid until the next call or the job's end.
void *bkv_scratch_get(bkv_scratch_t *scratch, size_t bytes);

// threads 0: one per CPU that this process may use. max_jobs: how many may wait.
bkv_status_t bkv_pool_create(uint32_t threads, uint32_t max_jobs, bkv_pool_t **pool, bkv_error_t *err);

// BUSY: max_jobs are waiting; the job is still the caller's. Thread-safe.
bkv_status_t bkv_pool_submit(bkv_pool_t *pool, bkv_job_t *job, bkv_error_t *err);

// Waits at most timeout_ms until nothing is queued or running. Returns whether that came true.
bool bkv_pool_wait_idle(bkv_pool_t *pool, uint64_t timeout_ms);

void bkv_pool_state(bkv_pool_t *pool, bkv_pool_state_t *state);

// Lets running jobs end, cancels queued ones, joins the threads, frees.
void bkv_pool_destroy(bkv_pool_t *pool);

#endif
