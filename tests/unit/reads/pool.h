// pool.h - one daemon's cluster, real but for those that it asks: the other members are stores of this process, each with a
// temper of its own, asked by threads in the place of daemon/cluster/peer/.
//
// What the reading of the pool calls in members/membership.c, move/, peer/ and cluster.c is defined in pool.c, so this room's
// binary has none of these. Everything follows from the test and a seed, but for the order in which threads come to run.
#ifndef BKV_TEST_READS_POOL_H
#define BKV_TEST_READS_POOL_H

#include "daemon/cluster/internal.h"

#define MEMBERS    5
#define SELF       0    // the daemon under test
#define TIMEOUT_MS 5000 // who waits for it has waited; half of it is much work on a busy machine
#define TENANT     7u
#define NO_END     UINT64_MAX

// How a member answers.
typedef enum temper {
    GOOD,
    SILENT,    // not at all, until the question is given up or its deadline has passed
    STALLING,  // the first record begins to come, and never ends
    DAMAGING,  // a byte of each record is another one
    LYING,     // other records come, sound in themselves
    SHRINKING, // records are shorter than they say
    FAILING,   // the call breaks off before the first record
    VANISHING, // the call breaks off after half of the records
    DENYING,   // has nothing, whatever it has
    REFUSING,  // no question starts
} temper_t;

typedef struct bkv_peer {
    struct pool *pool;
    uint32_t number;
    bkv_store_t *store;
    _Atomic temper_t temper;
    _Atomic uint32_t delay_us;    // before it answers, and before each record
    _Atomic uint64_t latency_us;  // as its health says
    _Atomic uint64_t patience_us; // likewise
    _Atomic bool suspected;
    _Atomic uint32_t refs;                    // given out
    _Atomic uint32_t haves, fetches, forgets; // questions so far
    _Atomic uint32_t asked;                   // names in fetches so far
} peer_t;

typedef struct pool {
    bkv_cluster_t cluster;
    bkv_store_t *store; // of the daemon under test
    bkv_views_t views;
    const bkv_view_t *origin; // NULL: repair has nothing to do
    bkv_member_t members[MEMBERS];
    bool listed[MEMBERS];
    uint32_t replicas;
    peer_t peers[MEMBERS];  // [SELF] is not used
    _Atomic uint64_t calls; // under way
    pthread_mutex_t lock;
    pthread_cond_t changed; // a question has been given up
} pool_t;

// All members are listed and good, nobody has anything. arena_bytes: of the daemon's own store, the others have room enough.
pool_t *pool_new(uint32_t replicas, uint64_t arena_bytes);

// Waits until nothing is under way, and asserts that nothing is pinned, reserved or referred to.
void pool_free(pool_t *pool);

void pool_list(pool_t *pool, uint32_t member, bool listed); // takes effect with the next view
void pool_publish(pool_t *pool);
void pool_set_origin(pool_t *pool); // the present view is what repair starts from

// Records are told by numbers, from which their names, lengths and bytes follow.
bkv_name_t name_of(uint32_t number);
void names_of(uint32_t first, uint32_t count, bkv_name_t *names);
uint64_t length_of(uint32_t number);
void put_at(bkv_store_t *store, uint32_t number);
void put_owned(pool_t *pool, uint32_t number); // at all of its owners by the present view
bool has(bkv_store_t *store, uint32_t number);
bool is_record(const bkv_pin_t *pin, uint32_t number);

uint32_t owners_of(pool_t *pool, uint32_t number, uint32_t owners[BKV_REPLICAS_MAX]); // by the present view
// The first number from `from` on that these and nobody else own, SELF or not; the pool has two replicas.
uint32_t number_owned_by(pool_t *pool, uint32_t a, uint32_t b, uint32_t from);

// What is waited for.
typedef struct waiter {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    uint32_t done;
} waiter_t;

void waiter_init(waiter_t *waiter);
void waiter_done(void *waiter);
void waiter_wait(waiter_t *waiter); // for one done, for 20 s at most

// Fetches, waits, checks the bytes of what is there and unpins it. Returns how long it took.
uint64_t fetch_ms(pool_t *pool, const bkv_name_t *names, uint32_t count, uint32_t timeout_ms, bkv_status_t *statuses);
bkv_status_t fetch_one(pool_t *pool, uint32_t number);

uint64_t pinned(pool_t *pool);

#endif
