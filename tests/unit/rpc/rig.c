// rig.c - see rig.h.
#include "rig.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

void rig_open_spec(rig_t *rig, uint32_t block_tokens) {
    static char model[] = "test";
    Balancekv__V1__Spec spec = BALANCEKV__V1__SPEC__INIT;
    spec.model = model;
    spec.layers = 1;
    spec.kv_heads = RIG_HEADS;
    spec.key_dim = RIG_DIM;
    spec.dtype = BALANCEKV__V1__DTYPE__DTYPE_FP32;
    spec.block_tokens = block_tokens;
    spec.codec = rig->codec;
    Balancekv__V1__OpenRequest request = BALANCEKV__V1__OPEN_REQUEST__INIT;
    request.spec = &spec;
    grpc_status_code code;
    char text[256];
    Balancekv__V1__OpenResponse *reply =
        peer_unary(rig->channel, "Open", &request.base, &balancekv__v1__open_response__descriptor, &code, text);
    cr_assert_eq(code, GRPC_STATUS_OK, "%s", text);
    cr_assert_eq(reply->spec_id.len, BKV_SPEC_ID_BYTES);
    cr_assert(reply->boot_epoch == 4711 && reply->max_batch == rig->config.max_batch && reply->max_message_bytes == 8 << 20);
    cr_assert(reply->spec->value_dim == RIG_DIM && reply->spec->rate == 16 && reply->spec->tp_size == 1);
    bool sharing = rig->config.transports != NULL;
    cr_assert_eq(reply->n_transports, sharing ? 2 : 1);
    cr_assert_str_eq(reply->transports[0], sharing ? "shm" : "inline");
    memcpy(rig->spec_id, reply->spec_id.data, BKV_SPEC_ID_BYTES);
    balancekv__v1__open_response__free_unpacked(reply, NULL);
}

void rig_start(rig_t *rig) {
    rig->codec = BALANCEKV__V1__CODEC__CODEC_RAW;
    peer_daemon_start(&rig->daemon, &rig->config);
    snprintf(rig->target, sizeof(rig->target), "unix:%s/s%%25ck", rig->daemon.directory);
    rig->channel = peer_connect(rig->target);
}

void rig_open(rig_t *rig) {
    peer_daemon_init(&rig->daemon, &rig->config);
    rig_start(rig);
    rig_open_spec(rig, RIG_TOKENS);
}

void rig_open_sharing(rig_t *rig) {
    peer_daemon_init(&rig->daemon, &rig->config);
    rig->config.transports = sharing_create(rig->config.pipeline);
    rig_start(rig);
    rig_open_spec(rig, RIG_TOKENS);
}

uint8_t *rig_attach(rig_t *rig, size_t bytes, uint8_t session[BKV_SESSION_BYTES]) {
    Balancekv__V1__ShmWindow window = BALANCEKV__V1__SHM_WINDOW__INIT;
    Balancekv__V1__AttachRequest request = BALANCEKV__V1__ATTACH_REQUEST__INIT;
    window.bytes = bytes;
    request.shm = &window;
    grpc_status_code code;
    char text[256];
    Balancekv__V1__AttachResponse *reply =
        peer_unary(rig->channel, "Attach", &request.base, &balancekv__v1__attach_response__descriptor, &code, text);
    cr_assert_eq(code, GRPC_STATUS_OK, "%s", text);
    cr_assert(reply->session.len == BKV_SESSION_BYTES && reply->bytes == bytes && reply->boot_epoch == 4711);
    cr_assert(reply->idle_ms == 1234 && reply->verbs == NULL);
    memcpy(session, reply->session.data, BKV_SESSION_BYTES);
    balancekv__v1__attach_response__free_unpacked(reply, NULL);
    return sharing_memory(rig->config.transports, session);
}

void rig_close(rig_t *rig) {
    peer_daemon_stop(&rig->daemon);
    if (rig->config.transports != NULL) {
        sharing_destroy(rig->config.transports);
    }
    grpc_channel_destroy(rig->channel);
    peer_daemon_clear(&rig->daemon);
}

ProtobufCBinaryData rig_bytes(const void *data, size_t length) {
    return (ProtobufCBinaryData){length, (uint8_t *)(uintptr_t)data};
}

void rig_key(uint32_t number, uint8_t key[BKV_KEY_BYTES]) {
    memset(key, 0x11, BKV_KEY_BYTES);
    memcpy(key, &number, sizeof(number));
}

float *rig_payload(size_t bytes, uint32_t seed) {
    float *payload = malloc(bytes);
    for (size_t i = 0; i < bytes / sizeof(float); i++) {
        seed = seed * 1664525 + 1013904223;
        payload[i] = (float)(seed >> 8) / (float)(1 << 24) - 0.5f;
    }
    return payload;
}

bool rig_send_put(peer_call_t *call, const rig_t *rig, uint32_t number, uint32_t tokens, size_t payload_bytes, const void *data,
                  size_t data_bytes) {
    uint8_t key[BKV_KEY_BYTES];
    rig_key(number, key);
    Balancekv__V1__PutBlock block = BALANCEKV__V1__PUT_BLOCK__INIT;
    block.spec_id = rig_bytes(rig->spec_id, BKV_SPEC_ID_BYTES);
    block.key = rig_bytes(key, sizeof(key));
    block.tokens = tokens;
    block.payload_bytes = payload_bytes;
    return rig_send_block(call, &block, data, data_bytes);
}

bool rig_send_block(peer_call_t *call, const Balancekv__V1__PutBlock *block, const void *data, size_t data_bytes) {
    Balancekv__V1__PutRequest request = BALANCEKV__V1__PUT_REQUEST__INIT;
    request.block = (Balancekv__V1__PutBlock *)(uintptr_t)block;
    request.data = rig_bytes(data, data_bytes);
    size_t length = balancekv__v1__put_request__get_packed_size(&request);
    uint8_t *packed = malloc(length);
    balancekv__v1__put_request__pack(&request, packed);
    bool ok = peer_send(call, packed, length);
    free(packed);
    return ok;
}

bool rig_send_data(peer_call_t *call, const void *data, size_t data_bytes) {
    Balancekv__V1__PutRequest request = BALANCEKV__V1__PUT_REQUEST__INIT;
    request.data = rig_bytes(data, data_bytes);
    uint8_t *packed = malloc(data_bytes + 16);
    size_t length = balancekv__v1__put_request__pack(&request, packed);
    bool ok = peer_send(call, packed, length);
    free(packed);
    return ok;
}

void rig_put(rig_t *rig, uint32_t number, uint32_t tokens, const void *payload, size_t bytes) {
    peer_call_t call;
    peer_start(rig->channel, "Put", 0, &call);
    const size_t most = 4 << 20;
    cr_assert(rig_send_put(&call, rig, number, tokens, bytes, payload, bytes < most ? bytes : most));
    for (size_t at = most; at < bytes; at += most) {
        cr_assert(rig_send_data(&call, (const uint8_t *)payload + at, bytes - at < most ? bytes - at : most));
    }
    peer_send_last(&call);
    size_t length;
    free(peer_receive(&call, &length));
    cr_assert_eq(peer_end(&call), GRPC_STATUS_OK, "%s", call.details);
    peer_free(&call);
}

static void start_get(rig_t *rig, const uint32_t *numbers, size_t count, Balancekv__V1__Place *place, unsigned timeout_ms,
                      peer_call_t *call) {
    uint8_t keys[256][BKV_KEY_BYTES];
    ProtobufCBinaryData fields[256];
    cr_assert_leq(count, 256);
    for (size_t i = 0; i < count; i++) {
        rig_key(numbers[i], keys[i]);
        fields[i] = rig_bytes(keys[i], BKV_KEY_BYTES);
    }
    Balancekv__V1__GetRequest request = BALANCEKV__V1__GET_REQUEST__INIT;
    request.spec_id = rig_bytes(rig->spec_id, BKV_SPEC_ID_BYTES);
    request.n_keys = count;
    request.keys = fields;
    request.place = place;
    uint8_t packed[256 * 40 + 256];
    size_t length = balancekv__v1__get_request__pack(&request, packed);
    peer_start(rig->channel, "Get", timeout_ms, call);
    peer_send(call, packed, length);
    peer_send_last(call);
}

void rig_start_get(rig_t *rig, const uint32_t *numbers, size_t count, unsigned timeout_ms, peer_call_t *call) {
    start_get(rig, numbers, count, NULL, timeout_ms, call);
}

void rig_start_get_to(rig_t *rig, const uint32_t *numbers, size_t count, Balancekv__V1__Place *place, peer_call_t *call) {
    start_get(rig, numbers, count, place, 0, call);
}

Balancekv__V1__LookupResponse *rig_lookup(rig_t *rig, uint32_t first, size_t count, grpc_status_code *code, char text[256]) {
    uint8_t keys[128][BKV_KEY_BYTES];
    ProtobufCBinaryData fields[128];
    for (size_t i = 0; i < count; i++) {
        rig_key(first + (uint32_t)i, keys[i]);
        fields[i] = rig_bytes(keys[i], BKV_KEY_BYTES);
    }
    Balancekv__V1__LookupRequest request = BALANCEKV__V1__LOOKUP_REQUEST__INIT;
    request.spec_id = rig_bytes(rig->spec_id, BKV_SPEC_ID_BYTES);
    request.n_keys = count;
    request.keys = fields;
    return peer_unary(rig->channel, "Lookup", &request.base, &balancekv__v1__lookup_response__descriptor, code, text);
}

uint32_t rig_resident(rig_t *rig, uint32_t first, size_t count) {
    grpc_status_code code;
    Balancekv__V1__LookupResponse *reply = rig_lookup(rig, first, count, &code, NULL);
    cr_assert_eq(code, GRPC_STATUS_OK);
    uint32_t found = 0;
    for (size_t i = 0; i < reply->n_states; i++) {
        found += reply->states[i] == BALANCEKV__V1__KEY_STATE__KEY_RESIDENT;
    }
    balancekv__v1__lookup_response__free_unpacked(reply, NULL);
    return found;
}

bool rig_becomes_unpinned(const rig_t *rig) {
    for (int i = 0; i < 500 && peer_daemon_pinned(&rig->daemon) != 0; i++) {
        usleep(10000);
    }
    return peer_daemon_pinned(&rig->daemon) == 0;
}

bool rig_reaches_open_calls(const rig_t *rig, uint32_t calls) {
    for (int i = 0; i < 500 && bkv_server_open_calls(rig->daemon.server) != calls; i++) {
        usleep(10000);
    }
    return bkv_server_open_calls(rig->daemon.server) == calls;
}
