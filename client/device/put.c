// put.c - Put from GPU memory: each block is one small message that says where it lies.
#include "client/device/device.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

typedef struct put_call {
    bkv_call_t call; // first
    bkv_device_use_t use;
    const bkv_device_put_t *blocks;
    size_t count;
    bkv_put_result_t *results; // NULL: not wanted
    bkv_shape_t shape;         // of a full block
    uint64_t *offsets;         // [2 * layers], of the block that is being described
    size_t block;              // that comes next
    bool lost;                 // the daemon did not know the session
} put_call_t;

// ---- where a block lies ----

// Bytes from the first to the last that is read of one tensor, its pages included; false: beyond 64 bits.
static bool reach(const bkv_device_put_t *block, const bkv_shape_t *shape, bool value, uint64_t pages, uint64_t *bytes) {
    const bkv_kv_layout_t *layout = &block->layout;
    uint64_t token_stride = value && layout->value_token_stride != 0 ? layout->value_token_stride : layout->token_stride;
    uint64_t head_stride = value && layout->value_head_stride != 0 ? layout->value_head_stride : layout->head_stride;
    uint64_t tokens = layout->page_count > 0 && layout->page_tokens < block->tokens ? layout->page_tokens : block->tokens;
    uint64_t heads;
    bool over = __builtin_mul_overflow(head_stride, (uint64_t)shape->heads - 1, &heads);
    over = __builtin_mul_overflow(token_stride, tokens - 1, bytes) || over;
    over = __builtin_add_overflow(*bytes, heads, bytes) || over;
    over = __builtin_add_overflow(*bytes, pages, bytes) || over;
    return !__builtin_add_overflow(
               *bytes, (uint64_t)(value ? shape->value_dim : shape->key_dim) * bkv_dtype_bytes(shape->dtype), bytes) &&
           !over;
}

// Offsets of the first and the last page from the tensors' starts; false: beyond 64 bits.
static bool page_range(const bkv_kv_layout_t *layout, uint64_t *first, uint64_t *last) {
    uint64_t low = 0, high = 0;
    for (uint32_t i = 0; i < layout->page_count; i++) {
        low = i == 0 || layout->pages[i] < low ? layout->pages[i] : low;
        high = i == 0 || layout->pages[i] > high ? layout->pages[i] : high;
    }
    bool over = __builtin_mul_overflow(low, layout->page_stride, first);
    return !__builtin_mul_overflow(high, layout->page_stride, last) && !over;
}

// One tensor: all that is read must be shared in one piece, so that offsets grow as addresses do. *offset is that of `base`,
// which itself need not be shared where no page begins there.
static bool tensor_offset(const bkv_device_t *device, const void *base, uint64_t first, uint64_t bytes, uint64_t *offset) {
    uintptr_t start;
    if (__builtin_add_overflow((uintptr_t)base, (uintptr_t)first, &start) ||
        !bkv_device_offset(device, (const void *)start, bytes, offset) || *offset < first) {
        return false;
    }
    *offset -= first;
    return true;
}

static bkv_status_t block_locate(const put_call_t *put, size_t i, bkv_error_t *err) {
    const bkv_device_put_t *block = &put->blocks[i];
    const bkv_shape_t *shape = &put->shape;
    uint64_t first = 0, last = 0, keys, values;
    if (block->tokens == 0 || block->tokens > shape->tokens) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "blocks[%zu].tokens: %u is not within 1..%u", i, block->tokens,
                        shape->tokens);
    }
    if (!page_range(&block->layout, &first, &last) || !reach(block, shape, false, last - first, &keys) ||
        !reach(block, shape, true, last - first, &values)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "blocks[%zu].layout: reaches beyond 64 bits", i);
    }
    for (uint32_t layer = 0; layer < shape->layers; layer++) {
        if (!tensor_offset(put->use.device, block->layout.keys[layer], first, keys, &put->offsets[layer])) {
            return bkv_fail(err, BKV_INVALID_ARGUMENT, "blocks[%zu].layout.keys[%u]: not in one piece of shared memory", i,
                            layer);
        }
        if (!tensor_offset(put->use.device, block->layout.values[layer], first, values, &put->offsets[shape->layers + layer])) {
            return bkv_fail(err, BKV_INVALID_ARGUMENT, "blocks[%zu].layout.values[%u]: not in one piece of shared memory", i,
                            layer);
        }
    }
    return BKV_OK;
}

// ---- messages ----

static void put_reset(bkv_call_t *call) {
    ((put_call_t *)call)->block = 0;
}

static void describe_layout(const put_call_t *put, const bkv_kv_layout_t *layout, Balancekv__V1__DeviceLayout *message) {
    balancekv__v1__device_layout__init(message);
    message->n_keys = message->n_values = put->shape.layers;
    message->keys = put->offsets;
    message->values = put->offsets + put->shape.layers;
    message->n_pages = layout->page_count;
    message->pages = (uint64_t *)layout->pages; // only read
    message->page_tokens = layout->page_tokens;
    message->page_stride = layout->page_stride;
    message->token_stride = layout->token_stride;
    message->head_stride = layout->head_stride;
    message->value_token_stride = layout->value_token_stride;
    message->value_head_stride = layout->value_head_stride;
}

static grpc_byte_buffer *put_next(bkv_call_t *call, bool *last) {
    put_call_t *put = (put_call_t *)call;
    const bkv_device_put_t *block = &put->blocks[put->block];
    bkv_status_t located = block_locate(put, put->block, NULL);
    assert(located == BKV_OK && "checked when the call was made");
    (void)located;
    bkv_shape_t shape = put->shape;
    shape.tokens = block->tokens;
    Balancekv__V1__PutRequest request = BALANCEKV__V1__PUT_REQUEST__INIT;
    Balancekv__V1__PutBlock message = BALANCEKV__V1__PUT_BLOCK__INIT;
    Balancekv__V1__DeviceLayout layout;
    Balancekv__V1__Place place;
    bkv_device_use_describe(&put->use, &place);
    describe_layout(put, &block->layout, &layout);
    place.layout = &layout;
    message.spec_id = bkv_client_spec_bytes(&call->spec_id);
    message.key = (ProtobufCBinaryData){.len = BKV_KEY_BYTES, .data = (uint8_t *)block->key.bytes};
    message.position = block->position;
    message.tokens = block->tokens;
    message.payload_bytes = bkv_shape_bytes(&shape);
    message.codec = (Balancekv__V1__Codec)block->codec;
    message.rate = block->rate;
    message.ttl_ms = block->ttl_ms;
    message.place = &place;
    request.block = &message;
    grpc_slice slice = bkv_client_pack(&request.base);
    grpc_byte_buffer *buffer = grpc_raw_byte_buffer_create(&slice, 1);
    grpc_slice_unref(slice);
    *last = ++put->block == put->count;
    return buffer;
}

static const bkv_key_t *key_of(const bkv_call_t *call, size_t i) {
    return &((const put_call_t *)call)->blocks[i].key;
}

static bkv_status_t put_take(bkv_call_t *call, grpc_byte_buffer *message, bkv_error_t *err) {
    put_call_t *put = (put_call_t *)call;
    return bkv_client_put_results(call, message, key_of, put->count, put->results, err);
}

static void put_finish(bkv_call_t *call) {
    put_call_t *put = (put_call_t *)call;
    put->lost = bkv_device_use_lost(&put->use, &call->error);
}

static void put_clean(bkv_call_t *call) {
    put_call_t *put = (put_call_t *)call;
    bkv_device_use_end(&put->use);
    free(put->offsets);
}

static const bkv_call_kind_t put_kind = {
    .method = BKV_CLIENT_SERVICE "Put",
    .shape = BKV_UPLOAD,
    .names_spec = true,
    .reset = put_reset,
    .next = put_next,
    .take = put_take,
    .finish = put_finish,
    .clean = put_clean,
};

// ---- the calls ----

static bkv_status_t put_fill(put_call_t *put, bkv_device_t *device, void *stream, bkv_error_t *err) {
    if (put->count == 0) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "blocks: none given");
    }
    if (!bkv_client_spec_shape(device->client, &put->call.spec_id, &put->shape)) {
        return bkv_fail(err, BKV_FAILED_PRECONDITION, "id: the spec has not been opened with this client");
    }
    put->offsets = calloc((size_t)2 * put->shape.layers, sizeof put->offsets[0]);
    if (put->offsets == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "client: out of memory");
    }
    put->use.device = device;
    bkv_status_t status = BKV_OK;
    for (size_t i = 0; status == BKV_OK && i < put->count; i++) {
        status = block_locate(put, i, err);
    }
    return status == BKV_OK ? bkv_device_use_begin(&put->use, device, stream, put->call.timeout_ms, err) : status;
}

static bkv_status_t put_new(bkv_device_t *device, const bkv_spec_id_t *id, const bkv_device_put_t *blocks, size_t count,
                            void *stream, uint32_t timeout_ms, bkv_put_result_t *results, put_call_t **out, bkv_error_t *err) {
    put_call_t *put = bkv_call_new(sizeof *put, &put_kind, device->client, id, timeout_ms);
    if (put == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "client: out of memory");
    }
    bkv_call_bind(&put->call, device->endpoint);
    put->blocks = blocks;
    put->count = count;
    put->results = results;
    bkv_status_t status = put_fill(put, device, stream, err);
    if (status != BKV_OK) {
        bkv_call_free(&put->call);
        return status;
    }
    *out = put;
    return BKV_OK;
}

bkv_status_t bkv_device_put(bkv_device_t *shared, const bkv_spec_id_t *id, const bkv_device_put_t *blocks, size_t count,
                            void *stream, uint32_t timeout_ms, bkv_put_result_t *results, bkv_error_t *err) {
    assert(shared != NULL && id != NULL && (blocks != NULL || count == 0));
    bkv_status_t status = BKV_OK;
    bool again = true;
    for (int i = 0; again && i < BKV_DEVICE_TRIES; i++) {
        put_call_t *put = NULL;
        status = put_new(shared, id, blocks, count, stream, timeout_ms, results, &put, err);
        if (put == NULL) {
            return status;
        }
        status = bkv_call_run(&put->call, err);
        again = put->lost;
        bkv_call_free(&put->call);
    }
    return status;
}

bkv_status_t bkv_device_put_submit(bkv_queue_t *queue, uint64_t tag, bkv_device_t *shared, const bkv_spec_id_t *id,
                                   const bkv_device_put_t *blocks, size_t count, void *stream, uint32_t timeout_ms,
                                   bkv_put_result_t *results) {
    assert(queue != NULL && shared != NULL && id != NULL && (blocks != NULL || count == 0));
    assert(bkv_queue_client(queue) == shared->client);
    put_call_t *put = NULL;
    bkv_status_t status = put_new(shared, id, blocks, count, stream, timeout_ms, results, &put, NULL);
    return put != NULL ? bkv_call_submit(&put->call, queue, tag) : status;
}
