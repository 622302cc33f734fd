// placing.c - see placing.h.
#include "placing.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

// ---- Put ----

static uint64_t sum_of(const uint8_t *bytes, uint64_t length) {
    uint64_t sum = 0;
    for (uint64_t i = 0; i < length; i++) {
        sum += bytes[i];
    }
    return sum;
}

typedef struct got {
    uint8_t keys[PLACING_KEYS][BKV_KEY_BYTES];
    uint64_t sums[PLACING_KEYS], missing;
    size_t count;
    bool no_session;
} got_t;

static void take_block(placing_t *placing, got_t *got, const Balancekv__V1__PutBlock *block) {
    cr_assert(got->missing == 0 && got->count < PLACING_KEYS);
    size_t i = got->count++;
    memcpy(got->keys[i], block->key.data, BKV_KEY_BYTES);
    got->missing = block->payload_bytes;
    if (block->place == NULL) {
        atomic_fetch_add(&placing->plain, 1);
        return;
    }
    cr_assert(block->place->bytes == 0 || block->place->bytes == block->payload_bytes);
    const uint8_t *memory = share_at(&placing->share, block->place, block->payload_bytes);
    if (memory == NULL || (placing->forget > 0 && atomic_fetch_sub(&placing->forget, 1) > 0)) {
        got->no_session = true;
        return;
    }
    atomic_fetch_add(&placing->placed, 1);
    placing->last_offset = block->place->offset;
    got->sums[i] = sum_of(memory, block->payload_bytes);
    got->missing = 0;
}

static void answer_put(fake_call_t *call, placing_t *placing, const got_t *got) {
    Balancekv__V1__PutResult results[PLACING_KEYS], *list[PLACING_KEYS];
    Balancekv__V1__PutResponse response = BALANCEKV__V1__PUT_RESPONSE__INIT;
    for (size_t i = 0; i < got->count; i++) {
        balancekv__v1__put_result__init(&results[i]);
        results[i].key = (ProtobufCBinaryData){.len = BKV_KEY_BYTES, .data = (uint8_t *)got->keys[i]};
        results[i].stored_bytes = got->sums[i];
        list[i] = &results[i];
        placing->sums[got->keys[i][1] % PLACING_KEYS] = got->sums[i];
    }
    response.n_results = got->count;
    response.results = list;
    response.boot_epoch = placing->epoch;
    fake_write(call, &response.base);
    fake_finish(call, GRPC_STATUS_OK, "");
}

// Ends a call as the test wants it; false: it is to be answered.
static bool ends_badly(fake_call_t *call, placing_t *placing, bool no_session) {
    if (placing->hang) {
        return true;
    }
    if (placing->break_off) {
        fake_break(call, GRPC_STATUS_UNAVAILABLE, "the connection is gone");
        return true;
    }
    if (placing->opened_at != placing->epoch) {
        fake_finish(call, GRPC_STATUS_NOT_FOUND, "spec_id: unknown");
        return true;
    }
    if (no_session) {
        fake_finish(call, GRPC_STATUS_FAILED_PRECONDITION, "place.session: not known here");
        return true;
    }
    return false;
}

static void serve_put(fake_call_t *call, placing_t *placing) {
    got_t got = {.count = 0};
    Balancekv__V1__PutRequest *request;
    atomic_fetch_add(&placing->puts, 1);
    while (!got.no_session && (request = fake_read(call, &balancekv__v1__put_request__descriptor)) != NULL) {
        if (request->block != NULL) {
            take_block(placing, &got, request->block);
        }
        cr_assert(got.no_session || request->data.len <= got.missing);
        got.missing -= request->data.len;
        got.sums[got.count - 1] += sum_of(request->data.data, request->data.len);
        balancekv__v1__put_request__free_unpacked(request, NULL);
    }
    if (got.count > 0 && !ends_badly(call, placing, got.no_session)) { // none: the client has given up already
        answer_put(call, placing, &got);
    }
}

// ---- Get ----

typedef struct room {
    uint8_t *memory;
    uint64_t offset, bytes, used;
} room_t;

static void send_lie(fake_call_t *call, placing_lie_t lie, uint32_t index, const bkv_key_t *key, const uint8_t *record,
                     size_t length, room_t *room) {
    uint8_t *at = room->memory + room->used;
    uint64_t offset = room->offset + room->used;
    memcpy(at, record, length);
    switch (lie) {
    case PLACING_BEFORE:
        offset = room->offset - 64;
        break;
    case PLACING_BEHIND:
        offset = room->offset + room->bytes + 64;
        break;
    case PLACING_ACROSS:
        offset = room->offset + (room->bytes - length / 2) / 64 * 64;
        break;
    case PLACING_OVERLAP:
        offset -= 64;
        break;
    case PLACING_UNALIGNED:
        offset += 16;
        break;
    case PLACING_FAR:
        offset = UINT64_MAX - 63;
        break;
    case PLACING_LONG:
        length += 64;
        break;
    case PLACING_SHORT:
        length -= 64;
        break;
    case PLACING_WITH_DATA:
        fake_placed(call, index, key, length, offset, record, 100);
        return;
    case PLACING_AFTER_DATA:
        fake_chunk(call, index, key, length, record, length / 2);
        break;
    case PLACING_TWICE:
        fake_placed(call, index, key, length, offset, NULL, 0);
        break;
    case PLACING_GARBAGE:
        memset(at, 0xa5, length);
        break;
    case PLACING_OTHER_KEY:
        at[offsetof(bkv_record_header_t, key)] ^= 1;
        break;
    default:
        break;
    }
    fake_placed(call, index, key, length, offset, NULL, 0);
}

static void send_record(fake_call_t *call, placing_t *placing, uint32_t index, const bkv_key_t *key, room_t *room, bool last) {
    size_t length;
    placing_lie_t lie = last ? (placing_lie_t)atomic_load(&placing->lie) : PLACING_HONEST;
    uint8_t *record = fake_record(key, PLACING_TOKENS, &length);
    if (room->memory == NULL || length > room->bytes - room->used) {
        atomic_fetch_add(&placing->plain, 1);
        fake_chunk(call, index, key, length, record, length);
    } else {
        atomic_fetch_add(&placing->placed, 1);
        send_lie(call, lie, index, key, record, length, room);
        uint64_t used = (room->used + length + 63) / 64 * 64;
        room->used = used < room->bytes ? used : room->bytes;
    }
    free(record);
}

static void serve_get(fake_call_t *call, placing_t *placing) {
    Balancekv__V1__GetRequest *request = fake_read(call, &balancekv__v1__get_request__descriptor);
    if (request == NULL) {
        return; // the client has given up already
    }
    room_t room = {.memory = NULL};
    atomic_fetch_add(&placing->gets, 1);
    bool no_session = false;
    if (request->place != NULL) {
        room.memory = share_at(&placing->share, request->place, request->place->bytes);
        room.offset = request->place->offset;
        room.bytes = request->place->bytes;
        no_session = room.memory == NULL || (placing->forget > 0 && atomic_fetch_sub(&placing->forget, 1) > 0);
        placing->last_offset = room.offset;
    }
    if (!ends_badly(call, placing, no_session)) {
        for (uint32_t i = 0; i < request->n_keys; i++) {
            bkv_key_t key;
            memcpy(key.bytes, request->keys[i].data, BKV_KEY_BYTES);
            send_record(call, placing, i, &key, &room, i + 1 == request->n_keys);
        }
        fake_finish(call, GRPC_STATUS_OK, "");
    }
    balancekv__v1__get_request__free_unpacked(request, NULL);
}

// ---- the rest ----

static void pause_ms(unsigned ms) {
    nanosleep(&(struct timespec){.tv_sec = ms / 1000, .tv_nsec = (long)(ms % 1000) * 1000000}, NULL);
}

static void serve_attach(fake_call_t *call, placing_t *placing) {
    pause_ms(placing->attach_ms);
    if (placing->no_attach || !placing->sharing) {
        atomic_fetch_add(&placing->share.attaches, 1);
        fake_finish(call, GRPC_STATUS_UNIMPLEMENTED, "shm: switched off");
    } else if (placing->busy) {
        fake_finish(call, GRPC_STATUS_UNAVAILABLE, "draining");
    } else {
        placing->share.epoch = placing->epoch;
        share_attach(call, &placing->share);
    }
}

static void serve_stats(fake_call_t *call, placing_t *placing) {
    static char *names[] = {(char *)"shm", (char *)"inline"};
    Balancekv__V1__StatsResponse response = BALANCEKV__V1__STATS_RESPONSE__INIT;
    response.boot_epoch = placing->epoch;
    response.transports = placing->not_offered ? names + 1 : names;
    response.n_transports = placing->not_offered ? 1 : 2;
    fake_write(call, &response.base);
    fake_finish(call, GRPC_STATUS_OK, "");
}

static void serve(fake_call_t *call, void *user) {
    placing_t *placing = user;
    if (fake_is(call, "Open")) {
        placing->opened_at = placing->epoch;
        fake_open_offering(call, placing->epoch, !placing->not_offered);
    } else if (fake_is(call, "Attach")) {
        serve_attach(call, placing);
    } else if (fake_is(call, "Detach")) {
        share_detach(call, &placing->share);
    } else if (fake_is(call, "Put")) {
        serve_put(call, placing);
    } else if (fake_is(call, "Get")) {
        serve_get(call, placing);
    } else {
        serve_stats(call, placing);
    }
}

void placing_start(placing_t *placing, uint64_t window) {
    *placing = (placing_t){.epoch = 1, .sharing = window > 0};
    fake_place_make(&placing->place);
    if (window > 0) {
        share_start(&placing->share, &placing->place, window);
    }
    placing->server = fake_server_start(placing->place.endpoint, serve, placing);
}

void placing_stop(placing_t *placing) {
    fake_server_stop(placing->server);
    if (placing->sharing) {
        share_stop(&placing->share);
    }
    fake_place_remove(&placing->place);
}

bkv_client_t *placing_client(placing_t *placing, const char *transport, uint64_t window_bytes, bkv_spec_id_t *id) {
    bkv_client_t *client = NULL;
    bkv_error_t err = {0};
    bkv_client_options_t options = {
        .endpoint = placing->place.endpoint, .transport = transport, .window_bytes = window_bytes, .timeout_ms = 5000};
    cr_assert(bkv_client_create(&options, &client, &err) == BKV_OK, "%s", err.message);
    bkv_spec_t spec = fake_spec();
    spec.block_tokens = PLACING_TOKENS;
    cr_assert(bkv_open(client, &spec, 0, id, NULL, &err) == BKV_OK, "%s", err.message);
    return client;
}

void placing_check(bkv_record_t *record, const bkv_key_t *key, bool in_window) {
    size_t length;
    void *expected = fake_record(key, PLACING_TOKENS, &length);
    cr_assert(record->status == BKV_OK && record->data != NULL && (uintptr_t)record->data % 64 == 0);
    cr_assert((record->owner != NULL) == in_window, "%s", in_window ? "came as data" : "came by a place");
    cr_assert(record->length == length && memcmp(record->data, expected, length) == 0);
    free(expected);
    bkv_record_free(record);
    cr_assert(record->data == NULL && record->owner == NULL);
}

bkv_status_t placing_put(bkv_client_t *client, const bkv_spec_id_t *id, const bkv_key_t *key, void *payload, size_t bytes,
                         uint8_t value, uint32_t timeout_ms, bkv_put_result_t *result, bkv_error_t *err) {
    memset(payload, value, bytes);
    bkv_put_t put = {.key = *key, .tokens = PLACING_TOKENS, .payload = payload, .payload_bytes = bytes};
    return bkv_put(client, id, &put, 1, timeout_ms, result, err);
}
