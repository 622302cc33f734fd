// test_fetch.c - records brought from other members, of which some are slow, silent, stubborn, or not honest.
#include "pool.h"

#include "daemon/observe/clock.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define ARENA ((uint64_t)32 << 20)
#define BATCH 200

static void put_batch(pool_t *pool) {
    for (uint32_t i = 0; i < BATCH; i++) {
        put_owned(pool, i);
    }
}

static void expect_all(const bkv_status_t *statuses, uint32_t count, bkv_status_t status) {
    for (uint32_t i = 0; i < count; i++) {
        cr_assert_eq(statuses[i], status, "record %u: %d", i, statuses[i]);
    }
}

static uint32_t fetches(pool_t *pool) {
    uint32_t sum = 0;
    for (uint32_t i = 1; i < MEMBERS; i++) {
        sum += atomic_load(&pool->peers[i].fetches);
    }
    return sum;
}

static void set_all(pool_t *pool, temper_t temper, uint64_t patience_us) {
    for (uint32_t i = 1; i < MEMBERS; i++) {
        atomic_store(&pool->peers[i].temper, temper);
        atomic_store(&pool->peers[i].patience_us, patience_us);
    }
}

// ---- what is there ----

Test(fetch, of_a_batch_in_one_question_to_each_owner, .timeout = 60) {
    pool_t *pool = pool_new(2, ARENA);
    put_batch(pool);
    bkv_name_t names[BATCH];
    bkv_status_t statuses[BATCH];
    names_of(0, BATCH, names);
    set_all(pool, GOOD, 5000000);
    fetch_ms(pool, names, BATCH, 10000, statuses);
    expect_all(statuses, BATCH, BKV_OK);
    uint32_t asked = 0, resident = 0;
    for (uint32_t i = 1; i < MEMBERS; i++) {
        cr_assert_leq(atomic_load(&pool->peers[i].fetches), 1);
        asked += atomic_load(&pool->peers[i].asked);
    }
    for (uint32_t i = 0; i < BATCH; i++) {
        uint32_t owners[BKV_REPLICAS_MAX];
        uint32_t count = owners_of(pool, i, owners);
        resident += owners[0] == SELF || (count > 1 && owners[1] == SELF);
    }
    cr_assert(resident > 0 && asked == BATCH - resident, "%u asked, %u were here", asked, resident);
    cr_assert_eq(atomic_load(&pool->cluster.counters.remote_hits_total), asked);
    // The second time everything is here, and nobody is asked.
    uint32_t before = fetches(pool);
    fetch_ms(pool, names, BATCH, 10000, statuses);
    expect_all(statuses, BATCH, BKV_OK);
    cr_assert_eq(fetches(pool), before);
    pool_free(pool);
}

Test(fetch, comes_from_the_quickest_that_is_not_suspected, .timeout = 60) {
    pool_t *pool = pool_new(2, ARENA);
    uint32_t number = number_owned_by(pool, 1, 2, 0);
    put_owned(pool, number);
    cr_assert_eq(fetch_one(pool, number), BKV_OK);
    cr_assert(atomic_load(&pool->peers[1].fetches) == 1 && atomic_load(&pool->peers[2].fetches) == 0);
    atomic_store(&pool->peers[1].suspected, true);
    number = number_owned_by(pool, 1, 2, number + 1);
    put_owned(pool, number);
    cr_assert_eq(fetch_one(pool, number), BKV_OK);
    cr_assert(atomic_load(&pool->peers[1].fetches) == 1 && atomic_load(&pool->peers[2].fetches) == 1);
    pool_free(pool);
}

Test(fetch, makes_copies_but_of_what_this_daemon_owns, .timeout = 60) {
    pool_t *pool = pool_new(2, ARENA);
    uint32_t other = number_owned_by(pool, 1, 2, 0), own = number_owned_by(pool, SELF, 3, 0);
    put_owned(pool, other);
    put_at(pool->peers[3].store, own);
    cr_assert(fetch_one(pool, other) == BKV_OK && fetch_one(pool, own) == BKV_OK);
    bkv_store_metrics_t metrics;
    bkv_store_metrics(pool->store, &metrics);
    cr_assert(metrics.entries == 2 && metrics.copies == 1 && metrics.adopted_total == 2);
    // What is its own stays, whatever happens; a copy goes when it has been used, but not under somebody's hands.
    bkv_name_t names[2] = {name_of(own), name_of(other)};
    bkv_pin_t pin;
    cr_assert_eq(bkv_store_pin(pool->store, &names[1].spec_id, &names[1].key, bkv_now_ms(), &pin, NULL), BKV_OK);
    bkv_cluster_used(&pool->cluster, &names[0]);
    bkv_cluster_used(&pool->cluster, &names[1]);
    cr_assert(has(pool->store, own) && has(pool->store, other));
    bkv_store_unpin(pool->store, &pin);
    bkv_hot_set_wanted(&pool->cluster.hot, 0);
    bkv_cluster_used(&pool->cluster, &names[0]);
    bkv_cluster_used(&pool->cluster, &names[1]);
    cr_assert(has(pool->store, own) && !has(pool->store, other));
    pool_free(pool);
}

Test(fetch, a_copy_that_is_read_often_stays, .timeout = 60) {
    pool_t *pool = pool_new(2, ARENA);
    uint32_t number = number_owned_by(pool, 1, 2, 0);
    bkv_name_t name = name_of(number);
    put_owned(pool, number);
    cr_assert_eq(fetch_one(pool, number), BKV_OK);
    bkv_cluster_used(&pool->cluster, &name);
    cr_assert(!has(pool->store, number), "it was read once");
    cr_assert_eq(fetch_one(pool, number), BKV_OK);
    bkv_cluster_used(&pool->cluster, &name);
    cr_assert(has(pool->store, number), "it was read twice");
    cr_assert_eq(atomic_load(&pool->cluster.counters.hot_copies_total), 1);
    pool_free(pool);
}

Test(fetch, leaves_alone_what_has_been_found, .timeout = 60) {
    pool_t *pool = pool_new(2, ARENA);
    put_batch(pool);
    bkv_name_t names[3];
    names_of(0, 3, names);
    bkv_found_t found[3] = {{.status = BKV_NOT_FOUND}, {.status = BKV_OK, .pin = {.length = 4711}}, {.status = BKV_NOT_FOUND}};
    waiter_t waiter;
    waiter_init(&waiter);
    bkv_cluster_fetch(&pool->cluster, names, 3, NO_END, found, waiter_done, &waiter);
    waiter_wait(&waiter);
    cr_assert(found[0].status == BKV_OK && found[2].status == BKV_OK && found[1].pin.length == 4711);
    cr_assert(is_record(&found[0].pin, 0) && is_record(&found[2].pin, 2));
    cr_assert_eq(pinned(pool), 2);
    bkv_store_unpin(pool->store, &found[0].pin);
    bkv_store_unpin(pool->store, &found[2].pin);
    bkv_cluster_fetch(&pool->cluster, names, 0, NO_END, found, waiter_done, &waiter);
    waiter_wait(&waiter);
    pool_free(pool);
}

Test(fetch, what_nobody_has_is_not_found, .timeout = 60) {
    pool_t *pool = pool_new(2, ARENA);
    bkv_name_t names[BATCH];
    bkv_status_t statuses[BATCH];
    names_of(0, BATCH, names);
    uint64_t took_ms = fetch_ms(pool, names, BATCH, 10000, statuses);
    expect_all(statuses, BATCH, BKV_NOT_FOUND);
    cr_assert_lt(took_ms, TIMEOUT_MS);
    uint64_t hedged = atomic_load(&pool->cluster.counters.remote_hedged_total); // where this machine itself was late
    // A question to each of the others; and when one of these is over, one to each of the others for what it did not bring.
    cr_assert(hedged > 0 || fetches(pool) <= (MEMBERS - 1) * (MEMBERS - 1), "missing ones go on together, not in %u questions",
              (unsigned)fetches(pool));
    cr_assert_eq(atomic_load(&pool->cluster.counters.remote_misses_total), BATCH);
    pool_free(pool);
}

Test(fetch, alone_in_the_cluster, .timeout = 60) {
    pool_t *pool = pool_new(2, ARENA);
    for (uint32_t i = 1; i < MEMBERS; i++) {
        pool_list(pool, i, false);
    }
    pool_publish(pool);
    put_at(pool->store, 1);
    cr_assert(fetch_one(pool, 1) == BKV_OK && fetch_one(pool, 2) == BKV_NOT_FOUND);
    pool_free(pool);
}

// ---- owners that are no help ----

// Both owners are asked, whatever the first one does.
static void goes_round(temper_t temper, uint64_t least_ms, uint64_t most_ms) {
    pool_t *pool = pool_new(2, ARENA);
    bkv_name_t names[20];
    bkv_status_t statuses[20];
    uint32_t number = 0;
    for (uint32_t i = 0; i < 20; i++) {
        number = number_owned_by(pool, 1, 2, number) + 1;
        names[i] = name_of(number - 1);
        put_owned(pool, number - 1);
    }
    atomic_store(&pool->peers[1].temper, temper);
    uint64_t took_ms = fetch_ms(pool, names, 20, 10000, statuses);
    expect_all(statuses, 20, BKV_OK);
    cr_assert(took_ms >= least_ms && took_ms <= most_ms, "temper %d took %llu ms", temper, (unsigned long long)took_ms);
    cr_assert_leq(atomic_load(&pool->peers[2].asked), 20);
    pool_free(pool); // and the slots of what was on its way are given back
}

Test(fetch, goes_round_one_that_is_no_help, .timeout = 120) {
    static const temper_t tempers[] = {DAMAGING, LYING, SHRINKING, FAILING, VANISHING, DENYING, REFUSING};
    for (size_t i = 0; i < sizeof(tempers) / sizeof(tempers[0]); i++) {
        goes_round(tempers[i], 0, TIMEOUT_MS / 2);
    }
}

Test(fetch, asks_another_when_one_is_slow, .timeout = 60) {
    goes_round(SILENT, 100, TIMEOUT_MS / 2); // its patience is 100 ms
    goes_round(STALLING, 100, TIMEOUT_MS / 2);
}

Test(fetch, takes_what_comes_first_of_two, .timeout = 60) {
    pool_t *pool = pool_new(2, ARENA);
    uint32_t number = number_owned_by(pool, 1, 2, 0);
    put_owned(pool, number);
    for (uint32_t i = 0; i < 30; i++) { // both come at about the same time
        bkv_name_t name = name_of(number);
        atomic_store(&pool->peers[1].delay_us, 3000);
        atomic_store(&pool->peers[1].patience_us, 1000);
        atomic_store(&pool->peers[2].delay_us, 2000 + i * 10);
        cr_assert_eq(fetch_one(pool, number), BKV_OK);
        cr_assert(bkv_store_drop(pool->store, &name.spec_id, &name.key, bkv_now_ms()));
    }
    cr_assert_geq(atomic_load(&pool->cluster.counters.remote_hedged_total), 20);
    pool_free(pool);
}

Test(fetch, a_long_answer_is_not_a_slow_one, .timeout = 60) {
    pool_t *pool = pool_new(2, ARENA);
    bkv_name_t names[20];
    bkv_status_t statuses[20];
    uint32_t number = 0;
    for (uint32_t i = 0; i < 20; i++) {
        number = number_owned_by(pool, 1, 2, number) + 1;
        names[i] = name_of(number - 1);
        put_owned(pool, number - 1);
    }
    atomic_store(&pool->peers[1].delay_us, 100000); // of each record; all of them take four times its patience
    atomic_store(&pool->peers[1].patience_us, 500000);
    fetch_ms(pool, names, 20, 10000, statuses);
    expect_all(statuses, 20, BKV_OK);
    cr_assert_eq(atomic_load(&pool->peers[2].fetches), 0);
    pool_free(pool);
}

Test(fetch, statuses_of_what_cannot_be_had, .timeout = 120) {
    static const struct {
        temper_t one, other;
        bkv_status_t status;
    } cases[] = {
        {DENYING, DENYING, BKV_NOT_FOUND}, {DAMAGING, DENYING, BKV_DATA_LOSS}, {LYING, SHRINKING, BKV_DATA_LOSS},
        {FAILING, DENYING, BKV_BUSY},      {DENYING, REFUSING, BKV_BUSY},      {FAILING, DAMAGING, BKV_BUSY},
        {SILENT, DENYING, BKV_BUSY},       {REFUSING, REFUSING, BKV_BUSY},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        pool_t *pool = pool_new(2, ARENA);
        uint32_t number = number_owned_by(pool, 1, 2, 0);
        put_owned(pool, number);
        atomic_store(&pool->peers[1].temper, cases[i].one);
        atomic_store(&pool->peers[2].temper, cases[i].other);
        bkv_status_t status = fetch_one(pool, number);
        cr_assert_eq(status, cases[i].status, "case %zu: %d", i, status);
        cr_assert(!has(pool->store, number));
        pool_free(pool);
    }
}

Test(fetch, ends_with_the_deadline, .timeout = 60) {
    static const temper_t tempers[] = {SILENT, STALLING};
    for (size_t i = 0; i < 2; i++) {
        pool_t *pool = pool_new(2, ARENA);
        put_batch(pool);
        bkv_name_t names[BATCH];
        bkv_status_t statuses[BATCH];
        names_of(0, BATCH, names);
        set_all(pool, tempers[i], 50000);
        uint64_t took_ms = fetch_ms(pool, names, BATCH, 300, statuses);
        cr_assert(took_ms >= 290 && took_ms < 290 + TIMEOUT_MS / 2, "%llu ms", (unsigned long long)took_ms);
        for (uint32_t n = 0; n < BATCH; n++) {
            cr_assert_eq(statuses[n], has(pool->store, n) ? BKV_OK : BKV_DEADLINE_EXCEEDED, "%u: %d", n, statuses[n]);
        }
        pool_free(pool);
    }
}

Test(fetch, a_deadline_that_has_passed, .timeout = 60) {
    pool_t *pool = pool_new(2, ARENA);
    uint32_t number = number_owned_by(pool, 1, 2, 0);
    bkv_name_t name = name_of(number);
    bkv_found_t found = {.status = BKV_NOT_FOUND};
    waiter_t waiter;
    waiter_init(&waiter);
    bkv_cluster_fetch(&pool->cluster, &name, 1, bkv_now_ms() - 1, &found, waiter_done, &waiter);
    waiter_wait(&waiter);
    cr_assert(found.status == BKV_DEADLINE_EXCEEDED && fetches(pool) == 0);
    pool_free(pool);
}

// ---- room ----

Test(fetch, what_has_no_room_says_so, .timeout = 60) {
    pool_t *pool = pool_new(2, (uint64_t)1 << 20); // four slabs of 256 KiB
    put_at(pool->store, 5000);
    bkv_name_t resident = name_of(5000);
    bkv_pin_t pin;
    cr_assert_eq(bkv_store_pin(pool->store, &resident.spec_id, &resident.key, bkv_now_ms(), &pin, NULL), BKV_OK);
    bkv_name_t names[BATCH];
    bkv_found_t found[BATCH];
    for (uint32_t i = 0, number = 0; i < BATCH; i++) {
        number = number_owned_by(pool, 1, 2, number) + 1;
        names[i] = name_of(number - 1);
        put_owned(pool, number - 1);
        found[i].status = BKV_NOT_FOUND;
    }
    waiter_t waiter;
    waiter_init(&waiter);
    bkv_cluster_fetch(&pool->cluster, names, BATCH, NO_END, found, waiter_done, &waiter);
    waiter_wait(&waiter);
    uint32_t came = 0;
    for (uint32_t i = 0; i < BATCH; i++) {
        cr_assert(found[i].status == BKV_OK || found[i].status == BKV_RESOURCE_EXHAUSTED, "%u: %d", i, found[i].status);
        came += found[i].status == BKV_OK;
        if (found[i].status == BKV_OK) {
            bkv_store_unpin(pool->store, &found[i].pin);
        }
    }
    cr_assert(came > 5 && came < BATCH, "%u of %u came", came, BATCH);
    cr_assert(is_record(&pin, 5000), "and what was pinned is as it was");
    bkv_store_unpin(pool->store, &pin);
    pool_free(pool);
}

// ---- while members change ----

// Repair has not begun: the records are where they were, and a new owner has none.
Test(fetch, asks_those_that_repair_starts_from, .timeout = 60) {
    pool_t *pool = pool_new(2, ARENA);
    pool_list(pool, 4, false);
    pool_publish(pool);
    bkv_status_t statuses[BATCH];
    bkv_name_t names[BATCH];
    put_batch(pool);
    names_of(0, BATCH, names);
    pool_set_origin(pool);
    pool_list(pool, 4, true);  // a newcomer
    pool_list(pool, 3, false); // one that has left etcd, and still answers
    pool_publish(pool);
    fetch_ms(pool, names, BATCH, 10000, statuses);
    expect_all(statuses, BATCH, BKV_OK);
    pool_free(pool);
}

// What is lost is lost, and the dead member does not make an error of it.
Test(fetch, the_silence_of_one_that_has_gone_says_nothing, .timeout = 60) {
    pool_t *pool = pool_new(1, ARENA);
    uint32_t number = 0, owners[BKV_REPLICAS_MAX];
    while (owners_of(pool, number, owners) != 1 || owners[0] != 3) {
        number++;
    }
    put_owned(pool, number);
    pool_set_origin(pool);
    pool_list(pool, 3, false);
    pool_publish(pool);
    atomic_store(&pool->peers[3].temper, FAILING);
    cr_assert_eq(fetch_one(pool, number), BKV_NOT_FOUND);
    atomic_store(&pool->peers[3].temper, GOOD); // it was only cut off from etcd
    cr_assert_eq(fetch_one(pool, number), BKV_OK);
    pool_free(pool);
}

// ---- all at once ----

typedef struct reader {
    pthread_t thread;
    pool_t *pool;
    uint64_t state;
    uint32_t found;
} reader_t;

static void *read_on(void *user) {
    reader_t *reader = user;
    for (uint32_t round = 0; round < 40; round++) {
        bkv_name_t names[16];
        bkv_status_t statuses[16];
        for (uint32_t i = 0; i < 16; i++) {
            reader->state = reader->state * 6364136223846793005u + 1442695040888963407u;
            names[i] = name_of((uint32_t)(reader->state >> 33) % BATCH);
        }
        uint64_t took_ms = fetch_ms(reader->pool, names, 16, 1000, statuses);
        cr_assert_lt(took_ms, 1000 + TIMEOUT_MS);
        for (uint32_t i = 0; i < 16; i++) {
            cr_assert(statuses[i] != BKV_NOT_FOUND && statuses[i] != BKV_INVALID_ARGUMENT, "%d", statuses[i]);
            reader->found += statuses[i] == BKV_OK;
            bkv_cluster_used(&reader->pool->cluster, &names[i]);
        }
    }
    return NULL;
}

// Names may repeat in a batch, copies come and go under other readers' hands, members change their tempers: every answer is
// right, or an error, and in the end nothing is held.
Test(fetch, many_readers_and_moody_members, .timeout = 120) {
    static const temper_t tempers[] = {GOOD, GOOD, SILENT, GOOD, DAMAGING, STALLING, GOOD, VANISHING, FAILING};
    pool_t *pool = pool_new(2, (uint64_t)4 << 20);
    for (uint32_t i = 0; i < BATCH; i++) {
        uint32_t owners[BKV_REPLICAS_MAX];
        owners_of(pool, i, owners);
        for (uint32_t o = 0; o < 2; o++) {
            if (owners[o] != SELF) {
                put_at(pool->peers[owners[o]].store, i);
            }
        }
    }
    set_all(pool, GOOD, 2000);
    reader_t readers[4] = {{0}};
    for (uint32_t i = 0; i < 4; i++) {
        readers[i] = (reader_t){.pool = pool, .state = i + 1};
        cr_assert_eq(pthread_create(&readers[i].thread, NULL, read_on, &readers[i]), 0);
    }
    for (uint32_t i = 0; i < 60; i++) { // one at a time
        atomic_store(&pool->peers[1 + i % 4].temper, tempers[i % 9]);
        nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
        atomic_store(&pool->peers[1 + i % 4].temper, GOOD);
    }
    for (uint32_t i = 0; i < 4; i++) {
        pthread_join(readers[i].thread, NULL);
        cr_assert_gt(readers[i].found, 200);
    }
    pool_free(pool);
}
