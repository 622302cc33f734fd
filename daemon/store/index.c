// index.c - the hash table and the pool of entries.
#include "index.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <xxhash.h>

_Static_assert(BKV_SECRET_BYTES >= XXH3_SECRET_SIZE_MIN, "a secret of our own must be long enough");

static bkv_status_t draw_secret(uint8_t *secret, size_t length, bkv_error_t *err) {
    for (size_t done = 0; done < length;) {
        ssize_t n = getrandom(secret + done, length - done, 0);
        if (n < 0 && errno != EINTR) {
            return bkv_fail(err, BKV_INTERNAL, "index: getrandom: %s", strerror(errno));
        }
        done += n > 0 ? (size_t)n : 0;
    }
    return BKV_OK;
}

// About one bucket per entry.
static uint32_t buckets_per_shard(uint32_t capacity, uint32_t shard_count) {
    uint32_t buckets = 1;
    while ((uint64_t)buckets * shard_count < capacity) {
        buckets *= 2;
    }
    return buckets;
}

bkv_status_t bkv_index_init(bkv_index_t *index, const bkv_arena_t *arena, uint32_t capacity, uint32_t shard_count,
                            bkv_error_t *err) {
    assert(capacity > 0 && shard_count > 0 && (shard_count & (shard_count - 1)) == 0);
    uint32_t per_shard = buckets_per_shard(capacity, shard_count);
    *index = (bkv_index_t){
        .arena = arena,
        .capacity = capacity,
        .free = BKV_NO_ENTRY,
        .shard_count = shard_count,
        .bucket_mask = per_shard - 1,
    };
    size_t bucket_bytes = (size_t)per_shard * shard_count * sizeof(*index->buckets);
    index->entries = aligned_alloc(sizeof(bkv_entry_t), (size_t)capacity * sizeof(bkv_entry_t));
    index->shards = aligned_alloc(_Alignof(bkv_shard_t), shard_count * sizeof(bkv_shard_t));
    index->buckets = malloc(bucket_bytes);
    if (!index->entries || !index->shards || !index->buckets) {
        free(index->shards); // its locks are not there yet
        index->shards = NULL;
        bkv_index_deinit(index);
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "max_entries: no memory for an index of %u entries", capacity);
    }
    memset(index->buckets, 0xff, bucket_bytes); // BKV_NO_ENTRY
    for (uint32_t i = 0; i < shard_count; i++) {
        index->shards[i] = (bkv_shard_t){.buckets = index->buckets + (size_t)i * per_shard};
        pthread_mutex_init(&index->shards[i].lock, NULL);
    }
    bkv_status_t status = draw_secret(index->secret, sizeof(index->secret), err);
    if (status != BKV_OK) {
        bkv_index_deinit(index);
    }
    return status;
}

void bkv_index_deinit(bkv_index_t *index) {
    for (uint32_t i = 0; index->shards && i < index->shard_count; i++) {
        pthread_mutex_destroy(&index->shards[i].lock);
    }
    free(index->shards);
    free(index->buckets);
    free(index->entries);
    *index = (bkv_index_t){0};
}

uint64_t bkv_index_hash(const bkv_index_t *index, const void *bytes, size_t length) {
    return XXH3_64bits_withSecret(bytes, length, index->secret, sizeof(index->secret));
}

uint64_t bkv_index_hash_key(const bkv_index_t *index, const bkv_key_t *key) {
    return bkv_index_hash(index, key->bytes, sizeof(key->bytes));
}

bkv_shard_t *bkv_index_shard(const bkv_index_t *index, uint64_t hash) {
    return &index->shards[(hash >> 32) & (index->shard_count - 1)]; // buckets use the low half
}

bkv_shard_t *bkv_index_lock_entry(const bkv_index_t *index, uint32_t entry) {
    bkv_shard_t *shard = bkv_index_shard(index, bkv_index_hash_key(index, &index->entries[entry].key));
    pthread_mutex_lock(&shard->lock);
    return shard;
}

uint32_t bkv_index_alloc(bkv_index_t *index) {
    uint32_t entry = index->free;
    if (entry != BKV_NO_ENTRY) {
        index->free = index->entries[entry].hash_next;
    } else if (index->fresh < index->capacity) {
        entry = index->fresh++;
    } else {
        return BKV_NO_ENTRY;
    }
    index->entries[entry] = (bkv_entry_t){.hash_next = BKV_NO_ENTRY};
    return entry;
}

void bkv_index_free(bkv_index_t *index, uint32_t entry) {
    bkv_entry_t *e = &index->entries[entry];
    assert(e->pins == 0 && e->leases == 0);
    e->flags = 0;
    e->expires_ms = 0;
    e->hash_next = index->free;
    index->free = entry;
}

void bkv_index_link(bkv_index_t *index, bkv_shard_t *shard, uint64_t hash, uint32_t entry) {
    uint32_t *bucket = &shard->buckets[hash & index->bucket_mask];
    index->entries[entry].hash_next = *bucket;
    index->entries[entry].flags |= BKV_ENTRY_LINKED;
    *bucket = entry;
}

void bkv_index_unlink(bkv_index_t *index, bkv_shard_t *shard, uint64_t hash, uint32_t entry) {
    uint32_t *link = &shard->buckets[hash & index->bucket_mask];
    while (*link != entry) {
        assert(*link != BKV_NO_ENTRY);
        link = &index->entries[*link].hash_next;
    }
    *link = index->entries[entry].hash_next;
    index->entries[entry].flags &= (uint8_t)~BKV_ENTRY_LINKED;
}

uint32_t bkv_index_find(const bkv_index_t *index, const bkv_shard_t *shard, uint64_t hash, const bkv_spec_id_t *spec_id,
                        const bkv_key_t *key) {
    uint32_t entry = shard->buckets[hash & index->bucket_mask];
    for (; entry != BKV_NO_ENTRY; entry = index->entries[entry].hash_next) {
        const bkv_entry_t *e = &index->entries[entry];
        if (memcmp(&e->key, key, sizeof(*key)) == 0) {
            const bkv_record_header_t *header = (const void *)bkv_arena_at(index->arena, e->page);
            if (memcmp(header->spec_id, spec_id->bytes, sizeof(header->spec_id)) == 0) {
                return entry;
            }
        }
    }
    return BKV_NO_ENTRY;
}

bool bkv_entry_expired(const bkv_entry_t *entry, uint64_t now_ms) {
    return entry->expires_ms != 0 && now_ms >= entry->expires_ms && entry->leases == 0;
}

uint64_t bkv_entry_length(const bkv_entry_t *entry) {
    return (uint64_t)entry->length * BKV_RECORD_ALIGN;
}
