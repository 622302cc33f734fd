// world.c - see world.h.
#include "tests/cluster/world.h"

#include "daemon/cluster/move/bandwidth.h"
#include "daemon/cluster/move/repair.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define SEED  20
#define SENDS 64
#define PIECE 4096

static void *need(void *memory) {
    if (memory == NULL) {
        fprintf(stderr, "cluster-sim: out of memory\n");
        exit(1);
    }
    return memory;
}

double world_cpu_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

bkv_key_t world_key(uint32_t number) {
    bkv_key_t key;
    uint64_t state = number * 0xd1342543de82ef95u;
    for (size_t i = 0; i < sizeof(key.bytes); i += 8) {
        uint64_t x = state += 0x9e3779b97f4a7c15u;
        x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
        x = (x ^ x >> 27) * 0x94d049bb133111ebu;
        x ^= x >> 31;
        memcpy(&key.bytes[i], &x, 8);
    }
    return key;
}

// ---- members and what they hold ----

static bkv_placement_t *place(const world_t *world, const bkv_placement_t *previous) {
    const bkv_placement_config_t config = {
        .members = world->members, .count = world->count, .replicas = world->replicas, .seed = SEED, .table = true};
    bkv_placement_t *placement = NULL;
    bkv_error_t err;
    if (bkv_placement_create(&config, previous, &placement, &err) != BKV_OK) {
        fprintf(stderr, "cluster-sim: %s\n", err.message);
        exit(1);
    }
    return placement;
}

// Gives every store what it owns.
static void fill(world_t *world) {
    uint16_t owners[BKV_REPLICAS_MAX];
    uint64_t *next = need(calloc(world->count + 2u, sizeof(*next)));
    world->from = need(calloc(world->count + 1u, sizeof(*world->from)));
    world->numbers = need(malloc((size_t)world->keys * world->replicas * sizeof(*world->numbers)));
    for (uint32_t number = 0; number < world->keys; number++) {
        bkv_key_t key = world_key(number);
        uint32_t count = bkv_placement_owners(world->placement, &key, owners);
        for (uint32_t i = 0; i < count; i++) {
            next[owners[i] + 2]++;
        }
    }
    for (uint32_t member = 0; member < world->count; member++) {
        next[member + 2] += next[member + 1];
        world->from[member + 1] = next[member + 2];
    }
    for (uint32_t number = 0; number < world->keys; number++) {
        bkv_key_t key = world_key(number);
        uint32_t count = bkv_placement_owners(world->placement, &key, owners);
        for (uint32_t i = 0; i < count; i++) {
            world->numbers[next[owners[i] + 1]++] = number;
        }
    }
    free(next);
}

void world_init(world_t *world, uint32_t count, uint32_t domains, const uint32_t weights[3], uint32_t replicas, uint32_t keys) {
    *world = (world_t){.replicas = replicas, .keys = keys};
    world->members = need(calloc(count + 1u, sizeof(*world->members)));
    for (uint32_t i = 0; i < count; i++) {
        char id[16], domain[16];
        snprintf(id, sizeof(id), "node-%04u", i);
        snprintf(domain, sizeof(domain), "rack-%u", i * 7 % domains);
        world_add(world, id, domain, weights[i % 3]);
    }
    world->placement = place(world, NULL);
    fill(world);
}

void world_deinit(world_t *world) {
    bkv_placement_destroy(world->placement);
    free(world->members);
    free(world->numbers);
    free(world->from);
}

world_load_t world_measure(const world_t *world, uint32_t replicas) {
    world_load_t load = {0};
    uint64_t weight = 0, *held = need(calloc(world->count + 1u, sizeof(*held)));
    for (uint32_t number = 0; number < world->keys; number++) {
        uint16_t owners[BKV_REPLICAS_MAX];
        bkv_key_t key = world_key(number);
        uint32_t count = bkv_placement_owners(world->placement, &key, owners);
        for (uint32_t i = 0; i < count && i < replicas; i++) {
            held[owners[i]]++;
        }
    }
    for (uint32_t member = 0; member < world->count; member++) {
        double of_weight = (double)held[member] / world->members[member].weight;
        weight += world->members[member].weight;
        load.mean += (double)held[member];
        load.most = of_weight > load.most ? of_weight : load.most;
    }
    load.mean /= (double)weight;
    free(held);
    return load;
}

world_t world_copy(const world_t *world) {
    world_t copy = {.count = world->count, .replicas = world->replicas, .keys = world->keys};
    copy.members = need(calloc(world->count + 2u, sizeof(*copy.members))); // and one more
    memcpy(copy.members, world->members, world->count * sizeof(*copy.members));
    return copy;
}

void world_copy_free(world_t *copy) {
    bkv_placement_destroy(copy->placement);
    free(copy->members);
}

void world_add(world_t *world, const char *id, const char *domain, uint32_t weight) {
    bkv_placement_member_t member = {.epoch = 1, .weight = weight};
    snprintf(member.id, sizeof(member.id), "%s", id);
    snprintf(member.domain, sizeof(member.domain), "%s", domain);
    uint32_t to = world->count++;
    for (; to > 0 && strcmp(world->members[to - 1].id, id) > 0; to--) {
        world->members[to] = world->members[to - 1];
    }
    world->members[to] = member;
}

void world_remove(world_t *world, uint32_t index) {
    world->count--;
    memmove(&world->members[index], &world->members[index + 1], (world->count - index) * sizeof(*world->members));
}

// ---- a change and its repair ----

typedef struct store {
    const uint32_t *numbers;
    uint64_t count;
    uint64_t record_bytes;
} store_t;

static size_t list(void *from, uint64_t *cursor, bkv_repair_item_t *items, size_t capacity) {
    const store_t *store = from;
    size_t count = 0;
    for (; count < capacity && *cursor < store->count; count++, ++*cursor) {
        uint32_t number = store->numbers[*cursor];
        items[count] = (bkv_repair_item_t){.key = world_key(number), .bytes = store->record_bytes};
        memcpy(items[count].spec_id.bytes, &number, sizeof(number)); // so that its transfer can be checked
    }
    return count;
}

// What has arrived: of each key for each of its present owners.
typedef struct arrivals {
    uint8_t *counts; // [keys][replicas]
    uint64_t wrong;  // for somebody who is no owner
} arrivals_t;

static void arrive(arrivals_t *arrivals, const world_t *now, const bkv_repair_send_t *send) {
    uint16_t owners[BKV_REPLICAS_MAX];
    uint32_t number, count = bkv_placement_owners(now->placement, &send->item.key, owners);
    memcpy(&number, send->item.spec_id.bytes, sizeof(number));
    for (uint32_t t = 0; t < send->step.count; t++) {
        uint32_t at = 0;
        while (at < count && owners[at] != send->step.targets[t]) {
            at++;
        }
        if (at < count) {
            arrivals->counts[(size_t)number * now->replicas + at]++;
        } else {
            arrivals->wrong++;
        }
    }
}

// One member plans and sends all it has to, on a clock of its own. Returns when it is done.
static double member_repair(const world_t *was, const world_t *now, uint32_t member, uint64_t rate, uint64_t record_bytes,
                            arrivals_t *arrivals, world_repair_t *result) {
    store_t store = {.numbers = was->numbers + was->from[member],
                     .count = was->from[member + 1] - was->from[member],
                     .record_bytes = record_bytes};
    bkv_repair_t *repair = NULL;
    bkv_bandwidth_t bandwidth;
    bkv_repair_send_t sends[SENDS];
    uint64_t now_ns = 0;
    bool more = true;
    if (bkv_repair_create(was->placement, now->placement, was->members[member].id, list, &store, &repair, NULL) != BKV_OK) {
        need(NULL);
    }
    bkv_bandwidth_init(&bandwidth, rate, record_bytes, now_ns);
    while (more) {
        size_t count = bkv_repair_next(repair, sends, SENDS, PIECE, &more);
        for (size_t i = 0; i < count; i++) {
            for (uint32_t t = 0; t < sends[i].step.count; t++) {
                now_ns += bkv_bandwidth_wait_ns(&bandwidth, now_ns);
                bkv_bandwidth_take(&bandwidth, record_bytes, now_ns);
            }
            arrive(arrivals, now, &sends[i]);
        }
    }
    bkv_repair_progress_t progress;
    bkv_repair_progress(repair, &progress);
    result->moved += progress.planned;
    result->plans += progress.seen;
    bkv_repair_destroy(repair);
    return progress.planned == 0 ? 0 : (double)(now_ns + record_bytes * 1000000000 / rate) * 1e-9; // the last has to go, too
}

// Every owner that was none must have been sent the key once (if anybody has it still), every other not at all.
static uint64_t check(const world_t *was, const world_t *now, const bkv_succession_t *succession, const arrivals_t *arrivals) {
    uint64_t wrong = arrivals->wrong;
    for (uint32_t number = 0; number < now->keys; number++) {
        uint16_t were[BKV_REPLICAS_MAX], are[BKV_REPLICAS_MAX];
        bkv_key_t key = world_key(number);
        uint32_t were_count = bkv_placement_owners(was->placement, &key, were), holders = 0;
        uint32_t are_count = bkv_placement_owners(now->placement, &key, are);
        for (uint32_t i = 0; i < were_count; i++) {
            holders += succession->heir[were[i]] != BKV_NO_MEMBER;
        }
        for (uint32_t i = 0; i < are_count; i++) {
            bool held = false;
            for (uint32_t j = 0; j < were_count; j++) {
                held = held || succession->heir[were[j]] == are[i];
            }
            wrong += arrivals->counts[(size_t)number * now->replicas + i] != (!held && holders > 0);
        }
    }
    return wrong;
}

world_repair_t world_change(const world_t *was, world_t *now, uint64_t rate, uint64_t record_bytes) {
    world_repair_t result = {0};
    bkv_succession_t succession;
    now->placement = place(now, was->placement);
    arrivals_t arrivals = {.counts = need(calloc(now->keys, now->replicas))};
    if (bkv_succession_init(&succession, was->placement, now->placement, NULL) != BKV_OK) {
        need(NULL);
    }
    uint32_t senders = 0;
    double start = world_cpu_now();
    for (uint32_t member = 0; member < was->count; member++) {
        if (succession.heir[member] != BKV_NO_MEMBER) {
            double seconds = member_repair(was, now, member, rate, record_bytes, &arrivals, &result);
            senders += seconds > 0;
            result.seconds = seconds > result.seconds ? seconds : result.seconds;
        }
    }
    result.plan_ns = (world_cpu_now() - start) * 1e9 / (double)result.plans;
    result.even_seconds = (double)result.moved * (double)record_bytes / ((double)rate * (senders > 0 ? senders : 1));
    result.wrong = check(was, now, &succession, &arrivals);
    bkv_succession_deinit(&succession);
    free(arrivals.counts);
    return result;
}
