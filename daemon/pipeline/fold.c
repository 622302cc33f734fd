// fold.c - Fold: one record for a prefix, made once and then found under its own key.
//
// The merge-and-reduce itself is kernels/; this file pins its inputs, gives it memory and publishes what comes out.
#include "daemon/pipeline/internal.h"

#include "kernels/seal.h"

#include <assert.h>
#include <openssl/evp.h>
#include <stdlib.h>
#include <string.h>

#define FOLD_TAG "bkv-fold-1"

typedef struct fold {
    bkv_job_t job; // first: the pool knows only this
    bkv_pipeline_t *pipeline;
    const bkv_model_t *model;
    bkv_key_t key; // of the fold
    uint64_t budget, ttl_ms;
    bkv_fold_done_t done;
    void *user;
    uint32_t count;
    bkv_key_t keys[];
} fold_t;

static bkv_status_t fold_key(const bkv_spec_id_t *spec_id, const bkv_key_t *keys, uint32_t count, uint64_t budget,
                             bkv_key_t *key, bkv_error_t *err) {
    uint8_t budget_bytes[8];
    for (int i = 0; i < 8; i++) {
        budget_bytes[i] = (uint8_t)(budget >> (8 * i));
    }
    EVP_MD_CTX *context = EVP_MD_CTX_new();
    bool ok = context != NULL && EVP_DigestInit_ex(context, EVP_sha256(), NULL) == 1 &&
              EVP_DigestUpdate(context, FOLD_TAG, sizeof(FOLD_TAG)) == 1 && // with its NUL
              EVP_DigestUpdate(context, spec_id->bytes, sizeof(spec_id->bytes)) == 1 &&
              EVP_DigestUpdate(context, budget_bytes, sizeof(budget_bytes)) == 1 &&
              EVP_DigestUpdate(context, keys, (size_t)count * sizeof(keys[0])) == 1 &&
              EVP_DigestFinal_ex(context, key->bytes, NULL) == 1;
    EVP_MD_CTX_free(context);
    return ok ? BKV_OK : bkv_fail(err, BKV_INTERNAL, "libcrypto has no SHA-256");
}

_Static_assert(sizeof(bkv_key_t) == BKV_KEY_BYTES, "keys are hashed as one run of bytes");

// More than any record of these tokens can have: every token native, an index and weights for each section. A budget beyond
// it is not worth reserving.
static uint64_t largest_fold(const bkv_shape_t *shape) {
    const bkv_codec_params_t raw = {.codec = BKV_CODEC_RAW};
    uint64_t sections = (uint64_t)shape->layers * shape->heads;
    uint64_t index_and_weights = (uint64_t)shape->tokens / 8 + shape->tokens + 64;
    return bkv_codec_bound(shape, &raw) + sections * index_and_weights;
}

// The shape of all the records together. tokens that no record can stand for are refused.
static bkv_status_t summed_shape(const fold_t *fold, const bkv_gather_t *gather, bkv_shape_t *sum, bkv_error_t *err) {
    *sum = fold->model->shape;
    uint64_t tokens = 0;
    for (uint32_t i = 0; i < gather->count; i++) {
        bkv_shape_t shape;
        bkv_record_shape(gather->records[i], &shape);
        tokens += shape.tokens;
    }
    if (tokens > BKV_MAX_TOKENS) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "keys: %llu tokens are more than %u", (unsigned long long)tokens,
                        BKV_MAX_TOKENS);
    }
    sum->tokens = (uint32_t)tokens;
    return BKV_OK;
}

// Folds into a slot of the store, sealed. On failure the slot is given back.
static bkv_status_t fold_records(const fold_t *fold, bkv_scratch_t *scratch, const bkv_gather_t *gather, uint64_t budget,
                                 bkv_slot_t *slot, bkv_error_t *err) {
    const bkv_pipeline_config_t *config = &fold->pipeline->config;
    void *workspace = bkv_scratch_get(scratch, bkv_fold_workspace(config->backend, gather->records, gather->count, budget));
    if (workspace == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for the fold's workspace");
    }
    bkv_status_t status = bkv_store_reserve(config->store, fold->model->tenant, budget, config->now_ms(), slot, err);
    if (status != BKV_OK) {
        return status;
    }
    bkv_record_id_t id = {.key = fold->key,
                          .spec_id = fold->model->id,
                          .tenant = fold->model->tenant,
                          .position = ((const bkv_record_header_t *)gather->records[0])->position};
    size_t length = 0;
    status = bkv_fold(config->backend, gather->records, gather->count, &id, budget, fold->model->params.seed, slot->data,
                      workspace, &length, err);
    if (status != BKV_OK) {
        bkv_store_abort(config->store, slot);
        return status;
    }
    assert(length <= budget);
    bkv_record_seal(slot->data);
    return BKV_OK;
}

static bkv_status_t make_fold(const fold_t *fold, bkv_scratch_t *scratch, bkv_error_t *err) {
    bkv_pipeline_t *pipeline = fold->pipeline;
    bkv_gather_t gather;
    bkv_status_t status = bkv_gather_pin(pipeline, &fold->model->id, fold->keys, fold->count, &gather, err);
    if (status != BKV_OK) {
        return status;
    }
    bkv_shape_t shape;
    bkv_slot_t slot;
    status = summed_shape(fold, &gather, &shape, err);
    if (status == BKV_OK) {
        uint64_t largest = largest_fold(&shape);
        status = fold_records(fold, scratch, &gather, fold->budget < largest ? fold->budget : largest, &slot, err);
    }
    bkv_gather_unpin(pipeline, &gather);
    if (status != BKV_OK) {
        return status;
    }
    bkv_count(&pipeline->counters.folds_total, 1);
    status = bkv_store_publish(pipeline->config.store, &slot, bkv_pipeline_ttl(pipeline, fold->ttl_ms), bkv_shape_bytes(&shape),
                               pipeline->config.now_ms(), err);
    return status == BKV_ALREADY_EXISTS ? BKV_OK : status; // the same request ran twice at once: the same bytes
}

static bkv_status_t find_fold(const fold_t *fold, bkv_delivery_t *delivery, bkv_error_t *err) {
    const bkv_deliver_range_t all = {0};
    return bkv_deliver(fold->pipeline, &fold->model->id, &fold->key, &all, fold->pipeline->config.now_ms(), delivery, err);
}

static bkv_status_t answer_fold(const fold_t *fold, bkv_scratch_t *scratch, bkv_delivery_t *delivery, bkv_error_t *err) {
    bkv_pipeline_t *pipeline = fold->pipeline;
    if (bkv_store_contains(pipeline->config.store, &fold->model->id, &fold->key, pipeline->config.now_ms()) &&
        find_fold(fold, delivery, NULL) == BKV_OK) {
        bkv_count(&pipeline->counters.fold_hits_total, 1);
        return BKV_OK;
    }
    bkv_status_t status = make_fold(fold, scratch, err);
    if (status != BKV_OK) {
        return status;
    }
    bkv_error_t cause;
    if (find_fold(fold, delivery, &cause) != BKV_OK) {
        return bkv_fail(err, BKV_BUSY, "the fold went away as soon as it was made (%.160s); ask again", cause.message);
    }
    return BKV_OK;
}

static void fold_finish(fold_t *fold, const bkv_error_t *error, bkv_fold_result_t *result) {
    bkv_fold_done_t done = fold->done;
    void *user = fold->user;
    free(fold);
    done(user, error, result);
}

static void fold_run(bkv_job_t *job, bkv_scratch_t *scratch) {
    fold_t *fold = (fold_t *)job;
    bkv_fold_result_t result = {.key = fold->key};
    bkv_error_t error = {.status = BKV_OK};
    error.status = answer_fold(fold, scratch, &result.delivery, &error); // a publish that came second was noted and overruled
    fold_finish(fold, &error, &result);
}

static void fold_cancel(bkv_job_t *job) {
    fold_t *fold = (fold_t *)job;
    bkv_fold_result_t result = {.key = fold->key};
    bkv_error_t error;
    bkv_fail(&error, BKV_CANCELLED, "the daemon stopped before the fold was made");
    fold_finish(fold, &error, &result);
}

static bkv_status_t check_request(bkv_pipeline_t *pipeline, const bkv_spec_id_t *spec_id, uint32_t count, uint64_t budget,
                                  const bkv_model_t **model, bkv_error_t *err) {
    bkv_status_t status = bkv_pipeline_admit(pipeline, spec_id, model, err);
    if (status == BKV_OK) {
        status = bkv_pipeline_check_batch(pipeline, count, err);
    }
    if (status == BKV_OK && budget < sizeof(bkv_record_header_t)) {
        status =
            bkv_fail(err, BKV_INVALID_ARGUMENT, "budget_bytes: %llu is less than any record has", (unsigned long long)budget);
    }
    return status;
}

bkv_status_t bkv_fold_start(bkv_pipeline_t *pipeline, const bkv_spec_id_t *spec_id, const bkv_key_t *keys, uint32_t count,
                            uint64_t budget, uint64_t ttl_ms, uint64_t now_ms, bkv_fold_done_t done, void *user,
                            bkv_error_t *err) {
    (void)now_ms; // its work is done on a compute thread, later
    const bkv_model_t *model;
    bkv_status_t status = check_request(pipeline, spec_id, count, budget, &model, err);
    if (status != BKV_OK) {
        return status;
    }
    fold_t *fold = calloc(1, sizeof(*fold) + count * sizeof(keys[0]));
    if (fold == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for a Fold");
    }
    fold->job = (bkv_job_t){.run = fold_run, .cancel = fold_cancel};
    fold->pipeline = pipeline;
    fold->model = model;
    fold->budget = budget;
    fold->ttl_ms = ttl_ms;
    fold->done = done;
    fold->user = user;
    fold->count = count;
    memcpy(fold->keys, keys, count * sizeof(keys[0]));
    status = fold_key(spec_id, keys, count, budget, &fold->key, err);
    if (status == BKV_OK) {
        status = bkv_pipeline_submit(pipeline, &fold->job, err);
    }
    if (status != BKV_OK) {
        free(fold);
    }
    return status;
}
