// fake.c - see fake.h.
#include "fake.h"

#include <criterion/criterion.h>
#include <grpc/byte_buffer_reader.h>
#include <grpc/grpc_security.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

struct fake_server {
    grpc_server *server;
    grpc_completion_queue *notifications;
    pthread_t thread;
    fake_handler_t handler;
    void *user;
    pthread_mutex_t lock;
    pthread_cond_t idle;
    unsigned handlers;
    bool stopped; // no call can come any more
};

struct fake_call {
    fake_server_t *server;
    grpc_completion_queue *queue; // the call's own, plucked from
    grpc_call *call;
    grpc_call_details details;
    grpc_metadata_array metadata;
    bool greeted, finished;
};

// ---- conversation ----

static bool batch(fake_call_t *call, const grpc_op *ops, size_t count) {
    cr_assert(grpc_call_start_batch(call->call, ops, count, call, NULL) == GRPC_CALL_OK);
    grpc_event event = grpc_completion_queue_pluck(call->queue, call, gpr_inf_future(GPR_CLOCK_REALTIME), NULL);
    return event.success != 0;
}

bool fake_is(const fake_call_t *call, const char *method) {
    size_t length = GRPC_SLICE_LENGTH(call->details.method), n = strlen(method);
    const char *path = (const char *)GRPC_SLICE_START_PTR(call->details.method);
    return length > n && path[length - n - 1] == '/' && memcmp(path + length - n, method, n) == 0;
}

void *fake_read(fake_call_t *call, const ProtobufCMessageDescriptor *descriptor) {
    grpc_byte_buffer *message = NULL;
    grpc_op op = {.op = GRPC_OP_RECV_MESSAGE, .data.recv_message.recv_message = &message};
    if (!batch(call, &op, 1) || message == NULL) {
        return NULL;
    }
    grpc_byte_buffer_reader reader;
    cr_assert(grpc_byte_buffer_reader_init(&reader, message));
    grpc_slice bytes = grpc_byte_buffer_reader_readall(&reader);
    void *unpacked = protobuf_c_message_unpack(descriptor, NULL, GRPC_SLICE_LENGTH(bytes), GRPC_SLICE_START_PTR(bytes));
    cr_assert(unpacked != NULL);
    grpc_slice_unref(bytes);
    grpc_byte_buffer_reader_destroy(&reader);
    grpc_byte_buffer_destroy(message);
    return unpacked;
}

bool fake_write_bytes(fake_call_t *call, const void *bytes, size_t length) {
    grpc_slice slice = grpc_slice_from_copied_buffer(bytes, length);
    grpc_byte_buffer *message = grpc_raw_byte_buffer_create(&slice, 1);
    grpc_op ops[2] = {{.op = GRPC_OP_SEND_MESSAGE, .data.send_message.send_message = message},
                      {.op = GRPC_OP_SEND_INITIAL_METADATA}};
    bool sent = batch(call, ops, call->greeted ? 1 : 2);
    call->greeted = true;
    grpc_slice_unref(slice);
    grpc_byte_buffer_destroy(message);
    return sent;
}

bool fake_write(fake_call_t *call, const ProtobufCMessage *message) {
    uint8_t *bytes = malloc(protobuf_c_message_get_packed_size(message) + 1);
    bool sent = fake_write_bytes(call, bytes, protobuf_c_message_pack(message, bytes));
    free(bytes);
    return sent;
}

static void finish(fake_call_t *call, grpc_status_code code, const char *message, bool named) {
    grpc_slice details = grpc_slice_from_copied_string(message);
    grpc_metadata request_id = {.key = grpc_slice_from_static_string("bkv-request-id"),
                                .value = grpc_slice_from_static_string("7")};
    int cancelled = 0;
    grpc_op ops[3] = {
        {.op = GRPC_OP_SEND_STATUS_FROM_SERVER}, {.op = GRPC_OP_RECV_CLOSE_ON_SERVER}, {.op = GRPC_OP_SEND_INITIAL_METADATA}};
    ops[0].data.send_status_from_server.status = code;
    ops[0].data.send_status_from_server.status_details = &details;
    ops[0].data.send_status_from_server.trailing_metadata = &request_id;
    ops[0].data.send_status_from_server.trailing_metadata_count = named && code != GRPC_STATUS_OK ? 1 : 0;
    ops[1].data.recv_close_on_server.cancelled = &cancelled;
    batch(call, ops, call->greeted ? 2 : 3);
    call->finished = true;
    grpc_slice_unref(details);
}

void fake_finish(fake_call_t *call, grpc_status_code code, const char *message) {
    finish(call, code, message, true);
}

void fake_break(fake_call_t *call, grpc_status_code code, const char *message) {
    finish(call, code, message, false);
}

// ---- server ----

static fake_call_t *request_call(fake_server_t *server) {
    fake_call_t *call = calloc(1, sizeof *call);
    call->server = server;
    call->queue = grpc_completion_queue_create_for_pluck(NULL);
    grpc_call_details_init(&call->details);
    grpc_metadata_array_init(&call->metadata);
    cr_assert(grpc_server_request_call(server->server, &call->call, &call->details, &call->metadata, call->queue,
                                       server->notifications, call) == GRPC_CALL_OK);
    return call;
}

static void call_free(fake_call_t *call) {
    if (call->call != NULL) {
        grpc_call_unref(call->call);
    }
    grpc_completion_queue_shutdown(call->queue);
    grpc_completion_queue_destroy(call->queue);
    grpc_call_details_destroy(&call->details);
    grpc_metadata_array_destroy(&call->metadata);
    free(call);
}

static void *call_run(void *argument) {
    fake_call_t *call = argument;
    fake_server_t *server = call->server;
    server->handler(call, server->user);
    if (!call->finished) { // hang until the client or fake_server_stop ends it
        int cancelled = 0;
        grpc_op op = {.op = GRPC_OP_RECV_CLOSE_ON_SERVER, .data.recv_close_on_server.cancelled = &cancelled};
        batch(call, &op, 1);
    }
    call_free(call);
    pthread_mutex_lock(&server->lock);
    server->handlers--;
    pthread_cond_signal(&server->idle);
    pthread_mutex_unlock(&server->lock);
    return NULL;
}

static void *server_run(void *argument) {
    fake_server_t *server = argument;
    for (;;) {
        grpc_event event = grpc_completion_queue_next(server->notifications, gpr_inf_future(GPR_CLOCK_REALTIME), NULL);
        if (event.type == GRPC_QUEUE_SHUTDOWN) {
            return NULL;
        }
        if (event.tag == server) {
            pthread_mutex_lock(&server->lock);
            server->stopped = true;
            pthread_cond_signal(&server->idle);
            pthread_mutex_unlock(&server->lock);
        } else if (!event.success) {
            call_free(event.tag);
        } else {
            pthread_mutex_lock(&server->lock);
            server->handlers++;
            pthread_mutex_unlock(&server->lock);
            request_call(server);
            pthread_t thread;
            cr_assert(pthread_create(&thread, NULL, call_run, event.tag) == 0);
            pthread_detach(thread);
        }
    }
}

fake_server_t *fake_server_start(const char *address, fake_handler_t handler, void *user) {
    grpc_init();
    return fake_server_start_with(address, grpc_insecure_server_credentials_create(), handler, user);
}

fake_server_t *fake_server_start_with(const char *address, grpc_server_credentials *credentials, fake_handler_t handler,
                                      void *user) {
    fake_server_t *server = calloc(1, sizeof *server);
    server->handler = handler;
    server->user = user;
    pthread_mutex_init(&server->lock, NULL);
    pthread_cond_init(&server->idle, NULL);
    grpc_arg limit = {.type = GRPC_ARG_INTEGER, .key = (char *)GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, .value.integer = -1};
    server->server = grpc_server_create(&(grpc_channel_args){.num_args = 1, .args = &limit}, NULL);
    server->notifications = grpc_completion_queue_create_for_next(NULL);
    grpc_server_register_completion_queue(server->server, server->notifications, NULL);
    cr_assert(grpc_server_add_http2_port(server->server, address, credentials) != 0);
    grpc_server_credentials_release(credentials);
    grpc_server_start(server->server);
    request_call(server);
    cr_assert(pthread_create(&server->thread, NULL, server_run, server) == 0);
    return server;
}

void fake_server_stop(fake_server_t *server) {
    grpc_server_shutdown_and_notify(server->server, server->notifications, server);
    grpc_server_cancel_all_calls(server->server);
    pthread_mutex_lock(&server->lock);
    while (server->handlers > 0 || !server->stopped) {
        pthread_cond_wait(&server->idle, &server->lock);
    }
    pthread_mutex_unlock(&server->lock);
    grpc_completion_queue_shutdown(server->notifications);
    pthread_join(server->thread, NULL);
    grpc_server_destroy(server->server);
    grpc_completion_queue_destroy(server->notifications);
    pthread_mutex_destroy(&server->lock);
    pthread_cond_destroy(&server->idle);
    free(server);
}

// ---- ready-made answers ----

void fake_open(fake_call_t *call, uint64_t boot_epoch) {
    fake_open_offering(call, boot_epoch, false);
}

void fake_open_offering(fake_call_t *call, uint64_t boot_epoch, bool shm) {
    static char *names[] = {(char *)"shm", (char *)"inline"};
    Balancekv__V1__OpenRequest *request = fake_read(call, &balancekv__v1__open_request__descriptor);
    if (request == NULL) {
        fake_finish(call, GRPC_STATUS_CANCELLED, "gone");
        return;
    }
    uint8_t id[BKV_SPEC_ID_BYTES] = {0};
    memcpy(id, request->spec->model, strnlen(request->spec->model, sizeof id));
    for (size_t i = 0; i < request->spec->shares.len; i++) {
        id[sizeof id - 1] = (uint8_t)(id[sizeof id - 1] * 31 + request->spec->shares.data[i]);
    }
    balancekv__v1__open_request__free_unpacked(request, NULL);
    Balancekv__V1__OpenResponse response = BALANCEKV__V1__OPEN_RESPONSE__INIT;
    response.spec_id = (ProtobufCBinaryData){.len = sizeof id, .data = id};
    response.boot_epoch = boot_epoch;
    response.max_message_bytes = 80 << 20;
    response.max_block_bytes = 64 << 20;
    response.max_batch = 4096;
    char backend[] = "fake";
    response.backend = backend;
    response.transports = shm ? names : names + 1;
    response.n_transports = shm ? 2 : 1;
    fake_write(call, &response.base);
    fake_finish(call, GRPC_STATUS_OK, "");
}

void fake_lookup(fake_call_t *call, uint64_t boot_epoch) {
    Balancekv__V1__LookupRequest *request = fake_read(call, &balancekv__v1__lookup_request__descriptor);
    if (request == NULL) {
        fake_finish(call, GRPC_STATUS_CANCELLED, "gone");
        return;
    }
    Balancekv__V1__LookupResponse response = BALANCEKV__V1__LOOKUP_RESPONSE__INIT;
    Balancekv__V1__KeyState *states = calloc(request->n_keys + 1, sizeof *states);
    for (size_t i = 0; i < request->n_keys; i++) {
        bool resident = request->keys[i].data[0] % 2 == 0;
        states[i] = resident ? BALANCEKV__V1__KEY_STATE__KEY_RESIDENT : BALANCEKV__V1__KEY_STATE__KEY_ABSENT;
        response.prefix += resident && response.prefix == i;
    }
    response.n_states = request->n_keys;
    response.states = states;
    response.boot_epoch = boot_epoch;
    fake_write(call, &response.base);
    fake_finish(call, GRPC_STATUS_OK, "");
    free(states);
    balancekv__v1__lookup_request__free_unpacked(request, NULL);
}

#define FAKE_BLOCKS 64

void fake_put(fake_call_t *call, uint64_t boot_epoch) {
    static const ProtobufCMessageDescriptor *type = &balancekv__v1__put_request__descriptor;
    Balancekv__V1__PutResult results[FAKE_BLOCKS], *list[FAKE_BLOCKS];
    uint8_t keys[FAKE_BLOCKS][BKV_KEY_BYTES];
    Balancekv__V1__PutResponse response = BALANCEKV__V1__PUT_RESPONSE__INIT;
    Balancekv__V1__PutRequest *request;
    uint64_t missing = 0;
    while ((request = fake_read(call, type)) != NULL) {
        if (request->block != NULL) {
            cr_assert(missing == 0 && response.n_results < FAKE_BLOCKS);
            size_t i = response.n_results++;
            balancekv__v1__put_result__init(&results[i]);
            memcpy(keys[i], request->block->key.data, BKV_KEY_BYTES);
            results[i].key = (ProtobufCBinaryData){.len = BKV_KEY_BYTES, .data = keys[i]};
            list[i] = &results[i];
            missing = request->block->payload_bytes;
        }
        cr_assert(response.n_results > 0 && request->data.len <= missing && request->data.len <= 1 << 20);
        missing -= request->data.len;
        for (size_t i = 0; i < request->data.len; i++) {
            results[response.n_results - 1].stored_bytes += request->data.data[i];
        }
        balancekv__v1__put_request__free_unpacked(request, NULL);
    }
    if (missing > 0 || response.n_results == 0) {
        fake_finish(call, GRPC_STATUS_INVALID_ARGUMENT, "data: the stream was cut");
        return;
    }
    response.results = list;
    response.boot_epoch = boot_epoch;
    fake_write(call, &response.base);
    fake_finish(call, GRPC_STATUS_OK, "");
}

static bool send_chunk(fake_call_t *call, Balancekv__V1__RecordChunk chunk, uint32_t index, const bkv_key_t *key,
                       uint64_t record_bytes, const void *data, size_t length) {
    chunk.index = index;
    chunk.record_bytes = record_bytes;
    if (key != NULL) {
        chunk.key = (ProtobufCBinaryData){.len = BKV_KEY_BYTES, .data = (uint8_t *)key->bytes};
        chunk.boot_epoch = 1;
    }
    chunk.data = (ProtobufCBinaryData){.len = length, .data = (uint8_t *)data};
    return fake_write(call, &chunk.base);
}

bool fake_chunk(fake_call_t *call, uint32_t index, const bkv_key_t *key, uint64_t record_bytes, const void *data,
                size_t length) {
    Balancekv__V1__RecordChunk chunk = BALANCEKV__V1__RECORD_CHUNK__INIT;
    return send_chunk(call, chunk, index, key, record_bytes, data, length);
}

bool fake_placed(fake_call_t *call, uint32_t index, const bkv_key_t *key, uint64_t record_bytes, uint64_t offset,
                 const void *data, size_t length) {
    Balancekv__V1__RecordChunk chunk = BALANCEKV__V1__RECORD_CHUNK__INIT;
    chunk.placed = true;
    chunk.place_offset = offset;
    return send_chunk(call, chunk, index, key, record_bytes, data, length);
}

// ---- things ----

void fake_place_make(fake_place_t *place) {
    strcpy(place->directory, "/tmp/bkv-client-XXXXXX");
    cr_assert(mkdtemp(place->directory) != NULL);
    snprintf(place->path, sizeof place->path, "%s/socket", place->directory);
    snprintf(place->endpoint, sizeof place->endpoint, "unix:%s", place->path);
}

void fake_place_remove(const fake_place_t *place) {
    unlink(place->path);
    rmdir(place->directory);
}

bkv_client_t *fake_client(const fake_place_t *place, uint32_t timeout_ms) {
    bkv_client_t *client = NULL;
    bkv_error_t err = {0};
    bkv_client_options_t options = {.endpoint = place->endpoint, .timeout_ms = timeout_ms, .transport = "inline"};
    cr_assert(bkv_client_create(&options, &client, &err) == BKV_OK, "%s", err.message);
    return client;
}

bkv_key_t fake_key(uint8_t first, uint8_t second) {
    return (bkv_key_t){.bytes = {first, second}};
}

bkv_spec_t fake_spec(void) {
    return (bkv_spec_t){.model = "m",
                        .layers = 2,
                        .kv_heads = 2,
                        .key_dim = 8,
                        .value_dim = 8,
                        .dtype = BKV_FP32,
                        .block_tokens = 16,
                        .codec = BKV_CODEC_RAW};
}

bkv_spec_id_t fake_spec_id(void) {
    return (bkv_spec_id_t){.bytes = {'m'}};
}

uint64_t fake_now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

void *fake_record(const bkv_key_t *key, uint32_t tokens, size_t *length) {
    const bkv_backend_t *backend = bkv_backend_get("ref");
    bkv_shape_t shape = {.layers = 2, .heads = 2, .tokens = tokens, .key_dim = 8, .value_dim = 8, .dtype = BKV_FP32};
    bkv_codec_params_t params = {.codec = BKV_CODEC_RAW};
    bkv_record_id_t id = {.key = *key, .spec_id = fake_spec_id()};
    size_t payload_bytes = (size_t)bkv_shape_bytes(&shape), capacity = (size_t)bkv_codec_bound(&shape, &params);
    float *payload = malloc(payload_bytes);
    for (size_t i = 0; i < payload_bytes / sizeof *payload; i++) {
        payload[i] = (float)(i % 251) - 125;
    }
    void *record = aligned_alloc(64, (capacity + 63) / 64 * 64);
    void *workspace = aligned_alloc(64, (bkv_compress_workspace(backend, &shape, &params) + 63) / 64 * 64);
    bkv_block_t block;
    bkv_error_t err = {0};
    bkv_block_from_payload(&shape, payload, &block);
    cr_assert(bkv_compress(backend, &block, &params, &id, record, capacity, workspace, length, &err) == BKV_OK, "%s",
              err.message);
    bkv_record_seal(record);
    free(workspace);
    free(payload);
    return record;
}
