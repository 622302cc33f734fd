// giving.h - records that Puts give to owners: those that wait while a call to an owner is under way go together in its next one.
//
// A busy daemon so needs a few calls for many records, an idle one waits for nothing. One call at a time to each owner, and up to
// four when as much waits as fits in a call. A gift whose deadline is near goes at once and alone. Thread-safe.
#ifndef BKV_GIVING_H
#define BKV_GIVING_H

#include "daemon/cluster/peer/peers.h"

#include <pthread.h>

typedef struct bkv_gift bkv_gift_t;

// One record for one owner; its giver's, until done has been called.
struct bkv_gift {
    bkv_peer_t *peer; // whose reference is the giver's
    bkv_name_t name;
    uint64_t bytes; // of the record, about
    uint64_t deadline_ms;
    bool ask; // only whether the owner has it
    // OK: it has it now. ALREADY_EXISTS: it had it. NOT_FOUND: nobody has, neither this store (`ask`: neither that owner). Else it
    // could not be reached or did not take it. On a thread of the peers', or in bkv_giving_give.
    void (*done)(bkv_gift_t *gift, bkv_status_t result);
    bkv_gift_t *next; // giving's own
};

#define BKV_GIVING_BUCKETS 64

typedef struct bkv_giving {
    uint32_t timeout_ms; // the peers'
    pthread_mutex_t lock;
    struct bkv_giving_lane *lanes[BKV_GIVING_BUCKETS]; // [lock] of owners that something is under way to
} bkv_giving_t;

void bkv_giving_init(bkv_giving_t *giving, uint32_t timeout_ms);
void bkv_giving_deinit(bkv_giving_t *giving); // nothing may be under way

void bkv_giving_give(bkv_giving_t *giving, bkv_gift_t *gift);

#endif
