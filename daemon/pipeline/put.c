// put.c - Put: takes a block's bytes in, and on a compute thread makes a record of them and publishes it.
//
// Where the bytes go: of a `raw` block straight to their final place in a reserved slot of the store, so that they are never
// copied again, and each piece is summed and looked through for NaN while it is in the cache; of any other codec to staging
// memory. A key that is resident already needs neither: its bytes are counted.
#include "daemon/pipeline/internal.h"

#include "daemon/observe/clock.h"
#include "kernels/seal.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

// Where an ingest's payload goes, and thereby what must be given back.
typedef enum sink { SINK_STAGING, SINK_SLOT, SINK_NONE } sink_t;

struct bkv_ingest {
    bkv_job_t job; // first: the pool knows only this
    bkv_pipeline_t *pipeline;
    const bkv_model_t *model;
    bkv_ingest_args_t args; // codec and rate resolved in params
    bkv_codec_params_t params;
    bkv_shape_t shape;
    sink_t sink;
    uint8_t *payload; // NULL with SINK_NONE
    uint64_t received;
    bkv_sum_t *sum;     // SINK_SLOT: the record's checksum so far
    uint64_t scanned;   // SINK_SLOT: payload bytes looked through
    bool finite;        // and nothing but numbers in them
    bkv_slot_t slot;    // SINK_SLOT from the start; else while compressing
    bkv_pin_t resident; // with SINK_NONE: the record that was there, pinned, so that the answer stays true
    bkv_ingest_done_t done;
    void *user;
};

// ---- begin ----

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

static bkv_record_id_t record_id(const bkv_ingest_t *ingest) {
    return (bkv_record_id_t){.key = ingest->args.key,
                             .spec_id = ingest->args.spec_id,
                             .tenant = ingest->model->tenant,
                             .position = ingest->args.position};
}

// A slot whose record lacks only its payload.
static bkv_status_t begin_raw(bkv_ingest_t *ingest, uint64_t now_ms, bkv_error_t *err) {
    ingest->sum = bkv_sum_create();
    if (ingest->sum == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for a Put");
    }
    uint64_t bound = bkv_codec_bound(&ingest->shape, &ingest->params);
    bkv_status_t status =
        bkv_store_reserve(ingest->pipeline->config.store, ingest->model->tenant, bound, now_ms, &ingest->slot, err);
    if (status != BKV_OK) {
        return status;
    }
    const bkv_record_id_t id = record_id(ingest);
    size_t length = bkv_raw_begin(&ingest->shape, &id, ingest->slot.data), offset = bkv_raw_payload(&ingest->shape);
    assert(length <= ingest->slot.capacity && offset + ingest->args.payload_bytes == length);
    ingest->payload = ingest->slot.data + offset;
    ingest->finite = true;
    return BKV_OK;
}

// Takes the memory that the payload will be received into.
static bkv_status_t take_memory(bkv_ingest_t *ingest, uint64_t now_ms, bkv_error_t *err) {
    bkv_pipeline_t *pipeline = ingest->pipeline;
    bkv_store_t *store = pipeline->config.store;
    // A resident record that turns out to be damaged is gone now, and this Put replaces it.
    if (bkv_store_contains(store, &ingest->args.spec_id, &ingest->args.key, now_ms) &&
        bkv_store_pin(store, &ingest->args.spec_id, &ingest->args.key, now_ms, &ingest->resident, NULL) == BKV_OK) {
        ingest->sink = SINK_NONE;
        return BKV_OK;
    }
    if (ingest->params.codec != BKV_CODEC_RAW) {
        void *memory = NULL;
        ingest->sink = SINK_STAGING;
        bkv_status_t status = bkv_staging_get(pipeline->staging, ingest->args.payload_bytes, &memory, err);
        ingest->payload = memory;
        return status;
    }
    ingest->sink = SINK_SLOT;
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

// ---- bytes arrive ----

// What is copied before it is summed and looked through: small enough to be in the nearest cache still.
#define PIECE_BYTES ((size_t)64 << 10)

static void advance_raw(bkv_ingest_t *ingest) {
    bkv_sum_advance(ingest->sum, ingest->slot.data, bkv_raw_payload(&ingest->shape) + ingest->received);
    size_t element = bkv_dtype_bytes(ingest->shape.dtype);
    uint64_t whole = ingest->received - ingest->received % element; // a piece may end within a value
    if (!bkv_values_finite(ingest->shape.dtype, ingest->payload + ingest->scanned, (whole - ingest->scanned) / element)) {
        ingest->finite = false;
    }
    ingest->scanned = whole;
}

bkv_status_t bkv_ingest_write(bkv_ingest_t *ingest, const void *bytes, size_t length, bkv_error_t *err) {
    if (length > bkv_ingest_missing(ingest)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "data: more than the %llu bytes of block.payload_bytes",
                        (unsigned long long)ingest->args.payload_bytes);
    }
    while (length > 0) {
        size_t piece = length < PIECE_BYTES ? length : PIECE_BYTES;
        if (ingest->payload != NULL) {
            memcpy(ingest->payload + ingest->received, bytes, piece);
        }
        ingest->received += piece;
        if (ingest->sink == SINK_SLOT) {
            advance_raw(ingest);
        }
        bytes = (const uint8_t *)bytes + piece;
        length -= piece;
    }
    return BKV_OK;
}

uint64_t bkv_ingest_missing(const bkv_ingest_t *ingest) {
    return ingest->args.payload_bytes - ingest->received;
}

// Gives back whatever the ingest still holds, and the ingest.
static void ingest_free(bkv_ingest_t *ingest) {
    if (ingest->sink == SINK_STAGING) {
        bkv_staging_put(ingest->pipeline->staging, ingest->payload);
    }
    if (ingest->sink == SINK_NONE) {
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
    ingest_free(ingest);
}

// ---- commit, on a compute thread ----

static bkv_status_t verify_payload(const bkv_ingest_t *ingest, bkv_error_t *err) {
    if (!ingest->args.has_checksum || ingest->payload == NULL) {
        return BKV_OK;
    }
    uint64_t sum = XXH3_64bits(ingest->payload, ingest->args.payload_bytes);
    if (sum != ingest->args.checksum) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "block.checksum: %016llx was announced, but the payload's is %016llx",
                        (unsigned long long)ingest->args.checksum, (unsigned long long)sum);
    }
    return BKV_OK;
}

// The payload becomes a sealed record in ingest->slot.
static bkv_status_t compress(bkv_ingest_t *ingest, bkv_scratch_t *scratch, size_t *length, bkv_error_t *err) {
    const bkv_pipeline_config_t *config = &ingest->pipeline->config;
    if (ingest->sink == SINK_SLOT && ingest->finite) {
        bkv_record_header_t *header = (bkv_record_header_t *)ingest->slot.data;
        header->checksum = bkv_sum_value(ingest->sum);
        *length = (size_t)header->length;
        return BKV_OK;
    } // else bkv_compress says where it is not finite
    if (ingest->slot.data == NULL) {
        uint64_t bound = bkv_codec_bound(&ingest->shape, &ingest->params);
        bkv_status_t status =
            bkv_store_reserve(config->store, ingest->model->tenant, bound, config->now_ms(), &ingest->slot, err);
        if (status != BKV_OK) {
            return status;
        }
    }
    void *workspace = bkv_scratch_get(scratch, bkv_compress_workspace(config->backend, &ingest->shape, &ingest->params));
    if (workspace == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for the codec's workspace");
    }
    bkv_block_t block;
    bkv_block_from_payload(&ingest->shape, ingest->payload, &block);
    const bkv_record_id_t id = record_id(ingest);
    uint64_t begin_us = bkv_now_us();
    bkv_status_t status = bkv_compress(config->backend, &block, &ingest->params, &id, ingest->slot.data, ingest->slot.capacity,
                                       workspace, length, err);
    if (status == BKV_OK) {
        bkv_record_seal(ingest->slot.data);
    }
    bkv_count(&ingest->pipeline->counters.compress_us_total, bkv_now_us() - begin_us);
    return status;
}

static bkv_status_t store_block(bkv_ingest_t *ingest, bkv_scratch_t *scratch, bkv_ingest_result_t *result, bkv_error_t *err) {
    bkv_pipeline_t *pipeline = ingest->pipeline;
    bkv_status_t status = verify_payload(ingest, err);
    if (status != BKV_OK) {
        return status;
    }
    if (ingest->sink == SINK_NONE) {
        *result = (bkv_ingest_result_t){.duplicate = true, .stored_bytes = ingest->resident.length};
        return BKV_OK;
    }
    size_t length = 0;
    status = compress(ingest, scratch, &length, err);
    if (status != BKV_OK) {
        return status;
    }
    status = bkv_store_publish(pipeline->config.store, &ingest->slot, bkv_pipeline_ttl(pipeline, ingest->args.ttl_ms),
                               ingest->args.payload_bytes, pipeline->config.now_ms(), err);
    ingest->slot.data = NULL; // the store's now, come what may
    result->stored_bytes = length;
    if (status == BKV_ALREADY_EXISTS) { // another Put of the same key was faster
        result->duplicate = true;
        return BKV_OK;
    }
    return status;
}

static void ingest_finish(bkv_ingest_t *ingest, const bkv_error_t *error, const bkv_ingest_result_t *result) {
    bkv_pipeline_counters_t *counters = &ingest->pipeline->counters;
    if (error->status != BKV_OK) {
        bkv_count(&counters->put_failed_total, 1);
    } else if (result->duplicate) {
        bkv_count(&counters->put_duplicates_total, 1);
    } else {
        bkv_count(&counters->put_blocks_total, 1);
    }
    bkv_ingest_done_t done = ingest->done;
    void *user = ingest->user;
    ingest_free(ingest); // before the callback: who hears that it is done may count on the memory
    done(user, error, result);
}

static void ingest_run(bkv_job_t *job, bkv_scratch_t *scratch) {
    bkv_ingest_t *ingest = (bkv_ingest_t *)job;
    bkv_ingest_result_t result = {0};
    bkv_error_t error = {.status = BKV_OK};
    error.status = store_block(ingest, scratch, &result, &error); // also when a first failure was made good on the way
    if (error.status != BKV_OK) {
        result = (bkv_ingest_result_t){0};
    }
    ingest_finish(ingest, &error, &result);
}

static void ingest_cancel(bkv_job_t *job) {
    bkv_error_t error;
    bkv_fail(&error, BKV_CANCELLED, "the daemon stopped before the block was compressed");
    ingest_finish((bkv_ingest_t *)job, &error, &(bkv_ingest_result_t){0});
}

bkv_status_t bkv_ingest_commit(bkv_ingest_t *ingest, bkv_ingest_done_t done, void *user, bkv_error_t *err) {
    if (bkv_ingest_missing(ingest) != 0) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "data: ended after %llu of the %llu bytes of block.payload_bytes",
                        (unsigned long long)ingest->received, (unsigned long long)ingest->args.payload_bytes);
    }
    ingest->job = (bkv_job_t){.run = ingest_run, .cancel = ingest_cancel};
    ingest->done = done;
    ingest->user = user;
    // A raw block that was summed as it came is a record already: a compute thread would only make it wait.
    bool ready = ingest->sink == SINK_NONE || (ingest->sink == SINK_SLOT && ingest->finite && !ingest->args.has_checksum);
    if (ready) {
        ingest_run(&ingest->job, NULL);
        return BKV_OK;
    }
    return bkv_pipeline_submit(ingest->pipeline, &ingest->job, err);
}
