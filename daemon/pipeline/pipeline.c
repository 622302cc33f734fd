// pipeline.c - makes and ends the pipeline, and what its operations share: the door, the metrics, pinning several records.
//
// The operations themselves are in put.c, get.c, fold.c and attend.c.
#include "daemon/pipeline/pipeline.h"

#include "daemon/pipeline/internal.h"

#include <assert.h>
#include <stdlib.h>

// Longer than anybody waits, short enough that adding it to a clock cannot overflow.
#define MAX_TTL_MS (UINT64_C(1) << 50)

static bkv_status_t open_device(bkv_pipeline_t *pipeline, bkv_error_t *err) {
    bkv_error_t cause;
    if (pipeline->config.gpu_cache_bytes == 0) {
        return BKV_OK;
    }
    bkv_status_t status = bkv_device_cache_create(pipeline->config.gpu_cache_bytes, &pipeline->device, &cause);
    return status == BKV_OK ? BKV_OK
                            : bkv_fail(err, status == BKV_UNIMPLEMENTED ? BKV_INVALID_ARGUMENT : status,
                                       "compute.gpu_cache: %.200s", cause.message);
}

bkv_status_t bkv_pipeline_create(const bkv_pipeline_config_t *config, bkv_pipeline_t **pipeline_out, bkv_error_t *err) {
    assert(config->store != NULL && config->backend != NULL && config->now_ms != NULL);
    assert(config->max_jobs > 0 && config->max_specs > 0 && config->max_batch > 0);
    bkv_pipeline_t *pipeline = calloc(1, sizeof(*pipeline));
    if (pipeline == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for the pipeline");
    }
    pipeline->config = *config;
    atomic_store(&pipeline->default_ttl_ms, config->default_ttl_ms);
    bkv_status_t status = BKV_OK;
    pipeline->models = bkv_model_table_create(config->max_specs);
    if (pipeline->models == NULL) {
        status = bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "limits.max_specs: no memory for %u specs", config->max_specs);
    }
    if (status == BKV_OK) {
        status = bkv_staging_create(config->staging_bytes, &pipeline->staging, err);
    }
    if (status == BKV_OK) {
        status = open_device(pipeline, err);
    }
    if (status == BKV_OK) {
        status = bkv_pool_create(config->compute_threads, config->max_jobs, &pipeline->pool, err);
    }
    if (status != BKV_OK) {
        bkv_pipeline_destroy(pipeline);
        return status;
    }
    *pipeline_out = pipeline;
    return BKV_OK;
}

void bkv_pipeline_drain(bkv_pipeline_t *pipeline) {
    atomic_store(&pipeline->draining, true);
}

bool bkv_pipeline_wait_idle(bkv_pipeline_t *pipeline, uint64_t timeout_ms) {
    return bkv_pool_wait_idle(pipeline->pool, timeout_ms);
}

void bkv_pipeline_destroy(bkv_pipeline_t *pipeline) {
    if (pipeline == NULL) {
        return;
    }
    atomic_store(&pipeline->draining, true);
    bkv_pool_destroy(pipeline->pool); // first: its last jobs still use everything else
    bkv_device_cache_destroy(pipeline->device);
    bkv_staging_destroy(pipeline->staging);
    bkv_model_table_destroy(pipeline->models);
    free(pipeline);
}

void bkv_pipeline_set_default_ttl(bkv_pipeline_t *pipeline, uint64_t ttl_ms) {
    atomic_store(&pipeline->default_ttl_ms, ttl_ms);
}

bkv_model_table_t *bkv_pipeline_models(bkv_pipeline_t *pipeline) {
    return pipeline->models;
}

void bkv_pipeline_staging(bkv_pipeline_t *pipeline, void **memory, uint64_t *bytes) {
    bkv_staging_memory(pipeline->staging, memory, bytes);
}

void bkv_pipeline_device_lost(bkv_pipeline_t *pipeline) {
    if (pipeline->device != NULL) {
        bkv_device_cache_lost(pipeline->device);
    }
}

void bkv_pipeline_metrics(const bkv_pipeline_t *pipeline, bkv_pipeline_metrics_t *metrics) {
#define X(name, is_counter, help) metrics->name = atomic_load_explicit(&pipeline->counters.name, memory_order_relaxed);
    BKV_PIPELINE_METRICS(X)
#undef X
    bkv_pool_state_t jobs;
    bkv_pool_state(pipeline->pool, &jobs);
    metrics->jobs_queued = jobs.queued;
    metrics->jobs_running = jobs.running;
    metrics->jobs_ended_total = jobs.ended;
    metrics->staging_bytes = bkv_staging_used(pipeline->staging);
    metrics->specs = bkv_model_table_count(pipeline->models);
    if (pipeline->device != NULL) {
        bkv_device_cache_state_t device;
        bkv_device_cache_state(pipeline->device, &device);
        metrics->gpu_hits_total = device.hits;
        metrics->gpu_loads_total = device.loads;
        metrics->gpu_records = device.records;
        metrics->gpu_bytes = device.bytes;
    }
}

// ---- the door ----

bkv_status_t bkv_pipeline_admit(bkv_pipeline_t *pipeline, const bkv_spec_id_t *spec_id, const bkv_model_t **model,
                                bkv_error_t *err) {
    if (atomic_load(&pipeline->draining)) {
        bkv_count(&pipeline->counters.busy_total, 1);
        return bkv_fail(err, BKV_BUSY, "draining: this daemon is about to stop");
    }
    return bkv_model_table_require(pipeline->models, spec_id, model, err);
}

bkv_status_t bkv_pipeline_check_batch(const bkv_pipeline_t *pipeline, uint32_t count, bkv_error_t *err) {
    if (count == 0) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "keys: none given");
    }
    if (count > pipeline->config.max_batch) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "keys: %u are more than %u (limits.max_batch)", count,
                        pipeline->config.max_batch);
    }
    return BKV_OK;
}

bkv_status_t bkv_pipeline_submit(bkv_pipeline_t *pipeline, bkv_job_t *job, bkv_error_t *err) {
    bkv_status_t status = bkv_pool_submit(pipeline->pool, job, err);
    if (status == BKV_BUSY) {
        bkv_count(&pipeline->counters.busy_total, 1);
    }
    return status;
}

uint64_t bkv_pipeline_ttl(const bkv_pipeline_t *pipeline, uint64_t ttl_ms) {
    uint64_t ttl = ttl_ms != 0 ? ttl_ms : atomic_load(&pipeline->default_ttl_ms);
    return ttl < MAX_TTL_MS ? ttl : MAX_TTL_MS;
}

// ---- several records at once ----

bkv_status_t bkv_pin_checked(bkv_pipeline_t *pipeline, const bkv_spec_id_t *spec_id, const bkv_key_t *key, uint64_t now_ms,
                             bkv_pin_t *pin, bkv_error_t *err) {
    bkv_store_t *store = pipeline->config.store;
    bkv_status_t status = bkv_store_pin(store, spec_id, key, now_ms, pin, err);
    if (status != BKV_OK) {
        return status;
    }
    bkv_error_t cause;
    if (bkv_record_check(pin->data, pin->length, &cause) != BKV_OK) { // an arena that another program wrote to
        bkv_store_drop(store, spec_id, key, now_ms);
        bkv_store_unpin(store, pin);
        return bkv_fail(err, BKV_DATA_LOSS, "the stored record is malformed (%s); it has been dropped", cause.message);
    }
    return BKV_OK;
}

bkv_status_t bkv_gather_init(bkv_gather_t *gather, uint32_t count, bkv_error_t *err) {
    *gather =
        (bkv_gather_t){.pins = malloc(count * sizeof(gather->pins[0])), .records = malloc(count * sizeof(gather->records[0]))};
    if (gather->pins == NULL || gather->records == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "keys: no memory for %u", count);
    }
    return BKV_OK;
}

void bkv_gather_add(bkv_gather_t *gather, const bkv_pin_t *pin) {
    gather->pins[gather->count] = *pin;
    gather->records[gather->count] = pin->data;
    gather->count++;
}

bkv_status_t bkv_gather_pin(bkv_pipeline_t *pipeline, const bkv_spec_id_t *spec_id, const bkv_key_t *keys, uint32_t count,
                            bkv_gather_t *gather, bkv_error_t *err) {
    uint64_t now_ms = pipeline->config.now_ms();
    bkv_status_t status = bkv_gather_init(gather, count, err);
    for (uint32_t i = 0; i < count && status == BKV_OK; i++) {
        bkv_pin_t pin;
        bkv_error_t cause;
        status = bkv_pin_checked(pipeline, spec_id, &keys[i], now_ms, &pin, &cause);
        if (status != BKV_OK) {
            status = bkv_fail(err, status, "keys[%u]: %.200s", i, cause.message);
        } else {
            bkv_gather_add(gather, &pin);
        }
    }
    if (status != BKV_OK) {
        bkv_gather_unpin(pipeline, gather);
    }
    return status;
}

void bkv_gather_unpin(bkv_pipeline_t *pipeline, bkv_gather_t *gather) {
    for (uint32_t i = 0; i < gather->count; i++) {
        bkv_store_unpin(pipeline->config.store, &gather->pins[i]);
    }
    free(gather->pins);
    free(gather->records);
    *gather = (bkv_gather_t){0};
}
