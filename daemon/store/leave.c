// leave.c - how slots and entries are taken into use and how they leave it: the accounts are kept here and nowhere else.
#include "internal.h"

#include <assert.h>

static uint64_t *counter_of(bkv_store_metrics_t *counts, bkv_leave_cause_t cause) {
    switch (cause) {
    case BKV_LEAVE_DROPPED:
        return &counts->dropped_total;
    case BKV_LEAVE_CAPACITY:
        return &counts->evicted_capacity_total;
    case BKV_LEAVE_QUOTA:
        return &counts->evicted_quota_total;
    case BKV_LEAVE_SLAB:
        return &counts->evicted_slab_total;
    case BKV_LEAVE_EXPIRED:
        return &counts->expired_total;
    case BKV_LEAVE_CORRUPT:
        return &counts->corrupt_total;
    }
    assert(!"unknown cause");
    return NULL;
}

uint32_t bkv_store_turn(const bkv_store_t *store) {
    return __atomic_load_n(&store->turn, __ATOMIC_RELAXED);
}

static uint64_t tenant_hash(const bkv_store_t *store, uint64_t tag) {
    return bkv_index_hash(&store->index, &tag, sizeof(tag));
}

uint64_t bkv_store_deadline(uint64_t now_ms, uint64_t ttl_ms) {
    return ttl_ms < UINT64_MAX - now_ms ? now_ms + ttl_ms : UINT64_MAX;
}

uint32_t bkv_store_hold_tenant(bkv_store_t *store, uint64_t tag) {
    uint32_t tenant = bkv_tenants_get(&store->tenants, tag, tenant_hash(store, tag));
    if (tenant != BKV_NO_TENANT) {
        store->tenants.slot[tenant].busy++;
    }
    return tenant;
}

void bkv_store_let_go_tenant(bkv_store_t *store, uint32_t tenant) {
    bkv_tenant_t *t = &store->tenants.slot[tenant];
    assert(t->busy > 0);
    t->busy--;
    bkv_tenants_put(&store->tenants, tenant, tenant_hash(store, t->tag));
}

static void account_slot(bkv_store_t *store, uint32_t tenant, uint32_t size_class) {
    uint64_t bytes = bkv_slabs_slot_bytes(&store->slabs, size_class);
    store->counts.slot_bytes += bytes;
    store->tenants.slot[tenant].used += bytes;
}

bool bkv_store_take_slot(bkv_store_t *store, uint32_t tenant, uint32_t size_class, uint32_t *page) {
    if (!bkv_slabs_take(&store->slabs, size_class, page)) {
        return false;
    }
    account_slot(store, tenant, size_class);
    return true;
}

void bkv_store_adopt_slot(bkv_store_t *store, uint32_t tenant, uint32_t slab, uint32_t size_class, uint32_t index) {
    bkv_slabs_adopt(&store->slabs, slab, size_class, index);
    account_slot(store, tenant, size_class);
}

void bkv_store_give_slot(bkv_store_t *store, uint32_t tenant, uint32_t page) {
    bkv_tenant_t *t = &store->tenants.slot[tenant];
    uint64_t bytes = bkv_slabs_bytes_of(&store->slabs, page);
    assert(store->counts.slot_bytes >= bytes && t->used >= bytes);
    store->counts.slot_bytes -= bytes;
    t->used -= bytes;
    bkv_slabs_give(&store->slabs, page);
    bkv_tenants_put(&store->tenants, tenant, tenant_hash(store, t->tag));
}

void bkv_store_enter(bkv_store_t *store, uint32_t entry) {
    bkv_entry_t *e = &store->index.entries[entry];
    e->size_class = (uint8_t)bkv_slabs_class_of(&store->slabs, e->page);
    e->used = bkv_store_turn(store);
    bkv_slabs_set_owner(&store->slabs, e->page, entry);
    bkv_evict_enter(store, entry);
    store->counts.entries++;
    store->counts.copies += e->flags & BKV_ENTRY_COPY ? 1 : 0;
    store->counts.resident_bytes += bkv_entry_length(e);
    uint64_t hash = bkv_index_hash_key(&store->index, &e->key);
    bkv_shard_t *shard = bkv_index_shard(&store->index, hash);
    pthread_mutex_lock(&shard->lock);
    bkv_index_link(&store->index, shard, hash, entry);
    pthread_mutex_unlock(&shard->lock);
}

// [space, shard] The slot, and the entry too if no lease names it.
static void release(bkv_store_t *store, uint32_t entry) {
    bkv_entry_t *e = &store->index.entries[entry];
    assert(e->pins == 0 && !(e->flags & (BKV_ENTRY_LINKED | BKV_ENTRY_EMPTY)));
    bkv_store_give_slot(store, e->tenant, e->page);
    e->flags |= BKV_ENTRY_EMPTY;
    if (e->leases == 0) {
        bkv_index_free(&store->index, entry);
    }
}

void bkv_store_leave(bkv_store_t *store, bkv_shard_t *shard, uint32_t entry, bkv_leave_cause_t cause) {
    bkv_entry_t *e = &store->index.entries[entry];
    assert(e->flags & BKV_ENTRY_LINKED);
    bkv_arena_set_state(&store->arena, e->page, BKV_SLOT_FREE);
    bkv_index_unlink(&store->index, shard, bkv_index_hash_key(&store->index, &e->key), entry);
    bkv_evict_leave(store, entry);
    store->counts.entries--;
    store->counts.copies -= e->flags & BKV_ENTRY_COPY ? 1 : 0;
    store->counts.resident_bytes -= bkv_entry_length(e);
    (*counter_of(&store->counts, cause))++;
    if (e->pins == 0) {
        release(store, entry);
    }
}

void bkv_store_mark_copy(bkv_store_t *store, uint32_t entry, bool copy) {
    bkv_entry_t *e = &store->index.entries[entry];
    assert(e->flags & BKV_ENTRY_LINKED);
    if (copy == ((e->flags & BKV_ENTRY_COPY) != 0)) {
        return;
    }
    bkv_evict_leave(store, entry);
    if (copy) { // whatever it was used for, that was before
        e->flags = (uint8_t)((e->flags | BKV_ENTRY_COPY) & ~BKV_ENTRY_VISITED);
        store->counts.copies++;
    } else {
        e->flags &= (uint8_t)~BKV_ENTRY_COPY;
        store->counts.copies--;
    }
    bkv_evict_enter(store, entry);
}

void bkv_store_last_unpin(bkv_store_t *store, uint32_t entry) {
    bkv_shard_t *shard = bkv_index_lock_entry(&store->index, entry);
    release(store, entry);
    pthread_mutex_unlock(&shard->lock);
}

void bkv_store_end_lease(bkv_store_t *store, uint32_t lease) {
    uint32_t entry;
    while (bkv_leases_end(&store->leases, lease, &entry)) {
        bkv_shard_t *shard = bkv_index_lock_entry(&store->index, entry);
        bkv_entry_t *e = &store->index.entries[entry];
        assert(e->leases > 0);
        e->leases--;
        if (e->leases == 0 && (e->flags & BKV_ENTRY_EMPTY)) {
            bkv_index_free(&store->index, entry);
        }
        pthread_mutex_unlock(&shard->lock);
    }
}

void bkv_store_end_leases(bkv_store_t *store, uint64_t now_ms) {
    uint32_t lease;
    while ((lease = bkv_leases_find_ended(&store->leases, now_ms)) != BKV_NO_LEASE) {
        bkv_store_end_lease(store, lease);
    }
}
