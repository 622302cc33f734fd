// test_placement.c - placement against a model that decides every race in floating point, and what it promises of changes.
#include "members.h"

#include "proto/race.h"
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <xxhash.h>

#define SEED  7
#define PROBE 4099 // every so many slots are looked at

// ---- the model ----

static double model_time(const bkv_placement_member_t *member, uint32_t slot) {
    uint64_t id = XXH3_64bits_withSeed(member->id, strlen(member->id), SEED);
    uint64_t h = bkv_race_mix(bkv_race_mix((slot + 1) * 0x9e3779b97f4a7c15u) ^ id);
    return (double)(-log1pl(-ldexpl((long double)h, -64)) / member->weight);
}

static bool same_domain(const bkv_placement_member_t *a, const bkv_placement_member_t *b) {
    return a == b || (a->domain[0] != '\0' && strcmp(a->domain, b->domain) == 0);
}

// Picks the earliest again and again: first one of a domain at a time, then anybody.
static uint32_t model_owners(const members_t *members, uint32_t replicas, uint32_t slot, uint16_t *owners) {
    uint32_t count = 0;
    for (int apart = 1; apart >= 0; apart--) {
        for (bool found = true; found && count < replicas;) {
            double best = INFINITY;
            found = false;
            for (uint32_t i = 0; i < members->count; i++) {
                const bkv_placement_member_t *member = &members->at[i];
                bool free = member->weight > 0 && !member->draining;
                for (uint32_t j = 0; j < count; j++) {
                    free = free && owners[j] != i && !(apart && same_domain(member, &members->at[owners[j]]));
                }
                if (free && model_time(member, slot) < best) {
                    best = model_time(member, slot);
                    owners[count] = (uint16_t)i;
                    found = true;
                }
            }
            count += found;
        }
    }
    return count;
}

static void check_model(const members_t *members, uint32_t replicas) {
    bkv_placement_t *placement = place(members, replicas, false, NULL);
    for (uint32_t slot = 0; slot < BKV_PLACEMENT_SLOTS; slot += PROBE) {
        uint16_t owners[BKV_REPLICAS_MAX], expected[BKV_REPLICAS_MAX];
        uint32_t count = bkv_placement_slot_owners(placement, slot, owners);
        cr_assert_eq(count, model_owners(members, replicas, slot, expected));
        cr_assert_arr_eq(owners, expected, count * sizeof(*owners), "slot %u of %u members", slot, members->count);
    }
    bkv_placement_destroy(placement);
}

Test(placement, owners_are_the_models) {
    uint64_t state = 1;
    for (int round = 0; round < ROUNDS(60); round++) {
        members_t members = {0};
        uint32_t count = (uint32_t)(random_next(&state) % 40), domains = (uint32_t)(random_next(&state) % 6);
        bool weighted = random_next(&state) % 2 == 0;
        for (uint32_t i = 0; i < count; i++) {
            uint32_t weight = weighted ? (uint32_t)(random_next(&state) % 50) : 100;
            members_add(&members, weight, (uint32_t)random_next(&state), domains);
            members.at[random_next(&state) % members.count].draining = random_next(&state) % 16 == 0;
        }
        check_model(&members, 1 + (uint32_t)(random_next(&state) % BKV_REPLICAS_MAX));
    }
}

Test(placement, distinct_domains_where_there_are_enough) {
    uint64_t state = 2;
    members_t members = {0};
    for (uint32_t i = 0; i < 60; i++) {
        members_add(&members, 1 + (uint32_t)(random_next(&state) % 9), i * i, 5); // of racks of very different sizes
    }
    bkv_placement_t *placement = place(&members, 3, true, NULL);
    for (uint32_t slot = 0; slot < BKV_PLACEMENT_SLOTS; slot += 7) {
        uint16_t owners[BKV_REPLICAS_MAX];
        cr_assert_eq(bkv_placement_slot_owners(placement, slot, owners), 3);
        const bkv_placement_member_t *a = &members.at[owners[0]], *b = &members.at[owners[1]], *c = &members.at[owners[2]];
        cr_assert(!same_domain(a, b) && !same_domain(b, c) && !same_domain(a, c));
    }
    bkv_placement_destroy(placement);
}

// ---- ways to ask ----

static uint32_t key_slot_and_owners(const bkv_placement_t *placement, uint64_t number, uint16_t *owners) {
    bkv_key_t key = key_number(number);
    return bkv_placement_owners(placement, &key, owners);
}

Test(placement, all_ways_to_ask_agree) {
    enum { KEYS = 1003 };
    static bkv_key_t keys[KEYS];
    static uint16_t batch[KEYS * 3], again[KEYS * 3];
    members_t members = {0};
    for (uint32_t i = 0; i < 17; i++) {
        members_add(&members, 1 + i % 3, i, 4);
    }
    bkv_placement_t *table = place(&members, 3, true, NULL), *races = place(&members, 3, false, NULL);
    for (uint64_t i = 0; i < KEYS; i++) {
        keys[i] = key_number(i);
    }
    bkv_placement_owners_batch(table, keys, KEYS, batch);
    bkv_placement_owners_batch(races, keys, KEYS, again);
    cr_assert_arr_eq(batch, again, sizeof(batch));
    for (uint64_t i = 0; i < KEYS; i++) {
        uint16_t owners[BKV_REPLICAS_MAX];
        cr_assert_eq(key_slot_and_owners(table, i, owners), 3);
        cr_assert_arr_eq(owners, &batch[i * 3], 3 * sizeof(*owners));
    }
    for (uint32_t i = 0; i < members.count; i++) {
        cr_assert_eq(bkv_placement_find(table, members.at[i].id), i);
        cr_assert_str_eq(bkv_placement_member(table, i)->id, members.at[i].id);
    }
    cr_assert_eq(bkv_placement_find(table, "node"), BKV_NO_MEMBER);
    cr_assert_eq(bkv_placement_find(table, "zzz"), BKV_NO_MEMBER);
    cr_assert_geq(bkv_placement_bytes(table), 6u << 20);
    cr_assert_lt(bkv_placement_bytes(races), 16u << 10);
    bkv_placement_destroy(table);
    bkv_placement_destroy(races);
}

Test(placement, few_members_or_none) {
    uint16_t owners[BKV_REPLICAS_MAX], batch[3];
    bkv_key_t key = key_number(5);
    members_t members = {0};
    bkv_placement_t *placement = place(&members, 3, true, NULL);
    cr_assert_eq(bkv_placement_owners(placement, &key, owners), 0);
    bkv_placement_destroy(placement);
    members_add(&members, 5, 0, 1);
    members_add(&members, 5, 0, 1);
    members_add(&members, 0, 0, 1); // holds nothing
    placement = place(&members, 3, true, NULL);
    cr_assert_eq(bkv_placement_owners(placement, &key, owners), 2);
    cr_assert_neq(owners[0], owners[1]);
    bkv_placement_owners_batch(placement, &key, 1, batch);
    cr_assert(batch[0] == owners[0] && batch[1] == owners[1] && batch[2] == BKV_NO_MEMBER);
    bkv_placement_destroy(placement);
}

Test(placement, what_is_out_of_range_is_refused) {
    members_t members = {0};
    bkv_placement_t *placement = NULL;
    bkv_error_t err;
    members_add(&members, 1, 0, 0);
    members_add(&members, 1, 0, 0);
    bkv_placement_config_t config = {.members = members.at, .count = 2, .replicas = 0};
    cr_assert_eq(bkv_placement_create(&config, NULL, &placement, &err), BKV_INVALID_ARGUMENT);
    config.replicas = BKV_REPLICAS_MAX + 1;
    cr_assert_eq(bkv_placement_create(&config, NULL, &placement, &err), BKV_INVALID_ARGUMENT);
    config.replicas = 1;
    members.at[1].weight = BKV_WEIGHT_MAX + 1;
    cr_assert_eq(bkv_placement_create(&config, NULL, &placement, &err), BKV_INVALID_ARGUMENT);
    members.at[1] = members.at[0];
    cr_assert_eq(bkv_placement_create(&config, NULL, &placement, &err), BKV_INVALID_ARGUMENT);
    config.count = BKV_MEMBERS_MAX + 1;
    cr_assert_eq(bkv_placement_create(&config, NULL, &placement, &err), BKV_INVALID_ARGUMENT);
    cr_assert_null(placement);
}

// ---- changes ----

// One random change. Returns what happened to which member: its id, and whether it could gain or lose slots.
typedef struct change {
    char id[BKV_MEMBER_NAME_MAX];
    bool gains, loses;
} change_t;

static change_t change_one(members_t *members, uint64_t *state) {
    uint32_t index = (uint32_t)(random_next(state) % members->count);
    bkv_placement_member_t *member = &members->at[index];
    change_t change = {.gains = false};
    memcpy(change.id, member->id, sizeof(change.id));
    switch (random_next(state) % 6) {
    case 0:
        members_remove(members, index);
        change.loses = true;
        break;
    case 1: {
        uint32_t number = (members->born * 37) % 1000;
        snprintf(change.id, sizeof(change.id), "node-%u", number);
        members_add(members, 1 + (uint32_t)(random_next(state) % 9), (uint32_t)random_next(state), 3);
        change.gains = true;
        break;
    }
    case 2:
        member->draining = !member->draining;
        change.loses = member->draining;
        change.gains = !member->draining;
        break;
    case 3:
        member->weight++;
        change.gains = true;
        break;
    case 4:
        change.loses = member->weight > 0;
        member->weight -= change.loses;
        break;
    default:
        snprintf(member->domain, sizeof(member->domain), "rack-%d", (int)(random_next(state) % 3));
        change.gains = change.loses = true;
        break;
    }
    return change;
}

// Whom a slot has gained or lost. Returns how many of each, and the names of the last of them.
static uint32_t owners_without(const bkv_placement_t *a, const bkv_placement_t *b, uint32_t slot, const char **name) {
    uint16_t of_a[BKV_REPLICAS_MAX], of_b[BKV_REPLICAS_MAX];
    uint32_t count_a = bkv_placement_slot_owners(a, slot, of_a), count_b = bkv_placement_slot_owners(b, slot, of_b), found = 0;
    for (uint32_t i = 0; i < count_a; i++) {
        const char *id = bkv_placement_member(a, of_a[i])->id;
        bool there = false;
        for (uint32_t j = 0; j < count_b; j++) {
            there = there || strcmp(id, bkv_placement_member(b, of_b[j])->id) == 0;
        }
        if (!there) {
            *name = id;
            found++;
        }
    }
    return found;
}

// A change of one member moves at most one replica of a slot, and that one from or to this member.
static void check_movement(const bkv_placement_t *was, const bkv_placement_t *now, const change_t *change) {
    for (uint32_t slot = 0; slot < BKV_PLACEMENT_SLOTS; slot += 41) {
        const char *lost = change->id, *gained = change->id;
        uint32_t losses = owners_without(was, now, slot, &lost), gains = owners_without(now, was, slot, &gained);
        cr_assert(losses <= 1 && gains <= 1, "slot %u lost %u and gained %u", slot, losses, gains);
        if (losses + gains > 0) {
            bool is_gain = gains == 1 && strcmp(gained, change->id) == 0,
                 is_loss = losses == 1 && strcmp(lost, change->id) == 0;
            cr_assert((is_gain && change->gains) || (is_loss && change->loses), "slot %u: from %s to %s", slot, lost, gained);
        }
    }
}

static void check_same_tables(const bkv_placement_t *a, const bkv_placement_t *b) {
    for (uint32_t slot = 0; slot < BKV_PLACEMENT_SLOTS; slot++) {
        uint16_t of_a[BKV_REPLICAS_MAX], of_b[BKV_REPLICAS_MAX];
        uint32_t count = bkv_placement_slot_owners(a, slot, of_a);
        cr_assert_eq(count, bkv_placement_slot_owners(b, slot, of_b));
        cr_assert_arr_eq(of_a, of_b, count * sizeof(*of_a), "slot %u", slot);
    }
}

// With fewer domains than replicas, with as many and with more, as they come and go.
Test(placement, changes_move_the_least_and_derive_the_same_table) {
    uint64_t state = 11;
    for (uint32_t replicas = 1; replicas <= BKV_REPLICAS_MAX; replicas++) {
        members_t members = {0};
        for (uint32_t i = 0; i < 7; i++) {
            members_add(&members, 1 + i % 4, i, 3);
        }
        bkv_placement_t *was = place(&members, replicas, true, NULL);
        for (int round = 0; round < ROUNDS(8); round++) {
            change_t change = change_one(&members, &state);
            bkv_placement_t *now = place(&members, replicas, true, was);
            bkv_placement_t *scratch = place(&members, replicas, true, NULL);
            check_same_tables(now, scratch);
            check_movement(was, now, &change);
            bkv_placement_destroy(scratch);
            bkv_placement_destroy(was);
            was = now;
        }
        bkv_placement_destroy(was);
    }
}

Test(placement, many_changes_at_once_derive_the_same_table) {
    uint64_t state = 13;
    members_t members = {0};
    for (uint32_t i = 0; i < 20; i++) {
        members_add(&members, 1 + i % 4, i, 0);
    }
    bkv_placement_t *was = place(&members, 2, true, NULL);
    for (int i = 0; i < 12; i++) {
        change_one(&members, &state);
    }
    bkv_placement_t *now = place(&members, 2, true, was), *scratch = place(&members, 2, true, NULL);
    check_same_tables(now, scratch);
    bkv_placement_destroy(was);
    bkv_placement_destroy(now);
    bkv_placement_destroy(scratch);
}

Test(placement, fewer_replicas_have_the_first_owners_of_more) {
    for (uint32_t domains = 0; domains <= 5; domains++) {
        members_t members = {0};
        for (uint32_t i = 0; i < 11; i++) {
            members_add(&members, 1 + i % 4, i, domains);
        }
        bkv_placement_t *more = place(&members, BKV_REPLICAS_MAX, false, NULL);
        for (uint32_t replicas = 1; replicas < BKV_REPLICAS_MAX; replicas++) {
            bkv_placement_t *fewer = place(&members, replicas, false, NULL);
            for (uint32_t slot = 0; slot < BKV_PLACEMENT_SLOTS; slot += 271) {
                uint16_t of_more[BKV_REPLICAS_MAX], of_fewer[BKV_REPLICAS_MAX];
                cr_assert_eq(bkv_placement_slot_owners(more, slot, of_more), BKV_REPLICAS_MAX);
                cr_assert_eq(bkv_placement_slot_owners(fewer, slot, of_fewer), replicas);
                cr_assert_arr_eq(of_more, of_fewer, replicas * sizeof(*of_more));
            }
            bkv_placement_destroy(fewer);
        }
        bkv_placement_destroy(more);
    }
}

Test(placement, a_restart_moves_nothing) {
    members_t members = {0};
    for (uint32_t i = 0; i < 9; i++) {
        members_add(&members, 1, i, 0);
    }
    bkv_placement_t *was = place(&members, 2, true, NULL);
    members.at[4].epoch = 99;
    bkv_placement_t *now = place(&members, 2, true, was);
    check_same_tables(was, now);
    cr_assert_eq(bkv_placement_member(now, 4)->epoch, 99);
    bkv_placement_destroy(was);
    bkv_placement_destroy(now);
}

// ---- shares ----

static void count_slots(const bkv_placement_t *placement, uint32_t *slots) {
    for (uint32_t slot = 0; slot < BKV_PLACEMENT_SLOTS; slot++) {
        uint16_t owners[BKV_REPLICAS_MAX];
        uint32_t count = bkv_placement_slot_owners(placement, slot, owners);
        for (uint32_t i = 0; i < count; i++) {
            slots[owners[i]]++;
        }
    }
}

// Five standard deviations of a binomial of that mean.
static void check_share(uint32_t slots, double expected, const char *id) {
    cr_assert_lt(fabs(slots - expected), 5 * sqrt(expected), "%s has %u slots, should have %.0f", id, slots, expected);
}

Test(placement, loads_follow_weights) {
    uint32_t slots[256] = {0};
    members_t members = {0};
    double sum = 0;
    for (uint32_t i = 0; i < 40; i++) {
        members_add(&members, 1 + i * i, i, 0);
        sum += 1 + i * i;
    }
    bkv_placement_t *placement = place(&members, 1, true, NULL);
    count_slots(placement, slots);
    for (uint32_t i = 0; i < members.count; i++) {
        check_share(slots[i], BKV_PLACEMENT_SLOTS * members.at[i].weight / sum, members.at[i].id);
    }
    bkv_placement_destroy(placement);
}

Test(placement, replicas_are_as_even_as_primaries) {
    uint32_t slots[256] = {0};
    members_t members = {0};
    for (uint32_t i = 0; i < 60; i++) {
        members_add(&members, 3, i, 12);
    }
    bkv_placement_t *placement = place(&members, 3, true, NULL);
    count_slots(placement, slots);
    for (uint32_t i = 0; i < members.count; i++) {
        check_share(slots[i], BKV_PLACEMENT_SLOTS * 3.0 / 60, members.at[i].id);
    }
    bkv_placement_destroy(placement);
}

// What is stored in one version of the daemon is looked for by another: this table must not change.
Test(placement, the_table_is_the_same_everywhere) {
    members_t members = {0};
    for (uint32_t i = 0; i < 25; i++) {
        members_add(&members, 1 + i % 5, i, 6);
    }
    bkv_placement_t *placement = place(&members, 2, true, NULL);
    uint64_t sum = 0;
    for (uint64_t i = 0; i < 100000; i++) {
        uint16_t owners[BKV_REPLICAS_MAX];
        cr_assert_eq(key_slot_and_owners(placement, i, owners), 2);
        sum = bkv_race_mix(sum ^ (uint64_t)(owners[0] << 16 | owners[1]));
    }
    cr_assert_eq(sum, 0xe6eada723b7206b4u, "it is %llx", (unsigned long long)sum);
    bkv_placement_destroy(placement);
}
