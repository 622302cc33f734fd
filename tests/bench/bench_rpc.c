// bench_rpc.c - Put, Get and Lookup in gRPC messages through the client library and the real daemon, against the bare gRPC C
// core (bare.c), over unix sockets.
//
// Put and Get move a block of codec raw. The bar is the bare echo of the same bytes, which brings them there and back. Two
// stricter comparisons, without a bar, stand beside it: the echo credited with the bytes of both ways, and the bare one-way
// transfer.
#include "tests/bench/bench.h"

#include <stdio.h>

#define MAX_ROUNDS    960
#define LOOKUP_ROUNDS 3000
#define LOOKUP_KEYS   64

enum { UPLOAD, DOWNLOAD, ECHO, PUT, GET, KINDS };

static double bare_call(bkv_bench_t *bench, bkv_bare_method_t method, size_t bytes) {
    double start = bkv_bench_now();
    bkv_bare_call(&bench->bare, method, bytes);
    return bkv_bench_now() - start;
}

static void round_once(bkv_bench_t *bench, size_t bytes, double seconds[KINDS]) {
    bkv_key_t key = bkv_bench_key(bench);
    bkv_record_t record;
    seconds[UPLOAD] = bare_call(bench, BKV_BARE_UPLOAD, bytes);
    seconds[PUT] = bkv_bench_put(bench, bench->client, &key, bench->payload, bytes);
    seconds[ECHO] = bare_call(bench, BKV_BARE_ECHO, bytes);
    seconds[GET] = bkv_bench_get(bench, bench->client, &key, &record);
    bkv_bench_expect(&record, bench->payload, bytes);
    bkv_record_free(&record);
    seconds[DOWNLOAD] = bare_call(bench, BKV_BARE_DOWNLOAD, bytes);
    bkv_bench_drop(bench, &key);
}

static void report_against(bkv_bench_t *bench, const char *what, size_t bytes, double rate, double echo, const char *one_way,
                           double one_way_rate) {
    char name[64];
    snprintf(name, sizeof(name), "%s %zu MiB, inline", what, bytes / BKV_BENCH_MIB);
    bkv_report_add(&bench->report, name, rate, "GB/s", "bare echo of the same bytes", echo, BKV_BAR_AT_LEAST, 0.9);
    bkv_report_add(&bench->report, name, rate, "GB/s", "bare echo, both ways counted", 2 * echo, BKV_BAR_NONE, 0);
    bkv_report_add(&bench->report, name, rate, "GB/s", one_way, one_way_rate, BKV_BAR_NONE, 0);
}

static void measure_blocks(bkv_bench_t *bench, size_t bytes, uint32_t full) {
    static double samples[KINDS][MAX_ROUNDS];
    double seconds[KINDS], rate[KINDS];
    uint32_t rounds = bkv_bench_rounds(bench, full);
    for (uint32_t i = 0; i < rounds / 10 + 3; i++) {
        round_once(bench, bytes, seconds); // warm
    }
    for (uint32_t i = 0; i < rounds; i++) {
        round_once(bench, bytes, seconds);
        for (int kind = 0; kind < KINDS; kind++) {
            samples[kind][i] = seconds[kind];
        }
    }
    for (int kind = 0; kind < KINDS; kind++) {
        rate[kind] = (double)bytes / bkv_quantile(samples[kind], rounds, 0.5) / 1e9;
    }
    report_against(bench, "put", bytes, rate[PUT], rate[ECHO], "bare upload", rate[UPLOAD]);
    report_against(bench, "get", bytes, rate[GET], rate[ECHO], "bare download", rate[DOWNLOAD]);
}

static void measure_lookup(bkv_bench_t *bench) {
    static double bare[LOOKUP_ROUNDS], ours[LOOKUP_ROUNDS];
    int rounds = (int)bkv_bench_rounds(bench, LOOKUP_ROUNDS);
    bkv_error_t error;
    bkv_key_t keys[LOOKUP_KEYS];
    bool resident[LOOKUP_KEYS];
    size_t prefix;
    for (size_t i = 0; i < LOOKUP_KEYS; i++) {
        keys[i] = bkv_bench_key(bench);
        bkv_bench_put(bench, bench->client, &keys[i], bench->payload, BKV_BENCH_TOKEN_BYTES);
    }
    size_t request = 18 + LOOKUP_KEYS * 34; // what a LookupRequest takes; the bare reply is as long as a LookupResponse
    for (int i = -rounds / 10; i < rounds; i++) {
        double before = bare_call(bench, BKV_BARE_UNARY, request), start = bkv_bench_now();
        bkv_status_t status = bkv_lookup(bench->client, &bench->spec, keys, LOOKUP_KEYS, 0, resident, &prefix, &error);
        double seconds = bkv_bench_now() - start;
        bkv_bench_must(status, &error, "Lookup");
        if (prefix != LOOKUP_KEYS) {
            bkv_bench_fail("Lookup found %zu of %d keys", prefix, LOOKUP_KEYS);
        }
        if (i >= 0) {
            bare[i] = before * 1e6;
            ours[i] = seconds * 1e6;
        }
    }
    size_t count = (size_t)rounds;
    bkv_report_add(&bench->report, "lookup p50, 64 keys", bkv_quantile(ours, count, 0.5), "us", "bare unary p50",
                   bkv_quantile(bare, count, 0.5), BKV_BAR_AT_MOST, 1.5);
    bkv_report_add(&bench->report, "lookup p99, 64 keys", bkv_quantile(ours, count, 0.99), "us", "bare unary p99",
                   bkv_quantile(bare, count, 0.99), BKV_BAR_NONE, 0);
    for (size_t i = 0; i < LOOKUP_KEYS; i++) {
        bkv_bench_drop(bench, &keys[i]);
    }
}

void bkv_bench_rpc(bkv_bench_t *bench) {
    measure_blocks(bench, 1 * BKV_BENCH_MIB, MAX_ROUNDS);
    measure_blocks(bench, 4 * BKV_BENCH_MIB, MAX_ROUNDS / 4);
    measure_blocks(bench, 16 * BKV_BENCH_MIB, MAX_ROUNDS / 16);
    measure_lookup(bench);
}
