// device_cache.h - copies of records in GPU memory, for Attend: what was brought there once is read there again, at the speed of
// the GPU's memory, until others need the room.
//
// One piece of memory of the device, used as a ring: what came first makes room first, unless an Attend is just reading it. A
// copy is told by the record's name and checksum, so that one of a record that was dropped and put anew is not mistaken for it.
// The store stays what decides: a record is found, pinned and checked there before its copy is used.
//
// Thread-safe. What the GPU cannot do the CPU does: every failure here is a status upon which the caller goes on without it.
// After a fault of the device the cache stays closed until the daemon is restarted.
#ifndef BKV_DEVICE_CACHE_H
#define BKV_DEVICE_CACHE_H

#include "kernels/codec.h"

typedef struct bkv_device_cache bkv_device_cache_t;

typedef struct bkv_device_cache_state {
    uint64_t records, bytes; // there now
    uint64_t hits, loads;    // records read there that were there already, or had to be brought
} bkv_device_cache_state_t;

// Takes `bytes` of memory of the first GPU. UNIMPLEMENTED: there is none; RESOURCE_EXHAUSTED: not as much memory.
bkv_status_t bkv_device_cache_create(uint64_t bytes, bkv_device_cache_t **cache, bkv_error_t *err);

// Nobody may be using it. NULL: nothing.
void bkv_device_cache_destroy(bkv_device_cache_t *cache);

// The device is about to be reset (by whoever else uses it in this process): waits for those who use the cache, whose work ends
// in failure, and closes it.
void bkv_device_cache_lost(bkv_device_cache_t *cache);

// Brings copies of those records that have none, as many as there is room for at once. The records are the caller's, pinned,
// checked and verified. RESOURCE_EXHAUSTED: no room for all, as others are being read; FAILED_PRECONDITION: closed; INTERNAL:
// CUDA said no, and the cache is closed.
bkv_status_t bkv_device_cache_load(bkv_device_cache_t *cache, const void *const *records, uint32_t count, bkv_error_t *err);

// As bkv_attend (codec.h), of records that are all of one spec, over their copies, after a load; statuses as there. q is taken
// at 11 bits of mantissa.
bkv_status_t bkv_device_cache_attend(bkv_device_cache_t *cache, const void *const *records, uint32_t count,
                                     const bkv_attend_args_t *args, bkv_error_t *err);

void bkv_device_cache_state(bkv_device_cache_t *cache, bkv_device_cache_state_t *state);

#endif
