// test_store.c - configurations, defaults, tick.
#include "fixture.h"

#include <criterion/criterion.h>
#include <string.h>

Test(store_store, configurations_that_cannot_be) {
    static const struct {
        bkv_store_config_t config;
        const char *field;
    } cases[] = {
        {{.arena_bytes = 0}, "arena_bytes"},
        {{.arena_bytes = MIB}, "arena_bytes"}, // less than the smallest default slab
        {{.arena_bytes = MIB, .slab_bytes = 2 * MIB}, "arena_bytes"},
        {{.arena_bytes = UINT64_MAX, .slab_bytes = MIB}, "arena_bytes"},
        {{.arena_bytes = 64 * MIB, .slab_bytes = 4096}, "slab_bytes"},
        {{.arena_bytes = UINT64_MAX, .slab_bytes = UINT64_MAX}, "slab_bytes"},
        {{.arena_bytes = 64 * MIB, .max_entries = UINT32_MAX}, "max_entries"},
        {{.arena_bytes = 64 * MIB, .shards = 3}, "shards"},
        {{.arena_bytes = 64 * MIB, .shards = 1u << 31}, "shards"},
        {{.arena_bytes = 1ull << 62, .slab_bytes = 1ull << 34}, "arena_bytes"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        bkv_store_config_t config = cases[i].config;
        config.arena_fd = -1;
        bkv_store_t *store = NULL;
        bkv_error_t err = {0};
        cr_assert_eq(bkv_store_create(&config, 0, &store, NULL, &err), BKV_INVALID_ARGUMENT, "case %zu", i);
        cr_assert_eq(strncmp(err.message, cases[i].field, strlen(cases[i].field)), 0, "case %zu: %s", i, err.message);
        cr_assert_null(store);
    }
}

Test(store_store, defaults) {
    bkv_store_config_t config = fixture_config(1024 * MIB + 5, 0);
    bkv_store_t *store = fixture_store(&config);
    cr_assert_eq(bkv_store_max_record(store), 32 * MIB);
    cr_assert_eq(fixture_metrics(store).arena_bytes, 1024 * MIB);
    cr_assert_eq(store->index.capacity, 65536);
    cr_assert_eq(store->index.shard_count, 64);
    cr_assert_geq(bkv_store_fd(store), 0);
    bkv_store_destroy(store);
    bkv_store_destroy(NULL);
}

Test(store_store, tick_looks_at_no_more_than_it_may) {
    bkv_store_config_t config = fixture_config(8 * MIB, MIB);
    bkv_store_t *store = fixture_store(&config);
    bkv_store_tick(store, NOW, 1000); // an empty store
    for (uint64_t i = 0; i < 600; i++) {
        cr_assert_eq(fixture_put(store, i, 160, TENANT, 1 + i % 2 * 100, NOW, NULL), BKV_OK);
    }
    bkv_store_tick(store, NOW, UINT32_MAX);
    cr_assert_eq(fixture_metrics(store).expired_total, 0);
    bkv_store_tick(store, NOW + 1, 100);
    cr_assert_eq(fixture_metrics(store).expired_total, 50);
    bkv_store_tick(store, NOW + 1, UINT32_MAX);
    cr_assert_eq(fixture_metrics(store).expired_total, 300);
    bkv_store_tick(store, NOW + 101, 600);
    cr_assert_eq(fixture_metrics(store).expired_total, 600);
    cr_assert_eq(fixture_metrics(store).slot_bytes, 0);
    fixture_audit(store);
    bkv_store_destroy(store);
}

// Anything, in any order, on one thread, against a list of what must be there; accounts audited on the way.
Test(store_store, random_walk, .timeout = 120) {
    enum { KEYS = 300 };
    bkv_store_config_t config = fixture_config(4 * MIB, 512 * KIB);
    config.max_entries = 100;
    config.tenant_quota = 2 * MIB;
    bkv_store_t *store = fixture_store(&config);
    bkv_pin_t pins[8];
    uint64_t pinned[8];
    int pin_count = 0;
    uint64_t leases[4] = {0};
    uint64_t seed = 4;
    uint64_t now = NOW;
    for (int step = 0; step < 20000; step++) {
        uint64_t n = fixture_random(&seed) % KEYS;
        bkv_key_t key = fixture_key(n);
        uint64_t length = 160 + 16 * (fixture_random(&seed) % (n % 7 == 0 ? 30000 : 1000));
        switch (fixture_random(&seed) % 12) {
        case 0:
            if (pin_count < 8 && bkv_store_pin(store, &fixture_spec, &key, now, &pins[pin_count], NULL) == BKV_OK) {
                pinned[pin_count++] = n;
            }
            break;
        case 1:
            if (pin_count > 0) {
                pin_count--;
                cr_assert(fixture_matches(pins[pin_count].data, pinned[pin_count], pins[pin_count].length));
                bkv_store_unpin(store, &pins[pin_count]);
            }
            break;
        case 2:
            bkv_store_drop(store, &fixture_spec, &key, now);
            cr_assert(!bkv_store_contains(store, &fixture_spec, &key, now));
            break;
        case 3:
            bkv_store_unlease(store, leases[n % 4], NULL);
            bkv_store_lease(store, &fixture_spec, &key, 1, 500, now, &leases[n % 4], NULL);
            break;
        case 4:
            now += fixture_random(&seed) % 100;
            bkv_store_tick(store, now, 10);
            break;
        case 5:
        case 6:
            fixture_get(store, n, now);
            break;
        default: {
            bkv_status_t status = fixture_put(store, n, length, n % 3, n % 5 * 100, now, NULL);
            cr_assert(status == BKV_OK || status == BKV_ALREADY_EXISTS || status == BKV_RESOURCE_EXHAUSTED);
            if (status != BKV_RESOURCE_EXHAUSTED) {
                cr_assert(bkv_store_contains(store, &fixture_spec, &key, now));
            }
        }
        }
        if (step % 50 == 0) {
            fixture_audit(store);
        }
    }
    while (pin_count > 0) {
        bkv_store_unpin(store, &pins[--pin_count]);
    }
    fixture_audit(store);
    bkv_store_metrics_t m = fixture_metrics(store); // the walk has been everywhere
    cr_assert(m.evicted_capacity_total && m.evicted_quota_total && m.evicted_slab_total && m.expired_total && m.dropped_total);
    bkv_store_destroy(store);
}

Test(store_store, its_memory_is_all_of_its_slots) {
    bkv_store_config_t config = fixture_config(4 * MIB, MIB);
    bkv_store_t *store = fixture_store(&config);
    void *memory;
    uint64_t bytes;
    bkv_store_memory(store, &memory, &bytes);
    cr_assert_eq(bytes, 4 * MIB);
    for (uint64_t i = 0; i < 4; i++) {
        bkv_slot_t slot;
        cr_assert_eq(bkv_store_reserve(store, TENANT, MIB, NOW, &slot, NULL), BKV_OK);
        cr_assert(slot.data >= (uint8_t *)memory && slot.data + slot.capacity <= (uint8_t *)memory + bytes);
        bkv_store_abort(store, &slot);
    }
    bkv_store_destroy(store);
}
