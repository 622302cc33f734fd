// device_cache.c - which records have copies on the GPU, where, and how they get there. Attention over them is device_attend.c's.
#include "daemon/pipeline/device_ring.h"

#include "daemon/observe/log.h"
#include "kernels/cuda/share.h"

#include <assert.h>
#include <string.h>
#include <sys/random.h>
#include <xxhash.h>

#define RECORD_ALIGN 256
#define ENTRY_BYTES  16384 // of memory, for each entry: smaller records are few

// ---- the table: under the lock ----

static uint32_t place_of(const bkv_device_cache_t *cache, uint64_t number) {
    return (uint32_t)(number % cache->capacity);
}

static uint32_t *bucket_of(bkv_device_cache_t *cache, const bkv_name_t *name) {
    return &cache->buckets[XXH3_64bits_withSeed(name, sizeof(*name), cache->secret) % cache->capacity];
}

static uint32_t find(bkv_device_cache_t *cache, const bkv_name_t *name) {
    uint32_t entry = *bucket_of(cache, name);
    while (entry != BKV_DEVICE_NONE && memcmp(&cache->entries[entry].name, name, sizeof(*name)) != 0) {
        entry = cache->entries[entry].next;
    }
    return entry;
}

// Not found any more; its memory stays in the ring until it is the oldest.
static void unlink_entry(bkv_device_cache_t *cache, uint32_t entry) {
    uint32_t *at = bucket_of(cache, &cache->entries[entry].name);
    while (*at != entry) {
        at = &cache->entries[*at].next;
    }
    *at = cache->entries[entry].next;
    cache->entries[entry].linked = false;
    cache->records--;
    cache->bytes_used -= cache->entries[entry].bytes;
}

// Gives up the oldest; false while it is in use.
static bool drop_oldest(bkv_device_cache_t *cache) {
    uint32_t oldest = place_of(cache, cache->oldest);
    if (cache->entries[oldest].users > 0) {
        return false;
    }
    if (cache->entries[oldest].linked) {
        unlink_entry(cache, oldest);
    }
    cache->oldest++;
    return true;
}

// Room for so many bytes behind the newest, or at the start of the memory when they do not fit before its end. Whatever lies
// there is the oldest.
static bool make_room(bkv_device_cache_t *cache, uint64_t bytes, uint64_t *offset) {
    if (bytes > cache->bytes) {
        return false;
    }
    bool wrap = bytes > cache->bytes - cache->head;
    *offset = wrap ? 0 : cache->head;
    while (cache->oldest != cache->newest) {
        uint64_t at = cache->entries[place_of(cache, cache->oldest)].offset;
        bool full = cache->newest - cache->oldest == cache->capacity;
        bool in_the_way = wrap ? at >= cache->head || at < bytes : at >= cache->head && at < cache->head + bytes;
        if (!full && !in_the_way) {
            return true;
        }
        if (!drop_oldest(cache)) {
            return false;
        }
    }
    *offset = 0; // all of it is free
    return true;
}

static bool add(bkv_device_cache_t *cache, const bkv_name_t *name, const bkv_record_header_t *header, uint32_t *entry) {
    const uint64_t bytes = (header->length + RECORD_ALIGN - 1) / RECORD_ALIGN * RECORD_ALIGN;
    uint64_t offset;
    if (!make_room(cache, bytes, &offset)) {
        return false;
    }
    *entry = place_of(cache, cache->newest++);
    uint32_t *bucket = bucket_of(cache, name);
    cache->entries[*entry] = (bkv_device_entry_t){.name = *name,
                                                  .checksum = header->checksum,
                                                  .offset = offset,
                                                  .bytes = bytes,
                                                  .state = BKV_DEVICE_LOADING,
                                                  .linked = true,
                                                  .next = *bucket};
    *bucket = *entry;
    cache->head = offset + bytes;
    cache->records++;
    cache->bytes_used += bytes;
    return true;
}

// ---- a load ----

// Holds the copy of a record, or the place for one, which is then the caller's to fill. anew: a copy that nobody else uses is to
// be brought once more.
static bool hold(bkv_device_cache_t *cache, const void *record, bool anew, bkv_device_hold_t *hold) {
    bkv_record_header_t header;
    memcpy(&header, record, sizeof(header));
    bkv_name_t name;
    memcpy(name.spec_id.bytes, header.spec_id, sizeof(name.spec_id.bytes));
    memcpy(name.key.bytes, header.key, sizeof(name.key.bytes));
    uint32_t entry = find(cache, &name);
    if (entry != BKV_DEVICE_NONE &&
        (cache->entries[entry].checksum != header.checksum || (anew && cache->entries[entry].users == 0))) {
        unlink_entry(cache, entry);
        entry = BKV_DEVICE_NONE;
    }
    hold->mine = entry == BKV_DEVICE_NONE;
    if (hold->mine && !add(cache, &name, &header, &entry)) {
        return false;
    }
    hold->entry = entry;
    cache->entries[entry].users++;
    cache->hits += hold->mine ? 0 : 1;
    cache->loads += hold->mine ? 1 : 0;
    return true;
}

static void let_go(bkv_device_cache_t *cache, const bkv_device_hold_t *holds, uint32_t count) {
    for (uint32_t i = 0; i < count; i++) {
        cache->entries[holds[i].entry].users--;
    }
}

// What was to be filled and has not been is not found any more, and those who wait for it go without.
static void give_up(bkv_device_cache_t *cache, const bkv_device_hold_t *holds, uint32_t count) {
    for (uint32_t i = 0; i < count; i++) {
        bkv_device_entry_t *entry = &cache->entries[holds[i].entry];
        if (holds[i].mine && entry->state == BKV_DEVICE_LOADING) {
            entry->state = BKV_DEVICE_FAILED;
            if (entry->linked) {
                unlink_entry(cache, holds[i].entry);
            }
        }
    }
    let_go(cache, holds, count);
    pthread_cond_broadcast(&cache->changed);
}

// Copies what is the caller's to fill. Returns CUDA's error.
static int fill(bkv_device_cache_t *cache, const void *const *records, const bkv_device_hold_t *holds, uint32_t count) {
    int error = 0;
    void *stream = bkv_gpu_own_stream();
    for (uint32_t i = 0; i < count && error == 0; i++) {
        if (holds[i].mine) {
            bkv_record_header_t header;
            memcpy(&header, records[i], sizeof(header));
            error = bkv_gpu_copy(cache->memory + cache->entries[holds[i].entry].offset, records[i], header.length, stream);
        }
    }
    int waited = bkv_gpu_wait(stream); // also after an error: what has been enqueued reads the caller's records
    return error != 0 ? error : waited;
}

bkv_status_t bkv_device_cache_fail(bkv_device_cache_t *cache, int error, bkv_error_t *err) {
    if (!atomic_exchange(&cache->closed, true)) {
        bkv_log(BKV_LOG_ERROR, 0, "compute.gpu_cache: the GPU has failed (%s); Attend goes on without it",
                bkv_gpu_error(error));
    }
    return bkv_fail(err, BKV_INTERNAL, "gpu_cache: %s", bkv_gpu_error(error));
}

// Waits until what others fill is there too; false: some of it never will be.
static bool await_others(bkv_device_cache_t *cache, const bkv_device_hold_t *holds, uint32_t count) {
    for (uint32_t i = 0; i < count; i++) {
        const bkv_device_entry_t *entry = &cache->entries[holds[i].entry];
        while (entry->state == BKV_DEVICE_LOADING) {
            pthread_cond_wait(&cache->changed, &cache->lock);
        }
        if (entry->state == BKV_DEVICE_FAILED) {
            return false;
        }
    }
    return true;
}

// All of them, or none.
static bool hold_all(bkv_device_cache_t *cache, const void *const *records, uint32_t count, bool anew,
                     bkv_device_hold_t *holds) {
    uint32_t held = 0;
    while (held < count && hold(cache, records[held], anew, &holds[held])) {
        held++;
    }
    if (held < count) {
        give_up(cache, holds, held);
    }
    return held == count;
}

// What is held may itself be the oldest, and in the way of what is still to come: then all is brought anew, one behind the other.
// Nobody waits before what is its own to fill is there, so that two cannot wait for each other.
bkv_status_t bkv_device_cache_hold(bkv_device_cache_t *cache, const void *const *records, uint32_t count,
                                   bkv_device_hold_t *holds, bkv_error_t *err) {
    pthread_mutex_lock(&cache->lock);
    bool held = hold_all(cache, records, count, false, holds) || hold_all(cache, records, count, true, holds);
    if (!held) {
        pthread_mutex_unlock(&cache->lock);
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "gpu_cache: no room for %u records at once", count);
    }
    pthread_mutex_unlock(&cache->lock);
    int error = fill(cache, records, holds, count);
    pthread_mutex_lock(&cache->lock);
    for (uint32_t i = 0; i < count && error == 0; i++) {
        if (holds[i].mine) {
            cache->entries[holds[i].entry].state = BKV_DEVICE_READY;
        }
    }
    pthread_cond_broadcast(&cache->changed);
    bool all = error == 0 && await_others(cache, holds, count);
    if (!all) {
        give_up(cache, holds, count);
    }
    pthread_mutex_unlock(&cache->lock);
    if (error != 0) {
        return bkv_device_cache_fail(cache, error, err);
    }
    return all ? BKV_OK : bkv_fail(err, BKV_INTERNAL, "gpu_cache: a copy that another request was bringing has not come");
}

void bkv_device_cache_let_go(bkv_device_cache_t *cache, const bkv_device_hold_t *holds, uint32_t count) {
    pthread_mutex_lock(&cache->lock);
    let_go(cache, holds, count);
    pthread_mutex_unlock(&cache->lock);
}

// ---- use ----

bkv_status_t bkv_device_cache_enter(bkv_device_cache_t *cache, int *before, bkv_error_t *err) {
    pthread_mutex_lock(&cache->lock);
    bool closed = atomic_load(&cache->closed);
    cache->inside += closed ? 0 : 1;
    pthread_mutex_unlock(&cache->lock);
    if (closed) {
        return bkv_fail(err, BKV_FAILED_PRECONDITION, "gpu_cache: closed, the GPU has failed");
    }
    int error = bkv_gpu_enter(0, before);
    if (error != 0) {
        bkv_device_cache_leave(cache, -1);
        return bkv_device_cache_fail(cache, error, err);
    }
    return BKV_OK;
}

void bkv_device_cache_leave(bkv_device_cache_t *cache, int before) {
    if (before >= 0) {
        bkv_gpu_leave(before);
    }
    pthread_mutex_lock(&cache->lock);
    cache->inside--;
    pthread_cond_broadcast(&cache->changed);
    pthread_mutex_unlock(&cache->lock);
}

bkv_status_t bkv_device_cache_load(bkv_device_cache_t *cache, const void *const *records, uint32_t count, bkv_error_t *err) {
    bkv_device_hold_t *holds = calloc(count + 1u, sizeof(holds[0])); // one more: none is no error
    if (holds == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "gpu_cache: no memory to load %u records", count);
    }
    int before = -1;
    bkv_status_t status = bkv_device_cache_enter(cache, &before, err);
    if (status == BKV_OK) {
        status = bkv_device_cache_hold(cache, records, count, holds, err);
        if (status == BKV_OK) {
            bkv_device_cache_let_go(cache, holds, count);
        }
        bkv_device_cache_leave(cache, before);
    }
    free(holds);
    return status;
}

// ---- create ----

static bkv_status_t take_memory(bkv_device_cache_t *cache, bkv_error_t *err) {
    bkv_status_t status = bkv_cuda_open(0, &cache->cuda, err);
    if (status != BKV_OK) {
        return status;
    }
    int before, error = bkv_gpu_enter(0, &before);
    if (error == 0) {
        void *memory = NULL;
        error = bkv_gpu_take(&memory, cache->bytes);
        cache->memory = memory;
        bkv_gpu_leave(before);
    }
    return error == 0 ? BKV_OK
                      : bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "%llu bytes of GPU memory: %s", (unsigned long long)cache->bytes,
                                 bkv_gpu_error(error));
}

bkv_status_t bkv_device_cache_create(uint64_t bytes, bkv_device_cache_t **out, bkv_error_t *err) {
    bkv_device_cache_t *cache = calloc(1, sizeof(*cache));
    if (cache == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for a table of the GPU's records");
    }
    cache->bytes = bytes / RECORD_ALIGN * RECORD_ALIGN;
    cache->capacity = (uint32_t)(bytes / ENTRY_BYTES) + 64;
    cache->entries = calloc(cache->capacity, sizeof(cache->entries[0]));
    cache->buckets = malloc(cache->capacity * sizeof(cache->buckets[0]));
    pthread_mutex_init(&cache->lock, NULL);
    pthread_cond_init(&cache->changed, NULL);
    bkv_status_t status = BKV_OK;
    if (cache->entries == NULL || cache->buckets == NULL) {
        status = bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for a table of the GPU's records");
    } else if (getrandom(&cache->secret, sizeof(cache->secret), 0) != (ssize_t)sizeof(cache->secret)) {
        status = bkv_fail(err, BKV_INTERNAL, "getrandom gives nothing");
    } else {
        memset(cache->buckets, 0xff, cache->capacity * sizeof(cache->buckets[0]));
        status = take_memory(cache, err);
    }
    if (status != BKV_OK) {
        bkv_device_cache_destroy(cache);
        return status;
    }
    *out = cache;
    return BKV_OK;
}

void bkv_device_cache_destroy(bkv_device_cache_t *cache) {
    if (cache == NULL) {
        return;
    }
    assert(cache->inside == 0);
    int before;
    if (cache->memory != NULL && !atomic_load(&cache->closed) && bkv_gpu_enter(0, &before) == 0) {
        bkv_gpu_give(cache->memory); // after a fault the context has it, or a reset has had it
        bkv_gpu_leave(before);
    }
    bkv_cuda_close(cache->cuda);
    pthread_cond_destroy(&cache->changed);
    pthread_mutex_destroy(&cache->lock);
    free(cache->entries);
    free(cache->buckets);
    free(cache);
}

void bkv_device_cache_lost(bkv_device_cache_t *cache) {
    atomic_store(&cache->closed, true);
    pthread_mutex_lock(&cache->lock);
    while (cache->inside > 0) {
        pthread_cond_wait(&cache->changed, &cache->lock);
    }
    pthread_mutex_unlock(&cache->lock);
}

void bkv_device_cache_state(bkv_device_cache_t *cache, bkv_device_cache_state_t *state) {
    pthread_mutex_lock(&cache->lock);
    *state = (bkv_device_cache_state_t){
        .records = cache->records, .bytes = cache->bytes_used, .hits = cache->hits, .loads = cache->loads};
    pthread_mutex_unlock(&cache->lock);
}
