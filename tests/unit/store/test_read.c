// test_read.c - pins, damage, drops, leases.
#include "fixture.h"

#include <criterion/criterion.h>
#include <string.h>

static bkv_store_t *small_store(void) {
    bkv_store_config_t config = fixture_config(2 * MIB, MIB);
    config.max_leases = 4;
    config.max_lease_keys = 16;
    return fixture_store(&config);
}

static bkv_pin_t pin_of(bkv_store_t *store, uint64_t number) {
    bkv_key_t key = fixture_key(number);
    bkv_pin_t pin;
    cr_assert_eq(bkv_store_pin(store, &fixture_spec, &key, NOW, &pin, NULL), BKV_OK);
    return pin;
}

static bool drop(bkv_store_t *store, uint64_t number, uint64_t now_ms) {
    bkv_key_t key = fixture_key(number);
    return bkv_store_drop(store, &fixture_spec, &key, now_ms);
}

Test(store_read, damage_is_data_loss_then_a_miss) {
    bkv_store_t *store = small_store();
    static const size_t damaged[] = {8, 16, 24, 100, 128, 2000, 4095}; // length, checksum, key, header, payload
    for (size_t i = 0; i < sizeof(damaged) / sizeof(*damaged); i++) {
        fixture_add(store, i, 4096);
        bkv_pin_t pin = pin_of(store, i);
        uint8_t *byte = bkv_arena_at(&store->arena, store->index.entries[pin.entry].page) + damaged[i];
        *byte ^= 0x10;
        bkv_key_t key = fixture_key(i);
        bkv_pin_t second;
        bkv_error_t err;
        cr_assert_eq(bkv_store_pin(store, &fixture_spec, &key, NOW, &second, &err), BKV_DATA_LOSS);
        cr_assert_eq(bkv_store_pin(store, &fixture_spec, &key, NOW, &second, &err), BKV_NOT_FOUND);
        bkv_store_unpin(store, &pin); // the first reader's own affair
        cr_assert_eq(fixture_metrics(store).corrupt_total, i + 1);
        cr_assert_eq(fixture_metrics(store).slot_bytes, 0);
        fixture_audit(store);
    }
    bkv_store_destroy(store);
}

Test(store_read, unverified_pins_leave_the_verdict_to_their_holder) {
    bkv_store_t *store = small_store();
    fixture_add(store, 1, 4096);
    bkv_key_t key = fixture_key(1);
    bkv_pin_t pin, second;
    cr_assert_eq(bkv_store_pin_unverified(store, &fixture_spec, &key, NOW, &pin, NULL), BKV_OK);
    *(bkv_arena_at(&store->arena, store->index.entries[pin.entry].page) + 2000) ^= 0x10;
    cr_assert_eq(bkv_store_pin_unverified(store, &fixture_spec, &key, NOW, &second, NULL), BKV_OK);
    bkv_store_damaged(store, &pin);
    bkv_store_damaged(store, &second); // somebody else has dropped it by then
    cr_assert_eq(bkv_store_pin_unverified(store, &fixture_spec, &key, NOW, &second, NULL), BKV_NOT_FOUND);
    fixture_add(store, 1, 4096); // the key anew, while the damaged one is still pinned twice
    bkv_store_unpin(store, &pin);
    bkv_store_damaged(store, &second); // which is not the new one
    bkv_store_unpin(store, &second);
    cr_assert(fixture_has(store, 1));
    cr_assert_eq(fixture_metrics(store).corrupt_total, 1);
    fixture_audit(store);
    bkv_store_destroy(store);
}

Test(store_read, dropped_while_pinned) {
    bkv_store_t *store = small_store();
    fixture_add(store, 1, MIB);
    fixture_add(store, 2, MIB);
    bkv_pin_t first = pin_of(store, 1);
    bkv_pin_t second = pin_of(store, 1);
    bkv_pin_t other = pin_of(store, 2);
    cr_assert(drop(store, 1, NOW));
    cr_assert(!drop(store, 1, NOW));
    cr_assert(!fixture_has(store, 1));
    bkv_error_t err;
    cr_assert_eq(fixture_put(store, 3, MIB, TENANT, 0, NOW, &err), BKV_RESOURCE_EXHAUSTED); // the slot is still being read
    cr_assert(fixture_matches(first.data, 1, first.length));
    bkv_store_unpin(store, &first);
    fixture_audit(store);
    cr_assert_eq(fixture_put(store, 3, MIB, TENANT, 0, NOW, &err), BKV_RESOURCE_EXHAUSTED);
    bkv_store_unpin(store, &second);
    cr_assert_eq(fixture_put(store, 1, MIB, TENANT, 0, NOW, &err), BKV_OK); // the same key anew
    bkv_store_unpin(store, &other);
    cr_assert_eq(fixture_metrics(store).dropped_total, 1);
    fixture_audit(store);
    bkv_store_destroy(store);
}

Test(store_read, too_many_pins) {
    bkv_store_t *store = small_store();
    fixture_add(store, 1, 160);
    bkv_key_t key = fixture_key(1);
    bkv_pin_t pin;
    for (uint32_t i = 0; i < BKV_PINS_MAX; i++) {
        cr_assert_eq(bkv_store_pin(store, &fixture_spec, &key, NOW, &pin, NULL), BKV_OK);
    }
    bkv_error_t err;
    bkv_pin_t over;
    cr_assert_eq(bkv_store_pin(store, &fixture_spec, &key, NOW, &over, &err), BKV_BUSY);
    for (uint32_t i = 0; i < BKV_PINS_MAX; i++) {
        bkv_store_unpin(store, &pin);
    }
    cr_assert_eq(fixture_metrics(store).pinned, 0);
    fixture_audit(store);
    bkv_store_destroy(store);
}

Test(store_read, contains_is_no_use) {
    bkv_store_t *store = small_store();
    fixture_add(store, 0, MIB);
    fixture_add(store, 1, MIB);
    cr_assert_eq(fixture_get(store, 1, NOW), BKV_OK);
    cr_assert(fixture_has(store, 0));
    fixture_add(store, 2, MIB);
    cr_assert(!fixture_has(store, 0));
    cr_assert(fixture_has(store, 1));
    cr_assert_eq(fixture_metrics(store).hits_total, 1);
    cr_assert_eq(fixture_metrics(store).misses_total, 0);
    bkv_store_destroy(store);
}

Test(store_read, peek_shows_the_header_and_is_no_use) {
    bkv_store_t *store = small_store();
    bkv_record_header_t header;
    uint64_t length = 0;
    bkv_key_t key = fixture_key(0);
    cr_assert(!bkv_store_peek(store, &fixture_spec, &key, NOW, &header, &length));
    bkv_error_t err;
    cr_assert_eq(fixture_put(store, 0, MIB, TENANT, 100, NOW, &err), BKV_OK);
    cr_assert(bkv_store_peek(store, &fixture_spec, &key, NOW + 99, &header, &length));
    cr_assert_arr_eq(header.key, key.bytes, BKV_KEY_BYTES);
    cr_assert(length == MIB && header.length == length);
    const bkv_spec_id_t other = {.bytes = {1}};
    cr_assert(!bkv_store_peek(store, &other, &key, NOW, &header, &length));
    cr_assert(!bkv_store_peek(store, &fixture_spec, &key, NOW + 100, &header, &length), "its time is over");
    cr_assert(fixture_metrics(store).hits_total == 0 && fixture_metrics(store).misses_total == 0);
    fixture_add(store, 1, MIB);
    cr_assert_eq(fixture_get(store, 1, NOW), BKV_OK);
    fixture_add(store, 2, MIB);
    cr_assert(!fixture_has(store, 0), "a peek keeps nothing");
    bkv_store_destroy(store);
}

Test(store_read, lease_keeps_from_eviction) {
    bkv_store_t *store = small_store();
    fixture_add(store, 0, MIB);
    fixture_add(store, 1, MIB);
    bkv_key_t keys[2] = {fixture_key(0), fixture_key(1)};
    uint64_t lease;
    cr_assert_eq(bkv_store_lease(store, &fixture_spec, keys, 2, 500, NOW, &lease, NULL), BKV_OK);
    cr_assert_neq(lease, 0);
    cr_assert_eq(fixture_metrics(store).leases, 1);
    cr_assert_eq(fixture_put(store, 2, MIB, TENANT, 0, NOW + 499, NULL), BKV_RESOURCE_EXHAUSTED);
    cr_assert_eq(fixture_put(store, 2, MIB, TENANT, 0, NOW + 500, NULL), BKV_OK); // without waiting for a tick
    cr_assert_eq(fixture_metrics(store).leases, 0);
    bkv_error_t err;
    cr_assert_eq(bkv_store_unlease(store, lease, &err), BKV_NOT_FOUND);
    fixture_audit(store);
    bkv_store_destroy(store);
}

Test(store_read, unlease_ends_it) {
    bkv_store_t *store = small_store();
    fixture_add(store, 0, MIB);
    fixture_add(store, 1, MIB);
    bkv_key_t keys[3] = {fixture_key(0), fixture_key(1), fixture_key(0)};
    uint64_t first, second;
    cr_assert_eq(bkv_store_lease(store, &fixture_spec, keys, 3, UINT64_MAX, NOW, &first, NULL), BKV_OK);
    cr_assert_eq(bkv_store_lease(store, &fixture_spec, keys, 1, 1, NOW, &second, NULL), BKV_OK);
    cr_assert_neq(first, second);
    cr_assert_eq(bkv_store_unlease(store, first, NULL), BKV_OK);
    cr_assert_eq(bkv_store_unlease(store, first, NULL), BKV_NOT_FOUND);
    cr_assert_eq(bkv_store_unlease(store, 0, NULL), BKV_NOT_FOUND);
    fixture_add(store, 2, MIB);
    cr_assert(fixture_has(store, 0)); // still under the second
    cr_assert(!fixture_has(store, 1));
    bkv_store_destroy(store);
}

Test(store_read, lease_is_all_or_nothing) {
    bkv_store_t *store = small_store();
    fixture_add(store, 0, MIB);
    fixture_add(store, 1, MIB);
    bkv_key_t keys[3] = {fixture_key(0), fixture_key(5), fixture_key(1)};
    uint64_t lease;
    bkv_error_t err;
    cr_assert_eq(bkv_store_lease(store, &fixture_spec, keys, 3, 1000, NOW, &lease, &err), BKV_NOT_FOUND);
    cr_assert(strstr(err.message, "keys[1]"), "%s", err.message);
    cr_assert_eq(fixture_metrics(store).leases, 0);
    cr_assert_eq(store->leases.key_count, 0);
    fixture_add(store, 2, MIB); // nothing is held
    fixture_add(store, 3, MIB);
    cr_assert(!fixture_has(store, 0) && !fixture_has(store, 1));
    bkv_store_destroy(store);
}

Test(store_read, leases_are_bounded) {
    bkv_store_t *store = small_store(); // 4 leases, 16 keys
    fixture_add(store, 0, 4096);
    bkv_key_t keys[17];
    for (int i = 0; i < 17; i++) {
        keys[i] = fixture_key(0);
    }
    uint64_t leases[4];
    bkv_error_t err;
    uint64_t none;
    cr_assert_eq(bkv_store_lease(store, &fixture_spec, keys, 17, 1000, NOW, &none, &err), BKV_RESOURCE_EXHAUSTED);
    cr_assert(strstr(err.message, "keys:"), "%s", err.message);
    for (int i = 0; i < 4; i++) {
        cr_assert_eq(bkv_store_lease(store, &fixture_spec, keys, 4, 1000, NOW, &leases[i], NULL), BKV_OK);
    }
    cr_assert_eq(bkv_store_lease(store, &fixture_spec, keys, 0, 1000, NOW, &none, &err), BKV_RESOURCE_EXHAUSTED);
    cr_assert(strstr(err.message, "leases:"), "%s", err.message);
    cr_assert_eq(bkv_store_unlease(store, leases[2], NULL), BKV_OK);
    cr_assert_eq(bkv_store_lease(store, &fixture_spec, keys, 4, 1000, NOW, &leases[2], NULL), BKV_OK);
    bkv_store_tick(store, NOW + 1000, 0);
    cr_assert_eq(fixture_metrics(store).leases, 0);
    fixture_audit(store);
    bkv_store_destroy(store);
}

// The last of pins and leases frees, in whichever order they go; an id of an entry that has gone harms nobody.
Test(store_read, dropped_while_pinned_and_leased) {
    for (int order = 0; order < 4; order++) {
        bkv_store_t *store = small_store();
        fixture_add(store, 0, 4096);
        bkv_key_t key = fixture_key(0);
        uint64_t lease;
        cr_assert_eq(bkv_store_lease(store, &fixture_spec, &key, 1, 1000, NOW, &lease, NULL), BKV_OK);
        bkv_pin_t pin = {0};
        if (order < 2) {
            pin = pin_of(store, 0);
        }
        cr_assert(drop(store, 0, NOW));
        if (order == 0) {
            bkv_store_unpin(store, &pin);
        }
        fixture_add(store, 1, 4096); // must not get the entry that the lease still names
        cr_assert_eq(bkv_store_unlease(store, lease, NULL), BKV_OK);
        if (order == 1) {
            bkv_store_unpin(store, &pin);
        }
        for (uint32_t i = 0; i < store->index.fresh; i++) {
            cr_assert_eq(store->index.entries[i].leases, 0);
        }
        cr_assert_eq(fixture_get(store, 1, NOW), BKV_OK);
        cr_assert_eq(fixture_metrics(store).slot_bytes, 4096);
        fixture_add(store, 2, 4096);
        cr_assert_eq(store->index.fresh, 2); // the first entry is in use again
        fixture_audit(store);
        bkv_store_destroy(store);
    }
}

Test(store_read, lease_keeps_from_expiry) {
    bkv_store_t *store = small_store();
    cr_assert_eq(fixture_put(store, 0, 4096, TENANT, 100, NOW, NULL), BKV_OK);
    bkv_key_t key = fixture_key(0);
    uint64_t lease;
    cr_assert_eq(bkv_store_lease(store, &fixture_spec, &key, 1, 1000, NOW, &lease, NULL), BKV_OK);
    bkv_store_tick(store, NOW + 999, 100);
    cr_assert_eq(fixture_get(store, 0, NOW + 999), BKV_OK);
    bkv_store_tick(store, NOW + 1000, 100);
    cr_assert_eq(fixture_get(store, 0, NOW + 1000), BKV_NOT_FOUND);
    cr_assert_eq(fixture_metrics(store).expired_total, 1);
    bkv_store_destroy(store);
}

Test(store_read, time_to_live) {
    bkv_store_t *store = small_store();
    cr_assert_eq(fixture_put(store, 0, 4096, TENANT, 100, NOW, NULL), BKV_OK);
    cr_assert_eq(fixture_put(store, 1, 4096, TENANT, 0, NOW, NULL), BKV_OK);
    cr_assert_eq(fixture_put(store, 2, 4096, TENANT, UINT64_MAX, NOW, NULL), BKV_OK);
    bkv_key_t key = fixture_key(0);
    cr_assert(bkv_store_contains(store, &fixture_spec, &key, NOW + 99));
    cr_assert(!bkv_store_contains(store, &fixture_spec, &key, NOW + 100));
    uint64_t lease;
    cr_assert_eq(bkv_store_lease(store, &fixture_spec, &key, 1, 1, NOW + 100, &lease, NULL), BKV_NOT_FOUND);
    cr_assert_eq(fixture_metrics(store).entries, 3);
    cr_assert_eq(fixture_get(store, 0, NOW + 100), BKV_NOT_FOUND); // and takes it out
    cr_assert_eq(fixture_metrics(store).entries, 2);
    cr_assert_eq(fixture_put(store, 0, 8192, TENANT, 100, NOW + 100, NULL), BKV_OK);
    cr_assert_eq(fixture_put(store, 0, 160, TENANT, 100, NOW + 199, NULL), BKV_ALREADY_EXISTS);
    cr_assert_eq(fixture_put(store, 0, 160, TENANT, 100, NOW + 200, NULL), BKV_OK); // what has expired makes way
    cr_assert(!drop(store, 0, NOW + 300));
    cr_assert_eq(fixture_metrics(store).expired_total, 3);
    cr_assert_eq(fixture_metrics(store).dropped_total, 0);
    cr_assert_eq(fixture_get(store, 1, UINT64_MAX - 1), BKV_OK);
    cr_assert_eq(fixture_get(store, 2, UINT64_MAX - 1), BKV_OK);
    fixture_audit(store);
    bkv_store_destroy(store);
}

Test(store_read, expired_while_pinned) {
    bkv_store_t *store = small_store();
    cr_assert_eq(fixture_put(store, 0, 4096, TENANT, 100, NOW, NULL), BKV_OK);
    bkv_pin_t pin = pin_of(store, 0);
    bkv_store_tick(store, NOW + 100, 10);
    cr_assert_eq(fixture_metrics(store).entries, 0);
    cr_assert_eq(fixture_metrics(store).slot_bytes, 4096);
    cr_assert(fixture_matches(pin.data, 0, pin.length));
    bkv_store_unpin(store, &pin);
    cr_assert_eq(fixture_metrics(store).slot_bytes, 0);
    fixture_audit(store);
    bkv_store_destroy(store);
}
