// staging.c - first fit over a list of extents that lies in one array.
//
// The region is cut into units. extents[u] describes the extent that starts at unit u, whether it is in use and how many
// units it has; entries inside an extent mean nothing. A walk goes from extent to extent and joins free neighbours on its
// way, so that giving back is one store. There are as many extents as blocks in flight: tens, not thousands.
#include "daemon/pipeline/staging.h"

#include <assert.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/mman.h>

typedef struct extent {
    uint32_t units : 31;
    uint32_t used : 1;
} extent_t;

struct bkv_staging {
    uint8_t *region;
    uint32_t units;
    pthread_mutex_t lock; // extents, used_units
    uint32_t used_units;
    extent_t extents[];
};

bkv_status_t bkv_staging_create(uint64_t bytes, bkv_staging_t **staging_out, bkv_error_t *err) {
    uint64_t units = bytes / BKV_STAGING_UNIT + (bytes % BKV_STAGING_UNIT != 0);
    if (units == 0 || units >= UINT64_C(1) << 31) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "memory.staging: %llu bytes are none or too many",
                        (unsigned long long)bytes);
    }
    bkv_staging_t *staging = calloc(1, sizeof(*staging) + units * sizeof(staging->extents[0]));
    void *region = mmap(NULL, units * BKV_STAGING_UNIT, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (staging == NULL || region == MAP_FAILED) {
        if (region != MAP_FAILED) {
            munmap(region, units * BKV_STAGING_UNIT);
        }
        free(staging);
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "memory.staging: no memory for %llu bytes", (unsigned long long)bytes);
    }
    madvise(region, units * BKV_STAGING_UNIT, MADV_HUGEPAGE); // fewer, cheaper faults; a system without them is fine too
    staging->region = region;
    staging->units = (uint32_t)units;
    staging->extents[0].units = (uint32_t)units & 0x7fffffffu;
    pthread_mutex_init(&staging->lock, NULL);
    *staging_out = staging;
    return BKV_OK;
}

void bkv_staging_destroy(bkv_staging_t *staging) {
    if (staging == NULL) {
        return;
    }
    assert(staging->used_units == 0);
    munmap(staging->region, (size_t)staging->units * BKV_STAGING_UNIT);
    pthread_mutex_destroy(&staging->lock);
    free(staging);
}

// Joins the free extent at `unit` with the free ones that follow it.
static void join_free(bkv_staging_t *staging, uint32_t unit) {
    extent_t *extent = &staging->extents[unit];
    for (uint32_t next = unit + extent->units; next < staging->units && !staging->extents[next].used;
         next = unit + extent->units) {
        extent->units = (extent->units + staging->extents[next].units) & 0x7fffffffu;
    }
}

// The lowest extent of `wanted` units, marked used; false when there is none.
static bool take_first_fit(bkv_staging_t *staging, uint32_t wanted, uint32_t *unit_out) {
    for (uint32_t unit = 0; unit < staging->units; unit += staging->extents[unit].units) {
        extent_t *extent = &staging->extents[unit];
        if (extent->used) {
            continue;
        }
        join_free(staging, unit);
        if (extent->units < wanted) {
            continue;
        }
        if (extent->units > wanted) {
            staging->extents[unit + wanted] = (extent_t){.units = (extent->units - wanted) & 0x7fffffffu};
        }
        *extent = (extent_t){.units = wanted & 0x7fffffffu, .used = 1};
        staging->used_units += wanted;
        *unit_out = unit;
        return true;
    }
    return false;
}

bkv_status_t bkv_staging_get(bkv_staging_t *staging, uint64_t bytes, void **memory, bkv_error_t *err) {
    assert(bytes > 0);
    uint64_t wanted = bytes / BKV_STAGING_UNIT + (bytes % BKV_STAGING_UNIT != 0);
    uint64_t all = (uint64_t)staging->units * BKV_STAGING_UNIT;
    if (wanted > staging->units) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "%llu bytes are more than the staging memory of %llu (memory.staging)",
                        (unsigned long long)bytes, (unsigned long long)all);
    }
    uint32_t unit = 0;
    pthread_mutex_lock(&staging->lock);
    bool found = take_first_fit(staging, (uint32_t)wanted, &unit);
    pthread_mutex_unlock(&staging->lock);
    if (!found) {
        return bkv_fail(err, BKV_BUSY, "%llu bytes of staging memory are not free right now (memory.staging)",
                        (unsigned long long)bytes);
    }
    *memory = staging->region + (size_t)unit * BKV_STAGING_UNIT;
    return BKV_OK;
}

void bkv_staging_put(bkv_staging_t *staging, void *memory) {
    size_t offset = (size_t)((uint8_t *)memory - staging->region);
    assert(offset % BKV_STAGING_UNIT == 0 && offset / BKV_STAGING_UNIT < staging->units);
    pthread_mutex_lock(&staging->lock);
    extent_t *extent = &staging->extents[offset / BKV_STAGING_UNIT];
    assert(extent->used);
    extent->used = 0;
    staging->used_units -= extent->units;
    pthread_mutex_unlock(&staging->lock);
}

void bkv_staging_memory(const bkv_staging_t *staging, void **memory, uint64_t *bytes) {
    *memory = staging->region;
    *bytes = (uint64_t)staging->units * BKV_STAGING_UNIT;
}

uint64_t bkv_staging_used(bkv_staging_t *staging) {
    pthread_mutex_lock(&staging->lock);
    uint64_t used = (uint64_t)staging->used_units * BKV_STAGING_UNIT;
    pthread_mutex_unlock(&staging->lock);
    return used;
}
