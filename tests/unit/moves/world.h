// world.h - a few members in one process: real stores and real movers, joined by made-up views and peers.
//
// In the place of etcd a test says who is a member; in the place of daemon/cluster/peer/ threads take records straight from store
// to store (wires.c). Both can be made to go wrong. What the mover and the placing of Puts call in members/membership.c, peer/ and
// cluster.c is defined here, so that this room's binary has none of these.
#ifndef BKV_TEST_MOVES_WORLD_H
#define BKV_TEST_MOVES_WORLD_H

#include "daemon/cluster/internal.h"

#include <criterion/criterion.h>

#define NODES        8
#define RECORD_BYTES 1024u
#define WAIT_MS      20000

// ThreadSanitizer is slow, and a round more finds no more.
#ifdef __SANITIZE_THREAD__
#define ROUNDS(n) (((n) + 3) / 4)
#else
#define ROUNDS(n) (n)
#endif

typedef struct world world_t;

struct bkv_membership {
    bkv_views_t views;
    _Atomic bkv_membership_state_t state;
};

struct bkv_peers {
    world_t *world;
    uint32_t from; // whose
    bkv_peer_t *known[NODES];
};

typedef struct node {
    char id[BKV_MEMBER_NAME_MAX];
    pthread_mutex_t lock; // held while somebody else looks at the store; guards:
    bool up;              // there is a process
    bkv_store_t *store;   // NULL: there is none, and nothing to come back with
    bkv_mover_t *mover;
    bkv_membership_t membership;
    bkv_peers_t peers;
    bkv_cluster_t cluster; // for bkv_cluster_place
} node_t;

struct world {
    node_t nodes[NODES];
    bkv_member_t members[NODES]; // as etcd has them, by number
    bool listed[NODES];          // there
    uint64_t epochs;             // given so far
    uint32_t replicas;
    uint64_t delay_ms, rate; // of movers that are started from now on
    uint32_t keys;           // put so far: numbers 0 to keys - 1

    // What goes wrong. May be changed at any time.
    _Atomic uint32_t failing;  // of 100 calls
    _Atomic uint32_t refusing; // of 100 records
    _Atomic uint32_t slow_us;  // a call takes up to so long
    _Atomic uint32_t silent;   // bits of nodes that do not answer
    _Atomic uint32_t deaf;     // bits of nodes that cannot be reached

    // What has happened.
    _Atomic uint64_t haves, stores;   // calls
    _Atomic uint64_t stored, in_vain; // records sent: those taken, and those that were there already

    pthread_mutex_t lock; // of the wires
    pthread_cond_t changed;
    struct job *jobs;
    uint32_t running; // jobs
    _Atomic bool ending;
    uint64_t state; // of the dice
    pthread_t threads[2];
};

world_t *world_new(uint64_t seed, uint32_t replicas);
void world_free(world_t *world); // crashes whoever is up
void wires_start(world_t *world);
void wires_stop(world_t *world); // ends what is under way, as CANCELLED

uint32_t world_dice(world_t *world, uint32_t sides);

// A node comes up; a member it is once it is listed. One that went down with its memory has its records again.
void node_start(world_t *world, uint32_t number);
void node_crash(world_t *world, uint32_t number, bool memory);

// What etcd says; nobody sees it before he is told.
void world_list(world_t *world, uint32_t number, uint32_t weight); // under a new epoch
void world_unlist(world_t *world, uint32_t number);
void world_drain(world_t *world, uint32_t number, bool draining);
void world_tell(world_t *world, uint32_t number);
void world_tell_all(world_t *world); // that are up

// Nodes 0 to count - 1, up, listed and settled.
void world_begin(world_t *world, uint32_t count);

void world_put(world_t *world,
               uint32_t count); // more records, each at its owners by the view of somebody, as far as they are up
void world_put_at(world_t *world, uint32_t number, uint32_t key); // a record at this node alone

bkv_name_t name_of(uint32_t key);
bool node_has(world_t *world, uint32_t number, uint32_t key);
bool world_owns(world_t *world, uint32_t number, uint32_t key); // by the list
uint32_t world_share(world_t *world, uint32_t number);          // how many records it owns

bool world_idle(world_t *world);            // no mover that is up has anything to do
void world_settle(world_t *world);          // waits for that
void world_check(world_t *world, bool all); // what anybody has, all its owners have; all: nothing is lost

bkv_mover_progress_t node_progress(world_t *world, uint32_t number);
bkv_mover_metrics_t node_metrics(world_t *world, uint32_t number);
bkv_store_metrics_t node_store(world_t *world, uint32_t number);

void nap_ms(uint32_t ms);

#define EVENTUALLY(condition)                                                                                                  \
    do {                                                                                                                       \
        uint64_t until_ms = bkv_now_ms() + WAIT_MS;                                                                            \
        while (!(condition)) {                                                                                                 \
            cr_assert(bkv_now_ms() < until_ms, "not within %d ms: %s", WAIT_MS, #condition);                                   \
            nap_ms(2);                                                                                                         \
        }                                                                                                                      \
    } while (0)

#endif
