// members.h - made-up members and keys for tests of placement and repair, all from a seed.
#ifndef BKV_TEST_CLUSTER_MEMBERS_H
#define BKV_TEST_CLUSTER_MEMBERS_H

#include "proto/placement.h"

// ThreadSanitizer makes tables twenty times slower, and has nothing to find in what one thread does: fewer rounds there.
#ifdef __SANITIZE_THREAD__
#define ROUNDS(n) ((n) / 4)
#else
#define ROUNDS(n) (n)
#endif

uint64_t random_next(uint64_t *state); // splitmix64

bkv_key_t key_number(uint64_t number);

// A list of members that stays in order.
typedef struct members {
    bkv_placement_member_t at[256];
    uint32_t count;
    uint32_t born; // names given so far
} members_t;

// Adds "node-<number>" with epoch 1; domains: into one of so many, 0: none.
void members_add(members_t *members, uint32_t weight, uint32_t domain, uint32_t domains);
void members_remove(members_t *members, uint32_t index);

bkv_placement_t *place(const members_t *members, uint32_t replicas, bool table, const bkv_placement_t *previous);

#endif
