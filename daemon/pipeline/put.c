// put.c - Put: takes a block's bytes in, and on a compute thread makes a record of them and publishes it. What it begins with
// and how it ends is put_begin.c's.
//
// Bytes come by _write, from the caller or from a reader on the compute thread, or by DMA into _memory. A raw block's are
// summed and looked through for NaN in pieces that stay in the nearest cache: on their way, or where DMA has put them. A record
// that a device has made lacks only its checksum.
#include "daemon/pipeline/ingest.h"

#include "daemon/observe/clock.h"
#include "daemon/pipeline/stream.h"

#include <assert.h>
#include <string.h>
#include <xxhash.h>

// ---- bytes arrive ----

// Small enough that what was just copied or summed is still in the nearest cache. 4 to 16 KiB were the fastest.
#define PIECE_BYTES  ((size_t)8 << 10)
#define WIDEST_VALUE 4 // bytes: fp32

// The source may be memory of a client, who can change it at any time, so it is read once, and only the copy is looked at.
static void take_raw(bkv_ingest_t *ingest, const void *bytes, size_t length) {
    _Alignas(64) uint8_t values[WIDEST_VALUE + PIECE_BYTES];
    uint8_t *to = ingest->payload + ingest->received;
    size_t element = bkv_dtype_bytes(ingest->shape.dtype);
    size_t begun = ingest->received % element; // bytes of a value that the piece before this one ended within
    memcpy(values, to - begun, begun);
    memcpy(values + begun, bytes, length);
    bkv_sum_append(ingest->sum, values + begun, length);
    if (!bkv_values_finite(ingest->shape.dtype, values, (begun + length) / element)) {
        ingest->finite = false;
    }
    bkv_stream_copy(to, values + begun, length);
}

bkv_status_t bkv_ingest_write(bkv_ingest_t *ingest, const void *bytes, size_t length, bkv_error_t *err) {
    if (length > bkv_ingest_missing(ingest)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "data: more than the %llu bytes of block.payload_bytes",
                        (unsigned long long)ingest->args.payload_bytes);
    }
    assert(ingest->sink != BKV_SINK_DEVICE);
    if (ingest->sink == BKV_SINK_STAGING) { // a codec reads it soon
        memcpy(ingest->payload + ingest->received, bytes, length);
    }
    if (ingest->sink != BKV_SINK_SLOT) {
        ingest->received += length;
        return BKV_OK;
    }
    while (length > 0) {
        size_t piece = length < PIECE_BYTES ? length : PIECE_BYTES;
        take_raw(ingest, bytes, piece);
        ingest->received += piece;
        bytes = (const uint8_t *)bytes + piece;
        length -= piece;
    }
    return BKV_OK;
}

uint64_t bkv_ingest_missing(const bkv_ingest_t *ingest) {
    return ingest->args.payload_bytes - ingest->received;
}

uint64_t bkv_ingest_bytes(const bkv_ingest_t *ingest) {
    return ingest->args.payload_bytes;
}

void *bkv_ingest_memory(bkv_ingest_t *ingest) {
    assert(ingest->sink != BKV_SINK_DEVICE && ingest->received == 0);
    return ingest->payload;
}

void bkv_ingest_filled(bkv_ingest_t *ingest) {
    assert(ingest->sink != BKV_SINK_DEVICE && ingest->received == 0);
    ingest->received = ingest->args.payload_bytes;
    ingest->unseen = ingest->sink == BKV_SINK_SLOT;
}

void bkv_ingest_device(bkv_ingest_t *ingest, bkv_ingest_device_t *device) {
    assert(ingest->args.on_device);
    *device = (bkv_ingest_device_t){.shape = ingest->shape,
                                    .params = ingest->params,
                                    .id = bkv_ingest_record_id(ingest),
                                    .record = ingest->slot.data,
                                    .capacity = ingest->slot.data != NULL ? ingest->slot.capacity : 0};
}

void bkv_ingest_made(bkv_ingest_t *ingest, uint64_t length) {
    assert(ingest->sink == BKV_SINK_DEVICE && length <= ingest->slot.capacity);
    ingest->received = ingest->args.payload_bytes;
    ingest->made = length;
}

// ---- commit, on a compute thread ----

static bkv_status_t verify_payload(const bkv_ingest_t *ingest, bkv_error_t *err) {
    if (!ingest->args.has_checksum) {
        return BKV_OK;
    }
    uint64_t sum = XXH3_64bits(ingest->payload, ingest->args.payload_bytes);
    if (sum != ingest->args.checksum) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "block.checksum: %016llx was announced, but the payload's is %016llx",
                        (unsigned long long)ingest->args.checksum, (unsigned long long)sum);
    }
    return BKV_OK;
}

// Sums and looks through a raw payload that DMA brought.
static void look_through(bkv_ingest_t *ingest) {
    size_t element = bkv_dtype_bytes(ingest->shape.dtype);
    for (uint64_t at = 0; at < ingest->args.payload_bytes; at += PIECE_BYTES) {
        uint64_t left = ingest->args.payload_bytes - at, piece = left < PIECE_BYTES ? left : PIECE_BYTES;
        bkv_sum_append(ingest->sum, ingest->payload + at, piece);
        if (!bkv_values_finite(ingest->shape.dtype, ingest->payload + at, piece / element)) {
            ingest->finite = false;
        }
    }
    ingest->unseen = false;
}

// A device has written the record. Its own length is what is summed, so that must be right; and a device can fail.
static bkv_status_t seal_made(bkv_ingest_t *ingest, size_t *length, bkv_error_t *err) {
    bkv_error_t cause;
    if (bkv_record_check(ingest->slot.data, ingest->made, &cause) != BKV_OK) {
        return bkv_fail(err, BKV_INTERNAL, "the device made no sound record of the block: %.200s", cause.message);
    }
    bkv_record_seal(ingest->slot.data);
    *length = ingest->made;
    return BKV_OK;
}

// The payload becomes a sealed record in ingest->slot.
static bkv_status_t compress(bkv_ingest_t *ingest, bkv_scratch_t *scratch, size_t *length, bkv_error_t *err) {
    const bkv_pipeline_config_t *config = &ingest->pipeline->config;
    if (ingest->sink == BKV_SINK_DEVICE) {
        return seal_made(ingest, length, err);
    }
    if (ingest->unseen) {
        look_through(ingest);
    }
    if (ingest->sink == BKV_SINK_SLOT && ingest->finite) {
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
    const bkv_record_id_t id = bkv_ingest_record_id(ingest);
    uint64_t begin_us = bkv_now_us();
    bkv_status_t status = bkv_compress(config->backend, &block, &ingest->params, &id, ingest->slot.data, ingest->slot.capacity,
                                       workspace, length, err);
    if (status == BKV_OK) {
        bkv_record_seal(ingest->slot.data);
    }
    bkv_count(&ingest->pipeline->counters.compress_us_total, bkv_now_us() - begin_us);
    return status;
}

static bkv_status_t check_complete(const bkv_ingest_t *ingest, bkv_error_t *err) {
    if (bkv_ingest_missing(ingest) != 0) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "data: ended after %llu of the %llu bytes of block.payload_bytes",
                        (unsigned long long)ingest->received, (unsigned long long)ingest->args.payload_bytes);
    }
    return BKV_OK;
}

// Brings the payload of a commit_from.
static bkv_status_t bring(bkv_ingest_t *ingest, bkv_error_t *err) {
    if (ingest->read == NULL) {
        return BKV_OK;
    }
    bkv_status_t status = ingest->read(ingest->source, ingest, err);
    return status == BKV_OK ? check_complete(ingest, err) : status;
}

static bkv_status_t store_block(bkv_ingest_t *ingest, bkv_scratch_t *scratch, bkv_ingest_result_t *result, bkv_error_t *err) {
    bkv_pipeline_t *pipeline = ingest->pipeline;
    if (ingest->sink == BKV_SINK_NONE) {
        *result = (bkv_ingest_result_t){.duplicate = true, .stored_bytes = ingest->resident.length};
        return BKV_OK;
    }
    size_t length = 0;
    bkv_status_t status = bring(ingest, err);
    if (status == BKV_OK) {
        status = verify_payload(ingest, err);
    }
    if (status == BKV_OK) {
        status = compress(ingest, scratch, &length, err);
    }
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
    bkv_ingest_free(ingest); // before the callback: who hears that it is done may count on the memory
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

static void set_job(bkv_ingest_t *ingest, bkv_ingest_done_t done, void *user) {
    ingest->job = (bkv_job_t){.run = ingest_run, .cancel = ingest_cancel};
    ingest->done = done;
    ingest->user = user;
}

bkv_status_t bkv_ingest_commit(bkv_ingest_t *ingest, bkv_ingest_done_t done, void *user, bkv_error_t *err) {
    bool resident = ingest->sink == BKV_SINK_NONE;
    bkv_status_t status = resident && ingest->args.on_device ? BKV_OK : check_complete(ingest, err);
    if (status != BKV_OK) {
        return status;
    }
    set_job(ingest, done, user);
    // A raw block that was summed as it came is a record already: a compute thread would only make it wait.
    bool summed = ingest->sink == BKV_SINK_SLOT && ingest->finite && !ingest->unseen && !ingest->args.has_checksum;
    if (resident || summed) {
        ingest_run(&ingest->job, NULL);
        return BKV_OK;
    }
    return bkv_pipeline_submit(ingest->pipeline, &ingest->job, err);
}

bkv_status_t bkv_ingest_commit_from(bkv_ingest_t *ingest, bkv_ingest_read_t read, void *source, bkv_ingest_done_t done,
                                    void *user, bkv_error_t *err) {
    assert(!ingest->args.on_device && ingest->received == 0);
    set_job(ingest, done, user);
    if (ingest->sink == BKV_SINK_NONE) {
        ingest_run(&ingest->job, NULL);
        return BKV_OK;
    }
    ingest->read = read;
    ingest->source = source;
    return bkv_pipeline_submit(ingest->pipeline, &ingest->job, err);
}
