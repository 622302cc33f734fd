// test_place.c - Puts give their records to the owners: who has it in the end, what is said of it, and that many share a call.
#include "world.h"

#include "daemon/observe/clock.h"

#define SOON (bkv_now_ms() + 10000)

typedef struct placing {
    _Atomic uint32_t calls, replicas; // replicas: of the last one
} placing_t;

static void on_placed(void *user, uint32_t replicas) {
    placing_t *placing = user;
    atomic_store(&placing->replicas, replicas);
    atomic_fetch_add(&placing->calls, 1);
}

static void start(world_t *world, uint32_t node, uint32_t key, bool known, uint64_t deadline_ms, placing_t *placing) {
    bkv_name_t name = name_of(key);
    bkv_cluster_place(&world->nodes[node].cluster, &name, RECORD_BYTES, known, deadline_ms, on_placed, placing);
}

// Puts at a node and waits for what it says.
static uint32_t put(world_t *world, uint32_t node, uint32_t key, bool known) {
    placing_t placing = {.calls = 0};
    world_put_at(world, node, key);
    start(world, node, key, known, SOON, &placing);
    EVENTUALLY(atomic_load(&placing.calls) == 1);
    return atomic_load(&placing.replicas);
}

static uint64_t counted(world_t *world, uint32_t node, bool in_full) {
    const bkv_cluster_counters_t *counters = &world->nodes[node].cluster.counters;
    return atomic_load(in_full ? &counters->placed_total : &counters->placed_short_total);
}

Test(place, all_owners_have_it_when_it_is_done) {
    world_t *world = world_new(1, 2);
    world_begin(world, 4);
    for (uint32_t key = 0; key < 100; key++) {
        cr_assert_eq(put(world, 0, key, false), 2);
    }
    world_check(world, true);
    cr_assert_eq(node_store(world, 0).copies, 100 - world_share(world, 0), "what is not its own is a copy");
    cr_assert_eq(counted(world, 0, true), 100);
    cr_assert_eq(counted(world, 0, false), 0);
    cr_assert_eq(atomic_load(&world->haves), 0, "new records are not asked about");
    cr_assert(world_idle(world));
    world_free(world);
}

Test(place, alone_it_is_nobodys) {
    world_t *world = world_new(2, 2);
    world_begin(world, 1);
    cr_assert_eq(put(world, 0, 1, false), 0);
    cr_assert_eq(counted(world, 0, true) + counted(world, 0, false), 0);
    world_list(world, 1, 1); // a second one, and both drain
    world_drain(world, 0, true);
    world_drain(world, 1, true);
    world_tell_all(world);
    cr_assert_eq(put(world, 0, 2, false), 0);
    cr_assert_eq(node_store(world, 0).copies, 0);
    world_free(world);
}

Test(place, fewer_members_than_replicas_are_no_failure) {
    world_t *world = world_new(3, 3);
    world_begin(world, 2);
    cr_assert_eq(put(world, 0, 1, false), 2);
    cr_assert_eq(counted(world, 0, true), 1);
    world_free(world);
}

Test(place, what_an_owner_could_not_be_given_it_gets_later) {
    world_t *world = world_new(4, 2);
    world_begin(world, 4);
    atomic_store(&world->deaf, 1u << 1);
    uint32_t fewer = 0;
    for (uint32_t key = 0; key < 60; key++) {
        uint32_t replicas = put(world, 0, key, false);
        cr_assert_eq(replicas, world_owns(world, 1, key) ? 1 : 2);
        fewer += replicas < 2;
    }
    cr_assert_eq(counted(world, 0, false), fewer);
    cr_assert_eq(world_share(world, 1), fewer);
    atomic_store(&world->deaf, 0);
    world_settle(world);
    world_check(world, true);
    cr_assert_eq(node_store(world, 0).copies, 60 - world_share(world, 0));
    world_free(world);
}

Test(place, a_refusal_is_not_counted) {
    world_t *world = world_new(5, 2);
    world_begin(world, 3);
    atomic_store(&world->refusing, 100);
    cr_assert_eq(put(world, 0, 0, false), world_owns(world, 0, 0) ? 1 : 0);
    atomic_store(&world->refusing, 0);
    world_settle(world);
    world_check(world, true);
    world_free(world);
}

Test(place, what_was_here_is_asked_about_before_it_is_sent) {
    world_t *world = world_new(6, 2);
    world_begin(world, 4);
    world_put(world, 40); // at its owners
    uint64_t sent = atomic_load(&world->stored);
    for (uint32_t key = 0; key < 40; key++) {
        cr_assert_eq(put(world, 0, key, true), 2);
    }
    cr_assert_eq(atomic_load(&world->stored), sent);
    cr_assert_eq(atomic_load(&world->in_vain), 0);
    bkv_name_t name = name_of(7);
    for (uint32_t i = 1; i < 4; i++) {
        bkv_store_drop(world->nodes[i].store, &name.spec_id, &name.key, bkv_now_ms());
    }
    cr_assert_eq(put(world, 0, 7, true), 2, "it is sent where it is lacking");
    world_check(world, true);
    world_free(world);
}

Test(place, an_owner_that_had_a_copy_keeps_it) {
    world_t *world = world_new(7, 2);
    world_begin(world, 2); // both own everything
    cr_assert_eq(put(world, 0, 1, false), 2);
    bkv_name_t name = name_of(1);
    bkv_store_set_copy(world->nodes[0].store, &name, true, bkv_now_ms());
    cr_assert_eq(put(world, 0, 1, true), 2);
    cr_assert_eq(node_store(world, 0).copies, 0);
    world_free(world);
}

Test(place, a_record_that_has_left_is_not_owed) {
    world_t *world = world_new(8, 2);
    world_begin(world, 3);
    placing_t placing = {.calls = 0};
    start(world, 0, 5, false, SOON, &placing); // it never was here
    EVENTUALLY(atomic_load(&placing.calls) == 1);
    cr_assert_leq(atomic_load(&placing.replicas), 1);
    cr_assert_eq(counted(world, 0, false), 0);
    cr_assert(world_idle(world));
    world_free(world);
}

Test(place, many_at_once_share_calls) {
    world_t *world = world_new(9, 2);
    world_begin(world, 3);
    atomic_store(&world->slow_us, 20000);
    placing_t placing = {.calls = 0};
    for (uint32_t key = 0; key < 600; key++) {
        world_put_at(world, 0, key);
        start(world, 0, key, false, SOON, &placing);
    }
    EVENTUALLY(atomic_load(&placing.calls) == 600);
    world_check(world, true);
    cr_assert_lt(atomic_load(&world->stores), 60, "%lu calls", (unsigned long)atomic_load(&world->stores));
    cr_assert_eq(counted(world, 0, true), 600);
    world_free(world);
}

Test(place, a_near_deadline_waits_for_no_other_call) {
    world_t *world = world_new(10, 2);
    world_begin(world, 3);
    atomic_store(&world->silent, 1u << 1 | 1u << 2);
    placing_t slow = {.calls = 0}, quick = {.calls = 0};
    for (uint32_t key = 0; key < 50; key++) {
        world_put_at(world, 0, key);
        start(world, 0, key, false, bkv_now_ms() + 5000, &slow);
    }
    uint64_t begin_ms = bkv_now_ms();
    start(world, 0, 1, false, begin_ms + 100, &quick);
    EVENTUALLY(atomic_load(&quick.calls) == 1);
    cr_assert_lt(bkv_now_ms() - begin_ms, 3000);
    EVENTUALLY(atomic_load(&slow.calls) == 50);
    cr_assert_lt(bkv_now_ms() - begin_ms, 15000);
    atomic_store(&world->silent, 0);
    world_settle(world);
    world_check(world, true);
    world_free(world);
}

// From several threads, while owners fail and come back.
static void *putter(void *user) {
    world_t *world = user;
    placing_t placing = {.calls = 0};
    for (uint32_t i = 0; i < 150; i++) {
        uint32_t key = world_dice(world, 500);
        start(world, 0, key, world_dice(world, 2) == 0, bkv_now_ms() + 50 + world_dice(world, 2000), &placing);
    }
    EVENTUALLY(atomic_load(&placing.calls) == 150);
    return NULL;
}

Test(place, trouble_in_the_middle_of_many) {
    for (uint64_t seed = 20; seed < 20 + ROUNDS(4); seed++) {
        world_t *world = world_new(seed, 3);
        world_begin(world, 5);
        for (uint32_t key = 0; key < 500; key++) {
            world_put_at(world, 0, key);
        }
        atomic_store(&world->slow_us, 3000);
        atomic_store(&world->failing, 30);
        pthread_t threads[3];
        for (uint32_t i = 0; i < 3; i++) {
            pthread_create(&threads[i], NULL, putter, world);
        }
        nap_ms(10);
        atomic_store(&world->deaf, 1u << 2);
        nap_ms(20);
        atomic_store(&world->deaf, 0);
        for (uint32_t i = 0; i < 3; i++) {
            pthread_join(threads[i], NULL);
        }
        atomic_store(&world->failing, 0);
        world_settle(world);
        cr_assert_eq(counted(world, 0, true) + counted(world, 0, false), 450);
        for (uint32_t key = 0; key < 500; key++) {
            bool any = false, all = true;
            for (uint32_t i = 1; i < 5; i++) {
                any = any || node_has(world, i, key);
                all = all && (!world_owns(world, i, key) || node_has(world, i, key));
            }
            cr_assert(!any || all, "record %u is not with all its owners", key);
        }
        world_free(world);
    }
}
