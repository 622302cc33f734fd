// route.h - calls that go to the daemons that own their blocks, where the options ask for it.
//
// The client learns members, seed and replicas by the Cluster call, of which any daemon answers, and places keys by the very code
// that the daemons do (proto/placement.h), without its table. Until the answer is there, and where there is no cluster, calls go
// where they would go anyway. It asks again every 10 s while calls are routed, and soon after an endpoint went down. What it knows
// may be old: any daemon answers for all, so a call that goes to the wrong one is slower, never wrong.
//
// A member is reached at the endpoint of the client's list that has one of its addresses, or that is the one who answered; else at
// its first address, over an endpoint that is made then (endpoint.h). A member that is down is passed over for a key's next owner.
//
// A Lookup or Get of keys of several owners is split into one part for each first owner, a call of its own, and what they bring is
// put together in the order of the whole (bkv_fan_t). A Put is compressed where it arrives, which is best done by the daemon on this
// host: only a client without one sends it to the owner, whole, where its blocks have the same first owner.
#ifndef BKV_CLIENT_ROUTE_H
#define BKV_CLIENT_ROUTE_H

#include "client/call.h"

typedef struct bkv_client_map bkv_client_map_t; // who the members are and where

typedef struct bkv_client_route {
    // Under the client's lock.
    bkv_client_map_t *map; // counted; NULL: not known
    bool asking;
    uint64_t asked_ns, ask_ns; // when it was asked; when to ask again
} bkv_client_route_t;

void bkv_client_route_deinit(bkv_client_t *client);

// An endpoint went down: the members may have changed. The lock must be held.
void bkv_client_route_stale(bkv_client_t *client);

// Keys that go to the same place.
typedef struct bkv_client_part {
    bkv_client_endpoint_t *owners[BKV_CALL_OWNERS]; // of the first of them; none: as any call
    uint32_t owner_count;
    size_t count;
    size_t *numbers; // [count], ascending: which of the whole's they are
    bkv_key_t *keys; // [count]
} bkv_client_part_t;

typedef struct bkv_client_split {
    size_t count;
    bkv_client_part_t parts[];
} bkv_client_split_t;

// By first owner. NULL: nothing is known, or no memory: the keys go as they are. The caller frees it with free().
bkv_client_split_t *bkv_client_route_split(bkv_client_t *client, const bkv_key_t *keys, size_t count);

// Has a call that is not started yet go to those owners first.
void bkv_client_route_to(bkv_call_t *call, const bkv_client_part_t *part);

// ---- fan.c: one call made of several ----

// The first member of a call that has parts. Its kind's `start` and `clean` are bkv_fan_start and bkv_fan_clean; its `finish` puts
// the results together, after bkv_fan_finish. It has no attempts of its own.
typedef struct bkv_fan {
    bkv_call_t call; // first
    bkv_client_split_t *split;
    bkv_call_t **parts; // [split->count]
    _Atomic size_t left;
} bkv_fan_t;

// As bkv_call_new. Takes the split over on success.
void *bkv_fan_new(size_t size, const bkv_call_kind_t *kind, bkv_client_t *client, const bkv_spec_id_t *id, uint32_t timeout_ms,
                  bkv_client_split_t *split);

// The call for part i, which is the fan's from here on. Every part must be given before the fan is started or freed.
void bkv_fan_set(bkv_fan_t *fan, size_t i, bkv_call_t *part);

void bkv_fan_start(bkv_call_t *call);
void bkv_fan_clean(bkv_call_t *call);

// Finishes the parts. The fan's error is then that of the first part that has one.
void bkv_fan_finish(bkv_fan_t *fan);

#endif
