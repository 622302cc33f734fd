// test_stress.c - several threads do everything at once; whoever pins a record checks that it is the one asked for. Meant to
// run under ThreadSanitizer too.
#include "fixture.h"

#include <criterion/criterion.h>
#include <pthread.h>

#define THREADS 4
#define KEYS    200
#define STEPS   4000

typedef struct {
    bkv_store_t *store;
    uint64_t seed;
    uint64_t *clock;
    uint64_t wrong, published, adopted;
} worker_t;

static void put(worker_t *w, uint64_t number, uint64_t now) {
    uint64_t length = 160 + 16 * (number * 37 % 3000);
    bkv_slot_t slot;
    uint64_t reserve = number % 5 == 0 ? 4 * length : length;
    if (bkv_store_reserve(w->store, number % 3, reserve, now, &slot, NULL) != BKV_OK) {
        return;
    }
    fixture_fill(slot.data, number, length, number % 3);
    if (fixture_random(&w->seed) % 20 == 0) {
        bkv_store_abort(w->store, &slot);
        return;
    }
    bool adopt = fixture_random(&w->seed) % 4 == 0;
    bkv_status_t status = adopt ? bkv_store_adopt(w->store, &slot, number % 4 * 50, number % 2, now, NULL, NULL)
                                : bkv_store_publish(w->store, &slot, number % 4 * 50, length, now, NULL);
    w->wrong += status != BKV_OK && status != BKV_ALREADY_EXISTS && status != BKV_RESOURCE_EXHAUSTED;
    w->published += status == BKV_OK && !adopt;
    w->adopted += status == BKV_OK && adopt;
}

static void get(worker_t *w, uint64_t number, uint64_t now) {
    bkv_key_t key = fixture_key(number);
    bkv_pin_t pin;
    bkv_status_t status = bkv_store_pin(w->store, &fixture_spec, &key, now, &pin, NULL);
    if (status == BKV_OK) {
        bkv_key_t other = fixture_key(fixture_random(&w->seed) % KEYS);
        if (fixture_random(&w->seed) % 4 == 0) { // while it is being read
            bkv_store_drop(w->store, &fixture_spec, fixture_random(&w->seed) % 2 ? &key : &other, now);
        }
        w->wrong += !fixture_matches(pin.data, number, pin.length);
        bkv_store_unpin(w->store, &pin);
    }
    w->wrong += status != BKV_OK && status != BKV_NOT_FOUND;
}

static void copy(worker_t *w, uint64_t number, uint64_t now) {
    bkv_name_t name = {.spec_id = fixture_spec, .key = fixture_key(number)};
    bkv_store_item_t items[20];
    uint64_t cursor = 0;
    bool more;
    bkv_store_set_copy(w->store, &name, number % 2, now);
    bkv_store_list(w->store, &cursor, items, 20, now, &more);
}

static void *work(void *arg) {
    worker_t *w = arg;
    uint64_t lease = 0;
    for (int step = 0; step < STEPS; step++) {
        uint64_t number = fixture_random(&w->seed) % KEYS;
        uint64_t now = __atomic_load_n(w->clock, __ATOMIC_RELAXED);
        bkv_key_t keys[2] = {fixture_key(number), fixture_key((number + 1) % KEYS)};
        bkv_store_metrics_t m;
        switch (fixture_random(&w->seed) % 16) {
        case 0:
            bkv_store_unlease(w->store, lease, NULL);
            bkv_store_lease(w->store, &fixture_spec, keys, 2, 40, now, &lease, NULL);
            break;
        case 1:
            bkv_store_tick(w->store, __atomic_add_fetch(w->clock, 3, __ATOMIC_RELAXED), 20);
            break;
        case 2:
            bkv_store_contains(w->store, &fixture_spec, keys, now);
            copy(w, number, now);
            break;
        case 3:
            bkv_store_set_quota(w->store, number % 3, MIB + number * 4096, NULL);
            bkv_store_metrics(w->store, &m);
            break;
        case 4:
        case 5:
        case 6:
        case 7:
        case 8:
            put(w, number, now);
            break;
        default:
            get(w, number, now);
        }
    }
    bkv_store_unlease(w->store, lease, NULL);
    return NULL;
}

Test(store_stress, threads, .timeout = 240) {
    bkv_store_config_t config = fixture_config(3 * MIB, 256 * KIB);
    config.max_entries = 80;
    config.shards = 4;
    bkv_store_t *store = fixture_store(&config);
    uint64_t now = NOW;
    worker_t workers[THREADS];
    pthread_t threads[THREADS];
    for (uint64_t i = 0; i < THREADS; i++) {
        workers[i] = (worker_t){.store = store, .seed = i + 7, .clock = &now};
        cr_assert_eq(pthread_create(&threads[i], NULL, work, &workers[i]), 0);
    }
    uint64_t published = 0, adopted = 0;
    for (int i = 0; i < THREADS; i++) {
        pthread_join(threads[i], NULL);
        cr_assert_eq(workers[i].wrong, 0);
        published += workers[i].published;
        adopted += workers[i].adopted;
    }
    fixture_audit(store);
    bkv_store_metrics_t m = fixture_metrics(store);
    cr_assert_eq(m.published_total, published);
    cr_assert_eq(m.adopted_total, adopted);
    cr_assert_eq(m.pinned, 0);
    cr_assert_eq(m.corrupt_total, 0);
    cr_assert(m.evicted_capacity_total + m.evicted_slab_total > 0 && m.expired_total > 0 && m.dropped_total > 0);
    bkv_store_destroy(store);
}
