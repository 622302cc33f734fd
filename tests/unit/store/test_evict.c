// test_evict.c - who leaves: SIEVE, slabs between classes, nothing that somebody holds.
#include "fixture.h"

#include <criterion/criterion.h>
#include <string.h>

// 64 records of 64 KiB fit.
static bkv_store_t *store_of_64(void) {
    bkv_store_config_t config = fixture_config(4 * MIB, MIB);
    return fixture_store(&config);
}

Test(store_evict, oldest_unused_goes_first) {
    bkv_store_t *store = store_of_64();
    for (uint64_t i = 0; i < 64; i++) {
        fixture_add(store, i, 64 * KIB);
    }
    cr_assert_eq(fixture_get(store, 0, NOW), BKV_OK);
    cr_assert_eq(fixture_get(store, 2, NOW), BKV_OK);
    for (uint64_t i = 64; i < 67; i++) {
        fixture_add(store, i, 64 * KIB);
    }
    for (uint64_t i = 0; i < 67; i++) {
        cr_assert_eq(fixture_has(store, i), i != 1 && i != 3 && i != 4);
    }
    cr_assert_eq(fixture_metrics(store).evicted_capacity_total, 3);
    fixture_audit(store);
    bkv_store_destroy(store);
}

// A working set of half the store survives a scan that never ends. Between two uses of a record 64 scanned ones and 31 others come
// by, and 64 fit: LRU would not have a single hit.
Test(store_evict, resists_scans) {
    bkv_store_t *store = store_of_64();
    for (uint64_t i = 0; i < 32; i++) {
        fixture_add(store, i, 64 * KIB);
    }
    for (uint64_t i = 0; i < 32; i++) {
        cr_assert_eq(fixture_get(store, i, NOW), BKV_OK);
    }
    uint64_t next = 1000;
    uint64_t hits = 0, lookups = 0;
    for (int round = 0; round < 20; round++) {
        for (int scanned = 0; scanned < 64; scanned++) { // one store's worth of blocks that nobody asks for again
            fixture_add(store, next++, 64 * KIB);
            if (scanned % 2 == 0) { // each of the 32 once a round
                lookups++;
                hits += fixture_get(store, (uint64_t)scanned / 2, NOW) == BKV_OK ? 1 : 0;
            }
        }
    }
    cr_assert(hits * 100 >= lookups * 95, "%llu of %llu", (unsigned long long)hits, (unsigned long long)lookups);
    fixture_audit(store);
    bkv_store_destroy(store);
}

// A store full of one size serves another at once, and in the end gives it as much as it needs.
Test(store_evict, never_calcifies) {
    bkv_store_config_t config = fixture_config(16 * MIB, MIB);
    bkv_store_t *store = fixture_store(&config);
    for (uint64_t i = 0; i < 16 * 64; i++) {
        fixture_add(store, i, 16 * KIB);
    }
    uint64_t kept = 0;
    for (uint64_t i = 0; i < 400; i++) { // ten stores' worth of another size; nobody asks for the first any more
        fixture_add(store, 10000 + i, 256 * KIB);
    }
    for (uint64_t i = 0; i < 400; i++) {
        kept += fixture_has(store, 10000 + i) ? 1 : 0;
    }
    cr_assert_geq(kept, 56, "%llu of 64 slots", (unsigned long long)kept);
    cr_assert_gt(fixture_metrics(store).evicted_slab_total, 0);
    for (uint64_t i = 0; i < 8000; i++) { // and back
        fixture_add(store, 20000 + i, 16 * KIB);
    }
    kept = 0;
    for (uint64_t i = 0; i < 8000; i++) {
        kept += fixture_has(store, 20000 + i) ? 1 : 0;
    }
    cr_assert_geq(kept, 14 * 64, "%llu of 1024 slots", (unsigned long long)kept);
    fixture_audit(store);
    bkv_store_destroy(store);
}

// Two classes that are both in use settle: slabs do not go back and forth.
Test(store_evict, busy_classes_leave_each_other_alone) {
    bkv_store_config_t config = fixture_config(16 * MIB, MIB);
    bkv_store_t *store = fixture_store(&config);
    uint64_t before = 0;
    for (uint64_t i = 0; i < 12000; i++) {
        fixture_add(store, i, i % 9 ? 16 * KIB : 128 * KIB);
        if (i == 6000) {
            before = fixture_metrics(store).evicted_slab_total;
        }
    }
    uint64_t slabs = (fixture_metrics(store).evicted_slab_total - before) / 8;
    cr_assert_leq(slabs, 40, "%llu slabs' worth moved", (unsigned long long)slabs); // of 750 slabs' worth put
    fixture_audit(store);
    bkv_store_destroy(store);
}

Test(store_evict, slab_with_a_reader_stays) {
    bkv_store_config_t config = fixture_config(2 * MIB, MIB);
    bkv_store_t *store = fixture_store(&config);
    for (uint64_t i = 0; i < 32; i++) {
        fixture_add(store, i, 64 * KIB);
    }
    bkv_key_t key = fixture_key(3); // in the first slab
    bkv_pin_t pin;
    cr_assert_eq(bkv_store_pin(store, &fixture_spec, &key, NOW, &pin, NULL), BKV_OK);
    fixture_add(store, 100, MIB);
    cr_assert_eq(fixture_metrics(store).evicted_slab_total, 16);
    cr_assert(fixture_has(store, 0) && fixture_has(store, 3) && !fixture_has(store, 16));
    cr_assert(fixture_matches(pin.data, 3, pin.length));
    bkv_error_t err;
    bkv_key_t big = fixture_key(100);
    bkv_pin_t big_pin;
    cr_assert_eq(bkv_store_pin(store, &fixture_spec, &big, NOW, &big_pin, NULL), BKV_OK);
    cr_assert_eq(fixture_put(store, 101, MIB, TENANT, 0, NOW, &err), BKV_RESOURCE_EXHAUSTED);
    cr_assert_eq(fixture_metrics(store).entries, 17); // and nothing was evicted in vain
    bkv_store_unpin(store, &pin);
    bkv_store_unpin(store, &big_pin);
    fixture_audit(store);
    bkv_store_destroy(store);
}

// Every slab has a lease in it: no slab can be had, but a larger slot can.
Test(store_evict, falls_back_to_a_larger_slot) {
    bkv_store_config_t config = fixture_config(2 * MIB, MIB);
    bkv_store_t *store = fixture_store(&config);
    for (uint64_t i = 0; i < 8; i++) {
        fixture_add(store, i, 256 * KIB);
    }
    bkv_key_t keys[2] = {fixture_key(0), fixture_key(4)};
    uint64_t lease;
    cr_assert_eq(bkv_store_lease(store, &fixture_spec, keys, 2, 1000, NOW, &lease, NULL), BKV_OK);
    for (uint64_t i = 0; i < 10; i++) {
        fixture_add(store, 100 + i, 4096);
        cr_assert_eq(fixture_get(store, 100 + i, NOW), BKV_OK);
    }
    cr_assert(fixture_has(store, 0) && fixture_has(store, 4));
    cr_assert_eq(fixture_metrics(store).entries, 8);
    bkv_error_t err;
    cr_assert_eq(fixture_put(store, 200, 512 * KIB, TENANT, 0, NOW, &err), BKV_RESOURCE_EXHAUSTED);
    cr_assert_eq(bkv_store_unlease(store, lease, NULL), BKV_OK);
    fixture_add(store, 200, 512 * KIB);
    fixture_audit(store);
    bkv_store_destroy(store);
}

// What has expired goes before what is only old.
Test(store_evict, expired_makes_room) {
    bkv_store_t *store = store_of_64();
    for (uint64_t i = 0; i < 64; i++) {
        cr_assert_eq(fixture_put(store, i, 64 * KIB, TENANT, 10, NOW, NULL), BKV_OK);
        cr_assert_eq(fixture_get(store, i, NOW), BKV_OK);
    }
    for (uint64_t i = 0; i < 64; i++) {
        cr_assert_eq(fixture_put(store, 100 + i, 64 * KIB, TENANT, 0, NOW + 10, NULL), BKV_OK);
    }
    bkv_store_metrics_t m = fixture_metrics(store);
    cr_assert_eq(m.expired_total, 64);
    cr_assert_eq(m.evicted_capacity_total, 0);
    fixture_audit(store);
    bkv_store_destroy(store);
}

// Everything is pinned again faster than the hand can clear bits: still there is a victim.
Test(store_evict, all_visited) {
    bkv_store_t *store = store_of_64();
    for (uint64_t i = 0; i < 64; i++) {
        fixture_add(store, i, 64 * KIB);
        cr_assert_eq(fixture_get(store, i, NOW), BKV_OK);
    }
    fixture_add(store, 64, 64 * KIB);
    cr_assert(!fixture_has(store, 0));
    cr_assert_eq(fixture_metrics(store).entries, 64);
    bkv_store_destroy(store);
}
