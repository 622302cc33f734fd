// placement.h - which members own a block: weighted rendezvous hashing, R replicas on distinct failure domains.
//
// What it is: a pure function of (key, members, replicas, seed); no I/O, no clock, no randomness. Any two processes that know
// the same members agree on every owner, on any host. What it is not: it does not know who is alive (membership.c says that)
// nor what to do about a change (repair.h).
//
// How. A key falls into one of 2^20 slots (XXH3 of the key under the cluster's seed), and the members race for each slot
// (race.h). Of every failure domain only its first member counts; the R earliest of these own the slot, the earliest first.
// With fewer domains than R, the earliest members that are left fill up. A member with no domain is a domain of its own.
// Members that drain and those of weight 0 do not run.
//
// Why slots, and not a race for each key: a race costs O(members), 2 us a key with 1,000 of them, and a repair asks about every
// key twice. The owners of all slots fit in a table of 2 bytes a slot and replica (4 MiB for two replicas), a lookup is then
// two cache misses at any number of members, and the next view's table is made from the last one's: a slot that nobody's
// leaving touches needs one race for each newcomer. The price is balance: besides the noise of the keys a member's load has
// that of its slots, 1 / sqrt(2^20 R / members): 2.2 % for R = 2 and 1,000 members. A caller with few keys to ask for can do
// without a table (`table = false`) and gets the same answers from races.
//
// Movement. A member's time in a slot depends on nothing but the two of them, therefore:
//   - leaving, draining or a lower weight takes from that member alone: each slot that it loses goes to one other member;
//   - joining or a higher weight gives to that member alone: each slot that it gets is taken from one other member;
//   - so what moves is the member's share, which no method can better, and all other replicas stay where they are;
//   - a member that comes back, under a new epoch, gets the very slots that it had;
//   - with more replicas a key's owners are those that it had, and further ones behind them.
//
// Whoever may choose keys, but does not know the seed, cannot aim at a member.
//
// Shares. Where weights are equal, or R = 1, loads are proportional to weights. With R > 1 a member holds a slot at most once,
// and so does a domain: one that has more than 1 / R of all weight gets less than its weight says.
#ifndef BKV_PLACEMENT_H
#define BKV_PLACEMENT_H

#include "kernels/summary.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define BKV_PLACEMENT_SLOTS_LOG2 20
#define BKV_PLACEMENT_SLOTS      (1u << BKV_PLACEMENT_SLOTS_LOG2)
#define BKV_REPLICAS_MAX         4
#define BKV_MEMBERS_MAX          4096
#define BKV_MEMBER_NAME_MAX      64 // of ids and domains, NUL included
#define BKV_WEIGHT_MAX           (1u << 20)
#define BKV_NO_MEMBER            UINT16_MAX

typedef struct bkv_placement bkv_placement_t;

typedef struct bkv_placement_member {
    char id[BKV_MEMBER_NAME_MAX];     // stable name, all that is hashed
    char domain[BKV_MEMBER_NAME_MAX]; // ""; a domain of its own
    uint64_t epoch;                   // of this start of the member; has no influence on placement
    uint32_t weight;                  // 0..BKV_WEIGHT_MAX
    bool draining;
} bkv_placement_member_t;

typedef struct bkv_placement_config {
    const bkv_placement_member_t *members; // ascending by id, no id twice; copied
    uint32_t count;                        // 0..BKV_MEMBERS_MAX
    uint32_t replicas;                     // 1..BKV_REPLICAS_MAX
    uint64_t seed;                         // the cluster's, the same for all
    bool table;
} bkv_placement_config_t;

// Makes a placement. `previous` (may be NULL) has no influence on the result, but makes it quick where little has changed.
// With a table this takes 2 s of CPU for 1,000 members from nothing, and some 40 ms for a change of one: not for a thread that
// others wait for. INVALID_ARGUMENT: members out of order, or a value out of its range. RESOURCE_EXHAUSTED: no memory.
bkv_status_t bkv_placement_create(const bkv_placement_config_t *config, const bkv_placement_t *previous,
                                  bkv_placement_t **placement, bkv_error_t *err);
void bkv_placement_destroy(bkv_placement_t *placement); // NULL: nothing

// All of these only read, from any thread. Members are told by their place in the array that the placement was made from.

uint32_t bkv_placement_slot(const bkv_placement_t *placement, const bkv_key_t *key);

// The owners of a key, the earliest first; returns how many: fewer than the replicas only where there are too few members.
uint32_t bkv_placement_owners(const bkv_placement_t *placement, const bkv_key_t *key, uint16_t owners[BKV_REPLICAS_MAX]);

// The same for many keys: owners is [count][replicas], BKV_NO_MEMBER where there are too few.
void bkv_placement_owners_batch(const bkv_placement_t *placement, const bkv_key_t *keys, size_t count, uint16_t *owners);

// The owners of a slot, out of the table (if there is one), and by races: the definition, O(members).
uint32_t bkv_placement_slot_owners(const bkv_placement_t *placement, uint32_t slot, uint16_t owners[BKV_REPLICAS_MAX]);
uint32_t bkv_placement_race(const bkv_placement_t *placement, uint32_t slot, uint16_t owners[BKV_REPLICAS_MAX]);

uint32_t bkv_placement_count(const bkv_placement_t *placement); // of members
uint32_t bkv_placement_replicas(const bkv_placement_t *placement);
const bkv_placement_member_t *bkv_placement_member(const bkv_placement_t *placement, uint32_t member);
uint16_t bkv_placement_find(const bkv_placement_t *placement, const char *id); // BKV_NO_MEMBER: not there
uint64_t bkv_placement_bytes(const bkv_placement_t *placement);                // of memory

#endif
