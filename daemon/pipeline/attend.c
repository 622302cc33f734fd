// attend.c - Attend: weighted attention of given queries over resident records, on a compute thread, next to the data: on the GPU
// where the pipeline has a cache there, else and whenever that cannot be on the CPU. And what warms that cache.
//
// The arithmetic is kernels/; this file checks the request, pins the records and counts.
#include "daemon/pipeline/internal.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define MAX_QUERY_HEADS 65536
#define MAX_QUERIES     65536

typedef struct attend {
    bkv_job_t job; // first: the pool knows only this
    bkv_pipeline_t *pipeline;
    const bkv_model_t *model;
    bkv_attend_args_t args;
    bkv_attend_done_t done;
    void *user;
    uint32_t count;
    bkv_key_t keys[];
} attend_t;

static bkv_status_t check_args(const bkv_model_t *model, bkv_attend_args_t *args, bkv_error_t *err) {
    const bkv_shape_t *shape = &model->shape;
    if (args->first_layer >= shape->layers) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "first_layer: %u is not below %u", args->first_layer, shape->layers);
    }
    if (args->layers == 0) {
        args->layers = shape->layers - args->first_layer;
    }
    if (args->layers > shape->layers - args->first_layer) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "layers: %u from %u on are more than %u", args->layers, args->first_layer,
                        shape->layers);
    }
    if (args->query_heads == 0 || args->query_heads > MAX_QUERY_HEADS || args->query_heads % shape->heads != 0) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "query_heads: %u is not a multiple of the %u KV heads within 1..%d",
                        args->query_heads, shape->heads, MAX_QUERY_HEADS);
    }
    if (args->queries == 0 || args->queries > MAX_QUERIES) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "queries: %u is not within 1..%d", args->queries, MAX_QUERIES);
    }
    if (!isfinite(args->scale)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "scale: not a finite number");
    }
    return BKV_OK;
}

static bkv_status_t check_queries(const attend_t *attend, bkv_error_t *err) {
    const bkv_attend_args_t *args = &attend->args;
    size_t numbers = (size_t)args->layers * args->query_heads * args->queries * attend->model->shape.key_dim;
    for (size_t i = 0; i < numbers; i++) {
        if (!isfinite(args->q[i])) {
            return bkv_fail(err, BKV_INVALID_ARGUMENT, "q: number %zu is not finite", i);
        }
    }
    return BKV_OK;
}

static bkv_status_t attend_records(const attend_t *attend, bkv_scratch_t *scratch, const bkv_gather_t *gather,
                                   bkv_error_t *err) {
    bkv_device_cache_t *device = attend->pipeline->device;
    if (device != NULL && bkv_device_cache_attend(device, gather->records, gather->count, &attend->args, NULL) == BKV_OK) {
        bkv_count(&attend->pipeline->counters.attends_gpu_total, 1);
        return BKV_OK;
    }
    const bkv_backend_t *backend = attend->pipeline->config.backend;
    void *workspace = bkv_scratch_get(scratch, bkv_attend_workspace(backend, gather->records, gather->count, &attend->args));
    if (workspace == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for attention's workspace");
    }
    return bkv_attend(backend, gather->records, gather->count, &attend->args, workspace, err);
}

static bkv_status_t answer_attend(const attend_t *attend, bkv_scratch_t *scratch, bkv_error_t *err) {
    bkv_status_t status = check_queries(attend, err);
    if (status != BKV_OK) {
        return status;
    }
    bkv_gather_t gather;
    status = bkv_gather_pin(attend->pipeline, &attend->model->id, attend->keys, attend->count, &gather, err);
    if (status != BKV_OK) {
        return status;
    }
    status = attend_records(attend, scratch, &gather, err);
    bkv_gather_unpin(attend->pipeline, &gather);
    return status;
}

static void attend_finish(attend_t *attend, const bkv_error_t *error) {
    bkv_attend_done_t done = attend->done;
    void *user = attend->user;
    free(attend);
    done(user, error);
}

static void attend_run(bkv_job_t *job, bkv_scratch_t *scratch) {
    attend_t *attend = (attend_t *)job;
    bkv_error_t error = {.status = BKV_OK};
    if (answer_attend(attend, scratch, &error) == BKV_OK) {
        bkv_count(&attend->pipeline->counters.attends_total, 1);
    }
    attend_finish(attend, &error);
}

static void attend_cancel(bkv_job_t *job) {
    bkv_error_t error;
    bkv_fail(&error, BKV_CANCELLED, "the daemon stopped before attention was computed");
    attend_finish((attend_t *)job, &error);
}

bkv_status_t bkv_attend_start(bkv_pipeline_t *pipeline, const bkv_spec_id_t *spec_id, const bkv_key_t *keys, uint32_t count,
                              const bkv_attend_args_t *args, uint64_t now_ms, bkv_attend_done_t done, void *user,
                              bkv_error_t *err) {
    (void)now_ms; // its work is done on a compute thread, later
    const bkv_model_t *model;
    bkv_attend_args_t checked = *args;
    bkv_status_t status = bkv_pipeline_admit(pipeline, spec_id, &model, err);
    if (status == BKV_OK) {
        status = bkv_pipeline_check_batch(pipeline, count, err);
    }
    if (status == BKV_OK) {
        status = check_args(model, &checked, err);
    }
    if (status != BKV_OK) {
        return status;
    }
    attend_t *attend = calloc(1, sizeof(*attend) + count * sizeof(keys[0]));
    if (attend == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for an Attend");
    }
    attend->job = (bkv_job_t){.run = attend_run, .cancel = attend_cancel};
    attend->pipeline = pipeline;
    attend->model = model;
    attend->args = checked;
    attend->done = done;
    attend->user = user;
    attend->count = count;
    memcpy(attend->keys, keys, count * sizeof(keys[0]));
    status = bkv_pipeline_submit(pipeline, &attend->job, err);
    if (status != BKV_OK) {
        free(attend);
    }
    return status;
}

// ---- warming ----

typedef struct warm {
    bkv_job_t job; // first: the pool knows only this
    bkv_pipeline_t *pipeline;
    bkv_spec_id_t spec_id;
    bkv_warm_done_t done;
    void *user;
    uint32_t count;
    bkv_key_t keys[];
} warm_t;

static void warm_finish(warm_t *warm, const bkv_error_t *error, uint32_t count) {
    bkv_warm_done_t done = warm->done;
    void *user = warm->user;
    free(warm);
    done(user, error, count);
}

// Those that are resident, pinned.
static bkv_status_t warm_gather(const warm_t *warm, bkv_gather_t *gather, bkv_error_t *err) {
    uint64_t now_ms = warm->pipeline->config.now_ms();
    bkv_status_t status = bkv_gather_init(gather, warm->count, err);
    for (uint32_t i = 0; i < warm->count && status == BKV_OK; i++) {
        bkv_pin_t pin;
        if (bkv_pin_checked(warm->pipeline, &warm->spec_id, &warm->keys[i], now_ms, &pin, NULL) == BKV_OK) {
            bkv_gather_add(gather, &pin);
        }
    }
    return status;
}

static void warm_run(bkv_job_t *job, bkv_scratch_t *scratch) {
    (void)scratch;
    warm_t *warm = (warm_t *)job;
    bkv_error_t error = {.status = BKV_OK};
    bkv_gather_t gather;
    if (warm_gather(warm, &gather, &error) == BKV_OK) {
        bkv_device_cache_load(warm->pipeline->device, gather.records, gather.count, &error);
    }
    const uint32_t count = gather.count;
    bkv_gather_unpin(warm->pipeline, &gather);
    warm_finish(warm, &error, count);
}

static void warm_cancel(bkv_job_t *job) {
    bkv_error_t error;
    bkv_fail(&error, BKV_CANCELLED, "the daemon stopped before the records were brought to the GPU");
    warm_finish((warm_t *)job, &error, 0);
}

bkv_status_t bkv_warm_start(bkv_pipeline_t *pipeline, const bkv_spec_id_t *spec_id, const bkv_key_t *keys, uint32_t count,
                            bkv_warm_done_t done, void *user, bkv_error_t *err) {
    if (pipeline->device == NULL) {
        return bkv_fail(err, BKV_UNIMPLEMENTED, "keys: this daemon has no GPU cache (compute.gpu_cache)");
    }
    warm_t *warm = calloc(1, sizeof(*warm) + count * sizeof(keys[0]));
    if (warm == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory to warm %u records", count);
    }
    *warm = (warm_t){.job = {.run = warm_run, .cancel = warm_cancel},
                     .pipeline = pipeline,
                     .spec_id = *spec_id,
                     .done = done,
                     .user = user,
                     .count = count};
    memcpy(warm->keys, keys, count * sizeof(keys[0]));
    bkv_status_t status = bkv_pipeline_submit(pipeline, &warm->job, err);
    if (status != BKV_OK) {
        free(warm);
    }
    return status;
}
