// read.c - find and pin, verify, unpin; peek; drop; leases.
#include "internal.h"

#include "kernels/seal.h"

#include <assert.h>
#include <string.h>

// Enough of a key to find it in a log.
#define KEY_FORMAT "%02x%02x%02x%02x%02x%02x%02x%02x..."
#define KEY_ARGS(k)                                                                                                            \
    (k)->bytes[0], (k)->bytes[1], (k)->bytes[2], (k)->bytes[3], (k)->bytes[4], (k)->bytes[5], (k)->bytes[6], (k)->bytes[7]

typedef struct bkv_found {
    bkv_shard_t *shard; // locked
    uint32_t entry;     // BKV_NO_ENTRY: not there
    bool expired;       // there, but its time is over
} bkv_found_t;

// Locks the key's shard, and looks.
static bkv_found_t find(bkv_store_t *store, const bkv_spec_id_t *spec_id, const bkv_key_t *key, uint64_t now_ms) {
    uint64_t hash = bkv_index_hash_key(&store->index, key);
    bkv_found_t found = {.shard = bkv_index_shard(&store->index, hash)};
    pthread_mutex_lock(&found.shard->lock);
    found.entry = bkv_index_find(&store->index, found.shard, hash, spec_id, key);
    found.expired = found.entry != BKV_NO_ENTRY && bkv_entry_expired(&store->index.entries[found.entry], now_ms);
    return found;
}

// Takes out a record whose time is over, unless it has been replaced meanwhile.
static void leave_expired(bkv_store_t *store, const bkv_spec_id_t *spec_id, const bkv_key_t *key, uint64_t now_ms) {
    pthread_mutex_lock(&store->space);
    bkv_found_t found = find(store, spec_id, key, now_ms);
    if (found.expired) {
        bkv_store_leave(store, found.shard, found.entry, BKV_LEAVE_EXPIRED);
    }
    pthread_mutex_unlock(&found.shard->lock);
    pthread_mutex_unlock(&store->space);
}

bkv_status_t bkv_store_pin_entry(bkv_store_t *store, bkv_shard_t *shard, uint32_t entry, bkv_pin_t *pin, bkv_error_t *err) {
    bkv_entry_t *e = &store->index.entries[entry];
    if (e->pins == BKV_PINS_MAX) {
        return bkv_fail(err, BKV_BUSY, "key: " KEY_FORMAT " is being read %u times already", KEY_ARGS(&e->key), BKV_PINS_MAX);
    }
    e->pins++;
    e->flags |= BKV_ENTRY_VISITED;
    e->used = bkv_store_turn(store);
    shard->pinned++;
    *pin = (bkv_pin_t){
        .data = bkv_arena_at(&store->arena, e->page),
        .length = bkv_entry_length(e),
        .entry = entry,
        .shard = (uint32_t)(shard - store->index.shards),
    };
    return BKV_OK;
}

bkv_status_t bkv_store_pin_unverified(bkv_store_t *store, const bkv_spec_id_t *spec_id, const bkv_key_t *key, uint64_t now_ms,
                                      bkv_pin_t *pin, bkv_error_t *err) {
    bkv_found_t found = find(store, spec_id, key, now_ms);
    if (found.entry == BKV_NO_ENTRY || found.expired) {
        found.shard->misses++;
        pthread_mutex_unlock(&found.shard->lock);
        if (found.expired) {
            leave_expired(store, spec_id, key, now_ms);
        }
        return bkv_fail(err, BKV_NOT_FOUND, "key: " KEY_FORMAT " is not here", KEY_ARGS(key));
    }
    bkv_status_t status = bkv_store_pin_entry(store, found.shard, found.entry, pin, err);
    found.shard->hits += status == BKV_OK;
    pthread_mutex_unlock(&found.shard->lock);
    return status;
}

// The whole record is summed at every pin, outside of any lock: memory decays at any time, and the arena may be shared.
bkv_status_t bkv_store_pin(bkv_store_t *store, const bkv_spec_id_t *spec_id, const bkv_key_t *key, uint64_t now_ms,
                           bkv_pin_t *pin, bkv_error_t *err) {
    bkv_status_t status = bkv_store_pin_unverified(store, spec_id, key, now_ms, pin, err);
    if (status != BKV_OK) {
        return status;
    }
    status = bkv_record_verify(pin->data, pin->length, err);
    if (status != BKV_OK) {
        bkv_store_damaged(store, pin);
        bkv_store_unpin(store, pin);
    }
    return status;
}

// The caller's pin keeps the entry, but somebody else may have taken it out already.
void bkv_store_damaged(bkv_store_t *store, const bkv_pin_t *pin) {
    pthread_mutex_lock(&store->space);
    bkv_shard_t *shard = bkv_index_lock_entry(&store->index, pin->entry);
    if (store->index.entries[pin->entry].flags & BKV_ENTRY_LINKED) {
        bkv_store_leave(store, shard, pin->entry, BKV_LEAVE_CORRUPT);
    }
    pthread_mutex_unlock(&shard->lock);
    pthread_mutex_unlock(&store->space);
}

void bkv_store_unpin(bkv_store_t *store, const bkv_pin_t *pin) {
    bkv_shard_t *shard = &store->index.shards[pin->shard];
    pthread_mutex_lock(&shard->lock);
    bkv_entry_t *e = &store->index.entries[pin->entry];
    assert(e->pins > 0);
    e->pins--;
    shard->pinned--;
    bool last_of_gone = e->pins == 0 && !(e->flags & BKV_ENTRY_LINKED);
    pthread_mutex_unlock(&shard->lock);
    if (last_of_gone) { // nobody else can find it now, so that it waits for us
        pthread_mutex_lock(&store->space);
        bkv_store_last_unpin(store, pin->entry);
        pthread_mutex_unlock(&store->space);
    }
}

bool bkv_store_contains(bkv_store_t *store, const bkv_spec_id_t *spec_id, const bkv_key_t *key, uint64_t now_ms) {
    bkv_found_t found = find(store, spec_id, key, now_ms);
    pthread_mutex_unlock(&found.shard->lock);
    return found.entry != BKV_NO_ENTRY && !found.expired;
}

bool bkv_store_peek(bkv_store_t *store, const bkv_spec_id_t *spec_id, const bkv_key_t *key, uint64_t now_ms,
                    bkv_record_header_t *header, uint64_t *length) {
    bkv_found_t found = find(store, spec_id, key, now_ms);
    bool there = found.entry != BKV_NO_ENTRY && !found.expired;
    if (there) { // while it is linked, which the shard's lock keeps it, its slot is its own
        const bkv_entry_t *e = &store->index.entries[found.entry];
        memcpy(header, bkv_arena_at(&store->arena, e->page), sizeof(*header));
        *length = bkv_entry_length(e);
    }
    pthread_mutex_unlock(&found.shard->lock);
    return there;
}

bool bkv_store_drop(bkv_store_t *store, const bkv_spec_id_t *spec_id, const bkv_key_t *key, uint64_t now_ms) {
    pthread_mutex_lock(&store->space);
    bkv_found_t found = find(store, spec_id, key, now_ms);
    if (found.entry != BKV_NO_ENTRY) {
        bkv_store_leave(store, found.shard, found.entry, found.expired ? BKV_LEAVE_EXPIRED : BKV_LEAVE_DROPPED);
    }
    pthread_mutex_unlock(&found.shard->lock);
    pthread_mutex_unlock(&store->space);
    return found.entry != BKV_NO_ENTRY && !found.expired;
}

// [space]
static bkv_status_t lease_one(bkv_store_t *store, const bkv_spec_id_t *spec_id, const bkv_key_t *key, uint32_t number,
                              uint32_t lease, uint64_t now_ms, bkv_error_t *err) {
    bkv_found_t found = find(store, spec_id, key, now_ms);
    bkv_status_t status = BKV_OK;
    if (found.entry == BKV_NO_ENTRY || found.expired) {
        status = bkv_fail(err, BKV_NOT_FOUND, "keys[%u]: " KEY_FORMAT " is not here", number, KEY_ARGS(key));
    } else if (store->index.entries[found.entry].leases == BKV_LEASES_MAX) {
        status = bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "keys[%u]: " KEY_FORMAT " has %u leases already", number, KEY_ARGS(key),
                          BKV_LEASES_MAX);
    } else {
        store->index.entries[found.entry].leases++;
        bkv_leases_add(&store->leases, lease, found.entry);
    }
    pthread_mutex_unlock(&found.shard->lock);
    return status;
}

bkv_status_t bkv_store_lease(bkv_store_t *store, const bkv_spec_id_t *spec_id, const bkv_key_t *keys, uint32_t count,
                             uint64_t ttl_ms, uint64_t now_ms, uint64_t *lease, bkv_error_t *err) {
    pthread_mutex_lock(&store->space);
    bkv_store_end_leases(store, now_ms);
    uint32_t l;
    bkv_status_t status = bkv_leases_begin(&store->leases, count, bkv_store_deadline(now_ms, ttl_ms), &l, err);
    if (status == BKV_OK) {
        for (uint32_t i = 0; status == BKV_OK && i < count; i++) {
            status = lease_one(store, spec_id, &keys[i], i, l, now_ms, err);
        }
        if (status == BKV_OK) {
            *lease = store->leases.lease[l].id;
        } else {
            bkv_store_end_lease(store, l);
        }
    }
    pthread_mutex_unlock(&store->space);
    return status;
}

bkv_status_t bkv_store_unlease(bkv_store_t *store, uint64_t lease, bkv_error_t *err) {
    pthread_mutex_lock(&store->space);
    uint32_t l = bkv_leases_find(&store->leases, lease);
    if (l != BKV_NO_LEASE) {
        bkv_store_end_lease(store, l);
    }
    pthread_mutex_unlock(&store->space);
    return l != BKV_NO_LEASE
               ? BKV_OK
               : bkv_fail(err, BKV_NOT_FOUND, "lease: %016llx is unknown or has ended", (unsigned long long)lease);
}
