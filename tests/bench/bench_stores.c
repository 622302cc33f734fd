// bench_stores.c - blocks of raw bytes from 64 KiB to 64 MiB: ours, by shared memory and in messages, against Redis and
// Mooncake Store (bench_store.h), which a user might take instead.
//
// Each round every store puts and gets the same number of bytes under a new key, in turn; then the keys are dropped. Payloads
// lie in memory before the clock starts (of ours: in bkv_buffer_get's) and are readable in memory when it stops. One block is
// a request waited for; small blocks are measured as requests of BKV_BENCH_BATCH blocks too, as engines put them.
#include "tests/bench/bench.h"
#include "tests/bench/bench_store.h"

#include <stdio.h>
#include <string.h>

#define MAX_ROUNDS 1000

enum { SHM, INLINE, REDIS, MOONCAKE, STORES };

// ---- ours ----

typedef struct ours {
    bkv_bench_t *bench;
    bkv_client_t *client;
    uint8_t *payload;
    bkv_key_t keys[BKV_BENCH_BATCH];
} ours_t;

static double put(void *self, uint32_t first, uint32_t count, size_t bytes) {
    ours_t *ours = self;
    bkv_error_t error;
    bkv_put_t blocks[BKV_BENCH_BATCH];
    (void)first; // keys are made, not given
    for (uint32_t i = 0; i < count; i++) {
        ours->keys[i] = bkv_bench_key(ours->bench);
        blocks[i] = bkv_bench_block(&ours->keys[i], ours->payload + i * bytes, bytes);
    }
    double start = bkv_bench_now();
    bkv_status_t status = bkv_put(ours->client, &ours->bench->spec, blocks, count, 0, NULL, &error);
    double seconds = bkv_bench_now() - start;
    bkv_bench_must(status, &error, "Put");
    return seconds;
}

static double get(void *self, uint32_t first, uint32_t count, size_t bytes) {
    ours_t *ours = self;
    bkv_error_t error;
    bkv_record_t records[BKV_BENCH_BATCH];
    (void)first;
    double start = bkv_bench_now();
    bkv_status_t status = bkv_get(ours->client, &ours->bench->spec, ours->keys, count, NULL, 0, records, &error);
    double seconds = bkv_bench_now() - start;
    bkv_bench_must(status, &error, "Get");
    for (uint32_t i = 0; i < count; i++) {
        bkv_bench_expect(&records[i], ours->payload + i * bytes, bytes);
        bkv_record_free(&records[i]);
    }
    return seconds;
}

static void drop(void *self, uint32_t first, uint32_t count) {
    ours_t *ours = self;
    (void)first;
    for (uint32_t i = 0; i < count; i++) {
        bkv_bench_drop(ours->bench, &ours->keys[i]);
    }
}

static void stop(void *self) {
    ours_t *ours = self;
    bkv_buffer_put(ours->client, ours->payload);
}

static bkv_bench_store_t start_ours(const char *name, bkv_bench_t *bench, bkv_client_t *client, ours_t *ours) {
    bkv_bench_store_t store = {.name = name, .put = put, .get = get, .drop = drop, .stop = stop};
    if (client == NULL) {
        return store;
    }
    *ours = (ours_t){.bench = bench, .client = client, .payload = bkv_buffer_get(client, BKV_BENCH_LARGEST)};
    if (ours->payload == NULL) {
        bkv_bench_fail("no memory for payloads");
    }
    memcpy(ours->payload, bench->payload, BKV_BENCH_LARGEST);
    store.self = ours;
    return store;
}

// ---- all of them ----

static void size_text(size_t bytes, char out[16]) {
    bool small = bytes < BKV_BENCH_MIB;
    snprintf(out, 16, "%zu %s", small ? bytes / 1024 : bytes / BKV_BENCH_MIB, small ? "KiB" : "MiB");
}

// Ours by shared memory against each of the others; in messages for comparison.
static void report(bkv_bench_t *bench, const bkv_bench_store_t stores[STORES], const char *what, const double rates[STORES],
                   bool put) {
    char name[64];
    for (int other = REDIS; other < STORES && rates[SHM] > 0; other++) {
        if (rates[other] > 0) {
            snprintf(name, sizeof(name), "%s %s, shm", put ? "put" : "get", what);
            bkv_report_add(&bench->report, name, rates[SHM], "GB/s", put ? stores[other].put_name : stores[other].get_name,
                           rates[other], BKV_BAR_AT_LEAST, 1);
        }
    }
    snprintf(name, sizeof(name), "%s %s, inline", put ? "put" : "get", what);
    bkv_report_add(&bench->report, name, rates[INLINE], "GB/s", put ? stores[REDIS].put_name : stores[REDIS].get_name,
                   rates[REDIS], BKV_BAR_NONE, 0);
}

static void measure(bkv_bench_t *bench, const bkv_bench_store_t stores[STORES], size_t bytes, uint32_t count, uint32_t full) {
    static double puts[STORES][MAX_ROUNDS], gets[STORES][MAX_ROUNDS];
    double put_rates[STORES] = {0}, get_rates[STORES] = {0};
    uint32_t rounds = bkv_bench_rounds(bench, full), warm = rounds / 10 + 2, key = bench->next_key;
    for (uint32_t i = 0; i < warm + rounds; i++, key += count) {
        for (int s = 0; s < STORES; s++) {
            if (stores[s].self != NULL) {
                uint32_t at = i < warm ? 0 : i - warm;
                puts[s][at] = stores[s].put(stores[s].self, key, count, bytes);
                gets[s][at] = stores[s].get(stores[s].self, key, count, bytes);
                stores[s].drop(stores[s].self, key, count);
            }
        }
    }
    for (int s = 0; s < STORES; s++) {
        if (stores[s].self != NULL) {
            put_rates[s] = (double)bytes * count / bkv_quantile(puts[s], rounds, 0.5) / 1e9;
            get_rates[s] = (double)bytes * count / bkv_quantile(gets[s], rounds, 0.5) / 1e9;
        }
    }
    char size[16], what[48];
    size_text(bytes, size);
    snprintf(what, sizeof(what), "%.0u%s%s", count > 1 ? count : 0, count > 1 ? " x " : "", size);
    report(bench, stores, what, put_rates, true);
    report(bench, stores, what, get_rates, false);
}

void bkv_bench_stores(bkv_bench_t *bench) {
    static ours_t by_shm, by_messages;
    bkv_bench_store_t stores[STORES] = {
        [SHM] = start_ours("shm", bench, bench->shm, &by_shm),
        [INLINE] = start_ours("inline", bench, bench->client, &by_messages),
        [REDIS] = bkv_bench_redis(bench->folder, bench->payload),
        [MOONCAKE] = bkv_bench_mooncake(&bench->mooncake, BKV_BENCH_LARGEST),
    };
    for (int s = REDIS; s < STORES; s++) {
        if (stores[s].self == NULL) {
            printf("SKIPPED the comparison with %s: %s\n", stores[s].name, stores[s].reason);
        }
    }
    static const uint32_t rounds[] = {1000, 600, 200, 60, 20, 12};
    for (size_t i = 0, bytes = 64 * 1024; bytes <= BKV_BENCH_LARGEST; i++, bytes *= 4) {
        measure(bench, stores, bytes, 1, rounds[i]);
        if (bytes <= BKV_BENCH_MIB) {
            measure(bench, stores, bytes, BKV_BENCH_BATCH, rounds[i] / 10);
        }
    }
    for (int s = 0; s < STORES; s++) {
        if (stores[s].self != NULL) {
            stores[s].stop(stores[s].self);
        }
    }
}
