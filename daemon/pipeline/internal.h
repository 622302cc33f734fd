// internal.h - what the files of pipeline/ share; nobody else includes it.
#ifndef BKV_PIPELINE_INTERNAL_H
#define BKV_PIPELINE_INTERNAL_H

#include "daemon/pipeline/device_cache.h"
#include "daemon/pipeline/pipeline.h"
#include "daemon/pipeline/pool.h"
#include "daemon/pipeline/staging.h"

#include <stdatomic.h>

// One atomic per metric; the gauges among them stay 0 here and are read where they live.
typedef struct bkv_pipeline_counters {
#define X(name, is_counter, help) _Atomic uint64_t name;
    BKV_PIPELINE_METRICS(X)
#undef X
} bkv_pipeline_counters_t;

struct bkv_pipeline {
    bkv_pipeline_config_t config; // default_ttl_ms apart, see below
    bkv_model_table_t *models;
    bkv_staging_t *staging;
    bkv_pool_t *pool;
    bkv_device_cache_t *device; // NULL: none
    _Atomic bool draining;
    _Atomic uint64_t default_ttl_ms;
    bkv_pipeline_counters_t counters;
};

static inline void bkv_count(_Atomic uint64_t *counter, uint64_t by) {
    atomic_fetch_add_explicit(counter, by, memory_order_relaxed);
}

// The door: BUSY once draining, NOT_FOUND for a spec that is not open.
bkv_status_t bkv_pipeline_admit(bkv_pipeline_t *pipeline, const bkv_spec_id_t *spec_id, const bkv_model_t **model,
                                bkv_error_t *err);

// 1..max_batch keys, else INVALID_ARGUMENT or RESOURCE_EXHAUSTED.
bkv_status_t bkv_pipeline_check_batch(const bkv_pipeline_t *pipeline, uint32_t count, bkv_error_t *err);

// The time to live that a request's ttl_ms means.
uint64_t bkv_pipeline_ttl(const bkv_pipeline_t *pipeline, uint64_t ttl_ms);

// Pinned and validated records, for work that needs several at once.
typedef struct bkv_gather {
    uint32_t count;
    bkv_pin_t *pins;      // [count]
    const void **records; // [count], = pins[i].data
} bkv_gather_t;

// Room for `count` pins, none taken yet; add takes one over. Unpin also after a failure.
bkv_status_t bkv_gather_init(bkv_gather_t *gather, uint32_t count, bkv_error_t *err);
void bkv_gather_add(bkv_gather_t *gather, const bkv_pin_t *pin);

// Pins the records of all keys, or none: then the error names the first key at fault by its place.
bkv_status_t bkv_gather_pin(bkv_pipeline_t *pipeline, const bkv_spec_id_t *spec_id, const bkv_key_t *keys, uint32_t count,
                            bkv_gather_t *gather, bkv_error_t *err);
void bkv_gather_unpin(bkv_pipeline_t *pipeline, bkv_gather_t *gather);

// Pins one record and validates its structure too (its checksum is the store's to verify): DATA_LOSS drops it.
bkv_status_t bkv_pin_checked(bkv_pipeline_t *pipeline, const bkv_spec_id_t *spec_id, const bkv_key_t *key, uint64_t now_ms,
                             bkv_pin_t *pin, bkv_error_t *err);

// A run of consecutive resident records that is to become one (fold_tree.c).
typedef struct bkv_fold_run {
    const bkv_model_t *model;
    const bkv_key_t *keys;  // [count]
    const uint64_t *before; // [count + 1]: bytes of the records before each; only differences count
    uint32_t count;
    uint32_t number; // of keys[0] among the request's keys, for messages
    uint64_t ttl_ms;
} bkv_fold_run_t;

// The key of a fold (see bkv_fold_start).
bkv_status_t bkv_fold_key(const bkv_model_t *model, const bkv_key_t *keys, uint32_t count, uint64_t budget, bkv_key_t *key,
                          bkv_error_t *err);

// Makes the run's fold, in at most `budget` bytes, publishes it under `key` and pins it. On a compute thread.
bkv_status_t bkv_fold_run(bkv_pipeline_t *pipeline, const bkv_fold_run_t *run, uint64_t budget, const bkv_key_t *key,
                          bkv_scratch_t *scratch, bkv_pin_t *pin, bkv_error_t *err);

#endif
