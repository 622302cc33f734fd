// test_lookup.c - which records are anywhere, and who has them.
#include "pool.h"

#include "daemon/observe/clock.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

#define ARENA ((uint64_t)32 << 20)
#define BATCH 200

static uint64_t lookup_ms(pool_t *pool, const bkv_name_t *names, uint32_t count, uint32_t timeout_ms, bool *have) {
    waiter_t waiter;
    waiter_init(&waiter);
    uint64_t start_ms = bkv_now_ms();
    bkv_cluster_lookup(&pool->cluster, names, count, timeout_ms != 0 ? start_ms + timeout_ms : NO_END, have, waiter_done,
                       &waiter);
    waiter_wait(&waiter);
    return bkv_now_ms() - start_ms;
}

static uint32_t haves(pool_t *pool) {
    uint32_t sum = 0;
    for (uint32_t i = 1; i < MEMBERS; i++) {
        sum += atomic_load(&pool->peers[i].haves);
    }
    return sum;
}

Test(lookup, asks_each_owner_once, .timeout = 60) {
    pool_t *pool = pool_new(2, ARENA);
    bkv_name_t names[BATCH];
    bool have[BATCH] = {false};
    names_of(0, BATCH, names);
    for (uint32_t i = 0; i < BATCH; i += 2) {
        put_owned(pool, i);
    }
    for (uint32_t i = 0; i < BATCH; i++) {
        have[i] = has(pool->store, i);
    }
    lookup_ms(pool, names, BATCH, 5000, have);
    for (uint32_t i = 0; i < BATCH; i++) {
        cr_assert_eq(have[i], i % 2 == 0, "record %u", i);
    }
    cr_assert_eq(haves(pool), MEMBERS - 1);
    cr_assert_eq(pinned(pool), 0);
    pool_free(pool);
}

Test(lookup, asks_nobody_about_what_is_here, .timeout = 60) {
    pool_t *pool = pool_new(2, ARENA);
    bkv_name_t names[3];
    bool have[3] = {true, true, true};
    names_of(0, 3, names);
    lookup_ms(pool, names, 3, 0, have);
    lookup_ms(pool, names, 0, 0, have);
    cr_assert(have[0] && have[1] && have[2] && haves(pool) == 0);
    pool_free(pool);
}

Test(lookup, one_owner_that_has_it_is_enough, .timeout = 60) {
    pool_t *pool = pool_new(2, ARENA);
    uint32_t number = number_owned_by(pool, 1, 2, 0);
    bkv_name_t name = name_of(number);
    bool have = false;
    put_at(pool->peers[2].store, number);
    atomic_store(&pool->peers[1].temper, SILENT);
    atomic_store(&pool->peers[1].patience_us, (TIMEOUT_MS - 100) * 1000);
    cr_assert_lt(lookup_ms(pool, &name, 1, 20000, &have), TIMEOUT_MS / 2);
    cr_assert(have);
    pool_free(pool);
}

// The one that is silent delays nobody for longer than it usually takes, once somebody else has denied.
Test(lookup, does_not_wait_long_for_one_that_stands_still, .timeout = 60) {
    pool_t *pool = pool_new(2, ARENA);
    uint32_t number = number_owned_by(pool, 1, 2, 0);
    bkv_name_t name = name_of(number);
    bool have = false;
    atomic_store(&pool->peers[1].temper, SILENT);
    atomic_store(&pool->peers[1].patience_us, 200000);
    atomic_store(&pool->peers[2].delay_us, 20000);
    uint64_t took_ms = lookup_ms(pool, &name, 1, 20000, &have);
    cr_assert(!have && took_ms >= 195 && took_ms < TIMEOUT_MS / 2, "%llu ms", (unsigned long long)took_ms);
    pool_free(pool);
}

// Here this daemon is the other owner, and has it not.
Test(lookup, its_own_denial_counts, .timeout = 60) {
    pool_t *pool = pool_new(2, ARENA);
    uint32_t number = number_owned_by(pool, SELF, 2, 0);
    bkv_name_t name = name_of(number);
    bool have = false;
    atomic_store(&pool->peers[2].temper, SILENT);
    atomic_store(&pool->peers[2].patience_us, 50000);
    cr_assert_lt(lookup_ms(pool, &name, 1, 20000, &have), TIMEOUT_MS / 2);
    cr_assert(!have);
    put_at(pool->peers[2].store, number);
    atomic_store(&pool->peers[2].temper, GOOD);
    lookup_ms(pool, &name, 1, 20000, &have);
    cr_assert(have);
    pool_free(pool);
}

// But as long as nobody has denied, there is hope.
Test(lookup, waits_for_the_only_one_that_may_have_it, .timeout = 60) {
    pool_t *pool = pool_new(2, ARENA);
    uint32_t number = number_owned_by(pool, 1, 2, 0);
    bkv_name_t name = name_of(number);
    bool have = false;
    put_owned(pool, number);
    atomic_store(&pool->peers[1].temper, FAILING);
    atomic_store(&pool->peers[2].delay_us, 300000);
    atomic_store(&pool->peers[2].patience_us, 1000);
    lookup_ms(pool, &name, 1, 20000, &have);
    cr_assert(have);
    pool_free(pool);
}

Test(lookup, ends_with_the_deadline_or_the_timeout, .timeout = 60) {
    pool_t *pool = pool_new(2, ARENA);
    bkv_name_t names[BATCH];
    bool have[BATCH] = {false};
    names_of(0, BATCH, names);
    for (uint32_t i = 1; i < MEMBERS; i++) {
        atomic_store(&pool->peers[i].temper, SILENT);
    }
    uint64_t took_ms = lookup_ms(pool, names, BATCH, 200, have);
    cr_assert(took_ms >= 190 && took_ms < TIMEOUT_MS / 2, "%llu ms", (unsigned long long)took_ms);
    took_ms = lookup_ms(pool, names, BATCH, 0, have);
    cr_assert(took_ms >= TIMEOUT_MS - 100 && took_ms < 2 * TIMEOUT_MS, "%llu ms", (unsigned long long)took_ms);
    for (uint32_t i = 0; i < BATCH; i++) {
        cr_assert(!have[i]);
    }
    for (uint32_t i = 1; i < MEMBERS; i++) {
        atomic_store(&pool->peers[i].temper, REFUSING);
    }
    cr_assert_lt(lookup_ms(pool, names, BATCH, 0, have), TIMEOUT_MS / 2);
    pool_free(pool);
}

Test(lookup, asks_those_that_repair_starts_from, .timeout = 60) {
    pool_t *pool = pool_new(1, ARENA);
    uint32_t number = 0, owners[BKV_REPLICAS_MAX];
    while (owners_of(pool, number, owners) != 1 || owners[0] != 3) {
        number++;
    }
    bkv_name_t name = name_of(number);
    bool have = false;
    put_owned(pool, number);
    pool_set_origin(pool);
    pool_list(pool, 3, false);
    pool_publish(pool);
    owners_of(pool, number, owners);
    lookup_ms(pool, &name, 1, 20000, &have);
    cr_assert(have, "it was asked of m%u only", owners[0]);
    pool_free(pool);
}

// ---- Where ----

static void where(pool_t *pool, const bkv_name_t *names, uint32_t count, bool ask, bkv_whereabouts_t *out) {
    waiter_t waiter;
    waiter_init(&waiter);
    bkv_cluster_where(&pool->cluster, names, count, ask, bkv_now_ms() + 20000, out, waiter_done, &waiter);
    waiter_wait(&waiter);
}

static bool is_among(const char (*ids)[BKV_MEMBER_NAME_MAX], uint32_t count, const char *id) {
    for (uint32_t i = 0; i < count; i++) {
        if (strcmp(ids[i], id) == 0) {
            return true;
        }
    }
    return false;
}

Test(where, says_who_owns_and_who_holds, .timeout = 60) {
    pool_t *pool = pool_new(2, ARENA);
    uint32_t number = number_owned_by(pool, 1, 2, 0), own = number_owned_by(pool, SELF, 3, 0);
    bkv_name_t names[2] = {name_of(number), name_of(own)};
    bkv_whereabouts_t out[2];
    where(pool, names, 2, false, out);
    cr_assert(out[0].owner_count == 2 && is_among(out[0].owners, 2, "m1") && is_among(out[0].owners, 2, "m2"));
    cr_assert(out[1].owner_count == 2 && is_among(out[1].owners, 2, "m0") && is_among(out[1].owners, 2, "m3"));
    cr_assert(out[0].holder_count == 0 && out[0].bytes == 0 && haves(pool) == 0);
    put_at(pool->store, number); // as a copy may be
    put_at(pool->peers[2].store, number);
    where(pool, names, 2, true, out);
    cr_assert(out[0].holder_count == 2 && is_among(out[0].holders, 2, "m0") && is_among(out[0].holders, 2, "m2"));
    cr_assert(out[0].bytes == length_of(number) && out[1].holder_count == 0 && out[1].bytes == 0);
    pool_free(pool);
}
