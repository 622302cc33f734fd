// get.c - Get and Fold: records out, as a stream of chunks that refer to the record's bytes where they lie in the store.
//
// One chunk is on its way at a time, so a slow reader costs a pin on one record (of a Fold: on each that it has not got yet) and
// what gRPC buffers, until its deadline.
// gRPC may hold on to a chunk's bytes after the send has completed or failed, even after the call has ended: each chunk
// therefore counts as a holder of its record, which is released by the last of them.
#include "daemon/observe/clock.h"
#include "daemon/rpc/call.h"
#include "daemon/rpc/handover.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

// A chunk fits the 4 MiB that gRPC clients take by default, with ease. A record a little over a whole number of chunks does
// not get a tiny last one.
#define CHUNK_BYTES ((uint64_t)1 << 20)
#define CHUNK_SLACK ((uint64_t)64 << 10)

// A record on its way out.
typedef struct parcel {
    bkv_server_t *server;
    bkv_delivery_t delivery;
    _Atomic uint32_t holders; // the call while it sends, and every chunk that gRPC has not let go of
} parcel_t;

typedef struct get {
    bkv_server_t *server;
    bkv_spec_id_t spec_id;
    bkv_deliver_range_t range;
    bkv_fold_result_t folded; // Fold: the records; those sent are empty
    parcel_t *parcel;         // the record being sent; NULL between two
    uint64_t sent;            // of its bytes
    bool fold, no_data;       // no_data: only say what there is
    uint32_t index, count;
    bkv_error_t first_error; // of the first key that could not be delivered
    bkv_key_t keys[];
} get_t;

// ---- parcels ----

static void parcel_release(void *user) {
    parcel_t *parcel = user;
    BKV_TAKE_OVER(parcel);
    if (atomic_fetch_sub(&parcel->holders, 1) == 1) {
        bkv_server_t *server = parcel->server;
        bkv_delivery_release(server->config.pipeline, &parcel->delivery);
        free(parcel);
        bkv_server_release(server);
    }
}

// Takes the delivery over; NULL without memory, and then it is still the caller's.
static parcel_t *parcel_new(bkv_server_t *server, const bkv_delivery_t *delivery) {
    parcel_t *parcel = malloc(sizeof(*parcel));
    if (parcel != NULL) {
        *parcel = (parcel_t){.server = server, .delivery = *delivery, .holders = 1};
        bkv_server_hold(server);
    }
    return parcel;
}

static grpc_slice parcel_slice(parcel_t *parcel, uint64_t offset, uint64_t length) {
    atomic_fetch_add(&parcel->holders, 1);
    BKV_HAND_OVER(parcel);
    void *bytes = (void *)(uintptr_t)(parcel->delivery.data + offset); // gRPC only reads it
    return grpc_slice_new_with_user_data(bytes, length, parcel_release, parcel);
}

static void get_free(void *body) {
    get_t *get = body;
    if (get->parcel != NULL) {
        parcel_release(get->parcel);
    }
    bkv_fold_release(get->server->config.pipeline, &get->folded);
    free(get);
}

static get_t *get_new(bkv_call_t *call, uint32_t count) {
    get_t *get = calloc(1, sizeof(*get) + count * sizeof(get->keys[0]));
    if (get != NULL) {
        get->server = call->server;
        get->count = count;
        call->body = get;
        call->body_free = get_free;
    }
    return get;
}

// ---- sending ----

static void get_step(bkv_call_t *call);

static void on_sent(bkv_worker_t *worker, void *owner, bool ok) {
    (void)worker;
    bkv_call_t *call = owner;
    if (ok) {
        get_step(call);
        return;
    }
    bkv_error_t error;
    call->broken = true;
    bkv_fail(&error, BKV_CANCELLED, "the client stopped reading");
    bkv_call_fail(call, &error);
}

// Sends a message; the last one together with the status.
static void put_out(bkv_call_t *call, grpc_byte_buffer *message) {
    const get_t *get = call->body;
    if (get->parcel == NULL && get->index == get->count) {
        call->error = get->first_error;
        bkv_call_finish(call, message);
    } else {
        bkv_call_send(call, message, on_sent);
    }
}

static void init_chunk(const bkv_call_t *call, Balancekv__V1__RecordChunk *chunk) {
    const get_t *get = call->body;
    balancekv__v1__record_chunk__init(chunk);
    chunk->index = get->index;
    if (get->sent == 0) {
        const bkv_key_t *key = get->fold ? &get->folded.records[get->index].key : &get->keys[get->index];
        chunk->key = (ProtobufCBinaryData){BKV_KEY_BYTES, (uint8_t *)(uintptr_t)key->bytes};
        chunk->boot_epoch = call->server->config.boot_epoch;
    }
}

static void send_chunk(bkv_call_t *call) {
    get_t *get = call->body;
    parcel_t *parcel = get->parcel;
    uint64_t left = parcel->delivery.length - get->sent;
    uint64_t length = left <= CHUNK_BYTES + CHUNK_SLACK ? left : CHUNK_BYTES;
    Balancekv__V1__RecordChunk chunk;
    init_chunk(call, &chunk);
    if (get->sent == 0) {
        chunk.record_bytes = parcel->delivery.length;
    }
    grpc_byte_buffer *message;
    if (get->no_data) {
        message = bkv_wire_pack(&chunk.base, NULL);
        length = left;
    } else {
        grpc_slice data = parcel_slice(parcel, get->sent, length);
        message = bkv_wire_pack(&chunk.base, &data);
        atomic_fetch_add(&call->server->bytes_sent_total, length);
    }
    get->sent += length;
    if (length == left) {
        parcel_release(parcel);
        get->parcel = NULL;
        get->sent = 0;
        get->index++;
    }
    put_out(call, message);
}

static void send_missing(bkv_call_t *call, bkv_error_t *error) {
    get_t *get = call->body;
    Balancekv__V1__RecordChunk chunk;
    init_chunk(call, &chunk);
    chunk.code = (uint32_t)error->status;
    chunk.message = error->message;
    grpc_byte_buffer *message = bkv_wire_pack(&chunk.base, NULL);
    if (get->first_error.status == BKV_OK) {
        const char *cause = strncmp(error->message, "key: ", 5) == 0 ? error->message + 5 : error->message;
        bkv_fail(&get->first_error, error->status, "keys[%" PRIu32 "]: %.200s", get->index, cause);
    }
    get->index++;
    put_out(call, message);
}

// The record that is due: of a Fold it is pinned already.
static bkv_status_t next_delivery(get_t *get, bkv_delivery_t *delivery, bkv_error_t *err) {
    if (get->fold) {
        *delivery = get->folded.records[get->index].delivery;
        get->folded.records[get->index].delivery = (bkv_delivery_t){0};
        return BKV_OK;
    }
    return bkv_deliver(get->server->config.pipeline, &get->spec_id, &get->keys[get->index], &get->range, bkv_now_ms(), delivery,
                       err);
}

// The next chunk, or the next record's first.
static void get_step(bkv_call_t *call) {
    get_t *get = call->body;
    if (get->parcel != NULL) {
        send_chunk(call);
        return;
    }
    if (get->index == get->count) { // only of a request without keys
        bkv_call_finish(call, NULL);
        return;
    }
    bkv_pipeline_t *pipeline = call->server->config.pipeline;
    bkv_delivery_t delivery;
    bkv_error_t error;
    bkv_status_t status = next_delivery(get, &delivery, &error);
    if (status == BKV_NOT_FOUND || status == BKV_DATA_LOSS) {
        send_missing(call, &error);
        return;
    }
    if (status == BKV_OK) {
        get->parcel = parcel_new(call->server, &delivery);
        if (get->parcel == NULL) {
            bkv_delivery_release(pipeline, &delivery);
            status = bkv_fail(&error, BKV_RESOURCE_EXHAUSTED, "keys: no memory to send a record");
        }
    }
    if (status == BKV_OK) {
        send_chunk(call);
    } else {
        bkv_call_fail(call, &error);
    }
}

// ---- Get ----

static bkv_status_t get_begin(bkv_call_t *call, const Balancekv__V1__GetRequest *request, bkv_error_t *err) {
    const bkv_server_config_t *config = &call->server->config;
    bkv_spec_id_t spec_id;
    bkv_status_t status = bkv_wire_get_spec_id(&request->spec_id, &spec_id, err);
    if (status == BKV_OK) {
        status = bkv_wire_check_keys(request->n_keys, request->keys, config->max_batch, err);
    }
    if (status == BKV_OK) {
        status = bkv_model_table_require(bkv_pipeline_models(config->pipeline), &spec_id, NULL, err);
    }
    if (status != BKV_OK) {
        return status;
    }
    get_t *get = get_new(call, (uint32_t)request->n_keys);
    if (get == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "keys: no memory for them");
    }
    get->spec_id = spec_id;
    get->range = (bkv_deliver_range_t){.first_layer = request->first_layer,
                                       .layers = request->layers,
                                       .first_head = request->first_head,
                                       .heads = request->heads};
    bkv_wire_get_keys(request->n_keys, request->keys, get->keys);
    return BKV_OK;
}

void bkv_handle_get(bkv_call_t *call, bkv_bump_t *bump) {
    const Balancekv__V1__GetRequest *request =
        (const Balancekv__V1__GetRequest *)bkv_call_request(call, &balancekv__v1__get_request__descriptor, bump);
    if (request == NULL) {
        return;
    }
    bkv_error_t error;
    if (get_begin(call, request, &error) != BKV_OK) {
        bkv_call_fail(call, &error);
    } else {
        get_step(call);
    }
}

// ---- Fold ----

// On a compute thread: hands the records over to the sending above.
static void on_folded(void *user, const bkv_error_t *error, bkv_fold_result_t *result) {
    bkv_call_t *call = user;
    if (error->status != BKV_OK) {
        bkv_call_fail(call, error);
        return;
    }
    get_t *get = call->body;
    get->folded = *result;
    get->count = result->count;
    get_step(call);
}

static bkv_status_t fold_begin(bkv_call_t *call, bkv_bump_t *bump, const Balancekv__V1__FoldRequest *request,
                               bkv_error_t *err) {
    const bkv_server_config_t *config = &call->server->config;
    bkv_fold_args_t args = {.budget = request->budget_bytes, .rate = request->rate, .ttl_ms = request->ttl_ms};
    bkv_status_t status = bkv_wire_get_spec_id(&request->spec_id, &args.spec_id, err);
    if (status == BKV_OK) {
        status = bkv_wire_check_keys(request->n_keys, request->keys, config->max_batch, err);
    }
    if (status == BKV_OK && request->n_keys == 0) {
        status = bkv_fail(err, BKV_INVALID_ARGUMENT, "keys: none given");
    }
    if (status == BKV_OK) {
        status = bkv_wire_get_profile(request->n_profile, request->profile, &args.profile, err);
    }
    if (status != BKV_OK) {
        return status;
    }
    get_t *get = get_new(call, 0);
    bkv_key_t *keys = bkv_bump_alloc(bump, request->n_keys * sizeof(keys[0]));
    if (get == NULL || keys == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "keys: no memory for them");
    }
    get->fold = true;
    get->no_data = request->no_data;
    bkv_wire_get_keys(request->n_keys, request->keys, keys);
    args.keys = keys;
    args.count = (uint32_t)request->n_keys;
    return bkv_fold_start(config->pipeline, &args, on_folded, call, err);
}

void bkv_handle_fold(bkv_call_t *call, bkv_bump_t *bump) {
    const Balancekv__V1__FoldRequest *request =
        (const Balancekv__V1__FoldRequest *)bkv_call_request(call, &balancekv__v1__fold_request__descriptor, bump);
    if (request == NULL) {
        return;
    }
    bkv_error_t error;
    if (fold_begin(call, bump, request, &error) != BKV_OK) {
        bkv_call_fail(call, &error);
    } // else on_folded may have ended the call already
}
