// bench_data.c - blocks of codec raw through shared memory, against memcpy of the same bytes in the same run.
//
// Who copies: the daemon's compute threads, one a block. So one block at a time is compared with memcpy by one thread, and as
// many blocks in flight as the daemon has such threads (one for each CPU) with memcpy by as many threads.
//
// Memory is as cold on both sides: payloads lie in one of SOURCES blocks in turn, and are copied to one of TARGETS blocks in
// turn; so it is for records on their way back. All of it together is many times a core's own cache.
#include "tests/bench/bench.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define BYTES      (16 * BKV_BENCH_MIB)
#define SOURCES    4  // blocks of shared memory in use at once, and of memory that memcpy copies from
#define TARGETS    32 // blocks in the store
#define MAX_ROUNDS 64
#define WARM       8 // rounds before, in which every page is touched
#define MOST       8 // in flight

typedef struct data_bench {
    bkv_bench_t *bench;
    bkv_queue_t *queue;
    uint8_t *payloads[SOURCES]; // in shared memory
    uint8_t *from, *to;         // memcpy's: SOURCES and TARGETS blocks
    bkv_key_t keys[TARGETS];    // of blocks in the store
    uint32_t turn;              // blocks moved so far, by each side
    uint32_t threads;           // of the daemon that copy
} data_bench_t;

// ---- memcpy ----

typedef struct copier {
    data_bench_t *data;
    uint32_t first, step; // blocks first, first + step, ... of a turn
    uint32_t blocks;
    bool back; // from the many to the few
} copier_t;

static void *copy_blocks(void *user) {
    const copier_t *copier = user;
    const data_bench_t *data = copier->data;
    for (uint32_t i = copier->first; i < copier->blocks; i += copier->step) {
        uint8_t *few = data->from + (data->turn + i) % SOURCES * BYTES, *many = data->to + (data->turn + i) % TARGETS * BYTES;
        memcpy(copier->back ? few : many, copier->back ? many : few, BYTES);
    }
    return NULL;
}

// Seconds to copy `blocks` blocks by `threads` threads, this one among them.
static double copy(data_bench_t *data, uint32_t blocks, uint32_t threads, bool back) {
    pthread_t others[MOST];
    copier_t copiers[MOST];
    double start = bkv_bench_now();
    for (uint32_t i = 0; i < threads; i++) {
        copiers[i] = (copier_t){.data = data, .first = i, .step = threads, .blocks = blocks, .back = back};
        if (i > 0 && pthread_create(&others[i], NULL, copy_blocks, &copiers[i]) != 0) {
            bkv_bench_fail("no thread for memcpy");
        }
    }
    copy_blocks(&copiers[0]);
    for (uint32_t i = 1; i < threads; i++) {
        pthread_join(others[i], NULL);
    }
    return bkv_bench_now() - start;
}

// ---- ours ----

static void poll_one(data_bench_t *data) {
    bkv_completion_t completion;
    if (bkv_queue_poll(data->queue, &completion, 1, 20000) != 1) {
        bkv_bench_fail("nothing completes");
    }
    bkv_bench_must(completion.error.status, &completion.error, "shared memory");
}

// Seconds for `blocks` blocks, `flight` of them at once. Payload and place in the store are as in copy_blocks.
static double put(data_bench_t *data, uint32_t blocks, uint32_t flight) {
    bkv_put_t puts[TARGETS];
    for (uint32_t i = 0; i < blocks; i++) {
        bkv_key_t *key = &data->keys[(data->turn + i) % TARGETS];
        bkv_bench_drop(data->bench, key);
        *key = bkv_bench_key(data->bench);
        puts[i] = bkv_bench_block(key, data->payloads[(data->turn + i) % SOURCES], BYTES);
    }
    double start = bkv_bench_now();
    for (uint32_t i = 0; i < blocks + flight; i++) {
        if (i >= flight) {
            poll_one(data);
        }
        if (i < blocks && bkv_put_submit(data->queue, i, &data->bench->spec, &puts[i], 1, 0, NULL) != BKV_OK) {
            bkv_bench_fail("Put is not taken");
        }
    }
    return bkv_bench_now() - start;
}

static double get(data_bench_t *data, uint32_t blocks, uint32_t flight) {
    bkv_record_t records[TARGETS];
    double start = bkv_bench_now();
    for (uint32_t i = 0; i < blocks + flight; i++) {
        if (i >= flight) {
            poll_one(data);
        }
        // Records are given back late, so that they come to other memory in turn, but before there is none.
        if (i >= SOURCES + flight) {
            bkv_record_free(&records[i - SOURCES - flight]);
        }
        const bkv_key_t *key = &data->keys[(data->turn + i) % TARGETS];
        if (i < blocks && bkv_get_submit(data->queue, i, &data->bench->spec, key, 1, NULL, 0, &records[i]) != BKV_OK) {
            bkv_bench_fail("Get is not taken");
        }
    }
    double seconds = bkv_bench_now() - start;
    for (uint32_t i = blocks > SOURCES ? blocks - SOURCES : 0; i < blocks; i++) {
        bkv_bench_expect(&records[i], data->payloads[(data->turn + i) % SOURCES], BYTES);
        bkv_record_free(&records[i]);
    }
    return seconds;
}

// ---- the comparison ----

static void measure(data_bench_t *data, uint32_t flight, uint32_t threads, uint32_t blocks, bkv_bar_t bar) {
    static double samples[4][MAX_ROUNDS];
    uint32_t rounds = bkv_bench_rounds(data->bench, MAX_ROUNDS / flight);
    for (uint32_t i = 0; i < rounds + WARM; i++) {
        uint32_t at = i < WARM ? 0 : i - WARM;
        samples[0][at] = copy(data, blocks, threads, false);
        samples[1][at] = put(data, blocks, flight);
        samples[2][at] = copy(data, blocks, threads, true);
        samples[3][at] = get(data, blocks, flight);
        data->turn += blocks;
    }
    double rates[4];
    for (int i = 0; i < 4; i++) {
        rates[i] = (double)blocks * BYTES / bkv_quantile(samples[i], rounds, 0.5) / 1e9;
    }
    char name[64], against[48];
    snprintf(against, sizeof(against), "memcpy, %u thread%s", threads, threads > 1 ? "s" : "");
    snprintf(name, sizeof(name), "put 16 MiB, shm, %u in flight", flight);
    bkv_report_add(&data->bench->report, name, rates[1], "GB/s", against, rates[0], bar, 0.7);
    snprintf(name, sizeof(name), "get 16 MiB, shm, %u in flight", flight);
    bkv_report_add(&data->bench->report, name, rates[3], "GB/s", against, rates[2], bar, 0.7);
}

static uint8_t *memory(size_t bytes) {
    uint8_t *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (at == MAP_FAILED) {
        bkv_bench_fail("no memory for memcpy");
    }
    return at;
}

void bkv_bench_data(bkv_bench_t *bench) {
    if (bench->shm == NULL) {
        return; // said already
    }
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    data_bench_t data = {.bench = bench, .from = memory(SOURCES * BYTES), .to = memory(TARGETS * BYTES)};
    bkv_error_t error;
    bkv_bench_must(bkv_queue_create(bench->shm, 2 * MOST, &data.queue, &error), &error, "queue");
    for (uint32_t i = 0; i < SOURCES; i++) {
        data.payloads[i] = bkv_buffer_get(bench->shm, BYTES);
        if (data.payloads[i] == NULL) {
            bkv_bench_fail("no memory for payloads");
        }
        memcpy(data.payloads[i], bench->payload + i * BYTES, BYTES);
        memcpy(data.from + i * BYTES, bench->payload + i * BYTES, BYTES);
    }
    for (uint32_t i = 0; i < TARGETS; i++) {
        data.keys[i] = bkv_bench_key(bench);
        bkv_bench_put(bench, bench->shm, &data.keys[i], data.payloads[i % SOURCES], BYTES);
    }
    data.threads = cpus > MOST ? MOST : (uint32_t)cpus;
    measure(&data, 1, 1, 1, BKV_BAR_AT_LEAST);
    measure(&data, data.threads, data.threads, 8, BKV_BAR_AT_LEAST);
    for (uint32_t i = 0; i < TARGETS; i++) {
        bkv_bench_drop(bench, &data.keys[i]);
    }
    for (uint32_t i = 0; i < SOURCES; i++) {
        bkv_buffer_put(bench->shm, data.payloads[i]);
    }
    bkv_queue_destroy(data.queue);
    munmap(data.from, SOURCES * BYTES);
    munmap(data.to, TARGETS * BYTES);
}
