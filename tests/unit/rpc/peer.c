// peer.c - see peer.h.
#include "peer.h"

#include "daemon/observe/clock.h"

#include <criterion/criterion.h>
#include <grpc/byte_buffer_reader.h>
#include <grpc/grpc_security.h>
#include <grpc/support/alloc.h>
#include <grpc/support/time.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SERVICE    "/balancekv.v1.BalanceKV/"
#define PATIENCE_S 20 // the longest that a test waits for gRPC before it is declared hung

// ---- the daemon's side ----

void peer_daemon_init(peer_daemon_t *daemon, bkv_server_config_t *config) {
    *daemon = (peer_daemon_t){.store = NULL};
    strcpy(daemon->directory, "/tmp/bkv-rpc-XXXXXX");
    cr_assert_not_null(mkdtemp(daemon->directory));
    snprintf(daemon->socket, sizeof(daemon->socket), "%s/s%%ck", daemon->directory); // % is special to gRPC
    bkv_error_t err;
    const bkv_store_config_t store = {.arena_bytes = (uint64_t)256 << 20, .slab_bytes = 32 << 20, .arena_fd = -1};
    cr_assert_eq(bkv_store_create(&store, bkv_now_ms(), &daemon->store, NULL, &err), BKV_OK, "%s", err.message);
    const bkv_pipeline_config_t pipeline = {
        .store = daemon->store,
        .backend = bkv_backend_get("ref"),
        .compute_threads = 2,
        .max_jobs = 64,
        .staging_bytes = 32 << 20,
        .max_block_bytes = 32 << 20,
        .max_specs = 4,
        .max_batch = 64,
        .now_ms = bkv_now_ms,
    };
    cr_assert_eq(bkv_pipeline_create(&pipeline, &daemon->pipeline, &err), BKV_OK, "%s", err.message);
    *config = (bkv_server_config_t){
        .pipeline = daemon->pipeline,
        .store = daemon->store,
        .version = "1.2.3",
        .backend = "ref",
        .boot_epoch = 4711,
        .socket_path = daemon->socket,
        .socket_mode = 0600,
        .threads = 2,
        .max_calls = 64,
        .max_batch = 64,
        .peer_batch = 64,
        .max_message = 8 << 20,
        .max_block = 32 << 20,
        .op_timeout_ms = 10000,
    };
}

void peer_daemon_start(peer_daemon_t *daemon, const bkv_server_config_t *config) {
    bkv_error_t err;
    cr_assert_eq(bkv_server_start(config, &daemon->server, &err), BKV_OK, "%s", err.message);
}

void peer_daemon_stop(peer_daemon_t *daemon) {
    if (daemon->server != NULL) {
        bkv_server_stop(daemon->server);
        daemon->server = NULL;
    }
}

void peer_daemon_clear(peer_daemon_t *daemon) {
    peer_daemon_stop(daemon);
    bkv_pipeline_destroy(daemon->pipeline);
    bkv_store_destroy(daemon->store); // asserts that nothing is pinned or reserved
    char path[128];
    snprintf(path, sizeof(path), "%s.lock", daemon->socket);
    unlink(path);
    unlink(daemon->socket);
    rmdir(daemon->directory);
}

uint64_t peer_daemon_pinned(const peer_daemon_t *daemon) {
    bkv_store_metrics_t metrics;
    bkv_store_metrics(daemon->store, &metrics);
    return metrics.pinned;
}

// ---- the client's side ----

grpc_channel *peer_connect(const char *target) {
    grpc_init();
    grpc_arg list[] = {
        {.type = GRPC_ARG_INTEGER, .key = (char *)(uintptr_t)GRPC_ARG_ENABLE_HTTP_PROXY, .value.integer = 0},
        {.type = GRPC_ARG_INTEGER, .key = (char *)(uintptr_t)GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, .value.integer = 1},
        {.type = GRPC_ARG_INTEGER, .key = (char *)(uintptr_t)GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, .value.integer = -1},
    };
    const grpc_channel_args args = {.num_args = 3, .args = list};
    grpc_channel_credentials *plain = grpc_insecure_credentials_create();
    grpc_channel *channel = grpc_channel_create(target, plain, &args);
    grpc_channel_credentials_release(plain);
    return channel;
}

static bool batch(peer_call_t *call, const grpc_op *ops, size_t count) {
    cr_assert_eq(grpc_call_start_batch(call->call, ops, count, call, NULL), GRPC_CALL_OK);
    gpr_timespec until = gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC), gpr_time_from_seconds(PATIENCE_S, GPR_TIMESPAN));
    grpc_event event = grpc_completion_queue_next(call->queue, until, NULL);
    cr_assert_eq(event.type, GRPC_OP_COMPLETE, "the call hangs");
    return event.success != 0;
}

void peer_start(grpc_channel *channel, const char *method, unsigned timeout_ms, peer_call_t *call) {
    *call = (peer_call_t){.queue = grpc_completion_queue_create_for_next(NULL)};
    grpc_metadata_array_init(&call->initial);
    grpc_metadata_array_init(&call->trailing);
    gpr_timespec deadline = gpr_inf_future(GPR_CLOCK_MONOTONIC);
    if (timeout_ms != 0) {
        deadline = gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC), gpr_time_from_millis(timeout_ms, GPR_TIMESPAN));
    }
    char path[128];
    snprintf(path, sizeof(path), "%s%s", method[0] == '/' ? "" : SERVICE, method);
    grpc_slice slice = grpc_slice_from_copied_string(path);
    call->call = grpc_channel_create_call(channel, NULL, GRPC_PROPAGATE_DEFAULTS, call->queue, slice, NULL, deadline, NULL);
    grpc_slice_unref(slice);
    const grpc_op op = {.op = GRPC_OP_SEND_INITIAL_METADATA};
    batch(call, &op, 1);
}

bool peer_send(peer_call_t *call, const void *bytes, size_t length) {
    grpc_slice slice = grpc_slice_from_copied_buffer(bytes, length);
    grpc_byte_buffer *message = grpc_raw_byte_buffer_create(&slice, 1);
    const grpc_op op = {.op = GRPC_OP_SEND_MESSAGE, .data.send_message.send_message = message};
    bool ok = batch(call, &op, 1);
    grpc_byte_buffer_destroy(message);
    grpc_slice_unref(slice);
    return ok;
}

void peer_send_last(peer_call_t *call) {
    const grpc_op op = {.op = GRPC_OP_SEND_CLOSE_FROM_CLIENT};
    batch(call, &op, 1);
}

// gRPC gives a client neither messages nor the status before it has asked for the initial metadata, once.
static size_t add_initial(peer_call_t *call, grpc_op *op) {
    if (call->started) {
        return 0;
    }
    call->started = true;
    *op = (grpc_op){.op = GRPC_OP_RECV_INITIAL_METADATA, .data.recv_initial_metadata.recv_initial_metadata = &call->initial};
    return 1;
}

void *peer_receive(peer_call_t *call, size_t *length) {
    grpc_byte_buffer *message = NULL;
    grpc_op ops[2] = {{.op = GRPC_OP_RECV_MESSAGE, .data.recv_message.recv_message = &message}};
    batch(call, ops, 1 + add_initial(call, &ops[1]));
    if (message == NULL) {
        return NULL;
    }
    grpc_byte_buffer_reader reader;
    grpc_byte_buffer_reader_init(&reader, message);
    grpc_slice whole = grpc_byte_buffer_reader_readall(&reader);
    *length = GRPC_SLICE_LENGTH(whole);
    void *bytes = malloc(*length + 1);
    memcpy(bytes, GRPC_SLICE_START_PTR(whole), *length);
    grpc_slice_unref(whole);
    grpc_byte_buffer_reader_destroy(&reader);
    grpc_byte_buffer_destroy(message);
    return bytes;
}

void peer_cancel(peer_call_t *call) {
    grpc_call_cancel(call->call, NULL);
}

static void find_request_id(peer_call_t *call) {
    for (size_t i = 0; i < call->trailing.count; i++) {
        const grpc_metadata *one = &call->trailing.metadata[i];
        if (grpc_slice_str_cmp(one->key, "bkv-request-id") == 0) {
            snprintf(call->request_id, sizeof(call->request_id), "%.*s", (int)GRPC_SLICE_LENGTH(one->value),
                     (const char *)GRPC_SLICE_START_PTR(one->value));
        }
    }
}

grpc_status_code peer_end(peer_call_t *call) {
    grpc_slice details = grpc_empty_slice();
    grpc_op ops[2] = {
        {.op = GRPC_OP_RECV_STATUS_ON_CLIENT,
         .data.recv_status_on_client = {.trailing_metadata = &call->trailing,
                                        .status = &call->code,
                                        .status_details = &details}},
    };
    batch(call, ops, 1 + add_initial(call, &ops[1]));
    call->details = grpc_slice_to_c_string(details);
    grpc_slice_unref(details);
    find_request_id(call);
    return call->code;
}

void peer_free(peer_call_t *call) {
    grpc_call_unref(call->call);
    gpr_free(call->details);
    grpc_metadata_array_destroy(&call->initial);
    grpc_metadata_array_destroy(&call->trailing);
    grpc_completion_queue_shutdown(call->queue);
    while (grpc_completion_queue_next(call->queue, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL).type != GRPC_QUEUE_SHUTDOWN) {
    }
    grpc_completion_queue_destroy(call->queue);
}

void *peer_unary(grpc_channel *channel, const char *method, const ProtobufCMessage *request,
                 const ProtobufCMessageDescriptor *reply, grpc_status_code *code, char text[256]) {
    peer_call_t call;
    size_t length = protobuf_c_message_get_packed_size(request);
    uint8_t *packed = malloc(length + 1);
    protobuf_c_message_pack(request, packed);
    peer_start(channel, method, 0, &call);
    peer_send(&call, packed, length);
    peer_send_last(&call);
    free(packed);
    uint8_t *bytes = peer_receive(&call, &length);
    *code = peer_end(&call);
    if (text != NULL) {
        snprintf(text, 256, "%s", call.details);
    }
    void *message = NULL;
    if (*code == GRPC_STATUS_OK) {
        cr_assert_not_null(bytes, "success without a reply");
        message = protobuf_c_message_unpack(reply, NULL, length, bytes);
        cr_assert_not_null(message, "the reply cannot be read");
    } else {
        cr_assert_not_null(strchr("123456789", call.request_id[0]), "a failure without its request id");
    }
    free(bytes);
    peer_free(&call);
    return message;
}
