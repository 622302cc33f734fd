// index.h - from (key, spec) to entry: 64-byte entries from one pool, chained in hash buckets, in shards of a mutex each.
//
// Keys and tenants' tags come from outside and may be chosen, so a bucket is XXH3 of the key under a secret that this process
// drew at random: nobody can aim at one. Entries of different specs never meet, whatever their keys; the spec is read from the
// record itself.
//
// Locks. The pool (alloc, free) belongs to the store's space lock. Chains, and an entry's pins, leases, used and flags, belong
// to the lock of the entry's shard; its other fields do not change between link and unlink. Linking and unlinking need both
// locks, so that either alone keeps a linked entry where it is. Order: space before shard, never two shards.
#ifndef BKV_INDEX_H
#define BKV_INDEX_H

#include "arena.h"
#include "kernels/summary.h"

#include <pthread.h>

#define BKV_NO_ENTRY     UINT32_MAX
#define BKV_SECRET_BYTES 192

// Entry flags.
#define BKV_ENTRY_LINKED  0x01u // findable; all others are free, or gone but for pins and leases
#define BKV_ENTRY_VISITED 0x02u // pinned since the eviction hand last came by (evict.h)
#define BKV_ENTRY_EMPTY   0x04u // gone, and its slot given back; only leases still name it
#define BKV_ENTRY_COPY    0x08u // other daemons own it (store.h); does not change but under both locks

typedef struct bkv_entry {
    bkv_key_t key;
    uint64_t expires_ms; // on the caller's clock; 0: never
    uint32_t page;       // its slot
    uint32_t length;     // of the record, in units of BKV_RECORD_ALIGN
    uint32_t hash_next;  // of its chain; of the pool's free list while free
    uint32_t used;       // turn (store's count of publishes) of its last pin or its publish
    uint16_t pins;       // transfers in flight
    uint16_t leases;
    uint16_t tenant; // slot in the tenant table
    uint8_t size_class;
    uint8_t flags;
} bkv_entry_t;

_Static_assert(sizeof(bkv_entry_t) == 64, "one cache line");
_Static_assert(BKV_RECORD_ALIGN == 16, "records of up to 64 GiB in 32 bits");

typedef struct bkv_shard {
    pthread_mutex_t lock;
    uint32_t *buckets;
    uint64_t hits, misses, pinned;
} __attribute__((aligned(64))) bkv_shard_t;

typedef struct bkv_index {
    const bkv_arena_t *arena;
    bkv_entry_t *entries; // [capacity], cache line aligned
    uint32_t capacity;
    uint32_t fresh; // entries from here on have never been used
    uint32_t free;  // first of those given back
    bkv_shard_t *shards;
    uint32_t shard_count;
    uint32_t bucket_mask; // buckets per shard - 1
    uint32_t *buckets;    // of all shards
    uint8_t secret[BKV_SECRET_BYTES];
} bkv_index_t;

// shard_count must be a power of two, capacity > 0. RESOURCE_EXHAUSTED: no memory.
bkv_status_t bkv_index_init(bkv_index_t *index, const bkv_arena_t *arena, uint32_t capacity, uint32_t shard_count,
                            bkv_error_t *err);
void bkv_index_deinit(bkv_index_t *index);

uint64_t bkv_index_hash(const bkv_index_t *index, const void *bytes, size_t length);
uint64_t bkv_index_hash_key(const bkv_index_t *index, const bkv_key_t *key);
bkv_shard_t *bkv_index_shard(const bkv_index_t *index, uint64_t hash);

// Locks and returns the shard that a linked or gone entry belongs to.
bkv_shard_t *bkv_index_lock_entry(const bkv_index_t *index, uint32_t entry);

// [space] An entry from the pool, zeroed; BKV_NO_ENTRY when all are in use.
uint32_t bkv_index_alloc(bkv_index_t *index);
void bkv_index_free(bkv_index_t *index, uint32_t entry);

// [space, shard]
void bkv_index_link(bkv_index_t *index, bkv_shard_t *shard, uint64_t hash, uint32_t entry);
void bkv_index_unlink(bkv_index_t *index, bkv_shard_t *shard, uint64_t hash, uint32_t entry);

// [shard] The linked entry of the key and spec, expired or not; BKV_NO_ENTRY.
uint32_t bkv_index_find(const bkv_index_t *index, const bkv_shard_t *shard, uint64_t hash, const bkv_spec_id_t *spec_id,
                        const bkv_key_t *key);

// [shard] Its time is over and no lease keeps it.
bool bkv_entry_expired(const bkv_entry_t *entry, uint64_t now_ms);

uint64_t bkv_entry_length(const bkv_entry_t *entry);

#endif
