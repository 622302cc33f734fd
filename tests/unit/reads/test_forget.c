// test_forget.c - records that are dropped everywhere.
#include "pool.h"

#include "daemon/observe/clock.h"

#include <criterion/criterion.h>

#define ARENA ((uint64_t)32 << 20)

static uint64_t forget_ms(pool_t *pool, const bkv_name_t *names, uint32_t count, uint32_t timeout_ms, bool *had) {
    waiter_t waiter;
    waiter_init(&waiter);
    uint64_t start_ms = bkv_now_ms();
    bkv_cluster_forget(&pool->cluster, names, count, timeout_ms != 0 ? start_ms + timeout_ms : NO_END, had, waiter_done,
                       &waiter);
    waiter_wait(&waiter);
    return bkv_now_ms() - start_ms;
}

static bool is_anywhere(pool_t *pool, uint32_t number) {
    bool there = has(pool->store, number);
    for (uint32_t i = 1; i < MEMBERS; i++) {
        there |= has(pool->peers[i].store, number);
    }
    return there;
}

Test(forget, everywhere_also_copies, .timeout = 60) {
    pool_t *pool = pool_new(2, ARENA);
    uint32_t copied = number_owned_by(pool, 1, 2, 0);
    bkv_name_t names[20];
    bool had[20];
    names_of(copied, 20, names);
    for (uint32_t i = 0; i < 10; i++) {
        put_owned(pool, copied + i);
    }
    put_at(pool->peers[4].store, copied); // by no rule of placement's
    put_at(pool->store, copied);
    put_owned(pool, copied + 100);
    forget_ms(pool, names, 20, 20000, had);
    for (uint32_t i = 0; i < 20; i++) {
        cr_assert_eq(had[i], i < 10);
        cr_assert(!is_anywhere(pool, copied + i));
    }
    cr_assert(is_anywhere(pool, copied + 100));
    forget_ms(pool, names, 20, 20000, had);
    cr_assert(!had[0]);
    forget_ms(pool, names, 0, 20000, had);
    pool_free(pool);
}

Test(forget, here_when_there_is_nobody_else, .timeout = 60) {
    pool_t *pool = pool_new(2, ARENA);
    for (uint32_t i = 1; i < MEMBERS; i++) {
        pool_list(pool, i, false);
    }
    pool_publish(pool);
    bkv_name_t name = name_of(7);
    bool had;
    put_at(pool->store, 7);
    forget_ms(pool, &name, 1, 0, &had);
    cr_assert(had && !has(pool->store, 7));
    pool_free(pool);
}

// What others have said counts all the same.
Test(forget, does_not_wait_long_for_one_that_is_silent, .timeout = 60) {
    pool_t *pool = pool_new(2, ARENA);
    uint32_t number = number_owned_by(pool, 1, 2, 0);
    bkv_name_t name = name_of(number);
    bool had;
    put_owned(pool, number);
    atomic_store(&pool->peers[1].temper, SILENT);
    atomic_store(&pool->peers[3].temper, FAILING);
    atomic_store(&pool->peers[4].temper, REFUSING);
    uint64_t took_ms = forget_ms(pool, &name, 1, 300, &had);
    cr_assert(had && took_ms >= 290 && took_ms < TIMEOUT_MS, "%llu ms", (unsigned long long)took_ms);
    cr_assert_lt(forget_ms(pool, &name, 1, 0, &had), 2 * TIMEOUT_MS);
    cr_assert(has(pool->peers[1].store, number) && !has(pool->peers[2].store, number) && !had);
    pool_free(pool);
}
