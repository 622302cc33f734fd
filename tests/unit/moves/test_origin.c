// test_origin.c - what the mover remembers of members that were: what readers should ask, and what plans start from, also when a
// sender has crashed that everybody had relied on.
#include "world.h"

#include "daemon/observe/clock.h"

static void add(world_t *world, uint32_t number, uint32_t weight) {
    node_start(world, number);
    world_tell(world, number);
    world_list(world, number, weight);
    world_tell_all(world);
}

// How many members the origin of a node's mover has; 0: there is none.
static uint32_t origin_count(world_t *world, uint32_t number) {
    const bkv_view_t *origin = bkv_mover_origin(world->nodes[number].mover);
    uint32_t count = origin != NULL ? origin->count : 0;
    if (origin != NULL) {
        bkv_view_give(origin);
    }
    return count;
}

Test(origin, it_is_there_until_everybody_is_done) {
    world_t *world = world_new(1, 1);
    world_begin(world, 3);
    world_put(world, 300);
    cr_assert_eq(origin_count(world, 0), 0);
    atomic_store(&world->deaf, 1u << 3); // whom nobody can give anything
    add(world, 3, 2);
    cr_assert_eq(origin_count(world, 0), 3, "at once, before anything moves");
    cr_assert_eq(origin_count(world, 3), 3, "the newcomer knows what was before it");
    nap_ms(150);
    for (uint32_t i = 0; i < 4; i++) {
        cr_assert_eq(origin_count(world, i), 3, "node %u", i);
    }
    atomic_store(&world->deaf, 0);
    world_settle(world);
    for (uint32_t i = 0; i < 4; i++) {
        cr_assert_eq(origin_count(world, i), 0);
    }
    world_free(world);
}

// One who has nothing to send is done with his own pass long before the others.
Test(origin, who_is_done_waits_for_the_others) {
    world_t *world = world_new(2, 2);
    world->delay_ms = 200;
    world_begin(world, 3);
    world_put(world, 200);
    world->delay_ms = 1;
    add(world, 3, 2); // empty, and through in no time
    EVENTUALLY(node_metrics(world, 3).repair_passes_total == 1 && node_progress(world, 3).settled != 0);
    cr_assert_eq(origin_count(world, 3), 3);
    world_settle(world);
    cr_assert_eq(origin_count(world, 3), 0);
    cr_assert_eq(node_progress(world, 3).settled, node_progress(world, 0).settled);
    world_free(world);
}

// Node 3 comes; who loses keys to it is to send them, and the other holders of these keys are done before. Then the sender
// crashes: these others must know that what he had to send may not have arrived.
Test(origin, a_sender_that_crashes_half_way_is_made_up_for) {
    for (uint32_t victim = 0; victim < 3; victim++) {
        world_t *world = world_new(30 + victim, 2);
        world_begin(world, 3);
        world_put(world, 300);
        atomic_store(&world->nodes[victim].membership.state, BKV_MEMBERSHIP_CUT_OFF); // it sends nothing
        add(world, 3, 3);
        for (uint32_t i = 0; i < 4; i++) {
            EVENTUALLY(i == victim || node_progress(world, i).settled != 0);
        }
        node_crash(world, victim, false);
        world_unlist(world, victim);
        world_tell_all(world);
        world_settle(world);
        world_check(world, true);
        world_free(world);
    }
}

Test(origin, what_puts_owe_is_brought_without_a_pass) {
    world_t *world = world_new(4, 2);
    world_begin(world, 4);
    uint64_t passes = 0;
    for (uint32_t i = 0; i < 4; i++) {
        passes += node_metrics(world, i).repair_passes_total;
    }
    atomic_store(&world->deaf, 1u << 1 | 1u << 2);
    for (uint32_t key = 0; key < 40; key++) {
        bkv_name_t name = name_of(key);
        world_put_at(world, 0, key);
        bkv_mover_again(world->nodes[0].mover, &name);
    }
    EVENTUALLY(node_metrics(world, 0).repair_failed_total > 3);
    cr_assert_eq(node_progress(world, 0).left_keys > 0, true);
    atomic_store(&world->deaf, 0);
    world_settle(world);
    world_check(world, true);
    cr_assert_eq(atomic_load(&world->in_vain), 0);
    for (uint32_t key = 0; key < 40; key++) {
        cr_assert(node_has(world, 0, key));
    }
    cr_assert_eq(node_store(world, 0).copies, 40 - world_share(world, 0));
    for (uint32_t i = 0; i < 4; i++) {
        passes -= node_metrics(world, i).repair_passes_total;
    }
    cr_assert_eq(passes, 0);
    world_free(world);
}

// Too many names: then all of the store is offered.
Test(origin, so_much_may_be_owed_that_names_are_forgotten) {
    world_t *world = world_new(5, 2);
    world_begin(world, 2);
    atomic_store(&world->nodes[0].membership.state, BKV_MEMBERSHIP_CUT_OFF); // so that no name is taken off too early
    world_put_at(world, 0, 0);
    for (uint32_t i = 0; i < 70000; i++) {
        bkv_name_t name = name_of(1000000 + i); // not there
        bkv_mover_again(world->nodes[0].mover, &name);
    }
    atomic_store(&world->nodes[0].membership.state, BKV_MEMBERSHIP_MEMBER);
    world_settle(world);
    world_check(world, true);
    world_free(world);
}

// Nodes come and go in any order, with and without their memory; and sometimes nothing works.
static void some_change(world_t *world, bool *careful) {
    uint32_t number = world_dice(world, NODES), up = 0;
    for (uint32_t i = 0; i < NODES; i++) {
        up += world->nodes[i].up;
    }
    bool is_up = world->nodes[number].up;
    switch (world_dice(world, 8)) {
    case 0:
    case 1:
    case 2:
        if (!is_up) {
            add(world, number, 1 + world_dice(world, 5));
        }
        break;
    case 3:
        if (is_up && up > 3 && *careful) {
            *careful = false; // one crash in all: two replicas are not good for more
            node_crash(world, number, world_dice(world, 2) == 0);
            world_unlist(world, number);
        }
        break;
    case 4:
    case 5:
        world_drain(world, number, !world->members[number].place.draining && up > 3);
        break;
    case 6:
        atomic_store(&world->failing, world_dice(world, 50));
        break;
    default:
        world_put(world, 20);
        break;
    }
    if (world_dice(world, 3) != 0) { // else they learn of it with the next change
        world_tell_all(world);
    }
}

static void calm(world_t *world) {
    atomic_store(&world->failing, 0);
    for (uint32_t i = 0; i < NODES; i++) {
        world_drain(world, i, false);
    }
    world_tell_all(world);
    world_settle(world);
}

Test(origin, whatever_happens_what_is_left_reaches_its_owners, .timeout = 240) {
    for (uint64_t seed = 100; seed < 100 + ROUNDS(12); seed++) {
        world_t *world = world_new(seed, 2 + seed % 2);
        world_begin(world, 4);
        world_put(world, 200);
        atomic_store(&world->slow_us, 2000);
        bool careful = true;
        for (uint32_t change = 0; change < 24; change++) {
            some_change(world, &careful);
            nap_ms(world_dice(world, 30));
        }
        calm(world);
        world_check(world, true);
        world_free(world);
    }
}
