// lease.h - promises to keep entries for a while: a bounded table from lease id to entries and expiry.
//
// An id is the right to end the lease, so it is 64 random bits: it cannot be guessed. Entries count their leases themselves
// (index.h); this file only remembers which to give back. Not thread-safe: the caller holds the store's space lock.
#ifndef BKV_LEASE_H
#define BKV_LEASE_H

#include "kernels/status.h"

#include <stdbool.h>
#include <stdint.h>

#define BKV_NO_LEASE UINT32_MAX

typedef struct bkv_lease {
    uint64_t id; // 0: free
    uint64_t expires_ms;
    uint32_t keys; // first in the pool of keys
    uint32_t next; // of its chain, or of the free ones
} bkv_lease_t;

typedef struct bkv_lease_key {
    uint32_t entry, next;
} bkv_lease_key_t;

typedef struct bkv_leases {
    bkv_lease_t *lease; // [max]
    bkv_lease_key_t *key;
    uint32_t *buckets; // [bucket_mask + 1], by low bits of the id, which is random enough
    uint32_t max, max_keys, bucket_mask;
    uint32_t free, free_keys; // first of each
    uint32_t count, key_count;
    uint64_t next_expiry_ms; // no lease ends before
    uint32_t cursor;         // where find_ended goes on
} bkv_leases_t;

bkv_status_t bkv_leases_init(bkv_leases_t *leases, uint32_t max, uint32_t max_keys, bkv_error_t *err);
void bkv_leases_deinit(bkv_leases_t *leases);

// A new lease without entries. RESOURCE_EXHAUSTED: there are `max` already, or not `keys` keys left.
bkv_status_t bkv_leases_begin(bkv_leases_t *leases, uint32_t keys, uint64_t expires_ms, uint32_t *lease, bkv_error_t *err);

// Adds an entry, one of the `keys` that begin was asked for.
void bkv_leases_add(bkv_leases_t *leases, uint32_t lease, uint32_t entry);

// The lease with this id; BKV_NO_LEASE.
uint32_t bkv_leases_find(const bkv_leases_t *leases, uint64_t id);

// A lease whose time is over; BKV_NO_LEASE when there is none. Looks at all of them, but only when one may be.
uint32_t bkv_leases_find_ended(bkv_leases_t *leases, uint64_t now_ms);

// Takes an entry off the lease; false, and the lease is gone, when there is none left.
bool bkv_leases_end(bkv_leases_t *leases, uint32_t lease, uint32_t *entry);

#endif
