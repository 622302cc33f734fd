// records.c - sends records as a stream of chunks. A chunk refers to the record's bytes where they lie in the store, or says where
// in the client's memory a transport has put them.
//
// One record is on its way at a time, so a slow reader costs a pin on one record (of a Fold: on each that it has not got yet) and
// what gRPC buffers, until its deadline.
// gRPC may hold on to a chunk's bytes after the send has completed or failed, even after the call has ended: each chunk
// therefore counts as a holder of its record, which is released by the last of them. A transport has let go of the record when
// it calls back, and nothing ends the call before that.
#include "daemon/rpc/records.h"

#include "daemon/observe/clock.h"
#include "daemon/rpc/handover.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

// A chunk fits the 4 MiB that gRPC clients take by default, with ease. A record a little over a whole number of chunks does
// not get a tiny last one.
#define CHUNK_BYTES ((uint64_t)1 << 20)
#define CHUNK_SLACK ((uint64_t)64 << 10)

// A record on its way out.
struct bkv_parcel {
    bkv_server_t *server;
    bkv_delivery_t delivery;
    _Atomic uint32_t holders; // the call while it sends, and every chunk that gRPC has not let go of
};

// ---- parcels ----

static void parcel_release(void *user) {
    bkv_parcel_t *parcel = user;
    BKV_TAKE_OVER(parcel);
    if (atomic_fetch_sub(&parcel->holders, 1) == 1) {
        bkv_server_t *server = parcel->server;
        bkv_delivery_release(server->config.pipeline, &parcel->delivery);
        free(parcel);
        bkv_server_release(server);
    }
}

// Takes the delivery over; NULL without memory, and then it is still the caller's.
static bkv_parcel_t *parcel_new(bkv_server_t *server, const bkv_delivery_t *delivery) {
    bkv_parcel_t *parcel = malloc(sizeof(*parcel));
    if (parcel != NULL) {
        *parcel = (bkv_parcel_t){.server = server, .delivery = *delivery, .holders = 1};
        bkv_server_hold(server);
    }
    return parcel;
}

static grpc_slice parcel_slice(bkv_parcel_t *parcel, uint64_t offset, uint64_t length) {
    atomic_fetch_add(&parcel->holders, 1);
    BKV_HAND_OVER(parcel);
    void *bytes = (void *)(uintptr_t)(parcel->delivery.data + offset); // gRPC only reads it
    return grpc_slice_new_with_user_data(bytes, length, parcel_release, parcel);
}

// ---- making ----

static void records_free(void *body) {
    bkv_records_t *records = body;
    if (records->parcel != NULL) {
        parcel_release(records->parcel);
    }
    if (records->session != NULL) {
        bkv_session_release(records->session);
    }
    bkv_fold_release(records->server->config.pipeline, &records->folded);
    free(records);
}

bkv_records_t *bkv_records_new(bkv_call_t *call, uint32_t count) {
    bkv_records_t *records = calloc(1, sizeof(*records) + count * sizeof(records->keys[0]));
    if (records != NULL) {
        records->server = call->server;
        records->count = count;
        call->body = records;
        call->body_free = records_free;
    }
    return records;
}

bkv_status_t bkv_records_set_room(bkv_records_t *records, const Balancekv__V1__Place *place, bkv_error_t *err) {
    if (place == NULL) {
        return BKV_OK;
    }
    bkv_status_t status = bkv_wire_get_room(place, &records->room, err);
    if (status == BKV_OK) {
        status = bkv_call_find_session(records->server, &records->room.session, &records->session, err);
    }
    return status == BKV_OK ? bkv_session_room(records->session, &records->room.place, err) : status;
}

// ---- sending ----

static void on_sent(bkv_worker_t *worker, void *owner, bool ok) {
    (void)worker;
    bkv_call_t *call = owner;
    if (ok) {
        bkv_records_send(call);
        return;
    }
    bkv_error_t error;
    call->broken = true;
    bkv_fail(&error, BKV_CANCELLED, "the client stopped reading");
    bkv_call_fail(call, &error);
}

// Sends a message; the last one together with the status.
static void put_out(bkv_call_t *call, grpc_byte_buffer *message) {
    const bkv_records_t *records = call->body;
    if (records->parcel == NULL && records->index == records->count) {
        call->error = records->first_error;
        bkv_call_finish(call, message);
    } else {
        bkv_call_send(call, message, on_sent);
    }
}

static void init_chunk(const bkv_call_t *call, Balancekv__V1__RecordChunk *chunk) {
    const bkv_records_t *records = call->body;
    balancekv__v1__record_chunk__init(chunk);
    chunk->index = records->index;
    if (records->sent == 0) {
        const bkv_key_t *key = records->fold ? &records->folded.records[records->index].key : &records->keys[records->index];
        chunk->key = (ProtobufCBinaryData){BKV_KEY_BYTES, (uint8_t *)(uintptr_t)key->bytes};
        chunk->boot_epoch = call->server->config.boot_epoch;
    }
}

static void send_chunk(bkv_call_t *call) {
    bkv_records_t *records = call->body;
    bkv_parcel_t *parcel = records->parcel;
    uint64_t left = parcel->delivery.length - records->sent;
    uint64_t length = left <= CHUNK_BYTES + CHUNK_SLACK ? left : CHUNK_BYTES;
    Balancekv__V1__RecordChunk chunk;
    init_chunk(call, &chunk);
    if (records->sent == 0) {
        chunk.record_bytes = parcel->delivery.length;
    }
    grpc_byte_buffer *message;
    if (records->no_data) {
        message = bkv_wire_pack(&chunk.base, NULL);
        length = left;
    } else {
        grpc_slice data = parcel_slice(parcel, records->sent, length);
        message = bkv_wire_pack(&chunk.base, &data);
        atomic_fetch_add(&call->server->bytes_sent_total, length);
    }
    records->sent += length;
    if (length == left) {
        parcel_release(parcel);
        records->parcel = NULL;
        records->sent = 0;
        records->index++;
    }
    put_out(call, message);
}

static void send_missing(bkv_call_t *call, const bkv_error_t *error) {
    bkv_records_t *records = call->body;
    Balancekv__V1__RecordChunk chunk;
    init_chunk(call, &chunk);
    chunk.code = (uint32_t)error->status;
    chunk.message = (char *)(uintptr_t)error->message; // only read
    grpc_byte_buffer *message = bkv_wire_pack(&chunk.base, NULL);
    if (records->first_error.status == BKV_OK) {
        const char *cause = strncmp(error->message, "key: ", 5) == 0 ? error->message + 5 : error->message;
        bkv_fail(&records->first_error, error->status, "keys[%" PRIu32 "]: %.200s", records->index, cause);
    }
    records->index++;
    put_out(call, message);
}

static void drop_parcel(bkv_records_t *records) {
    parcel_release(records->parcel);
    records->parcel = NULL;
}

// ---- to the client's memory ----

static uint64_t aligned(uint64_t bytes) {
    return (bytes + BKV_PLACE_ALIGN - 1) / BKV_PLACE_ALIGN * BKV_PLACE_ALIGN;
}

// The record lies at the room's start.
static void send_placed(bkv_call_t *call) {
    bkv_records_t *records = call->body;
    bkv_place_t *room = &records->room.place;
    uint64_t length = records->parcel->delivery.length;
    Balancekv__V1__RecordChunk chunk;
    init_chunk(call, &chunk);
    chunk.record_bytes = length;
    chunk.placed = true;
    chunk.place_offset = room->offset;
    uint64_t taken = aligned(length) < room->bytes ? aligned(length) : room->bytes;
    room->offset += taken;
    room->bytes -= taken;
    drop_parcel(records);
    records->index++;
    put_out(call, bkv_wire_pack(&chunk.base, NULL));
}

static void on_delivered(void *user, const bkv_error_t *error) {
    bkv_call_t *call = user;
    if (error->status == BKV_OK) {
        send_placed(call);
    } else if (error->status == BKV_DATA_LOSS) {
        drop_parcel(call->body);
        send_missing(call, error);
    } else {
        bkv_call_fail(call, error);
    }
}

// On BKV_OK the call is the transport's until on_delivered, which may have run already.
static bkv_status_t place_parcel(bkv_call_t *call, bkv_error_t *err) {
    bkv_records_t *records = call->body;
    bkv_place_t place = records->room.place;
    place.bytes = records->parcel->delivery.length;
    return bkv_session_deliver(records->session, &place, &records->parcel->delivery, on_delivered, call, err);
}

// ---- a record at a time ----

// The record that is due: of a Fold it is pinned already. With a session to go through, nobody has looked at its bytes.
static bkv_status_t next_delivery(bkv_records_t *records, bkv_delivery_t *delivery, bkv_error_t *err) {
    if (records->fold) {
        *delivery = records->folded.records[records->index].delivery;
        records->folded.records[records->index].delivery = (bkv_delivery_t){0};
        return BKV_OK;
    }
    bkv_pipeline_t *pipeline = records->server->config.pipeline;
    const bkv_key_t *key = &records->keys[records->index];
    return records->session != NULL
               ? bkv_deliver_unverified(pipeline, &records->spec_id, key, &records->range, bkv_now_ms(), delivery, err)
               : bkv_deliver(pipeline, &records->spec_id, key, &records->range, bkv_now_ms(), delivery, err);
}

// Takes the next record up. Whatever it returns, a parcel is there or none.
static bkv_status_t take_parcel(bkv_records_t *records, bkv_error_t *err) {
    bkv_delivery_t delivery;
    bkv_status_t status = next_delivery(records, &delivery, err);
    if (status != BKV_OK) {
        return status;
    }
    records->parcel = parcel_new(records->server, &delivery);
    if (records->parcel == NULL) {
        bkv_delivery_release(records->server->config.pipeline, &delivery);
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "keys: no memory to send a record");
    }
    return BKV_OK;
}

// Whether the record goes to the room. One that finds it full, or the transport busy, goes through messages.
static bkv_status_t try_place(bkv_call_t *call, bool *placed, bkv_error_t *err) {
    bkv_records_t *records = call->body;
    bkv_delivery_t *delivery = &records->parcel->delivery;
    *placed = false;
    if (records->session == NULL || records->no_data) {
        return BKV_OK;
    }
    if (delivery->length <= records->room.place.bytes) {
        bkv_status_t status = place_parcel(call, err);
        if (status != BKV_BUSY) {
            *placed = status == BKV_OK;
            return status;
        }
    }
    return bkv_delivery_verify(records->server->config.pipeline, delivery, err);
}

void bkv_records_send(bkv_call_t *call) {
    bkv_records_t *records = call->body;
    if (records->parcel != NULL) {
        send_chunk(call);
        return;
    }
    if (records->index == records->count) { // only of a request without keys
        bkv_call_finish(call, NULL);
        return;
    }
    bool placed = false;
    bkv_error_t error;
    bkv_status_t status = take_parcel(records, &error);
    if (status == BKV_OK) {
        status = try_place(call, &placed, &error);
    }
    if (placed) {
        return; // the call may have ended already
    }
    if (status == BKV_OK) {
        send_chunk(call);
    } else if (status == BKV_NOT_FOUND || status == BKV_DATA_LOSS) {
        if (records->parcel != NULL) {
            drop_parcel(records);
        }
        send_missing(call, &error);
    } else {
        bkv_call_fail(call, &error);
    }
}
