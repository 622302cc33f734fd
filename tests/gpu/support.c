// support.c - see support.h.
#include "support.h"

#include "cuda/gpu.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct {
    char name[96];
    int checks, failed, all_failed;
} now;

void check_begin(const char *name) {
    if (now.checks > 0) {
        printf("%-58s %5d checks%s\n", now.name, now.checks, now.failed ? ", FAILED" : "");
    }
    snprintf(now.name, sizeof(now.name), "%s", name);
    now.checks = now.failed = 0;
}

void check_that(bool good, const char *format, ...) {
    now.checks++;
    if (good) {
        return;
    }
    if (now.failed++ < 5) {
        va_list args;
        va_start(args, format);
        printf("  %s: ", now.name);
        vprintf(format, args);
        printf("\n");
        va_end(args);
    }
    now.all_failed++;
}

int check_end(void) {
    check_begin("");
    printf(now.all_failed ? "%d checks FAILED\n" : "all checks passed\n", now.all_failed);
    return now.all_failed ? 1 : 0;
}

void require(bool good, const char *file, int line, const char *format, ...) {
    if (good) {
        return;
    }
    va_list args;
    va_start(args, format);
    fprintf(stderr, "%s:%d: ", file, line);
    vfprintf(stderr, format, args);
    fprintf(stderr, "\n");
    va_end(args);
    exit(1);
}

double draw_unit(draw_t *draw) {
    draw->state = draw->state * 6364136223846793005u + 1442695040888963407u;
    uint64_t x = draw->state ^ (draw->state >> 33);
    return (double)((x * 0xff51afd7ed558ccdu) >> 32) / 4294967296.0;
}

double draw_gauss(draw_t *draw) {
    double u = draw_unit(draw), v = draw_unit(draw);
    return sqrt(-2 * log(1 - u)) * cos(2 * acos(-1.0) * v);
}

static void *take(size_t bytes) {
    void *memory = calloc(1, bytes ? bytes : 1);
    REQUIRE(memory, "memory: %zu bytes", bytes);
    return memory;
}

void *device_take(size_t bytes) {
    void *memory;
    int error = bkv_gpu_alloc(&memory, bytes, NULL);
    REQUIRE(error == 0, "device memory: %zu bytes: %s", bytes, bkv_gpu_error(error));
    return memory;
}

static void copy_now(void *to, const void *from, size_t bytes) {
    int error = bkv_gpu_copy(to, from, bytes, NULL);
    error = error ? error : bkv_gpu_wait(NULL);
    REQUIRE(error == 0, "copy: %s", bkv_gpu_error(error));
}

void device_put(void *to, const void *from, size_t bytes) {
    copy_now(to, from, bytes);
}

void device_get(void *to, const void *from, size_t bytes) {
    copy_now(to, from, bytes);
}

static size_t element_bytes(const bkv_shape_t *shape) {
    return bkv_dtype_bytes(shape->dtype);
}

static uint8_t *element_at(const bkv_block_t *block, bool value, uint32_t layer, uint32_t head, uint32_t token, uint32_t i) {
    const bkv_stride_t *stride = value ? &block->value_stride : &block->key_stride;
    return (uint8_t *)(uintptr_t)(value ? block->values : block->keys) + stride->layer * layer + stride->head * head +
           stride->token * token + element_bytes(&block->shape) * i;
}

float block_element(const bkv_block_t *block, bool value, uint32_t layer, uint32_t head, uint32_t token, uint32_t i) {
    const uint8_t *at = element_at(block, value, layer, head, token, i);
    uint16_t bits;
    float number;
    memcpy(&bits, at, 2);
    if (block->shape.dtype == BKV_FP32) {
        memcpy(&number, at, 4);
        return number;
    }
    return block->shape.dtype == BKV_BF16 ? bkv_bf16_to_float(bits) : bkv_half_to_float(bits);
}

static void element_set(const bkv_block_t *block, bool value, uint32_t layer, uint32_t head, uint32_t token, uint32_t i,
                        float number) {
    uint8_t *at = element_at(block, value, layer, head, token, i);
    if (block->shape.dtype == BKV_FP32) {
        memcpy(at, &number, 4);
        return;
    }
    uint16_t bits = bkv_float_to_bf16(number);
    if (block->shape.dtype == BKV_FP16) {
        bits = isnan(number) ? 0x7e00 : isinf(number) ? (uint16_t)(number > 0 ? 0x7c00 : 0xfc00) : bkv_float_to_half(number);
    }
    memcpy(at, &bits, 2);
}

// Addresses and strides of every block, and how many bytes all take.
static void blocks_lay(const bkv_shape_t *shape, blocks_t *blocks) {
    int64_t element = (int64_t)element_bytes(shape), key_row = element * shape->key_dim, value_row = element * shape->value_dim;
    int64_t tokens = shape->tokens, heads = shape->heads, count = blocks->count;
    blocks->bytes = (size_t)bkv_shape_bytes(shape) * blocks->count;
    bool latent = blocks->layout == LAYOUT_LATENT;
    if (latent) {
        blocks->bytes = (size_t)(shape->layers * count * tokens * key_row);
    }
    blocks->host = take(blocks->bytes);
    blocks->device = device_take(blocks->bytes);
    for (uint32_t i = 0; i < blocks->count; i++) {
        bkv_block_t *block = &blocks->at_host[i];
        uint8_t *base = blocks->host;
        switch (blocks->layout) {
        case LAYOUT_PAYLOAD:
            bkv_block_from_payload(shape, base + i * bkv_shape_bytes(shape), block);
            break;
        case LAYOUT_HEADS_LAST:
            block->key_stride = (bkv_stride_t){2 * count * tokens * heads * key_row, key_row, heads * key_row};
            block->value_stride = block->key_stride;
            block->keys = base + i * tokens * heads * key_row;
            block->values = base + (count + i) * tokens * heads * key_row;
            break;
        case LAYOUT_TOKENS:
            block->key_stride = (bkv_stride_t){count * heads * tokens * key_row, tokens * key_row, key_row};
            block->value_stride = (bkv_stride_t){count * heads * tokens * value_row, tokens * value_row, value_row};
            block->keys = base + i * heads * tokens * key_row;
            block->values = base + shape->layers * count * heads * tokens * key_row + i * heads * tokens * value_row;
            break;
        default:
            block->key_stride = (bkv_stride_t){count * tokens * key_row, 0, key_row};
            block->value_stride = block->key_stride;
            block->keys = block->values = base + i * tokens * key_row;
            break;
        }
        block->shape = *shape;
        blocks->at_device[i] = *block;
        blocks->at_device[i].keys = blocks->device + ((const uint8_t *)block->keys - base);
        blocks->at_device[i].values = blocks->device + ((const uint8_t *)block->values - base);
    }
}

static void blocks_begin(const bkv_shape_t *shape, uint32_t count, layout_t layout, blocks_t *blocks) {
    *blocks = (blocks_t){.count = count, .layout = layout};
    blocks->at_host = take(count * sizeof(bkv_block_t));
    blocks->at_device = take(count * sizeof(bkv_block_t));
    blocks->ids = take(count * sizeof(bkv_record_id_t));
    for (uint32_t i = 0; i < count; i++) {
        blocks->ids[i].tenant = 7 + i;
        blocks->ids[i].position = (uint64_t)i * shape->tokens;
        memset(blocks->ids[i].key.bytes, (int)(i + 1), BKV_KEY_BYTES);
        memset(blocks->ids[i].spec_id.bytes, (int)(i + 3), BKV_SPEC_ID_BYTES);
    }
    blocks_lay(shape, blocks);
}

void blocks_make(const bkv_shape_t *shape, uint32_t count, layout_t layout, uint64_t seed, blocks_t *blocks) {
    blocks_begin(shape, count, layout, blocks);
    draw_t draw = {seed};
    float *mean = take(shape->key_dim * sizeof(float));
    for (uint64_t at = 0; at < (uint64_t)count * shape->layers * shape->heads * shape->tokens; at++) {
        uint32_t token = (uint32_t)(at % shape->tokens), head = (uint32_t)(at / shape->tokens % shape->heads);
        uint32_t layer = (uint32_t)(at / shape->tokens / shape->heads % shape->layers);
        const bkv_block_t *block = &blocks->at_host[at / shape->tokens / shape->heads / shape->layers];
        for (uint32_t i = 0; token == 0 && i < shape->key_dim; i++) {
            mean[i] = (float)draw_gauss(&draw);
        }
        double away = draw_unit(&draw) < 0.1 ? -1 : 1; // keys that stand out
        for (uint32_t i = 0; i < shape->key_dim; i++) {
            element_set(block, false, layer, head, token, i, (float)(away * mean[i] + draw_gauss(&draw)));
        }
        for (uint32_t i = 0; layout != LAYOUT_LATENT && i < shape->value_dim; i++) {
            element_set(block, true, layer, head, token, i, (float)draw_gauss(&draw));
        }
    }
    free(mean);
    device_put(blocks->device, blocks->host, blocks->bytes);
}

void blocks_fill(const bkv_shape_t *shape, uint32_t count, const float *keys, const float *values, blocks_t *blocks) {
    blocks_begin(shape, count, LAYOUT_PAYLOAD, blocks);
    for (uint64_t at = 0; at < (uint64_t)shape->heads * count * shape->tokens; at++) {
        uint32_t head = (uint32_t)(at / count / shape->tokens);
        const bkv_block_t *block = &blocks->at_host[at / shape->tokens % count];
        for (uint32_t i = 0; i < shape->key_dim; i++) {
            element_set(block, false, 0, head, (uint32_t)(at % shape->tokens), i, keys[at * shape->key_dim + i]);
        }
        for (uint32_t i = 0; i < shape->value_dim; i++) {
            element_set(block, true, 0, head, (uint32_t)(at % shape->tokens), i, values[at * shape->value_dim + i]);
        }
    }
    device_put(blocks->device, blocks->host, blocks->bytes);
}

void blocks_free(blocks_t *blocks) {
    (void)bkv_gpu_free(blocks->device, NULL);
    free(blocks->host);
    free(blocks->at_host);
    free(blocks->at_device);
    free(blocks->ids);
}

void blocks_poke(blocks_t *blocks, uint32_t block, bool value, uint32_t layer, uint32_t head, uint32_t token, uint32_t i,
                 float number) {
    element_set(&blocks->at_host[block], value, layer, head, token, i, number);
    device_put(blocks->device, blocks->host, blocks->bytes);
}

uint8_t *compress_device(const bkv_cuda_t *cuda, const blocks_t *blocks, const bkv_codec_params_t *params, size_t *stride,
                         size_t *length, uint64_t *status) {
    const bkv_shape_t *shape = &blocks->at_host[0].shape;
    *stride = ((size_t)bkv_codec_bound(shape, params) + 255) / 256 * 256 + 256;
    bkv_cuda_compress_args_t args = {
        .blocks = blocks->at_device, .ids = blocks->ids, .count = blocks->count, .params = *params, .record_stride = *stride};
    size_t bytes = *stride * blocks->count;
    uint8_t *records = take(bytes);
    memset(records, 0xa5, bytes); // what is not written shows
    args.records = device_take(bytes);
    device_put(args.records, records, bytes);
    args.status = device_take(blocks->count * sizeof(uint64_t));
    args.workspace_bytes = bkv_cuda_compress_workspace(cuda, shape, params, blocks->count);
    args.workspace = device_take(args.workspace_bytes);
    bkv_error_t err = {0};
    bkv_status_t done = bkv_cuda_compress(cuda, &args, length, &err);
    REQUIRE(done == BKV_OK, "compress: %s", err.message);
    device_get(records, args.records, bytes);
    device_get(status, args.status, blocks->count * sizeof(uint64_t));
    (void)bkv_gpu_free(args.records, NULL);
    (void)bkv_gpu_free(args.status, NULL);
    (void)bkv_gpu_free(args.workspace, NULL);
    return records;
}

uint8_t *compress_host(const char *backend, const blocks_t *blocks, uint32_t block, const bkv_codec_params_t *params,
                       size_t *length, bkv_error_t *err) {
    const bkv_backend_t *with = bkv_backend_get(backend);
    const bkv_shape_t *shape = &blocks->at_host[block].shape;
    size_t capacity = (size_t)bkv_codec_bound(shape, params);
    uint8_t *record = take(capacity + 64), *workspace = take(bkv_compress_workspace(with, shape, params) + 64);
    bkv_status_t status =
        bkv_compress(with, &blocks->at_host[block], params, &blocks->ids[block], record, capacity, workspace, length, err);
    free(workspace);
    if (status != BKV_OK) {
        free(record);
        return NULL;
    }
    return record;
}

void attention_error(const bkv_block_t *block, const void *record, uint32_t layer, uint32_t head, const float *queries,
                     uint32_t count, double *difference, double *exact) {
    uint32_t key_dim = block->shape.key_dim, value_dim = block->shape.value_dim, n = block->shape.tokens;
    bkv_section_view_t view;
    bkv_record_section(record, layer, head, &view);
    float *k = take(((size_t)n + view.tokens) * key_dim * sizeof(float)), *kept_k = k + (size_t)n * key_dim;
    float *v = take(((size_t)n + view.tokens) * value_dim * sizeof(float)), *kept_v = v + (size_t)n * value_dim;
    float *logw = take(((size_t)n + view.tokens) * sizeof(float));
    double *out = take(2 * (size_t)value_dim * sizeof(double));
    bkv_section_read(&view, kept_k, kept_v, logw + n, NULL);
    for (uint32_t t = 0; t < n; t++) {
        for (uint32_t i = 0; i < key_dim; i++) {
            k[(size_t)t * key_dim + i] = block_element(block, false, layer, head, t, i);
        }
        for (uint32_t i = 0; i < value_dim; i++) {
            v[(size_t)t * value_dim + i] = block_element(block, true, layer, head, t, i);
        }
    }
    for (uint32_t q = 0; q < count; q++) {
        for (int side = 0; side < 2; side++) {
            uint32_t first = side ? n : 0, end = side ? n + view.tokens : n;
            double sum = 0, top = -INFINITY, *to = out + (size_t)side * value_dim;
            memset(to, 0, value_dim * sizeof(double));
            for (int pass = 0; pass < 2; pass++) {
                for (uint32_t t = first; t < end; t++) {
                    double dot = 0;
                    for (uint32_t i = 0; i < key_dim; i++) {
                        dot += (double)queries[(size_t)q * key_dim + i] * (double)k[(size_t)t * key_dim + i];
                    }
                    double logit = dot / sqrt(key_dim) + (double)logw[t];
                    if (pass == 0) {
                        top = logit > top ? logit : top;
                        continue;
                    }
                    double weight = exp(logit - top);
                    sum += weight;
                    for (uint32_t i = 0; i < value_dim; i++) {
                        to[i] += weight * (double)v[(size_t)t * value_dim + i];
                    }
                }
            }
            for (uint32_t i = 0; i < value_dim; i++) {
                to[i] /= sum;
            }
        }
        for (uint32_t i = 0; i < value_dim; i++) {
            *difference += (out[i] - out[value_dim + i]) * (out[i] - out[value_dim + i]);
            *exact += out[i] * out[i];
        }
    }
    free(k);
    free(v);
    free(logw);
    free(out);
}

// One F16 tensor of a safetensors file whose header is text at `header`, as floats; shape gets its three dims.
static float *tensor_read(FILE *file, const char *header, size_t data, const char *name, uint32_t shape[3]) {
    const char *at = strstr(header, name);
    unsigned dims[3];
    unsigned long long first, end;
    at = at ? strstr(at, "\"shape\": [") : NULL;
    REQUIRE(at && sscanf(at, "\"shape\": [%u, %u, %u], \"data_offsets\": [%llu, %llu]", &dims[0], &dims[1], &dims[2], &first,
                         &end) == 5,
            "trace: %s", name);
    size_t n = (size_t)dims[0] * dims[1] * dims[2];
    REQUIRE(end - first == 2 * n && fseek(file, (long)(data + first), SEEK_SET) == 0, "trace: %s", name);
    uint16_t *bits = take(n * 2);
    float *numbers = take(n * sizeof(float));
    REQUIRE(fread(bits, 2, n, file) == n, "trace: %s ends early", name);
    for (size_t i = 0; i < n; i++) {
        numbers[i] = bkv_half_to_float(bits[i]);
    }
    for (int i = 0; i < 3; i++) {
        shape[i] = dims[i];
    }
    free(bits);
    return numbers;
}

bool trace_read(const char *path, uint32_t layer, trace_t *trace) {
    FILE *file = fopen(path, "rb");
    if (!file) {
        return false;
    }
    uint64_t bytes;
    REQUIRE(fread(&bytes, sizeof(bytes), 1, file) == 1 && bytes < 1 << 20, "%s: no header", path);
    char *header = take((size_t)bytes + 1), name[32];
    REQUIRE(fread(header, 1, (size_t)bytes, file) == bytes, "%s: ends early", path);
    uint32_t shape[3];
    snprintf(name, sizeof(name), "\"k.%u\"", layer);
    trace->keys = tensor_read(file, header, (size_t)bytes + 8, name, shape);
    trace->heads = shape[0];
    trace->tokens = shape[1];
    trace->dim = shape[2];
    snprintf(name, sizeof(name), "\"v.%u\"", layer);
    trace->values = tensor_read(file, header, (size_t)bytes + 8, name, shape);
    snprintf(name, sizeof(name), "\"q.%u\"", layer);
    trace->q = tensor_read(file, header, (size_t)bytes + 8, name, shape);
    trace->query_heads = shape[0];
    trace->queries = shape[1];
    free(header);
    fclose(file);
    return true;
}
