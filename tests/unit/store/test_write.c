// test_write.c - reserve, publish, abort: what is refused, what is evicted, what is counted.
#include "fixture.h"

#include <criterion/criterion.h>
#include <string.h>

Test(store_write, puts_and_gets) {
    bkv_store_config_t config = fixture_config(8 * MIB, MIB);
    bkv_store_t *store = fixture_store(&config);
    for (uint64_t i = 0; i < 20; i++) {
        fixture_add(store, i, 160 + i % 4 * 4096);
    }
    for (uint64_t i = 0; i < 20; i++) {
        cr_assert_eq(fixture_get(store, i, NOW), BKV_OK);
    }
    cr_assert_eq(fixture_get(store, 20, NOW), BKV_NOT_FOUND);
    bkv_store_metrics_t m = fixture_metrics(store);
    cr_assert_eq(m.published_total, 20);
    cr_assert_eq(m.hits_total, 20);
    cr_assert_eq(m.misses_total, 1);
    cr_assert_eq(m.entries, 20);
    cr_assert_eq(m.stored_bytes_total, 20 * 160 + 30 * 4096);
    cr_assert_eq(m.raw_bytes_total, 2 * m.stored_bytes_total);
    cr_assert_eq(m.resident_bytes, m.stored_bytes_total);
    cr_assert_eq(m.arena_bytes, 8 * MIB);
    fixture_audit(store);
    bkv_store_destroy(store);
}

Test(store_write, duplicate_keeps_the_older) {
    bkv_store_config_t config = fixture_config(4 * MIB, MIB);
    bkv_store_t *store = fixture_store(&config);
    fixture_add(store, 1, 4096);
    bkv_error_t err;
    cr_assert_eq(fixture_put(store, 1, 8192, TENANT, 0, NOW, &err), BKV_ALREADY_EXISTS);
    bkv_key_t key = fixture_key(1);
    bkv_pin_t pin;
    cr_assert_eq(bkv_store_pin(store, &fixture_spec, &key, NOW, &pin, NULL), BKV_OK);
    cr_assert_eq(pin.length, 4096);
    bkv_store_unpin(store, &pin);
    bkv_store_metrics_t m = fixture_metrics(store);
    cr_assert_eq(m.duplicates_total, 1);
    cr_assert_eq(m.published_total, 1);
    cr_assert_eq(m.slot_bytes, 4096);
    cr_assert_eq(m.raw_bytes_total, 8192);
    fixture_audit(store);
    bkv_store_destroy(store);
}

Test(store_write, abort_gives_back) {
    bkv_store_config_t config = fixture_config(MIB, MIB);
    bkv_store_t *store = fixture_store(&config);
    for (int i = 0; i < 3; i++) { // one slab: each needs the one before to be gone
        bkv_slot_t slot;
        cr_assert_eq(bkv_store_reserve(store, TENANT, MIB, NOW, &slot, NULL), BKV_OK);
        cr_assert_eq(fixture_metrics(store).slot_bytes, MIB);
        bkv_store_abort(store, &slot);
    }
    cr_assert_eq(fixture_metrics(store).aborted_total, 3);
    cr_assert_eq(fixture_metrics(store).slot_bytes, 0);
    fixture_audit(store);
    bkv_store_destroy(store);
}

Test(store_write, larger_than_a_slab) {
    bkv_store_config_t config = fixture_config(4 * MIB, MIB);
    bkv_store_t *store = fixture_store(&config);
    bkv_slot_t slot;
    bkv_error_t err;
    cr_assert_eq(bkv_store_max_record(store), MIB);
    cr_assert_eq(bkv_store_reserve(store, TENANT, MIB + 1, NOW, &slot, &err), BKV_RESOURCE_EXHAUSTED);
    cr_assert(strstr(err.message, "larger than a slab"), "%s", err.message);
    cr_assert_eq(bkv_store_reserve(store, TENANT, UINT64_MAX, NOW, &slot, &err), BKV_RESOURCE_EXHAUSTED);
    fixture_add(store, 1, MIB);
    cr_assert_eq(fixture_metrics(store).full_total, 2);
    bkv_store_destroy(store);
}

Test(store_write, full_of_pinned) {
    bkv_store_config_t config = fixture_config(2 * MIB, MIB);
    bkv_store_t *store = fixture_store(&config);
    bkv_pin_t pins[8];
    for (uint64_t i = 0; i < 8; i++) {
        fixture_add(store, i, 256 * KIB);
        bkv_key_t key = fixture_key(i);
        cr_assert_eq(bkv_store_pin(store, &fixture_spec, &key, NOW, &pins[i], NULL), BKV_OK);
    }
    bkv_error_t err;
    for (uint64_t size = 4096; size <= MIB; size *= 16) {
        cr_assert_eq(fixture_put(store, 100, size, TENANT, 0, NOW, &err), BKV_RESOURCE_EXHAUSTED);
        cr_assert(strstr(err.message, "arena: no room for"), "%s", err.message);
    }
    cr_assert_eq(fixture_metrics(store).full_total, 3);
    cr_assert_eq(fixture_metrics(store).pinned, 8);
    bkv_store_unpin(store, &pins[5]);
    fixture_add(store, 100, 256 * KIB); // takes the one that may go, and no other
    for (uint64_t i = 0; i < 8; i++) {
        cr_assert_eq(fixture_has(store, i), i != 5);
        if (i != 5) {
            bkv_store_unpin(store, &pins[i]);
        }
    }
    fixture_audit(store);
    bkv_store_destroy(store);
}

Test(store_write, header_must_fit_the_slot) {
    bkv_store_config_t config = fixture_config(4 * MIB, MIB);
    bkv_store_t *store = fixture_store(&config);
    bkv_error_t err;
    for (int wrong = 0; wrong < 3; wrong++) {
        bkv_slot_t slot;
        cr_assert_eq(bkv_store_reserve(store, TENANT, 4096, NOW, &slot, NULL), BKV_OK);
        fixture_fill(slot.data, 1, 4096, wrong == 0 ? TENANT + 1 : TENANT);
        bkv_record_header_t *header = (void *)slot.data;
        if (wrong == 1) {
            header->length = slot.capacity + 16;
        } else if (wrong == 2) {
            header->magic = 0;
        }
        cr_assert_eq(bkv_store_publish(store, &slot, 0, 0, NOW, &err), BKV_INVALID_ARGUMENT);
        cr_assert_null(slot.data);
    }
    cr_assert_eq(fixture_metrics(store).aborted_total, 3);
    cr_assert_eq(fixture_metrics(store).slot_bytes, 0);
    fixture_audit(store);
    bkv_store_destroy(store);
}

// A reservation for the worst case does not leave its air in the arena.
Test(store_write, small_record_moves_to_a_small_slot) {
    bkv_store_config_t config = fixture_config(4 * MIB, MIB);
    bkv_store_t *store = fixture_store(&config);
    for (uint64_t i = 0; i < 200; i++) { // 200 x 16 KiB fit besides one slab for reservations; 200 x 1 MiB would not
        bkv_slot_t slot;
        cr_assert_eq(bkv_store_reserve(store, TENANT, 900 * KIB, NOW, &slot, NULL), BKV_OK);
        fixture_fill(slot.data, i, 16 * KIB, TENANT);
        cr_assert_eq(bkv_store_publish(store, &slot, 0, 0, NOW, NULL), BKV_OK);
        fixture_audit(store);
    }
    bkv_store_metrics_t m = fixture_metrics(store);
    cr_assert_eq(m.slot_bytes, m.entries * 16 * KIB);
    cr_assert(m.entries >= 3 * 64, "%llu entries", (unsigned long long)m.entries);
    for (uint64_t i = 199; i >= 190; i--) {
        cr_assert_eq(fixture_get(store, i, NOW), BKV_OK);
    }
    bkv_store_destroy(store);
}

// One class step smaller stays where it is.
Test(store_write, nearly_fitting_record_stays) {
    bkv_store_config_t config = fixture_config(4 * MIB, MIB);
    bkv_store_t *store = fixture_store(&config);
    bkv_slot_t slot;
    cr_assert_eq(bkv_store_reserve(store, TENANT, 32 * KIB, NOW, &slot, NULL), BKV_OK);
    const uint8_t *place = slot.data;
    fixture_fill(slot.data, 1, 28 * KIB, TENANT);
    cr_assert_eq(bkv_store_publish(store, &slot, 0, 0, NOW, NULL), BKV_OK);
    bkv_key_t key = fixture_key(1);
    bkv_pin_t pin;
    cr_assert_eq(bkv_store_pin(store, &fixture_spec, &key, NOW, &pin, NULL), BKV_OK);
    cr_assert_eq(pin.data, place);
    bkv_store_unpin(store, &pin);
    bkv_store_destroy(store);
}

Test(store_write, quota_evicts_own_records_first) {
    bkv_store_config_t config = fixture_config(8 * MIB, MIB);
    config.tenant_quota = MIB;
    bkv_store_t *store = fixture_store(&config);
    for (uint64_t i = 0; i < 8; i++) { // a neighbour, within its quota
        cr_assert_eq(fixture_put(store, 100 + i, 64 * KIB, 2, 0, NOW, NULL), BKV_OK);
    }
    for (uint64_t i = 0; i < 20; i++) { // 16 fit
        cr_assert_eq(fixture_put(store, i, 64 * KIB, 1, 0, NOW, NULL), BKV_OK);
        fixture_audit(store);
    }
    bkv_store_metrics_t m = fixture_metrics(store);
    cr_assert_eq(m.evicted_quota_total, 4);
    cr_assert_eq(m.evicted_capacity_total, 0);
    for (uint64_t i = 0; i < 20; i++) {
        cr_assert_eq(fixture_has(store, i), i >= 4);
    }
    for (uint64_t i = 0; i < 8; i++) {
        cr_assert(fixture_has(store, 100 + i));
    }
    cr_assert_eq(fixture_put(store, 200, 600 * KIB, 1, 0, NOW, NULL), BKV_OK); // other sizes make room too
    uint32_t tenant = bkv_store_hold_tenant(store, 1);
    cr_assert_leq(store->tenants.slot[tenant].used, MIB);
    bkv_store_let_go_tenant(store, tenant);
    fixture_audit(store);
    bkv_store_destroy(store);
}

Test(store_write, quota_messages) {
    bkv_store_config_t config = fixture_config(8 * MIB, MIB);
    bkv_store_t *store = fixture_store(&config);
    bkv_error_t err;
    cr_assert_eq(bkv_store_set_quota(store, 1, 128 * KIB, NULL), BKV_OK);
    cr_assert_eq(fixture_put(store, 1, 256 * KIB, 1, 0, NOW, &err), BKV_RESOURCE_EXHAUSTED);
    cr_assert(strstr(err.message, "tenant_quota: 131072 bytes, less than the 262144"), "%s", err.message);
    bkv_pin_t pins[2];
    for (uint64_t i = 0; i < 2; i++) {
        cr_assert_eq(fixture_put(store, i, 64 * KIB, 1, 0, NOW, &err), BKV_OK);
        bkv_key_t key = fixture_key(i);
        cr_assert_eq(bkv_store_pin(store, &fixture_spec, &key, NOW, &pins[i], NULL), BKV_OK);
    }
    cr_assert_eq(fixture_put(store, 2, 64 * KIB, 1, 0, NOW, &err), BKV_RESOURCE_EXHAUSTED);
    cr_assert(strstr(err.message, "all pinned"), "%s", err.message);
    cr_assert_eq(fixture_put(store, 3, 64 * KIB, 2, 0, NOW, &err), BKV_OK); // others have no quota
    cr_assert_eq(bkv_store_set_quota(store, 1, 0, NULL), BKV_OK);
    cr_assert_eq(fixture_put(store, 2, 64 * KIB, 1, 0, NOW, &err), BKV_OK);
    bkv_store_set_default_quota(store, 64 * KIB);
    cr_assert_eq(fixture_put(store, 4, 64 * KIB, 2, 0, NOW, &err), BKV_OK);
    cr_assert(!fixture_has(store, 3));
    cr_assert_eq(fixture_put(store, 5, 64 * KIB, 1, 0, NOW, &err), BKV_OK); // still its own: none
    cr_assert_eq(bkv_store_set_quota(store, 1, BKV_QUOTA_DEFAULT, NULL), BKV_OK);
    bkv_store_unpin(store, &pins[0]);
    bkv_store_unpin(store, &pins[1]);
    cr_assert_eq(fixture_put(store, 6, 64 * KIB, 1, 0, NOW, &err), BKV_OK); // down to the default at once
    cr_assert(!fixture_has(store, 0) && !fixture_has(store, 1) && !fixture_has(store, 2) && !fixture_has(store, 5));
    fixture_audit(store);
    bkv_store_destroy(store);
}

Test(store_write, entries_run_out) {
    bkv_store_config_t config = fixture_config(8 * MIB, MIB);
    config.max_entries = 4;
    bkv_store_t *store = fixture_store(&config);
    for (uint64_t i = 0; i < 6; i++) {
        fixture_add(store, i, 4096);
    }
    cr_assert_eq(fixture_metrics(store).entries, 4);
    cr_assert_eq(fixture_metrics(store).evicted_capacity_total, 2);
    fixture_add(store, 6, 512 * KIB); // from another class than its own
    cr_assert_eq(fixture_metrics(store).entries, 4);
    bkv_pin_t pins[8];
    int pinned = 0;
    for (uint64_t i = 0; i < 7; i++) {
        bkv_key_t key = fixture_key(i);
        if (bkv_store_pin(store, &fixture_spec, &key, NOW, &pins[pinned], NULL) == BKV_OK) {
            pinned++;
        }
    }
    cr_assert_eq(pinned, 4);
    bkv_error_t err;
    cr_assert_eq(fixture_put(store, 7, 4096, TENANT, 0, NOW, &err), BKV_RESOURCE_EXHAUSTED);
    cr_assert(strstr(err.message, "max_entries: all 4"), "%s", err.message);
    while (pinned > 0) {
        bkv_store_unpin(store, &pins[--pinned]);
    }
    fixture_audit(store);
    bkv_store_destroy(store);
}

// The same key under two specs is two records.
Test(store_write, specs_do_not_meet) {
    bkv_store_config_t config = fixture_config(8 * MIB, MIB);
    bkv_store_t *store = fixture_store(&config);
    bkv_spec_id_t other = {{9}};
    bkv_key_t key = fixture_key(1);
    fixture_add(store, 1, 4096);
    cr_assert(!bkv_store_contains(store, &other, &key, NOW));
    cr_assert(!bkv_store_drop(store, &other, &key, NOW));
    bkv_pin_t pin;
    cr_assert_eq(bkv_store_pin(store, &other, &key, NOW, &pin, NULL), BKV_NOT_FOUND);
    bkv_slot_t slot;
    cr_assert_eq(bkv_store_reserve(store, TENANT, 4096, NOW, &slot, NULL), BKV_OK);
    fixture_fill(slot.data, 1, 160, TENANT);
    memcpy(((bkv_record_header_t *)(void *)slot.data)->spec_id, other.bytes, sizeof(other.bytes));
    cr_assert_eq(bkv_store_publish(store, &slot, 0, 0, NOW, NULL), BKV_OK);
    cr_assert(bkv_store_drop(store, &fixture_spec, &key, NOW));
    cr_assert(bkv_store_contains(store, &other, &key, NOW));
    cr_assert(!bkv_store_contains(store, &fixture_spec, &key, NOW));
    fixture_audit(store);
    bkv_store_destroy(store);
}

// Who publishes for its own use must not lose the record to others' pressure before it has read it.
Test(store_write, published_pinned_stays_under_pressure) {
    bkv_store_config_t config = fixture_config(4 * MIB, MIB);
    bkv_store_t *store = fixture_store(&config);
    bkv_pin_t pins[2];
    for (int i = 0; i < 2; i++) { // the second one meets the first
        bkv_slot_t slot;
        cr_assert_eq(bkv_store_reserve(store, TENANT, 100 * KIB, NOW, &slot, NULL), BKV_OK);
        fixture_fill(slot.data, 7, 100 * KIB, TENANT);
        bkv_status_t status = bkv_store_publish_pinned(store, &slot, 10, 0, NOW, &pins[i], NULL);
        cr_assert_eq(status, i == 0 ? BKV_OK : BKV_ALREADY_EXISTS);
    }
    cr_assert_eq(pins[0].data, pins[1].data);
    for (uint64_t i = 100; i < 400; i++) { // ten times what fits, and past its time to live
        fixture_put(store, i, 100 * KIB, TENANT, 0, NOW + 20, NULL);
    }
    cr_assert(fixture_matches(pins[0].data, 7, pins[0].length));
    cr_assert_eq(fixture_metrics(store).pinned, 2);
    bkv_store_unpin(store, &pins[0]);
    bkv_store_unpin(store, &pins[1]);
    fixture_audit(store);
    bkv_store_destroy(store);
}
