// placement.c - races for slots, and the table of who has won them. The arithmetic of a race is race.h's.
#include "proto/placement.h"

#include "proto/race.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#define BATCH  16 // keys whose places in the table are fetched ahead
#define GOLDEN 0x9e3779b97f4a7c15u

// A member that runs, as races see it.
typedef struct runner {
    uint64_t hash;  // of its id
    uint64_t share; // see bkv_race_share
} runner_t;

struct bkv_placement {
    bkv_race_t race;
    bkv_placement_member_t *members; // [count]
    uint32_t count, replicas;
    uint64_t seed;
    runner_t *runners;               // [running], in the order of members
    uint16_t *member_of, *domain_of; // [running]: its member, its domain's number
    uint32_t running, domains;
    uint16_t *table; // [BKV_PLACEMENT_SLOTS][replicas]; NULL: none
};

// ---- one race ----

typedef struct finisher {
    uint64_t time;
    uint32_t runner;
} finisher_t;

// The earliest so far, the first of them first.
typedef struct podium {
    finisher_t at[BKV_REPLICAS_MAX];
    uint32_t count, places;
} podium_t;

// Members are in the order of their ids, so that even a tie is decided alike everywhere.
static bool earlier(const finisher_t *a, const finisher_t *b) {
    return a->time < b->time || (a->time == b->time && a->runner < b->runner);
}

static uint64_t last_time(const podium_t *podium) {
    return podium->count < podium->places ? BKV_RACE_NEVER : podium->at[podium->count - 1].time;
}

// Puts a finisher on place `to` or before it, in the stead of whoever is there.
static void podium_settle(podium_t *podium, uint32_t to, finisher_t finisher) {
    for (; to > 0 && earlier(&finisher, &podium->at[to - 1]); to--) {
        podium->at[to] = podium->at[to - 1];
    }
    podium->at[to] = finisher;
}

static void podium_offer(podium_t *podium, finisher_t finisher) {
    if (podium->count < podium->places) {
        podium_settle(podium, podium->count++, finisher);
    } else if (earlier(&finisher, &podium->at[podium->count - 1])) {
        podium_settle(podium, podium->count - 1, finisher);
    }
}

// The same for a podium with one place for a domain at most. Who has been pushed off need not come back: those that pushed can
// only get earlier.
static void podium_offer_domain(const bkv_placement_t *placement, podium_t *podium, finisher_t finisher) {
    uint16_t domain = placement->domain_of[finisher.runner];
    for (uint32_t i = 0; i < podium->count; i++) {
        if (placement->domain_of[podium->at[i].runner] == domain) {
            if (earlier(&finisher, &podium->at[i])) {
                podium_settle(podium, i, finisher);
            }
            return;
        }
    }
    podium_offer(podium, finisher);
}

static uint64_t slot_hash(uint32_t slot) {
    return bkv_race_mix((slot + 1) * GOLDEN);
}

static bool stands(const podium_t *podium, uint32_t runner) {
    bool found = false;
    for (uint32_t i = 0; i < podium->count; i++) {
        found = found || podium->at[i].runner == runner;
    }
    return found;
}

// Lets some runners race, or all of them (only NULL): fills `podium`, with `apart` one of a domain, else those who are not on
// it.
static void run(const bkv_placement_t *placement, uint64_t hash, const uint16_t *only, uint32_t count, bool apart,
                podium_t *podium) {
    podium_t rest = {.places = podium->places - podium->count};
    podium_t *to = apart ? podium : &rest;
    uint64_t last = BKV_RACE_NEVER;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t runner = only != NULL ? only[i] : i;
        const runner_t *who = &placement->runners[runner];
        uint64_t h = bkv_race_mix(hash ^ who->hash);
        if (bkv_race_floor(h, who->share) > last) {
            continue; // as nearly all
        }
        finisher_t finisher = {.time = bkv_race_time(&placement->race, h, who->share), .runner = runner};
        if (apart) {
            podium_offer_domain(placement, to, finisher);
        } else if (!stands(podium, runner)) {
            podium_offer(to, finisher);
        }
        last = last_time(to);
    }
    for (uint32_t i = 0; i < rest.count; i++) {
        podium->at[podium->count++] = rest.at[i];
    }
}

// The owners of a slot among some runners, or all.
static uint32_t decide(const bkv_placement_t *placement, uint32_t slot, const uint16_t *only, uint32_t count,
                       uint16_t owners[BKV_REPLICAS_MAX]) {
    uint32_t replicas = placement->replicas;
    podium_t podium = {.places = replicas < placement->domains ? replicas : placement->domains};
    uint64_t hash = slot_hash(slot);
    if (podium.places > 0) {
        run(placement, hash, only, count, true, &podium);
    }
    if (podium.count < replicas && podium.count < count) { // fewer domains than replicas
        podium.places = replicas;
        run(placement, hash, only, count, false, &podium);
    }
    for (uint32_t i = 0; i < replicas; i++) {
        owners[i] = i < podium.count ? placement->member_of[podium.at[i].runner] : BKV_NO_MEMBER;
    }
    return podium.count;
}

uint32_t bkv_placement_race(const bkv_placement_t *placement, uint32_t slot, uint16_t owners[BKV_REPLICAS_MAX]) {
    return decide(placement, slot, NULL, placement->running, owners);
}

// ---- the table ----

// What has changed since a previous placement, in its terms.
typedef struct changes {
    uint16_t *runner_of; // [members of the previous]: the runner who was that member; BKV_NO_MEMBER: it left, or is changed
    uint16_t *only;      // [count of newcomers + replicas]: the newcomers, and room for a slot's owners
    uint32_t newcomers;
} changes_t;

static bool runs(const bkv_placement_member_t *member) {
    return member->weight > 0 && !member->draining;
}

static bool races_alike(const bkv_placement_member_t *a, const bkv_placement_member_t *b) {
    return runs(a) && runs(b) && a->weight == b->weight && strcmp(a->domain, b->domain) == 0;
}

// Both lists are in order of ids: one pass.
static void changes_find(const bkv_placement_t *placement, const bkv_placement_t *previous, changes_t *changes) {
    uint32_t old = 0;
    for (uint32_t i = 0; i < previous->count; i++) {
        changes->runner_of[i] = BKV_NO_MEMBER;
    }
    for (uint32_t runner = 0; runner < placement->running; runner++) {
        const bkv_placement_member_t *member = &placement->members[placement->member_of[runner]];
        while (old < previous->count && strcmp(previous->members[old].id, member->id) < 0) {
            old++;
        }
        bool known = old < previous->count && strcmp(previous->members[old].id, member->id) == 0;
        if (known && races_alike(&previous->members[old], member)) {
            changes->runner_of[old] = (uint16_t)runner;
        } else {
            changes->only[changes->newcomers++] = (uint16_t)runner;
        }
    }
}

// The slot's owners from its previous ones and the newcomers; false where one of them has left, so that all must race. Those
// who neither owned the slot nor are new cannot own it now: they have been beaten by somebody who still runs.
static bool slot_derive(bkv_placement_t *placement, const bkv_placement_t *previous, const changes_t *changes, uint32_t slot,
                        uint16_t owners[BKV_REPLICAS_MAX]) {
    const uint16_t *was = &previous->table[(size_t)slot * previous->replicas];
    uint32_t count = changes->newcomers;
    for (uint32_t i = 0; i < previous->replicas && was[i] != BKV_NO_MEMBER; i++) {
        uint16_t runner = changes->runner_of[was[i]];
        if (runner == BKV_NO_MEMBER) {
            return false;
        }
        changes->only[count++] = runner;
    }
    if (changes->newcomers > 0) {
        decide(placement, slot, changes->only, count, owners);
        return true;
    }
    for (uint32_t i = 0; i < placement->replicas; i++) { // the same, under other numbers
        owners[i] = i < count ? placement->member_of[changes->only[i]] : BKV_NO_MEMBER;
    }
    return true;
}

static bool is_like(const bkv_placement_t *placement, const bkv_placement_t *previous) {
    return previous != NULL && previous->table != NULL && previous->seed == placement->seed &&
           previous->replicas == placement->replicas;
}

static bkv_status_t table_fill(bkv_placement_t *placement, const bkv_placement_t *previous, bkv_error_t *err) {
    changes_t changes = {0};
    bool derive = is_like(placement, previous);
    placement->table = malloc((size_t)BKV_PLACEMENT_SLOTS * placement->replicas * sizeof(*placement->table));
    if (derive) {
        changes.runner_of = calloc(previous->count + 1u, sizeof(*changes.runner_of));
        changes.only = calloc(placement->running + BKV_REPLICAS_MAX, sizeof(*changes.only));
    }
    bool enough = placement->table != NULL && (!derive || (changes.runner_of != NULL && changes.only != NULL));
    if (enough && derive) {
        changes_find(placement, previous, &changes);
    }
    for (uint32_t slot = 0; enough && slot < BKV_PLACEMENT_SLOTS; slot++) {
        uint16_t owners[BKV_REPLICAS_MAX];
        if (!derive || !slot_derive(placement, previous, &changes, slot, owners)) {
            bkv_placement_race(placement, slot, owners);
        }
        memcpy(&placement->table[(size_t)slot * placement->replicas], owners, placement->replicas * sizeof(*owners));
    }
    free(changes.runner_of);
    free(changes.only);
    return enough ? BKV_OK : bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "placement: no memory for its table");
}

// ---- create, destroy ----

static bkv_status_t check(const bkv_placement_config_t *config, bkv_error_t *err) {
    if (config->replicas < 1 || config->replicas > BKV_REPLICAS_MAX) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "replicas: %u, must be 1 to %d", config->replicas, BKV_REPLICAS_MAX);
    }
    if (config->count > BKV_MEMBERS_MAX) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "members: %u, at most %d", config->count, BKV_MEMBERS_MAX);
    }
    for (uint32_t i = 0; i < config->count; i++) {
        const bkv_placement_member_t *member = &config->members[i];
        if (member->weight > BKV_WEIGHT_MAX) {
            return bkv_fail(err, BKV_INVALID_ARGUMENT, "weight: %u of %s, at most %u", member->weight, member->id,
                            BKV_WEIGHT_MAX);
        }
        if (i > 0 && strcmp(config->members[i - 1].id, member->id) >= 0) {
            return bkv_fail(err, BKV_INVALID_ARGUMENT, "members: %s comes after %s", member->id, config->members[i - 1].id);
        }
    }
    return BKV_OK;
}

// Numbers the domains of those who run. Few labels, many members with each: a scan of the runners before is quick enough.
static void domains_number(bkv_placement_t *placement) {
    for (uint32_t i = 0; i < placement->running; i++) {
        const char *domain = placement->members[placement->member_of[i]].domain;
        uint32_t same = 0;
        while (same < i && (domain[0] == '\0' || strcmp(domain, placement->members[placement->member_of[same]].domain) != 0)) {
            same++;
        }
        placement->domain_of[i] = (uint16_t)(same < i ? placement->domain_of[same] : placement->domains++);
    }
}

static void runners_line_up(bkv_placement_t *placement) {
    for (uint32_t i = 0; i < placement->count; i++) {
        const bkv_placement_member_t *member = &placement->members[i];
        if (runs(member)) {
            placement->runners[placement->running] = (runner_t){
                .hash = XXH3_64bits_withSeed(member->id, strlen(member->id), placement->seed),
                .share = bkv_race_share(member->weight),
            };
            placement->member_of[placement->running++] = (uint16_t)i;
        }
    }
    domains_number(placement);
}

bkv_status_t bkv_placement_create(const bkv_placement_config_t *config, const bkv_placement_t *previous,
                                  bkv_placement_t **placement, bkv_error_t *err) {
    bkv_status_t status = check(config, err);
    if (status != BKV_OK) {
        return status;
    }
    size_t count = config->count;
    bkv_placement_t *made = calloc(1, sizeof(*made));
    if (made != NULL) {
        made->members = calloc(count + 1, sizeof(*made->members));
        made->runners = calloc(count + 1, sizeof(*made->runners));
        made->member_of = calloc(count + 1, sizeof(*made->member_of));
        made->domain_of = calloc(count + 1, sizeof(*made->domain_of));
    }
    if (made == NULL || !made->members || !made->runners || !made->member_of || !made->domain_of) {
        bkv_placement_destroy(made);
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "placement: no memory for %zu members", count);
    }
    made->count = config->count;
    made->replicas = config->replicas;
    made->seed = config->seed;
    if (count > 0) {
        memcpy(made->members, config->members, count * sizeof(*made->members));
    }
    bkv_race_init(&made->race);
    runners_line_up(made);
    status = config->table ? table_fill(made, previous, err) : BKV_OK;
    if (status != BKV_OK) {
        bkv_placement_destroy(made);
        return status;
    }
    *placement = made;
    return BKV_OK;
}

void bkv_placement_destroy(bkv_placement_t *placement) {
    if (placement != NULL) {
        free(placement->members);
        free(placement->runners);
        free(placement->member_of);
        free(placement->domain_of);
        free(placement->table);
        free(placement);
    }
}

// ---- asking ----

uint32_t bkv_placement_slot(const bkv_placement_t *placement, const bkv_key_t *key) {
    return (uint32_t)(XXH3_64bits_withSeed(key->bytes, sizeof(key->bytes), placement->seed) >> (64 - BKV_PLACEMENT_SLOTS_LOG2));
}

uint32_t bkv_placement_slot_owners(const bkv_placement_t *placement, uint32_t slot, uint16_t owners[BKV_REPLICAS_MAX]) {
    assert(slot < BKV_PLACEMENT_SLOTS);
    if (placement->table == NULL) {
        return bkv_placement_race(placement, slot, owners);
    }
    const uint16_t *row = &placement->table[(size_t)slot * placement->replicas];
    uint32_t count = 0;
    while (count < placement->replicas && row[count] != BKV_NO_MEMBER) {
        owners[count] = row[count];
        count++;
    }
    return count;
}

uint32_t bkv_placement_owners(const bkv_placement_t *placement, const bkv_key_t *key, uint16_t owners[BKV_REPLICAS_MAX]) {
    return bkv_placement_slot_owners(placement, bkv_placement_slot(placement, key), owners);
}

void bkv_placement_owners_batch(const bkv_placement_t *placement, const bkv_key_t *keys, size_t count, uint16_t *owners) {
    uint32_t slots[BATCH], replicas = placement->replicas;
    for (size_t from = 0; from < count; from += BATCH) {
        size_t n = count - from < BATCH ? count - from : BATCH;
        for (size_t i = 0; i < n; i++) {
            slots[i] = bkv_placement_slot(placement, &keys[from + i]);
            if (placement->table != NULL) {
                __builtin_prefetch(&placement->table[(size_t)slots[i] * replicas]);
            }
        }
        for (size_t i = 0; i < n; i++) {
            uint16_t found[BKV_REPLICAS_MAX];
            uint32_t there = bkv_placement_slot_owners(placement, slots[i], found);
            for (uint32_t r = 0; r < replicas; r++) {
                owners[(from + i) * replicas + r] = r < there ? found[r] : BKV_NO_MEMBER;
            }
        }
    }
}

uint32_t bkv_placement_count(const bkv_placement_t *placement) {
    return placement->count;
}

uint32_t bkv_placement_replicas(const bkv_placement_t *placement) {
    return placement->replicas;
}

const bkv_placement_member_t *bkv_placement_member(const bkv_placement_t *placement, uint32_t member) {
    assert(member < placement->count);
    return &placement->members[member];
}

uint16_t bkv_placement_find(const bkv_placement_t *placement, const char *id) {
    uint32_t low = 0, high = placement->count;
    while (low < high) {
        uint32_t middle = (low + high) / 2;
        int order = strcmp(placement->members[middle].id, id);
        if (order == 0) {
            return (uint16_t)middle;
        }
        if (order < 0) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return BKV_NO_MEMBER;
}

uint64_t bkv_placement_bytes(const bkv_placement_t *placement) {
    uint64_t table = (uint64_t)BKV_PLACEMENT_SLOTS * placement->replicas * sizeof(*placement->table);
    uint64_t member = sizeof(*placement->members) + sizeof(*placement->runners) + 2 * sizeof(uint16_t);
    return sizeof(*placement) + placement->count * member + (placement->table != NULL ? table : 0);
}
