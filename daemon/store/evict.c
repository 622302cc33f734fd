// evict.c - making room: SIEVE within a class, whole slabs between classes, a tenant's own records at its quota.
#include "evict.h"

#include "internal.h"

#include <stdlib.h>

#define COMPARE_AFTER 64 // evictions, at most, before a class compares itself with the others
#define AGE_SAMPLES   16 // slots of a slab that its age is taken from
#define CANDIDATES    8  // slabs that a search of all of them chooses from

bkv_status_t bkv_evict_init(bkv_evict_t *evict, uint32_t entries, bkv_error_t *err) {
    *evict = (bkv_evict_t){0};
    for (uint32_t i = 0; i < BKV_CLASSES_MAX; i++) {
        bkv_sieve_init(&evict->classes[i].owned);
        bkv_sieve_init(&evict->classes[i].copies);
    }
    evict->by_class = calloc(entries, sizeof(*evict->by_class));
    evict->by_tenant = calloc(entries, sizeof(*evict->by_tenant));
    if (!evict->by_class || !evict->by_tenant) {
        bkv_evict_deinit(evict);
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "max_entries: no memory for the queues of %u entries", entries);
    }
    return BKV_OK;
}

void bkv_evict_deinit(bkv_evict_t *evict) {
    free(evict->by_class);
    free(evict->by_tenant);
    evict->by_class = NULL;
    evict->by_tenant = NULL;
}

static bool is_copy(const bkv_entry_t *entry) {
    return entry->flags & BKV_ENTRY_COPY;
}

static bkv_sieve_t *class_queue(bkv_store_t *store, const bkv_entry_t *entry) {
    bkv_evict_class_t *c = &store->evict.classes[entry->size_class];
    return is_copy(entry) ? &c->copies : &c->owned;
}

static bkv_sieve_t *tenant_queue(bkv_store_t *store, const bkv_entry_t *entry) {
    bkv_tenant_t *t = &store->tenants.slot[entry->tenant];
    return is_copy(entry) ? &t->copies : &t->owned;
}

void bkv_evict_enter(bkv_store_t *store, uint32_t entry) {
    const bkv_entry_t *e = &store->index.entries[entry];
    bkv_sieve_push(class_queue(store, e), store->evict.by_class, entry);
    bkv_sieve_push(tenant_queue(store, e), store->evict.by_tenant, entry);
}

void bkv_evict_leave(bkv_store_t *store, uint32_t entry) {
    const bkv_entry_t *e = &store->index.entries[entry];
    bkv_sieve_remove(class_queue(store, e), store->evict.by_class, entry);
    bkv_sieve_remove(tenant_queue(store, e), store->evict.by_tenant, entry);
}

// [shard] Nobody reads it and nobody was promised it.
static bool may_leave(const bkv_entry_t *entry) {
    return (entry->flags & BKV_ENTRY_LINKED) && entry->pins == 0 && entry->leases == 0;
}

static uint32_t age_of(const bkv_store_t *store, const bkv_entry_t *entry) {
    return bkv_store_turn(store) - entry->used;
}

// One round of the hand clears visited bits; in a second one, when pins were faster than the hand, they no longer count.
// Amortised constant: each bit cleared was set by a pin, and pinned and leased entries are few and bounded.
static bool evict_from(bkv_store_t *store, bkv_sieve_t *queue, const bkv_sieve_link_t *links, bkv_leave_cause_t cause,
                       uint64_t now_ms) {
    for (uint64_t left = 2 * (uint64_t)queue->count; left > 0; left--) {
        uint32_t entry = bkv_sieve_hand(queue);
        bkv_entry_t *e = &store->index.entries[entry];
        bkv_shard_t *shard = bkv_index_lock_entry(&store->index, entry);
        bool expired = bkv_entry_expired(e, now_ms);
        if (may_leave(e) && (expired || !(e->flags & BKV_ENTRY_VISITED) || left <= queue->count)) {
            if (cause == BKV_LEAVE_CAPACITY) {
                store->evict.classes[e->size_class].victim_age = is_copy(e) ? UINT32_MAX : age_of(store, e);
            }
            bkv_store_leave(store, shard, entry, expired ? BKV_LEAVE_EXPIRED : cause);
            pthread_mutex_unlock(&shard->lock);
            return true;
        }
        e->flags &= (uint8_t)~BKV_ENTRY_VISITED;
        pthread_mutex_unlock(&shard->lock);
        bkv_sieve_advance(queue, links);
    }
    return false;
}

static bool evict_copy(bkv_store_t *store, uint32_t size_class, uint64_t now_ms) {
    return evict_from(store, &store->evict.classes[size_class].copies, store->evict.by_class, BKV_LEAVE_CAPACITY, now_ms);
}

static bool evict_owned(bkv_store_t *store, uint32_t size_class, uint64_t now_ms) {
    return evict_from(store, &store->evict.classes[size_class].owned, store->evict.by_class, BKV_LEAVE_CAPACITY, now_ms);
}

// Looks at slot `index` of a slab. false: something is in it that has to stay. *counts: there is a record in it, and no copy;
// *age: its age.
static bool slot_may_leave(bkv_store_t *store, uint32_t slab, uint32_t index, bool *counts, uint32_t *age) {
    uint32_t entry;
    *counts = false;
    if (!bkv_slabs_owner(&store->slabs, slab, index, &entry)) {
        return true;
    }
    if (entry == BKV_OWNER_FILLING) {
        return false;
    }
    bkv_shard_t *shard = bkv_index_lock_entry(&store->index, entry);
    bool may = may_leave(&store->index.entries[entry]);
    *counts = !is_copy(&store->index.entries[entry]);
    *age = age_of(store, &store->index.entries[entry]);
    pthread_mutex_unlock(&shard->lock);
    return may;
}

static uint32_t slots_of(const bkv_store_t *store, uint32_t slab) {
    return store->slabs.classes[store->slabs.slab[slab].size_class].slots;
}

// Mean age of a sample of a slab's records, in publishes. false: one of them has to stay.
static bool slab_age(bkv_store_t *store, uint32_t slab, uint32_t *age) {
    uint32_t slots = slots_of(store, slab);
    uint32_t step = slots > AGE_SAMPLES ? slots / AGE_SAMPLES : 1;
    uint64_t sum = 0;
    uint32_t count = 0;
    for (uint32_t i = 0; i < slots; i += step) {
        bool counts;
        uint32_t slot_age;
        if (!slot_may_leave(store, slab, i, &counts, &slot_age)) {
            return false;
        }
        sum += counts ? slot_age : 0;
        count += counts ? 1 : 0;
    }
    *age = count > 0 ? (uint32_t)(sum / count) : UINT32_MAX; // nothing of worth seen: the best to take
    return true;
}

static bool slab_may_leave(bkv_store_t *store, uint32_t slab) {
    for (uint32_t i = 0; i < slots_of(store, slab); i++) {
        bool counts;
        uint32_t age;
        if (!slot_may_leave(store, slab, i, &counts, &age)) {
            return false;
        }
    }
    return true;
}

// Evicts everything in a slab so that it becomes free. false: something has to stay; then nothing was evicted, unless it was
// pinned while we were at it.
static bool empty_slab(bkv_store_t *store, uint32_t slab, uint64_t now_ms) {
    if (!slab_may_leave(store, slab)) {
        return false;
    }
    uint32_t slots = slots_of(store, slab);
    for (uint32_t i = 0; i < slots; i++) {
        uint32_t entry;
        if (!bkv_slabs_owner(&store->slabs, slab, i, &entry)) {
            continue;
        }
        bkv_shard_t *shard = bkv_index_lock_entry(&store->index, entry);
        const bkv_entry_t *e = &store->index.entries[entry];
        if (may_leave(e)) {
            bool expired = bkv_entry_expired(e, now_ms);
            bkv_store_leave(store, shard, entry, expired ? BKV_LEAVE_EXPIRED : BKV_LEAVE_SLAB);
        }
        pthread_mutex_unlock(&shard->lock);
    }
    return store->slabs.slab[slab].size_class == BKV_NO_CLASS;
}

static uint32_t next_victim(const bkv_evict_class_t *size_class) {
    uint32_t copy = bkv_sieve_hand(&size_class->copies);
    return copy != BKV_SIEVE_END ? copy : bkv_sieve_hand(&size_class->owned);
}

// Frees the slab of another class that is colder than what this class evicts; see evict.h.
static bool take_colder_slab(bkv_store_t *store, uint32_t size_class, uint64_t now_ms) {
    bkv_evict_class_t *own = &store->evict.classes[size_class];
    uint32_t slots = store->slabs.classes[size_class].slots;
    if (own->evictions < (slots < COMPARE_AFTER ? slots : COMPARE_AFTER)) {
        return false;
    }
    own->evictions = 0;
    uint32_t coldest = BKV_NO_SLAB;
    uint32_t coldest_age = own->victim_age;
    for (uint32_t c = 0; c < store->slabs.class_count; c++) {
        uint32_t victim = next_victim(&store->evict.classes[c]);
        if (c == size_class || victim == BKV_SIEVE_END) {
            continue;
        }
        uint32_t slab = bkv_slabs_slab_of(&store->slabs, store->index.entries[victim].page);
        uint32_t age;
        if (slab_age(store, slab, &age) && age > coldest_age) {
            coldest = slab;
            coldest_age = age;
        }
    }
    return coldest != BKV_NO_SLAB && empty_slab(store, coldest, now_ms);
}

// Frees some slab, if there is one: the coldest of the first few whose records may all leave.
static bool take_any_slab(bkv_store_t *store, uint64_t now_ms) {
    uint32_t coldest = BKV_NO_SLAB;
    uint32_t coldest_age = 0;
    uint32_t candidates = 0;
    for (uint32_t n = store->slabs.slab_count; n > 0 && candidates < CANDIDATES; n--) {
        uint32_t slab = store->evict.cursor;
        store->evict.cursor = (slab + 1) % store->slabs.slab_count;
        uint32_t age;
        if (store->slabs.slab[slab].size_class == BKV_NO_CLASS || !slab_age(store, slab, &age) ||
            !slab_may_leave(store, slab)) {
            continue;
        }
        candidates++;
        if (coldest == BKV_NO_SLAB || age > coldest_age) {
            coldest = slab;
            coldest_age = age;
        }
    }
    return coldest != BKV_NO_SLAB && empty_slab(store, coldest, now_ms);
}

bool bkv_evict_slot(bkv_store_t *store, uint32_t tenant, uint32_t size_class, uint64_t now_ms, uint32_t *page) {
    if (bkv_store_take_slot(store, tenant, size_class, page)) {
        return true;
    }
    if (take_colder_slab(store, size_class, now_ms) && bkv_store_take_slot(store, tenant, size_class, page)) {
        return true;
    }
    if (evict_copy(store, size_class, now_ms) || evict_owned(store, size_class, now_ms)) {
        store->evict.classes[size_class].evictions++;
        return bkv_store_take_slot(store, tenant, size_class, page);
    }
    return false;
}

// Takes a free slot of a larger class, of at most max_bytes.
static bool take_larger_slot(bkv_store_t *store, uint32_t tenant, uint32_t size_class, uint64_t max_bytes, uint32_t *page) {
    for (uint32_t c = size_class + 1; c < store->slabs.class_count; c++) {
        if (bkv_slabs_slot_bytes(&store->slabs, c) > max_bytes) {
            return false;
        }
        if (bkv_store_take_slot(store, tenant, c, page)) {
            return true;
        }
    }
    return false;
}

bool bkv_evict_any_slot(bkv_store_t *store, uint32_t tenant, uint32_t size_class, uint64_t max_bytes, uint64_t now_ms,
                        uint32_t *page) {
    if (bkv_evict_slot(store, tenant, size_class, now_ms, page)) {
        return true;
    }
    // A slot with some air in it is cheaper than all the records of a slab.
    uint64_t roomy = 2 * bkv_slabs_slot_bytes(&store->slabs, size_class);
    if (take_larger_slot(store, tenant, size_class, roomy < max_bytes ? roomy : max_bytes, page)) {
        return true;
    }
    if (take_any_slab(store, now_ms) && bkv_store_take_slot(store, tenant, size_class, page)) {
        return true;
    }
    for (uint32_t c = size_class + 1; c < store->slabs.class_count; c++) {
        bool has_slabs = store->slabs.classes[c].slabs > 0;
        if (has_slabs && bkv_slabs_slot_bytes(&store->slabs, c) <= max_bytes &&
            bkv_evict_slot(store, tenant, c, now_ms, page)) {
            return true;
        }
    }
    return false;
}

bool bkv_evict_for_quota(bkv_store_t *store, uint32_t tenant, uint64_t bytes, uint64_t now_ms) {
    bkv_tenant_t *t = &store->tenants.slot[tenant];
    uint64_t quota = bkv_tenants_quota(&store->tenants, tenant);
    while (t->used + bytes > quota) {
        if (!evict_from(store, &t->copies, store->evict.by_tenant, BKV_LEAVE_QUOTA, now_ms) &&
            !evict_from(store, &t->owned, store->evict.by_tenant, BKV_LEAVE_QUOTA, now_ms)) {
            return false;
        }
    }
    return true;
}

bool bkv_evict_entry(bkv_store_t *store, uint32_t size_class, uint64_t now_ms) {
    const uint32_t classes = store->slabs.class_count;
    bool evicted = evict_copy(store, size_class, now_ms);
    for (uint32_t c = 0; !evicted && c < classes; c++) {
        evicted = evict_copy(store, c, now_ms);
    }
    evicted = evicted || evict_owned(store, size_class, now_ms);
    for (uint32_t c = 0; !evicted && c < classes; c++) {
        evicted = evict_owned(store, c, now_ms);
    }
    return evicted;
}
