// test_peer.c - the Peer service but for Store: who may call it, and what it says of this daemon's own store.
#include "member.h"

#include "daemon/observe/clock.h"
#include "kernels/seal.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

#define PEER "/balancekv.cluster.v1.Peer/"

// ---- who may ----

static const char *const methods[] = {PEER "Have", PEER "Fetch", PEER "Store", PEER "Forget", PEER "Drain"};

// The status of a call with an empty request.
static void assert_refused(grpc_channel *channel, const char *method, grpc_status_code code, const char *text) {
    peer_call_t call;
    peer_start(channel, method, 0, &call);
    peer_send(&call, "", 0);
    peer_send_last(&call);
    size_t length;
    cr_assert_null(peer_receive(&call, &length));
    cr_assert_eq(peer_end(&call), code, "%s: %s", method, call.details);
    cr_assert_not_null(strstr(call.details, text), "%s: %s", method, call.details);
    peer_free(&call);
}

Test(rpc_peer, workers_are_no_peers) {
    member_t member;
    member_open(&member);
    for (size_t i = 0; i < sizeof(methods) / sizeof(methods[0]); i++) {
        assert_refused(member.rig.channel, methods[i], GRPC_STATUS_PERMISSION_DENIED, "peer: the unix socket");
    }
    member_close(&member);
}

Test(rpc_peer, a_daemon_alone_has_none) {
    rig_t rig;
    rig_open(&rig);
    for (size_t i = 0; i < sizeof(methods) / sizeof(methods[0]); i++) {
        assert_refused(rig.channel, methods[i], GRPC_STATUS_FAILED_PRECONDITION, "runs alone");
    }
    rig_close(&rig);
}

// ---- names ----

Test(rpc_peer, names_are_whole_and_not_too_many) {
    member_t member;
    member_open(&member);
    static const bkv_name_t names[65];
    const struct {
        size_t bytes;
        grpc_status_code code;
        const char *text;
    } cases[] = {{0, GRPC_STATUS_INVALID_ARGUMENT, "names: 0 bytes"},
                 {47, GRPC_STATUS_INVALID_ARGUMENT, "names: 47 bytes"},
                 {49, GRPC_STATUS_INVALID_ARGUMENT, "names: 49 bytes"},
                 {sizeof(names), GRPC_STATUS_RESOURCE_EXHAUSTED, "more than 64"},
                 {64 * sizeof(names[0]), GRPC_STATUS_OK, ""}};
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        grpc_status_code code;
        char text[256];
        Balancekv__Cluster__V1__HaveResponse *have = member_have(&member, names, cases[i].bytes, &code, text);
        cr_assert(code == cases[i].code && strstr(text, cases[i].text) != NULL, "%s", text);
        Balancekv__Cluster__V1__ForgetResponse *forget = member_forget(&member, names, cases[i].bytes, &code, text);
        cr_assert(code == cases[i].code && strstr(text, cases[i].text) != NULL, "%s", text);
        if (code == GRPC_STATUS_OK) {
            cr_assert(have->n_bytes == 64 && forget->n_had == 64);
            balancekv__cluster__v1__have_response__free_unpacked(have, NULL);
            balancekv__cluster__v1__forget_response__free_unpacked(forget, NULL);
            continue;
        }
        Balancekv__Cluster__V1__FetchRequest request = BALANCEKV__CLUSTER__V1__FETCH_REQUEST__INIT;
        request.names = rig_bytes(names, cases[i].bytes);
        cr_assert_null(
            peer_unary(member.channel, PEER "Fetch", &request.base, &balancekv__v1__record_chunk__descriptor, &code, text));
        cr_assert(code == cases[i].code && strstr(text, cases[i].text) != NULL, "%s", text);
    }
    member_close(&member);
}

Test(rpc_peer, what_is_no_request_is_refused) {
    member_t member;
    member_open(&member);
    for (size_t i = 0; i < sizeof(methods) / sizeof(methods[0]); i++) {
        peer_call_t call;
        size_t length;
        peer_start(member.channel, methods[i], 0, &call);
        peer_send(&call, "\x0a\xff\xff\xff\xff\x0f garbage", 14);
        peer_send_last(&call);
        cr_assert_null(peer_receive(&call, &length));
        cr_assert_eq(peer_end(&call), GRPC_STATUS_INVALID_ARGUMENT, "%s: %s", methods[i], call.details);
        peer_free(&call);
    }
    member_close(&member);
}

// ---- Have, Forget ----

Test(rpc_peer, have_says_how_long_records_are) {
    member_t member;
    member_open(&member);
    member_put(&member, 1, 1);
    member_put(&member, 3, 1);
    bkv_name_t names[4];
    for (uint32_t i = 0; i < 4; i++) {
        names[i] = member_name(&member, i);
    }
    names[2] = names[1];
    names[2].spec_id.bytes[0] ^= 1; // the same key of another spec is another record
    grpc_status_code code;
    Balancekv__Cluster__V1__HaveResponse *have = member_have(&member, names, sizeof(names), &code, NULL);
    cr_assert(have != NULL && have->n_bytes == 4 && have->boot_epoch == 4711);
    for (size_t i = 0; i < 4; i++) {
        cr_assert_eq(have->bytes[i], i % 2 == 1 ? member.record_length : 0, "%zu", i);
    }
    balancekv__cluster__v1__have_response__free_unpacked(have, NULL);
    member_close(&member);
}

Test(rpc_peer, forget_forgets) {
    member_t member;
    member_open(&member);
    member_put(&member, 1, 2);
    bkv_name_t names[3] = {member_name(&member, 2), member_name(&member, 9), member_name(&member, 2)};
    grpc_status_code code;
    Balancekv__Cluster__V1__ForgetResponse *forget = member_forget(&member, names, sizeof(names), &code, NULL);
    cr_assert(forget != NULL && forget->n_had == 3);
    cr_assert(forget->had[0] && !forget->had[1] && !forget->had[2]);
    balancekv__cluster__v1__forget_response__free_unpacked(forget, NULL);
    cr_assert_eq(rig_resident(&member.rig, 1, 2), 1);
    member_close(&member);
}

// ---- Fetch ----

// Records of specs that nobody has opened here are sent too, in the order asked; missing ones are said in their place, and that
// is no failure of the call.
Test(rpc_peer, fetch_sends_whole_records_of_any_spec) {
    member_t member;
    member_open(&member);
    member_put(&member, 1, 2);
    bkv_store_t *store = member.rig.daemon.store;
    size_t length;
    uint8_t *record = member_fetch(&member, 1, &length, NULL);
    cr_assert_eq(length, member.record_length);

    bkv_name_t names[4] = {member_name(&member, 2), member_name(&member, 99), member_name(&member, 1), member_name(&member, 1)};
    memset(names[2].spec_id.bytes, 0x77, sizeof(names[2].spec_id.bytes));
    bkv_record_header_t *header = (void *)record;
    memcpy(header->spec_id, names[2].spec_id.bytes, sizeof(header->spec_id));
    bkv_record_seal(record);
    bkv_slot_t slot;
    cr_assert_eq(bkv_store_reserve(store, header->tenant, length, bkv_now_ms(), &slot, NULL), BKV_OK);
    memcpy(slot.data, record, length);
    cr_assert_eq(bkv_store_adopt(store, &slot, 60000, false, bkv_now_ms(), NULL, NULL), BKV_OK);

    Balancekv__Cluster__V1__FetchRequest request = BALANCEKV__CLUSTER__V1__FETCH_REQUEST__INIT;
    request.names = rig_bytes(names, sizeof(names));
    uint8_t packed[256];
    peer_call_t call;
    peer_start(member.channel, PEER "Fetch", 0, &call);
    cr_assert(peer_send(&call, packed, balancekv__cluster__v1__fetch_request__pack(&request, packed)));
    peer_send_last(&call);
    for (uint32_t i = 0; i < 4; i++) {
        size_t message_length;
        uint8_t *message = peer_receive(&call, &message_length);
        cr_assert_not_null(message);
        Balancekv__V1__RecordChunk *chunk = balancekv__v1__record_chunk__unpack(NULL, message_length, message);
        cr_assert(chunk != NULL && chunk->index == i && chunk->boot_epoch == 4711);
        cr_assert_arr_eq(chunk->key.data, names[i].key.bytes, BKV_KEY_BYTES);
        if (i == 1) {
            cr_assert(chunk->code == GRPC_STATUS_NOT_FOUND && chunk->data.len == 0);
        } else {
            cr_assert(chunk->code == 0 && chunk->record_bytes == length && chunk->data.len == length);
            cr_assert_arr_eq(((const bkv_record_header_t *)(const void *)chunk->data.data)->spec_id, names[i].spec_id.bytes,
                             BKV_SPEC_ID_BYTES);
        }
        if (i == 2) {
            cr_assert_arr_eq(chunk->data.data, record, length);
            cr_assert(chunk->ttl_ms > 30000 && chunk->ttl_ms <= 60000);
        } else {
            cr_assert_eq(chunk->ttl_ms, 0);
        }
        balancekv__v1__record_chunk__free_unpacked(chunk, NULL);
        free(message);
    }
    cr_assert_null(peer_receive(&call, &length));
    cr_assert_eq(peer_end(&call), GRPC_STATUS_OK, "%s", call.details);
    peer_free(&call);
    free(record);
    member_close(&member);
}

Test(rpc_peer, fetch_says_which_record_is_damaged) {
    member_t member;
    member_open(&member);
    member_put(&member, 1, 1);
    bkv_name_t name = member_name(&member, 1);
    bkv_pin_t pin;
    bkv_store_t *store = member.rig.daemon.store;
    cr_assert_eq(bkv_store_pin(store, &name.spec_id, &name.key, bkv_now_ms(), &pin, NULL), BKV_OK);
    ((uint8_t *)(uintptr_t)pin.data)[500] ^= 1;
    bkv_store_unpin(store, &pin);
    Balancekv__Cluster__V1__FetchRequest request = BALANCEKV__CLUSTER__V1__FETCH_REQUEST__INIT;
    request.names = rig_bytes(&name, sizeof(name));
    grpc_status_code code;
    char text[256];
    Balancekv__V1__RecordChunk *chunk =
        peer_unary(member.channel, PEER "Fetch", &request.base, &balancekv__v1__record_chunk__descriptor, &code, text);
    cr_assert_eq(code, GRPC_STATUS_OK, "%s", text);
    cr_assert_eq(chunk->code, GRPC_STATUS_DATA_LOSS);
    balancekv__v1__record_chunk__free_unpacked(chunk, NULL);
    cr_assert_eq(rig_resident(&member.rig, 1, 1), 0);
    member_close(&member);
}

// ---- Drain ----

static Balancekv__Cluster__V1__PeerDrainResponse *drain(member_t *member, bool undo, bool ask, grpc_status_code *code) {
    Balancekv__Cluster__V1__PeerDrainRequest request = BALANCEKV__CLUSTER__V1__PEER_DRAIN_REQUEST__INIT;
    request.undo = undo;
    request.ask = ask;
    return peer_unary(member->channel, PEER "Drain", &request.base, &balancekv__cluster__v1__peer_drain_response__descriptor,
                      code, NULL);
}

Test(rpc_peer, drain_begins_and_is_taken_back) {
    member_t member;
    member_open(&member);
    const struct { bool undo, ask, draining; } steps[] = {{false, true, false}, {false, false, true}, {true, false, false}};
    grpc_status_code code;
    for (size_t i = 0; i < sizeof(steps) / sizeof(steps[0]); i++) {
        Balancekv__Cluster__V1__PeerDrainResponse *reply = drain(&member, steps[i].undo, steps[i].ask, &code);
        cr_assert_not_null(reply, "%d", code);
        cr_assert_eq(reply->draining, steps[i].draining, "%zu", i);
        cr_assert_not(reply->done);
        balancekv__cluster__v1__peer_drain_response__free_unpacked(reply, NULL);
    }
    cr_assert_null(drain(&member, true, true, &code));
    cr_assert_eq(code, GRPC_STATUS_INVALID_ARGUMENT);
    member_close(&member);
}
