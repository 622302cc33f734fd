// write.c - reserve, fill (the caller's), publish, adopt or abort.
#include "internal.h"

#include <assert.h>
#include <string.h>

#define EXCHANGE_STEPS 2 // size classes that a record must be smaller than its slot to be moved: about a quarter

typedef unsigned long long ull;

// What is said of a record beside what its header says.
typedef struct bkv_terms {
    uint64_t ttl_ms, raw_bytes;
    bool copy, adopted;
} bkv_terms_t;

static bkv_status_t reserve_for(bkv_store_t *store, uint32_t tenant, uint32_t size_class, uint64_t now_ms, bkv_slot_t *slot,
                                bkv_error_t *err) {
    uint64_t bytes = bkv_slabs_slot_bytes(&store->slabs, size_class);
    uint64_t quota = bkv_tenants_quota(&store->tenants, tenant);
    if (bytes > quota) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "tenant_quota: %llu bytes, less than the %llu that this record takes",
                        (ull)quota, (ull)bytes);
    }
    if (!bkv_evict_for_quota(store, tenant, bytes, now_ms)) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "tenant_quota: %llu bytes are in use, all pinned, leased or being filled",
                        (ull)quota);
    }
    uint64_t allowed = quota - store->tenants.slot[tenant].used;
    uint32_t page;
    if (!bkv_evict_any_slot(store, tenant, size_class, allowed, now_ms, &page)) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED,
                        "arena: no room for %llu bytes, all that is large enough is pinned, leased or being filled",
                        (ull)bytes);
    }
    slot->data = bkv_arena_at(&store->arena, page);
    slot->capacity = bkv_slabs_bytes_of(&store->slabs, page);
    slot->page = page;
    slot->quota = tenant;
    store->filling++;
    return BKV_OK;
}

bkv_status_t bkv_store_reserve(bkv_store_t *store, uint64_t tenant, uint64_t length, uint64_t now_ms, bkv_slot_t *slot,
                               bkv_error_t *err) {
    *slot = (bkv_slot_t){.tenant = tenant};
    pthread_mutex_lock(&store->space);
    uint32_t size_class = bkv_slabs_class_for(&store->slabs, length);
    bkv_status_t status;
    if (size_class == BKV_NO_CLASS) {
        status = bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "length: a record of %llu bytes is larger than a slab, %llu bytes",
                          (ull)length, (ull)store->arena.slab_bytes);
    } else {
        bkv_store_end_leases(store, now_ms);
        uint32_t slot_of_tenant = bkv_store_hold_tenant(store, tenant);
        if (slot_of_tenant == BKV_NO_TENANT) {
            status =
                bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "tenant: %u tenants have records or quotas already", BKV_TENANTS_MAX);
        } else {
            status = reserve_for(store, slot_of_tenant, size_class, now_ms, slot, err);
            bkv_store_let_go_tenant(store, slot_of_tenant);
        }
    }
    if (status != BKV_OK) {
        store->counts.full_total++;
    }
    pthread_mutex_unlock(&store->space);
    return status;
}

// [space]
static void give_back(bkv_store_t *store, bkv_slot_t *slot) {
    assert(store->filling > 0);
    store->filling--;
    bkv_store_give_slot(store, slot->quota, slot->page);
    slot->data = NULL;
}

void bkv_store_abort(bkv_store_t *store, bkv_slot_t *slot) {
    pthread_mutex_lock(&store->space);
    store->counts.aborted_total++;
    give_back(store, slot);
    pthread_mutex_unlock(&store->space);
}

// Moves a record into a slot that fits it better. Reservations are made for the worst case; if the records stayed in such slots,
// the arena would be full of air. It may cost a victim of the better class, just as a reservation of that size would have;
// staying would cost as much room and more. Neither slot is LIVE meanwhile, so that a crash loses the record and nothing else.
static void exchange(bkv_store_t *store, bkv_slot_t *slot, uint64_t length, uint64_t now_ms) {
    uint32_t page;
    pthread_mutex_lock(&store->space);
    uint32_t fitting = bkv_slabs_class_for(&store->slabs, length);
    bool moved = fitting + EXCHANGE_STEPS <= bkv_slabs_class_of(&store->slabs, slot->page) &&
                 bkv_evict_slot(store, slot->quota, fitting, now_ms, &page);
    pthread_mutex_unlock(&store->space);
    if (!moved) {
        return;
    }
    memcpy(bkv_arena_at(&store->arena, page), slot->data, length);
    pthread_mutex_lock(&store->space);
    bkv_store_give_slot(store, slot->quota, slot->page);
    slot->page = page;
    slot->data = bkv_arena_at(&store->arena, page);
    slot->capacity = bkv_slabs_bytes_of(&store->slabs, page);
    pthread_mutex_unlock(&store->space);
}

// [space] ALREADY_EXISTS: there is a record of this key and spec, pinned now if that is wanted; one whose time is over makes way.
// Who brings no mere copy makes the older one more than that too.
static bkv_status_t meet_older(bkv_store_t *store, const bkv_spec_id_t *spec_id, const bkv_key_t *key, bool copy,
                               uint64_t now_ms, bkv_pin_t *pin, bkv_error_t *err) {
    uint64_t hash = bkv_index_hash_key(&store->index, key);
    bkv_shard_t *shard = bkv_index_shard(&store->index, hash);
    pthread_mutex_lock(&shard->lock);
    uint32_t entry = bkv_index_find(&store->index, shard, hash, spec_id, key);
    if (entry != BKV_NO_ENTRY && bkv_entry_expired(&store->index.entries[entry], now_ms)) {
        bkv_store_leave(store, shard, entry, BKV_LEAVE_EXPIRED);
        entry = BKV_NO_ENTRY;
    }
    bkv_status_t status = BKV_OK;
    if (entry != BKV_NO_ENTRY) {
        store->counts.duplicates_total++;
        if (!copy) {
            bkv_store_mark_copy(store, entry, false);
        }
        status = pin != NULL ? bkv_store_pin_entry(store, shard, entry, pin, err) : BKV_OK;
        status = status == BKV_OK ? bkv_fail(err, BKV_ALREADY_EXISTS, "key: it is resident already") : status;
    }
    pthread_mutex_unlock(&shard->lock);
    return status;
}

// [space] Pins a record that nobody else can have pinned yet.
static void pin_new(bkv_store_t *store, uint32_t entry, bkv_pin_t *pin) {
    bkv_shard_t *shard = bkv_index_lock_entry(&store->index, entry);
    bkv_status_t status = bkv_store_pin_entry(store, shard, entry, pin, NULL);
    pthread_mutex_unlock(&shard->lock);
    assert(status == BKV_OK);
    (void)status;
}

// [space] The pool's next entry, after an eviction if need be.
static uint32_t new_entry(bkv_store_t *store, uint32_t size_class, uint64_t now_ms) {
    uint32_t entry = bkv_index_alloc(&store->index);
    if (entry == BKV_NO_ENTRY && bkv_evict_entry(store, size_class, now_ms)) {
        entry = bkv_index_alloc(&store->index);
    }
    return entry;
}

// [space]
static bkv_status_t publish(bkv_store_t *store, const bkv_slot_t *slot, const bkv_key_t *key, const bkv_spec_id_t *spec_id,
                            uint64_t length, const bkv_terms_t *terms, uint64_t now_ms, bkv_pin_t *pin, bkv_error_t *err) {
    bkv_status_t status = meet_older(store, spec_id, key, terms->copy, now_ms, pin, err);
    if (status != BKV_OK) {
        return status;
    }
    uint32_t entry = new_entry(store, bkv_slabs_class_of(&store->slabs, slot->page), now_ms);
    if (entry == BKV_NO_ENTRY) {
        store->counts.aborted_total++;
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "max_entries: all %u are pinned or leased", store->index.capacity);
    }
    bkv_entry_t *e = &store->index.entries[entry];
    e->key = *key;
    e->expires_ms = terms->ttl_ms != 0 ? bkv_store_deadline(now_ms, terms->ttl_ms) : 0;
    e->page = slot->page;
    e->length = (uint32_t)(length / BKV_RECORD_ALIGN);
    e->tenant = (uint16_t)slot->quota;
    e->flags = terms->copy ? BKV_ENTRY_COPY : 0;
    bkv_arena_set_state(&store->arena, slot->page, BKV_SLOT_LIVE);
    __atomic_store_n(&store->turn, store->turn + 1, __ATOMIC_RELAXED);
    bkv_store_enter(store, entry);
    if (pin != NULL) {
        pin_new(store, entry, pin);
    }
    return BKV_OK;
}

// What publish takes from the header, checked against the slot. The header was written by this process, but perhaps copied off
// the wire: a mistake there must not reach the accounts.
static bkv_status_t check(const bkv_record_header_t *header, const bkv_slot_t *slot, bkv_error_t *err) {
    bkv_status_t status = bkv_record_check_header(header, slot->capacity, err);
    if (status != BKV_OK) {
        return status;
    }
    if (header->tenant != slot->tenant) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "tenant: the record's is not the one that the slot was reserved for");
    }
    return BKV_OK;
}

static void count_publish(bkv_store_t *store, const bkv_terms_t *terms, uint64_t length) {
    if (terms->adopted) {
        store->counts.adopted_total++;
        return;
    }
    store->counts.published_total++;
    store->counts.raw_bytes_total += terms->raw_bytes;
    store->counts.stored_bytes_total += length;
}

static bkv_status_t publish_slot(bkv_store_t *store, bkv_slot_t *slot, const bkv_terms_t *terms, uint64_t now_ms,
                                 bkv_pin_t *pin, bkv_error_t *err) {
    _Alignas(BKV_RECORD_ALIGN) bkv_record_header_t header;
    memcpy(&header, slot->data, sizeof(header));
    bkv_status_t status = check(&header, slot, err);
    if (status != BKV_OK) {
        bkv_store_abort(store, slot);
        return status;
    }
    bkv_key_t key;
    bkv_spec_id_t spec_id;
    memcpy(key.bytes, header.key, sizeof(key.bytes));
    memcpy(spec_id.bytes, header.spec_id, sizeof(spec_id.bytes));
    if (!bkv_store_contains(store, &spec_id, &key, now_ms)) {
        exchange(store, slot, header.length, now_ms);
    }
    pthread_mutex_lock(&store->space);
    status = publish(store, slot, &key, &spec_id, header.length, terms, now_ms, pin, err);
    if (status == BKV_OK) {
        count_publish(store, terms, header.length);
        store->filling--;
        slot->data = NULL;
    } else {
        give_back(store, slot);
    }
    pthread_mutex_unlock(&store->space);
    return status;
}

bkv_status_t bkv_store_publish(bkv_store_t *store, bkv_slot_t *slot, uint64_t ttl_ms, uint64_t raw_bytes, uint64_t now_ms,
                               bkv_error_t *err) {
    return bkv_store_publish_pinned(store, slot, ttl_ms, raw_bytes, now_ms, NULL, err);
}

bkv_status_t bkv_store_publish_pinned(bkv_store_t *store, bkv_slot_t *slot, uint64_t ttl_ms, uint64_t raw_bytes,
                                      uint64_t now_ms, bkv_pin_t *pin, bkv_error_t *err) {
    const bkv_terms_t terms = {.ttl_ms = ttl_ms, .raw_bytes = raw_bytes};
    return publish_slot(store, slot, &terms, now_ms, pin, err);
}

bkv_status_t bkv_store_adopt(bkv_store_t *store, bkv_slot_t *slot, uint64_t ttl_ms, bool copy, uint64_t now_ms, bkv_pin_t *pin,
                             bkv_error_t *err) {
    const bkv_terms_t terms = {.ttl_ms = ttl_ms, .copy = copy, .adopted = true};
    return publish_slot(store, slot, &terms, now_ms, pin, err);
}
