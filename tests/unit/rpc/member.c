// member.c - see member.h.
#include "member.h"

#include "daemon/observe/clock.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PEER "/balancekv.cluster.v1.Peer/"

static bkv_cluster_t *create_cluster(bkv_store_t *store) {
    static const char *const nowhere = "127.0.0.1:1";
    bkv_cluster_options_t options = {
        .etcd = {.endpoints = &nowhere, .endpoint_count = 1},
        .name = "test",
        .self = {.place = {.id = "self", .epoch = 4711, .weight = 1}},
        .replicas = 2,
        .lease_s = 5,
        .peers = {.store = store, .timeout_ms = 1000, .max_batch = 64, .verbs_device = "off"},
        .repair_delay_ms = 1000,
    };
    bkv_cluster_t *cluster;
    bkv_error_t err;
    cr_assert_eq(bkv_cluster_create(&options, &cluster, &err), BKV_OK, "%s", err.message);
    return cluster;
}

void member_open(member_t *member) {
    *member = (member_t){0};
    rig_t *rig = &member->rig;
    peer_daemon_init(&rig->daemon, &rig->config);
    rig->config.tcp = "127.0.0.1:0";
    rig->config.cluster = create_cluster(rig->daemon.store);
    rig_start(rig);
    rig_open_spec(rig, RIG_TOKENS);
    char target[64];
    snprintf(target, sizeof(target), "127.0.0.1:%d", bkv_server_port(rig->daemon.server));
    member->channel = peer_connect(target);
}

void member_close(member_t *member) {
    grpc_channel_destroy(member->channel);
    peer_daemon_stop(&member->rig.daemon);
    bkv_cluster_destroy(member->rig.config.cluster);
    rig_close(&member->rig);
}

bkv_name_t member_name(const member_t *member, uint32_t number) {
    bkv_name_t name;
    memcpy(name.spec_id.bytes, member->rig.spec_id, sizeof(name.spec_id.bytes));
    rig_key(number, name.key.bytes);
    return name;
}

void member_put(member_t *member, uint32_t first, uint32_t count) {
    for (uint32_t i = first; i < first + count; i++) {
        float *payload = rig_payload(RIG_BLOCK, i);
        rig_put(&member->rig, i, RIG_TOKENS, payload, RIG_BLOCK);
        free(payload);
    }
    bkv_name_t name = member_name(member, first);
    bkv_record_header_t header;
    cr_assert(
        bkv_store_peek(member->rig.daemon.store, &name.spec_id, &name.key, bkv_now_ms(), &header, &member->record_length));
}

Balancekv__Cluster__V1__HaveResponse *member_have(member_t *member, const void *names, size_t bytes, grpc_status_code *code,
                                                  char text[256]) {
    Balancekv__Cluster__V1__HaveRequest request = BALANCEKV__CLUSTER__V1__HAVE_REQUEST__INIT;
    request.names = rig_bytes(names, bytes);
    return peer_unary(member->channel, PEER "Have", &request.base, &balancekv__cluster__v1__have_response__descriptor, code,
                      text);
}

Balancekv__Cluster__V1__ForgetResponse *member_forget(member_t *member, const void *names, size_t bytes, grpc_status_code *code,
                                                      char text[256]) {
    Balancekv__Cluster__V1__ForgetRequest request = BALANCEKV__CLUSTER__V1__FORGET_REQUEST__INIT;
    request.names = rig_bytes(names, bytes);
    return peer_unary(member->channel, PEER "Forget", &request.base, &balancekv__cluster__v1__forget_response__descriptor, code,
                      text);
}

uint8_t *member_fetch(member_t *member, uint32_t number, size_t *length, uint64_t *ttl_ms) {
    bkv_name_t name = member_name(member, number);
    Balancekv__Cluster__V1__FetchRequest request = BALANCEKV__CLUSTER__V1__FETCH_REQUEST__INIT;
    request.names = rig_bytes(&name, sizeof(name));
    uint8_t packed[128];
    size_t packed_length = balancekv__cluster__v1__fetch_request__pack(&request, packed);
    peer_call_t call;
    peer_start(member->channel, PEER "Fetch", 0, &call);
    cr_assert(peer_send(&call, packed, packed_length));
    peer_send_last(&call);
    uint8_t *record = NULL;
    *length = 0;
    size_t message_length;
    for (uint8_t *message; (message = peer_receive(&call, &message_length)) != NULL;) {
        Balancekv__V1__RecordChunk *chunk = balancekv__v1__record_chunk__unpack(NULL, message_length, message);
        cr_assert_not_null(chunk);
        if (chunk->code == 0) {
            if (record == NULL) {
                record = malloc(chunk->record_bytes);
                if (ttl_ms != NULL) {
                    *ttl_ms = chunk->ttl_ms;
                }
            }
            memcpy(record + *length, chunk->data.data, chunk->data.len);
            *length += chunk->data.len;
        }
        balancekv__v1__record_chunk__free_unpacked(chunk, NULL);
        free(message);
    }
    cr_assert_eq(peer_end(&call), GRPC_STATUS_OK, "%s", call.details);
    peer_free(&call);
    return record;
}

void member_start_store(member_t *member, unsigned timeout_ms, peer_call_t *call) {
    peer_start(member->channel, PEER "Store", timeout_ms, call);
}

bool member_send(peer_call_t *call, const Balancekv__Cluster__V1__StoreRecord *record, const void *data, size_t data_bytes) {
    Balancekv__Cluster__V1__StoreRequest request = BALANCEKV__CLUSTER__V1__STORE_REQUEST__INIT;
    request.record = (Balancekv__Cluster__V1__StoreRecord *)(uintptr_t)record;
    request.data = rig_bytes(data, data_bytes);
    uint8_t *packed = malloc(balancekv__cluster__v1__store_request__get_packed_size(&request) + 1);
    size_t length = balancekv__cluster__v1__store_request__pack(&request, packed);
    bool ok = peer_send(call, packed, length);
    free(packed);
    return ok;
}

bool member_send_record(peer_call_t *call, const bkv_name_t *name, uint64_t ttl_ms, const void *record, size_t length) {
    Balancekv__Cluster__V1__StoreRecord head = BALANCEKV__CLUSTER__V1__STORE_RECORD__INIT;
    head.name = rig_bytes(name, sizeof(*name));
    head.record_bytes = length;
    head.ttl_ms = ttl_ms;
    return member_send(call, &head, record, length);
}

Balancekv__Cluster__V1__StoreResponse *member_end_store(peer_call_t *call) {
    peer_send_last(call);
    size_t length;
    uint8_t *bytes = peer_receive(call, &length);
    Balancekv__Cluster__V1__StoreResponse *reply = NULL;
    if (peer_end(call) == GRPC_STATUS_OK) {
        reply = balancekv__cluster__v1__store_response__unpack(NULL, length, bytes);
        cr_assert(reply != NULL && reply->boot_epoch == 4711);
    }
    free(bytes);
    return reply;
}
