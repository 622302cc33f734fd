// device_attend.c - attention over records' copies in GPU memory: queries there, one call of bkv_cuda_attend a layer, results back.
#include "daemon/pipeline/device_ring.h"

#include "kernels/cuda/gpu.h"

#include <string.h>

#define ALIGN 256

// One request's memory on the device, in one piece: offsets in it.
typedef struct layout {
    size_t records, first, q, out, lse, workspace, total;
    size_t q_bytes, out_bytes, lse_bytes; // of all layers
} layout_t;

static size_t round_up(size_t bytes) {
    return (bytes + ALIGN - 1) / ALIGN * ALIGN;
}

static layout_t lay_out(const bkv_device_cache_t *cache, const bkv_attend_args_t *args, const bkv_cuda_attend_args_t *layer) {
    const size_t rows = (size_t)args->layers * args->query_heads * args->queries;
    layout_t at = {
        .q_bytes = rows * layer->key_dim * sizeof(float),
        .out_bytes = rows * layer->value_dim * sizeof(float),
        .lse_bytes = rows * sizeof(float),
    };
    at.first = at.records + round_up(layer->max_records * sizeof(void *));
    at.q = at.first + round_up(2 * sizeof(uint32_t));
    at.out = at.q + round_up(at.q_bytes);
    at.lse = at.out + round_up(at.out_bytes);
    at.workspace = at.lse + round_up(at.lse_bytes);
    at.total = at.workspace + bkv_cuda_attend_workspace(cache->cuda, layer);
    return at;
}

// What all layers have in common; q, out and lse are of the first.
static bkv_cuda_attend_args_t layer_args(const bkv_record_header_t *header, uint32_t count, const bkv_attend_args_t *args) {
    return (bkv_cuda_attend_args_t){
        .q_dtype = BKV_FP32,
        .out_dtype = BKV_FP32,
        .dtype = (bkv_dtype_t)header->dtype,
        .batch = 1,
        .max_records = count,
        .layer = args->first_layer,
        .heads = header->heads,
        .query_heads = args->query_heads,
        .queries = args->queries,
        .key_dim = header->key_dim,
        .value_dim = header->value_dim,
        .scale = args->scale,
    };
}

// One call's way: what it asks for, where its copies are, its memory there.
typedef struct run {
    bkv_device_cache_t *cache;
    const bkv_attend_args_t *args;
    bkv_cuda_attend_args_t layer;
    layout_t at;
    const void **addresses; // [layer.max_records], of the copies
    uint8_t *memory;        // of the device
    void *stream;
} run_t;

static int send(run_t *run) {
    const uint32_t first[2] = {0, run->layer.max_records};
    int error =
        bkv_gpu_copy(run->memory + run->at.records, run->addresses, run->layer.max_records * sizeof(void *), run->stream);
    error = error != 0 ? error : bkv_gpu_copy(run->memory + run->at.first, first, sizeof(first), run->stream);
    error = error != 0 ? error : bkv_gpu_copy(run->memory + run->at.q, run->args->q, run->at.q_bytes, run->stream);
    int waited = bkv_gpu_wait(run->stream); // `first` is on this stack
    return error != 0 ? error : waited;
}

static int bring_back(run_t *run) {
    int error = bkv_gpu_copy(run->args->out, run->memory + run->at.out, run->at.out_bytes, run->stream);
    error = error != 0 ? error : bkv_gpu_copy(run->args->lse, run->memory + run->at.lse, run->at.lse_bytes, run->stream);
    int waited = bkv_gpu_wait(run->stream);
    return error != 0 ? error : waited;
}

static bkv_status_t run_layers(run_t *run, bkv_error_t *err) {
    bkv_cuda_attend_args_t layer = run->layer;
    bkv_status_t status = BKV_OK;
    layer.records = (const void *const *)(const void *)(run->memory + run->at.records);
    layer.first = (const uint32_t *)(const void *)(run->memory + run->at.first);
    for (uint32_t i = 0; i < run->args->layers && status == BKV_OK; i++) {
        layer.q = run->memory + run->at.q + run->at.q_bytes / run->args->layers * i;
        layer.out = run->memory + run->at.out + run->at.out_bytes / run->args->layers * i;
        layer.lse = (float *)(void *)(run->memory + run->at.lse + run->at.lse_bytes / run->args->layers * i);
        layer.layer = run->args->first_layer + i;
        status = bkv_cuda_attend(run->cache->cuda, &layer, run->memory + run->at.workspace, run->stream, err);
    }
    return status;
}

static bkv_status_t compute(run_t *run, bkv_error_t *err) {
    void *memory = NULL;
    int error = bkv_gpu_alloc(&memory, run->at.total, run->stream);
    if (error != 0) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "gpu_cache: %zu bytes of GPU memory for a request: %s", run->at.total,
                        bkv_gpu_error(error));
    }
    run->memory = memory;
    bkv_status_t status = BKV_OK;
    error = send(run);
    if (error == 0) {
        status = run_layers(run, err);
        error = status == BKV_OK ? bring_back(run) : bkv_gpu_wait(run->stream);
    }
    int freed = bkv_gpu_free(memory, run->stream);
    error = error != 0 ? error : freed;
    return error != 0 ? bkv_device_cache_fail(run->cache, error, err) : status;
}

static bkv_status_t attend(bkv_device_cache_t *cache, const void *const *records, uint32_t count, const bkv_attend_args_t *args,
                           bkv_device_hold_t *holds, const void **addresses, bkv_error_t *err) {
    bkv_record_header_t header;
    memcpy(&header, records[0], sizeof(header));
    bkv_status_t status = bkv_device_cache_hold(cache, records, count, holds, err);
    if (status != BKV_OK) {
        return status;
    }
    for (uint32_t i = 0; i < count; i++) {
        addresses[i] = cache->memory + cache->entries[holds[i].entry].offset; // fixed while it is held
    }
    run_t run = {.cache = cache,
                 .args = args,
                 .layer = layer_args(&header, count, args),
                 .addresses = addresses,
                 .stream = bkv_gpu_own_stream()};
    run.at = lay_out(cache, args, &run.layer);
    status = compute(&run, err);
    bkv_device_cache_let_go(cache, holds, count);
    return status;
}

bkv_status_t bkv_device_cache_attend(bkv_device_cache_t *cache, const void *const *records, uint32_t count,
                                     const bkv_attend_args_t *args, bkv_error_t *err) {
    if (count == 0) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "gpu_cache: no records");
    }
    bkv_device_hold_t *holds = malloc(count * sizeof(holds[0]));
    const void **addresses = malloc(count * sizeof(addresses[0]));
    if (holds == NULL || addresses == NULL) {
        free(holds);
        free(addresses);
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "gpu_cache: no memory for %u records", count);
    }
    int before = -1;
    bkv_status_t status = bkv_device_cache_enter(cache, &before, err);
    if (status == BKV_OK) {
        status = attend(cache, records, count, args, holds, addresses, err);
        bkv_device_cache_leave(cache, before);
    }
    free(holds);
    free(addresses);
    return status;
}
