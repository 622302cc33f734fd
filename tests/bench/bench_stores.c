// bench_stores.c - blocks of raw bytes from 64 KiB to 64 MiB: ours, by shared memory and in messages, against Redis and
// Mooncake Store (bench_store.h), which a user might take instead.
//
// Each round every store puts and gets the same number of bytes under new keys, in turn, and drops them. Payloads lie in memory
// before the clock starts (of ours: in bkv_buffer_get's) and are readable when it stops. One block is a request waited for;
// small blocks are also measured many to a request, as engines move them.
#include "tests/bench/bench.h"
#include "tests/bench/bench_store.h"

#include <stdio.h>
#include <string.h>

#define MAX_ROUNDS 1000

enum { SHM, INLINE, OTHER, STORES };

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

// ---- the comparison ----

static void name_row(char out[64], const char *what, size_t bytes, uint32_t count, const char *how) {
    bool small = bytes < BKV_BENCH_MIB;
    char times[16] = "";
    if (count > 1) {
        snprintf(times, sizeof(times), "%u x ", count);
    }
    snprintf(out, 64, "%s %s%zu %s, %s", what, times, small ? bytes / 1024 : bytes / BKV_BENCH_MIB, small ? "KiB" : "MiB", how);
}

// Ours against the other: by shared memory with a bar, in messages without.
static void report(bkv_bench_t *bench, const char *what, const char *against, size_t bytes, uint32_t count,
                   const double rates[STORES]) {
    char name[64];
    if (rates[SHM] > 0) {
        name_row(name, what, bytes, count, "shm");
        bkv_report_add(&bench->report, name, rates[SHM], "GB/s", against, rates[OTHER], BKV_BAR_AT_LEAST, 1);
    }
    if (rates[INLINE] > 0) {
        name_row(name, what, bytes, count, "inline");
        bkv_report_add(&bench->report, name, rates[INLINE], "GB/s", against, rates[OTHER], BKV_BAR_NONE, 0);
    }
}

static void measure(bkv_bench_t *bench, const bkv_bench_store_t stores[STORES], size_t bytes, uint32_t count, uint32_t full) {
    static double puts[STORES][MAX_ROUNDS], gets[STORES][MAX_ROUNDS];
    double put_rates[STORES] = {0}, get_rates[STORES] = {0};
    uint32_t rounds = bkv_bench_rounds(bench, full), warm = rounds / 10 + 2, key = 0;
    for (uint32_t i = 0; i < warm + rounds; i++, key += count) {
        for (uint32_t turn = 0; turn < STORES; turn++) {
            uint32_t s = (turn + i) % STORES, at = i < warm ? 0 : i - warm; // nobody always follows the same one
            if (stores[s].self != NULL) {
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
    report(bench, "put", stores[OTHER].put_name, bytes, count, put_rates);
    report(bench, "get", stores[OTHER].get_name, bytes, count, get_rates);
}

// One other store at a time: what a third leaves in the caches is not for these two to pay.
static void compare(bkv_bench_t *bench, const bkv_bench_store_t stores[STORES]) {
    static const struct {
        size_t kib;
        uint32_t count, rounds;
    } sizes[] = {
        {64, 1, 1000},  {64, 16, 200}, {64, 64, 60},   {256, 1, 600},  {256, 16, 60},
        {1024, 1, 200}, {4096, 1, 60}, {16384, 1, 20}, {65536, 1, 12},
    };
    if (stores[OTHER].self == NULL) {
        printf("SKIPPED the comparison with %s: %s\n", stores[OTHER].name, stores[OTHER].reason);
        return;
    }
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        measure(bench, stores, sizes[i].kib * 1024, sizes[i].count, sizes[i].rounds);
    }
    stores[OTHER].stop(stores[OTHER].self);
}

void bkv_bench_stores(bkv_bench_t *bench) {
    static ours_t by_shm, by_messages;
    bkv_bench_store_t shm = start_ours("shm", bench, bench->shm, &by_shm);
    bkv_bench_store_t messages = start_ours("inline", bench, bench->client, &by_messages);
    bkv_bench_store_t redis = bkv_bench_redis(bench->folder, bench->payload);
    compare(bench, (bkv_bench_store_t[STORES]){[SHM] = shm, [INLINE] = messages, [OTHER] = redis});
    bkv_bench_store_t mooncake = bkv_bench_mooncake(&bench->mooncake, BKV_BENCH_LARGEST);
    compare(bench, (bkv_bench_store_t[STORES]){[SHM] = shm, [OTHER] = mooncake});
    messages.stop(messages.self);
    if (shm.self != NULL) {
        shm.stop(shm.self);
    }
}
