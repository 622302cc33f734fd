// test_mover.c - movers of a small world: whoever comes, goes, drains or is started again, what anybody has reaches its owners, and
// nothing is sent in vain.
#include "world.h"

#include "daemon/observe/clock.h"

static uint64_t sent(world_t *world) {
    uint64_t sum = 0;
    for (uint32_t i = 0; i < NODES; i++) {
        sum += world->nodes[i].up ? node_metrics(world, i).repair_sent_total : 0;
    }
    return sum;
}

// A pool of `count` nodes with `keys` records in it, in which nothing has moved yet.
static world_t *pool(uint64_t seed, uint32_t replicas, uint32_t count, uint32_t keys) {
    world_t *world = world_new(seed, replicas);
    world_begin(world, count);
    world_put(world, keys);
    return world;
}

static void add(world_t *world, uint32_t number, uint32_t weight) {
    node_start(world, number);
    world_tell(world, number);
    world_list(world, number, weight);
    world_tell_all(world);
}

static void lose(world_t *world, uint32_t number) {
    node_crash(world, number, false);
    world_unlist(world, number);
    world_tell_all(world);
}

// ---- one change ----

Test(mover, a_newcomer_gets_its_share_once) {
    world_t *world = pool(1, 2, 4, 600);
    add(world, 4, 3);
    world_settle(world);
    world_check(world, true);
    cr_assert_gt(world_share(world, 4), 100);
    cr_assert_eq(atomic_load(&world->stored), world_share(world, 4));
    cr_assert_eq(atomic_load(&world->in_vain), 0);
    cr_assert_eq(sent(world), world_share(world, 4));
    uint64_t kept = 0;
    for (uint32_t i = 0; i < 5; i++) { // whoever lost it to the newcomer has a copy
        kept += node_store(world, i).copies;
        cr_assert_eq(node_store(world, i).entries - node_store(world, i).copies, world_share(world, i));
    }
    cr_assert_eq(kept, world_share(world, 4));
    world_free(world);
}

Test(mover, what_a_crash_took_is_made_up_for) {
    world_t *world = pool(2, 2, 5, 600);
    uint32_t lost = world_share(world, 2);
    lose(world, 2);
    world_settle(world);
    world_check(world, true);
    cr_assert_eq(atomic_load(&world->stored), lost);
    cr_assert_eq(atomic_load(&world->in_vain), 0);
    world_free(world);
}

Test(mover, a_restart_with_its_memory_moves_nothing) {
    world_t *world = world_new(3, 2);
    world->delay_ms = 400;
    world_begin(world, 4);
    world_put(world, 300);
    world_unlist(world, 1); // it leaves in order
    world_tell_all(world);
    node_crash(world, 1, true);
    nap_ms(50);
    node_start(world, 1);
    world_tell(world, 1);
    world_list(world, 1, 3);
    world_tell_all(world);
    world_settle(world);
    world_check(world, true);
    cr_assert_eq(sent(world), 0);
    cr_assert_eq(atomic_load(&world->stores), 0);
    cr_assert_eq(node_store(world, 1).copies, 0);
    world_free(world);
}

Test(mover, it_waits_until_members_stay_as_they_are) {
    world_t *world = world_new(4, 2);
    world->delay_ms = 300;
    world_begin(world, 3);
    world_put(world, 100);
    uint64_t begin_ms = bkv_now_ms();
    lose(world, 0);
    cr_assert_eq(node_progress(world, 1).state, BKV_MOVER_WAITING);
    EVENTUALLY(atomic_load(&world->stores) > 0);
    cr_assert_geq(bkv_now_ms() - begin_ms, 300);
    world_settle(world);
    world_check(world, true);
    world_free(world);
}

// ---- drain ----

Test(mover, a_member_that_drains_hands_all_over) {
    world_t *world = world_new(5, 2);
    world->delay_ms = 60000; // it does not wait
    for (uint32_t i = 0; i < 4; i++) {
        node_start(world, i);
        world_list(world, i, 2);
    }
    for (uint32_t key = 0; key < 400; key++) {
        for (uint32_t i = 0; i < 4; i++) {
            if (world_owns(world, i, key)) {
                world_put_at(world, i, key);
            }
        }
    }
    uint32_t share = world_share(world, 3);
    atomic_store(&world->slow_us, 20000);
    world_drain(world, 3, true);
    world_tell_all(world);
    cr_assert(!node_progress(world, 3).handed_over);
    EVENTUALLY(node_progress(world, 3).state == BKV_MOVER_MOVING || node_progress(world, 3).handed_over);
    EVENTUALLY(node_progress(world, 3).handed_over);
    bkv_mover_progress_t progress = node_progress(world, 3);
    cr_assert_eq(progress.left_keys, 0);
    cr_assert_eq(progress.moved_keys, share);
    cr_assert_eq(progress.moved_bytes, (uint64_t)share * RECORD_BYTES);
    cr_assert_eq(node_store(world, 3).copies, share);
    world_check(world, true);
    world_free(world);
}

Test(mover, draining_can_be_taken_back) {
    world_t *world = pool(6, 2, 4, 300);
    world_drain(world, 3, true);
    world_tell_all(world);
    EVENTUALLY(node_progress(world, 3).handed_over);
    world_drain(world, 3, false);
    world_tell_all(world);
    world_settle(world);
    world_check(world, true);
    cr_assert(!node_progress(world, 3).handed_over);
    cr_assert_eq(node_store(world, 3).entries - node_store(world, 3).copies, world_share(world, 3), "copies are its own again");
    world_free(world);
}

Test(mover, who_has_nobody_to_give_to_has_not_handed_over) {
    world_t *world = pool(7, 2, 2, 50);
    world_drain(world, 0, true);
    world_drain(world, 1, true);
    world_tell_all(world);
    nap_ms(100);
    cr_assert(!node_progress(world, 0).handed_over);
    cr_assert_eq(node_progress(world, 0).left_keys, 50);
    add(world, 2, 1);
    EVENTUALLY(node_progress(world, 0).handed_over && node_progress(world, 1).handed_over);
    world_check(world, true);
    world_free(world);
}

Test(mover, two_drain_and_both_say_when_all_is_there) {
    world_t *world = pool(8, 2, 5, 400);
    atomic_store(&world->slow_us, 3000);
    world_drain(world, 0, true);
    world_drain(world, 1, true);
    world_tell_all(world);
    for (uint32_t first = 0, seen = 0; seen < 2;) {
        for (uint32_t i = 0; i < 2; i++) {
            if ((first >> i & 1) == 0 && node_progress(world, i).handed_over) {
                for (uint32_t key = 0; key < world->keys; key++) { // of what it has, every owner has it now
                    for (uint32_t to = 0; to < 5 && node_has(world, i, key); to++) {
                        cr_assert(!world_owns(world, to, key) || node_has(world, to, key), "node %u, key %u", to, key);
                    }
                }
                first |= 1u << i;
                seen++;
            }
        }
        nap_ms(1);
    }
    world_free(world);
}

// ---- trouble ----

Test(mover, failures_are_made_good) {
    for (uint64_t seed = 10; seed < 10 + ROUNDS(4); seed++) {
        world_t *world = pool(seed, 2, 4, 400);
        atomic_store(&world->failing, 40);
        lose(world, 1);
        add(world, 5, 2);
        nap_ms(150);
        atomic_store(&world->failing, 0);
        world_settle(world);
        world_check(world, true);
        uint64_t failed = 0;
        for (uint32_t i = 0; i < NODES; i++) {
            failed += world->nodes[i].up ? node_metrics(world, i).repair_failed_total : 0;
        }
        cr_assert_gt(failed, 0);
        world_free(world);
    }
}

Test(mover, a_member_that_cannot_be_reached_gets_its_blocks_later) {
    world_t *world = pool(20, 2, 4, 300);
    atomic_store(&world->deaf, 1u << 4);
    add(world, 4, 2);
    EVENTUALLY(node_metrics(world, 0).repair_failed_total > 2);
    cr_assert_eq(node_store(world, 4).entries, 0);
    cr_assert(node_progress(world, 0).state != BKV_MOVER_IDLE);
    atomic_store(&world->deaf, 0);
    world_settle(world);
    world_check(world, true);
    world_free(world);
}

Test(mover, what_nobody_takes_is_given_up_but_not_handed_over) {
    world_t *world = pool(21, 2, 3, 60);
    atomic_store(&world->refusing, 100);
    add(world, 3, 2);
    world_settle(world); // though nothing arrived
    cr_assert_eq(node_store(world, 3).entries, 0);
    cr_assert_gt(node_metrics(world, 0).repair_passes_total, 3);
    world_drain(world, 0, true);
    world_tell_all(world);
    uint64_t passes = node_metrics(world, 0).repair_passes_total;
    EVENTUALLY(node_metrics(world, 0).repair_passes_total > passes + 6);
    cr_assert(!node_progress(world, 0).handed_over);
    cr_assert_gt(node_progress(world, 0).left_keys, 0);
    atomic_store(&world->refusing, 0);
    EVENTUALLY(node_progress(world, 0).handed_over);
    for (uint32_t key = 0; key < world->keys; key++) { // of what it had
        for (uint32_t to = 0; to < 4 && node_has(world, 0, key); to++) {
            cr_assert(!world_owns(world, to, key) || node_has(world, to, key), "node %u, key %u", to, key);
        }
    }
    world_free(world);
}

Test(mover, records_may_leave_meanwhile) {
    world_t *world = pool(22, 2, 4, 600);
    atomic_store(&world->slow_us, 2000);
    lose(world, 3);
    for (uint32_t key = 0; key < world->keys; key += 3) { // memory pressure, everywhere
        bkv_name_t name = name_of(key);
        for (uint32_t i = 0; i < 3; i++) {
            bkv_store_drop(world->nodes[i].store, &name.spec_id, &name.key, bkv_now_ms());
        }
    }
    world_settle(world);
    world_check(world, false);
    for (uint32_t key = 1; key < world->keys; key += 3) {
        cr_assert(node_has(world, 0, key) || node_has(world, 1, key) || node_has(world, 2, key));
    }
    world_free(world);
}

Test(mover, cut_off_it_moves_nothing) {
    world_t *world = pool(23, 2, 3, 100);
    for (uint32_t i = 0; i < 3; i++) {
        atomic_store(&world->nodes[i].membership.state, BKV_MEMBERSHIP_CUT_OFF);
    }
    lose(world, 0);
    nap_ms(200);
    cr_assert_eq(atomic_load(&world->haves) + atomic_load(&world->stores), 0);
    for (uint32_t i = 1; i < 3; i++) {
        atomic_store(&world->nodes[i].membership.state, BKV_MEMBERSHIP_MEMBER);
    }
    world_settle(world);
    world_check(world, true);
    world_free(world);
}

Test(mover, it_stops_in_the_middle) {
    world_t *world = pool(24, 2, 3, 300);
    atomic_store(&world->silent, 1u << 3);
    add(world, 3, 4);
    EVENTUALLY(world->nodes[0].up && node_progress(world, 0).state == BKV_MOVER_MOVING);
    nap_ms(30);
    uint64_t begin_ms = bkv_now_ms();
    bkv_mover_stop(world->nodes[0].mover);
    cr_assert_lt(bkv_now_ms() - begin_ms, 4000, "it waited for a silent member");
    cr_assert_null(bkv_mover_origin(world->nodes[0].mover));
    bkv_name_t name = name_of(1);
    bkv_mover_again(world->nodes[0].mover, &name); // may still be told
    world_free(world);
}

// ---- bandwidth ----

Test(mover, it_keeps_to_its_bandwidth) {
    world_t *world = world_new(25, 1);
    world->rate = 1000 * RECORD_BYTES;
    world_begin(world, 1);
    world_put(world, 600);
    uint64_t begin_ms = bkv_now_ms();
    add(world, 1, 64);
    world_settle(world);
    uint64_t took_ms = bkv_now_ms() - begin_ms, count = node_metrics(world, 0).repair_sent_total;
    world_check(world, true);
    cr_assert_gt(count, 400);
    // A tenth of a second's worth goes at once, and the last call's records are owed.
    cr_assert_geq(took_ms, count - 100 - 256, "%lu records in %lu ms", (unsigned long)count, (unsigned long)took_ms);
    world_free(world);
}
