// pool.c - compute threads: one mutex, one FIFO, one condition for "work" and one for "idle".
//
// Jobs take from tens of microseconds to seconds, so a plain queue is enough; what they do is their owners' (put.c, fold.c,
// attend.c).
#include "daemon/pipeline/pool.h"

#include <assert.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define SCRATCH_ALIGN 64
#define SCRATCH_KEEP  ((size_t)64 << 20) // a larger workspace is given back after its job: one odd request is not the norm
#define MAX_THREADS   1024

struct bkv_pool {
    pthread_mutex_t lock; // all of the below
    pthread_cond_t work;  // queue not empty, or stopping
    pthread_cond_t idle;  // queue empty and nothing running
    bkv_job_t *head, **tail;
    bkv_pool_state_t state;
    uint32_t max_jobs;
    bool stopping;
    uint32_t threads;
    pthread_t thread[];
};

void *bkv_scratch_get(bkv_scratch_t *scratch, size_t bytes) {
    if (bytes > scratch->bytes) {
        if (bytes > SIZE_MAX - SCRATCH_ALIGN) {
            return NULL;
        }
        size_t rounded = (bytes + SCRATCH_ALIGN - 1) / SCRATCH_ALIGN * SCRATCH_ALIGN;
        free(scratch->memory);
        scratch->memory = aligned_alloc(SCRATCH_ALIGN, rounded);
        scratch->bytes = scratch->memory == NULL ? 0 : rounded;
    }
    return scratch->memory;
}

static void scratch_trim(bkv_scratch_t *scratch, size_t keep) {
    if (scratch->bytes > keep) {
        free(scratch->memory);
        *scratch = (bkv_scratch_t){0};
    }
}

static bkv_job_t *queue_pop(bkv_pool_t *pool) {
    bkv_job_t *job = pool->head;
    pool->head = job->next;
    if (pool->head == NULL) {
        pool->tail = &pool->head;
    }
    pool->state.queued--;
    return job;
}

static void *compute_main(void *argument) {
    bkv_pool_t *pool = argument;
    bkv_scratch_t scratch = {0};
    pthread_mutex_lock(&pool->lock);
    for (;;) {
        while (pool->head == NULL && !pool->stopping) {
            pthread_cond_wait(&pool->work, &pool->lock);
        }
        if (pool->stopping) {
            break; // what is still queued is cancelled by bkv_pool_destroy
        }
        bkv_job_t *job = queue_pop(pool);
        pool->state.running++;
        pthread_mutex_unlock(&pool->lock);

        job->run(job, &scratch);
        scratch_trim(&scratch, SCRATCH_KEEP);

        pthread_mutex_lock(&pool->lock);
        pool->state.running--;
        pool->state.ended++;
        if (pool->state.running == 0 && pool->head == NULL) {
            pthread_cond_broadcast(&pool->idle);
        }
    }
    pthread_mutex_unlock(&pool->lock);
    scratch_trim(&scratch, 0);
    return NULL;
}

static uint32_t cpu_count(void) {
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof(set), &set) != 0) {
        return 1; // more than CPU_SETSIZE CPUs: say compute.threads
    }
    return (uint32_t)CPU_COUNT(&set);
}

// Starts the threads with all signals blocked: those are the event loop's.
static uint32_t start_threads(bkv_pool_t *pool, uint32_t wanted) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    uint32_t started = 0;
    while (started < wanted && pthread_create(&pool->thread[started], NULL, compute_main, pool) == 0) {
        char name[16];
        snprintf(name, sizeof(name), "bkv-compute-%u", started % 1000);
        pthread_setname_np(pool->thread[started], name);
        started++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return started;
}

bkv_status_t bkv_pool_create(uint32_t threads, uint32_t max_jobs, bkv_pool_t **pool_out, bkv_error_t *err) {
    assert(max_jobs > 0);
    uint32_t wanted = threads != 0 ? threads : cpu_count();
    if (wanted > MAX_THREADS) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "compute.threads: %u is more than %d", wanted, MAX_THREADS);
    }
    bkv_pool_t *pool = calloc(1, sizeof(*pool) + wanted * sizeof(pool->thread[0]));
    if (pool == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "compute.threads: no memory for %u threads", wanted);
    }
    pool->tail = &pool->head;
    pool->max_jobs = max_jobs;
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->work, NULL);
    pthread_cond_init(&pool->idle, &monotonic);
    pthread_condattr_destroy(&monotonic);
    pool->threads = start_threads(pool, wanted);
    if (pool->threads < wanted) {
        uint32_t started = pool->threads;
        bkv_pool_destroy(pool);
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "compute.threads: only %u of %u threads could be started", started,
                        wanted);
    }
    *pool_out = pool;
    return BKV_OK;
}

bkv_status_t bkv_pool_submit(bkv_pool_t *pool, bkv_job_t *job, bkv_error_t *err) {
    assert(job->run != NULL && job->cancel != NULL);
    pthread_mutex_lock(&pool->lock);
    bool full = pool->state.queued >= pool->max_jobs;
    if (!full) {
        job->next = NULL;
        *pool->tail = job;
        pool->tail = &job->next;
        pool->state.queued++;
        pthread_cond_signal(&pool->work);
    }
    pthread_mutex_unlock(&pool->lock);
    return full ? bkv_fail(err, BKV_BUSY, "%u jobs are waiting for a compute thread (compute.max_jobs)", pool->max_jobs)
                : BKV_OK;
}

bool bkv_pool_wait_idle(bkv_pool_t *pool, uint64_t timeout_ms) {
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    uint64_t nanoseconds = (uint64_t)until.tv_nsec + timeout_ms % 1000 * 1000000;
    until.tv_sec += (time_t)(timeout_ms / 1000 + nanoseconds / 1000000000);
    until.tv_nsec = (long)(nanoseconds % 1000000000);
    int rc = 0;
    pthread_mutex_lock(&pool->lock);
    while ((pool->head != NULL || pool->state.running != 0) && rc == 0) {
        rc = pthread_cond_timedwait(&pool->idle, &pool->lock, &until);
    }
    bool idle = pool->head == NULL && pool->state.running == 0;
    pthread_mutex_unlock(&pool->lock);
    return idle;
}

void bkv_pool_state(bkv_pool_t *pool, bkv_pool_state_t *state) {
    pthread_mutex_lock(&pool->lock);
    *state = pool->state;
    pthread_mutex_unlock(&pool->lock);
}

void bkv_pool_destroy(bkv_pool_t *pool) {
    if (pool == NULL) {
        return;
    }
    pthread_mutex_lock(&pool->lock);
    pool->stopping = true;
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->lock);
    for (uint32_t i = 0; i < pool->threads; i++) {
        pthread_join(pool->thread[i], NULL);
    }
    while (pool->head != NULL) {
        bkv_job_t *job = queue_pop(pool);
        job->cancel(job);
    }
    pthread_cond_destroy(&pool->idle);
    pthread_cond_destroy(&pool->work);
    pthread_mutex_destroy(&pool->lock);
    free(pool);
}
