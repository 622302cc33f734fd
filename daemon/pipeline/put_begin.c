// put_begin.c - Put: checks a block's arguments and takes the memory that its payload, or its record, will arrive in; and gives
// everything back.
//
// Where the bytes go: of a `raw` block straight to their final place in a reserved slot of the store, so that they are never
// copied again; of any other codec to staging memory. A block in GPU memory is made a record there, which arrives in a slot of
// its own. A key that is resident already needs none of it: its bytes are counted. How they arrive is put.c's.
#include "daemon/pipeline/ingest.h"

#include <assert.h>
#include <stdlib.h>

static bkv_status_t check_args(const bkv_pipeline_t *pipeline, const bkv_model_t *model, const bkv_ingest_args_t *args,
                               bkv_error_t *err) {
    if (args->tokens == 0 || args->tokens > model->shape.tokens) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "block.tokens: %u is not within 1..%u (spec.block_tokens)", args->tokens,
                        model->shape.tokens);
    }
    bkv_shape_t shape = model->shape;
    shape.tokens = args->tokens;
    uint64_t expected = bkv_shape_bytes(&shape);
    if (args->payload_bytes != expected) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "block.payload_bytes: %llu, but %u tokens of this spec are %llu",
                        (unsigned long long)args->payload_bytes, args->tokens, (unsigned long long)expected);
    }
    if (expected > pipeline->config.max_block_bytes) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "block.payload_bytes: %llu is more than %llu (limits.max_block)",
                        (unsigned long long)expected, (unsigned long long)pipeline->config.max_block_bytes);
    }
    if (args->position > UINT64_MAX - args->tokens) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "block.position: %llu is past the end of any sequence",
                        (unsigned long long)args->position);
    }
    if (args->on_device && args->has_checksum) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "block.has_checksum: a payload in GPU memory is not read here to be summed");
    }
    return BKV_OK;
}

static bkv_status_t resolve_params(const bkv_model_t *model, const bkv_ingest_args_t *args, bkv_codec_params_t *params,
                                   bkv_error_t *err) {
    *params = model->params;
    if (args->codec != 0) {
        params->codec = args->codec;
    }
    if (args->rate != 0) {
        params->rate = args->rate;
    }
    bkv_error_t cause;
    bkv_status_t status = bkv_codec_check(params, &cause);
    return status == BKV_OK ? BKV_OK : bkv_fail(err, status, "block.%s", cause.message);
}

bkv_record_id_t bkv_ingest_record_id(const bkv_ingest_t *ingest) {
    return (bkv_record_id_t){.key = ingest->args.key,
                             .spec_id = ingest->args.spec_id,
                             .tenant = ingest->model->tenant,
                             .position = ingest->args.position};
}

static bkv_status_t reserve_slot(bkv_ingest_t *ingest, uint64_t now_ms, bkv_error_t *err) {
    uint64_t bound = bkv_codec_bound(&ingest->shape, &ingest->params);
    return bkv_store_reserve(ingest->pipeline->config.store, ingest->model->tenant, bound, now_ms, &ingest->slot, err);
}

// A slot whose record lacks only its payload.
static bkv_status_t begin_raw(bkv_ingest_t *ingest, uint64_t now_ms, bkv_error_t *err) {
    ingest->sum = bkv_sum_create();
    if (ingest->sum == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for a Put");
    }
    bkv_status_t status = reserve_slot(ingest, now_ms, err);
    if (status != BKV_OK) {
        return status;
    }
    const bkv_record_id_t id = bkv_ingest_record_id(ingest);
    size_t length = bkv_raw_begin(&ingest->shape, &id, ingest->slot.data), offset = bkv_raw_payload(&ingest->shape);
    assert(length <= ingest->slot.capacity && offset + ingest->args.payload_bytes == length);
    bkv_sum_advance(ingest->sum, ingest->slot.data, offset);
    ingest->payload = ingest->slot.data + offset;
    ingest->finite = true;
    return BKV_OK;
}

// Takes the memory that the payload, or what a device makes of it, will be received into.
static bkv_status_t take_memory(bkv_ingest_t *ingest, uint64_t now_ms, bkv_error_t *err) {
    bkv_pipeline_t *pipeline = ingest->pipeline;
    bkv_store_t *store = pipeline->config.store;
    // A resident record that turns out to be damaged is gone now, and this Put replaces it.
    if (bkv_store_contains(store, &ingest->args.spec_id, &ingest->args.key, now_ms) &&
        bkv_store_pin(store, &ingest->args.spec_id, &ingest->args.key, now_ms, &ingest->resident, NULL) == BKV_OK) {
        ingest->sink = BKV_SINK_NONE;
        return BKV_OK;
    }
    if (ingest->args.on_device) {
        ingest->sink = BKV_SINK_DEVICE;
        return reserve_slot(ingest, now_ms, err);
    }
    if (ingest->params.codec != BKV_CODEC_RAW) {
        void *memory = NULL;
        ingest->sink = BKV_SINK_STAGING;
        bkv_status_t status = bkv_staging_get(pipeline->staging, ingest->args.payload_bytes, &memory, err);
        ingest->payload = memory;
        return status;
    }
    ingest->sink = BKV_SINK_SLOT;
    return begin_raw(ingest, now_ms, err);
}

static bkv_status_t ingest_create(bkv_pipeline_t *pipeline, const bkv_ingest_args_t *args, uint64_t now_ms,
                                  bkv_ingest_t **ingest_out, bkv_error_t *err) {
    const bkv_model_t *model;
    bkv_codec_params_t params;
    bkv_status_t status = bkv_pipeline_admit(pipeline, &args->spec_id, &model, err);
    if (status == BKV_OK) {
        status = check_args(pipeline, model, args, err);
    }
    if (status == BKV_OK) {
        status = resolve_params(model, args, &params, err);
    }
    if (status != BKV_OK) {
        return status;
    }
    bkv_ingest_t *ingest = calloc(1, sizeof(*ingest));
    if (ingest == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for a Put");
    }
    ingest->pipeline = pipeline;
    ingest->model = model;
    ingest->args = *args;
    ingest->params = params;
    ingest->shape = model->shape;
    ingest->shape.tokens = args->tokens;
    status = take_memory(ingest, now_ms, err);
    if (status != BKV_OK) {
        if (status == BKV_BUSY) {
            bkv_count(&pipeline->counters.busy_total, 1);
        }
        bkv_sum_destroy(ingest->sum);
        free(ingest);
        return status;
    }
    *ingest_out = ingest;
    return BKV_OK;
}

bkv_status_t bkv_ingest_begin(bkv_pipeline_t *pipeline, const bkv_ingest_args_t *args, uint64_t now_ms, bkv_ingest_t **ingest,
                              bkv_error_t *err) {
    bkv_status_t status = ingest_create(pipeline, args, now_ms, ingest, err);
    if (status != BKV_OK) {
        bkv_count(&pipeline->counters.put_failed_total, 1);
    }
    return status;
}

// ---- end ----

void bkv_ingest_free(bkv_ingest_t *ingest) {
    if (ingest->sink == BKV_SINK_STAGING) {
        bkv_staging_put(ingest->pipeline->staging, ingest->payload);
    }
    if (ingest->sink == BKV_SINK_NONE) {
        bkv_store_unpin(ingest->pipeline->config.store, &ingest->resident);
    }
    if (ingest->slot.data != NULL) {
        bkv_store_abort(ingest->pipeline->config.store, &ingest->slot);
    }
    bkv_sum_destroy(ingest->sum);
    free(ingest);
}

void bkv_ingest_abort(bkv_ingest_t *ingest) {
    if (ingest == NULL) {
        return;
    }
    bkv_count(&ingest->pipeline->counters.put_failed_total, 1);
    bkv_ingest_free(ingest);
}
