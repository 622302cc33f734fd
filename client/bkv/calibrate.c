// calibrate.c - see calibrate.h. The command around it is cmd_calibrate.c.
//
// A head's attention output depends on no other head's cache, so one pass with every head compressed measures each alone.
#include "calibrate.h"

#include "memory.h"
#include "table.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

// One layer's queries and what attention makes of them.
typedef struct asked {
    uint32_t layer, heads, queries; // query heads; queries of each
    float scale;
    float *q;                           // [heads][queries][key_dim]
    float *exact, *compressed, *newest; // [heads][queries][value_dim]: from older tokens, exact and not, and from the newest
    float *exact_lse, *compressed_lse, *newest_lse;
} asked_t;

static void asked_init(asked_t *asked, const bkv_trace_t *trace, const bkv_tensor_t *q) {
    size_t rows = (size_t)asked->heads * asked->queries, dim = trace->shape.value_dim, key_dim = trace->shape.key_dim;
    asked->q = bkv_xcalloc(rows * key_dim, sizeof *asked->q);
    for (uint32_t head = 0; head < asked->heads; head++) {
        uint64_t first = (uint64_t)(head + 1) * q->shape[1] - asked->queries;
        bkv_tensor_to_float(q, first * key_dim, asked->queries * key_dim, asked->q + (size_t)head * asked->queries * key_dim);
    }
    asked->exact = bkv_xcalloc(rows * dim, sizeof *asked->exact);
    asked->compressed = bkv_xcalloc(rows * dim, sizeof *asked->compressed);
    asked->newest = bkv_xcalloc(rows * dim, sizeof *asked->newest);
    asked->exact_lse = bkv_xcalloc(rows, sizeof *asked->exact_lse);
    asked->compressed_lse = bkv_xcalloc(rows, sizeof *asked->compressed_lse);
    asked->newest_lse = bkv_xcalloc(rows, sizeof *asked->newest_lse);
}

static void asked_deinit(asked_t *asked) {
    free(asked->q);
    free(asked->exact);
    free(asked->compressed);
    free(asked->newest);
    free(asked->exact_lse);
    free(asked->compressed_lse);
    free(asked->newest_lse);
}

// Over the records of the older tokens.
static bkv_status_t attend_older(const asked_t *asked, const bkv_backend_t *backend, const bkv_summaries_t *older, float *out,
                                 float *lse, bkv_error_t *err) {
    const void *const *records = (const void *const *)older->records;
    const bkv_attend_args_t args = {.layers = 1,
                                    .first_layer = asked->layer,
                                    .query_heads = asked->heads,
                                    .queries = asked->queries,
                                    .scale = asked->scale,
                                    .q = asked->q,
                                    .out = out,
                                    .lse = lse};
    void *workspace = bkv_xaligned(bkv_attend_workspace(backend, records, (uint32_t)older->count, &args));
    bkv_status_t status = bkv_attend(backend, records, (uint32_t)older->count, &args, workspace, err);
    free(workspace);
    return status;
}

// Softmax-weighted mean of the first `count` values, and the log of the sum of the weights. scores: room for `count`.
static float attend_row(const float *q, const float *keys, const float *values, uint32_t count, uint32_t key_dim,
                        uint32_t value_dim, float scale, float *scores, float *out) {
    float top = -INFINITY, sum = 0;
    for (uint32_t t = 0; t < count; t++) {
        scores[t] = 0;
        for (uint32_t i = 0; i < key_dim; i++) {
            scores[t] += q[i] * keys[(size_t)t * key_dim + i];
        }
        scores[t] *= scale;
        top = scores[t] > top ? scores[t] : top;
    }
    memset(out, 0, value_dim * sizeof *out);
    for (uint32_t t = 0; t < count; t++) {
        float weight = expf(scores[t] - top);
        sum += weight;
        for (uint32_t i = 0; i < value_dim; i++) {
            out[i] += weight * values[(size_t)t * value_dim + i];
        }
    }
    for (uint32_t i = 0; i < value_dim; i++) {
        out[i] /= sum;
    }
    return top + logf(sum);
}

// Over the newest tokens, each query over those up to its own.
static void attend_newest(const asked_t *asked, const bkv_trace_t *trace) {
    const bkv_shape_t *shape = &trace->shape;
    uint32_t count = asked->queries, group = asked->heads / shape->heads;
    float *keys = bkv_xcalloc((size_t)count * shape->key_dim, sizeof *keys);
    float *values = bkv_xcalloc((size_t)count * shape->value_dim, sizeof *values);
    float *scores = bkv_xcalloc(count, sizeof *scores);
    float scale = asked->scale != 0 ? asked->scale : 1 / sqrtf((float)shape->key_dim);
    for (uint32_t head = 0; head < shape->heads; head++) {
        uint64_t first = (uint64_t)(head + 1) * shape->tokens - count;
        bkv_tensor_to_float(trace->keys[asked->layer], first * shape->key_dim, (uint64_t)count * shape->key_dim, keys);
        bkv_tensor_to_float(trace->values[asked->layer], first * shape->value_dim, (uint64_t)count * shape->value_dim, values);
        for (size_t row = (size_t)head * group * count; row < (size_t)(head + 1) * group * count; row++) {
            asked->newest_lse[row] =
                attend_row(asked->q + row * shape->key_dim, keys, values, (uint32_t)(row % count) + 1, shape->key_dim,
                           shape->value_dim, scale, scores, asked->newest + row * shape->value_dim);
        }
    }
    free(keys);
    free(values);
    free(scores);
}

// Adds |compressed - exact|^2 / |exact|^2 of each KV head.
static bkv_status_t compare(const asked_t *asked, const bkv_shape_t *shape, double *errors, bkv_error_t *err) {
    size_t all = (size_t)asked->heads * asked->queries * shape->value_dim, mine = all / shape->heads;
    double whole = 0;
    for (size_t i = 0; i < all; i++) {
        whole += (double)asked->exact[i] * asked->exact[i];
    }
    for (uint32_t head = 0; head < shape->heads; head++) {
        double change = 0;
        for (size_t i = head * mine; i < (head + 1) * mine; i++) {
            double difference = (double)asked->compressed[i] - asked->exact[i];
            change += difference * difference;
        }
        double error = whole > 0 ? change / whole : 0; // a layer that puts out nothing loses nothing
        if (!isfinite(error)) {
            return bkv_fail(err, BKV_INVALID_ARGUMENT, "layer %u, head %u: attention is not finite", asked->layer, head);
        }
        errors[head] += error;
    }
    return BKV_OK;
}

static bkv_status_t measure_layer(asked_t *asked, const bkv_trace_t *trace, const bkv_backend_t *backend,
                                  const bkv_summaries_t *exact, const bkv_summaries_t *compressed, double *errors,
                                  bkv_error_t *err) {
    size_t rows = (size_t)asked->heads * asked->queries;
    uint32_t dim = trace->shape.value_dim;
    bkv_status_t status = attend_older(asked, backend, exact, asked->exact, asked->exact_lse, err);
    if (status == BKV_OK) {
        status = attend_older(asked, backend, compressed, asked->compressed, asked->compressed_lse, err);
    }
    if (status != BKV_OK) {
        return status;
    }
    attend_newest(asked, trace);
    bkv_attend_merge(asked->exact, asked->exact_lse, asked->newest, asked->newest_lse, rows, dim);
    bkv_attend_merge(asked->compressed, asked->compressed_lse, asked->newest, asked->newest_lse, rows, dim);
    return compare(asked, &trace->shape, errors, err);
}

// q.N of a layer, with queries of at least the newest `queries` tokens.
static bkv_status_t find_queries(const bkv_trace_t *trace, uint32_t layer, uint32_t queries, const bkv_tensor_t **q,
                                 bkv_error_t *err) {
    char name[16];
    *q = bkv_safetensors_find(trace->file, bkv_trace_tensor_name('q', trace->layer_numbers[layer], name));
    if (*q == NULL) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "%s: missing", name);
    }
    bkv_status_t status = bkv_trace_check_queries(*q, trace->shape.heads, trace->shape.key_dim, err);
    if (status == BKV_OK && (*q)->shape[1] < queries) {
        status = bkv_fail(err, BKV_INVALID_ARGUMENT, "%s.shape: %llu queries are fewer than the newest %u", name,
                          (unsigned long long)(*q)->shape[1], queries);
    }
    return status;
}

static bkv_status_t measure_layers(const bkv_trace_t *trace, const bkv_summarize_t *options, float scale,
                                   const bkv_summaries_t *exact, const bkv_summaries_t *compressed, double *errors,
                                   bkv_error_t *err) {
    bkv_progress_t progress;
    bkv_status_t status = BKV_OK;
    bkv_progress_begin(&progress, "calibrate", trace->shape.layers, options->quiet);
    for (uint32_t layer = 0; layer < trace->shape.layers && status == BKV_OK; layer++) {
        const bkv_tensor_t *q;
        status = find_queries(trace, layer, options->window, &q, err);
        if (status == BKV_OK) {
            asked_t asked = {.layer = layer, .heads = (uint32_t)q->shape[0], .queries = options->window, .scale = scale};
            asked_init(&asked, trace, q);
            status = measure_layer(&asked, trace, options->backend, exact, compressed,
                                   errors + (size_t)layer * trace->shape.heads, err);
            asked_deinit(&asked);
        }
        bkv_progress_step(&progress, 1, 0);
    }
    bkv_progress_end(&progress);
    return status;
}

bkv_status_t bkv_calibrate_trace(const bkv_trace_t *trace, const bkv_summarize_t *options, float scale, double *errors,
                                 bkv_error_t *err) {
    for (uint32_t layer = 0; layer < trace->shape.layers; layer++) { // before anything long
        const bkv_tensor_t *q;
        bkv_status_t status = find_queries(trace, layer, options->window, &q, err);
        if (status != BKV_OK) {
            return status;
        }
    }
    bkv_summarize_t raw = *options;
    bkv_summaries_t exact = {.records = NULL}, compressed = {.records = NULL};
    raw.params.codec = BKV_CODEC_RAW;
    bkv_status_t status = bkv_summarize_trace(trace, options, &compressed, err);
    if (status == BKV_OK) {
        status = bkv_summarize_trace(trace, &raw, &exact, err);
    }
    if (status == BKV_OK) {
        status = measure_layers(trace, options, scale, &exact, &compressed, errors, err);
    }
    bkv_summaries_deinit(&exact);
    bkv_summaries_deinit(&compressed);
    return status;
}
