// bare.c - see bare.h.
#include "tests/bench/bare.h"

#include <assert.h>
#include <grpc/byte_buffer_reader.h>
#include <grpc/grpc_security.h>
#include <grpc/support/time.h>
#include <limits.h>
#include <malloc.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

#define MAX_MESSAGES 1024 // of one call

static const char *const paths[BKV_BARE_METHODS] = {"/bare/Unary", "/bare/Upload", "/bare/Download", "/bare/Echo"};

static void check(bool good, const char *what) {
    if (!good) {
        fprintf(stderr, "bare gRPC: %s failed\n", what);
        exit(1);
    }
}

static bool wait_queue(grpc_completion_queue *queue) {
    grpc_event event = grpc_completion_queue_next(queue, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
    return event.type == GRPC_OP_COMPLETE && event.success != 0;
}

static bool run(grpc_completion_queue *queue, grpc_call *call, const grpc_op *ops, size_t count) {
    check(grpc_call_start_batch(call, ops, count, call, NULL) == GRPC_CALL_OK, "starting a batch");
    return wait_queue(queue);
}

static grpc_op send_op(grpc_byte_buffer *message) {
    return (grpc_op){.op = GRPC_OP_SEND_MESSAGE, .data.send_message.send_message = message};
}

static grpc_op receive_op(grpc_byte_buffer **message) {
    return (grpc_op){.op = GRPC_OP_RECV_MESSAGE, .data.recv_message.recv_message = message};
}

// A message that refers to memory of ours.
static grpc_byte_buffer *refer(const void *bytes, size_t length) {
    grpc_slice slice = grpc_slice_from_static_buffer(bytes, length);
    return grpc_raw_byte_buffer_create(&slice, 1);
}

// Sends `bytes` of payload in chunks; the first goes with the initial metadata.
static bool send_payload(grpc_completion_queue *queue, grpc_call *call, const uint8_t *payload, size_t bytes) {
    bool good = true;
    for (size_t at = 0; at < bytes && good; at += BKV_BARE_CHUNK) {
        size_t length = bytes - at < BKV_BARE_CHUNK ? bytes - at : BKV_BARE_CHUNK;
        grpc_byte_buffer *message = refer(payload + at, length);
        grpc_op ops[2] = {send_op(message), {.op = GRPC_OP_SEND_INITIAL_METADATA}};
        good = run(queue, call, ops, at == 0 ? 2 : 1);
        grpc_byte_buffer_destroy(message);
    }
    return good;
}

// ---- server ----

typedef struct incoming {
    grpc_byte_buffer *messages[MAX_MESSAGES];
    size_t count;
} incoming_t;

static void receive_all(grpc_completion_queue *queue, grpc_call *call, incoming_t *incoming) {
    for (incoming->count = 0; incoming->count < MAX_MESSAGES; incoming->count++) {
        grpc_byte_buffer **message = &incoming->messages[incoming->count];
        grpc_op op = receive_op(message);
        if (!run(queue, call, &op, 1) || *message == NULL) {
            return;
        }
    }
}

static size_t wanted(grpc_byte_buffer *request) {
    grpc_byte_buffer_reader reader;
    uint64_t bytes = 0;
    check(grpc_byte_buffer_reader_init(&reader, request) != 0, "reading a request");
    grpc_slice slice = grpc_byte_buffer_reader_readall(&reader);
    check(GRPC_SLICE_LENGTH(slice) >= sizeof(bytes), "reading a size");
    memcpy(&bytes, GRPC_SLICE_START_PTR(slice), sizeof(bytes));
    grpc_slice_unref(slice);
    grpc_byte_buffer_reader_destroy(&reader);
    return (size_t)bytes;
}

// Answers one call. What it received is sent back or dropped, never looked at.
static void answer(grpc_completion_queue *queue, grpc_call *call, grpc_slice path, const uint8_t *payload) {
    static incoming_t incoming; // 8 KiB; one call at a time
    bool good = true, opened = false;
    if (grpc_slice_str_cmp(path, paths[BKV_BARE_UNARY]) == 0) {
        grpc_op op = receive_op(&incoming.messages[0]);
        incoming.count = run(queue, call, &op, 1) && incoming.messages[0] != NULL ? 1 : 0;
    } else {
        receive_all(queue, call, &incoming);
    }
    bool download = grpc_slice_str_cmp(path, paths[BKV_BARE_DOWNLOAD]) == 0;
    bool echo = grpc_slice_str_cmp(path, paths[BKV_BARE_ECHO]) == 0;
    if (download) {
        good = incoming.count == 1 && send_payload(queue, call, payload, wanted(incoming.messages[0]));
        opened = true;
    }
    for (size_t i = 0; echo && i < incoming.count && good; i++) {
        grpc_op ops[2] = {send_op(incoming.messages[i]), {.op = GRPC_OP_SEND_INITIAL_METADATA}};
        good = run(queue, call, ops, opened ? 1 : 2);
        opened = true;
    }
    int cancelled = 0;
    grpc_byte_buffer *reply = refer(payload, BKV_BARE_REPLY);
    grpc_op last[4] = {{.op = GRPC_OP_SEND_STATUS_FROM_SERVER}, {.op = GRPC_OP_RECV_CLOSE_ON_SERVER}};
    last[1].data.recv_close_on_server.cancelled = &cancelled;
    size_t count = 2;
    if (!opened) {
        last[count++] = (grpc_op){.op = GRPC_OP_SEND_INITIAL_METADATA};
        last[count++] = send_op(reply);
    }
    run(queue, call, last, count);
    grpc_byte_buffer_destroy(reply);
    for (size_t i = 0; i < incoming.count; i++) {
        grpc_byte_buffer_destroy(incoming.messages[i]);
    }
}

_Noreturn static void serve(const char *address, const uint8_t *payload) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    mallopt(M_MMAP_THRESHOLD, 1 << 30); // as balancekvd does
    mallopt(M_TRIM_THRESHOLD, INT_MAX);
    mallopt(M_TOP_PAD, 64 << 20);
    grpc_init();
    grpc_arg limit = {.type = GRPC_ARG_INTEGER, .key = (char *)(uintptr_t)GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH};
    limit.value.integer = -1;
    grpc_channel_args args = {.num_args = 1, .args = &limit};
    grpc_server *server = grpc_server_create(&args, NULL);
    grpc_completion_queue *queue = grpc_completion_queue_create_for_next(NULL);
    grpc_server_register_completion_queue(server, queue, NULL);
    grpc_server_credentials *plain = grpc_insecure_server_credentials_create();
    check(grpc_server_add_http2_port(server, address, plain) != 0, "listening");
    grpc_server_credentials_release(plain);
    grpc_server_start(server);
    for (;;) {
        grpc_call *call;
        grpc_call_details details;
        grpc_metadata_array metadata;
        grpc_call_details_init(&details);
        grpc_metadata_array_init(&metadata);
        check(grpc_server_request_call(server, &call, &details, &metadata, queue, queue, NULL) == GRPC_CALL_OK, "arming");
        check(wait_queue(queue), "waiting for a call");
        answer(queue, call, details.method, payload);
        grpc_call_unref(call);
        grpc_call_details_destroy(&details);
        grpc_metadata_array_destroy(&metadata);
    }
}

pid_t bkv_bare_serve(const char *address, const uint8_t *payload) {
    pid_t pid = fork();
    check(pid >= 0, "fork");
    if (pid == 0) {
        serve(address, payload);
    }
    return pid;
}

// ---- client ----

void bkv_bare_init(bkv_bare_t *bare, const char *address, const uint8_t *payload) {
    grpc_arg limit = {.type = GRPC_ARG_INTEGER, .key = (char *)(uintptr_t)GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH};
    limit.value.integer = -1;
    grpc_channel_args args = {.num_args = 1, .args = &limit};
    grpc_channel_credentials *plain = grpc_insecure_credentials_create();
    *bare = (bkv_bare_t){
        .channel = grpc_channel_create(address, plain, &args),
        .queue = grpc_completion_queue_create_for_next(NULL),
        .payload = payload,
    };
    grpc_channel_credentials_release(plain);
}

void bkv_bare_deinit(bkv_bare_t *bare) {
    grpc_channel_destroy(bare->channel);
    grpc_completion_queue_shutdown(bare->queue);
    while (grpc_completion_queue_next(bare->queue, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL).type != GRPC_QUEUE_SHUTDOWN) {
    }
    grpc_completion_queue_destroy(bare->queue);
}

// Drops messages until the stream ends.
static void receive_rest(bkv_bare_t *bare, grpc_call *call) {
    for (;;) {
        grpc_byte_buffer *message = NULL;
        grpc_op op = receive_op(&message);
        if (!run(bare->queue, call, &op, 1) || message == NULL) {
            return;
        }
        grpc_byte_buffer_destroy(message);
    }
}

void bkv_bare_call(bkv_bare_t *bare, bkv_bare_method_t method, size_t bytes) {
    gpr_timespec deadline = gpr_time_add(gpr_now(GPR_CLOCK_REALTIME), gpr_time_from_seconds(20, GPR_TIMESPAN));
    grpc_slice path = grpc_slice_from_static_string(paths[method]);
    grpc_call *call =
        grpc_channel_create_call(bare->channel, NULL, GRPC_PROPAGATE_DEFAULTS, bare->queue, path, NULL, deadline, NULL);
    grpc_metadata_array initial, trailing;
    grpc_metadata_array_init(&initial);
    grpc_metadata_array_init(&trailing);
    grpc_status_code status = GRPC_STATUS_UNKNOWN;
    grpc_slice details = grpc_empty_slice();
    uint64_t size = bytes;
    grpc_byte_buffer *message = NULL, *reply = NULL;
    const grpc_op get_status = {
        .op = GRPC_OP_RECV_STATUS_ON_CLIENT,
        .data.recv_status_on_client = {.trailing_metadata = &trailing, .status = &status, .status_details = &details},
    };
    const grpc_op get_initial = {.op = GRPC_OP_RECV_INITIAL_METADATA,
                                 .data.recv_initial_metadata.recv_initial_metadata = &initial};
    const grpc_op open = {.op = GRPC_OP_SEND_INITIAL_METADATA}, close = {.op = GRPC_OP_SEND_CLOSE_FROM_CLIENT};
    if (method == BKV_BARE_UNARY) {
        message = refer(bare->payload, bytes);
        run(bare->queue, call, (grpc_op[]){open, send_op(message), close, get_initial, receive_op(&reply), get_status}, 6);
    } else if (method == BKV_BARE_DOWNLOAD) {
        message = refer(&size, sizeof(size));
        run(bare->queue, call, (grpc_op[]){open, send_op(message), close}, 3);
        run(bare->queue, call, &get_initial, 1);
        receive_rest(bare, call);
        run(bare->queue, call, &get_status, 1);
    } else {
        check(send_payload(bare->queue, call, bare->payload, bytes), "sending");
        run(bare->queue, call, (grpc_op[]){close, get_initial}, 2);
        receive_rest(bare, call);
        run(bare->queue, call, &get_status, 1);
    }
    check(status == GRPC_STATUS_OK, paths[method]);
    grpc_byte_buffer_destroy(message);
    grpc_byte_buffer_destroy(reply);
    grpc_slice_unref(details);
    grpc_metadata_array_destroy(&initial);
    grpc_metadata_array_destroy(&trailing);
    grpc_call_unref(call);
}
