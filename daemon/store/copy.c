// copy.c - what a pool needs to know of single records: which are only copies, how long they live, and a list of the others.
#include "internal.h"

#include <assert.h>
#include <string.h>

#define LOOKS_PER_ITEM 16   // see store.h
#define LIST_BATCH     256u // entries that a list looks at before it lets others have the lock

bool bkv_store_set_copy(bkv_store_t *store, const bkv_name_t *name, bool copy, uint64_t now_ms) {
    uint64_t hash = bkv_index_hash_key(&store->index, &name->key);
    bkv_shard_t *shard = bkv_index_shard(&store->index, hash);
    pthread_mutex_lock(&store->space);
    pthread_mutex_lock(&shard->lock);
    uint32_t entry = bkv_index_find(&store->index, shard, hash, &name->spec_id, &name->key);
    bool there = entry != BKV_NO_ENTRY && !bkv_entry_expired(&store->index.entries[entry], now_ms);
    if (there) {
        bkv_store_mark_copy(store, entry, copy);
    }
    pthread_mutex_unlock(&shard->lock);
    pthread_mutex_unlock(&store->space);
    return there;
}

bool bkv_store_drop_copy(bkv_store_t *store, const bkv_name_t *name, uint64_t now_ms) {
    uint64_t hash = bkv_index_hash_key(&store->index, &name->key);
    bkv_shard_t *shard = bkv_index_shard(&store->index, hash);
    pthread_mutex_lock(&store->space);
    pthread_mutex_lock(&shard->lock);
    uint32_t entry = bkv_index_find(&store->index, shard, hash, &name->spec_id, &name->key);
    const bkv_entry_t *e = entry != BKV_NO_ENTRY ? &store->index.entries[entry] : NULL;
    bool drop = e != NULL && (e->flags & BKV_ENTRY_COPY) && e->pins == 0 && e->leases == 0;
    if (drop) {
        bkv_store_leave(store, shard, entry, bkv_entry_expired(e, now_ms) ? BKV_LEAVE_EXPIRED : BKV_LEAVE_DROPPED);
    }
    pthread_mutex_unlock(&shard->lock);
    pthread_mutex_unlock(&store->space);
    return drop;
}

// The pin keeps the entry, and its end never changes.
uint64_t bkv_store_ttl(const bkv_store_t *store, const bkv_pin_t *pin, uint64_t now_ms) {
    uint64_t expires_ms = store->index.entries[pin->entry].expires_ms;
    if (expires_ms == 0) {
        return 0;
    }
    return expires_ms > now_ms ? expires_ms - now_ms : 1;
}

// [space] Whether the entry is to be listed.
static bool get_item(bkv_store_t *store, uint32_t entry, uint8_t flags, uint64_t now_ms, bkv_store_item_t *item) {
    const bkv_entry_t *e = &store->index.entries[entry];
    bkv_shard_t *shard = bkv_index_lock_entry(&store->index, entry);
    bool listed = (e->flags & (BKV_ENTRY_LINKED | BKV_ENTRY_COPY)) == flags && !bkv_entry_expired(e, now_ms);
    const bkv_record_header_t *header = listed ? (const void *)bkv_arena_at(&store->arena, e->page) : NULL;
    listed = listed && ((flags & BKV_ENTRY_COPY) != 0 || (header->flags & BKV_RECORD_FOLD) == 0);
    if (listed) {
        memcpy(item->name.spec_id.bytes, header->spec_id, sizeof(item->name.spec_id.bytes));
        item->name.key = e->key;
        item->bytes = bkv_entry_length(e);
    }
    pthread_mutex_unlock(&shard->lock);
    return listed;
}

// The order is that of the entries: a record keeps its entry for as long as it is resident.
static size_t list(bkv_store_t *store, uint8_t flags, uint64_t *cursor, bkv_store_item_t *items, size_t capacity,
                   uint64_t now_ms, bool *more) {
    assert(capacity > 0);
    size_t count = 0;
    size_t looks = capacity < SIZE_MAX / LOOKS_PER_ITEM ? capacity * LOOKS_PER_ITEM : SIZE_MAX;
    bool end = false;
    while (!end && looks > 0 && count < capacity) {
        pthread_mutex_lock(&store->space);
        for (uint32_t i = 0; i < LIST_BATCH && looks > 0 && count < capacity && *cursor < store->index.fresh; i++, looks--) {
            count += get_item(store, (uint32_t)(*cursor)++, flags, now_ms, &items[count]) ? 1 : 0;
        }
        end = *cursor >= store->index.fresh;
        pthread_mutex_unlock(&store->space);
    }
    *more = !end;
    return count;
}

size_t bkv_store_list(bkv_store_t *store, uint64_t *cursor, bkv_store_item_t *items, size_t capacity, uint64_t now_ms,
                      bool *more) {
    return list(store, BKV_ENTRY_LINKED, cursor, items, capacity, now_ms, more);
}

size_t bkv_store_list_copies(bkv_store_t *store, uint64_t *cursor, bkv_store_item_t *items, size_t capacity, uint64_t now_ms,
                             bool *more) {
    return list(store, BKV_ENTRY_LINKED | BKV_ENTRY_COPY, cursor, items, capacity, now_ms, more);
}
