// bench_store.h - a store of blocks as bench_stores.c compares them: ours and those that a user might take instead.
//
// Keys are numbers, payloads lie one after the other in the memory that the store was started with, and what is got lies in
// memory that the caller can read. A store that works keeps its clock to itself: seconds of the operation alone.
#ifndef BKV_BENCH_STORE_H
#define BKV_BENCH_STORE_H

#include "tests/bench/bench.h"

#define BKV_BENCH_BATCH 64 // most blocks in one request

typedef struct bkv_bench_store {
    const char *name, *put_name, *get_name;
    void *self;       // NULL: it cannot be had here
    char reason[160]; // then: why
    // Blocks first, first + 1, ..., `bytes` each, in one request where the store has such. Seconds until all is done. get
    // compares what came with what was put after the clock has stopped. Failure ends the process.
    double (*put)(void *self, uint32_t first, uint32_t count, size_t bytes);
    double (*get)(void *self, uint32_t first, uint32_t count, size_t bytes);
    void (*drop)(void *self, uint32_t first, uint32_t count);
    void (*stop)(void *self);
} bkv_bench_store_t;

// redis-server on a unix socket in `folder`, without persistence; SET and GET by hiredis, several blocks as a pipeline.
bkv_bench_store_t bkv_bench_redis(const char *folder, const uint8_t *payload);

// Mooncake Store over TCP: a master, a process that owns the memory, and a client of its zero-copy calls, bench_mooncake.py;
// its payloads are its own.
bkv_bench_store_t bkv_bench_mooncake(const bkv_bench_mooncake_t *how, size_t largest);

#endif
