// attend.c - Attend: weighted attention of given queries over resident records, on a compute thread, next to the data.
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
