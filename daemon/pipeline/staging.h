// staging.h - bounded memory for payloads on their way to a codec, and for slices on their way out.
//
// One mapping, handed out as contiguous extents from its lowest free address: memory that was used before is used again, and
// so is already backed by pages (fresh pages cost several times more than copying into used ones).
#ifndef BKV_STAGING_H
#define BKV_STAGING_H

#include "kernels/status.h"

#include <stdint.h>

#define BKV_STAGING_UNIT 65536 // extents are multiples of this

typedef struct bkv_staging bkv_staging_t;

// `bytes` is rounded up to whole units. Pages are taken from the system on first use and kept.
bkv_status_t bkv_staging_create(uint64_t bytes, bkv_staging_t **staging, bkv_error_t *err);

// Asserts that everything was given back.
void bkv_staging_destroy(bkv_staging_t *staging);

// `bytes` (> 0) contiguous bytes, page aligned, contents undefined. BUSY: not free right now. RESOURCE_EXHAUSTED: more than all of
// the staging memory. Thread-safe.
bkv_status_t bkv_staging_get(bkv_staging_t *staging, uint64_t bytes, void **memory, bkv_error_t *err);
void bkv_staging_put(bkv_staging_t *staging, void *memory);

// All of it.
void bkv_staging_memory(const bkv_staging_t *staging, void **memory, uint64_t *bytes);

// Bytes handed out, rounding included.
uint64_t bkv_staging_used(bkv_staging_t *staging);

#endif
