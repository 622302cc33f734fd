// put.c - Put: blocks go out as a stream of messages of at most 1 MiB of payload, copied when their turn comes (see call.h why).
#include "client.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#define DATA_FIELD   15
#define MESSAGE_DATA BKV_CLIENT_BUFFER
#define MESSAGE_HEAD 1024 // more than a PutBlock takes

typedef struct put_call {
    bkv_call_t call; // first
    const bkv_put_t *blocks;
    size_t count;
    bkv_put_result_t *results; // NULL: not wanted
    size_t message_data;       // most payload in one message
    bool checksums;

    size_t block, offset; // what comes next
} put_call_t;

static void put_reset(bkv_call_t *call) {
    put_call_t *put = (put_call_t *)call;
    put->block = put->offset = 0;
    pthread_mutex_lock(&call->client->lock);
    uint64_t most = call->client->max_message_bytes;
    pthread_mutex_unlock(&call->client->lock);
    put->message_data = most > MESSAGE_HEAD && most - MESSAGE_HEAD < MESSAGE_DATA ? (size_t)most - MESSAGE_HEAD : MESSAGE_DATA;
}

static void describe(const put_call_t *put, const bkv_put_t *block, Balancekv__V1__PutBlock *message) {
    balancekv__v1__put_block__init(message);
    message->spec_id = bkv_client_spec_bytes(&put->call.spec_id);
    message->key = (ProtobufCBinaryData){.len = BKV_KEY_BYTES, .data = (uint8_t *)block->key.bytes};
    message->position = block->position;
    message->tokens = block->tokens;
    message->payload_bytes = block->payload_bytes;
    message->codec = (Balancekv__V1__Codec)block->codec;
    message->rate = block->rate;
    message->ttl_ms = block->ttl_ms;
    if (put->checksums) {
        message->has_checksum = true;
        message->checksum = XXH3_64bits(block->payload, block->payload_bytes);
    }
}

// The first message of a block describes it; all carry the next bytes of its payload.
static grpc_byte_buffer *put_next(bkv_call_t *call, bool *last) {
    put_call_t *put = (put_call_t *)call;
    const bkv_put_t *block = &put->blocks[put->block];
    Balancekv__V1__PutBlock description;
    Balancekv__V1__PutRequest request = BALANCEKV__V1__PUT_REQUEST__INIT;
    if (put->offset == 0) {
        describe(put, block, &description);
        request.block = &description;
    }
    size_t left = block->payload_bytes - put->offset;
    size_t length = left < put->message_data ? left : put->message_data;
    grpc_slice head = bkv_client_pack_before(&request.base, DATA_FIELD, length);
    grpc_slice data = bkv_client_pool_copy(call->client->pool, (const uint8_t *)block->payload + put->offset, length);
    grpc_byte_buffer *message = grpc_raw_byte_buffer_create((grpc_slice[]){head, data}, 2);
    grpc_slice_unref(head);
    grpc_slice_unref(data);
    put->offset += length;
    if (put->offset == block->payload_bytes) {
        put->block++;
        put->offset = 0;
    }
    *last = put->block == put->count;
    return message;
}

static bkv_status_t results_check(const put_call_t *put, const Balancekv__V1__PutResponse *response, bkv_error_t *err) {
    if (response->n_results != put->count) {
        return bkv_fail(err, BKV_INTERNAL, "Put: %zu results for %zu blocks", response->n_results, put->count);
    }
    for (size_t i = 0; i < put->count; i++) {
        const ProtobufCBinaryData *key = &response->results[i]->key;
        if (key->len != BKV_KEY_BYTES || memcmp(key->data, put->blocks[i].key.bytes, BKV_KEY_BYTES) != 0) {
            return bkv_fail(err, BKV_INTERNAL, "Put: results[%zu]: not the key of the block put", i);
        }
    }
    return BKV_OK;
}

static bkv_status_t put_take(bkv_call_t *call, grpc_byte_buffer *message, bkv_error_t *err) {
    put_call_t *put = (put_call_t *)call;
    Balancekv__V1__PutResponse *response =
        (Balancekv__V1__PutResponse *)bkv_client_unpack(&balancekv__v1__put_response__descriptor, message);
    if (response == NULL) {
        return bkv_fail(err, BKV_INTERNAL, "Put: the response is not a PutResponse");
    }
    bkv_status_t status = results_check(put, response, err);
    if (status == BKV_OK) {
        bkv_client_saw_epoch(call->client, call, response->boot_epoch);
        for (size_t i = 0; put->results != NULL && i < put->count; i++) {
            put->results[i] = (bkv_put_result_t){
                .stored_bytes = response->results[i]->stored_bytes,
                .duplicate = response->results[i]->duplicate,
            };
        }
    }
    balancekv__v1__put_response__free_unpacked(response, NULL);
    return status;
}

static const bkv_call_kind_t put_kind = {
    .method = BKV_CLIENT_SERVICE "Put",
    .shape = BKV_CALL_UPLOAD,
    .names_spec = true,
    .reset = put_reset,
    .next = put_next,
    .take = put_take,
};

static bkv_call_t *put_new(bkv_client_t *client, const bkv_spec_id_t *id, const bkv_put_t *blocks, size_t count,
                           uint32_t timeout_ms, bkv_put_result_t *results) {
    put_call_t *put = bkv_call_new(sizeof *put, &put_kind, client, id, timeout_ms);
    if (put != NULL) {
        put->blocks = blocks;
        put->count = count;
        put->results = results;
        // A unix socket changes nothing, TLS would notice; TCP's own checksum has 16 bits.
        put->checksums = !client->target.protected_link;
    }
    return (bkv_call_t *)put;
}

bkv_status_t bkv_put(bkv_client_t *client, const bkv_spec_id_t *id, const bkv_put_t *blocks, size_t count, uint32_t timeout_ms,
                     bkv_put_result_t *results, bkv_error_t *err) {
    assert(client != NULL && id != NULL && (blocks != NULL || count == 0));
    if (count == 0) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "blocks: none given");
    }
    bkv_call_t *call = put_new(client, id, blocks, count, timeout_ms, results);
    bkv_status_t status = bkv_call_run(call, err);
    bkv_call_free(call);
    return status;
}

bkv_status_t bkv_put_submit(bkv_queue_t *queue, uint64_t tag, const bkv_spec_id_t *id, const bkv_put_t *blocks, size_t count,
                            uint32_t timeout_ms, bkv_put_result_t *results) {
    assert(queue != NULL && id != NULL && (blocks != NULL || count == 0));
    if (count == 0) {
        return BKV_INVALID_ARGUMENT;
    }
    return bkv_call_submit(put_new(bkv_queue_client(queue), id, blocks, count, timeout_ms, results), queue, tag);
}
