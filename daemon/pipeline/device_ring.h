// device_ring.h - what the two files of the device cache share: its table, the ring of its memory, and how copies are held.
//
// An entry's number in the ring says its age: entries [oldest, newest) lie in the memory in that order, wrapping around. An
// entry that is found no more (another version has come, or it was never filled) keeps its place until it is the oldest.
// Who holds an entry keeps its memory as it is.
#ifndef BKV_DEVICE_RING_H
#define BKV_DEVICE_RING_H

#include "daemon/pipeline/device_cache.h"
#include "kernels/cuda/bkv_cuda.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

#define BKV_DEVICE_NONE UINT32_MAX

typedef enum bkv_device_entry_state {
    BKV_DEVICE_LOADING, // whoever made it is filling it
    BKV_DEVICE_READY,
    BKV_DEVICE_FAILED, // it never was filled
} bkv_device_entry_state_t;

typedef struct bkv_device_entry {
    bkv_name_t name;
    uint64_t checksum; // of the record
    uint64_t offset, bytes;
    uint32_t users, next; // next in its bucket
    bkv_device_entry_state_t state;
    bool linked; // in a bucket: it is found
} bkv_device_entry_t;

struct bkv_device_cache {
    bkv_cuda_t *cuda;
    uint8_t *memory; // of the device
    uint64_t bytes, secret;
    uint32_t capacity; // of entries and buckets
    _Atomic bool closed;

    pthread_mutex_t lock; // of all that follows
    pthread_cond_t changed;
    bkv_device_entry_t *entries;
    uint32_t *buckets;
    uint64_t oldest, newest; // numbers; an entry's place is its number modulo capacity
    uint64_t head;           // where the newest ends
    uint32_t inside;         // threads that use the device
    uint64_t records, bytes_used, hits, loads;
};

// A record's copy in use.
typedef struct bkv_device_hold {
    uint32_t entry;
    bool mine; // the holder brings it
} bkv_device_hold_t;

// Between enter and leave the calling thread's device is the cache's, which is not reset meanwhile.
bkv_status_t bkv_device_cache_enter(bkv_device_cache_t *cache, int *before, bkv_error_t *err);
void bkv_device_cache_leave(bkv_device_cache_t *cache, int before); // before < 0: it was not entered

// Copies of all records, brought where there are none, or nothing. holds has room for `count`.
bkv_status_t bkv_device_cache_hold(bkv_device_cache_t *cache, const void *const *records, uint32_t count,
                                   bkv_device_hold_t *holds, bkv_error_t *err);
void bkv_device_cache_let_go(bkv_device_cache_t *cache, const bkv_device_hold_t *holds, uint32_t count);

// Closes the cache after an error of CUDA's.
bkv_status_t bkv_device_cache_fail(bkv_device_cache_t *cache, int error, bkv_error_t *err);

#endif
