// test_server.c - the server as a client meets it: real sockets, a real pipeline behind it.
#include "peer.h"

#include "daemon/observe/clock.h"
#include "health.pb-c.h"

#include <criterion/criterion.h>
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define TOKENS 64
#define HEADS  2
#define DIM    32
#define BLOCK  ((size_t)TOKENS * HEADS * 2 * DIM * sizeof(float)) // one layer, K and V

typedef struct rig {
    peer_daemon_t daemon;
    bkv_server_config_t config;
    grpc_channel *channel;
    char target[128];
    uint8_t spec_id[BKV_SPEC_ID_BYTES];
} rig_t;

static void open_spec(rig_t *rig, uint32_t block_tokens) {
    static char model[] = "test";
    Balancekv__V1__Spec spec = BALANCEKV__V1__SPEC__INIT;
    spec.model = model;
    spec.layers = 1;
    spec.kv_heads = HEADS;
    spec.key_dim = DIM;
    spec.dtype = BALANCEKV__V1__DTYPE__DTYPE_FP32;
    spec.block_tokens = block_tokens;
    spec.codec = BALANCEKV__V1__CODEC__CODEC_RAW;
    Balancekv__V1__OpenRequest request = BALANCEKV__V1__OPEN_REQUEST__INIT;
    request.spec = &spec;
    grpc_status_code code;
    char text[256];
    Balancekv__V1__OpenResponse *reply =
        peer_unary(rig->channel, "Open", &request.base, &balancekv__v1__open_response__descriptor, &code, text);
    cr_assert_eq(code, GRPC_STATUS_OK, "%s", text);
    cr_assert_eq(reply->spec_id.len, BKV_SPEC_ID_BYTES);
    cr_assert(reply->boot_epoch == 4711 && reply->max_batch == 64 && reply->max_message_bytes == 8 << 20);
    cr_assert(reply->spec->value_dim == DIM && reply->spec->rate == 16 && reply->spec->tp_size == 1);
    cr_assert(reply->n_transports == 1 && strcmp(reply->transports[0], "inline") == 0);
    memcpy(rig->spec_id, reply->spec_id.data, BKV_SPEC_ID_BYTES);
    balancekv__v1__open_response__free_unpacked(reply, NULL);
}

static void rig_start(rig_t *rig) {
    peer_daemon_start(&rig->daemon, &rig->config);
    snprintf(rig->target, sizeof(rig->target), "unix:%s/s%%25ck", rig->daemon.directory);
    rig->channel = peer_connect(rig->target);
}

static void rig_open(rig_t *rig) {
    peer_daemon_init(&rig->daemon, &rig->config);
    rig_start(rig);
    open_spec(rig, TOKENS);
}

static void rig_close(rig_t *rig) {
    peer_daemon_stop(&rig->daemon);
    grpc_channel_destroy(rig->channel);
    peer_daemon_clear(&rig->daemon);
}

static ProtobufCBinaryData bytes_of(const void *data, size_t length) {
    return (ProtobufCBinaryData){length, (uint8_t *)(uintptr_t)data};
}

static void make_key(uint32_t number, uint8_t key[BKV_KEY_BYTES]) {
    memset(key, 0x11, BKV_KEY_BYTES);
    memcpy(key, &number, sizeof(number));
}

static float *make_payload(size_t bytes, uint32_t seed) {
    float *payload = malloc(bytes);
    for (size_t i = 0; i < bytes / sizeof(float); i++) {
        seed = seed * 1664525 + 1013904223;
        payload[i] = (float)(seed >> 8) / (float)(1 << 24) - 0.5f;
    }
    return payload;
}

static bool send_put(peer_call_t *call, const rig_t *rig, uint32_t number, uint32_t tokens, size_t payload_bytes,
                     const void *data, size_t data_bytes) {
    uint8_t key[BKV_KEY_BYTES];
    make_key(number, key);
    Balancekv__V1__PutBlock block = BALANCEKV__V1__PUT_BLOCK__INIT;
    block.spec_id = bytes_of(rig->spec_id, BKV_SPEC_ID_BYTES);
    block.key = bytes_of(key, sizeof(key));
    block.tokens = tokens;
    block.payload_bytes = payload_bytes;
    Balancekv__V1__PutRequest request = BALANCEKV__V1__PUT_REQUEST__INIT;
    request.block = &block;
    request.data = bytes_of(data, data_bytes);
    size_t length = balancekv__v1__put_request__get_packed_size(&request);
    uint8_t *packed = malloc(length);
    balancekv__v1__put_request__pack(&request, packed);
    bool ok = peer_send(call, packed, length);
    free(packed);
    return ok;
}

static bool send_data(peer_call_t *call, const void *data, size_t data_bytes) {
    Balancekv__V1__PutRequest request = BALANCEKV__V1__PUT_REQUEST__INIT;
    request.data = bytes_of(data, data_bytes);
    uint8_t *packed = malloc(data_bytes + 16);
    size_t length = balancekv__v1__put_request__pack(&request, packed);
    bool ok = peer_send(call, packed, length);
    free(packed);
    return ok;
}

static void put_one(rig_t *rig, uint32_t number, uint32_t tokens, const void *payload, size_t bytes) {
    peer_call_t call;
    peer_start(rig->channel, "Put", 0, &call);
    const size_t most = 4 << 20;
    cr_assert(send_put(&call, rig, number, tokens, bytes, payload, bytes < most ? bytes : most));
    for (size_t at = most; at < bytes; at += most) {
        cr_assert(send_data(&call, (const uint8_t *)payload + at, bytes - at < most ? bytes - at : most));
    }
    peer_send_last(&call);
    size_t length;
    free(peer_receive(&call, &length));
    cr_assert_eq(peer_end(&call), GRPC_STATUS_OK, "%s", call.details);
    peer_free(&call);
}

static void start_get(rig_t *rig, const uint32_t *numbers, size_t count, unsigned timeout_ms, peer_call_t *call) {
    uint8_t keys[64][BKV_KEY_BYTES];
    ProtobufCBinaryData fields[64];
    for (size_t i = 0; i < count; i++) {
        make_key(numbers[i], keys[i]);
        fields[i] = bytes_of(keys[i], BKV_KEY_BYTES);
    }
    Balancekv__V1__GetRequest request = BALANCEKV__V1__GET_REQUEST__INIT;
    request.spec_id = bytes_of(rig->spec_id, BKV_SPEC_ID_BYTES);
    request.n_keys = count;
    request.keys = fields;
    uint8_t packed[64 * 40];
    size_t length = balancekv__v1__get_request__pack(&request, packed);
    peer_start(rig->channel, "Get", timeout_ms, call);
    peer_send(call, packed, length);
    peer_send_last(call);
}

static Balancekv__V1__LookupResponse *lookup(rig_t *rig, uint32_t first, size_t count, grpc_status_code *code, char text[256]) {
    uint8_t keys[128][BKV_KEY_BYTES];
    ProtobufCBinaryData fields[128];
    for (size_t i = 0; i < count; i++) {
        make_key(first + (uint32_t)i, keys[i]);
        fields[i] = bytes_of(keys[i], BKV_KEY_BYTES);
    }
    Balancekv__V1__LookupRequest request = BALANCEKV__V1__LOOKUP_REQUEST__INIT;
    request.spec_id = bytes_of(rig->spec_id, BKV_SPEC_ID_BYTES);
    request.n_keys = count;
    request.keys = fields;
    return peer_unary(rig->channel, "Lookup", &request.base, &balancekv__v1__lookup_response__descriptor, code, text);
}

static uint32_t resident(rig_t *rig, uint32_t first, size_t count) {
    grpc_status_code code;
    Balancekv__V1__LookupResponse *reply = lookup(rig, first, count, &code, NULL);
    cr_assert_eq(code, GRPC_STATUS_OK);
    uint32_t found = 0;
    for (size_t i = 0; i < reply->n_states; i++) {
        found += reply->states[i] == BALANCEKV__V1__KEY_STATE__KEY_RESIDENT;
    }
    balancekv__v1__lookup_response__free_unpacked(reply, NULL);
    return found;
}

// Waits for what the server does a moment later.
static bool becomes_unpinned(const rig_t *rig) {
    for (int i = 0; i < 500 && peer_daemon_pinned(&rig->daemon) != 0; i++) {
        usleep(10000);
    }
    return peer_daemon_pinned(&rig->daemon) == 0;
}

// ---- what works ----

Test(rpc_server, blocks_come_back_as_they_were) {
    rig_t rig;
    rig_open(&rig);
    float *payload = make_payload(2 * BLOCK, 1);
    peer_call_t call;
    peer_start(rig.channel, "Put", 0, &call);
    cr_assert(send_put(&call, &rig, 1, TOKENS, BLOCK, NULL, 0)); // a block without data, then data in odd pieces
    cr_assert(send_data(&call, payload, 1));
    cr_assert(send_data(&call, (uint8_t *)payload + 1, BLOCK - 1));
    cr_assert(send_put(&call, &rig, 2, TOKENS, BLOCK, (uint8_t *)payload + BLOCK, BLOCK));
    peer_send_last(&call);
    size_t length;
    uint8_t *bytes = peer_receive(&call, &length);
    cr_assert_eq(peer_end(&call), GRPC_STATUS_OK, "%s", call.details);
    Balancekv__V1__PutResponse *reply = balancekv__v1__put_response__unpack(NULL, length, bytes);
    cr_assert(reply->n_results == 2 && reply->boot_epoch == 4711 && !reply->results[1]->duplicate);
    uint8_t key[BKV_KEY_BYTES];
    make_key(2, key);
    cr_assert_arr_eq(reply->results[1]->key.data, key, sizeof(key));
    cr_assert_gt(reply->results[0]->stored_bytes, BLOCK);
    balancekv__v1__put_response__free_unpacked(reply, NULL);
    free(bytes);
    peer_free(&call);

    const uint32_t numbers[] = {2, 1};
    start_get(&rig, numbers, 2, 0, &call);
    for (uint32_t i = 0; i < 2; i++) {
        bytes = peer_receive(&call, &length);
        cr_assert_not_null(bytes);
        Balancekv__V1__RecordChunk *chunk = balancekv__v1__record_chunk__unpack(NULL, length, bytes);
        cr_assert(chunk->index == i && chunk->code == 0 && chunk->boot_epoch == 4711);
        cr_assert(chunk->record_bytes == chunk->data.len && chunk->data.len > BLOCK);
        const uint8_t *expected = (const uint8_t *)payload + (i == 0 ? BLOCK : 0);
        cr_assert_arr_eq(chunk->data.data + chunk->data.len - BLOCK, expected, BLOCK);
        balancekv__v1__record_chunk__free_unpacked(chunk, NULL);
        free(bytes);
    }
    cr_assert_null(peer_receive(&call, &length));
    cr_assert_eq(peer_end(&call), GRPC_STATUS_OK);
    peer_free(&call);
    free(payload);
    rig_close(&rig);
}

Test(rpc_server, large_records_come_in_chunks) {
    rig_t rig;
    rig_open(&rig);
    const uint32_t tokens = 16384; // 8 MiB, sent in messages of 4 MiB
    open_spec(&rig, tokens);
    size_t bytes = BLOCK / TOKENS * tokens;
    float *payload = make_payload(bytes, 3);
    put_one(&rig, 5, tokens, payload, bytes);
    peer_call_t call;
    const uint32_t number = 5;
    start_get(&rig, &number, 1, 0, &call);
    uint8_t *record = NULL;
    size_t got = 0, length, chunks = 0;
    for (uint8_t *message; (message = peer_receive(&call, &length)) != NULL; chunks++) {
        Balancekv__V1__RecordChunk *chunk = balancekv__v1__record_chunk__unpack(NULL, length, message);
        cr_assert_eq(chunk->record_bytes != 0, chunks == 0, "record_bytes belongs to the first chunk");
        record = chunks == 0 ? malloc(chunk->record_bytes) : record;
        memcpy(record + got, chunk->data.data, chunk->data.len);
        got += chunk->data.len;
        balancekv__v1__record_chunk__free_unpacked(chunk, NULL);
        free(message);
    }
    cr_assert_eq(peer_end(&call), GRPC_STATUS_OK);
    peer_free(&call);
    cr_assert_eq(chunks, 8);
    cr_assert_eq(memcmp(record + got - bytes, payload, bytes), 0);
    free(record);
    free(payload);
    rig_close(&rig);
}

Test(rpc_server, attention_over_one_token_is_its_value) {
    rig_t rig;
    rig_open(&rig);
    float payload[HEADS * 2 * DIM]; // one token: K of both heads, then V of both
    for (int i = 0; i < HEADS * 2 * DIM; i++) {
        payload[i] = 0.01f * (float)i;
    }
    put_one(&rig, 7, 1, payload, sizeof(payload));
    float q[4 * DIM]; // 4 query heads, two for each KV head
    for (int i = 0; i < 4 * DIM; i++) {
        q[i] = 0.02f * (float)(i % 7);
    }
    uint8_t key[BKV_KEY_BYTES];
    make_key(7, key);
    ProtobufCBinaryData keys = bytes_of(key, sizeof(key));
    Balancekv__V1__AttendRequest request = BALANCEKV__V1__ATTEND_REQUEST__INIT;
    request.spec_id = bytes_of(rig.spec_id, BKV_SPEC_ID_BYTES);
    request.n_keys = 1;
    request.keys = &keys;
    request.query_heads = 4;
    request.queries = 1;
    request.scale = 0.5f;
    request.q = bytes_of(q, sizeof(q));
    grpc_status_code code;
    char text[256];
    Balancekv__V1__AttendResponse *reply =
        peer_unary(rig.channel, "Attend", &request.base, &balancekv__v1__attend_response__descriptor, &code, text);
    cr_assert_eq(code, GRPC_STATUS_OK, "%s", text);
    cr_assert(reply->output.len == 4 * DIM * sizeof(float) && reply->lse.len == 4 * sizeof(float));
    float output[4 * DIM], lse[4];
    memcpy(output, reply->output.data, sizeof(output));
    memcpy(lse, reply->lse.data, sizeof(lse));
    for (int head = 0; head < 4; head++) {
        double dot = 0;
        for (int i = 0; i < DIM; i++) {
            dot += (double)q[head * DIM + i] * (double)payload[head / 2 * DIM + i];
            cr_assert_float_eq(output[head * DIM + i], payload[(HEADS + head / 2) * DIM + i], 1e-5);
        }
        cr_assert_float_eq(lse[head], 0.5 * dot, 1e-4);
    }
    balancekv__v1__attend_response__free_unpacked(reply, NULL);

    request.q.len -= 4;
    cr_assert_null(peer_unary(rig.channel, "Attend", &request.base, &balancekv__v1__attend_response__descriptor, &code, text));
    cr_assert_eq(code, GRPC_STATUS_INVALID_ARGUMENT);
    cr_assert_eq(strncmp(text, "q: ", 3), 0, "%s", text);
    rig_close(&rig);
}

// ---- what goes wrong ----

Test(rpc_server, a_failed_block_names_itself_and_spares_those_before_it) {
    rig_t rig;
    rig_open(&rig);
    float *payload = make_payload(BLOCK, 9);
    peer_call_t call;
    peer_start(rig.channel, "Put", 0, &call);
    send_put(&call, &rig, 1, TOKENS, BLOCK, payload, BLOCK);
    send_put(&call, &rig, 2, TOKENS, BLOCK, payload, BLOCK);
    payload[5] = NAN;
    send_put(&call, &rig, 3, TOKENS, BLOCK, payload, BLOCK);
    peer_send_last(&call);
    size_t length;
    cr_assert_null(peer_receive(&call, &length));
    cr_assert_eq(peer_end(&call), GRPC_STATUS_INVALID_ARGUMENT);
    cr_assert_eq(strncmp(call.details, "block[2]", 8), 0, "%s", call.details);
    peer_free(&call);
    cr_assert_eq(resident(&rig, 1, 3), 2);
    free(payload);
    rig_close(&rig);
}

Test(rpc_server, a_put_that_breaks_off_leaves_nothing_half_stored) {
    rig_t rig;
    rig_open(&rig);
    float *payload = make_payload(BLOCK, 11);
    peer_call_t call;
    peer_start(rig.channel, "Put", 0, &call);
    send_put(&call, &rig, 1, TOKENS, BLOCK, payload, BLOCK);
    send_put(&call, &rig, 2, TOKENS, BLOCK, payload, BLOCK / 2);
    peer_cancel(&call);
    cr_assert_eq(peer_end(&call), GRPC_STATUS_CANCELLED);
    peer_free(&call);
    for (int i = 0; i < 500 && bkv_server_open_calls(rig.daemon.server) != 0; i++) {
        usleep(10000);
    }
    cr_assert_eq(bkv_server_open_calls(rig.daemon.server), 0);
    cr_assert_eq(resident(&rig, 2, 1), 0);
    put_one(&rig, 2, TOKENS, payload, BLOCK); // nothing is in its way
    cr_assert_eq(resident(&rig, 2, 1), 1);
    free(payload);
    rig_close(&rig); // asserts that no slot stayed reserved
}

Test(rpc_server, unknown_methods_and_oversized_messages_are_refused) {
    rig_t rig;
    rig_open(&rig);
    Balancekv__V1__StatsRequest request = BALANCEKV__V1__STATS_REQUEST__INIT;
    grpc_status_code code;
    char text[256];
    cr_assert_null(peer_unary(rig.channel, "Explode", &request.base, &balancekv__v1__stats_response__descriptor, &code, text));
    cr_assert_eq(code, GRPC_STATUS_UNIMPLEMENTED);
    cr_assert_not_null(strstr(text, "Explode"));
    peer_call_t call;
    size_t length = 9 << 20;
    uint8_t *junk = calloc(1, length);
    peer_start(rig.channel, "Put", 0, &call);
    peer_send(&call, junk, length);
    cr_assert_eq(peer_end(&call), GRPC_STATUS_RESOURCE_EXHAUSTED);
    peer_free(&call);
    free(junk);
    cr_assert_null(lookup(&rig, 0, 65, &code, text));
    cr_assert_eq(code, GRPC_STATUS_RESOURCE_EXHAUSTED);
    cr_assert_eq(strncmp(text, "keys: 65", 8), 0, "%s", text);
    rig_close(&rig);
}

Test(rpc_server, every_call_ends_by_op_timeout) {
    rig_t rig;
    rig_open(&rig);
    bkv_server_set_op_timeout(rig.daemon.server, 300);
    peer_call_t call;
    peer_start(rig.channel, "Put", 0, &call); // and then says nothing
    uint64_t start_ms = bkv_now_ms();
    cr_assert_eq(peer_end(&call), GRPC_STATUS_DEADLINE_EXCEEDED, "%d %s", (int)call.code, call.details);
    cr_assert_lt(bkv_now_ms() - start_ms, 5000);
    peer_free(&call);
    rig_close(&rig);
}

Test(rpc_server, a_reader_that_stops_holds_its_pin_only_until_the_deadline) {
    rig_t rig;
    rig_open(&rig);
    const uint32_t tokens = 8192;
    open_spec(&rig, tokens);
    size_t bytes = BLOCK / TOKENS * tokens;
    float *payload = make_payload(bytes, 13);
    put_one(&rig, 1, tokens, payload, bytes);
    free(payload);
    uint32_t numbers[16];
    for (int i = 0; i < 16; i++) {
        numbers[i] = 1; // 64 MiB in all
    }
    peer_call_t call;
    start_get(&rig, numbers, 16, 700, &call);
    for (int i = 0; i < 500 && peer_daemon_pinned(&rig.daemon) == 0; i++) {
        usleep(1000);
    }
    cr_assert_gt(peer_daemon_pinned(&rig.daemon), 0);
    cr_assert_eq(resident(&rig, 1, 1), 1, "others are served meanwhile");
    cr_assert(becomes_unpinned(&rig));
    cr_assert_eq(peer_end(&call), GRPC_STATUS_DEADLINE_EXCEEDED);
    peer_free(&call);
    rig_close(&rig);
}

Test(rpc_server, max_calls_holds_but_not_for_health_and_stats) {
    rig_t rig;
    peer_daemon_init(&rig.daemon, &rig.config);
    rig.config.max_calls = 2;
    rig_start(&rig);
    peer_call_t calls[2];
    for (int i = 0; i < 2; i++) {
        peer_start(rig.channel, "Put", 0, &calls[i]);
    }
    for (int i = 0; i < 500 && bkv_server_open_calls(rig.daemon.server) != 2; i++) {
        usleep(10000);
    }
    grpc_status_code code;
    char text[256];
    cr_assert_null(lookup(&rig, 0, 1, &code, text));
    cr_assert_eq(code, GRPC_STATUS_UNAVAILABLE);
    cr_assert_not_null(strstr(text, "max_calls"), "%s", text);
    Balancekv__V1__StatsRequest request = BALANCEKV__V1__STATS_REQUEST__INIT;
    Balancekv__V1__StatsResponse *stats =
        peer_unary(rig.channel, "Stats", &request.base, &balancekv__v1__stats_response__descriptor, &code, text);
    cr_assert_not_null(stats);
    cr_assert(strcmp(stats->version, "1.2.3") == 0 && stats->boot_epoch == 4711 && !stats->draining);
    balancekv__v1__stats_response__free_unpacked(stats, NULL);
    for (int i = 0; i < 2; i++) {
        peer_cancel(&calls[i]);
        peer_free(&calls[i]);
    }
    rig_close(&rig);
}

// ---- the end ----

static int watch_next(peer_call_t *watch) {
    size_t length;
    uint8_t *bytes = peer_receive(watch, &length);
    cr_assert_not_null(bytes);
    Grpc__Health__V1__HealthCheckResponse *news = grpc__health__v1__health_check_response__unpack(NULL, length, bytes);
    int status = (int)news->status;
    grpc__health__v1__health_check_response__free_unpacked(news, NULL);
    free(bytes);
    return status;
}

Test(rpc_server, drain_refuses_new_work_and_tells_watchers) {
    rig_t rig;
    rig_open(&rig);
    peer_call_t watch, put;
    peer_start(rig.channel, "/grpc.health.v1.Health/Watch", 0, &watch);
    peer_send(&watch, "", 0);
    peer_send_last(&watch);
    cr_assert_eq(watch_next(&watch), 1);
    float *payload = make_payload(BLOCK, 17);
    peer_start(rig.channel, "Put", 0, &put);
    send_put(&put, &rig, 1, TOKENS, BLOCK, payload, BLOCK / 2);
    for (int i = 0; i < 500 && bkv_server_open_calls(rig.daemon.server) != 1; i++) {
        usleep(10000);
    }
    cr_assert_eq(bkv_server_open_calls(rig.daemon.server), 1, "a watch does not count");
    bkv_server_drain(rig.daemon.server);
    cr_assert_eq(watch_next(&watch), 2);
    grpc_status_code code;
    char text[256];
    cr_assert_null(lookup(&rig, 0, 1, &code, text));
    cr_assert_eq(code, GRPC_STATUS_UNAVAILABLE);
    cr_assert(send_data(&put, (uint8_t *)payload + BLOCK / 2, BLOCK - BLOCK / 2)); // what is in flight goes on
    peer_send_last(&put);
    size_t length;
    free(peer_receive(&put, &length));
    cr_assert_eq(peer_end(&put), GRPC_STATUS_OK, "%s", put.details);
    peer_free(&put);
    peer_daemon_stop(&rig.daemon); // ends the watch
    cr_assert_neq(peer_end(&watch), GRPC_STATUS_OK);
    peer_free(&watch);
    free(payload);
    rig_close(&rig);
}

Test(rpc_server, stop_ends_calls_of_every_kind) {
    rig_t rig;
    rig_open(&rig);
    const uint32_t tokens = 8192;
    open_spec(&rig, tokens);
    size_t bytes = BLOCK / TOKENS * tokens;
    float *payload = make_payload(bytes, 19);
    put_one(&rig, 1, tokens, payload, bytes);
    peer_call_t calls[4];
    const uint32_t numbers[] = {1, 1, 1, 1, 1, 1, 1, 1};
    start_get(&rig, numbers, 8, 0, &calls[0]); // never read
    peer_start(rig.channel, "Put", 0, &calls[1]);
    send_put(&calls[1], &rig, 2, tokens, bytes, payload, 1000); // never completed
    peer_start(rig.channel, "Lookup", 0, &calls[2]);            // never sent
    peer_start(rig.channel, "/grpc.health.v1.Health/Watch", 0, &calls[3]);
    peer_send(&calls[3], "", 0);
    usleep(100000);
    uint64_t start_ms = bkv_now_ms();
    peer_daemon_stop(&rig.daemon);
    cr_assert_lt(bkv_now_ms() - start_ms, 5000);
    cr_assert_eq(peer_daemon_pinned(&rig.daemon), 0);
    for (int i = 0; i < 4; i++) {
        size_t length;
        for (void *message; (message = peer_receive(&calls[i], &length)) != NULL;) { // what has arrived comes first
            free(message);
        }
        cr_assert_neq(peer_end(&calls[i]), GRPC_STATUS_OK);
        peer_free(&calls[i]);
    }
    free(payload);
    rig_close(&rig);
}

typedef struct loader {
    rig_t *rig;
    const float *payload;
    uint32_t number;
    unsigned calls;
} loader_t;

static void *load_run(void *argument) {
    loader_t *loader = argument;
    grpc_status_code code = GRPC_STATUS_OK;
    for (; code == GRPC_STATUS_OK; loader->calls++) {
        peer_call_t call;
        size_t length;
        if (loader->number % 2 == 0) {
            const uint32_t numbers[] = {1, 1, 1, 1, 1, 1, 1, 1};
            start_get(loader->rig, numbers, 8, 0, &call);
            for (void *message; (message = peer_receive(&call, &length)) != NULL;) {
                free(message);
            }
        } else {
            peer_start(loader->rig->channel, "Put", 0, &call);
            send_put(&call, loader->rig, 1000 * loader->number + loader->calls, TOKENS, BLOCK, loader->payload, BLOCK);
            peer_send_last(&call);
            free(peer_receive(&call, &length));
        }
        code = peer_end(&call);
        peer_free(&call);
    }
    return NULL;
}

Test(rpc_server, stop_under_load_ends_every_call) {
    rig_t rig;
    rig_open(&rig);
    float *payload = make_payload(BLOCK, 23);
    put_one(&rig, 1, TOKENS, payload, BLOCK);
    pthread_t threads[6];
    loader_t loaders[6];
    for (uint32_t i = 0; i < 6; i++) {
        loaders[i] = (loader_t){.rig = &rig, .payload = payload, .number = i};
        cr_assert_eq(pthread_create(&threads[i], NULL, load_run, &loaders[i]), 0);
    }
    usleep(200000);
    peer_daemon_stop(&rig.daemon);
    for (uint32_t i = 0; i < 6; i++) {
        pthread_join(threads[i], NULL);
        cr_assert_gt(loaders[i].calls, 1);
    }
    cr_assert_eq(peer_daemon_pinned(&rig.daemon), 0);
    free(payload);
    rig_close(&rig);
}

// ---- sockets ----

Test(rpc_server, one_daemon_per_socket) {
    rig_t rig;
    bkv_error_t err;
    bkv_server_t *second;
    rig_open(&rig);
    struct stat status;
    cr_assert_eq(stat(rig.daemon.socket, &status), 0);
    cr_assert_eq(status.st_mode & 0777, 0600);
    cr_assert_eq(bkv_server_start(&rig.config, &second, &err), BKV_FAILED_PRECONDITION);
    cr_assert_not_null(strstr(err.message, rig.daemon.socket), "%s", err.message);
    cr_assert_eq(resident(&rig, 0, 1), 0, "the first still serves");
    rig_close(&rig);
}

Test(rpc_server, stale_sockets_are_replaced_and_files_are_not) {
    rig_t rig;
    bkv_error_t err;
    peer_daemon_init(&rig.daemon, &rig.config);
    int file = open(rig.daemon.socket, O_CREAT | O_WRONLY, 0600);
    cr_assert_geq(file, 0);
    close(file);
    cr_assert_eq(bkv_server_start(&rig.config, &rig.daemon.server, &err), BKV_FAILED_PRECONDITION);
    cr_assert_not_null(strstr(err.message, "not a socket"), "%s", err.message);
    unlink(rig.daemon.socket);
    int left_behind = socket(AF_UNIX, SOCK_STREAM, 0);
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof(address.sun_path), "%s", rig.daemon.socket);
    cr_assert_eq(bind(left_behind, (const struct sockaddr *)(const void *)&address, sizeof(address)), 0);
    close(left_behind);
    rig_start(&rig);
    open_spec(&rig, TOKENS);
    rig_close(&rig);
}

Test(rpc_server, tcp_is_loopback_unless_said_otherwise) {
    rig_t rig;
    bkv_error_t err;
    bkv_server_t *second;
    peer_daemon_init(&rig.daemon, &rig.config);
    rig.config.tcp = "0.0.0.0:0";
    cr_assert_eq(bkv_server_start(&rig.config, &second, &err), BKV_INVALID_ARGUMENT);
    cr_assert_not_null(strstr(err.message, "loopback"), "%s", err.message);
    rig.config.tcp = "127.0.0.1:0";
    rig_start(&rig);
    int port = bkv_server_port(rig.daemon.server);
    cr_assert_gt(port, 0);
    char target[32];
    snprintf(target, sizeof(target), "127.0.0.1:%d", port);
    grpc_channel *unix_channel = rig.channel;
    rig.channel = peer_connect(target);
    open_spec(&rig, TOKENS);
    grpc_channel_destroy(rig.channel);
    rig.channel = unix_channel;
    bkv_server_config_t taken = rig.config;
    taken.socket_path = NULL;
    taken.tcp = target;
    cr_assert_eq(bkv_server_start(&taken, &second, &err), BKV_FAILED_PRECONDITION);
    cr_assert_not_null(strstr(err.message, target), "%s", err.message);
    rig_close(&rig);
}

Test(rpc_server, tls_files_are_checked_at_the_start) {
    rig_t rig;
    bkv_error_t err;
    bkv_server_t *server;
    peer_daemon_init(&rig.daemon, &rig.config);
    rig.config.tcp = "127.0.0.1:0";
    rig.config.tls_cert = "/nowhere/cert.pem";
    cr_assert_eq(bkv_server_start(&rig.config, &server, &err), BKV_INVALID_ARGUMENT);
    cr_assert_not_null(strstr(err.message, "tls_key"), "%s", err.message);
    rig.config.tls_key = "/dev/null";
    cr_assert_eq(bkv_server_start(&rig.config, &server, &err), BKV_INVALID_ARGUMENT);
    cr_assert_not_null(strstr(err.message, "/nowhere/cert.pem"), "%s", err.message);
    rig.config.tls_cert = "/etc/hostname";
    rig.config.tls_key = "/etc/hostname";
    cr_assert_eq(bkv_server_start(&rig.config, &server, &err), BKV_INVALID_ARGUMENT);
    cr_assert_not_null(strstr(err.message, "no PEM certificate"), "%s", err.message);
    peer_daemon_clear(&rig.daemon);
}
