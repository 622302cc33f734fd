// trace.c - see trace.h.
#include "trace.h"

#include "memory.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DIGEST_WORDS (BKV_KEY_BYTES / 4)

// The dtype of a tensor as the codecs know it; 0 for the others.
static bkv_dtype_t dtype_of(const bkv_tensor_t *tensor) {
    switch (tensor->type) {
    case BKV_TENSOR_BF16:
        return BKV_BF16;
    case BKV_TENSOR_F16:
        return BKV_FP16;
    case BKV_TENSOR_F32:
        return BKV_FP32;
    default:
        return (bkv_dtype_t)0;
    }
}

const char *bkv_trace_tensor_name(char kind, uint32_t layer, char *out) {
    snprintf(out, 16, "%c.%u", kind, layer);
    return out;
}

// The N of "k.N": decimal without leading zeros, so that no two names mean the same layer.
static bool layer_of(const char *name, char kind, uint32_t *layer) {
    if (name[0] != kind || name[1] != '.') {
        return false;
    }
    const char *digits = name + 2;
    size_t length = strlen(digits);
    if (length == 0 || length > 6 || strspn(digits, "0123456789") != length || (digits[0] == '0' && length > 1)) {
        return false;
    }
    *layer = (uint32_t)strtoul(digits, NULL, 10);
    return true;
}

static int by_number(const void *a, const void *b) {
    uint32_t left = *(const uint32_t *)a, right = *(const uint32_t *)b;
    return (left > right) - (left < right);
}

static bkv_status_t find_layers(bkv_trace_t *trace, bkv_error_t *err) {
    size_t count = bkv_safetensors_count(trace->file), layers = 0;
    uint32_t number;
    trace->layer_numbers = bkv_xcalloc(count, sizeof *trace->layer_numbers);
    for (size_t i = 0; i < count; i++) {
        const char *name = bkv_safetensors_at(trace->file, i)->name;
        char twin[16];
        if (layer_of(name, 'k', &number)) {
            trace->layer_numbers[layers++] = number;
        } else if (layer_of(name, 'v', &number) &&
                   bkv_safetensors_find(trace->file, bkv_trace_tensor_name('k', number, twin)) == NULL) {
            return bkv_fail(err, BKV_INVALID_ARGUMENT, "%s: there is no %s", name, twin);
        }
    }
    if (layers == 0 || layers > BKV_MAX_LAYERS) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "k.N: %zu layers, not 1..%d", layers, BKV_MAX_LAYERS);
    }
    qsort(trace->layer_numbers, layers, sizeof *trace->layer_numbers, by_number);
    trace->shape.layers = (uint32_t)layers;
    return BKV_OK;
}

// Checks one tensor against the trace's shape; the very first one of its kind defines it.
static bkv_status_t check_tensor(bkv_trace_t *trace, const bkv_tensor_t *tensor, uint32_t *dim, bkv_error_t *err) {
    bkv_shape_t *shape = &trace->shape;
    bkv_dtype_t dtype = dtype_of(tensor);
    if (tensor->rank != 3) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "%s.shape: %u dims, not [heads, tokens, dim]", tensor->name, tensor->rank);
    }
    if (dtype == 0) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "%s.dtype: %s is not F16, BF16 or F32", tensor->name,
                        bkv_tensor_type_name(tensor->type));
    }
    if (tensor->shape[0] == 0 || tensor->shape[0] > BKV_MAX_HEADS || tensor->shape[1] == 0 ||
        tensor->shape[1] > BKV_MAX_TOKENS || tensor->shape[2] == 0 || tensor->shape[2] > BKV_MAX_DIM) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "%s.shape: [%llu, %llu, %llu] is beyond [%d, %u, %d] or empty", tensor->name,
                        (unsigned long long)tensor->shape[0], (unsigned long long)tensor->shape[1],
                        (unsigned long long)tensor->shape[2], BKV_MAX_HEADS, BKV_MAX_TOKENS, BKV_MAX_DIM);
    }
    if (shape->heads == 0) {
        shape->heads = (uint32_t)tensor->shape[0];
        shape->tokens = (uint32_t)tensor->shape[1];
        shape->dtype = dtype;
    }
    *dim = *dim == 0 ? (uint32_t)tensor->shape[2] : *dim;
    if (tensor->shape[0] != shape->heads || tensor->shape[1] != shape->tokens || tensor->shape[2] != *dim ||
        dtype != shape->dtype) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "%s: not of the same shape and dtype as the layers before it", tensor->name);
    }
    return BKV_OK;
}

static bkv_status_t bind_layers(bkv_trace_t *trace, bkv_error_t *err) {
    trace->keys = bkv_xcalloc(trace->shape.layers, sizeof(const bkv_tensor_t *));
    trace->values = bkv_xcalloc(trace->shape.layers, sizeof(const bkv_tensor_t *));
    for (uint32_t i = 0; i < trace->shape.layers; i++) {
        char name[16];
        bkv_status_t status;
        trace->keys[i] = bkv_safetensors_find(trace->file, bkv_trace_tensor_name('k', trace->layer_numbers[i], name));
        trace->values[i] = bkv_safetensors_find(trace->file, bkv_trace_tensor_name('v', trace->layer_numbers[i], name));
        if (trace->values[i] == NULL) {
            return bkv_fail(err, BKV_INVALID_ARGUMENT, "%s: missing", name);
        }
        if ((status = check_tensor(trace, trace->keys[i], &trace->shape.key_dim, err)) != BKV_OK ||
            (status = check_tensor(trace, trace->values[i], &trace->shape.value_dim, err)) != BKV_OK) {
            return status;
        }
    }
    return bkv_shape_check(&trace->shape, err);
}

static bkv_status_t bind_ids(bkv_trace_t *trace, bkv_error_t *err) {
    const bkv_tensor_t *ids = trace->ids = bkv_safetensors_find(trace->file, "ids");
    if (ids == NULL) {
        return BKV_OK;
    }
    if ((ids->type != BKV_TENSOR_I32 && ids->type != BKV_TENSOR_I64) || ids->rank != 1 ||
        ids->shape[0] != trace->shape.tokens) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "ids: not I32 or I64 [%u]", trace->shape.tokens);
    }
    return BKV_OK;
}

static char *name_of(const bkv_safetensors_t *file, const char *path) {
    const char *model = bkv_safetensors_metadata(file, "model");
    if (model != NULL && model[0] != '\0') {
        return bkv_xstrdup(model);
    }
    const char *slash = strrchr(path, '/');
    char *name = bkv_xstrdup(slash != NULL ? slash + 1 : path);
    char *dot = strrchr(name, '.');
    if (dot != NULL && dot != name) {
        *dot = '\0';
    }
    return name;
}

bkv_status_t bkv_trace_init(bkv_trace_t *trace, const char *path, bkv_error_t *err) {
    *trace = (bkv_trace_t){.file = NULL};
    bkv_status_t status = bkv_safetensors_open(path, &trace->file, err);
    if (status != BKV_OK) {
        return status;
    }
    bkv_error_t why = {.status = BKV_OK};
    trace->name = name_of(trace->file, path);
    if ((status = find_layers(trace, &why)) != BKV_OK || (status = bind_layers(trace, &why)) != BKV_OK ||
        (status = bind_ids(trace, &why)) != BKV_OK) {
        return bkv_fail(err, status, "%s: %s", path, why.message);
    }
    return BKV_OK;
}

void bkv_trace_deinit(bkv_trace_t *trace) {
    bkv_safetensors_close(trace->file);
    free(trace->name);
    free(trace->layer_numbers);
    free((void *)trace->keys);
    free((void *)trace->values);
    *trace = (bkv_trace_t){.file = NULL};
}

// Whether a record of so few tokens can keep the rate at all.
static bool keeps_rate(const bkv_shape_t *whole, uint32_t tokens, const bkv_codec_params_t *params) {
    if (params->codec != BKV_CODEC_BALANCE) {
        return true;
    }
    bkv_shape_t shape = *whole;
    shape.tokens = tokens;
    uint64_t as_bf16 = 2 * (uint64_t)shape.layers * shape.heads * tokens * (shape.key_dim + shape.value_dim);
    return bkv_codec_bound(&shape, params) <= as_bf16 / params->rate;
}

size_t bkv_trace_plan(const bkv_shape_t *shape, uint64_t tokens, uint32_t block_tokens, const bkv_codec_params_t *params,
                      bkv_span_t **spans) {
    size_t count = (size_t)((tokens + block_tokens - 1) / block_tokens);
    *spans = bkv_xcalloc(count, sizeof **spans);
    for (size_t i = 0; i < count; i++) {
        uint64_t position = (uint64_t)i * block_tokens, left = tokens - position;
        (*spans)[i] = (bkv_span_t){.position = position, .tokens = left < block_tokens ? (uint32_t)left : block_tokens};
    }
    if (count >= 2 && !keeps_rate(shape, (*spans)[count - 1].tokens, params)) {
        bkv_span_t *before = &(*spans)[count - 2], *last = &(*spans)[count - 1];
        uint32_t both = before->tokens + last->tokens;
        before->tokens = both - both / 2;
        *last = (bkv_span_t){.position = before->position + before->tokens, .tokens = both / 2};
    }
    return count;
}

bkv_shape_t bkv_trace_block_shape(const bkv_trace_t *trace, const bkv_span_t *span) {
    bkv_shape_t shape = trace->shape;
    shape.tokens = span->tokens;
    return shape;
}

void bkv_trace_gather(const bkv_trace_t *trace, const bkv_span_t *span, void *payload) {
    const bkv_shape_t *shape = &trace->shape;
    size_t element = bkv_dtype_bytes(shape->dtype);
    uint8_t *to = payload;
    for (uint32_t layer = 0; layer < shape->layers; layer++) {
        for (int part = 0; part < 2; part++) {
            const bkv_tensor_t *tensor = part == 0 ? trace->keys[layer] : trace->values[layer];
            size_t row = (part == 0 ? shape->key_dim : shape->value_dim) * element;
            for (uint32_t head = 0; head < shape->heads; head++) {
                memcpy(to, tensor->data + ((uint64_t)head * shape->tokens + span->position) * row, span->tokens * row);
                to += span->tokens * row;
            }
        }
    }
}

// Token ids of a block as the key wants them; negative and 64-bit ones are refused, no tokenizer makes them.
static bkv_status_t read_ids(const bkv_tensor_t *ids, const bkv_span_t *span, uint32_t *out, bkv_error_t *err) {
    size_t element = bkv_tensor_type_bytes(ids->type);
    for (uint32_t i = 0; i < span->tokens; i++) {
        const uint8_t *at = ids->data + (span->position + i) * element;
        int32_t narrow;
        int64_t id;
        if (element == sizeof narrow) {
            memcpy(&narrow, at, sizeof narrow);
            id = narrow;
        } else {
            memcpy(&id, at, sizeof id);
        }
        if (id < 0 || id > UINT32_MAX) {
            return bkv_fail(err, BKV_INVALID_ARGUMENT, "ids[%llu]: %lld is no token id", (unsigned long long)span->position + i,
                            (long long)id);
        }
        out[i] = (uint32_t)id;
    }
    return BKV_OK;
}

bkv_status_t bkv_trace_key(const bkv_trace_t *trace, const bkv_span_t *span, const void *payload, const bkv_spec_id_t *id,
                           const bkv_key_t *parent, bkv_key_t *key, bkv_error_t *err) {
    if (trace->ids != NULL) {
        uint32_t *ids = bkv_xcalloc(span->tokens, sizeof *ids);
        bkv_status_t status = read_ids(trace->ids, span, ids, err);
        if (status == BKV_OK) {
            bkv_key_next(id, parent, ids, span->tokens, key);
        }
        free(ids);
        return status;
    }
    // A key over all-zero id and parent is a plain digest of the payload behind a fixed prefix. Payloads are whole words:
    // dims are multiples of 8.
    static const bkv_spec_id_t nobody = {.bytes = {0}};
    bkv_shape_t shape = bkv_trace_block_shape(trace, span);
    bkv_key_t digest;
    uint32_t words[2 + DIGEST_WORDS] = {(uint32_t)span->position, (uint32_t)(span->position >> 32)};
    bkv_key_next(&nobody, NULL, payload, bkv_shape_bytes(&shape) / sizeof *words, &digest);
    memcpy(words + 2, digest.bytes, sizeof digest.bytes);
    bkv_key_next(id, parent, words, sizeof words / sizeof *words, key);
    return BKV_OK;
}

bkv_status_t bkv_trace_check_queries(const bkv_tensor_t *q, uint32_t kv_heads, uint32_t key_dim, bkv_error_t *err) {
    if (q->rank != 3 || dtype_of(q) == 0) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "%s: not F16, BF16 or F32 [query heads, tokens, dim]", q->name);
    }
    if (q->shape[0] == 0 || q->shape[0] > BKV_MAX_HEADS * 64u || q->shape[0] % kv_heads != 0) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "%s.shape: %llu query heads, not a multiple of %u", q->name,
                        (unsigned long long)q->shape[0], kv_heads);
    }
    if (q->shape[1] == 0 || q->shape[1] > BKV_MAX_TOKENS || q->shape[2] != key_dim) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "%s.shape: %llu queries of dim %llu, the cache's key_dim is %u", q->name,
                        (unsigned long long)q->shape[1], (unsigned long long)q->shape[2], key_dim);
    }
    return BKV_OK;
}

void bkv_tensor_to_float(const bkv_tensor_t *tensor, uint64_t first, uint64_t count, float *out) {
    const uint8_t *at = tensor->data + first * bkv_tensor_type_bytes(tensor->type);
    if (tensor->type == BKV_TENSOR_F32) {
        memcpy(out, at, count * sizeof *out);
        return;
    }
    for (uint64_t i = 0; i < count; i++) {
        uint16_t bits;
        memcpy(&bits, at + 2 * i, sizeof bits);
        out[i] = tensor->type == BKV_TENSOR_F16 ? bkv_half_to_float(bits) : bkv_bf16_to_float(bits);
    }
}
