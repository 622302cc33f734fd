// test_copy.c - what a pool asks of a store: adopting, copies that make room first, lists of all else.
#include "fixture.h"

#include <criterion/criterion.h>
#include <pthread.h>
#include <string.h>
#include <unistd.h>

static bkv_name_t name_of(uint64_t number) {
    return (bkv_name_t){.spec_id = fixture_spec, .key = fixture_key(number)};
}

static bool set_copy(bkv_store_t *store, uint64_t number, bool copy) {
    bkv_name_t name = name_of(number);
    return bkv_store_set_copy(store, &name, copy, NOW);
}

static bkv_status_t adopt(bkv_store_t *store, uint64_t number, uint64_t length, uint64_t ttl_ms, bool copy, bkv_pin_t *pin) {
    bkv_slot_t slot;
    cr_assert_eq(bkv_store_reserve(store, TENANT, length, NOW, &slot, NULL), BKV_OK);
    fixture_fill(slot.data, number, length, TENANT);
    return bkv_store_adopt(store, &slot, ttl_ms, copy, NOW, pin, NULL);
}

static void add_copy(bkv_store_t *store, uint64_t number, uint64_t length) {
    cr_assert_eq(adopt(store, number, length, 0, true, NULL), BKV_OK);
}

// 64 records of 64 KiB fit.
static bkv_store_t *store_of_64(void) {
    bkv_store_config_t config = fixture_config(4 * MIB, MIB);
    return fixture_store(&config);
}

Test(store_copy, adopting_is_not_putting) {
    bkv_store_t *store = store_of_64();
    bkv_pin_t pin;
    cr_assert_eq(adopt(store, 1, 4096, 500, false, &pin), BKV_OK);
    cr_assert(fixture_matches(pin.data, 1, 4096));
    cr_assert_eq(bkv_store_ttl(store, &pin, NOW), 500);
    cr_assert_eq(bkv_store_ttl(store, &pin, NOW + 499), 1);
    cr_assert_eq(bkv_store_ttl(store, &pin, NOW + 900), 1); // over, but pinned
    bkv_store_unpin(store, &pin);
    add_copy(store, 2, 4096);
    bkv_store_metrics_t m = fixture_metrics(store);
    cr_assert_eq(m.adopted_total, 2);
    cr_assert_eq(m.copies, 1);
    cr_assert_eq(m.published_total, 0);
    cr_assert_eq(m.raw_bytes_total, 0);
    cr_assert_eq(m.stored_bytes_total, 0);
    cr_assert_eq(fixture_get(store, 1, NOW + 500), BKV_NOT_FOUND);
    bkv_key_t key = fixture_key(2);
    cr_assert_eq(bkv_store_pin(store, &fixture_spec, &key, NOW, &pin, NULL), BKV_OK);
    cr_assert_eq(bkv_store_ttl(store, &pin, NOW + 1000000), 0); // has no end
    bkv_store_unpin(store, &pin);
    fixture_audit(store);
    bkv_store_destroy(store);
}

// A copy is one until somebody brings it who does not call it that.
Test(store_copy, the_second_time) {
    bkv_store_t *store = store_of_64();
    fixture_add(store, 1, 4096);
    cr_assert_eq(adopt(store, 1, 4096, 0, true, NULL), BKV_ALREADY_EXISTS);
    cr_assert_eq(fixture_metrics(store).copies, 0); // still more than a copy
    for (int how = 0; how < 2; how++) {
        cr_assert(set_copy(store, 1, true));
        cr_assert_eq(fixture_metrics(store).copies, 1);
        bkv_status_t status =
            how == 0 ? adopt(store, 1, 4096, 0, false, NULL) : fixture_put(store, 1, 4096, TENANT, 0, NOW, NULL);
        cr_assert_eq(status, BKV_ALREADY_EXISTS);
        cr_assert_eq(fixture_metrics(store).copies, 0);
    }
    bkv_store_metrics_t m = fixture_metrics(store);
    cr_assert_eq(m.duplicates_total, 3);
    cr_assert_eq(m.adopted_total, 0);
    cr_assert_not(set_copy(store, 2, true));
    fixture_audit(store);
    bkv_store_destroy(store);
}

// However often they are read, and however long the others have not been.
Test(store_copy, make_room_first) {
    bkv_store_t *store = store_of_64();
    for (uint64_t i = 0; i < 64; i++) {
        if (i < 40) {
            fixture_add(store, i, 64 * KIB);
        } else {
            add_copy(store, i, 64 * KIB);
        }
    }
    for (uint64_t i = 40; i < 64; i++) {
        cr_assert_eq(fixture_get(store, i, NOW), BKV_OK);
    }
    cr_assert(set_copy(store, 7, true)); // the last that became one
    for (uint64_t i = 0; i < 25; i++) {
        fixture_add(store, 100 + i, 64 * KIB);
        cr_assert_eq(fixture_metrics(store).copies, 24 - i);
    }
    for (uint64_t i = 0; i < 64; i++) {
        cr_assert_eq(fixture_has(store, i), i < 40 && i != 7, "%llu", (unsigned long long)i);
    }
    fixture_add(store, 200, 64 * KIB);
    cr_assert(!fixture_has(store, 0)); // now it is the others' turn
    fixture_audit(store);
    bkv_store_destroy(store);
}

// Among themselves they go as all else does: those that are read stay.
Test(store_copy, those_in_use_stay_longer) {
    bkv_store_t *store = store_of_64();
    for (uint64_t i = 0; i < 64; i++) {
        add_copy(store, i, 64 * KIB);
    }
    cr_assert_eq(fixture_get(store, 0, NOW), BKV_OK);
    cr_assert_eq(fixture_get(store, 2, NOW), BKV_OK);
    for (uint64_t i = 0; i < 3; i++) {
        fixture_add(store, 100 + i, 64 * KIB);
    }
    for (uint64_t i = 0; i < 64; i++) {
        cr_assert_eq(fixture_has(store, i), i != 1 && i != 3 && i != 4);
    }
    bkv_store_destroy(store);
}

// What it was read for before it became a copy, a Put's way to its owners, is forgotten.
Test(store_copy, becoming_one_is_no_use) {
    bkv_store_t *store = store_of_64();
    for (uint64_t i = 0; i < 64; i++) {
        fixture_add(store, i, 64 * KIB);
    }
    for (uint64_t i = 0; i < 2; i++) {
        cr_assert_eq(fixture_get(store, i, NOW), BKV_OK);
        cr_assert(set_copy(store, i, true));
        cr_assert(set_copy(store, i, true)); // it is one already
    }
    cr_assert_eq(fixture_get(store, 0, NOW), BKV_OK);
    fixture_add(store, 100, 64 * KIB);
    cr_assert(fixture_has(store, 0) && !fixture_has(store, 1));
    bkv_store_destroy(store);
}

Test(store_copy, held_ones_stay) {
    bkv_store_t *store = store_of_64();
    for (uint64_t i = 0; i < 64; i++) {
        fixture_add(store, i, 64 * KIB);
    }
    cr_assert(set_copy(store, 10, true) && set_copy(store, 11, true));
    bkv_key_t keys[2] = {fixture_key(10), fixture_key(11)};
    bkv_pin_t pin;
    uint64_t lease;
    cr_assert_eq(bkv_store_pin(store, &fixture_spec, &keys[0], NOW, &pin, NULL), BKV_OK);
    cr_assert_eq(bkv_store_lease(store, &fixture_spec, &keys[1], 1, 1000, NOW, &lease, NULL), BKV_OK);
    fixture_add(store, 100, 64 * KIB);
    cr_assert(fixture_has(store, 10) && fixture_has(store, 11) && !fixture_has(store, 0));
    cr_assert(set_copy(store, 10, false)); // while it is being read
    bkv_store_unpin(store, &pin);
    fixture_audit(store);
    bkv_store_destroy(store);
}

Test(store_copy, of_a_tenant_at_its_quota_go_first) {
    bkv_store_t *store = store_of_64();
    cr_assert_eq(bkv_store_set_quota(store, TENANT, 4 * 64 * KIB, NULL), BKV_OK);
    for (uint64_t i = 0; i < 4; i++) {
        fixture_add(store, i, 64 * KIB);
    }
    cr_assert(set_copy(store, 2, true));
    cr_assert_eq(fixture_get(store, 2, NOW), BKV_OK);
    fixture_add(store, 4, 64 * KIB);
    cr_assert(fixture_has(store, 0) && !fixture_has(store, 2));
    cr_assert_eq(fixture_metrics(store).evicted_quota_total, 1);
    cr_assert_eq(fixture_metrics(store).copies, 0);
    fixture_audit(store);
    bkv_store_destroy(store);
}

// Entries run out before room does: a copy of another size goes rather than an older record of this one.
Test(store_copy, give_up_their_entries_first) {
    bkv_store_config_t config = fixture_config(4 * MIB, MIB);
    config.max_entries = 8;
    bkv_store_t *store = fixture_store(&config);
    for (uint64_t i = 0; i < 8; i++) {
        fixture_add(store, i, i == 5 ? 16 * KIB : 4096);
    }
    cr_assert(set_copy(store, 5, true));
    fixture_add(store, 8, 4096);
    cr_assert(fixture_has(store, 0) && !fixture_has(store, 5));
    fixture_add(store, 9, 4096);
    cr_assert(!fixture_has(store, 0));
    fixture_audit(store);
    bkv_store_destroy(store);
}

// A slab of copies goes to another size before one of records that are older, and a few copies do not make a slab worthless.
Test(store_copy, give_up_their_slabs_first) {
    bkv_store_config_t config = fixture_config(3 * MIB, MIB);
    bkv_store_t *store = fixture_store(&config);
    for (uint64_t i = 0; i < 48; i++) {
        fixture_add(store, i, 64 * KIB);
    }
    for (uint64_t i = 16; i < 32; i++) {
        cr_assert(set_copy(store, i, true));
    }
    cr_assert(set_copy(store, 40, true));
    fixture_add(store, 100, 512 * KIB);
    for (uint64_t i = 0; i < 48; i++) {
        cr_assert_eq(fixture_has(store, i), i < 16 || i >= 32);
    }
    cr_assert_eq(fixture_metrics(store).evicted_slab_total, 16);
    cr_assert_eq(fixture_metrics(store).copies, 1);
    fixture_audit(store);
    bkv_store_destroy(store);
}

// The same where a size that has slabs of its own looks at the others for a colder one: it sees their copies before all else.
Test(store_copy, draw_the_eye_of_other_sizes) {
    bkv_store_config_t config = fixture_config(3 * MIB, MIB);
    bkv_store_t *store = fixture_store(&config);
    for (uint64_t i = 0; i < 32; i++) {
        fixture_add(store, i, 64 * KIB);
    }
    for (uint64_t i = 16; i < 32; i++) {
        cr_assert(set_copy(store, i, true));
    }
    for (uint64_t i = 0; i < 100 && fixture_metrics(store).evicted_slab_total == 0; i++) {
        fixture_add(store, 100 + i, 32 * KIB);
    }
    cr_assert_eq(fixture_metrics(store).evicted_slab_total, 16);
    for (uint64_t i = 0; i < 32; i++) {
        cr_assert_eq(fixture_has(store, i), i < 16);
    }
    fixture_audit(store);
    bkv_store_destroy(store);
}

Test(store_copy, are_counted_however_they_leave) {
    bkv_store_t *store = store_of_64();
    cr_assert_eq(adopt(store, 0, 4096, 10, true, NULL), BKV_OK);
    for (uint64_t i = 1; i < 3; i++) {
        add_copy(store, i, 4096);
    }
    cr_assert_eq(fixture_metrics(store).copies, 3);
    bkv_store_tick(store, NOW + 10, 100); // expired
    cr_assert_eq(fixture_metrics(store).copies, 2);
    bkv_key_t key = fixture_key(1);
    cr_assert(bkv_store_drop(store, &fixture_spec, &key, NOW));
    cr_assert_eq(fixture_metrics(store).copies, 1);
    key = fixture_key(2);
    bkv_pin_t pin;
    cr_assert_eq(bkv_store_pin(store, &fixture_spec, &key, NOW, &pin, NULL), BKV_OK);
    ((uint8_t *)(uintptr_t)pin.data)[200] ^= 1;
    bkv_store_unpin(store, &pin);
    cr_assert_eq(fixture_get(store, 2, NOW), BKV_DATA_LOSS);
    cr_assert_eq(fixture_metrics(store).copies, 0);
    add_copy(store, 3, 4096);
    fixture_add(store, 4, 4096); // the entries of those that left are no copies any more
    cr_assert_eq(fixture_metrics(store).copies, 1);
    fixture_audit(store);
    bkv_store_destroy(store);
}

// What they were is forgotten with the process.
Test(store_copy, are_none_after_a_restart) {
    char path[64];
    fixture_path(path, sizeof(path));
    bkv_store_config_t config = fixture_config(4 * MIB, MIB);
    config.arena_path = path;
    bkv_store_t *store = fixture_store(&config);
    add_copy(store, 1, 4096);
    fixture_add(store, 2, 4096);
    bkv_store_destroy(store);
    store = fixture_store(&config);
    cr_assert_eq(fixture_metrics(store).recovered_total, 2);
    cr_assert_eq(fixture_metrics(store).copies, 0);
    fixture_audit(store);
    bkv_store_destroy(store);
    unlink(path);
}

// ---- lists ----

#define NUMBERS 300

// Which of the first NUMBERS a full list names, how often; in pieces of `capacity`.
static void list_all(bkv_store_t *store, size_t capacity, uint64_t now_ms, uint32_t *times) {
    bkv_store_item_t items[64];
    uint64_t cursor = 0;
    bool more = true;
    bkv_key_t keys[NUMBERS];
    for (uint64_t n = 0; n < NUMBERS; n++) {
        keys[n] = fixture_key(n);
    }
    memset(times, 0, NUMBERS * sizeof(*times));
    while (more) {
        uint64_t before = cursor;
        size_t count = bkv_store_list(store, &cursor, items, capacity, now_ms, &more);
        cr_assert(count <= capacity && cursor - before <= 16 * capacity);
        cr_assert(!more || cursor > before);
        for (size_t i = 0; i < count; i++) {
            uint64_t n = 0;
            while (n < NUMBERS && memcmp(&items[i].name.key, &keys[n], sizeof(keys[n])) != 0) {
                n++;
            }
            cr_assert_lt(n, NUMBERS, "a record that was never put");
            cr_assert_arr_eq(items[i].name.spec_id.bytes, fixture_spec.bytes, BKV_SPEC_ID_BYTES);
            cr_assert_eq(items[i].bytes, 160 + 16 * n);
            times[n]++;
        }
    }
}

Test(store_copy, an_empty_store_has_an_empty_list) {
    bkv_store_t *store = store_of_64();
    bkv_store_item_t item;
    uint64_t cursor = 0;
    bool more = true;
    cr_assert_eq(bkv_store_list(store, &cursor, &item, 1, NOW, &more), 0);
    cr_assert_not(more);
    cursor = UINT64_MAX; // whatever the caller has there
    cr_assert_eq(bkv_store_list(store, &cursor, &item, 1, NOW, &more), 0);
    cr_assert_not(more);
    bkv_store_destroy(store);
}

Test(store_copy, folds_are_not_listed) {
    bkv_store_t *store = store_of_64();
    bkv_slot_t slot;
    uint32_t times[NUMBERS];
    fixture_add(store, 1, 160 + 16);
    cr_assert_eq(bkv_store_reserve(store, TENANT, 160 + 32, NOW, &slot, NULL), BKV_OK);
    fixture_fill(slot.data, 2, 160 + 32, TENANT);
    bkv_record_header_t *header = (void *)slot.data;
    cr_assert_eq(bkv_store_publish(store, &slot, 0, 0, NOW, NULL), BKV_OK);
    header->flags |= BKV_RECORD_FOLD; // afterwards, as no raw record is one
    cr_assert(fixture_has(store, 2));
    list_all(store, 4, NOW, times);
    cr_assert_eq(times[1], 1);
    cr_assert_eq(times[2], 0);
    bkv_store_destroy(store);
}

// Few among many that are not listed: a 0 with more to come.
Test(store_copy, a_list_looks_at_so_many_and_no_more) {
    bkv_store_t *store = store_of_64();
    for (uint64_t i = 0; i < 100; i++) {
        if (i == 99) {
            fixture_add(store, i, 160);
        } else {
            add_copy(store, i, 160);
        }
    }
    bkv_store_item_t item;
    uint64_t cursor = 0;
    bool more;
    for (int i = 0; i < 6; i++) {
        cr_assert_eq(bkv_store_list(store, &cursor, &item, 1, NOW, &more), 0);
        cr_assert(more);
    }
    cr_assert_eq(bkv_store_list(store, &cursor, &item, 1, NOW, &more), 1);
    bkv_store_destroy(store);
}

typedef struct {
    bool resident, copy;
    uint64_t expires_ms;
} model_t;

// Against a plain array: what is listed, and that nobody leaves while there is a copy that could.
Test(store_copy, does_what_an_array_does, .timeout = 120) {
    bkv_store_config_t config = fixture_config(MIB, 256 * KIB);
    config.max_entries = 100;
    bkv_store_t *store = fixture_store(&config);
    model_t model[NUMBERS] = {0};
    uint32_t times[NUMBERS];
    uint64_t seed = 5, now = NOW, evictions = 0;
    for (int step = 0; step < 20000; step++) {
        uint64_t n = fixture_random(&seed) % NUMBERS, length = 160 + 16 * n;
        model_t *m = &model[n];
        bkv_name_t name = name_of(n);
        bkv_slot_t slot;
        bool copy = fixture_random(&seed) % 2, there = m->resident && (m->expires_ms == 0 || now < m->expires_ms);
        bkv_status_t status;
        switch (fixture_random(&seed) % 8) {
        case 0:
            now++;
            break;
        case 1:
            cr_assert_eq(bkv_store_drop(store, &fixture_spec, &name.key, now), there);
            m->resident = false;
            break;
        case 2:
        case 3:
            cr_assert_eq(bkv_store_set_copy(store, &name, copy, now), there);
            m->copy = there ? copy : m->copy;
            break;
        default:
            cr_assert_eq(bkv_store_reserve(store, TENANT, length, now, &slot, NULL), BKV_OK);
            fixture_fill(slot.data, n, length, TENANT);
            status = bkv_store_adopt(store, &slot, n % 3 * 20, copy, now, NULL, NULL);
            cr_assert_eq(status, there ? BKV_ALREADY_EXISTS : BKV_OK);
            m->copy = there ? m->copy && copy : copy;
            m->expires_ms = there ? m->expires_ms : n % 3 != 0 ? now + n % 3 * 20 : 0;
            m->resident = true;
        }
        uint64_t copies_left = 0, owned_gone = 0;
        for (uint64_t i = 0; i < NUMBERS; i++) {
            bkv_key_t key = fixture_key(i);
            bool has = bkv_store_contains(store, &fixture_spec, &key, now);
            bool alive = model[i].resident && (model[i].expires_ms == 0 || now < model[i].expires_ms);
            cr_assert(!has || alive);
            copies_left += has && model[i].copy && i != n;
            owned_gone += alive && !has && !model[i].copy;
            evictions += alive && !has;
            model[i].resident = has;
        }
        cr_assert(owned_gone == 0 || copies_left == 0, "step %d", step);
        if (step % 100 == 0) {
            list_all(store, 1 + fixture_random(&seed) % 64, now, times);
            for (uint64_t i = 0; i < NUMBERS; i++) {
                cr_assert_eq(times[i], model[i].resident && !model[i].copy);
            }
            fixture_audit(store);
        }
    }
    cr_assert_gt(evictions, 1000);
    bkv_store_destroy(store);
}

// ---- several threads ----

typedef struct {
    bkv_store_t *store;
    uint64_t seed;
    _Atomic bool *end;
} changer_t;

#define STEADY 100 // of NUMBERS: these stay throughout

static void *change(void *arg) {
    changer_t *c = arg;
    while (!*c->end) {
        uint64_t n = STEADY + fixture_random(&c->seed) % (NUMBERS - STEADY);
        bkv_name_t name = name_of(n);
        bkv_slot_t slot;
        switch (fixture_random(&c->seed) % 4) {
        case 0:
            bkv_store_drop(c->store, &fixture_spec, &name.key, NOW);
            break;
        case 1:
            bkv_store_set_copy(c->store, &name, n % 2, NOW);
            break;
        default:
            if (bkv_store_reserve(c->store, TENANT, 160 + 16 * n, NOW, &slot, NULL) == BKV_OK) {
                fixture_fill(slot.data, n, 160 + 16 * n, TENANT);
                bkv_store_adopt(c->store, &slot, 0, n % 2, NOW, NULL, NULL);
            }
        }
        name = name_of(n % STEADY);
        bkv_pin_t pin;
        if (bkv_store_pin(c->store, &fixture_spec, &name.key, NOW, &pin, NULL) == BKV_OK) {
            bkv_store_unpin(c->store, &pin);
        }
    }
    return NULL;
}

Test(store_copy, what_stays_is_listed_once_whatever_comes_and_goes, .timeout = 240) {
    bkv_store_config_t config = fixture_config(8 * MIB, 256 * KIB);
    config.shards = 4;
    bkv_store_t *store = fixture_store(&config);
    for (uint64_t i = 0; i < NUMBERS; i++) {
        if (i < STEADY || i % 2 == 0) {
            fixture_add(store, i, 160 + 16 * i);
        } else {
            add_copy(store, i, 160 + 16 * i);
        }
    }
    _Atomic bool end = false;
    changer_t changers[2];
    pthread_t threads[2];
    for (uint64_t i = 0; i < 2; i++) {
        changers[i] = (changer_t){.store = store, .seed = i + 1, .end = &end};
        cr_assert_eq(pthread_create(&threads[i], NULL, change, &changers[i]), 0);
    }
    uint32_t times[NUMBERS];
    for (int round = 0; round < 50; round++) {
        list_all(store, 7, NOW, times);
        for (uint64_t i = 0; i < STEADY; i++) {
            cr_assert_eq(times[i], 1, "%llu: %u times", (unsigned long long)i, times[i]);
        }
    }
    end = true;
    for (int i = 0; i < 2; i++) {
        pthread_join(threads[i], NULL);
    }
    fixture_audit(store);
    bkv_store_destroy(store);
}
