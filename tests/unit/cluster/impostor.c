// impostor.c - see impostor.h.
#include "impostor.h"

#include <criterion/criterion.h>
#include <grpc/byte_buffer.h>
#include <grpc/byte_buffer_reader.h>
#include <grpc/grpc_security.h>
#include <grpc/support/time.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PATIENCE_S 30 // the longest that a test waits for gRPC before it is declared hung

struct impostor {
    grpc_server *server;
    grpc_completion_queue *queue;
    pthread_t thread;
    impostor_script_t script;
    void *user;
    uint16_t port;
    _Atomic uint32_t calls;
    pthread_mutex_t lock;
    pthread_cond_t idle;
    uint32_t running; // scripts
};

struct impostor_call {
    impostor_t *impostor;
    grpc_call *grpc;
    grpc_completion_queue *queue;
    grpc_call_details details;
    grpc_metadata_array metadata;
    int cancelled; // with the close
    bool greeted, ended, closed;
    char method[64];
};

static gpr_timespec patience(void) {
    return gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC), gpr_time_from_seconds(PATIENCE_S, GPR_TIMESPAN));
}

// ---- what scripts do ----

static bool batch(impostor_call_t *call, grpc_op *ops, size_t count) {
    cr_assert_eq(grpc_call_start_batch(call->grpc, ops, count, ops, NULL), GRPC_CALL_OK);
    grpc_event event = grpc_completion_queue_pluck(call->queue, ops, patience(), NULL);
    cr_assert_eq(event.type, GRPC_OP_COMPLETE, "the impostor hangs");
    return event.success != 0;
}

const char *impostor_method(const impostor_call_t *call) {
    return strrchr(call->method, '/') + 1;
}

uint8_t *impostor_read(impostor_call_t *call, size_t *length) {
    grpc_byte_buffer *message = NULL;
    grpc_op op = {.op = GRPC_OP_RECV_MESSAGE, .data.recv_message.recv_message = &message};
    if (!batch(call, &op, 1) || message == NULL) {
        return NULL;
    }
    grpc_byte_buffer_reader reader;
    grpc_byte_buffer_reader_init(&reader, message);
    grpc_slice whole = grpc_byte_buffer_reader_readall(&reader);
    *length = GRPC_SLICE_LENGTH(whole);
    uint8_t *bytes = malloc(*length + 1);
    memcpy(bytes, GRPC_SLICE_START_PTR(whole), *length);
    grpc_slice_unref(whole);
    grpc_byte_buffer_reader_destroy(&reader);
    grpc_byte_buffer_destroy(message);
    return bytes;
}

void *impostor_request(impostor_call_t *call, const ProtobufCMessageDescriptor *type) {
    size_t length = 0;
    uint8_t *bytes = impostor_read(call, &length);
    void *request = bytes != NULL ? protobuf_c_message_unpack(type, NULL, length, bytes) : NULL;
    free(bytes);
    return request;
}

static size_t greeting(impostor_call_t *call, grpc_op *op) {
    if (call->greeted) {
        return 0;
    }
    call->greeted = true;
    *op = (grpc_op){.op = GRPC_OP_SEND_INITIAL_METADATA};
    return 1;
}

bool impostor_write(impostor_call_t *call, const void *bytes, size_t length) {
    grpc_slice slice = grpc_slice_from_copied_buffer(bytes, length);
    grpc_byte_buffer *message = grpc_raw_byte_buffer_create(&slice, 1);
    grpc_op ops[2];
    size_t n = greeting(call, ops);
    ops[n++] = (grpc_op){.op = GRPC_OP_SEND_MESSAGE, .data.send_message.send_message = message};
    bool ok = batch(call, ops, n);
    grpc_byte_buffer_destroy(message);
    grpc_slice_unref(slice);
    return ok;
}

bool impostor_send(impostor_call_t *call, const ProtobufCMessage *message) {
    size_t length = protobuf_c_message_get_packed_size(message);
    uint8_t *bytes = malloc(length + 1);
    protobuf_c_message_pack(message, bytes);
    bool ok = impostor_write(call, bytes, length);
    free(bytes);
    return ok;
}

void impostor_end(impostor_call_t *call, grpc_status_code code, const char *details) {
    grpc_slice text = grpc_slice_from_copied_string(details);
    grpc_metadata id = {.key = grpc_slice_from_static_string("bkv-request-id"), .value = grpc_slice_from_static_string("1")};
    grpc_op ops[2];
    size_t n = greeting(call, ops);
    ops[n++] = (grpc_op){.op = GRPC_OP_SEND_STATUS_FROM_SERVER,
                         .data.send_status_from_server = {.trailing_metadata_count = code != GRPC_STATUS_OK,
                                                          .trailing_metadata = &id,
                                                          .status = code,
                                                          .status_details = &text}};
    batch(call, ops, n);
    grpc_slice_unref(text);
    call->ended = true;
}

void impostor_reply(impostor_call_t *call, const ProtobufCMessage *message) {
    impostor_send(call, message);
    impostor_end(call, GRPC_STATUS_OK, "");
}

void impostor_hush(impostor_call_t *call) {
    if (!call->closed) {
        grpc_event event = grpc_completion_queue_pluck(call->queue, &call->cancelled, patience(), NULL);
        cr_assert_eq(event.type, GRPC_OP_COMPLETE, "nobody gives the impostor's call up");
        call->closed = true;
    }
}

// ---- calls ----

static void call_free(impostor_call_t *call) {
    if (call->grpc != NULL) {
        grpc_call_unref(call->grpc);
    }
    grpc_completion_queue_shutdown(call->queue);
    grpc_completion_queue_destroy(call->queue);
    grpc_call_details_destroy(&call->details);
    grpc_metadata_array_destroy(&call->metadata);
    free(call);
}

static void *call_run(void *argument) {
    impostor_call_t *call = argument;
    impostor_t *impostor = call->impostor;
    grpc_op close = {.op = GRPC_OP_RECV_CLOSE_ON_SERVER, .data.recv_close_on_server.cancelled = &call->cancelled};
    cr_assert_eq(grpc_call_start_batch(call->grpc, &close, 1, &call->cancelled, NULL), GRPC_CALL_OK);
    impostor->script(call, impostor->user);
    if (!call->ended) {
        impostor_end(call, GRPC_STATUS_UNIMPLEMENTED, "not in the script");
    }
    impostor_hush(call);
    call_free(call);
    pthread_mutex_lock(&impostor->lock);
    if (--impostor->running == 0) {
        pthread_cond_broadcast(&impostor->idle);
    }
    pthread_mutex_unlock(&impostor->lock);
    return NULL;
}

static void call_request(impostor_t *impostor) {
    impostor_call_t *call = calloc(1, sizeof(*call));
    call->impostor = impostor;
    call->queue = grpc_completion_queue_create_for_pluck(NULL);
    grpc_call_details_init(&call->details);
    grpc_metadata_array_init(&call->metadata);
    cr_assert_eq(grpc_server_request_call(impostor->server, &call->grpc, &call->details, &call->metadata, call->queue,
                                          impostor->queue, call),
                 GRPC_CALL_OK);
}

static void call_begin(impostor_call_t *call) {
    impostor_t *impostor = call->impostor;
    size_t length = GRPC_SLICE_LENGTH(call->details.method);
    length = length < sizeof(call->method) - 1 ? length : sizeof(call->method) - 1;
    memcpy(call->method, GRPC_SLICE_START_PTR(call->details.method), length);
    atomic_fetch_add(&impostor->calls, 1);
    pthread_mutex_lock(&impostor->lock);
    impostor->running++;
    pthread_mutex_unlock(&impostor->lock);
    pthread_t thread;
    cr_assert_eq(pthread_create(&thread, NULL, call_run, call), 0);
    pthread_detach(thread);
    call_request(impostor);
}

static void *impostor_run(void *argument) {
    impostor_t *impostor = argument;
    for (;;) {
        grpc_event event = grpc_completion_queue_next(impostor->queue, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
        if (event.type == GRPC_QUEUE_SHUTDOWN) {
            return NULL;
        }
        if (event.tag == impostor) { // the server is down: no more calls
            grpc_completion_queue_shutdown(impostor->queue);
        } else if (event.success != 0) {
            call_begin(event.tag);
        } else {
            call_free(event.tag);
        }
    }
}

// ---- life ----

impostor_t *impostor_start_at(uint16_t port, impostor_script_t script, void *user) {
    grpc_init();
    impostor_t *impostor = calloc(1, sizeof(*impostor));
    impostor->script = script;
    impostor->user = user;
    pthread_mutex_init(&impostor->lock, NULL);
    pthread_cond_init(&impostor->idle, NULL);
    grpc_arg list[] = {
        {.type = GRPC_ARG_INTEGER, .key = (char *)(uintptr_t)GRPC_ARG_ALLOW_REUSEPORT, .value.integer = 0},
        {.type = GRPC_ARG_INTEGER, .key = (char *)(uintptr_t)GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, .value.integer = -1},
        {.type = GRPC_ARG_INTEGER, .key = (char *)(uintptr_t)GRPC_ARG_HTTP2_MAX_PING_STRIKES, .value.integer = 0},
    };
    const grpc_channel_args args = {.num_args = 3, .args = list};
    impostor->server = grpc_server_create(&args, NULL);
    impostor->queue = grpc_completion_queue_create_for_next(NULL);
    grpc_server_register_completion_queue(impostor->server, impostor->queue, NULL);
    char address[32];
    snprintf(address, sizeof(address), "127.0.0.1:%u", port);
    grpc_server_credentials *plain = grpc_insecure_server_credentials_create();
    impostor->port = (uint16_t)grpc_server_add_http2_port(impostor->server, address, plain);
    grpc_server_credentials_release(plain);
    cr_assert_neq(impostor->port, 0);
    grpc_server_start(impostor->server);
    call_request(impostor);
    cr_assert_eq(pthread_create(&impostor->thread, NULL, impostor_run, impostor), 0);
    return impostor;
}

impostor_t *impostor_start(impostor_script_t script, void *user) {
    return impostor_start_at(0, script, user);
}

void impostor_stop(impostor_t *impostor) {
    grpc_server_shutdown_and_notify(impostor->server, impostor->queue, impostor);
    grpc_server_cancel_all_calls(impostor->server);
    pthread_join(impostor->thread, NULL);
    pthread_mutex_lock(&impostor->lock);
    while (impostor->running > 0) {
        pthread_cond_wait(&impostor->idle, &impostor->lock);
    }
    pthread_mutex_unlock(&impostor->lock);
    grpc_server_destroy(impostor->server);
    grpc_completion_queue_destroy(impostor->queue);
    pthread_cond_destroy(&impostor->idle);
    pthread_mutex_destroy(&impostor->lock);
    free(impostor);
}

uint16_t impostor_port(const impostor_t *impostor) {
    return impostor->port;
}

uint32_t impostor_calls(impostor_t *impostor) {
    return atomic_load(&impostor->calls);
}

bkv_member_t impostor_member(const char *id, uint64_t epoch, uint16_t port) {
    bkv_member_t member = {.place = {.epoch = epoch, .weight = 1}, .address_count = 1};
    snprintf(member.place.id, sizeof(member.place.id), "%s", id);
    snprintf(member.addresses[0], sizeof(member.addresses[0]), "127.0.0.1:%u", port);
    return member;
}
