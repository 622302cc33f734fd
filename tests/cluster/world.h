// world.h - the simulator's cluster: members with stores full of made-up keys, a change of members, and its repair, all through
// the daemon's own placement, repair and bandwidth.
//
// A key is a number from which its 32 bytes are made whenever they are needed; a store is a list of numbers. That is all that
// is not the daemon's: 1,000 stores of 20,000 keys fit in 80 MB.
#ifndef BKV_TEST_CLUSTER_WORLD_H
#define BKV_TEST_CLUSTER_WORLD_H

#include "proto/placement.h"

typedef struct world {
    bkv_placement_member_t *members; // [count], ascending by id
    uint32_t count, replicas;
    uint32_t keys;
    bkv_placement_t *placement;
    uint32_t *numbers; // of all stores, one behind the other
    uint64_t *from;    // [count + 1]: where a member's begin
} world_t;

typedef struct world_load {
    double mean, most; // replicas a member and unit of weight; `most` is the fullest member's
} world_load_t;

typedef struct world_repair {
    uint64_t moved;      // transfers planned by all members
    uint64_t wrong;      // targets that were sent a key not once, or a key without need
    double seconds;      // until the last member has sent all, at the limit
    double even_seconds; // if those who have anything to send all had the same
    uint64_t plans;      // keys looked at by all
    double plan_ns;      // CPU time of one
} world_repair_t;

// Members "node-0000"...: weights[i % 3] and one of `domains` racks each.
void world_init(world_t *world, uint32_t count, uint32_t domains, const uint32_t weights[3], uint32_t replicas, uint32_t keys);
void world_deinit(world_t *world);

// Of the first `replicas` owners of every key: the owners of fewer replicas are the first of those of more.
world_load_t world_measure(const world_t *world, uint32_t replicas);

// The same members and stores, so that one state can be changed in several ways. Keys and stores are shared, members are not.
world_t world_copy(const world_t *world);
void world_copy_free(world_t *copy);

// Makes the placement for members that have been changed (only their fields, or appended with world_add or world_remove), and
// repairs it with `rate` bytes a second and member, records of record_bytes. Checks every transfer.
void world_add(world_t *world, const char *id, const char *domain, uint32_t weight);
void world_remove(world_t *world, uint32_t index);
world_repair_t world_change(const world_t *was, world_t *now, uint64_t rate, uint64_t record_bytes);

bkv_key_t world_key(uint32_t number);
double world_cpu_now(void); // seconds of this thread

#endif
