// records.c - sends records as a stream of chunks. A chunk refers to the record's bytes where they lie in the store, or says
// where in the client's memory a transport has put them.
//
// Chunks go out in order and one at a time, so a slow reader costs a pin on the few records that have been taken up (of a Fold:
// on each that it has not got yet) and what gRPC buffers, until its deadline. Without a transport that is one record.
// gRPC may hold on to a chunk's bytes after the send has completed or failed, even after the call has ended: each chunk
// therefore counts as a holder of its record, which is released by the last of them.
//
// Who may touch what: everything belongs to the sender, the event or callback that is being run; of a record that a transport
// has, error and state belong to its callback, and a window that is being brought from the pool to the cluster. When the sender
// finds what is due still moving, it leaves, and the next callback is the sender. `busy` counts the sender, the records that
// transports have, and such windows; who takes it to 0 ends the call.
#include "daemon/rpc/records.h"

#include "daemon/observe/clock.h"
#include "proto/handover.h"

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
    bkv_name_t name; // where it came from the pool
    bool came;
    _Atomic uint32_t holders; // the call while it sends, and every chunk that gRPC has not let go of
};

// ---- parcels ----

static void parcel_release(void *user) {
    bkv_parcel_t *parcel = user;
    BKV_TAKE_OVER(parcel);
    if (atomic_fetch_sub(&parcel->holders, 1) == 1) {
        bkv_server_t *server = parcel->server;
        bkv_delivery_release(server->config.pipeline, &parcel->delivery);
        if (parcel->came) {
            bkv_cluster_used(server->config.cluster, &parcel->name);
        }
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
    for (uint32_t i = 0; i < BKV_RECORDS_AHEAD; i++) {
        if (records->due[i].parcel != NULL) {
            parcel_release(records->due[i].parcel);
        }
    }
    if (records->session != NULL) {
        bkv_session_release(records->session);
    }
    bkv_fold_release(records->server->config.pipeline, &records->folded);
    bkv_bring_free(records->brought);
    if (records->ahead != NULL) {
        bkv_ahead_deinit(records->ahead);
        free(records->ahead);
    }
    free(records->names);
    free(records);
}

bkv_records_t *bkv_records_new(bkv_call_t *call, uint32_t count) {
    bkv_records_t *records = calloc(1, sizeof(*records) + count * sizeof(records->keys[0]));
    if (records != NULL) {
        records->server = call->server;
        records->count = count;
        atomic_init(&records->busy, 1); // the sender
        call->body = records;
        call->body_free = records_free;
    }
    return records;
}

bkv_records_t *bkv_records_new_names(bkv_call_t *call, const bkv_name_t *names, uint32_t count) {
    bkv_records_t *records = bkv_records_new(call, 0);
    if (records == NULL || (records->names = calloc(count, sizeof(names[0]))) == NULL) {
        return NULL;
    }
    memcpy(records->names, names, count * sizeof(names[0]));
    records->count = count;
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

// ---- the end ----

static void records_release(bkv_call_t *call) {
    bkv_records_t *records = call->body;
    if (atomic_fetch_sub(&records->busy, 1) == 1) {
        call->error = records->error.status != BKV_OK ? records->error : records->first_error;
        bkv_call_finish(call, records->last);
    }
}

// The sender stops; what transports have they bring to an end.
static void stop(bkv_call_t *call, const bkv_error_t *error) {
    bkv_records_t *records = call->body;
    records->error = *error;
    records_release(call);
}

// ---- from the pool ----

static void advance(bkv_call_t *call);

static void on_begins(bkv_call_t *call) {
    bkv_records_t *records = call->body;
    atomic_fetch_add(&records->busy, 1);
}

static void on_arrived(void *user) {
    bkv_call_t *call = user;
    bkv_records_t *records = call->body;
    if (atomic_exchange(&records->waiting, false)) {
        advance(call);
    }
    records_release(call);
}

bkv_status_t bkv_records_reach_out(bkv_call_t *call, bkv_error_t *err) {
    bkv_records_t *records = call->body;
    if (call->server->config.cluster == NULL) {
        return BKV_OK;
    }
    records->ahead = malloc(sizeof(*records->ahead));
    if (records->ahead == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "keys: no memory to look for them");
    }
    bkv_ahead_init(records->ahead, call, &records->spec_id, records->keys, records->count, on_begins, on_arrived);
    return BKV_OK;
}

// ---- taking up ----

static bkv_due_t *due_of(bkv_records_t *records, uint32_t number) {
    return &records->due[number % BKV_RECORDS_AHEAD];
}

// The record, which a Fold has pinned already. With a session to go through, nobody has looked at its bytes.
static bkv_status_t get_delivery(bkv_records_t *records, uint32_t number, bkv_delivery_t *delivery, bkv_error_t *err) {
    if (records->fold) {
        *delivery = records->folded.records[number].delivery;
        records->folded.records[number].delivery = (bkv_delivery_t){0};
        return BKV_OK;
    }
    bkv_pipeline_t *pipeline = records->server->config.pipeline;
    if (records->names != NULL) {
        return bkv_deliver_whole(pipeline, &records->names[number], bkv_now_ms(), delivery, err);
    }
    const bkv_key_t *key = &records->keys[number];
    return records->session != NULL
               ? bkv_deliver_unverified(pipeline, &records->spec_id, key, &records->range, bkv_now_ms(), delivery, err)
               : bkv_deliver(pipeline, &records->spec_id, key, &records->range, bkv_now_ms(), delivery, err);
}

static bkv_status_t get_parcel(bkv_records_t *records, uint32_t number, bkv_parcel_t **parcel, bkv_error_t *err) {
    bkv_delivery_t delivery;
    bkv_status_t status = get_delivery(records, number, &delivery, err);
    if (status != BKV_OK) {
        return status;
    }
    *parcel = parcel_new(records->server, &delivery);
    if (*parcel == NULL) {
        bkv_delivery_release(records->server->config.pipeline, &delivery);
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "keys: no memory to send a record");
    }
    return BKV_OK;
}

// It is not here, or not as it should be.
static bool is_gone(bkv_status_t status) {
    return status == BKV_NOT_FOUND || status == BKV_DATA_LOSS;
}

// Of one key; the others are delivered all the same.
static bool is_missing(const bkv_records_t *records, bkv_status_t status) {
    bool in_pool = status == BKV_BUSY || status == BKV_DEADLINE_EXCEEDED || status == BKV_RESOURCE_EXHAUSTED;
    return is_gone(status) || (records->ahead != NULL && in_pool);
}

static void due_fail(bkv_records_t *records, bkv_due_t *due, const bkv_error_t *error) {
    due->error = *error;
    atomic_store(&due->state, BKV_DUE_FAILED);
    records->closed = !is_missing(records, error->status);
}

static void on_delivered(void *user, const bkv_error_t *error) {
    bkv_due_t *due = user;
    bkv_call_t *call = due->call;
    bkv_records_t *records = call->body;
    if (error->status != BKV_OK) {
        due->error = *error;
    }
    atomic_store(&due->state, error->status == BKV_OK ? BKV_DUE_PLACED : BKV_DUE_FAILED);
    if (atomic_exchange(&records->waiting, false)) {
        advance(call);
    }
    records_release(call);
}

static uint64_t aligned(uint64_t bytes) {
    return (bytes + BKV_PLACE_ALIGN - 1) / BKV_PLACE_ALIGN * BKV_PLACE_ALIGN;
}

// Gives a record that fits to the transport. One that finds it busy goes through messages.
static void place(bkv_records_t *records, bkv_due_t *due) {
    bkv_place_t *room = &records->room.place, place = *room;
    const bkv_delivery_t *delivery = &due->parcel->delivery;
    bkv_error_t error;
    place.bytes = delivery->length;
    due->offset = place.offset;
    atomic_store(&due->state, BKV_DUE_MOVING);
    atomic_fetch_add(&records->busy, 1); // before the callback can come
    bkv_status_t status = bkv_session_deliver(records->session, &place, delivery, on_delivered, due, &error);
    if (status == BKV_OK) {
        uint64_t taken = aligned(place.bytes) < room->bytes ? aligned(place.bytes) : room->bytes;
        room->offset += taken;
        room->bytes -= taken;
        return;
    }
    atomic_fetch_sub(&records->busy, 1); // the sender still counts: not the last one
    if (status == BKV_BUSY) {
        atomic_store(&due->state, BKV_DUE_INLINE);
    } else {
        due_fail(records, due, &error);
    }
}

// The next record, which may have to be brought here first. *later: not yet, as it is on its way, or those before it are in its.
static bkv_status_t reach_next(bkv_records_t *records, bkv_parcel_t **parcel, bool *later, bkv_error_t *err) {
    bkv_ahead_t *ahead = records->ahead;
    const uint32_t number = records->next;
    bkv_reach_t reach;
    bkv_status_t status;
    do {
        reach = bkv_ahead_reach(ahead, number, err);
        status = reach == BKV_REACH_HERE ? get_parcel(records, number, parcel, err) : err->status;
        *later = reach == BKV_REACH_COMING || (reach == BKV_REACH_NO_ROOM && number > records->index);
    } while (!*later && (reach == BKV_REACH_NO_ROOM || (reach == BKV_REACH_HERE && is_gone(status))) &&
             bkv_ahead_retry(ahead, number));
    bool busy = status == BKV_BUSY && number > records->index;
    if (*later || busy || ahead->now == NULL) {
        return status;
    }
    bool came = bkv_ahead_taken(ahead, number);
    if (status == BKV_OK) {
        (*parcel)->came = came;
        (*parcel)->name = (bkv_name_t){.spec_id = records->spec_id, .key = records->keys[number]};
    }
    return status;
}

// Takes the next record up. False: not yet, as it is not here, or those before it are in its way.
static bool take_next(bkv_call_t *call) {
    bkv_records_t *records = call->body;
    bkv_due_t *due = due_of(records, records->next);
    bkv_error_t error = {.status = BKV_OK};
    bool later = false;
    due->call = call;
    atomic_store(&due->state, BKV_DUE_INLINE);
    bkv_status_t status = records->ahead != NULL ? reach_next(records, &due->parcel, &later, &error)
                                                 : get_parcel(records, records->next, &due->parcel, &error);
    if (later || (status == BKV_BUSY && records->next > records->index)) {
        return false;
    }
    if (status != BKV_OK) {
        due_fail(records, due, &error);
    } else if (records->session != NULL && !records->no_data && due->parcel->delivery.length <= records->room.place.bytes) {
        place(records, due);
    }
    records->next++;
    return true;
}

static void take_up(bkv_call_t *call) {
    bkv_records_t *records = call->body;
    const uint32_t ahead = records->session != NULL ? BKV_RECORDS_AHEAD : 1;
    while (!records->closed && records->next < records->count && records->next - records->index < ahead) {
        if (!take_next(call)) {
            return;
        }
    }
}

// ---- sending ----

static void on_sent(bkv_worker_t *worker, void *owner, bool ok) {
    (void)worker;
    bkv_call_t *call = owner;
    if (ok) {
        advance(call);
        return;
    }
    bkv_error_t error;
    call->broken = true;
    bkv_fail(&error, BKV_CANCELLED, "the client stopped reading");
    stop(call, &error);
}

static const bkv_key_t *key_of(const bkv_records_t *records, uint32_t number) {
    return records->fold            ? &records->folded.records[number].key
           : records->names != NULL ? &records->names[number].key
                                    : &records->keys[number];
}

static void init_chunk(const bkv_call_t *call, Balancekv__V1__RecordChunk *chunk) {
    const bkv_records_t *records = call->body;
    balancekv__v1__record_chunk__init(chunk);
    chunk->index = records->index;
    if (records->sent == 0) {
        const bkv_key_t *key = key_of(records, records->index);
        chunk->key = (ProtobufCBinaryData){BKV_KEY_BYTES, (uint8_t *)(uintptr_t)key->bytes};
        chunk->boot_epoch = call->server->config.boot_epoch;
    }
}

// Whether the next message is ready too, and as small.
static bool next_is_placed(bkv_records_t *records) {
    return records->next > records->index && atomic_load(&due_of(records, records->index)->state) == BKV_DUE_PLACED;
}

// What put_out is given.
typedef enum message_kind {
    PART, // of a record, with more to come
    LAST, // of a record
    WHOLE // record that has no bytes here, in a small message
} message_kind_t;

// Sends a message. The call's last goes together with the status; small ones before it go together.
static void put_out(bkv_call_t *call, grpc_byte_buffer *message, message_kind_t kind) {
    bkv_records_t *records = call->body;
    if (kind != PART) {
        bkv_due_t *due = due_of(records, records->index);
        if (due->parcel != NULL) {
            parcel_release(due->parcel);
            due->parcel = NULL;
        }
        records->sent = 0;
        records->index++;
    }
    if (records->index == records->count) {
        records->last = message;
        records_release(call);
    } else if (kind == WHOLE && next_is_placed(records)) {
        bkv_call_send_with_next(call, message, on_sent);
    } else {
        bkv_call_send(call, message, on_sent);
    }
}

static void send_chunk(bkv_call_t *call, bkv_due_t *due) {
    bkv_records_t *records = call->body;
    uint64_t left = due->parcel->delivery.length - records->sent;
    uint64_t length = left <= CHUNK_BYTES + CHUNK_SLACK ? left : CHUNK_BYTES;
    Balancekv__V1__RecordChunk chunk;
    init_chunk(call, &chunk);
    if (records->sent == 0) {
        chunk.record_bytes = due->parcel->delivery.length;
        chunk.ttl_ms = due->parcel->delivery.ttl_ms;
    }
    grpc_byte_buffer *message;
    if (records->no_data) {
        message = bkv_wire_pack(&chunk.base, NULL);
        length = left;
    } else {
        grpc_slice data = parcel_slice(due->parcel, records->sent, length);
        message = bkv_wire_pack(&chunk.base, &data);
        atomic_fetch_add(&call->server->bytes_sent_total, length);
    }
    records->sent += length;
    put_out(call, message, length == left ? LAST : PART);
}

static void send_placed(bkv_call_t *call, const bkv_due_t *due) {
    Balancekv__V1__RecordChunk chunk;
    init_chunk(call, &chunk);
    chunk.record_bytes = due->parcel->delivery.length;
    chunk.ttl_ms = due->parcel->delivery.ttl_ms;
    chunk.placed = true;
    chunk.place_offset = due->offset;
    put_out(call, bkv_wire_pack(&chunk.base, NULL), WHOLE);
}

static void send_missing(bkv_call_t *call, const bkv_error_t *error) {
    bkv_records_t *records = call->body;
    Balancekv__V1__RecordChunk chunk;
    init_chunk(call, &chunk);
    chunk.code = (uint32_t)error->status;
    chunk.message = (char *)(uintptr_t)error->message; // only read
    grpc_byte_buffer *message = bkv_wire_pack(&chunk.base, NULL);
    if (records->first_error.status == BKV_OK && records->names == NULL) {
        const char *cause = strncmp(error->message, "key: ", 5) == 0 ? error->message + 5 : error->message;
        bkv_fail(&records->first_error, error->status, "keys[%" PRIu32 "]: %.200s", records->index, cause);
    }
    put_out(call, message, LAST);
}

// The record that is due, or its next chunk. One that a transport did not take has not been verified yet.
static void send_due(bkv_call_t *call, bkv_due_t *due) {
    bkv_records_t *records = call->body;
    bkv_due_state_t state = atomic_load(&due->state);
    if (state == BKV_DUE_INLINE && records->session != NULL && !records->no_data && records->sent == 0 &&
        bkv_delivery_verify(records->server->config.pipeline, &due->parcel->delivery, &due->error) != BKV_OK) {
        state = BKV_DUE_FAILED;
    }
    if (state == BKV_DUE_INLINE) {
        send_chunk(call, due);
    } else if (state == BKV_DUE_PLACED) {
        send_placed(call, due);
    } else if (is_missing(records, due->error.status)) {
        send_missing(call, &due->error);
    } else {
        stop(call, &due->error);
    }
}

static uint32_t arrivals(const bkv_records_t *records) {
    return records->ahead != NULL ? atomic_load(&records->ahead->arrivals) : 0;
}

// Whether what the sender needs has yet to come: the record to the client's memory or, where none could be taken up, a window of
// records to this daemon, of which so many had come before.
static bool is_under_way(const bkv_records_t *records, const bkv_due_t *due, uint32_t had_come) {
    return due != NULL ? atomic_load(&due->state) == BKV_DUE_MOVING : arrivals(records) == had_come;
}

// Takes up what can be, until the record that is due has come as far as it can. False: somebody else is the sender now.
static bool come_to_due(bkv_call_t *call) {
    bkv_records_t *records = call->body;
    for (;;) {
        uint32_t had_come = arrivals(records);
        take_up(call);
        const bkv_due_t *due = records->next > records->index ? due_of(records, records->index) : NULL;
        if (is_under_way(records, due, had_come)) {
            atomic_store(&records->waiting, true);
            if (is_under_way(records, due, had_come)) {
                return false; // the callback that comes next sees `waiting`
            }
            if (!atomic_exchange(&records->waiting, false)) {
                return false; // a callback has seen it
            }
        } else if (due != NULL) {
            return true;
        }
    }
}

// The sender: starts what can be started, then sends what is due. It counts twice, as another one may follow it, and end the
// call, while it is still here.
static void advance(bkv_call_t *call) {
    bkv_records_t *records = call->body;
    atomic_fetch_add(&records->busy, 1);
    if (records->count == 0) { // a request without keys
        records_release(call);
    } else if (come_to_due(call)) {
        send_due(call, due_of(records, records->index));
    }
    records_release(call);
}

void bkv_records_send(bkv_call_t *call) {
    advance(call);
}
