// bench.h - what the parts of `make bench` share: one daemon, two clients of it (payloads in messages and in shared memory),
// the bare gRPC C core, one report.
//
// Everything is measured in turn in one run, ours and what it is compared with alternating, and told as medians: both see the
// same machine. A failure ends the process: it is a bench.
#ifndef BKV_BENCH_BENCH_H
#define BKV_BENCH_BENCH_H

#include "client/balancekv.h"
#include "tests/bench/bare.h"
#include "tests/bench/report.h"

#define BKV_BENCH_MIB         ((size_t)1024 * 1024)
#define BKV_BENCH_LARGEST     (64 * BKV_BENCH_MIB)
#define BKV_BENCH_TOKEN_BYTES ((size_t)2 * 8 * 8 * 128 * 2) // K and V, 8 layers, 8 heads, 128 channels, bf16

// How to run Mooncake Store, if at all: bench_mooncake.py by a Python that has its wheel (mooncake.sh).
typedef struct bkv_bench_mooncake {
    const char *python, *script; // NULL: not
} bkv_bench_mooncake_t;

typedef struct bkv_bench {
    const char *folder; // for sockets; a new one under /tmp
    bkv_client_t *client;
    bkv_client_t *shm; // of the same daemon; NULL: it could not be had, and that has been said
    bkv_spec_id_t spec;
    const uint8_t *payload; // BKV_BENCH_LARGEST bytes of finite numbers
    bkv_bare_t bare;
    uint32_t next_key;
    bkv_bench_mooncake_t mooncake;
    bool quick; // few rounds: to see that it runs
    bkv_report_t report;
} bkv_bench_t;

double bkv_bench_now(void); // seconds
void bkv_bench_fail(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));
void bkv_bench_must(bkv_status_t status, const bkv_error_t *error, const char *what);

// A key that was not there before.
bkv_key_t bkv_bench_key(bkv_bench_t *bench);

// A block of `bytes` (a multiple of BKV_BENCH_TOKEN_BYTES) for bkv_put.
bkv_put_t bkv_bench_block(const bkv_key_t *key, const uint8_t *payload, size_t bytes);

// Put and Get of one block, waited for; seconds. Get leaves the record with the caller.
double bkv_bench_put(bkv_bench_t *bench, bkv_client_t *client, const bkv_key_t *key, const uint8_t *payload, size_t bytes);
double bkv_bench_get(bkv_bench_t *bench, bkv_client_t *client, const bkv_key_t *key, bkv_record_t *record);
void bkv_bench_drop(bkv_bench_t *bench, const bkv_key_t *key);

// Is this the record of a raw block of these bytes?
void bkv_bench_expect(const bkv_record_t *record, const uint8_t *payload, size_t bytes);

// Rounds to measure, of `full`.
uint32_t bkv_bench_rounds(const bkv_bench_t *bench, uint32_t full);

// The parts. Each adds its rows to the report, or says aloud why it does not.
void bkv_bench_rpc(bkv_bench_t *bench);    // bench_rpc.c: messages against the bare gRPC C core
void bkv_bench_data(bkv_bench_t *bench);   // bench_data.c: shared memory against memcpy
void bkv_bench_stores(bkv_bench_t *bench); // bench_stores.c: both against Redis and Mooncake Store

#endif
