// test_ahead.c - Get, Fold, Attend, Pin, Lookup and Drop of records that are not here, but somewhere in the pool.
#include "pool.h"

#include "daemon/rpc/ahead.h"
#include "kernels/seal.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MANY (2 * BKV_AHEAD_WINDOW + 20) // keys, in three windows

static void open_pool(pool_t *pool, rig_t *rig, bool sharing) {
    pool_open(pool, rig, sharing);
    pool_add(pool, 0, MANY);
}

static void numbers_from(uint32_t first, uint32_t count, uint32_t *numbers) {
    for (uint32_t i = 0; i < count; i++) {
        numbers[i] = first + i;
    }
}

// The next chunk: of the record of that number, or with that code.
static void expect(peer_call_t *call, uint32_t index, uint32_t number, grpc_status_code code) {
    size_t length;
    uint8_t *bytes = peer_receive(call, &length);
    cr_assert_not_null(bytes, "record %u", index);
    Balancekv__V1__RecordChunk *chunk = balancekv__v1__record_chunk__unpack(NULL, length, bytes);
    free(bytes);
    cr_assert(chunk->index == index && chunk->code == (uint32_t)code, "record %u: code %u", index, chunk->code);
    if (code == GRPC_STATUS_OK) {
        float *payload = rig_payload(RIG_BLOCK, number + 1);
        cr_assert_eq(chunk->data.len, chunk->record_bytes);
        cr_assert_eq(memcmp(chunk->data.data + chunk->data.len - RIG_BLOCK, payload, RIG_BLOCK), 0, "record %u", index);
        free(payload);
    }
    balancekv__v1__record_chunk__free_unpacked(chunk, NULL);
}

static void expect_end(peer_call_t *call, grpc_status_code code) {
    size_t length;
    cr_assert_null(peer_receive(call, &length));
    cr_assert_eq(peer_end(call), code, "%s", call->details);
    peer_free(call);
}

static void get_all(rig_t *rig, const uint32_t *numbers, uint32_t count) {
    peer_call_t call;
    rig_start_get(rig, numbers, count, 20000, &call);
    for (uint32_t i = 0; i < count; i++) {
        expect(&call, i, numbers[i], GRPC_STATUS_OK);
    }
    expect_end(&call, GRPC_STATUS_OK);
    cr_assert(rig_becomes_unpinned(rig));
}

// ---- Get ----

static void windows(uint32_t delay_us) {
    pool_t pool;
    rig_t rig;
    uint32_t numbers[MANY];
    open_pool(&pool, &rig, false);
    numbers_from(0, MANY, numbers);
    atomic_store(&pool.delay_us, delay_us);
    get_all(&rig, numbers, MANY);
    cr_assert(atomic_load(&pool.fetches) == 3 && atomic_load(&pool.asked) == MANY);
    cr_assert_eq(atomic_load(&pool.longest), BKV_AHEAD_WINDOW);
    pool_close(&pool, &rig);
    cr_assert_eq(atomic_load(&pool.used), MANY);
}

Test(rpc_ahead, get_in_windows, .timeout = 60) {
    windows(0);
    windows(1);
    windows(20000);
}

Test(rpc_ahead, nobody_is_asked_for_what_is_here, .timeout = 60) {
    pool_t pool;
    rig_t rig;
    uint32_t numbers[MANY];
    open_pool(&pool, &rig, false);
    numbers_from(0, MANY, numbers);
    for (uint32_t i = 0; i < MANY; i++) {
        pool_put(&pool, i);
    }
    get_all(&rig, numbers, MANY);
    cr_assert(atomic_load(&pool.fetches) == 0 && atomic_load(&pool.used) == 0);
    peer_call_t call;
    rig_start_get(&rig, numbers, 0, 5000, &call);
    expect_end(&call, GRPC_STATUS_OK);
    pool_close(&pool, &rig);
}

Test(rpc_ahead, what_was_here_stays_and_what_came_goes, .timeout = 60) {
    pool_t pool;
    rig_t rig;
    uint32_t numbers[20];
    open_pool(&pool, &rig, false);
    numbers_from(0, 20, numbers);
    for (uint32_t i = 0; i < 20; i += 2) {
        pool_put(&pool, i);
    }
    atomic_store(&pool.delay_us, 1000);
    get_all(&rig, numbers, 20);
    for (int i = 0; i < 500 && atomic_load(&pool.used) < 10; i++) {
        usleep(10000);
    }
    bkv_store_metrics_t metrics;
    bkv_store_metrics(pool.store, &metrics);
    cr_assert(metrics.entries == 10 && metrics.copies == 0 && atomic_load(&pool.used) == 10);
    pool_close(&pool, &rig);
}

// Others are delivered all the same, and the call ends with the first code.
Test(rpc_ahead, what_cannot_be_had_says_why, .timeout = 60) {
    static const struct {
        bkv_status_t status;
        grpc_status_code code;
    } cases[] = {
        {BKV_NOT_FOUND, GRPC_STATUS_NOT_FOUND},
        {BKV_DATA_LOSS, GRPC_STATUS_DATA_LOSS},
        {BKV_BUSY, GRPC_STATUS_UNAVAILABLE},
        {BKV_DEADLINE_EXCEEDED, GRPC_STATUS_DEADLINE_EXCEEDED},
        {BKV_RESOURCE_EXHAUSTED, GRPC_STATUS_RESOURCE_EXHAUSTED},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        pool_t pool;
        rig_t rig;
        uint32_t numbers[30];
        peer_call_t call;
        open_pool(&pool, &rig, false);
        numbers_from(0, 30, numbers);
        pool.fails[7] = cases[i].status;
        pool.fails[20] = BKV_NOT_FOUND;
        atomic_store(&pool.delay_us, 500);
        rig_start_get(&rig, numbers, 30, 20000, &call);
        for (uint32_t n = 0; n < 30; n++) {
            expect(&call, n, n, n == 7 ? cases[i].code : n == 20 ? GRPC_STATUS_NOT_FOUND : GRPC_STATUS_OK);
        }
        expect_end(&call, cases[i].code);
        cr_assert(rig_becomes_unpinned(&rig));
        pool_close(&pool, &rig);
    }
}

// The store takes so many of a window and no more: the others come when those have gone, in shorter windows.
Test(rpc_ahead, what_has_no_room_is_tried_again_when_it_is_due, .timeout = 60) {
    static const uint32_t room[] = {1, 3, 40};
    for (size_t i = 0; i < 3; i++) {
        pool_t pool;
        rig_t rig;
        uint32_t numbers[MANY];
        open_pool(&pool, &rig, false);
        numbers_from(0, MANY, numbers);
        atomic_store(&pool.delay_us, 100);
        atomic_store(&pool.most, room[i]);
        get_all(&rig, numbers, MANY);
        pool_close(&pool, &rig);
    }
}

Test(rpc_ahead, a_record_that_goes_before_it_is_sent_is_missing, .timeout = 60) {
    pool_t pool;
    rig_t rig;
    uint32_t numbers[10];
    peer_call_t call;
    open_pool(&pool, &rig, false);
    numbers_from(0, 10, numbers);
    pool.vanish = true;
    atomic_store(&pool.delay_us, 100);
    rig_start_get(&rig, numbers, 10, 20000, &call);
    for (uint32_t n = 0; n < 10; n++) {
        expect(&call, n, n, GRPC_STATUS_NOT_FOUND);
    }
    expect_end(&call, GRPC_STATUS_NOT_FOUND);
    cr_assert(rig_becomes_unpinned(&rig));
    pool_close(&pool, &rig);
}

// Damaged here, it comes from others.
Test(rpc_ahead, a_damaged_record_comes_from_elsewhere, .timeout = 60) {
    pool_t pool;
    rig_t rig;
    const uint32_t numbers[] = {4, 5, 6};
    open_pool(&pool, &rig, false);
    for (uint32_t i = 4; i < 7; i++) {
        pool_put(&pool, i);
    }
    bkv_spec_id_t spec_id;
    bkv_key_t key;
    bkv_pin_t pin;
    memcpy(spec_id.bytes, rig.spec_id, sizeof(spec_id.bytes));
    rig_key(5, key.bytes);
    cr_assert_eq(bkv_store_pin_unverified(pool.store, &spec_id, &key, 0, &pin, NULL), BKV_OK);
    ((uint8_t *)(uintptr_t)pin.data)[pin.length - 1] ^= 1;
    bkv_store_unpin(pool.store, &pin);
    atomic_store(&pool.delay_us, 100);
    get_all(&rig, numbers, 3);
    cr_assert_eq(atomic_load(&pool.fetches), 1);
    pool_close(&pool, &rig);
}

Test(rpc_ahead, a_client_that_goes_away, .timeout = 60) {
    pool_t pool;
    rig_t rig;
    uint32_t numbers[MANY];
    open_pool(&pool, &rig, false);
    numbers_from(0, MANY, numbers);
    atomic_store(&pool.delay_us, 50000);
    peer_call_t call;
    rig_start_get(&rig, numbers, MANY, 20000, &call);
    usleep(10000); // the first window is on its way
    peer_cancel(&call);
    cr_assert_eq(peer_end(&call), GRPC_STATUS_CANCELLED);
    peer_free(&call);
    cr_assert(rig_reaches_open_calls(&rig, 0) && rig_becomes_unpinned(&rig));
    rig_start_get(&rig, numbers, MANY, 30, &call); // and one that has no more time
    cr_assert_eq(peer_end(&call), GRPC_STATUS_DEADLINE_EXCEEDED);
    peer_free(&call);
    cr_assert(rig_reaches_open_calls(&rig, 0) && rig_becomes_unpinned(&rig));
    pool_close(&pool, &rig);
}

Test(rpc_ahead, the_daemon_ends_meanwhile, .timeout = 60) {
    pool_t pool;
    rig_t rig;
    uint32_t numbers[MANY];
    open_pool(&pool, &rig, false);
    numbers_from(0, MANY, numbers);
    atomic_store(&pool.delay_us, 100000);
    peer_call_t call;
    rig_start_get(&rig, numbers, MANY, 20000, &call);
    usleep(20000);
    pool_close(&pool, &rig);
    peer_end(&call);
    peer_free(&call);
}

Test(rpc_ahead, to_shared_memory, .timeout = 60) {
    for (uint32_t delay_us = 0; delay_us <= 2000; delay_us += 1000) {
        pool_t pool;
        rig_t rig;
        uint32_t numbers[MANY];
        uint8_t session[BKV_SESSION_BYTES];
        open_pool(&pool, &rig, true);
        numbers_from(0, MANY, numbers);
        atomic_store(&pool.delay_us, delay_us);
        atomic_store(&pool.most, delay_us == 2000 ? 20 : 0);
        uint8_t *memory = rig_attach(&rig, 8 << 20, session);
        Balancekv__V1__Place place = BALANCEKV__V1__PLACE__INIT;
        place.session = rig_bytes(session, sizeof(session));
        place.bytes = 8 << 20;
        peer_call_t call;
        rig_start_get_to(&rig, numbers, MANY, &place, &call);
        for (uint32_t i = 0; i < MANY; i++) {
            size_t length;
            uint8_t *bytes = peer_receive(&call, &length);
            cr_assert_not_null(bytes);
            Balancekv__V1__RecordChunk *chunk = balancekv__v1__record_chunk__unpack(NULL, length, bytes);
            cr_assert(chunk->index == i && chunk->code == 0 && chunk->placed);
            float *payload = rig_payload(RIG_BLOCK, i + 1);
            const uint8_t *record = memory + chunk->place_offset;
            cr_assert_eq(memcmp(record + chunk->record_bytes - RIG_BLOCK, payload, RIG_BLOCK), 0);
            free(payload);
            free(bytes);
            balancekv__v1__record_chunk__free_unpacked(chunk, NULL);
        }
        expect_end(&call, GRPC_STATUS_OK);
        cr_assert(rig_becomes_unpinned(&rig));
        pool_close(&pool, &rig);
    }
}

// ---- calls over keys ----

typedef struct keys {
    uint8_t keys[16][BKV_KEY_BYTES];
    ProtobufCBinaryData fields[16];
} keys_t;

static void keys_from(keys_t *keys, uint32_t first, uint32_t count) {
    for (uint32_t i = 0; i < count; i++) {
        rig_key(first + i, keys->keys[i]);
        keys->fields[i] = rig_bytes(keys->keys[i], BKV_KEY_BYTES);
    }
}

static grpc_status_code attend(rig_t *rig, uint32_t first, uint32_t count, char text[256]) {
    keys_t keys;
    float q[RIG_HEADS * RIG_DIM] = {0};
    keys_from(&keys, first, count);
    Balancekv__V1__AttendRequest request = BALANCEKV__V1__ATTEND_REQUEST__INIT;
    request.spec_id = rig_bytes(rig->spec_id, BKV_SPEC_ID_BYTES);
    request.n_keys = count;
    request.keys = keys.fields;
    request.query_heads = RIG_HEADS;
    request.queries = 1;
    request.q = rig_bytes(q, sizeof(q));
    grpc_status_code code;
    Balancekv__V1__AttendResponse *reply =
        peer_unary(rig->channel, "Attend", &request.base, &balancekv__v1__attend_response__descriptor, &code, text);
    if (reply != NULL) {
        balancekv__v1__attend_response__free_unpacked(reply, NULL);
    }
    return code;
}

static grpc_status_code pin(rig_t *rig, uint32_t first, uint32_t count, char text[256]) {
    keys_t keys;
    keys_from(&keys, first, count);
    Balancekv__V1__PinRequest request = BALANCEKV__V1__PIN_REQUEST__INIT;
    request.spec_id = rig_bytes(rig->spec_id, BKV_SPEC_ID_BYTES);
    request.n_keys = count;
    request.keys = keys.fields;
    request.ttl_ms = 60000;
    grpc_status_code code;
    Balancekv__V1__PinResponse *reply =
        peer_unary(rig->channel, "Pin", &request.base, &balancekv__v1__pin_response__descriptor, &code, text);
    if (reply != NULL) {
        balancekv__v1__pin_response__free_unpacked(reply, NULL);
    }
    return code;
}

static grpc_status_code fold(rig_t *rig, uint32_t first, uint32_t count, uint64_t budget, char text[256]) {
    keys_t keys;
    keys_from(&keys, first, count);
    Balancekv__V1__FoldRequest request = BALANCEKV__V1__FOLD_REQUEST__INIT;
    request.spec_id = rig_bytes(rig->spec_id, BKV_SPEC_ID_BYTES);
    request.n_keys = count;
    request.keys = keys.fields;
    request.budget_bytes = budget;
    uint8_t packed[1024];
    cr_assert_leq(balancekv__v1__fold_request__get_packed_size(&request), sizeof(packed));
    size_t length = balancekv__v1__fold_request__pack(&request, packed);
    peer_call_t call;
    peer_start(rig->channel, "Fold", 20000, &call);
    cr_assert(peer_send(&call, packed, length));
    peer_send_last(&call);
    uint8_t *bytes;
    while ((bytes = peer_receive(&call, &length)) != NULL) {
        free(bytes);
    }
    grpc_status_code code = peer_end(&call);
    snprintf(text, 256, "%s", call.details);
    peer_free(&call);
    return code;
}

static uint64_t copies(const pool_t *pool) {
    bkv_store_metrics_t metrics;
    bkv_store_metrics(pool->store, &metrics);
    return metrics.copies;
}

Test(rpc_ahead, attend_and_pin_bring_all, .timeout = 60) {
    for (uint32_t delay_us = 0; delay_us <= 1000; delay_us += 1000) {
        pool_t pool;
        rig_t rig;
        char text[256];
        open_pool(&pool, &rig, false);
        atomic_store(&pool.delay_us, delay_us);
        pool_put(&pool, 2);
        cr_assert_eq(attend(&rig, 0, 8, text), GRPC_STATUS_OK, "%s", text);
        cr_assert(rig_becomes_unpinned(&rig));
        cr_assert(copies(&pool) == 0 && atomic_load(&pool.used) == 7);
        cr_assert_eq(pin(&rig, 0, 8, text), GRPC_STATUS_OK, "%s", text);
        cr_assert_eq(attend(&rig, 0, 8, text), GRPC_STATUS_OK, "all of it is here");
        cr_assert(rig_becomes_unpinned(&rig));
        cr_assert(copies(&pool) == 7 && atomic_load(&pool.fetches) == 2);
        pool.fails[12] = BKV_BUSY;
        cr_assert_eq(attend(&rig, 10, 5, text), GRPC_STATUS_UNAVAILABLE);
        cr_assert_eq(strncmp(text, "keys[2]: ", 9), 0, "%s", text);
        pool.fails[12] = BKV_NOT_FOUND;
        cr_assert_eq(pin(&rig, 10, 5, text), GRPC_STATUS_NOT_FOUND);
        cr_assert_eq(strncmp(text, "keys[2]: ", 9), 0, "%s", text);
        cr_assert(rig_becomes_unpinned(&rig));
        pool_close(&pool, &rig);
    }
}

// Its own record is here without its parts: nobody is asked.
Test(rpc_ahead, fold_brings_its_parts_when_it_needs_them, .timeout = 60) {
    for (uint32_t delay_us = 0; delay_us <= 1000; delay_us += 1000) {
        pool_t pool;
        rig_t rig;
        char text[256];
        open_pool(&pool, &rig, false);
        atomic_store(&pool.delay_us, delay_us);
        cr_assert_eq(fold(&rig, 3, 1, RIG_BLOCK / 4, text), GRPC_STATUS_OK, "%s", text);
        cr_assert(rig_becomes_unpinned(&rig));
        cr_assert(copies(&pool) == 0 && atomic_load(&pool.fetches) == 1 && atomic_load(&pool.used) == 1);
        cr_assert_eq(fold(&rig, 3, 1, RIG_BLOCK / 4, text), GRPC_STATUS_OK, "%s", text);
        cr_assert_eq(atomic_load(&pool.fetches), 1);
        pool.fails[4] = BKV_DATA_LOSS;
        cr_assert_eq(fold(&rig, 4, 1, RIG_BLOCK / 4, text), GRPC_STATUS_DATA_LOSS);
        cr_assert_eq(strncmp(text, "keys[0]: ", 9), 0, "%s", text);
        pool.vanish = true; // forgotten while it is folded: missing, and not looked for for ever
        cr_assert_eq(fold(&rig, 5, 1, RIG_BLOCK / 4, text), GRPC_STATUS_NOT_FOUND, "%s", text);
        cr_assert(rig_becomes_unpinned(&rig));
        pool_close(&pool, &rig);
    }
}

Test(rpc_ahead, lookup_and_drop_answer_for_all, .timeout = 60) {
    pool_t pool;
    rig_t rig;
    pool_open(&pool, &rig, false);
    pool_add(&pool, 10, 5);
    pool_put(&pool, 8);
    pool_put(&pool, 9);
    cr_assert_eq(rig_resident(&rig, 8, 20), 7);
    keys_t keys;
    keys_from(&keys, 9, 16);
    Balancekv__V1__DropRequest request = BALANCEKV__V1__DROP_REQUEST__INIT;
    request.spec_id = rig_bytes(rig.spec_id, BKV_SPEC_ID_BYTES);
    request.n_keys = 16;
    request.keys = keys.fields;
    grpc_status_code code;
    char text[256];
    Balancekv__V1__DropResponse *reply =
        peer_unary(rig.channel, "Drop", &request.base, &balancekv__v1__drop_response__descriptor, &code, text);
    cr_assert_eq(code, GRPC_STATUS_OK, "%s", text);
    cr_assert_eq(reply->dropped, 6);
    balancekv__v1__drop_response__free_unpacked(reply, NULL);
    cr_assert_eq(rig_resident(&rig, 8, 20), 1);
    cr_assert_eq(rig_resident(&rig, 8, 0), 0);
    pool_close(&pool, &rig);
}
