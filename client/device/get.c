// get.c - Get into GPU memory: the daemon says of each record where in the room it lies.
#include "client/device/device.h"

#include "proto/answer.h"
#include "proto/chunk.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

typedef struct get_call {
    bkv_call_t call; // first
    bkv_device_use_t use;
    size_t count;
    bkv_device_record_t *records;
    uint64_t room, room_bytes; // in the session's memory
    uint64_t used;             // of the room, by the records that have come
    size_t index;              // of the next record
    bkv_error_t first;         // the first record's that there is not
    bool lost;                 // the daemon did not know the session
} get_call_t;

static void get_reset(bkv_call_t *call) {
    get_call_t *get = (get_call_t *)call;
    for (size_t i = 0; i < get->count; i++) {
        get->records[i] = (bkv_device_record_t){.key = get->records[i].key};
    }
    get->index = 0;
    get->used = 0;
    get->first = (bkv_error_t){0};
}

// The request, and the place behind it: messages of protobuf that follow one another are one.
static grpc_byte_buffer *get_next(bkv_call_t *call, bool *last) {
    get_call_t *get = (get_call_t *)call;
    Balancekv__V1__Place place;
    Balancekv__V1__GetRequest request = BALANCEKV__V1__GET_REQUEST__INIT;
    bkv_device_use_describe(&get->use, &place);
    place.offset = get->room;
    place.bytes = get->room_bytes;
    request.place = &place;
    grpc_slice rest = bkv_client_pack(&request.base);
    grpc_byte_buffer *message = grpc_raw_byte_buffer_create((grpc_slice[]){call->request, rest}, 2);
    grpc_slice_unref(rest);
    *last = true;
    return message;
}

// ---- chunks ----

static void record_fail(get_call_t *get, size_t index, bkv_status_t status, const char *text) {
    get->records[index].status = status;
    if (get->first.status == BKV_OK) {
        bkv_fail(&get->first, status, "keys[%zu]: %s", index, text);
    }
}

// Behind the records before it and within the room: the daemon knows no other memory of ours for this call, but may be wrong.
static bkv_status_t take_placed(get_call_t *get, const Balancekv__V1__RecordChunk *head, bkv_error_t *err) {
    uint64_t offset = head->place_offset - get->room; // wraps where it is before the room, and is refused
    if (offset % 64 != 0 || offset < get->used || offset > get->room_bytes || head->record_bytes > get->room_bytes - offset ||
        head->record_bytes == 0) {
        return bkv_fail(err, BKV_INTERNAL, "record %u: place_offset: %llu and %llu bytes from there are not in the room's rest",
                        head->index, (unsigned long long)head->place_offset, (unsigned long long)head->record_bytes);
    }
    get->records[head->index].offset = offset;
    get->records[head->index].length = head->record_bytes;
    get->used = offset + head->record_bytes;
    return BKV_OK;
}

static bkv_status_t take_head(get_call_t *get, const Balancekv__V1__RecordChunk *head, bkv_error_t *err) {
    // Further chunks of a record that comes as data have its index, too.
    bool more = get->index > 0 && head->index == get->index - 1 && get->records[head->index].status == BKV_RESOURCE_EXHAUSTED;
    if (more && !head->placed) {
        return BKV_OK;
    }
    if (head->index < get->index || head->index >= get->count) {
        return bkv_fail(err, BKV_INTERNAL, "chunk: index: %u of %zu records, where %zu was due", head->index, get->count,
                        get->index);
    }
    get->index = (size_t)head->index + 1;
    if (head->code != 0) {
        char text[160];
        bkv_answer_text(head->message, strlen(head->message), text, sizeof text);
        record_fail(get, head->index, bkv_answer_status(head->code), text);
        return BKV_OK;
    }
    if (head->key.len != BKV_KEY_BYTES || memcmp(head->key.data, get->records[head->index].key.bytes, BKV_KEY_BYTES) != 0) {
        return bkv_fail(err, BKV_INTERNAL, "record %u: key: not the one asked for", head->index);
    }
    if (!head->placed) {
        record_fail(get, head->index, BKV_RESOURCE_EXHAUSTED, "there is no room left for it");
        return BKV_OK;
    }
    return take_placed(get, head, err);
}

static bkv_status_t get_take(bkv_call_t *call, grpc_byte_buffer *message, bkv_error_t *err) {
    bkv_chunk_t chunk;
    if (!bkv_chunk_parse(&chunk, message)) {
        return bkv_fail(err, BKV_INTERNAL, "Get: the response is not a RecordChunk");
    }
    bkv_status_t status = take_head((get_call_t *)call, chunk.head, err);
    if (status == BKV_OK) {
        bkv_client_saw_epoch(call->client, call, chunk.head->boot_epoch);
    }
    balancekv__v1__record_chunk__free_unpacked(chunk.head, NULL);
    return status;
}

// Gives every record its status, and the call the first's that is not OK.
static void get_finish(bkv_call_t *call) {
    get_call_t *get = (get_call_t *)call;
    get->lost = bkv_device_use_lost(&get->use, &call->error);
    bkv_error_t none = call->error;
    if (none.status == BKV_OK) {
        bkv_fail(&none, BKV_INTERNAL, "Get: a record never came, though the call ended well");
    }
    for (size_t i = 0; i < get->count; i++) {
        if (get->records[i].status == BKV_OK && get->records[i].length == 0) {
            record_fail(get, i, none.status, none.message);
        }
    }
    if (get->first.status != BKV_OK) {
        call->error = get->first;
    }
}

static void get_clean(bkv_call_t *call) {
    bkv_device_use_end(&((get_call_t *)call)->use);
}

static const bkv_call_kind_t get_kind = {
    .method = BKV_CLIENT_SERVICE "Get",
    .shape = BKV_DOWNLOAD,
    .names_spec = true,
    .reset = get_reset,
    .next = get_next,
    .take = get_take,
    .finish = get_finish,
    .clean = get_clean,
};

// ---- the calls ----

// What a call of either form is asked.
typedef struct get_args {
    bkv_device_t *device;
    const bkv_spec_id_t *id;
    const bkv_key_t *keys;
    size_t count;
    const bkv_range_t *range; // NULL: all
    const void *room;
    size_t room_bytes;
    void *stream;
    uint32_t timeout_ms;
    bkv_device_record_t *records;
} get_args_t;

static void records_init(const get_args_t *args, bkv_status_t status) {
    for (size_t i = 0; i < args->count; i++) {
        args->records[i] = (bkv_device_record_t){.key = args->keys[i], .status = status};
    }
}

static bkv_status_t request_pack(get_call_t *get, const get_args_t *args, bkv_error_t *err) {
    const bkv_range_t range = args->range != NULL ? *args->range : (bkv_range_t){0};
    ProtobufCBinaryData *list = bkv_client_key_list(args->keys, args->count);
    if (list == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "client: out of memory");
    }
    Balancekv__V1__GetRequest request = BALANCEKV__V1__GET_REQUEST__INIT;
    request.spec_id = bkv_client_spec_bytes(args->id);
    request.n_keys = args->count;
    request.keys = list;
    request.first_layer = range.first_layer;
    request.layers = range.layers;
    request.first_head = range.first_head;
    request.heads = range.heads;
    get->call.request = bkv_client_pack(&request.base);
    free(list);
    return BKV_OK;
}

static bkv_status_t get_fill(get_call_t *get, const get_args_t *args, bkv_error_t *err) {
    if (args->count == 0) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "keys: none given");
    }
    if ((uintptr_t)args->room % 64 != 0 || !bkv_device_offset(args->device, args->room, args->room_bytes, &get->room) ||
        get->room % 64 != 0) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "room: not in one piece of shared memory, or not aligned to 64 bytes");
    }
    get->room_bytes = args->room_bytes;
    bkv_status_t status = request_pack(get, args, err);
    return status == BKV_OK ? bkv_device_use_begin(&get->use, args->device, args->stream, get->call.timeout_ms, err) : status;
}

// records are initialised in every case.
static bkv_status_t get_new(const get_args_t *args, get_call_t **out, bkv_error_t *err) {
    get_call_t *get = bkv_call_new(sizeof *get, &get_kind, args->device->client, args->id, args->timeout_ms);
    if (get == NULL) {
        records_init(args, BKV_RESOURCE_EXHAUSTED);
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "client: out of memory");
    }
    bkv_call_bind(&get->call, args->device->endpoint);
    bkv_status_t status = get_fill(get, args, err);
    records_init(args, status);
    if (status != BKV_OK) {
        bkv_call_free(&get->call);
        return status;
    }
    get->count = args->count;
    get->records = args->records;
    *out = get;
    return BKV_OK;
}

bkv_status_t bkv_device_get(bkv_device_t *shared, const bkv_spec_id_t *id, const bkv_key_t *keys, size_t count,
                            const bkv_range_t *range, void *room, size_t room_bytes, void *stream, uint32_t timeout_ms,
                            bkv_device_record_t *records, bkv_error_t *err) {
    assert(shared != NULL && id != NULL && ((keys != NULL && records != NULL) || count == 0));
    const get_args_t args = {shared, id, keys, count, range, room, room_bytes, stream, timeout_ms, records};
    bkv_status_t status = BKV_OK;
    bool again = true;
    for (int i = 0; again && i < BKV_DEVICE_TRIES; i++) {
        get_call_t *get = NULL;
        status = get_new(&args, &get, err);
        if (get == NULL) {
            return status;
        }
        status = bkv_call_run(&get->call, err);
        again = get->lost;
        bkv_call_free(&get->call);
    }
    return status;
}

bkv_status_t bkv_device_get_submit(bkv_queue_t *queue, uint64_t tag, bkv_device_t *shared, const bkv_spec_id_t *id,
                                   const bkv_key_t *keys, size_t count, const bkv_range_t *range, void *room, size_t room_bytes,
                                   void *stream, uint32_t timeout_ms, bkv_device_record_t *records) {
    assert(queue != NULL && shared != NULL && id != NULL && ((keys != NULL && records != NULL) || count == 0));
    assert(bkv_queue_client(queue) == shared->client);
    const get_args_t args = {shared, id, keys, count, range, room, room_bytes, stream, timeout_ms, records};
    get_call_t *get = NULL;
    bkv_status_t status = get_new(&args, &get, NULL);
    if (get != NULL) {
        status = bkv_call_submit(&get->call, queue, tag);
        if (status != BKV_OK) {
            records_init(&args, status);
        }
    }
    return status;
}
