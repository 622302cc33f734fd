// test_recover.c - restarts: clean ones, kill -9, an arena full of garbage.
#include "fixture.h"

#include <criterion/criterion.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static bkv_store_t *reopen(const bkv_store_config_t *config, uint64_t *recovered) {
    bkv_store_t *store = NULL;
    bkv_error_t err = {0};
    cr_assert_eq(bkv_store_create(config, NOW, &store, recovered, &err), BKV_OK, "%s", err.message);
    cr_assert_eq(fixture_metrics(store).recovered_total, *recovered);
    fixture_audit(store);
    return store;
}

Test(store_recover, takes_over) {
    char path[64];
    fixture_path(path, sizeof(path));
    bkv_store_config_t config = fixture_config(8 * MIB, MIB);
    config.arena_path = path;
    uint64_t recovered;
    bkv_store_t *store = reopen(&config, &recovered);
    cr_assert_eq(recovered, 0);
    for (uint64_t i = 0; i < 60; i++) {
        cr_assert_eq(fixture_put(store, i, 160 + i % 3 * 70000, i % 2, 50, NOW, NULL), BKV_OK);
    }
    for (uint64_t i = 0; i < 60; i += 3) {
        bkv_key_t key = fixture_key(i);
        cr_assert(bkv_store_drop(store, &fixture_spec, &key, NOW));
    }
    bkv_slot_t slot; // sealed, but not published
    cr_assert_eq(bkv_store_reserve(store, TENANT, 160, NOW, &slot, NULL), BKV_OK);
    fixture_fill(slot.data, 1000, 160, TENANT);
    bkv_store_abort(store, &slot);
    bkv_store_metrics_t before = fixture_metrics(store);
    bkv_store_destroy(store);

    config.recovered_ttl_ms = 500;
    config.tenant_quota = 4 * MIB;
    store = reopen(&config, &recovered);
    cr_assert_eq(recovered, 40);
    bkv_store_metrics_t after = fixture_metrics(store);
    cr_assert_eq(after.entries, before.entries);
    cr_assert_eq(after.resident_bytes, before.resident_bytes);
    cr_assert_eq(after.slot_bytes, before.slot_bytes);
    for (uint64_t i = 0; i < 60; i++) {
        cr_assert_eq(fixture_get(store, i, NOW + 499), i % 3 ? BKV_OK : BKV_NOT_FOUND);
    }
    cr_assert(!fixture_has(store, 1000));
    fixture_add(store, 2000, 160);
    bkv_store_tick(store, NOW + 500, 1000);
    cr_assert_eq(fixture_metrics(store).entries, 1);
    fixture_audit(store);
    bkv_store_destroy(store);
    unlink(path);
}

// By descriptor, as systemd hands it on; and once more.
Test(store_recover, takes_over_a_descriptor) {
    bkv_store_config_t config = fixture_config(4 * MIB, MIB);
    uint64_t recovered;
    bkv_store_t *store = reopen(&config, &recovered);
    for (uint64_t round = 0; round < 3; round++) {
        fixture_add(store, round, 4096);
        int kept = dup(bkv_store_fd(store));
        bkv_store_destroy(store);
        config.arena_fd = kept;
        store = reopen(&config, &recovered);
        close(kept);
        cr_assert_eq(recovered, round + 1);
    }
    bkv_store_destroy(store);
}

Test(store_recover, another_geometry_is_an_empty_store) {
    char path[64];
    fixture_path(path, sizeof(path));
    bkv_store_config_t config = fixture_config(4 * MIB, MIB);
    config.arena_path = path;
    uint64_t recovered;
    bkv_store_t *store = reopen(&config, &recovered);
    fixture_add(store, 1, 4096);
    bkv_store_destroy(store);
    config.slab_bytes = 512 * KIB;
    store = reopen(&config, &recovered);
    cr_assert_eq(recovered, 0);
    cr_assert(!fixture_has(store, 1));
    fixture_add(store, 1, 4096);
    bkv_store_destroy(store);
    unlink(path);
}

// Payload damaged while nobody was there: found out when it is pinned.
Test(store_recover, verifies_at_first_pin) {
    bkv_store_config_t config = fixture_config(4 * MIB, MIB);
    uint64_t recovered;
    bkv_store_t *store = reopen(&config, &recovered);
    fixture_add(store, 1, 4096);
    fixture_add(store, 2, 4096);
    int kept = dup(bkv_store_fd(store));
    bkv_store_destroy(store);
    config.arena_fd = kept;
    store = reopen(&config, &recovered);
    cr_assert_eq(recovered, 2);
    store->arena.slabs[2000] ^= 1; // the first slot's payload
    cr_assert_eq(fixture_get(store, 1, NOW), BKV_DATA_LOSS);
    cr_assert_eq(fixture_get(store, 1, NOW), BKV_NOT_FOUND);
    cr_assert_eq(fixture_get(store, 2, NOW), BKV_OK);
    bkv_store_destroy(store);
}

Test(store_recover, fewer_entries_than_records) {
    bkv_store_config_t config = fixture_config(4 * MIB, MIB);
    uint64_t recovered;
    bkv_store_t *store = reopen(&config, &recovered);
    for (uint64_t i = 0; i < 50; i++) {
        fixture_add(store, i, 4096);
    }
    config.arena_fd = dup(bkv_store_fd(store));
    bkv_store_destroy(store);
    config.max_entries = 10;
    store = reopen(&config, &recovered);
    cr_assert_eq(recovered, 10);
    fixture_add(store, 100, 4096);
    bkv_store_destroy(store);
}

// Two LIVE slots with one key cannot come about, but a damaged arena may say so.
Test(store_recover, the_second_of_a_key_is_refused) {
    bkv_store_config_t config = fixture_config(4 * MIB, MIB);
    uint64_t recovered;
    bkv_store_t *store = reopen(&config, &recovered);
    fixture_add(store, 1, 4096);
    fixture_add(store, 2, 4096);
    memcpy(bkv_arena_at(&store->arena, 1), bkv_arena_at(&store->arena, 0), 4096);
    bkv_arena_set_state(&store->arena, 2, BKV_SLOT_LIVE); // and an empty slot
    config.arena_fd = dup(bkv_store_fd(store));
    bkv_store_destroy(store);
    store = reopen(&config, &recovered);
    cr_assert_eq(recovered, 1);
    cr_assert_eq(fixture_get(store, 1, NOW), BKV_OK);
    bkv_store_destroy(store);
}

static void scribble(const bkv_arena_t *arena, uint64_t *seed) {
    uint64_t head = (uint64_t)(arena->slabs - arena->map);
    uint64_t times = fixture_random(seed) % 64;
    for (uint64_t i = 0; i < times; i++) {
        uint64_t where = fixture_random(seed);
        uint64_t at = fixture_random(seed);
        switch (where % 16 == 0 ? 0 : 1 + where / 16 % 3) {
        case 0: // what slabs there are
            at = BKV_PAGE_BYTES + at % (arena->slab_count * 4);
            break;
        case 1: // what slots are live
            at = (uint64_t)(arena->states - arena->map) + at % (arena->slab_bytes / BKV_PAGE_BYTES * arena->slab_count);
            break;
        case 2: // a header
            at = head + at % (arena->slab_bytes / BKV_PAGE_BYTES * arena->slab_count) * BKV_PAGE_BYTES + at / 65537 % 128;
            break;
        default:
            at = head + at % (arena->slab_bytes * arena->slab_count);
        }
        uint64_t kind = fixture_random(seed);
        arena->map[at] = kind % 3 == 0 ? 1 : kind % 3 == 1 ? 0xff : (uint8_t)(kind >> 8);
    }
}

// Whatever the arena says, the store comes up, its accounts are right, and it serves no record with other bytes.
Test(store_recover, garbage, .timeout = 120) {
    bkv_store_config_t config = fixture_config(2 * MIB, 256 * KIB);
    uint64_t recovered;
    uint64_t seed = 5;
    uint64_t survived = 0;
    bkv_store_t *store = reopen(&config, &recovered);
    for (int round = 0; round < 300; round++) {
        for (uint64_t i = 0; i < 40; i++) {
            fixture_put(store, i, 160 + 16 * (fixture_random(&seed) % 4000), i % 3, 0, NOW, NULL);
        }
        scribble(&store->arena, &seed);
        config.arena_fd = dup(bkv_store_fd(store));
        bkv_store_destroy(store);
        store = reopen(&config, &recovered);
        close(config.arena_fd);
        for (uint64_t i = 0; i < 40; i++) {
            bkv_status_t status = fixture_get(store, i, NOW); // asserts that the bytes are right
            cr_assert(status == BKV_OK || status == BKV_NOT_FOUND || status == BKV_DATA_LOSS);
            survived += status == BKV_OK;
        }
        fixture_audit(store);
    }
    cr_assert(survived > 300 && survived < 300 * 40); // not everything, and not nothing
    bkv_store_destroy(store);
}

// Puts records until it is killed, and tells through the pipe each number that has been published; rests after `most`.
static void put_until_killed(const bkv_store_config_t *config, int to_parent, uint64_t seed, uint64_t most) {
    bkv_store_t *store = NULL;
    if (bkv_store_create(config, NOW, &store, NULL, NULL) != BKV_OK) {
        _exit(1);
    }
    for (uint64_t number = 0; number < most; number++) {
        uint64_t length = 160 + 16 * (fixture_random(&seed) % 2000);
        bkv_slot_t slot;
        if (bkv_store_reserve(store, TENANT, number % 4 ? length : 8 * length, NOW, &slot, NULL) != BKV_OK) {
            _exit(2);
        }
        fixture_fill(slot.data, number, length, TENANT);
        if (bkv_store_publish(store, &slot, 0, length, NOW, NULL) != BKV_OK) {
            _exit(3);
        }
        if (write(to_parent, &number, sizeof(number)) != (ssize_t)sizeof(number)) {
            _exit(4);
        }
    }
    pause();
}

static long us_since(const struct timespec *start) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (now.tv_sec - start->tv_sec) * 1000000 + (now.tv_nsec - start->tv_nsec) / 1000;
}

// Forks a child that puts, kills it after a while, and returns how many records it said were published: 0, 1, 2, ...
static uint64_t run_and_kill(const bkv_store_config_t *config, uint64_t seed, uint64_t most, long after_us) {
    int pipes[2];
    cr_assert_eq(pipe(pipes), 0);
    pid_t child = fork();
    cr_assert(child >= 0);
    if (child == 0) {
        close(pipes[0]);
        put_until_killed(config, pipes[1], seed, most);
    }
    close(pipes[1]);
    uint64_t count = 0, number;
    bool killed = false;
    struct timespec start = {0};
    while (read(pipes[0], &number, sizeof(number)) == (ssize_t)sizeof(number)) { // until what it told before it died is read
        cr_assert_eq(number, count);
        if (count++ == 0) {
            clock_gettime(CLOCK_MONOTONIC, &start); // it has begun
        }
        if (!killed && (us_since(&start) >= after_us || count == most)) {
            kill(child, SIGKILL);
            killed = true;
        }
    }
    close(pipes[0]);
    int status;
    waitpid(child, &status, 0);
    cr_assert(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL, "the child ended by itself: %d", status);
    return count;
}

// After kill -9 in the middle of publishes: all that is found is whole, and all that was published is found where nothing had
// to be evicted.
static void kill_and_recover(uint64_t arena_bytes, uint64_t most, bool all_fit) {
    char path[64];
    fixture_path(path, sizeof(path));
    bkv_store_config_t config = fixture_config(arena_bytes, 512 * KIB);
    config.arena_path = path;
    uint64_t random = 6;
    uint64_t untold = 0;
    for (uint64_t round = 1; round <= 40; round++) {
        unlink(path);
        uint64_t count = run_and_kill(&config, round, most, (long)(fixture_random(&random) % 20000));
        uint64_t recovered;
        bkv_store_t *store = reopen(&config, &recovered);
        uint64_t found = 0;
        for (uint64_t i = 0; i <= count; i++) { // perhaps one more than it had told
            bkv_status_t status = fixture_get(store, i, NOW);
            cr_assert(status == BKV_OK || status == BKV_NOT_FOUND);
            cr_assert(status == BKV_OK || !all_fit || i == count, "round %llu: record %llu of %llu is lost",
                      (unsigned long long)round, (unsigned long long)i, (unsigned long long)count);
            found += status == BKV_OK;
            untold += status == BKV_OK && i == count;
        }
        cr_assert_eq(found, recovered);
        cr_assert_eq(fixture_metrics(store).corrupt_total, 0);
        fixture_audit(store);
        bkv_store_destroy(store);
    }
    cr_log_info("%llu of 40 were killed between publish and telling", (unsigned long long)untold);
    unlink(path);
}

Test(store_recover, kill_9, .timeout = 120) {
    kill_and_recover(48 * MIB, 600, true); // of 18 KiB on average
}

Test(store_recover, kill_9_while_evicting, .timeout = 120) {
    kill_and_recover(4 * MIB, UINT64_MAX, false);
}
