// store.c - makes and unmakes the store; quotas, tick, metrics. Writing is write.c, reading read.c, restart recover.c.
#include "store.h"

#include "internal.h"
#include "recover.h"

#include <assert.h>
#include <stdlib.h>

#define MIB         ((uint64_t)1 << 20)
#define SLAB_MIN    ((uint64_t)64 << 10)
#define SLAB_MAX    ((uint64_t)32 << 30) // a record's length, in 16 bytes, has to fit an entry's 32 bits
#define SHARDS_MAX  65536u
#define ENTRIES_MAX (BKV_OWNER_FILLING - 1)
#define TICK_BATCH  256u // entries that a tick looks at before it lets others have the lock

typedef unsigned long long ull;

// config with its zeros replaced.
typedef struct bkv_sizes {
    uint64_t slab_bytes;
    uint32_t slab_count, entries, shards, leases, lease_keys;
} bkv_sizes_t;

static uint64_t clamp(uint64_t n, uint64_t low, uint64_t high) {
    return n < low ? low : n > high ? high : n;
}

static uint64_t slab_bytes_of(const bkv_store_config_t *config) {
    uint64_t bytes = config->slab_bytes;
    if (bytes == 0) {
        bytes = clamp(config->arena_bytes / 32, 8 * MIB, 1024 * MIB);
    }
    // Whole huge pages where it is large enough.
    return bytes - bytes % (bytes >= 8 * MIB ? 2 * MIB : BKV_PAGE_BYTES);
}

static bkv_status_t sizes_of(const bkv_store_config_t *config, bkv_sizes_t *sizes, bkv_error_t *err) {
    sizes->slab_bytes = slab_bytes_of(config);
    if (sizes->slab_bytes < SLAB_MIN || sizes->slab_bytes > SLAB_MAX) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "slab_bytes: %llu is not between %llu and %llu", (ull)config->slab_bytes,
                        (ull)SLAB_MIN, (ull)SLAB_MAX);
    }
    uint64_t slabs = config->arena_bytes / sizes->slab_bytes;
    if (slabs == 0) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "arena_bytes: %llu is less than one slab of %llu", (ull)config->arena_bytes,
                        (ull)sizes->slab_bytes);
    }
    if (slabs > (UINT32_MAX - 1) / (sizes->slab_bytes / BKV_PAGE_BYTES)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "arena_bytes: %llu is more than 16 TiB", (ull)config->arena_bytes);
    }
    uint64_t entries = config->max_entries;
    if (entries == 0) {
        entries = clamp(config->arena_bytes / (16 << 10), 1024, ENTRIES_MAX);
    }
    if (entries > ENTRIES_MAX) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "max_entries: %llu is more than %u", (ull)entries, ENTRIES_MAX);
    }
    sizes->shards = config->shards ? config->shards : 64;
    if ((sizes->shards & (sizes->shards - 1)) != 0 || sizes->shards > SHARDS_MAX) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "shards: %u is not a power of two of at most %u", sizes->shards, SHARDS_MAX);
    }
    sizes->slab_count = (uint32_t)slabs;
    sizes->entries = (uint32_t)entries;
    sizes->leases = config->max_leases ? config->max_leases : 4096;
    sizes->lease_keys = config->max_lease_keys ? config->max_lease_keys : 65536;
    return BKV_OK;
}

// Everything but the lock. Deinit of what was not initialised is harmless: the store began as zeros.
static bkv_status_t init_parts(bkv_store_t *store, const bkv_store_config_t *config, const bkv_sizes_t *sizes, bool *intact,
                               bkv_error_t *err) {
    bkv_status_t status = bkv_arena_open(&store->arena, config->arena_path, config->arena_fd, sizes->slab_bytes,
                                         sizes->slab_count, config->prefault, intact, err);
    if (status == BKV_OK) {
        status = bkv_slabs_init(&store->slabs, &store->arena, err);
    }
    if (status == BKV_OK) {
        status = bkv_index_init(&store->index, &store->arena, sizes->entries, sizes->shards, err);
    }
    if (status == BKV_OK) {
        status = bkv_evict_init(&store->evict, sizes->entries, err);
    }
    if (status == BKV_OK) {
        status = bkv_tenants_init(&store->tenants, config->tenant_quota, err);
    }
    if (status == BKV_OK) {
        status = bkv_leases_init(&store->leases, sizes->leases, sizes->lease_keys, err);
    }
    return status;
}

static void deinit(bkv_store_t *store) {
    bkv_leases_deinit(&store->leases);
    bkv_tenants_deinit(&store->tenants);
    bkv_evict_deinit(&store->evict);
    bkv_index_deinit(&store->index);
    bkv_slabs_deinit(&store->slabs);
    bkv_arena_close(&store->arena);
    pthread_mutex_destroy(&store->space);
    free(store);
}

bkv_status_t bkv_store_create(const bkv_store_config_t *config, uint64_t now_ms, bkv_store_t **store, uint64_t *recovered,
                              bkv_error_t *err) {
    bkv_sizes_t sizes = {0};
    bkv_status_t status = sizes_of(config, &sizes, err);
    if (status != BKV_OK) {
        return status;
    }
    bkv_store_t *s = calloc(1, sizeof(*s));
    if (!s) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "store: no memory");
    }
    s->arena.fd = -1;
    pthread_mutex_init(&s->space, NULL);
    bool intact = false;
    status = init_parts(s, config, &sizes, &intact, err);
    if (status != BKV_OK) {
        deinit(s);
        return status;
    }
    s->counts.arena_bytes = sizes.slab_bytes * sizes.slab_count;
    uint64_t taken = intact ? bkv_store_recover(s, now_ms, config->recovered_ttl_ms) : 0;
    if (recovered) {
        *recovered = taken;
    }
    *store = s;
    return BKV_OK;
}

void bkv_store_destroy(bkv_store_t *store) {
    if (!store) {
        return;
    }
    assert(store->filling == 0);
    for (uint32_t i = 0; i < store->index.shard_count; i++) {
        assert(store->index.shards[i].pinned == 0);
    }
    deinit(store);
}

int bkv_store_fd(const bkv_store_t *store) {
    return store->arena.fd;
}

void bkv_store_memory(const bkv_store_t *store, void **memory, uint64_t *bytes) {
    *memory = store->arena.slabs; // the slots alone: no device has business with what is kept about them
    *bytes = store->arena.slab_bytes * store->arena.slab_count;
}

uint64_t bkv_store_max_record(const bkv_store_t *store) {
    return store->arena.slab_bytes;
}

bkv_status_t bkv_store_set_quota(bkv_store_t *store, uint64_t tenant, uint64_t bytes, bkv_error_t *err) {
    bkv_status_t status = BKV_OK;
    pthread_mutex_lock(&store->space);
    uint32_t slot = bkv_store_hold_tenant(store, tenant);
    if (slot == BKV_NO_TENANT) {
        status = bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "tenant: %u tenants have records or quotas already", BKV_TENANTS_MAX);
    } else {
        store->tenants.slot[slot].own_quota = bytes != BKV_QUOTA_DEFAULT;
        store->tenants.slot[slot].quota = bytes;
        bkv_store_let_go_tenant(store, slot);
    }
    pthread_mutex_unlock(&store->space);
    return status;
}

void bkv_store_set_default_quota(bkv_store_t *store, uint64_t bytes) {
    pthread_mutex_lock(&store->space);
    store->tenants.default_quota = bytes;
    pthread_mutex_unlock(&store->space);
}

// [space] Looks at the entry under the cursor. expires_ms is 0 in entries that are not linked.
static void tick_one(bkv_store_t *store, uint64_t now_ms) {
    if (store->tick_cursor >= store->index.fresh) {
        store->tick_cursor = 0;
    }
    uint32_t entry = store->tick_cursor++;
    const bkv_entry_t *e = &store->index.entries[entry];
    if (e->expires_ms == 0 || now_ms < e->expires_ms) {
        return;
    }
    bkv_shard_t *shard = bkv_index_lock_entry(&store->index, entry);
    if ((e->flags & BKV_ENTRY_LINKED) && bkv_entry_expired(e, now_ms)) {
        bkv_store_leave(store, shard, entry, BKV_LEAVE_EXPIRED);
    }
    pthread_mutex_unlock(&shard->lock);
}

void bkv_store_tick(bkv_store_t *store, uint64_t now_ms, uint32_t limit) {
    uint32_t left = limit;
    do {
        pthread_mutex_lock(&store->space);
        bkv_store_end_leases(store, now_ms);
        if (left > store->index.fresh) {
            left = store->index.fresh; // once round is enough
        }
        for (uint32_t i = 0; i < TICK_BATCH && left > 0; i++, left--) {
            tick_one(store, now_ms);
        }
        pthread_mutex_unlock(&store->space);
    } while (left > 0);
}

void bkv_store_metrics(bkv_store_t *store, bkv_store_metrics_t *metrics) {
    pthread_mutex_lock(&store->space);
    *metrics = store->counts;
    metrics->leases = store->leases.count;
    for (uint32_t i = 0; i < store->index.shard_count; i++) {
        bkv_shard_t *shard = &store->index.shards[i];
        pthread_mutex_lock(&shard->lock);
        metrics->hits_total += shard->hits;
        metrics->misses_total += shard->misses;
        metrics->pinned += shard->pinned;
        pthread_mutex_unlock(&shard->lock);
    }
    pthread_mutex_unlock(&store->space);
}
