// attend.c - Attend: queries in, attention over resident records on a compute thread, partial output and log-sum-exp out.
//
// The queries are copied out of the message once, into aligned memory; the output goes out from where it was computed. In a
// cluster, records that are not here are brought first, and stay pinned until the output is there.
#include "daemon/observe/clock.h"
#include "daemon/rpc/bring.h"
#include "daemon/rpc/keyed.h"

#include <stdlib.h>
#include <string.h>

#define ALIGNMENT 64

typedef struct attend {
    float *q, *out, *lse;
    uint64_t out_bytes, lse_bytes;
    bkv_attend_args_t args;
    bkv_spec_id_t spec_id;
    bkv_bring_t *bring; // NULL: without a cluster
    uint32_t count;
    bkv_key_t keys[]; // [count], in a cluster
} attend_t;

static void attend_free(void *body) {
    attend_t *attend = body;
    bkv_bring_free(attend->bring);
    free(attend->q);
    free(attend->out);
    free(attend->lse);
    free(attend);
}

static float *take_floats(uint64_t bytes) {
    uint64_t rounded = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return aligned_alloc(ALIGNMENT, rounded == 0 ? ALIGNMENT : rounded);
}

// a * b, or UINT64_MAX when that overflows.
static uint64_t product(uint64_t a, uint64_t b) {
    uint64_t result;
    return __builtin_mul_overflow(a, b, &result) ? UINT64_MAX : result;
}

// Sizes from a request that nobody has checked yet; the pipeline checks what the numbers mean.
static bkv_status_t check_sizes(const bkv_call_t *call, const Balancekv__V1__AttendRequest *request, const bkv_model_t *model,
                                uint64_t q_bytes, attend_t *attend, bkv_error_t *err) {
    if (request->first_layer >= model->shape.layers) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "first_layer: %u is not below %u", request->first_layer,
                        model->shape.layers);
    }
    uint64_t layers = request->layers == 0 ? model->shape.layers - request->first_layer : request->layers;
    uint64_t rows = product(product(layers, request->query_heads), request->queries);
    uint64_t expected = product(rows, model->shape.key_dim * sizeof(float));
    if (q_bytes != expected) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "q: %llu bytes, but layers, query_heads, queries and key_dim make %llu",
                        (unsigned long long)q_bytes, (unsigned long long)expected);
    }
    attend->lse_bytes = product(rows, sizeof(float)); // no overflow: rows come from a message that has arrived
    attend->out_bytes = product(rows, model->shape.value_dim * sizeof(float));
    if (attend->out_bytes > call->server->config.max_message) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "queries: %llu bytes of output are more than max_message %llu",
                        (unsigned long long)attend->out_bytes, (unsigned long long)call->server->config.max_message);
    }
    return BKV_OK;
}

static bkv_status_t take_memory(attend_t *attend, bkv_split_t *split, bkv_error_t *err) {
    attend->q = take_floats(split->data_bytes);
    attend->out = take_floats(attend->out_bytes);
    attend->lse = take_floats(attend->lse_bytes);
    if (attend->q == NULL || attend->out == NULL || attend->lse == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "queries: no memory for them and their output");
    }
    bkv_cursor_copy(&split->data, attend->q, split->data_bytes);
    return BKV_OK;
}

// The output leaves with its message: gRPC frees it once sent.
static void reply_attend(bkv_call_t *call) {
    attend_t *attend = call->body;
    Balancekv__V1__AttendResponse reply = BALANCEKV__V1__ATTEND_RESPONSE__INIT;
    reply.lse = (ProtobufCBinaryData){attend->lse_bytes, (uint8_t *)attend->lse};
    reply.boot_epoch = call->server->config.boot_epoch;
    grpc_slice output = grpc_slice_new(attend->out, attend->out_bytes, free);
    attend->out = NULL;
    atomic_fetch_add(&call->server->bytes_sent_total, attend->out_bytes);
    bkv_call_finish(call, bkv_wire_pack(&reply.base, &output));
}

static void on_attended(void *user, const bkv_error_t *error) {
    bkv_call_t *call = user;
    attend_t *attend = call->body;
    if (attend->bring != NULL) {
        bkv_bring_used(attend->bring);
    }
    if (error->status != BKV_OK) {
        bkv_call_fail(call, error);
    } else {
        reply_attend(call);
    }
}

static bkv_status_t attend_now(bkv_call_t *call, const bkv_key_t *keys, uint32_t count, bkv_error_t *err) {
    const attend_t *attend = call->body;
    return bkv_attend_start(call->server->config.pipeline, &attend->spec_id, keys, count, &attend->args, bkv_now_ms(),
                            on_attended, call, err);
}

// On a thread of the cluster's or the handler's: the records are here, or cannot be had.
static void on_brought(void *user) {
    bkv_call_t *call = user;
    const attend_t *attend = call->body;
    bkv_error_t error;
    bkv_status_t status = bkv_bring_result(attend->bring, &error);
    if (status == BKV_OK) {
        status = attend_now(call, attend->keys, attend->count, &error);
    }
    if (status != BKV_OK) {
        bkv_call_fail(call, &error);
    } // else on_attended may have ended the call already
}

static bkv_status_t bring(bkv_call_t *call, const bkv_keyed_t *keyed, bkv_error_t *err) {
    attend_t *attend = call->body;
    memcpy(attend->keys, keyed->keys, keyed->count * sizeof(attend->keys[0]));
    attend->count = keyed->count;
    attend->bring = bkv_bring_new(call->server, &keyed->spec_id, keyed->keys, keyed->count);
    if (attend->bring == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "keys: no memory for them");
    }
    if (bkv_bring_start(attend->bring, call->deadline_ms, on_brought, call)) {
        on_brought(call);
    }
    return BKV_OK;
}

static bkv_status_t attend_start(bkv_call_t *call, bkv_bump_t *bump, const Balancekv__V1__AttendRequest *request,
                                 bkv_split_t *split, bkv_error_t *err) {
    bkv_keyed_t keyed;
    bkv_status_t status = bkv_keyed_get(call, bump, &request->spec_id, request->n_keys, request->keys, &keyed, err);
    if (status == BKV_OK) {
        status = bkv_keyed_need(&keyed, err);
    }
    if (status != BKV_OK) {
        return status;
    }
    bool alone = call->server->config.cluster == NULL;
    attend_t *attend = calloc(1, sizeof(*attend) + (alone ? 0 : keyed.count) * sizeof(attend->keys[0]));
    if (attend == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "queries: no memory for them");
    }
    call->body = attend;
    call->body_free = attend_free;
    status = check_sizes(call, request, keyed.model, split->data_bytes, attend, err);
    if (status == BKV_OK) {
        status = take_memory(attend, split, err);
    }
    bkv_call_drop_message(call); // its head lives on in the bump, its data in attend->q
    if (status != BKV_OK) {
        return status;
    }
    attend->spec_id = keyed.spec_id;
    attend->args = (bkv_attend_args_t){
        .first_layer = request->first_layer,
        .layers = request->layers,
        .query_heads = request->query_heads,
        .queries = request->queries,
        .scale = request->scale,
        .q = attend->q,
        .out = attend->out,
        .lse = attend->lse,
    };
    return alone ? attend_now(call, keyed.keys, keyed.count, err) : bring(call, &keyed, err);
}

void bkv_handle_attend(bkv_call_t *call, bkv_bump_t *bump) {
    bkv_error_t error;
    bkv_split_t split;
    bkv_status_t status = bkv_wire_split(&balancekv__v1__attend_request__descriptor, call->message,
                                         bkv_server_request_most(call->server), bump, &split, &error);
    if (status == BKV_OK) {
        atomic_fetch_add(&call->server->bytes_received_total, split.data_bytes);
        status = attend_start(call, bump, (const Balancekv__V1__AttendRequest *)split.head, &split, &error);
    }
    if (status != BKV_OK) {
        bkv_call_fail(call, &error);
    } // else on_attended may have ended the call already
}
