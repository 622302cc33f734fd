// backend.c - the backend "cuda" of codec.h: payloads and records in host memory, the work on device 0, for a daemon
// whose clients send their bytes. What already lies on a device is better served by bkv_cuda.h. Folding and attention over host
// records are the best CPU backend's: they read few bytes, which would cost more to move than to use.
#include "backend.h"

#include "device.h"

#include <assert.h>

static bool cuda_available(void) {
    bkv_cuda_t cuda;
    return bkv_cuda_init(0, &cuda, NULL) == BKV_OK;
}

// Whether K and V lie as a payload does, so that one copy moves them.
static bool is_payload(const bkv_block_t *block) {
    bkv_block_t payload;
    bkv_block_from_payload(&block->shape, block->keys, &payload);
    return payload.values == block->values && memcmp(&payload.key_stride, &block->key_stride, sizeof(bkv_stride_t)) == 0 &&
           memcmp(&payload.value_stride, &block->value_stride, sizeof(bkv_stride_t)) == 0;
}

static void head_pack(const bkv_block_t *block, bool values, uint32_t layer, uint32_t head, const bkv_block_t *payload) {
    const bkv_stride_t *from = values ? &block->value_stride : &block->key_stride;
    const bkv_stride_t *to = values ? &payload->value_stride : &payload->key_stride;
    const uint8_t *source = values ? block->values : block->keys;
    uint8_t *target = (uint8_t *)(uintptr_t)(values ? payload->values : payload->keys);
    source += from->layer * layer + from->head * head;
    target += to->layer * layer + to->head * head;
    for (uint32_t token = 0; token < block->shape.tokens; token++) {
        memcpy(target + to->token * token, source + from->token * token, (size_t)to->token);
    }
}

// K and V of any strides as a payload in the workspace.
static const void *payload_pack(const bkv_block_t *block, void *workspace) {
    if (is_payload(block)) {
        return block->keys;
    }
    bkv_block_t payload;
    bkv_block_from_payload(&block->shape, workspace, &payload);
    for (uint32_t i = 0; i < block->shape.layers * block->shape.heads; i++) {
        head_pack(block, false, i / block->shape.heads, i % block->shape.heads, &payload);
        head_pack(block, true, i / block->shape.heads, i % block->shape.heads, &payload);
    }
    return workspace;
}

static size_t cuda_compress_workspace(const bkv_shape_t *shape, const bkv_codec_params_t *params) {
    (void)params;
    return (size_t)bkv_shape_bytes(shape);
}

// Device memory of one call, in one piece.
typedef struct bkv_staging {
    size_t record, status, workspace, workspace_bytes, total; // offsets; the payload is at 0
} bkv_staging_t;

static size_t round_up(uint64_t bytes) {
    return (size_t)((bytes + 255) / 256 * 256);
}

static bkv_staging_t stage(const bkv_cuda_t *cuda, const bkv_shape_t *shape, const bkv_codec_params_t *params) {
    bkv_staging_t staging = {.record = round_up(bkv_shape_bytes(shape))};
    staging.status = staging.record + round_up(bkv_codec_bound(shape, params));
    staging.workspace = staging.status + round_up(sizeof(uint64_t));
    staging.workspace_bytes = bkv_cuda_compress_workspace(cuda, shape, params, 1);
    staging.total = staging.workspace + staging.workspace_bytes;
    return staging;
}

typedef struct bkv_request {
    const bkv_shape_t *shape;
    const bkv_codec_params_t *params;
    const bkv_record_id_t *id;
    const void *payload; // host
    void *record;        // host
} bkv_request_t;

static bkv_status_t failed(int error, bkv_error_t *err) {
    return bkv_fail(err, BKV_INTERNAL, "cuda: %s", bkv_gpu_error(error));
}

// There and back through `memory`, which stage() sized.
static bkv_status_t round_trip(const bkv_cuda_t *cuda, const bkv_request_t *request, const bkv_staging_t *staging,
                               uint8_t *memory, void *stream, size_t *length, bkv_error_t *err) {
    int error = bkv_gpu_copy(memory, request->payload, (size_t)bkv_shape_bytes(request->shape), stream);
    if (error != 0) {
        return failed(error, err);
    }
    bkv_block_t block;
    bkv_block_from_payload(request->shape, memory, &block);
    bkv_cuda_compress_args_t args = {.blocks = &block,
                                     .ids = request->id,
                                     .count = 1,
                                     .params = *request->params,
                                     .records = memory + staging->record,
                                     .record_stride = staging->status - staging->record,
                                     .status = (uint64_t *)(void *)(memory + staging->status),
                                     .workspace = memory + staging->workspace,
                                     .workspace_bytes = staging->workspace_bytes,
                                     .stream = stream};
    bkv_status_t status = bkv_cuda_compress(cuda, &args, length, err);
    if (status != BKV_OK) {
        return status;
    }
    uint64_t found;
    error = bkv_gpu_copy(request->record, args.records, *length, stream);
    error = error != 0 ? error : bkv_gpu_copy(&found, args.status, sizeof(found), stream);
    error = error != 0 ? error : bkv_gpu_wait(stream);
    return error != 0 ? failed(error, err) : bkv_cuda_compress_check(request->shape, found, err);
}

static bkv_status_t cuda_compress(const bkv_block_t *block, const bkv_codec_params_t *params, const bkv_record_id_t *id,
                                  void *record, size_t capacity, void *workspace, size_t *length, bkv_error_t *err) {
    (void)capacity; // checked by bkv_compress
    bkv_cuda_t cuda;
    bkv_status_t status = bkv_cuda_init(0, &cuda, err);
    if (status != BKV_OK) {
        return status;
    }
    bkv_request_t request = {&block->shape, params, id, payload_pack(block, workspace), record};
    bkv_staging_t staging = stage(&cuda, &block->shape, params);
    void *stream = bkv_gpu_own_stream(), *memory = NULL;
    int before, error = bkv_gpu_enter(cuda.device, &before);
    if (error != 0) {
        return failed(error, err);
    }
    error = bkv_gpu_alloc(&memory, staging.total, stream);
    if (error != 0) {
        status =
            bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "cuda: %zu bytes of device memory, %s", staging.total, bkv_gpu_error(error));
    } else {
        status = round_trip(&cuda, &request, &staging, memory, stream, length, err);
        error = bkv_gpu_free(memory, stream);
        status = status == BKV_OK && error != 0 ? failed(error, err) : status;
    }
    bkv_gpu_leave(before);
    return status;
}

static bkv_status_t cuda_fold(const void *const *records, uint32_t count, const bkv_record_id_t *id,
                              const bkv_fold_params_t *params, void *record, void *workspace, size_t *length,
                              bkv_error_t *err) {
    return bkv_backend_get(NULL)->fold(records, count, id, params, record, workspace, length, err);
}

static size_t cuda_fold_workspace(const void *const *records, uint32_t count, uint64_t budget) {
    return bkv_backend_get(NULL)->fold_workspace(records, count, budget);
}

static bkv_status_t cuda_attend(const void *const *records, uint32_t count, const bkv_attend_args_t *args, void *workspace,
                                bkv_error_t *err) {
    return bkv_backend_get(NULL)->attend(records, count, args, workspace, err);
}

static size_t cuda_attend_workspace(const void *const *records, uint32_t count, const bkv_attend_args_t *args) {
    return bkv_backend_get(NULL)->attend_workspace(records, count, args);
}

const bkv_backend_t bkv_backend_cuda = {
    .name = "cuda",
    .available = cuda_available,
    .compress = cuda_compress,
    .fold = cuda_fold,
    .attend = cuda_attend,
    .compress_workspace = cuda_compress_workspace,
    .fold_workspace = cuda_fold_workspace,
    .attend_workspace = cuda_attend_workspace,
};
