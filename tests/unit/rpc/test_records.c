// test_records.c - records of Get and Fold that go to shared memory: packed in order, the rest inline, damage in its place.
#include "rig.h"

#include "daemon/rpc/records.h"

#include "kernels/seal.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define RECORDS 4
#define ROOM    ((size_t)1 << 20)

typedef struct shared {
    rig_t rig;
    bkv_transports_t *sharing;
    uint8_t *memory;
    uint8_t session[BKV_SESSION_BYTES];
    Balancekv__V1__Place place; // all of the memory
    uint64_t length;            // of each record
    peer_call_t call;
} shared_t;

// RECORDS raw blocks under the keys 0, 1, ...
static void shared_open(shared_t *shared) {
    rig_open_sharing(&shared->rig);
    shared->sharing = shared->rig.config.transports;
    shared->memory = rig_attach(&shared->rig, ROOM, shared->session);
    balancekv__v1__place__init(&shared->place);
    shared->place.session = rig_bytes(shared->session, sizeof(shared->session));
    shared->place.bytes = ROOM;
    for (uint32_t i = 0; i < RECORDS; i++) {
        float *payload = rig_payload(RIG_BLOCK, i + 1);
        rig_put(&shared->rig, i, RIG_TOKENS, payload, RIG_BLOCK);
        free(payload);
    }
}

static const uint32_t all[RECORDS] = {0, 1, 2, 3};

static Balancekv__V1__RecordChunk *receive(shared_t *shared, uint32_t index) {
    size_t length;
    uint8_t *bytes = peer_receive(&shared->call, &length);
    cr_assert_not_null(bytes);
    Balancekv__V1__RecordChunk *chunk = balancekv__v1__record_chunk__unpack(NULL, length, bytes);
    free(bytes);
    cr_assert_eq(chunk->index, index);
    return chunk;
}

static void assert_record(const void *record, uint64_t length, uint32_t number) {
    uint8_t key[BKV_KEY_BYTES];
    rig_key(number, key);
    float *payload = rig_payload(RIG_BLOCK, number + 1);
    cr_assert_eq(bkv_record_verify(record, length, NULL), BKV_OK);
    cr_assert_arr_eq(((const bkv_record_header_t *)record)->key, key, sizeof(key));
    cr_assert_eq(memcmp((const uint8_t *)record + length - RIG_BLOCK, payload, RIG_BLOCK), 0);
    free(payload);
}

// The next chunk says that record `number` lies at the offset; returns where the one after it would.
static uint64_t expect_placed(shared_t *shared, uint32_t index, uint32_t number, uint64_t offset) {
    Balancekv__V1__RecordChunk *chunk = receive(shared, index);
    cr_assert(chunk->code == 0 && chunk->placed && chunk->data.len == 0 && chunk->boot_epoch == 4711);
    cr_assert_eq(chunk->place_offset, offset);
    cr_assert_eq(chunk->key.len, BKV_KEY_BYTES);
    assert_record(shared->memory + offset, chunk->record_bytes, number);
    offset += (chunk->record_bytes + 63) / 64 * 64;
    shared->length = chunk->record_bytes;
    balancekv__v1__record_chunk__free_unpacked(chunk, NULL);
    return offset;
}

static void expect_inline(shared_t *shared, uint32_t index, uint32_t number) {
    Balancekv__V1__RecordChunk *chunk = receive(shared, index);
    cr_assert(chunk->code == 0 && !chunk->placed && chunk->place_offset == 0);
    cr_assert_eq(chunk->record_bytes, chunk->data.len);
    uint8_t *copy = aligned_alloc(64, (chunk->data.len + 63) / 64 * 64);
    memcpy(copy, chunk->data.data, chunk->data.len);
    assert_record(copy, chunk->data.len, number);
    free(copy);
    balancekv__v1__record_chunk__free_unpacked(chunk, NULL);
}

static void expect_code(shared_t *shared, uint32_t index, grpc_status_code code) {
    Balancekv__V1__RecordChunk *chunk = receive(shared, index);
    cr_assert(chunk->code == (uint32_t)code && !chunk->placed && chunk->data.len == 0);
    balancekv__v1__record_chunk__free_unpacked(chunk, NULL);
}

static void expect_end(shared_t *shared, grpc_status_code code) {
    size_t length;
    cr_assert_null(peer_receive(&shared->call, &length));
    cr_assert_eq(peer_end(&shared->call), code, "%s", shared->call.details);
    peer_free(&shared->call);
}

Test(rpc_records, records_are_packed_one_after_the_other) {
    shared_t shared;
    shared_open(&shared);
    shared.place.offset = 640;
    shared.place.bytes = ROOM - 640;
    const uint32_t numbers[] = {2, 0, 2, 1};
    rig_start_get_to(&shared.rig, numbers, 4, &shared.place, &shared.call);
    uint64_t at = 640;
    for (uint32_t i = 0; i < 4; i++) {
        at = expect_placed(&shared, i, numbers[i], at);
    }
    expect_end(&shared, GRPC_STATUS_OK);
    cr_assert(rig_becomes_unpinned(&shared.rig));
    rig_close(&shared.rig);
}

Test(rpc_records, several_are_moved_at_a_time_and_told_in_order) {
    enum { MANY = 3 * BKV_RECORDS_AHEAD };
    shared_t shared;
    shared_open(&shared);
    sharing_order(shared.sharing, (sharing_orders_t){.late = true});
    uint32_t numbers[MANY];
    for (uint32_t i = 0; i < MANY; i++) {
        numbers[i] = i % RECORDS;
    }
    rig_start_get_to(&shared.rig, numbers, MANY, &shared.place, &shared.call);
    cr_assert(sharing_waits_for(shared.sharing, BKV_RECORDS_AHEAD));
    cr_assert_eq(peer_daemon_pinned(&shared.rig.daemon), BKV_RECORDS_AHEAD);
    sharing_let_go(shared.sharing); // the last of them first
    uint64_t at = 0;
    for (uint32_t i = 0; i < MANY; i++) {
        at = expect_placed(&shared, i, numbers[i], at);
    }
    expect_end(&shared, GRPC_STATUS_OK);
    cr_assert(rig_becomes_unpinned(&shared.rig));
    rig_close(&shared.rig);
}

Test(rpc_records, what_does_not_fit_comes_inline) {
    shared_t shared;
    shared_open(&shared);
    rig_start_get_to(&shared.rig, all, 1, &shared.place, &shared.call);
    expect_placed(&shared, 0, 0, 0);
    expect_end(&shared, GRPC_STATUS_OK);
    const uint64_t aligned = (shared.length + 63) / 64 * 64;
    const struct {
        uint64_t bytes;
        uint32_t placed; // of three records
    } rooms[] = {
        {0, 0}, {shared.length - 1, 0}, {shared.length, 1}, {aligned + shared.length - 1, 1}, {aligned + shared.length, 2}};
    for (size_t i = 0; i < sizeof(rooms) / sizeof(rooms[0]); i++) {
        shared.place.bytes = rooms[i].bytes;
        memset(shared.memory, 0xee, ROOM);
        rig_start_get_to(&shared.rig, all, 3, &shared.place, &shared.call);
        uint64_t at = 0;
        for (uint32_t n = 0; n < 3; n++) {
            if (n < rooms[i].placed) {
                at = expect_placed(&shared, n, n, at);
            } else {
                expect_inline(&shared, n, n);
            }
        }
        expect_end(&shared, GRPC_STATUS_OK);
        for (uint64_t byte = rooms[i].bytes; byte < ROOM; byte++) {
            cr_assert_eq(shared.memory[byte], 0xee, "byte %zu is outside of the room", (size_t)byte);
        }
    }
    rig_close(&shared.rig);
}

// The bytes of a resident record, to be damaged as a stray write would.
static void damage(shared_t *shared, uint32_t number) {
    bkv_spec_id_t spec_id;
    bkv_key_t key;
    memcpy(spec_id.bytes, shared->rig.spec_id, sizeof(spec_id.bytes));
    rig_key(number, key.bytes);
    bkv_pin_t pin;
    cr_assert_eq(bkv_store_pin_unverified(shared->rig.daemon.store, &spec_id, &key, 0, &pin, NULL), BKV_OK);
    ((uint8_t *)(uintptr_t)pin.data)[pin.length / 2] ^= 1;
    bkv_store_unpin(shared->rig.daemon.store, &pin);
}

Test(rpc_records, a_damaged_record_is_told_in_its_place) {
    for (int inline_too = 0; inline_too < 2; inline_too++) {
        shared_t shared;
        shared_open(&shared);
        shared.place.bytes = inline_too ? 64 : ROOM;
        damage(&shared, 1);
        rig_start_get_to(&shared.rig, all, 3, &shared.place, &shared.call);
        if (inline_too) {
            expect_inline(&shared, 0, 0);
            expect_code(&shared, 1, GRPC_STATUS_DATA_LOSS);
            expect_inline(&shared, 2, 2);
        } else {
            uint64_t at = expect_placed(&shared, 0, 0, 0);
            expect_code(&shared, 1, GRPC_STATUS_DATA_LOSS);
            expect_placed(&shared, 2, 2, 2 * at); // its room was taken by then
        }
        expect_end(&shared, GRPC_STATUS_DATA_LOSS);
        cr_assert_eq(rig_resident(&shared.rig, 0, 3), 2);
        rig_close(&shared.rig);
    }
}

Test(rpc_records, a_missing_key_beside_placed_ones) {
    shared_t shared;
    shared_open(&shared);
    const uint32_t numbers[] = {0, 77, 1};
    rig_start_get_to(&shared.rig, numbers, 3, &shared.place, &shared.call);
    uint64_t at = expect_placed(&shared, 0, 0, 0);
    expect_code(&shared, 1, GRPC_STATUS_NOT_FOUND);
    expect_placed(&shared, 2, 1, at);
    expect_end(&shared, GRPC_STATUS_NOT_FOUND);
    rig_close(&shared.rig);
}

Test(rpc_records, a_busy_transport_sends_inline_a_broken_one_ends_the_call) {
    shared_t shared;
    shared_open(&shared);
    sharing_order(shared.sharing, (sharing_orders_t){.busy = 1});
    rig_start_get_to(&shared.rig, all, 2, &shared.place, &shared.call);
    expect_inline(&shared, 0, 0);
    expect_placed(&shared, 1, 1, 0);
    expect_end(&shared, GRPC_STATUS_OK);
    sharing_order(shared.sharing, (sharing_orders_t){.end = BKV_INTERNAL});
    rig_start_get_to(&shared.rig, all, 2, &shared.place, &shared.call);
    expect_end(&shared, GRPC_STATUS_INTERNAL);
    sharing_order(shared.sharing, (sharing_orders_t){.start = BKV_FAILED_PRECONDITION});
    rig_start_get_to(&shared.rig, all, 2, &shared.place, &shared.call);
    expect_end(&shared, GRPC_STATUS_FAILED_PRECONDITION);
    cr_assert(rig_becomes_unpinned(&shared.rig));
    rig_close(&shared.rig);
}

Test(rpc_records, a_call_given_up_keeps_its_records_until_the_transport_lets_go) {
    shared_t shared;
    shared_open(&shared);
    sharing_order(shared.sharing, (sharing_orders_t){.late = true});
    rig_start_get_to(&shared.rig, all, RECORDS, &shared.place, &shared.call);
    cr_assert(sharing_waits_for(shared.sharing, RECORDS));
    peer_cancel(&shared.call);
    cr_assert_eq(peer_end(&shared.call), GRPC_STATUS_CANCELLED);
    peer_free(&shared.call);
    usleep(100000);
    cr_assert_eq(bkv_server_open_calls(shared.rig.daemon.server), 1);
    cr_assert_eq(peer_daemon_pinned(&shared.rig.daemon), RECORDS);
    sharing_let_go(shared.sharing);
    cr_assert(rig_reaches_open_calls(&shared.rig, 0));
    cr_assert(rig_becomes_unpinned(&shared.rig));
    rig_close(&shared.rig);
}

Test(rpc_records, a_room_that_is_none_is_named) {
    shared_t shared;
    shared_open(&shared);
    Balancekv__V1__DeviceLayout layout = BALANCEKV__V1__DEVICE_LAYOUT__INIT;
    const struct {
        uint64_t offset, bytes;
        bool layout;
        const char *message;
    } cases[] = {
        {32, 0, false, "place.offset: 32"},
        {64, ROOM, false, "place.bytes: past the session's end"},
        {64, UINT64_MAX, false, "place.bytes: 18446744073709551615 from 64 on"},
        {0, 0, true, "place.layout: only payloads"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        shared.place.offset = cases[i].offset;
        shared.place.bytes = cases[i].bytes;
        shared.place.layout = cases[i].layout ? &layout : NULL;
        rig_start_get_to(&shared.rig, all, 1, &shared.place, &shared.call);
        cr_assert_eq(peer_end(&shared.call), GRPC_STATUS_INVALID_ARGUMENT);
        cr_assert_eq(strncmp(shared.call.details, cases[i].message, strlen(cases[i].message)), 0, "%s", shared.call.details);
        peer_free(&shared.call);
    }
    rig_close(&shared.rig);
}

// ---- Fold ----

static void start_fold(shared_t *shared, bool no_data) {
    uint8_t keys[2][BKV_KEY_BYTES];
    ProtobufCBinaryData fields[2];
    for (uint32_t i = 0; i < 2; i++) {
        rig_key(i, keys[i]);
        fields[i] = rig_bytes(keys[i], BKV_KEY_BYTES);
    }
    Balancekv__V1__FoldRequest request = BALANCEKV__V1__FOLD_REQUEST__INIT;
    request.spec_id = rig_bytes(shared->rig.spec_id, BKV_SPEC_ID_BYTES);
    request.n_keys = 2;
    request.keys = fields;
    request.rate = 4;
    request.no_data = no_data;
    request.place = &shared->place;
    uint8_t packed[512];
    size_t length = balancekv__v1__fold_request__pack(&request, packed);
    peer_start(shared->rig.channel, "Fold", 0, &shared->call);
    peer_send(&shared->call, packed, length);
    peer_send_last(&shared->call);
}

// Consecutive blocks, as a fold wants them.
static void put_pair(shared_t *shared) {
    for (uint32_t i = 0; i < 2; i++) {
        uint8_t key[BKV_KEY_BYTES];
        rig_key(i, key);
        float *payload = rig_payload(RIG_BLOCK, i + 1);
        Balancekv__V1__PutBlock block = BALANCEKV__V1__PUT_BLOCK__INIT;
        block.spec_id = rig_bytes(shared->rig.spec_id, BKV_SPEC_ID_BYTES);
        block.key = rig_bytes(key, sizeof(key));
        block.position = (uint64_t)i * RIG_TOKENS;
        block.tokens = RIG_TOKENS;
        block.payload_bytes = RIG_BLOCK;
        peer_start(shared->rig.channel, "Put", 0, &shared->call);
        cr_assert(rig_send_block(&shared->call, &block, payload, RIG_BLOCK));
        peer_send_last(&shared->call);
        size_t length;
        free(peer_receive(&shared->call, &length));
        expect_end(shared, GRPC_STATUS_OK);
        free(payload);
    }
}

Test(rpc_records, a_fold_goes_to_the_room_and_without_data_nowhere) {
    shared_t shared;
    rig_open_sharing(&shared.rig);
    shared.sharing = shared.rig.config.transports;
    shared.memory = rig_attach(&shared.rig, ROOM, shared.session);
    balancekv__v1__place__init(&shared.place);
    shared.place.session = rig_bytes(shared.session, sizeof(shared.session));
    shared.place.bytes = ROOM;
    put_pair(&shared);
    start_fold(&shared, true);
    Balancekv__V1__RecordChunk *chunk = receive(&shared, 0);
    uint64_t length = chunk->record_bytes;
    cr_assert(!chunk->placed && chunk->data.len == 0 && chunk->code == 0 && length > 0);
    balancekv__v1__record_chunk__free_unpacked(chunk, NULL);
    expect_end(&shared, GRPC_STATUS_OK);
    start_fold(&shared, false);
    chunk = receive(&shared, 0);
    cr_assert(chunk->placed && chunk->record_bytes == length && chunk->place_offset == 0 && chunk->key.len == BKV_KEY_BYTES);
    cr_assert_eq(bkv_record_verify(shared.memory, length, NULL), BKV_OK);
    balancekv__v1__record_chunk__free_unpacked(chunk, NULL);
    expect_end(&shared, GRPC_STATUS_OK);
    cr_assert(rig_becomes_unpinned(&shared.rig));
    rig_close(&shared.rig);
}
