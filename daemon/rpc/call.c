// call.c - the life of a call: armed, accepted, read, answered, cleaned up. What is answered is the handlers' business.
#include "daemon/rpc/call.h"

#include "daemon/observe/clock.h"
#include "daemon/observe/log.h"
#include "daemon/rpc/status.h"
#include "proto/answer.h"
#include "proto/handover.h"

#include <assert.h>
#include <grpc/support/alloc.h>
#include <grpc/support/time.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// Health and Stats are still answered beyond max_calls, so that an overloaded daemon can be told from a dead one; but not
// without bound either.
#define RESERVED_CALLS 64

static const struct {
    const char *name; // as in log lines
    void (*handler)(bkv_call_t *call, bkv_bump_t *bump);
    bool client_stream, always;
} methods[BKV_METHOD_COUNT] = {
#define X(id, path, handler, client_stream, always) {path, handler, client_stream, always},
    BKV_METHODS(X)
#undef X
};

static const char *method_name(const bkv_call_t *call) {
    return call->method < BKV_METHOD_COUNT ? strrchr(methods[call->method].name, '/') + 1 : "unknown method";
}

void bkv_call_batch(bkv_call_t *call, const grpc_op *ops, size_t count, bkv_tag_t *tag) {
    BKV_HAND_OVER(tag);
    grpc_call_error error = grpc_call_start_batch(call->grpc, ops, count, tag, NULL);
    if (error != GRPC_CALL_OK) { // only a mistake of ours can cause it, and the call could never end
        bkv_log(BKV_LOG_ERROR, call->id, "%s: gRPC refused a batch: %s", method_name(call), grpc_call_error_to_string(error));
        abort();
    }
}

static void advance(bkv_call_t *call, bkv_call_state_t state) {
    assert(state > call->state);
    call->state = state;
}

// ---- the clean-up ----

void bkv_call_drop_message(bkv_call_t *call) {
    if (call->message != NULL) {
        grpc_byte_buffer_destroy(call->message);
        call->message = NULL;
    }
}

static void call_free(bkv_call_t *call) {
    bkv_server_t *server = call->server;
    if (call->body_free != NULL) {
        call->body_free(call->body);
    }
    bkv_call_drop_message(call);
    if (call->reply != NULL) {
        grpc_byte_buffer_destroy(call->reply);
    }
    grpc_metadata_array_destroy(&call->metadata);
    if (call->method == BKV_METHOD_COUNT) {
        grpc_call_details_destroy(&call->details);
    }
    if (call->grpc != NULL) {
        grpc_call_unref(call->grpc);
    }
    gpr_free(call);
    bkv_server_release(server);
}

static void link_call(bkv_call_t *call) {
    bkv_server_t *server = call->server;
    pthread_mutex_lock(&server->lock);
    call->older = server->calls;
    if (server->calls != NULL) {
        server->calls->newer = call;
    }
    server->calls = call;
    pthread_mutex_unlock(&server->lock);
}

static void unlink_call(bkv_call_t *call) {
    bkv_server_t *server = call->server;
    pthread_mutex_lock(&server->lock);
    if (call->newer != NULL) {
        call->newer->older = call->older;
    } else {
        server->calls = call->older;
    }
    if (call->older != NULL) {
        call->older->newer = call->newer;
    }
    pthread_mutex_unlock(&server->lock);
}

// A client whose deadline passes says so by cancelling, a moment before the daemon's own clock gets there: the daemon counts
// from the call's arrival, and gRPC rounds timeouts up on their way.
static bool out_of_time(const bkv_call_t *call) {
    uint64_t allowance_ms = 50 + (call->deadline_ms - call->accepted_ms) / 64;
    return atomic_load(&call->expired) || (call->deadline_ms != UINT64_MAX && bkv_now_ms() + allowance_ms >= call->deadline_ms);
}

// What to report of a call: where its peer went away, that matters and not what it led to.
static void conclude(bkv_call_t *call) {
    bool own = call->error.status != BKV_OK && !call->broken;
    if (call->cancelled && !own) {
        if (out_of_time(call)) {
            bkv_fail(&call->error, BKV_DEADLINE_EXCEEDED, "deadline: the call had not ended when it passed");
        } else {
            bkv_fail(&call->error, BKV_CANCELLED, "the client cancelled the call or its connection broke");
        }
    }
}

void bkv_call_end(bkv_call_t *call) {
    bkv_server_t *server = call->server;
    unlink_call(call);
    conclude(call);
    if (call->cancelled) {
        atomic_fetch_add(&server->calls_cancelled_total, 1);
    }
    if (call->error.status != BKV_OK) {
        atomic_fetch_add(&server->calls_failed_total, 1);
        bkv_log_failure(call->id, method_name(call), &call->error);
    }
    atomic_fetch_sub(&server->accepted, 1);
    atomic_fetch_sub(&server->open, call->counted);
    call_free(call);
}

static void on_finished(bkv_worker_t *worker, void *owner, bool ok) {
    (void)worker;
    (void)ok; // a status that could not be sent shows in `cancelled`
    bkv_call_end(owner);
}

// ---- answering ----

static size_t add_start(bkv_call_t *call, grpc_op *ops) {
    if (call->started) {
        return 0;
    }
    call->started = true;
    ops[0] = (grpc_op){.op = GRPC_OP_SEND_INITIAL_METADATA};
    return 1;
}

static size_t add_message(bkv_call_t *call, grpc_byte_buffer *message, grpc_op *ops) {
    if (call->reply != NULL) {
        grpc_byte_buffer_destroy(call->reply);
    }
    call->reply = message;
    if (message == NULL) {
        return 0;
    }
    ops[0] = (grpc_op){.op = GRPC_OP_SEND_MESSAGE, .data.send_message.send_message = message};
    return 1;
}

static void send_message(bkv_call_t *call, grpc_byte_buffer *message, uint32_t flags, bkv_step_t then) {
    grpc_op ops[2];
    size_t count = add_start(call, ops), opening = count;
    count += add_message(call, message, ops + count);
    ops[count - 1].flags = opening == 0 ? flags : 0; // gRPC waits for ever for a flush of opening metadata held back
    call->tag = (bkv_tag_t){then, call};
    bkv_call_batch(call, ops, count, &call->tag);
}

void bkv_call_send(bkv_call_t *call, grpc_byte_buffer *message, bkv_step_t then) {
    send_message(call, message, 0, then);
}

void bkv_call_send_with_next(bkv_call_t *call, grpc_byte_buffer *message, bkv_step_t then) {
    send_message(call, message, GRPC_WRITE_BUFFER_HINT, then);
}

void bkv_call_finish(bkv_call_t *call, grpc_byte_buffer *last) {
    advance(call, BKV_CALL_ENDING);
    grpc_op ops[4];
    size_t count = add_start(call, ops);
    count += add_message(call, last, ops + count);

    bool failed = call->error.status != BKV_OK;
    grpc_slice details = failed ? grpc_slice_from_copied_string(call->error.message) : grpc_empty_slice();
    grpc_metadata request_id = {0};
    if (failed) {
        char text[24];
        snprintf(text, sizeof(text), "%" PRIu64, call->id);
        request_id.key = grpc_slice_from_static_string(BKV_ANSWER_REQUEST_ID);
        request_id.value = grpc_slice_from_copied_string(text);
    }
    ops[count++] = (grpc_op){
        .op = GRPC_OP_SEND_STATUS_FROM_SERVER,
        .data.send_status_from_server = {.trailing_metadata_count = failed ? 1 : 0,
                                         .trailing_metadata = &request_id,
                                         .status = bkv_status_to_grpc(call->error.status),
                                         .status_details = failed ? &details : NULL},
    };
    ops[count++] = (grpc_op){
        .op = GRPC_OP_RECV_CLOSE_ON_SERVER,
        .data.recv_close_on_server.cancelled = &call->cancelled,
    };
    call->tag = (bkv_tag_t){on_finished, call};
    bkv_call_batch(call, ops, count, &call->tag);
    // gRPC has taken references of its own to what it still needs; the value is short enough to lie within its slice.
    grpc_slice_unref(details);
}

void bkv_call_fail(bkv_call_t *call, const bkv_error_t *error) {
    assert(error->status != BKV_OK);
    call->error = *error;
    bkv_call_finish(call, NULL);
}

void bkv_call_reply(bkv_call_t *call, const ProtobufCMessage *reply) {
    bkv_call_finish(call, bkv_wire_pack(reply, NULL));
}

// ---- reading ----

void bkv_call_read(bkv_call_t *call, bkv_step_t then) {
    bkv_call_drop_message(call);
    grpc_op op = {.op = GRPC_OP_RECV_MESSAGE, .data.recv_message.recv_message = &call->message};
    call->tag = (bkv_tag_t){then, call};
    bkv_call_batch(call, &op, 1, &call->tag);
}

const ProtobufCMessage *bkv_call_request(bkv_call_t *call, const ProtobufCMessageDescriptor *type, bkv_bump_t *bump) {
    return bkv_call_long_request(call, type, bkv_server_request_most(call->server), bump);
}

const ProtobufCMessage *bkv_call_long_request(bkv_call_t *call, const ProtobufCMessageDescriptor *type, size_t most,
                                              bkv_bump_t *bump) {
    const ProtobufCMessage *request;
    bkv_error_t error;
    if (bkv_wire_unpack(type, call->message, most, bump, &request, &error) != BKV_OK) {
        bkv_call_fail(call, &error);
        return NULL;
    }
    return request;
}

bool bkv_call_is_local(const bkv_call_t *call) {
    char *peer = grpc_call_get_peer(call->grpc);
    bool local = strncmp(peer, "unix:", 5) == 0;
    gpr_free(peer);
    return local;
}

bkv_status_t bkv_call_find_session(const bkv_server_t *server, const bkv_session_id_t *id, bkv_session_t **session,
                                   bkv_error_t *err) {
    if (server->config.transports == NULL) {
        return bkv_fail(err, BKV_FAILED_PRECONDITION, "place.session: this daemon shares no memory");
    }
    return bkv_session_find(server->config.transports, id, session, err);
}

static void on_request(bkv_worker_t *worker, void *owner, bool ok) {
    bkv_call_t *call = owner;
    bkv_error_t error;
    if (!ok) {
        bkv_fail(&error, BKV_RESOURCE_EXHAUSTED, "request: larger than max_message %" PRIu64, call->server->config.max_message);
        bkv_call_fail(call, &error);
    } else if (call->message == NULL) {
        call->broken = true;
        bkv_fail(&error, BKV_INVALID_ARGUMENT, "request: none was sent");
        bkv_call_fail(call, &error);
    } else if (bkv_wire_check_encoding(call->message, &error) != BKV_OK) {
        bkv_call_fail(call, &error);
    } else {
        advance(call, BKV_CALL_RUNNING);
        methods[call->method].handler(call, &worker->bump);
    }
}

// ---- arriving ----

static uint64_t deadline_of(const bkv_call_t *call, uint64_t now_ms) {
    uint64_t most = atomic_load(&call->server->op_timeout_ms);
    gpr_timespec deadline = call->client_deadline;
    if (gpr_time_cmp(deadline, gpr_inf_future(deadline.clock_type)) != 0) {
        gpr_timespec left = gpr_time_sub(deadline, gpr_now(deadline.clock_type));
        int32_t left_ms = gpr_time_to_millis(left);
        uint64_t wanted = left_ms > 0 ? (uint64_t)left_ms : 0;
        most = wanted < most ? wanted : most;
    }
    return now_ms + most;
}

static void accept_call(bkv_call_t *call) {
    bkv_server_t *server = call->server;
    advance(call, BKV_CALL_ACCEPTED);
    call->id = atomic_fetch_add(&server->last_id, 1) + 1;
    bool watch = call->method == BKV_METHOD_HEALTH_WATCH; // it lasts as long as it is wanted
    call->accepted_ms = bkv_now_ms();
    call->deadline_ms = watch ? UINT64_MAX : deadline_of(call, call->accepted_ms);
    atomic_fetch_add(&server->calls_total, 1);
    call->counted = !watch;
    atomic_fetch_add(&server->open, call->counted);
    link_call(call);
}

// Whether there is room for one more call; it is the accepted'th.
static bkv_status_t admit(const bkv_call_t *call, uint32_t accepted, bkv_error_t *err) {
    const bkv_server_t *server = call->server;
    bool always = methods[call->method].always;
    uint64_t most = (uint64_t)server->config.max_calls + (always ? RESERVED_CALLS : 0);
    if (atomic_load(&server->draining) && !always) {
        return bkv_fail(err, BKV_BUSY, "the daemon is draining; try another or come back");
    }
    if (accepted > most) {
        return bkv_fail(err, BKV_BUSY, "%u calls are in flight, limits.max_calls; retry after a pause", accepted - 1);
    }
    return BKV_OK;
}

static void on_call(bkv_worker_t *worker, void *owner, bool ok) {
    bkv_call_t *call = owner;
    bkv_server_t *server = call->server;
    if (!ok) { // the server is shutting down; there is no call
        call_free(call);
        return;
    }
    bkv_call_arm(server, call->method);
    if (call->method == BKV_METHOD_COUNT) {
        call->client_deadline = call->details.deadline;
    }
    uint32_t accepted = atomic_fetch_add(&server->accepted, 1) + 1;
    accept_call(call);
    bkv_error_t error;
    if (call->method == BKV_METHOD_COUNT) {
        char *path = grpc_slice_to_c_string(call->details.method);
        bkv_fail(&error, BKV_UNIMPLEMENTED, "method: %.100s is not one of this daemon's", path);
        gpr_free(path);
        bkv_call_fail(call, &error);
    } else if (admit(call, accepted, &error) != BKV_OK) {
        bkv_call_fail(call, &error);
    } else if (methods[call->method].client_stream) {
        advance(call, BKV_CALL_RUNNING);
        methods[call->method].handler(call, &worker->bump);
    } else {
        bkv_call_read(call, on_request);
    }
}

void bkv_call_arm(bkv_server_t *server, bkv_method_id_t method) {
    if (atomic_load(&server->stopping)) {
        return;
    }
    bkv_call_t *call = gpr_zalloc(sizeof(*call)); // as gRPC's own memory: there or the process ends
    call->tag = (bkv_tag_t){on_call, call};
    call->server = server;
    call->method = method;
    grpc_metadata_array_init(&call->metadata);
    bkv_server_hold(server);
    BKV_HAND_OVER(&call->tag);
    grpc_call_error error;
    if (method == BKV_METHOD_COUNT) {
        grpc_call_details_init(&call->details);
        error = grpc_server_request_call(server->grpc, &call->grpc, &call->details, &call->metadata, server->queue,
                                         server->queue, &call->tag);
    } else {
        error = grpc_server_request_registered_call(server->grpc, server->methods[method], &call->grpc, &call->client_deadline,
                                                    &call->metadata, NULL, server->queue, server->queue, &call->tag);
    }
    if (error != GRPC_CALL_OK) {
        bkv_log(BKV_LOG_ERROR, 0, "gRPC takes no further calls: %s", grpc_call_error_to_string(error));
        abort();
    }
}

void bkv_call_sweep(bkv_server_t *server, uint64_t now_ms) {
    for (bkv_call_t *call = server->calls; call != NULL; call = call->older) {
        if (call->refresh != NULL) {
            call->refresh(call);
        } else if (now_ms >= call->deadline_ms && !atomic_load(&call->expired)) {
            atomic_store(&call->expired, true);
            grpc_call_cancel_with_status(call->grpc, GRPC_STATUS_DEADLINE_EXCEEDED,
                                         "deadline: the call had not ended when it passed", NULL);
        }
    }
}
