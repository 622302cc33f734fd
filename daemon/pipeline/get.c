// get.c - Get: a record's bytes where they lie, pinned; or, of some layers and heads only, a slice of it in staging memory.
//
// Moving them is the wire's (rpc/) and the transports'; the pin or the slice is held until bkv_delivery_release.
#include "daemon/pipeline/internal.h"

#include "daemon/pipeline/stream.h"
#include "kernels/seal.h"

#include <stdlib.h>
#include <string.h>

// What is summed before it is copied, and thereby read from memory once.
#define PIECE_BYTES ((size_t)32 << 10)

// A larger record than this goes past the cache: who gets it will not find its beginning there anyway.
#define STREAM_FROM ((size_t)1 << 20)

// Fills the counts of 0 in and checks a range against what the model has.
static bkv_status_t check_range(const char *first_name, uint32_t first, const char *count_name, uint32_t *count, uint32_t have,
                                bkv_error_t *err) {
    if (first >= have) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "%s: %u is not below %u", first_name, first, have);
    }
    if (*count == 0) {
        *count = have - first;
    }
    if (*count > have - first) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "%s: %u from %u on are more than %u", count_name, *count, first, have);
    }
    return BKV_OK;
}

static bkv_status_t resolve_range(const bkv_model_t *model, bkv_deliver_range_t *range, bkv_error_t *err) {
    bkv_status_t status = check_range("first_layer", range->first_layer, "layers", &range->layers, model->shape.layers, err);
    if (status == BKV_OK) {
        status = check_range("first_head", range->first_head, "heads", &range->heads, model->shape.heads, err);
    }
    return status;
}

// Copies the range of a pinned record into staging memory.
static bkv_status_t make_slice(bkv_pipeline_t *pipeline, const bkv_pin_t *pin, const bkv_deliver_range_t *range,
                               bkv_delivery_t *delivery, bkv_error_t *err) {
    size_t length = 0;
    bkv_status_t status =
        bkv_record_slice(pin->data, range->first_layer, range->layers, range->first_head, range->heads, NULL, &length, err);
    if (status != BKV_OK) {
        return status;
    }
    void *slice;
    status = bkv_staging_get(pipeline->staging, length, &slice, err);
    if (status != BKV_OK) {
        return status;
    }
    status =
        bkv_record_slice(pin->data, range->first_layer, range->layers, range->first_head, range->heads, slice, &length, err);
    if (status != BKV_OK) {
        bkv_staging_put(pipeline->staging, slice);
        return status;
    }
    bkv_record_seal(slice);
    *delivery = (bkv_delivery_t){.data = slice, .length = length, .slice = slice};
    return BKV_OK;
}

static bkv_status_t deliver_slice(bkv_pipeline_t *pipeline, const bkv_spec_id_t *spec_id, const bkv_key_t *key,
                                  const bkv_deliver_range_t *range, uint64_t now_ms, bkv_delivery_t *delivery,
                                  bkv_error_t *err) {
    bkv_pin_t pin;
    bkv_status_t status = bkv_pin_checked(pipeline, spec_id, key, now_ms, &pin, err);
    if (status != BKV_OK) {
        return status;
    }
    status = make_slice(pipeline, &pin, range, delivery, err);
    delivery->ttl_ms = bkv_store_ttl(pipeline->config.store, &pin, now_ms);
    bkv_store_unpin(pipeline->config.store, &pin);
    if (status == BKV_BUSY) {
        bkv_count(&pipeline->counters.busy_total, 1);
    }
    return status;
}

typedef bkv_status_t (*pin_t)(bkv_store_t *store, const bkv_spec_id_t *spec_id, const bkv_key_t *key, uint64_t now_ms,
                              bkv_pin_t *pin, bkv_error_t *err);

static bkv_status_t deliver_whole(bkv_pipeline_t *pipeline, const bkv_spec_id_t *spec_id, const bkv_key_t *key, uint64_t now_ms,
                                  pin_t pin, bkv_delivery_t *delivery, bkv_error_t *err) {
    bkv_status_t status = pin(pipeline->config.store, spec_id, key, now_ms, &delivery->pin, err);
    if (status == BKV_OK) {
        delivery->data = delivery->pin.data;
        delivery->length = delivery->pin.length;
        delivery->ttl_ms = bkv_store_ttl(pipeline->config.store, &delivery->pin, now_ms);
    }
    return status;
}

// A whole record is pinned by `pin`, and so verified or not.
static bkv_status_t deliver(bkv_pipeline_t *pipeline, const bkv_spec_id_t *spec_id, const bkv_key_t *key,
                            const bkv_deliver_range_t *range, uint64_t now_ms, pin_t pin, bkv_delivery_t *delivery,
                            bkv_error_t *err) {
    *delivery = (bkv_delivery_t){0};
    const bkv_model_t *model;
    bkv_deliver_range_t wanted = *range;
    bkv_status_t status = bkv_model_table_require(pipeline->models, spec_id, &model, err);
    if (status == BKV_OK) {
        status = resolve_range(model, &wanted, err);
    }
    if (status != BKV_OK) {
        return status;
    }
    if (wanted.layers == model->shape.layers && wanted.heads == model->shape.heads) {
        status = deliver_whole(pipeline, spec_id, key, now_ms, pin, delivery, err);
    } else {
        status = deliver_slice(pipeline, spec_id, key, &wanted, now_ms, delivery, err);
    }
    if (status == BKV_OK) {
        bkv_count(&pipeline->counters.get_records_total, 1);
    }
    return status;
}

bkv_status_t bkv_deliver(bkv_pipeline_t *pipeline, const bkv_spec_id_t *spec_id, const bkv_key_t *key,
                         const bkv_deliver_range_t *range, uint64_t now_ms, bkv_delivery_t *delivery, bkv_error_t *err) {
    return deliver(pipeline, spec_id, key, range, now_ms, bkv_store_pin, delivery, err);
}

bkv_status_t bkv_deliver_unverified(bkv_pipeline_t *pipeline, const bkv_spec_id_t *spec_id, const bkv_key_t *key,
                                    const bkv_deliver_range_t *range, uint64_t now_ms, bkv_delivery_t *delivery,
                                    bkv_error_t *err) {
    return deliver(pipeline, spec_id, key, range, now_ms, bkv_store_pin_unverified, delivery, err);
}

bkv_status_t bkv_deliver_whole(bkv_pipeline_t *pipeline, const bkv_name_t *name, uint64_t now_ms, bkv_delivery_t *delivery,
                               bkv_error_t *err) {
    *delivery = (bkv_delivery_t){0};
    bkv_status_t status = deliver_whole(pipeline, &name->spec_id, &name->key, now_ms, bkv_store_pin, delivery, err);
    if (status == BKV_OK) {
        bkv_count(&pipeline->counters.get_records_total, 1);
    }
    return status;
}

// ---- a delivery's bytes ----

bkv_status_t bkv_delivery_verify(bkv_pipeline_t *pipeline, const bkv_delivery_t *delivery, bkv_error_t *err) {
    if (delivery->slice != NULL) { // of a record that was verified, and sealed here
        return BKV_OK;
    }
    bkv_status_t status = bkv_record_verify(delivery->data, delivery->length, err);
    if (status != BKV_OK) {
        bkv_store_damaged(pipeline->config.store, &delivery->pin);
    }
    return status;
}

static void copy_summed(const bkv_delivery_t *delivery, uint8_t *to, bkv_sum_t *sum) {
    bool stream = delivery->length >= STREAM_FROM;
    for (uint64_t at = 0; at < delivery->length; at += PIECE_BYTES) {
        uint64_t left = delivery->length - at, piece = left < PIECE_BYTES ? left : PIECE_BYTES;
        bkv_sum_advance(sum, delivery->data, at + piece);
        if (stream) {
            bkv_stream_copy(to + at, delivery->data + at, piece);
        } else {
            memcpy(to + at, delivery->data + at, piece);
        }
    }
}

// What is summed is the record, which nobody writes to, and not the copy: that may lie in memory of the client's.
bkv_status_t bkv_delivery_copy(bkv_pipeline_t *pipeline, const bkv_delivery_t *delivery, void *to, bkv_error_t *err) {
    bkv_sum_t *sum = bkv_sum_create();
    if (sum == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for a Get");
    }
    _Alignas(BKV_RECORD_ALIGN) bkv_record_header_t header;
    memcpy(&header, delivery->data, sizeof(header));
    copy_summed(delivery, to, sum);
    uint64_t value = bkv_sum_value(sum);
    bkv_sum_destroy(sum);
    if (header.length == delivery->length && header.checksum == value) {
        return BKV_OK;
    }
    if (delivery->slice == NULL) {
        bkv_store_damaged(pipeline->config.store, &delivery->pin);
    }
    return bkv_fail(err, BKV_DATA_LOSS, "checksum: the record says %016llx, its bytes give %016llx",
                    (unsigned long long)header.checksum, (unsigned long long)value);
}

void bkv_delivery_release(bkv_pipeline_t *pipeline, bkv_delivery_t *delivery) {
    if (delivery->slice != NULL) {
        bkv_staging_put(pipeline->staging, delivery->slice);
    } else if (delivery->data != NULL) {
        bkv_store_unpin(pipeline->config.store, &delivery->pin);
    }
    *delivery = (bkv_delivery_t){0};
}
