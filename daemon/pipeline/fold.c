// fold.c - Fold: one record for a prefix, or one for each band of an age profile; made once, then found under their own keys.
//
// This file looks at the records that are named, has kernels/cool.c plan bands and budgets, and answers each band from the
// store or has it made by fold_tree.c.
#include "daemon/pipeline/internal.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

typedef struct fold {
    bkv_job_t job; // first: the pool knows only this
    bkv_pipeline_t *pipeline;
    const bkv_model_t *model;
    bkv_profile_t profile;
    uint64_t budget, ttl_ms;
    uint32_t rate;
    bkv_fold_done_t done;
    void *user;
    bkv_cool_block_t *blocks; // [count]; NULL: not surveyed yet
    uint64_t *before;         // [count + 1]: bytes of the records before each
    uint32_t count;
    bkv_key_t keys[];
} fold_t;

// ---- survey ----

// Pins and verifies one record, to learn what is wrong with it, if anything.
static bkv_status_t look_closely(const fold_t *fold, uint32_t i, bkv_record_header_t *header, uint64_t *length,
                                 bkv_error_t *err) {
    bkv_pin_t pin;
    bkv_error_t cause;
    bkv_status_t status =
        bkv_pin_checked(fold->pipeline, &fold->model->id, &fold->keys[i], fold->pipeline->config.now_ms(), &pin, &cause);
    if (status != BKV_OK) {
        return bkv_fail(err, status, "keys[%u]: %.200s", i, cause.message);
    }
    memcpy(header, pin.data, sizeof(*header));
    *length = pin.length;
    bkv_store_unpin(fold->pipeline->config.store, &pin);
    return BKV_OK;
}

// What a record's header says; what it says is only used to plan, and checked once the record is read.
static bkv_status_t look(const fold_t *fold, uint32_t i, uint64_t now_ms, bkv_record_header_t *header, uint64_t *length,
                         bkv_error_t *err) {
    if (bkv_store_peek(fold->pipeline->config.store, &fold->model->id, &fold->keys[i], now_ms, header, length) &&
        header->tokens > 0 && header->tokens <= BKV_MAX_TOKENS) {
        return BKV_OK;
    }
    return look_closely(fold, i, header, length, err);
}

// Two records do not meet: either they are not what the caller meant, or one of them is damaged.
static bkv_status_t refuse_gap(const fold_t *fold, uint32_t i, uint64_t position, uint64_t expected, bkv_error_t *err) {
    bkv_record_header_t header;
    uint64_t length;
    bkv_status_t status = look_closely(fold, i - 1, &header, &length, err);
    if (status == BKV_OK) {
        status = look_closely(fold, i, &header, &length, err);
    }
    return status != BKV_OK ? status
                            : bkv_fail(err, BKV_INVALID_ARGUMENT,
                                       "keys[%u]: starts at position %llu, not at %llu where the one before it ends", i,
                                       (unsigned long long)position, (unsigned long long)expected);
}

// Tokens and bytes of every record, without reading them.
static bkv_status_t survey(fold_t *fold, bkv_error_t *err) {
    if (fold->blocks != NULL) {
        return BKV_OK;
    }
    fold->blocks = calloc(fold->count, sizeof(fold->blocks[0]));
    fold->before = malloc((fold->count + (size_t)1) * sizeof(fold->before[0]));
    if (fold->blocks == NULL || fold->before == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "keys: no memory for %u", fold->count);
    }
    uint64_t now_ms = fold->pipeline->config.now_ms(), expected = 0, tokens = 0;
    fold->before[0] = 0;
    for (uint32_t i = 0; i < fold->count; i++) {
        bkv_record_header_t header;
        uint64_t length;
        bkv_status_t status = look(fold, i, now_ms, &header, &length, err);
        if (status == BKV_OK && i > 0 && header.position != expected) {
            status = refuse_gap(fold, i, header.position, expected, err);
        }
        tokens += status == BKV_OK ? header.tokens : 0;
        if (status == BKV_OK && tokens > BKV_MAX_TOKENS) {
            status = bkv_fail(err, BKV_INVALID_ARGUMENT, "keys[%u]: %llu tokens so far are more than %u", i,
                              (unsigned long long)tokens, BKV_MAX_TOKENS);
        }
        if (status != BKV_OK) {
            return status;
        }
        expected = header.position + header.tokens;
        fold->blocks[i] = (bkv_cool_block_t){.tokens = header.tokens, .bytes = length};
        fold->before[i + 1] = fold->before[i] + length;
    }
    return BKV_OK;
}

// ---- plan ----

// The bytes of all records together; 0: what the profile's rates come to.
static uint64_t total_budget(const fold_t *fold) {
    if (fold->rate == 0) {
        return fold->budget;
    }
    const bkv_shape_t *shape = &fold->model->shape;
    uint64_t tokens = 0;
    for (uint32_t i = 0; i < fold->count; i++) {
        tokens += fold->blocks[i].tokens;
    }
    return 2 * tokens * shape->layers * shape->heads * (shape->key_dim + shape->value_dim) / fold->rate;
}

// What each record of the answer covers. Without a profile, under a budget in bytes, nothing need be known of the records.
static bkv_status_t plan(fold_t *fold, bkv_cool_band_t bands[BKV_FOLD_RECORDS], uint32_t *count, bkv_error_t *err) {
    bool blind = fold->profile.count == 0 && fold->rate == 0;
    bkv_status_t status = blind ? BKV_OK : survey(fold, err);
    if (status == BKV_OK && fold->profile.count > 0) {
        return bkv_cool_plan(&fold->model->shape, fold->blocks, fold->count, &fold->profile, total_budget(fold), bands, count,
                             err);
    }
    if (status == BKV_OK) {
        bands[0] = (bkv_cool_band_t){.count = fold->count, .budget = total_budget(fold)};
        *count = 1;
    }
    return status;
}

// ---- answer ----

static bkv_status_t find_record(const fold_t *fold, const bkv_key_t *key, bkv_delivery_t *delivery, bkv_error_t *err) {
    const bkv_deliver_range_t all = {0};
    return bkv_deliver(fold->pipeline, &fold->model->id, key, &all, fold->pipeline->config.now_ms(), delivery, err);
}

static bkv_status_t make_band(fold_t *fold, const bkv_cool_band_t *band, const bkv_key_t *key, bkv_scratch_t *scratch,
                              bkv_pin_t *pin, bkv_error_t *err) {
    bkv_status_t status = survey(fold, err);
    bkv_fold_run_t run = {.model = fold->model,
                          .keys = fold->keys + band->first,
                          .before = fold->before + band->first,
                          .count = band->count,
                          .number = band->first,
                          .ttl_ms = fold->ttl_ms};
    return status == BKV_OK ? bkv_fold_run(fold->pipeline, &run, band->budget, key, scratch, pin, err) : status;
}

static bkv_status_t answer_band(fold_t *fold, const bkv_cool_band_t *band, bkv_scratch_t *scratch, bkv_fold_record_t *record,
                                bkv_error_t *err) {
    bkv_pipeline_t *pipeline = fold->pipeline;
    bkv_status_t status = bkv_fold_key(fold->model, fold->keys + band->first, band->count, band->budget, &record->key, err);
    if (status != BKV_OK) {
        return status;
    }
    if (bkv_store_contains(pipeline->config.store, &fold->model->id, &record->key, pipeline->config.now_ms()) &&
        find_record(fold, &record->key, &record->delivery, NULL) == BKV_OK) {
        bkv_count(&pipeline->counters.fold_hits_total, 1);
        return BKV_OK;
    }
    bkv_pin_t pin;
    status = make_band(fold, band, &record->key, scratch, &pin, err);
    if (status == BKV_OK) {
        record->delivery = (bkv_delivery_t){.data = pin.data, .length = pin.length, .pin = pin};
        record->delivery.ttl_ms = bkv_store_ttl(pipeline->config.store, &pin, pipeline->config.now_ms());
        bkv_count(&pipeline->counters.get_records_total, 1);
    }
    return status;
}

void bkv_fold_release(bkv_pipeline_t *pipeline, bkv_fold_result_t *result) {
    for (uint32_t i = 0; i < result->count; i++) {
        bkv_delivery_release(pipeline, &result->records[i].delivery);
    }
    result->count = 0;
}

static bkv_status_t answer_fold(fold_t *fold, bkv_scratch_t *scratch, bkv_fold_result_t *result, bkv_error_t *err) {
    bkv_cool_band_t bands[BKV_FOLD_RECORDS];
    uint32_t count = 0;
    bkv_status_t status = plan(fold, bands, &count, err);
    for (uint32_t i = 0; i < count && status == BKV_OK; i++) {
        status = answer_band(fold, &bands[i], scratch, &result->records[i], err);
        result->count += status == BKV_OK;
    }
    if (status != BKV_OK) {
        bkv_fold_release(fold->pipeline, result);
    }
    return status;
}

// ---- job ----

static void fold_free(fold_t *fold) {
    free(fold->blocks);
    free(fold->before);
    free(fold);
}

static void fold_finish(fold_t *fold, const bkv_error_t *error, bkv_fold_result_t *result) {
    bkv_fold_done_t done = fold->done;
    void *user = fold->user;
    fold_free(fold);
    done(user, error, result);
}

static void fold_run(bkv_job_t *job, bkv_scratch_t *scratch) {
    fold_t *fold = (fold_t *)job;
    bkv_fold_result_t result = {.count = 0};
    bkv_error_t error = {.status = BKV_OK};
    error.status = answer_fold(fold, scratch, &result, &error); // a publish that came second was noted and overruled
    fold_finish(fold, &error, &result);
}

static void fold_cancel(bkv_job_t *job) {
    bkv_fold_result_t result = {.count = 0};
    bkv_error_t error;
    bkv_fail(&error, BKV_CANCELLED, "the daemon stopped before the fold was made");
    fold_finish((fold_t *)job, &error, &result);
}

static bkv_status_t check_budget(const bkv_fold_args_t *args, bkv_error_t *err) {
    if (args->rate > BKV_MAX_BAND_RATE) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "rate: %u is not in 1..%d", args->rate, BKV_MAX_BAND_RATE);
    }
    if (args->rate != 0 && args->budget != 0) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "rate: %u contradicts budget_bytes %llu: only one of them", args->rate,
                        (unsigned long long)args->budget);
    }
    bool nominal = args->rate != 0 || args->profile.count > 0;
    if (args->budget < sizeof(bkv_record_header_t) && !(args->budget == 0 && nominal)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "budget_bytes: %llu is less than any record has",
                        (unsigned long long)args->budget);
    }
    return bkv_profile_check(&args->profile, err);
}

bkv_status_t bkv_fold_start(bkv_pipeline_t *pipeline, const bkv_fold_args_t *args, bkv_fold_done_t done, void *user,
                            bkv_error_t *err) {
    const bkv_model_t *model;
    bkv_status_t status = bkv_pipeline_admit(pipeline, &args->spec_id, &model, err);
    if (status == BKV_OK) {
        status = bkv_pipeline_check_batch(pipeline, args->count, err);
    }
    if (status == BKV_OK) {
        status = check_budget(args, err);
    }
    if (status != BKV_OK) {
        return status;
    }
    fold_t *fold = calloc(1, sizeof(*fold) + args->count * sizeof(args->keys[0]));
    if (fold == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for a Fold");
    }
    fold->job = (bkv_job_t){.run = fold_run, .cancel = fold_cancel};
    fold->pipeline = pipeline;
    fold->model = model;
    fold->profile = args->profile;
    fold->budget = args->budget;
    fold->rate = args->rate;
    fold->ttl_ms = args->ttl_ms;
    fold->done = done;
    fold->user = user;
    fold->count = args->count;
    memcpy(fold->keys, args->keys, args->count * sizeof(args->keys[0]));
    status = bkv_pipeline_submit(pipeline, &fold->job, err);
    if (status != BKV_OK) {
        fold_free(fold);
    }
    return status;
}
