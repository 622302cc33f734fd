// put.c - Put: where there is memory shared with the daemon, blocks are named by their place in it, back to back. Others go out
// as a stream of messages of at most 1 MiB of payload, copied when their turn comes (see call.h why).
//
// A payload that lies in a buffer of bkv_buffer_get is named where it is. Any other is copied into the window as the call is
// started, by the caller's thread as a rule; where the window has no room for it, that block goes inline in the same stream.
//
// A place needs no checksum: over shm nothing lies between the two ends that could change a bit, and RDMA has the link's own
// (ICRC, 32 bits, end to end).
#include "client/client.h"
#include "proto/chunk.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#define MESSAGE_DATA BKV_CLIENT_BUFFER
#define MESSAGE_HEAD 1024 // more than a PutBlock takes

// Where a block's payload lies in the window.
typedef struct put_place {
    bkv_client_region_t *region; // held; NULL: it goes inline
    uint64_t offset;
    bool theirs; // it is a buffer of the caller's, who may fill it again
} put_place_t;

typedef struct put_call {
    bkv_call_t call; // first
    const bkv_put_t *blocks;
    put_place_t *places; // [count]
    size_t count;
    bkv_put_result_t *results; // NULL: not wanted
    size_t message_data;       // most payload in one message

    size_t block, offset; // what comes next
} put_call_t;

// ---- places ----

// Finds or makes the block's place in the attempt's window. One that an attempt before this had there is good, also if it is lost:
// the bytes are the same.
static void place_find(put_call_t *put, size_t i) {
    bkv_client_window_t *window = put->call.window;
    const bkv_put_t *block = &put->blocks[i];
    put_place_t *place = &put->places[i];
    if (place->region != NULL && bkv_client_region_window(place->region) == window) {
        return;
    }
    bkv_client_region_release(place->region);
    place->region = NULL;
    if (window == NULL || block->payload_bytes < BKV_PLACE_LEAST) {
        return;
    }
    place->region = bkv_client_shared_find(put->call.client, block->payload, block->payload_bytes, &place->offset);
    place->theirs = place->region != NULL && bkv_client_region_window(place->region) == window && place->offset % 64 == 0;
    if (place->theirs) {
        return;
    }
    bkv_client_region_release(place->region);
    place->region = bkv_client_region_take(window, block->payload_bytes);
    if (place->region != NULL) {
        memcpy(bkv_client_region_memory(place->region), block->payload, block->payload_bytes);
        place->offset = bkv_client_region_offset(place->region);
    }
}

// The daemon may still be reading: what is there now must not change to what it is not. A caller whose Put succeeds at its next
// attempt may fill the buffer again; so that attempt is made in another session, begun when this one's transfers are over.
static void put_settle(bkv_call_t *call, bool answered) {
    put_call_t *put = (put_call_t *)call;
    for (size_t i = 0; !answered && i < put->count; i++) {
        if (put->places[i].region != NULL) {
            bkv_client_region_lose(put->places[i].region);
            if (put->places[i].theirs) {
                bkv_client_window_wear_out(bkv_client_region_window(put->places[i].region));
            }
        }
    }
}

static void put_clean(bkv_call_t *call) {
    put_call_t *put = (put_call_t *)call;
    for (size_t i = 0; put->places != NULL && i < put->count; i++) {
        bkv_client_region_release(put->places[i].region);
    }
    free(put->places);
}

// ---- messages ----

static void put_reset(bkv_call_t *call) {
    put_call_t *put = (put_call_t *)call;
    put->block = put->offset = 0;
    for (size_t i = 0; i < put->count; i++) {
        place_find(put, i);
    }
    pthread_mutex_lock(&call->client->lock);
    uint64_t most = call->endpoint->max_message_bytes;
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
    // A unix socket changes nothing, TLS would notice; TCP's own checksum has 16 bits.
    if (!put->call.endpoint->target.protected_link && put->places[put->block].region == NULL) {
        message->has_checksum = true;
        message->checksum = XXH3_64bits(block->payload, block->payload_bytes);
    }
}

// A block with a place is one message, without data.
static grpc_byte_buffer *next_placed(put_call_t *put) {
    const put_place_t *where = &put->places[put->block];
    Balancekv__V1__PutBlock description;
    Balancekv__V1__PutRequest request = BALANCEKV__V1__PUT_REQUEST__INIT;
    Balancekv__V1__Place place = BALANCEKV__V1__PLACE__INIT;
    place.session = bkv_client_session_bytes(put->call.window);
    place.offset = where->offset;
    place.bytes = put->blocks[put->block].payload_bytes;
    describe(put, &put->blocks[put->block], &description);
    description.place = &place;
    request.block = &description;
    grpc_slice slice = bkv_client_pack(&request.base);
    grpc_byte_buffer *message = grpc_raw_byte_buffer_create(&slice, 1);
    grpc_slice_unref(slice);
    return message;
}

// The first message of a block describes it; all carry the next bytes of its payload.
static grpc_byte_buffer *put_next(bkv_call_t *call, bool *last) {
    put_call_t *put = (put_call_t *)call;
    const bkv_put_t *block = &put->blocks[put->block];
    if (put->places[put->block].region != NULL) {
        grpc_byte_buffer *placed = next_placed(put);
        *last = ++put->block == put->count;
        return placed;
    }
    Balancekv__V1__PutBlock description;
    Balancekv__V1__PutRequest request = BALANCEKV__V1__PUT_REQUEST__INIT;
    if (put->offset == 0) {
        describe(put, block, &description);
        request.block = &description;
    }
    size_t left = block->payload_bytes - put->offset;
    size_t length = left < put->message_data ? left : put->message_data;
    grpc_slice head = bkv_chunk_pack_before(&request.base, length);
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

static bkv_status_t results_check(const Balancekv__V1__PutResponse *response, bkv_client_put_key_t key_of,
                                  const bkv_call_t *call, size_t count, bkv_error_t *err) {
    if (response->n_results != count) {
        return bkv_fail(err, BKV_INTERNAL, "Put: %zu results for %zu blocks", response->n_results, count);
    }
    for (size_t i = 0; i < count; i++) {
        const ProtobufCBinaryData *key = &response->results[i]->key;
        if (key->len != BKV_KEY_BYTES || memcmp(key->data, key_of(call, i)->bytes, BKV_KEY_BYTES) != 0) {
            return bkv_fail(err, BKV_INTERNAL, "Put: results[%zu]: not the key of the block put", i);
        }
    }
    return BKV_OK;
}

bkv_status_t bkv_client_put_results(bkv_call_t *call, grpc_byte_buffer *message, bkv_client_put_key_t key_of, size_t count,
                                    bkv_put_result_t *results, bkv_error_t *err) {
    Balancekv__V1__PutResponse *response =
        (Balancekv__V1__PutResponse *)bkv_client_unpack(&balancekv__v1__put_response__descriptor, message);
    if (response == NULL) {
        return bkv_fail(err, BKV_INTERNAL, "Put: the response is not a PutResponse");
    }
    bkv_status_t status = results_check(response, key_of, call, count, err);
    if (status == BKV_OK) {
        bkv_client_saw_epoch(call->client, call, response->boot_epoch);
        for (size_t i = 0; results != NULL && i < count; i++) {
            results[i] = (bkv_put_result_t){
                .stored_bytes = response->results[i]->stored_bytes,
                .duplicate = response->results[i]->duplicate,
                .replicas = response->results[i]->replicas,
            };
        }
    }
    balancekv__v1__put_response__free_unpacked(response, NULL);
    return status;
}

static const bkv_key_t *key_of(const bkv_call_t *call, size_t i) {
    return &((const put_call_t *)call)->blocks[i].key;
}

static bkv_status_t put_take(bkv_call_t *call, grpc_byte_buffer *message, bkv_error_t *err) {
    put_call_t *put = (put_call_t *)call;
    return bkv_client_put_results(call, message, key_of, put->count, put->results, err);
}

static const bkv_call_kind_t put_kind = {
    .method = BKV_CLIENT_SERVICE "Put",
    .shape = BKV_UPLOAD,
    .names_spec = true,
    .reset = put_reset,
    .next = put_next,
    .take = put_take,
    .settle = put_settle,
    .clean = put_clean,
};

static uint64_t largest(const bkv_put_t *blocks, size_t count) {
    uint64_t most = 0;
    for (size_t i = 0; i < count; i++) {
        most = blocks[i].payload_bytes > most ? blocks[i].payload_bytes : most;
    }
    return most;
}

// To the owner of all blocks, if that is one.
static void route(put_call_t *put) {
    bkv_client_split_t *split = NULL;
    bkv_key_t *keys = calloc(put->count, sizeof *keys);
    if (keys != NULL) {
        for (size_t i = 0; i < put->count; i++) {
            keys[i] = put->blocks[i].key;
        }
        split = bkv_client_route_split(put->call.client, keys, put->count);
    }
    if (split != NULL && split->count == 1) {
        bkv_client_route_to(&put->call, &split->parts[0]);
    }
    free(split);
    free(keys);
}

static bkv_call_t *put_new(bkv_client_t *client, const bkv_spec_id_t *id, const bkv_put_t *blocks, size_t count,
                           uint32_t timeout_ms, bkv_put_result_t *results) {
    put_call_t *put = bkv_call_new(sizeof *put, &put_kind, client, id, timeout_ms);
    if (put == NULL || (put->places = calloc(count, sizeof *put->places)) == NULL) {
        bkv_call_free((bkv_call_t *)put);
        return NULL;
    }
    put->blocks = blocks;
    put->count = count;
    put->results = results;
    if (!client->local) {
        route(put);
    }
    put->call.places = true;
    put->call.place_bytes = largest(blocks, count);
    return &put->call;
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
