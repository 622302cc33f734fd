// test_pool.c - every job ends exactly once: run in order, refused at the door, or cancelled at the end.
#include "daemon/pipeline/pool.h"

#include <criterion/criterion.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

typedef struct probe {
    bkv_job_t job;
    _Atomic int runs, cancels;
    uint64_t place; // in the order of running
    sem_t *started, *release;
    size_t scratch_bytes;
} probe_t;

static _Atomic uint64_t order;

static void probe_run(bkv_job_t *job, bkv_scratch_t *scratch) {
    probe_t *probe = (probe_t *)job;
    if (probe->started != NULL) {
        sem_post(probe->started);
        while (sem_wait(probe->release) != 0) {
        }
    }
    if (probe->scratch_bytes > 0) {
        uint8_t *memory = bkv_scratch_get(scratch, probe->scratch_bytes);
        cr_assert_not_null(memory);
        cr_assert_eq((uintptr_t)memory % 64, 0);
        memset(memory, 0xab, probe->scratch_bytes);
    }
    probe->place = atomic_fetch_add(&order, 1);
    atomic_fetch_add(&probe->runs, 1);
}

static void probe_cancel(bkv_job_t *job) {
    atomic_fetch_add(&((probe_t *)job)->cancels, 1);
}

#define PROBE ((probe_t){.job = {.run = probe_run, .cancel = probe_cancel}})

Test(pipeline_pool, one_thread_runs_jobs_in_order) {
    enum { JOBS = 100 };
    static probe_t probes[JOBS];
    bkv_pool_t *pool;
    cr_assert_eq(bkv_pool_create(1, JOBS, &pool, NULL), BKV_OK);
    for (int i = 0; i < JOBS; i++) {
        probes[i] = PROBE;
        probes[i].scratch_bytes = (size_t)i * 777;
        cr_assert_eq(bkv_pool_submit(pool, &probes[i].job, NULL), BKV_OK);
    }
    cr_assert(bkv_pool_wait_idle(pool, 60000));
    for (int i = 0; i < JOBS; i++) {
        cr_assert_eq(atomic_load(&probes[i].runs), 1);
        cr_assert_eq(probes[i].place, (uint64_t)i);
    }
    bkv_pool_state_t state;
    bkv_pool_state(pool, &state);
    cr_assert_eq(state.ended, JOBS);
    cr_assert_eq(state.queued + state.running, 0);
    bkv_pool_destroy(pool);
}

Test(pipeline_pool, full_queue_is_busy_and_wait_times_out) {
    sem_t started, release;
    sem_init(&started, 0, 0);
    sem_init(&release, 0, 0);
    probe_t blocking = PROBE, waiting[2] = {PROBE, PROBE}, refused = PROBE;
    blocking.started = &started;
    blocking.release = &release;
    bkv_pool_t *pool;
    cr_assert_eq(bkv_pool_create(1, 2, &pool, NULL), BKV_OK);
    cr_assert_eq(bkv_pool_submit(pool, &blocking.job, NULL), BKV_OK);
    sem_wait(&started);
    cr_assert_eq(bkv_pool_submit(pool, &waiting[0].job, NULL), BKV_OK);
    cr_assert_eq(bkv_pool_submit(pool, &waiting[1].job, NULL), BKV_OK);
    bkv_error_t err;
    cr_assert_eq(bkv_pool_submit(pool, &refused.job, &err), BKV_BUSY);
    cr_assert_not_null(strstr(err.message, "max_jobs"));
    cr_assert_not(bkv_pool_wait_idle(pool, 1));
    sem_post(&release);
    cr_assert(bkv_pool_wait_idle(pool, 60000));
    cr_assert_eq(atomic_load(&waiting[0].runs) + atomic_load(&waiting[1].runs), 2);
    cr_assert_eq(atomic_load(&refused.runs) + atomic_load(&refused.cancels), 0);
    bkv_pool_destroy(pool);
}

static void *destroy(void *pool) {
    bkv_pool_destroy(pool);
    return NULL;
}

Test(pipeline_pool, destroy_cancels_what_waits) {
    sem_t started, release;
    sem_init(&started, 0, 0);
    sem_init(&release, 0, 0);
    probe_t blocking = PROBE, waiting = PROBE;
    blocking.started = &started;
    blocking.release = &release;
    bkv_pool_t *pool;
    cr_assert_eq(bkv_pool_create(1, 8, &pool, NULL), BKV_OK);
    cr_assert_eq(bkv_pool_submit(pool, &blocking.job, NULL), BKV_OK);
    sem_wait(&started);
    cr_assert_eq(bkv_pool_submit(pool, &waiting.job, NULL), BKV_OK);
    pthread_t destroyer;
    pthread_create(&destroyer, NULL, destroy, pool);
    usleep(200000); // until it waits for the running job; nothing outside can see that
    sem_post(&release);
    pthread_join(destroyer, NULL);
    cr_assert_eq(atomic_load(&blocking.runs), 1);
    cr_assert_eq(atomic_load(&waiting.runs), 0);
    cr_assert_eq(atomic_load(&waiting.cancels), 1);
}

static void *submit_many(void *argument) {
    bkv_pool_t *pool = ((void **)argument)[0];
    probe_t *probes = ((void **)argument)[1];
    for (int i = 0; i < 200; i++) {
        cr_assert_eq(bkv_pool_submit(pool, &probes[i].job, NULL), BKV_OK);
    }
    return NULL;
}

Test(pipeline_pool, many_submitters) {
    static probe_t probes[3][200];
    bkv_pool_t *pool;
    cr_assert_eq(bkv_pool_create(3, 600, &pool, NULL), BKV_OK);
    pthread_t threads[3];
    void *arguments[3][2];
    for (int t = 0; t < 3; t++) {
        for (int i = 0; i < 200; i++) {
            probes[t][i] = PROBE;
        }
        arguments[t][0] = pool;
        arguments[t][1] = probes[t];
        pthread_create(&threads[t], NULL, submit_many, arguments[t]);
    }
    for (int t = 0; t < 3; t++) {
        pthread_join(threads[t], NULL);
    }
    cr_assert(bkv_pool_wait_idle(pool, 60000));
    for (int t = 0; t < 3; t++) {
        for (int i = 0; i < 200; i++) {
            cr_assert_eq(atomic_load(&probes[t][i].runs), 1);
        }
    }
    bkv_pool_destroy(pool);
}

Test(pipeline_pool, absurd_thread_count_is_refused) {
    bkv_pool_t *pool;
    cr_assert_eq(bkv_pool_create(1000000, 1, &pool, NULL), BKV_INVALID_ARGUMENT);
}

Test(pipeline_pool, scratch_that_cannot_be_had_is_null) {
    bkv_scratch_t scratch = {0};
    cr_assert_null(bkv_scratch_get(&scratch, SIZE_MAX));
}
