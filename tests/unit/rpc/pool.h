// pool.h - a pool for the server under test, of records that this process makes when they are asked for.
//
// What the server calls in daemon/cluster/{fetch,lookup,forget}.c comes here first (--wrap, tests/module.mk), and goes on to the
// real functions where the cluster is a real one.
#ifndef BKV_TEST_RPC_POOL_H
#define BKV_TEST_RPC_POOL_H

#include "rig.h"

#define POOL_RECORDS 512 // numbers below this, as of rig_key; their payload is rig_payload(RIG_BLOCK, number + 1)

typedef struct pool {
    bkv_store_t *store;
    uint8_t spec_id[BKV_SPEC_ID_BYTES];
    _Atomic bool has[POOL_RECORDS];
    _Atomic bkv_status_t fails[POOL_RECORDS]; // what comes in the place of the record; BKV_OK: the record
    _Atomic uint32_t delay_us;                // of an answer; 0: it comes before the question returns
    _Atomic uint32_t most;                    // records for which there is room in an answer; 0: as the store says
    _Atomic bool vanish;                      // what has been brought is dropped before anybody sees it
    _Atomic uint32_t fetches, asked, longest; // questions, names in them, and in one of them at most
    _Atomic uint32_t used;
    _Atomic uint32_t under_way;
} pool_t;

// The rig's daemon is in a pool that has nothing yet. The spec is opened as by rig_open.
void pool_open(pool_t *pool, rig_t *rig, bool sharing);
void pool_close(pool_t *pool, rig_t *rig); // asserts that nothing is under way

void pool_add(pool_t *pool, uint32_t first, uint32_t count);
void pool_put(pool_t *pool, uint32_t number); // to the daemon's own store

#endif
