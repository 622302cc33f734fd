// window.c - see window.h. First fit over a list of extents that lies in one array, as in daemon/pipeline/staging.c: memory that
// was used before is used again, and so is already backed by pages.
#include "client/memory/window.h"

#include <assert.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

// A walk costs by extents, not by units, so small units cost nothing but this array: giving back and taking among 64 regions is
// 0.3 us whether units are 4 or 64 KiB, and of a record of 100 KB they waste 2 % where the larger ones waste 31 %.
#define UNIT      4096u
#define UNITS_MAX 0x7fffffffu

// Of the extent that starts at this unit; entries inside an extent mean nothing.
typedef struct extent {
    uint32_t units : 31;
    uint32_t used : 1;
} extent_t;

struct bkv_client_region {
    bkv_client_window_t *window; // counted
    uint32_t unit;
    uint64_t bytes; // as asked for, or trimmed
    size_t holders; // under the window's lock, as is the next
    bool lost;
};

struct bkv_client_window {
    // Fixed.
    const bkv_window_kind_t *kind;
    void *state; // the kind's
    uint8_t *memory;
    uint64_t bytes;
    uint8_t session[16];
    uint64_t boot_epoch;
    uint32_t units;

    atomic_size_t users; // references, and regions
    atomic_uint lost_units;
    atomic_bool worn_out;
    atomic_bool left;
    pthread_mutex_t lock; // a leaf: extents, and regions' holders
    extent_t extents[];
};

static uint32_t units_of(uint64_t bytes) {
    return (uint32_t)(bytes / UNIT + (bytes % UNIT != 0));
}

// ---- windows ----

bkv_client_window_t *bkv_client_window_create(const bkv_window_kind_t *kind, void *state, uint8_t *memory, uint64_t bytes,
                                              const uint8_t *session, uint64_t boot_epoch) {
    assert(bytes >= BKV_WINDOW_LEAST && (uintptr_t)memory % 64 == 0);
    uint64_t units = bytes / UNIT < UNITS_MAX ? bytes / UNIT : UNITS_MAX;
    bkv_client_window_t *window = calloc(1, sizeof *window + units * sizeof window->extents[0]);
    if (window == NULL) {
        return NULL;
    }
    window->kind = kind;
    window->state = state;
    window->memory = memory;
    window->bytes = bytes;
    memcpy(window->session, session, sizeof window->session);
    window->boot_epoch = boot_epoch;
    window->units = (uint32_t)units;
    atomic_init(&window->users, 1);
    window->extents[0].units = window->units & UNITS_MAX;
    pthread_mutex_init(&window->lock, NULL);
    return window;
}

bkv_client_window_t *bkv_client_window_retain(bkv_client_window_t *window) {
    atomic_fetch_add(&window->users, 1);
    return window;
}

void bkv_client_window_release(bkv_client_window_t *window) {
    if (window != NULL && atomic_fetch_sub(&window->users, 1) == 1) {
        window->kind->close(window->state);
        pthread_mutex_destroy(&window->lock);
        free(window);
    }
}

void bkv_client_window_leave(bkv_client_window_t *window) {
    if (!atomic_exchange(&window->left, true)) {
        window->kind->leave(window->state);
    }
}

const bkv_window_kind_t *bkv_client_window_kind(const bkv_client_window_t *window) {
    return window->kind;
}

const uint8_t *bkv_client_window_session(const bkv_client_window_t *window) {
    return window->session;
}

uint64_t bkv_client_window_epoch(const bkv_client_window_t *window) {
    return window->boot_epoch;
}

uint64_t bkv_client_window_bytes(const bkv_client_window_t *window) {
    return window->bytes;
}

bool bkv_client_window_worn(const bkv_client_window_t *window) {
    return atomic_load(&window->worn_out) || atomic_load(&window->lost_units) > window->units / 2;
}

void bkv_client_window_wear_out(bkv_client_window_t *window) {
    atomic_store(&window->worn_out, true);
}

// ---- extents; the lock must be held ----

// Joins the free extent at `unit` with the free ones that follow it.
static void join_free(bkv_client_window_t *window, uint32_t unit) {
    extent_t *extent = &window->extents[unit];
    for (uint32_t next = unit + extent->units; next < window->units && !window->extents[next].used;
         next = unit + extent->units) {
        extent->units = (extent->units + window->extents[next].units) & UNITS_MAX;
    }
}

// Makes the extent at `unit` shorter; what lies behind becomes free.
static void cut(bkv_client_window_t *window, uint32_t unit, uint32_t units) {
    extent_t *extent = &window->extents[unit];
    if (extent->units > units) {
        window->extents[unit + units] = (extent_t){.units = (extent->units - units) & UNITS_MAX};
        extent->units = units & UNITS_MAX;
    }
}

// The lowest extent of `units`, marked used; false when there is none.
static bool take_first_fit(bkv_client_window_t *window, uint32_t units, uint32_t *unit_out) {
    for (uint32_t unit = 0; unit < window->units; unit += window->extents[unit].units) {
        extent_t *extent = &window->extents[unit];
        if (extent->used) {
            continue;
        }
        join_free(window, unit);
        if (extent->units >= units) {
            cut(window, unit, units);
            extent->used = 1;
            *unit_out = unit;
            return true;
        }
    }
    return false;
}

// ---- regions ----

bkv_client_region_t *bkv_client_region_take(bkv_client_window_t *window, uint64_t bytes) {
    assert(bytes > 0);
    bkv_client_region_t *region = bytes <= window->bytes ? calloc(1, sizeof *region) : NULL;
    if (region == NULL) {
        return NULL;
    }
    pthread_mutex_lock(&window->lock);
    bool taken = !atomic_load(&window->left) && take_first_fit(window, units_of(bytes), &region->unit);
    pthread_mutex_unlock(&window->lock);
    if (!taken) {
        free(region);
        return NULL;
    }
    region->window = bkv_client_window_retain(window);
    region->bytes = bytes;
    region->holders = 1;
    return region;
}

bkv_client_region_t *bkv_client_region_retain(bkv_client_region_t *region) {
    pthread_mutex_lock(&region->window->lock);
    region->holders++;
    pthread_mutex_unlock(&region->window->lock);
    return region;
}

void bkv_client_region_release(bkv_client_region_t *region) {
    if (region == NULL) {
        return;
    }
    bkv_client_window_t *window = region->window;
    pthread_mutex_lock(&window->lock);
    assert(region->holders > 0);
    bool last = --region->holders == 0;
    if (last && !region->lost) {
        window->extents[region->unit].used = 0;
    }
    pthread_mutex_unlock(&window->lock);
    if (last) {
        free(region);
        bkv_client_window_release(window);
    }
}

void bkv_client_region_trim(bkv_client_region_t *region, uint64_t bytes) {
    assert(bytes > 0);
    pthread_mutex_lock(&region->window->lock);
    if (bytes < region->bytes && !region->lost) {
        cut(region->window, region->unit, units_of(bytes));
        region->bytes = bytes;
    }
    pthread_mutex_unlock(&region->window->lock);
}

void bkv_client_region_lose(bkv_client_region_t *region) {
    pthread_mutex_lock(&region->window->lock);
    if (!region->lost) {
        region->lost = true;
        atomic_fetch_add(&region->window->lost_units, region->window->extents[region->unit].units);
    }
    pthread_mutex_unlock(&region->window->lock);
}

bool bkv_client_region_lost(bkv_client_region_t *region) {
    pthread_mutex_lock(&region->window->lock);
    bool lost = region->lost;
    pthread_mutex_unlock(&region->window->lock);
    return lost;
}

bkv_client_window_t *bkv_client_region_window(const bkv_client_region_t *region) {
    return region->window;
}

uint8_t *bkv_client_region_memory(const bkv_client_region_t *region) {
    return region->window->memory + bkv_client_region_offset(region);
}

uint64_t bkv_client_region_offset(const bkv_client_region_t *region) {
    return (uint64_t)region->unit * UNIT;
}

uint64_t bkv_client_region_bytes(const bkv_client_region_t *region) {
    return region->bytes;
}
