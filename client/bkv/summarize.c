// summarize.c - see summarize.h. The command around it is cmd_summarize.c.
#include "summarize.h"

#include "memory.h"
#include "refold.h"
#include "table.h"
#include "unpack.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

// Shared by the worker threads of one trace. Workers take blocks in order; each fills records[i] of its own blocks only.
typedef struct pool {
    const bkv_trace_t *trace;
    const bkv_summarize_t *options;
    const bkv_span_t *spans;
    void **records;
    size_t count;
    pthread_mutex_t lock; // guards the rest
    size_t next;
    bkv_error_t error; // of the first block that failed
    bkv_progress_t progress;
} pool_t;

// Buffers of one worker, as large as the largest block needs.
typedef struct buffers {
    void *payload, *record, *workspace;
    size_t capacity;
} buffers_t;

static void buffers_init(buffers_t *buffers, const pool_t *pool) {
    size_t payload = 0, workspace = 0;
    buffers->capacity = 0;
    for (size_t i = 0; i < pool->count; i++) {
        bkv_shape_t shape = bkv_trace_block_shape(pool->trace, &pool->spans[i]);
        size_t bytes = bkv_shape_bytes(&shape), bound = bkv_codec_bound(&shape, &pool->options->params);
        size_t scratch = bkv_compress_workspace(pool->options->backend, &shape, &pool->options->params);
        payload = bytes > payload ? bytes : payload;
        workspace = scratch > workspace ? scratch : workspace;
        buffers->capacity = bound > buffers->capacity ? bound : buffers->capacity;
    }
    buffers->payload = bkv_xaligned(payload);
    buffers->record = bkv_xaligned(buffers->capacity);
    buffers->workspace = bkv_xaligned(workspace);
}

static void buffers_deinit(buffers_t *buffers) {
    free(buffers->payload);
    free(buffers->record);
    free(buffers->workspace);
}

static bkv_status_t compress_block(pool_t *pool, size_t i, buffers_t *buffers, bkv_error_t *err) {
    const bkv_span_t *span = &pool->spans[i];
    bkv_shape_t shape = bkv_trace_block_shape(pool->trace, span);
    bkv_record_id_t id = {.position = span->position};
    bkv_error_t why = {.status = BKV_OK};
    bkv_block_t block;
    size_t length = 0;
    bkv_trace_gather(pool->trace, span, buffers->payload);
    bkv_block_from_payload(&shape, buffers->payload, &block);
    bkv_status_t status = bkv_compress(pool->options->backend, &block, &pool->options->params, &id, buffers->record,
                                       buffers->capacity, buffers->workspace, &length, &why);
    if (status == BKV_OK) {
        status = bkv_record_keep(buffers->record, length, &pool->records[i], &why);
    }
    if (status != BKV_OK) {
        return bkv_fail(err, status, "tokens %llu..%llu: %s", (unsigned long long)span->position,
                        (unsigned long long)(span->position + span->tokens - 1), why.message);
    }
    return BKV_OK;
}

static void *work(void *argument) {
    pool_t *pool = argument;
    buffers_t buffers;
    buffers_init(&buffers, pool);
    pthread_mutex_lock(&pool->lock);
    while (pool->next < pool->count && pool->error.status == BKV_OK) {
        size_t i = pool->next++;
        bkv_error_t err = {.status = BKV_OK};
        pthread_mutex_unlock(&pool->lock);
        bkv_status_t status = compress_block(pool, i, &buffers, &err);
        bkv_shape_t shape = bkv_trace_block_shape(pool->trace, &pool->spans[i]);
        pthread_mutex_lock(&pool->lock);
        if (status != BKV_OK && pool->error.status == BKV_OK) {
            pool->error = err;
        }
        bkv_progress_step(&pool->progress, 1, bkv_shape_bytes(&shape));
    }
    pthread_mutex_unlock(&pool->lock);
    buffers_deinit(&buffers);
    return NULL;
}

static bkv_status_t compress_all(pool_t *pool, bkv_error_t *err) {
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    size_t threads = pool->options->threads > 0 ? pool->options->threads : cpus > 0 ? (size_t)cpus : 1;
    threads = threads < pool->count ? threads : pool->count;
    pthread_t *others = bkv_xcalloc(threads, sizeof *others);
    size_t started = 0;
    bkv_progress_begin(&pool->progress, "summarize", pool->count, pool->options->quiet);
    // This thread is one of the workers, so a thread that cannot be had costs only time.
    while (started + 1 < threads && pthread_create(&others[started], NULL, work, pool) == 0) {
        started++;
    }
    work(pool);
    for (size_t i = 0; i < started; i++) {
        pthread_join(others[i], NULL);
    }
    free(others);
    bkv_progress_end(&pool->progress);
    if (pool->error.status != BKV_OK) {
        return bkv_fail(err, pool->error.status, "%s", pool->error.message);
    }
    return BKV_OK;
}

// Replaces the records by their fold. A rate of balance binds the fold, too.
static bkv_status_t fold_all(const bkv_summarize_t *options, bkv_summaries_t *summaries, bkv_error_t *err) {
    bkv_refold_t refold = {.backend = options->backend,
                           .records = (const void *const *)summaries->records,
                           .count = (uint32_t)summaries->count,
                           .budget = options->fold_rate > 0 ? summaries->raw_bytes / options->fold_rate : options->budget,
                           .seed = options->params.seed,
                           .shares = options->params.shares,
                           .profile = &options->profile};
    if (options->params.codec == BKV_CODEC_BALANCE && refold.budget > summaries->raw_bytes / options->params.rate) {
        refold.budget = summaries->raw_bytes / options->params.rate;
    }
    void *results[BKV_FOLD_RECORDS];
    size_t count;
    bkv_status_t status = bkv_refold(&refold, results, &count, err);
    if (status != BKV_OK) {
        return status;
    }
    bkv_summaries_deinit(&(bkv_summaries_t){.records = summaries->records, .count = summaries->count});
    summaries->records = bkv_xcalloc(count, sizeof *summaries->records);
    summaries->count = count;
    memcpy(summaries->records, results, count * sizeof *results);
    return BKV_OK;
}

static bkv_status_t check_rate(const bkv_summarize_t *options, const bkv_summaries_t *summaries, bkv_error_t *err) {
    if (options->params.codec == BKV_CODEC_BALANCE && summaries->raw_bytes / options->params.rate < summaries->stored_bytes) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "rate: %llu bytes took %llu, more than 1/%u: too few tokens",
                        (unsigned long long)summaries->raw_bytes, (unsigned long long)summaries->stored_bytes,
                        options->params.rate);
    }
    return BKV_OK;
}

bkv_status_t bkv_summarize_trace(const bkv_trace_t *trace, const bkv_summarize_t *options, bkv_summaries_t *summaries,
                                 bkv_error_t *err) {
    *summaries = (bkv_summaries_t){.records = NULL};
    bkv_status_t status = bkv_codec_check(&options->params, err);
    if (status != BKV_OK) {
        return status;
    }
    if (trace->shape.tokens <= options->window) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "window: %u of %u tokens leaves nothing to compress", options->window,
                        trace->shape.tokens);
    }
    bkv_span_t *spans;
    size_t count =
        bkv_trace_plan(&trace->shape, trace->shape.tokens - options->window, options->block_tokens, &options->params, &spans);
    summaries->records = bkv_xcalloc(count, sizeof *summaries->records);
    summaries->count = count;
    pool_t pool = {.trace = trace, .options = options, .spans = spans, .records = summaries->records, .count = count};
    pthread_mutex_init(&pool.lock, NULL);
    status = compress_all(&pool, err);
    pthread_mutex_destroy(&pool.lock);
    free(spans);
    if (status != BKV_OK) {
        return status;
    }
    summaries->raw_bytes = bkv_unpack_raw_bytes((const void *const *)summaries->records, count);
    bool fold = options->budget > 0 || options->fold_rate > 0 || options->profile.count > 0;
    if (fold && (status = fold_all(options, summaries, err)) != BKV_OK) {
        return status;
    }
    summaries->stored_bytes = bkv_unpack_stored_bytes((const void *const *)summaries->records, summaries->count);
    return check_rate(options, summaries, err);
}

void bkv_summaries_deinit(bkv_summaries_t *summaries) {
    for (size_t i = 0; i < summaries->count; i++) {
        free(summaries->records[i]);
    }
    free(summaries->records);
    *summaries = (bkv_summaries_t){.records = NULL};
}
