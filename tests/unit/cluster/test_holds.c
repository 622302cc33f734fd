// test_holds.c - records that are held in place for other daemons: how long, how many, and that all is given back.
#include "asking.h"
#include "daemon/cluster/peer/holds.h"
#include "daemon/observe/clock.h"

#include <criterion/criterion.h>
#include <string.h>

#define RECORD  UINT64_C(4096)
#define RECORDS 8u
#define TTL_MS  3600000 // of record 1
#define MUCH    (UINT64_C(1) << 30)

static bkv_store_t *make_store(void) {
    bkv_store_t *store = asking_store();
    for (uint32_t i = 0; i < RECORDS; i++) {
        record_put(store, i, RECORD, i == 1 ? TTL_MS : 0);
    }
    return store;
}

static bkv_status_t take(bkv_holds_t *holds, uint32_t first, uint32_t count, uint64_t until_ms, bkv_location_t *locations,
                         uint64_t *id, bkv_error_t *error) {
    bkv_name_t names[RECORDS + 2];
    for (uint32_t i = 0; i < count; i++) {
        names[i] = record_name(first + i);
    }
    return bkv_holds_take(holds, names, count, until_ms, bkv_now_ms(), locations, id, error);
}

Test(holds, say_where_records_lie) {
    bkv_store_t *store = make_store();
    const uint64_t now_ms = bkv_now_ms();
    bkv_holds_t holds;
    bkv_location_t locations[RECORDS + 2];
    uint64_t id, bytes;
    void *arena;
    bkv_holds_init(&holds, store, MUCH);
    bkv_store_memory(store, &arena, &bytes);
    cr_assert_eq(take(&holds, 0, RECORDS + 2, now_ms + 10, locations, &id, NULL), BKV_OK);
    cr_assert_neq(id, 0);
    for (uint32_t i = 0; i < RECORDS; i++) {
        cr_assert_eq(locations[i].bytes, RECORD);
        cr_assert_eq(locations[i].tenant, 7);
        cr_assert(i == 1 ? locations[i].ttl_ms > 0 && locations[i].ttl_ms <= TTL_MS : locations[i].ttl_ms == 0);
        cr_assert_leq(locations[i].offset, bytes - RECORD);
        cr_assert(record_matches((uint8_t *)arena + locations[i].offset, i, RECORD));
    }
    cr_assert_eq(locations[RECORDS].bytes, 0);
    cr_assert_eq(locations[RECORDS + 1].bytes, 0);
    cr_assert_eq(store_pinned(store), RECORDS);
    bkv_holds_deinit(&holds);
    cr_assert_eq(store_pinned(store), 0);
    bkv_store_destroy(store);
}

Test(holds, of_nothing_are_none) {
    bkv_store_t *store = make_store();
    const uint64_t now_ms = bkv_now_ms();
    bkv_holds_t holds;
    bkv_location_t locations[2];
    uint64_t id = 5;
    bkv_holds_init(&holds, store, MUCH);
    cr_assert_eq(take(&holds, RECORDS, 2, now_ms + 10, locations, &id, NULL), BKV_OK);
    cr_assert_eq(id, 0);
    cr_assert_eq(holds.count, 0);
    bkv_holds_release(&holds, 0);
    bkv_holds_deinit(&holds);
    bkv_store_destroy(store);
}

Test(holds, end_by_release_and_by_the_clock_in_any_order) {
    bkv_store_t *store = make_store();
    const uint64_t now_ms = bkv_now_ms();
    bkv_holds_t holds;
    bkv_location_t locations[RECORDS];
    uint64_t id[4];
    bkv_holds_init(&holds, store, MUCH);
    for (uint32_t i = 0; i < 4; i++) {
        cr_assert_eq(take(&holds, i, 1, now_ms + 100 - 10 * i, locations, &id[i], NULL), BKV_OK);
    }
    cr_assert_eq(store_pinned(store), 4);
    bkv_holds_release(&holds, id[3]); // the last one
    bkv_holds_release(&holds, id[3]); // again
    cr_assert_eq(store_pinned(store), 3);
    bkv_holds_expire(&holds, now_ms + 79);
    cr_assert_eq(store_pinned(store), 3);
    bkv_holds_expire(&holds, now_ms + 90); // 2 and 1
    cr_assert_eq(store_pinned(store), 1);
    cr_assert_eq(take(&holds, 5, 2, now_ms + 50, locations, &id[1], NULL), BKV_OK); // behind what is left
    cr_assert_eq(holds.records, 3);
    cr_assert_eq(holds.bytes, 3 * RECORD);
    bkv_holds_release(&holds, id[0]);
    bkv_holds_release(&holds, id[1]);
    cr_assert_eq(store_pinned(store), 0);
    cr_assert_eq(holds.records, 0);
    cr_assert_eq(holds.bytes, 0);
    bkv_holds_deinit(&holds);
    bkv_store_destroy(store);
}

Test(holds, are_bounded_in_number_and_in_bytes) {
    bkv_store_t *store = make_store();
    const uint64_t now_ms = bkv_now_ms();
    bkv_holds_t holds;
    bkv_location_t locations[RECORDS];
    bkv_error_t error = {.message = ""};
    uint64_t id, first;
    bkv_holds_init(&holds, store, 3 * RECORD);
    cr_assert_eq(take(&holds, 0, 2, now_ms + 100, locations, &first, &error), BKV_OK);
    cr_assert_eq(take(&holds, 2, 2, now_ms + 100, locations, &id, &error), BKV_RESOURCE_EXHAUSTED);
    cr_assert_eq(strncmp(error.message, "names: ", 7), 0, "%s", error.message);
    cr_assert_eq(store_pinned(store), 2, "nothing of the refused one");
    cr_assert_eq(take(&holds, 2, 1, now_ms + 100, locations, &id, &error), BKV_OK);
    bkv_holds_deinit(&holds);
    bkv_holds_init(&holds, store, MUCH);
    for (uint32_t i = 0; i < BKV_HOLDS_MAX; i++) {
        cr_assert_eq(take(&holds, 0, 1, now_ms + 100, locations, &id, &error), BKV_OK);
    }
    cr_assert_eq(take(&holds, 0, 1, now_ms + 100, locations, &id, &error), BKV_RESOURCE_EXHAUSTED);
    bkv_holds_expire(&holds, now_ms + 100);
    cr_assert_eq(take(&holds, 0, 1, now_ms + 200, locations, &id, &error), BKV_OK);
    cr_assert_eq(store_pinned(store), 1);
    bkv_holds_deinit(&holds);
    bkv_store_destroy(store);
}

// What is held is not moved, not even by who drops it.
Test(holds, keep_what_is_dropped_meanwhile) {
    bkv_store_t *store = make_store();
    const uint64_t now_ms = bkv_now_ms();
    bkv_holds_t holds;
    bkv_location_t location;
    uint64_t id, bytes;
    void *arena;
    bkv_holds_init(&holds, store, MUCH);
    bkv_store_memory(store, &arena, &bytes);
    cr_assert_eq(take(&holds, 6, 1, now_ms + 10, &location, &id, NULL), BKV_OK);
    const bkv_name_t name = record_name(6);
    cr_assert(bkv_store_drop(store, &name.spec_id, &name.key, bkv_now_ms()));
    for (uint32_t i = 100; i < 200; i++) {
        record_put(store, i, RECORD, 0);
    }
    cr_assert(record_matches((uint8_t *)arena + location.offset, 6, RECORD));
    bkv_holds_release(&holds, id);
    bkv_holds_deinit(&holds);
    bkv_store_destroy(store);
}
