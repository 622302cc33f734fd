// test_repair.c - plans of all members at once, executed on a model of who holds what: nothing is lost that somebody has,
// nothing moves twice, and in the end every owner has its keys.
#include "members.h"

#include "daemon/cluster/move/repair.h"
#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

#define KEYS  3000
#define NODES 64

// Who holds what, by the number in the name; a node that crashes loses all.
typedef struct world {
    bool holds[NODES][KEYS];
    uint32_t arrivals[NODES][KEYS]; // in this pass
    uint64_t state;
    uint32_t failing; // of 100 transfers
} world_t;

static uint32_t node_of(const bkv_placement_t *placement, uint32_t member) {
    return (uint32_t)atoi(bkv_placement_member(placement, member)->id + strlen("node-")) % NODES;
}

static bool owns(const bkv_placement_t *placement, uint32_t node, uint32_t number) {
    uint16_t owners[BKV_REPLICAS_MAX];
    bkv_key_t key = key_number(number);
    uint32_t count = bkv_placement_owners(placement, &key, owners);
    bool found = false;
    for (uint32_t i = 0; i < count; i++) {
        found = found || node_of(placement, owners[i]) == node;
    }
    return found;
}

static void put_all(world_t *world, const bkv_placement_t *placement, uint32_t from, uint32_t to) {
    for (uint32_t number = from; number < to; number++) {
        for (uint32_t member = 0; member < bkv_placement_count(placement); member++) {
            uint32_t node = node_of(placement, member);
            world->holds[node][number] = world->holds[node][number] || owns(placement, node, number);
        }
    }
}

// A node's store, as the repair sees it. Pieces are small and uneven, as a real store's.
typedef struct shelf {
    const world_t *world;
    uint32_t node;
} shelf_t;

static size_t shelf_list(void *store, uint64_t *cursor, bkv_repair_item_t *items, size_t capacity) {
    const shelf_t *shelf = store;
    size_t count = 0;
    for (; *cursor < KEYS && count < capacity && count < 1 + *cursor % 37; ++*cursor) {
        if (shelf->world->holds[shelf->node][*cursor]) {
            items[count++] = (bkv_repair_item_t){.key = key_number(*cursor), .bytes = 1000, .spec_id = {{1}}};
            memcpy(items[count - 1].spec_id.bytes + 8, cursor, 8); // so that the test knows its number
        }
    }
    return count;
}

static uint32_t number_of(const bkv_repair_item_t *item) {
    uint64_t number;
    memcpy(&number, item->spec_id.bytes + 8, 8);
    return (uint32_t)number;
}

// Executes a send as the contract says: ask, send what is lacking, forget once all have it.
static void execute(world_t *world, const bkv_placement_t *now, uint32_t node, const bkv_repair_send_t *send,
                    bkv_repair_t *repair) {
    uint32_t number = number_of(&send->item);
    bool all = true;
    cr_assert(send->step.count > 0);
    for (uint32_t i = 0; i < send->step.count; i++) {
        uint32_t target = node_of(now, send->step.targets[i]);
        cr_assert(owns(now, target, number) && target != node);
        if (world->holds[target][number]) {
            continue;
        }
        if (random_next(&world->state) % 100 < world->failing) {
            bkv_repair_failed(repair);
            all = false;
        } else {
            world->holds[target][number] = true;
            world->arrivals[target][number]++;
        }
    }
    if (send->step.forget && all) {
        cr_assert(!owns(now, node, number));
        world->holds[node][number] = false;
    }
}

// A pass of every member, as one after the other; with `half`, given up in the middle.
static bool pass(world_t *world, const bkv_placement_t *was, const bkv_placement_t *now, bool half) {
    bool clean = true;
    memset(world->arrivals, 0, sizeof(world->arrivals));
    for (uint32_t member = 0; member < bkv_placement_count(now); member++) {
        bkv_repair_t *repair = NULL;
        shelf_t shelf = {.world = world, .node = node_of(now, member)};
        cr_assert_eq(bkv_repair_create(was, now, bkv_placement_member(now, member)->id, shelf_list, &shelf, &repair, NULL),
                     BKV_OK);
        bool more = true;
        for (uint32_t calls = 0; more && !(half && calls > 20 + member); calls++) {
            bkv_repair_send_t sends[8];
            size_t count = bkv_repair_next(repair, sends, 8, 50, &more);
            for (size_t i = 0; i < count; i++) {
                execute(world, now, shelf.node, &sends[i], repair);
            }
        }
        clean = clean && bkv_repair_done(repair);
        bkv_repair_destroy(repair);
    }
    return clean;
}

static bool anybody_has(const world_t *world, uint32_t number) {
    bool found = false;
    for (uint32_t node = 0; node < NODES; node++) {
        found = found || world->holds[node][number];
    }
    return found;
}

static void check_settled(const world_t *world, const bkv_placement_t *now) {
    for (uint32_t number = 0; number < KEYS; number++) {
        bool there = anybody_has(world, number);
        for (uint32_t member = 0; member < bkv_placement_count(now); member++) {
            uint32_t node = node_of(now, member);
            if (there && owns(now, node, number)) {
                cr_assert(world->holds[node][number], "node %u lacks %u", node, number);
            }
        }
    }
}

static world_t *world_new(uint64_t seed) {
    world_t *world = calloc(1, sizeof(*world));
    cr_assert_not_null(world);
    world->state = seed;
    return world;
}

static void members_make(members_t *members, uint32_t count, uint32_t domains) {
    for (uint32_t i = 0; i < count; i++) {
        members_add(members, 2 + i % 3, i, domains);
    }
}

static void crash(world_t *world, members_t *members, uint32_t index) {
    memset(world->holds[(uint32_t)atoi(members->at[index].id + strlen("node-")) % NODES], 0, KEYS);
    members_remove(members, index);
}

// Every change from a settled state: what arrives is what was lacking, once.
static void check_one_change(world_t *world, const bkv_placement_t *was, const bkv_placement_t *now) {
    static bool lacked[NODES][KEYS];
    for (uint32_t member = 0; member < bkv_placement_count(now); member++) {
        uint32_t node = node_of(now, member);
        for (uint32_t number = 0; number < KEYS; number++) {
            lacked[node][number] = owns(now, node, number) && !world->holds[node][number] && anybody_has(world, number);
        }
    }
    cr_assert(pass(world, was, now, false));
    for (uint32_t member = 0; member < bkv_placement_count(now); member++) {
        uint32_t node = node_of(now, member);
        for (uint32_t number = 0; number < KEYS; number++) {
            cr_assert_eq(world->arrivals[node][number], lacked[node][number], "node %u, key %u", node, number);
        }
    }
    check_settled(world, now);
}

Test(repair, every_change_moves_what_is_lacking_once) {
    for (uint32_t domains = 0; domains <= 4; domains += 2) {
        world_t *world = world_new(1);
        members_t members = {0};
        members_make(&members, 12, domains);
        bkv_placement_t *was = place(&members, 2, false, NULL);
        put_all(world, was, 0, KEYS);
        for (int change = 0; change < 4; change++) {
            switch (change) {
            case 0:
                members_add(&members, 3, 1, domains);
                break;
            case 1:
                members.at[5].draining = true;
                break;
            case 2:
                crash(world, &members, 2);
                break;
            default:
                members.at[7].weight += 4;
                members.at[3].weight -= 1;
                break;
            }
            bkv_placement_t *now = place(&members, 2, false, was);
            check_one_change(world, was, now);
            bkv_placement_destroy(was);
            was = now;
        }
        bkv_placement_destroy(was);
        free(world);
    }
}

Test(repair, a_drained_member_holds_nothing_in_the_end) {
    world_t *world = world_new(2);
    members_t members = {0};
    members_make(&members, 6, 0);
    bkv_placement_t *was = place(&members, 2, false, NULL);
    put_all(world, was, 0, KEYS);
    members.at[1].draining = members.at[4].draining = true; // two at once: some keys are on both
    bkv_placement_t *now = place(&members, 2, false, was);
    check_one_change(world, was, now);
    // A key that both held has had one of them send it to each of two targets; what is left is found there by the next pass.
    for (int passes = 0; passes < 2; passes++) {
        cr_assert(pass(world, now, now, false));
    }
    for (uint32_t number = 0; number < KEYS; number++) {
        cr_assert(!world->holds[node_of(now, 1)][number] && !world->holds[node_of(now, 4)][number]);
    }
    bkv_placement_destroy(was);
    bkv_placement_destroy(now);
    free(world);
}

// The members change again and again while repairs are under way and transfers fail; blocks are put all the while.
Test(repair, changes_in_the_middle_lose_nothing) {
    for (uint64_t seed = 1; seed <= 6; seed++) {
        world_t *world = world_new(seed);
        members_t members = {0};
        members_make(&members, 10, seed % 2 == 0 ? 4 : 0);
        bkv_placement_t *was = place(&members, 2, false, NULL), *now = NULL;
        put_all(world, was, 0, KEYS / 2);
        for (uint32_t round = 0; round < 4; round++) {
            bkv_placement_destroy(now);
            if (round % 2 == 0) {
                members_add(&members, 3, round, seed % 2 == 0 ? 4 : 0);
            } else {
                members.at[random_next(&world->state) % members.count].draining ^= true;
            }
            now = place(&members, 2, false, was);
            put_all(world, now, KEYS / 2 + round * 200, KEYS / 2 + (round + 1) * 200);
            world->failing = 30;
            pass(world, was, now, true);
        }
        while (!pass(world, was, now, false)) {
            world->failing /= 2;
        }
        check_settled(world, now);
        for (uint32_t number = 0; number < KEYS / 2 + 800; number++) {
            cr_assert(anybody_has(world, number), "key %u is lost", number);
        }
        bkv_placement_destroy(was);
        bkv_placement_destroy(now);
        free(world);
    }
}

// A member that came back under a new epoch counts as empty for the others, and offers what it still has.
Test(repair, a_restarted_member_is_filled_and_keeps_what_only_it_had) {
    world_t *world = world_new(3);
    members_t members = {0};
    members_make(&members, 5, 0);
    bkv_placement_t *was = place(&members, 2, false, NULL);
    put_all(world, was, 0, KEYS);
    uint32_t node = node_of(was, 2);
    for (uint32_t number = 0; number < KEYS; number++) {
        if (number % 3 == 0) {
            world->holds[node][number] = false; // lost by it
        } else if (number % 3 == 1 && world->holds[node][number]) {
            for (uint32_t other = 0; other < NODES; other++) {
                world->holds[other][number] = other == node; // lost by all others
            }
        }
    }
    members.at[2].epoch = 2;
    bkv_placement_t *now = place(&members, 2, false, was);
    cr_assert(pass(world, was, now, false));
    check_settled(world, now);
    bkv_placement_destroy(was);
    bkv_placement_destroy(now);
    free(world);
}

// How even the sending is after a crash, and that a drain is the drained member's alone.
Test(repair, senders) {
    uint32_t sends[16] = {0}, sum = 0;
    members_t members = {0};
    members_make(&members, 9, 0);
    bkv_placement_t *was = place(&members, 3, false, NULL);
    char gone[BKV_MEMBER_NAME_MAX];
    memcpy(gone, members.at[4].id, sizeof(gone));
    members_t drained = members;
    drained.at[4].draining = true;
    members_remove(&members, 4);
    bkv_placement_t *crashed = place(&members, 3, false, was), *draining = place(&drained, 3, false, was);
    bkv_succession_t crash_of, drain_of;
    cr_assert(bkv_succession_init(&crash_of, was, crashed, NULL) == BKV_OK &&
              bkv_succession_init(&drain_of, was, draining, NULL) == BKV_OK);
    for (uint32_t number = 0; number < 100000; number++) {
        bkv_key_t key = key_number(number);
        bkv_repair_step_t step;
        uint32_t senders = 0;
        for (uint16_t self = 0; self < 9; self++) {
            uint16_t owners[BKV_REPLICAS_MAX];
            uint32_t count = bkv_placement_owners(was, &key, owners);
            bool holder = false;
            for (uint32_t i = 0; i < count; i++) {
                holder = holder || owners[i] == self;
            }
            if (holder) {
                bkv_repair_plan(&drain_of, self, &key, &step);
                cr_assert_eq(step.count, self == 4, "only the one that drains sends");
                cr_assert_eq(step.forget, self == 4);
            }
            if (holder && self != 4) {
                bkv_repair_plan(&crash_of, crash_of.heir[self], &key, &step);
                cr_assert(!step.stray && !step.forget);
                sends[self] += step.count;
                senders += step.count;
            }
        }
        sum += senders;
        cr_assert_leq(senders, 1);
    }
    for (uint32_t i = 0; i < 9; i++) {
        double share = 9.0 / 4 * sends[i] / sum * members.at[0].weight; // weights are 2, 3 and 4: within a factor of two
        cr_assert(i == 4 ? sends[i] == 0 : share > 0.25 && share < 1.5, "member %u sends %u of %u", i, sends[i], sum);
    }
    bkv_succession_deinit(&crash_of);
    bkv_succession_deinit(&drain_of);
    bkv_placement_destroy(was);
    bkv_placement_destroy(crashed);
    bkv_placement_destroy(draining);
}

static size_t list_nothing(void *store, uint64_t *cursor, bkv_repair_item_t *items, size_t capacity) {
    (void)cursor, (void)items, (void)capacity;
    ++*(uint32_t *)store;
    return 0;
}

Test(repair, an_empty_store_and_a_member_that_is_not_in_view) {
    members_t members = {0};
    members_make(&members, 3, 0);
    bkv_placement_t *placement = place(&members, 2, false, NULL);
    bkv_repair_t *repair = NULL;
    bkv_repair_send_t send;
    bkv_repair_progress_t progress;
    uint32_t asked = 0;
    bool more = true;
    cr_assert_eq(bkv_repair_create(placement, placement, "stranger", list_nothing, &asked, &repair, NULL), BKV_OK);
    cr_assert(!bkv_repair_done(repair));
    cr_assert_eq(bkv_repair_next(repair, &send, 1, 10, &more), 0);
    cr_assert(!more && bkv_repair_done(repair) && asked == 1);
    cr_assert_eq(bkv_repair_next(repair, &send, 1, 10, &more), 0);
    cr_assert_eq(asked, 1);
    bkv_repair_failed(repair);
    cr_assert(!bkv_repair_done(repair));
    bkv_repair_again(repair);
    cr_assert_eq(bkv_repair_next(repair, &send, 1, 10, &more), 0);
    bkv_repair_progress(repair, &progress);
    cr_assert(bkv_repair_done(repair) && progress.passes == 2 && progress.seen == 0);
    bkv_repair_destroy(repair);
    bkv_placement_destroy(placement);
}
