// internal.h - what the store's own files share: the store itself, its locks, and how a record leaves.
//
// Files: store.c (create, destroy, quotas, tick, metrics), write.c (reserve, publish, adopt, abort), read.c (pin, unpin,
// contains, peek, drop, leases), copy.c (copies, and lists of what is none), evict.c (making room), leave.c (the ways out of
// the store, below), recover.c (a predecessor's arena), over the structures arena, slab, index, sieve, tenant and lease.
//
// Locks. `space` guards slabs, queues, tenants, leases, the pool of entries and `counts`; a shard's lock guards what index.h
// says. Order: space, then one shard. A pin and an unpin take one shard's lock only, but for the last unpin of a record that
// has gone meanwhile. No lock is held while a record's bytes are written, copied or summed.
//
// Life of an entry: alloc -> linked -> gone -> (free). Leaving (drop, expiry, eviction, damage) unlinks it at once and takes
// LIVE off its slot, so that neither a find nor a successor sees it again. Its slot is given back when the last pin goes, the
// entry when also the last lease does.
#ifndef BKV_STORE_INTERNAL_H
#define BKV_STORE_INTERNAL_H

#include "evict.h"
#include "index.h"
#include "lease.h"
#include "slab.h"
#include "store.h"
#include "tenant.h"

#define BKV_PINS_MAX   UINT16_MAX
#define BKV_LEASES_MAX UINT16_MAX // on one entry

struct bkv_store {
    bkv_arena_t arena;
    bkv_slabs_t slabs;
    bkv_index_t index;
    bkv_evict_t evict;
    bkv_tenants_t tenants;
    bkv_leases_t leases;
    pthread_mutex_t space;
    bkv_store_metrics_t counts; // all but hits, misses and pinned, which the shards count, and leases
    uint64_t filling;           // slots reserved and not yet published or given back
    uint32_t tick_cursor;       // entry that the next tick begins with
    uint32_t turn;              // publishes so far: the clock that ages are told by. Written under space, read anywhere
};

// Why a record leaves: the counter that goes up.
typedef enum bkv_leave_cause {
    BKV_LEAVE_DROPPED,
    BKV_LEAVE_CAPACITY,
    BKV_LEAVE_QUOTA,
    BKV_LEAVE_SLAB,
    BKV_LEAVE_EXPIRED,
    BKV_LEAVE_CORRUPT,
} bkv_leave_cause_t;

// [space, the entry's shard] Takes a linked entry out. It must not be touched afterwards unless the caller holds a pin on it.
void bkv_store_leave(bkv_store_t *store, bkv_shard_t *shard, uint32_t entry, bkv_leave_cause_t cause);

// [space, the entry's shard] Says whether a linked entry is a copy.
void bkv_store_mark_copy(bkv_store_t *store, uint32_t entry, bool copy);

// [space] Gives back the slot of a gone entry whose last pin has been taken off.
void bkv_store_last_unpin(bkv_store_t *store, uint32_t entry);

// [space] Ends the lease, or all those whose time is over.
void bkv_store_end_lease(bkv_store_t *store, uint32_t lease);
void bkv_store_end_leases(bkv_store_t *store, uint64_t now_ms);

// [space] Takes a free slot for the tenant, or the one where a predecessor's record is (see bkv_slabs_adopt), or gives one back;
// and keeps the accounts.
bool bkv_store_take_slot(bkv_store_t *store, uint32_t tenant, uint32_t size_class, uint32_t *page);
void bkv_store_adopt_slot(bkv_store_t *store, uint32_t tenant, uint32_t slab, uint32_t size_class, uint32_t index);
void bkv_store_give_slot(bkv_store_t *store, uint32_t tenant, uint32_t page);

// [space] Makes the record in a slot an entry: everything but the arena's LIVE, which the caller has set. `entry` is fresh from
// the pool with key, page, length, expires_ms and tenant set, and COPY if it is one.
void bkv_store_enter(bkv_store_t *store, uint32_t entry);

// [shard] Pins a linked entry, which counts as a use. BUSY: too many pins on it.
bkv_status_t bkv_store_pin_entry(bkv_store_t *store, bkv_shard_t *shard, uint32_t entry, bkv_pin_t *pin, bkv_error_t *err);

// [space] The tenant table's slot of a tag; BKV_NO_TENANT when it is full. Between hold and let_go it stays that tenant's.
uint32_t bkv_store_hold_tenant(bkv_store_t *store, uint64_t tag);
void bkv_store_let_go_tenant(bkv_store_t *store, uint32_t tenant);

uint32_t bkv_store_turn(const bkv_store_t *store);

// now + ttl, at most the end of time.
uint64_t bkv_store_deadline(uint64_t now_ms, uint64_t ttl_ms);

#endif
