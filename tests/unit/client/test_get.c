// Get and Fold: records put together and checked, from honest servers and from all kinds of liars.
#include "fake.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

// ---- an honest server: keys {1, n} have records of n tokens, others are not there ----

static void send_missing(fake_call_t *call, uint32_t index, grpc_status_code code, const char *message) {
    Balancekv__V1__RecordChunk chunk = BALANCEKV__V1__RECORD_CHUNK__INIT;
    chunk.index = index;
    chunk.code = code;
    chunk.message = (char *)message;
    fake_write(call, &chunk.base);
}

static void send_record(fake_call_t *call, uint32_t index, const bkv_key_t *key) {
    size_t length;
    uint8_t *record = fake_record(key, key->bytes[1], &length);
    for (size_t at = 0; at < length; at += 1000) {
        size_t step = length - at < 1000 ? length - at : 1000;
        fake_chunk(call, index, at == 0 ? key : NULL, at == 0 ? length : 0, record + at, step);
    }
    free(record);
}

static void serve_honestly(fake_call_t *call, void *user) {
    (void)user;
    grpc_status_code code = GRPC_STATUS_OK;
    Balancekv__V1__GetRequest *request = fake_read(call, &balancekv__v1__get_request__descriptor);
    for (uint32_t i = 0; i < request->n_keys; i++) {
        bkv_key_t key;
        memcpy(key.bytes, request->keys[i].data, BKV_KEY_BYTES);
        if (key.bytes[0] == 1) {
            send_record(call, i, &key);
        } else {
            grpc_status_code why = key.bytes[0] == 2 ? GRPC_STATUS_NOT_FOUND : GRPC_STATUS_DATA_LOSS;
            send_missing(call, i, why, why == GRPC_STATUS_NOT_FOUND ? "key: not resident" : "record: checksum");
            code = code == GRPC_STATUS_OK ? why : code;
        }
    }
    balancekv__v1__get_request__free_unpacked(request, NULL);
    fake_finish(call, code, code == GRPC_STATUS_OK ? "" : "some are missing");
}

static void assert_record(bkv_record_t *record, uint32_t tokens) {
    size_t length;
    void *expected = fake_record(&record->key, tokens, &length);
    cr_assert(record->status == BKV_OK && record->data != NULL && (uintptr_t)record->data % 64 == 0);
    cr_assert(record->length == length && memcmp(record->data, expected, length) == 0);
    free(expected);
    bkv_record_free(record);
    cr_assert(record->data == NULL);
}

Test(get, records_and_holes) {
    fake_place_t place;
    fake_place_make(&place);
    fake_server_t *server = fake_server_start(place.endpoint, serve_honestly, NULL);
    bkv_client_t *client = fake_client(&place, 0);
    bkv_spec_id_t id = fake_spec_id();
    bkv_key_t keys[5] = {fake_key(1, 16), fake_key(1, 1), fake_key(3, 0), fake_key(2, 0), fake_key(1, 7)};
    bkv_record_t records[5];
    bkv_error_t err = {0};
    cr_assert(bkv_get(client, &id, keys, 2, NULL, 0, records, &err) == BKV_OK, "%s", err.message);
    assert_record(&records[0], 16);
    assert_record(&records[1], 1);
    cr_assert(bkv_get(client, &id, keys, 5, NULL, 0, records, &err) == BKV_DATA_LOSS);
    cr_assert(strcmp(err.message, "keys[2]: record: checksum") == 0, "%s", err.message);
    assert_record(&records[0], 16);
    assert_record(&records[1], 1);
    assert_record(&records[4], 7);
    cr_assert(records[2].status == BKV_DATA_LOSS && records[2].data == NULL);
    cr_assert(records[3].status == BKV_NOT_FOUND && records[3].data == NULL);
    cr_assert(memcmp(&records[3].key, &keys[3], sizeof keys[3]) == 0);
    cr_assert(bkv_get(client, &id, keys, 0, NULL, 0, records, NULL) == BKV_INVALID_ARGUMENT);
    bkv_client_destroy(client);
    fake_server_stop(server);
    fake_place_remove(&place);
}

Test(get, nobody_answers) {
    fake_place_t place;
    fake_place_make(&place);
    bkv_client_t *client = fake_client(&place, 0);
    bkv_spec_id_t id = fake_spec_id();
    bkv_key_t keys[2] = {fake_key(1, 16), fake_key(1, 1)};
    bkv_record_t records[2];
    cr_assert(bkv_get(client, &id, keys, 2, NULL, 1000, records, NULL) == BKV_BUSY);
    for (size_t i = 0; i < 2; i++) {
        cr_assert(records[i].status == BKV_BUSY && records[i].data == NULL && records[i].length == 0);
        cr_assert(memcmp(&records[i].key, &keys[i], sizeof keys[i]) == 0);
    }
    bkv_client_destroy(client);
    fake_place_remove(&place);
}

// ---- liars: each has one honest record of two, and a lie about the other ----

typedef enum lie {
    TOO_SHORT,
    TOO_LONG,
    HUGE,
    TINY,
    NO_LENGTH,
    WRONG_KEY,
    NO_KEY,
    INDEX_BEYOND,
    INDEX_BACK,
    INTERLEAVED,
    EMPTY_CHUNKS,
    ENDLESS,
    NOT_A_CHUNK,
    GIVEN_UP,
    LEFT_OUT,
    NOTHING,
    BAD_CHECKSUM,
    BAD_RECORD,
    OTHER_SPEC,
    OTHER_KEY_INSIDE,
    WRONG_RANGE,
    LIES
} lie_t;

static const struct {
    bkv_status_t status;
    const char *message;
} expected[LIES] = {
    [TOO_SHORT] = {BKV_INTERNAL, "never came"},
    [TOO_LONG] = {BKV_INTERNAL, "data:"},
    [HUGE] = {BKV_INTERNAL, "record_bytes:"},
    [TINY] = {BKV_INTERNAL, "record_bytes:"},
    [NO_LENGTH] = {BKV_INTERNAL, "record_bytes:"},
    [WRONG_KEY] = {BKV_INTERNAL, "key:"},
    [NO_KEY] = {BKV_INTERNAL, "key:"},
    [INDEX_BEYOND] = {BKV_INTERNAL, "index:"},
    [INDEX_BACK] = {BKV_INTERNAL, "index:"},
    [INTERLEAVED] = {BKV_INTERNAL, "index:"},
    [EMPTY_CHUNKS] = {BKV_INTERNAL, "data:"},
    [ENDLESS] = {BKV_INTERNAL, "data:"},
    [NOT_A_CHUNK] = {BKV_INTERNAL, "not a RecordChunk"},
    [GIVEN_UP] = {BKV_INTERNAL, "half-way"},
    [LEFT_OUT] = {BKV_INTERNAL, "never came"},
    [NOTHING] = {BKV_INTERNAL, "never came"},
    [BAD_CHECKSUM] = {BKV_DATA_LOSS, "record 1"},
    [BAD_RECORD] = {BKV_DATA_LOSS, "record 1"},
    [OTHER_SPEC] = {BKV_DATA_LOSS, "spec_id:"},
    [OTHER_KEY_INSIDE] = {BKV_DATA_LOSS, "key:"},
    [WRONG_RANGE] = {BKV_DATA_LOSS, "layers"},
};

static void damage(uint8_t *record, size_t length, lie_t lie) {
    bkv_record_header_t *header = (bkv_record_header_t *)record;
    switch (lie) {
    case BAD_CHECKSUM:
        record[length - 1] ^= 1;
        return;
    case BAD_RECORD:
        header->magic ^= 1;
        break;
    case OTHER_SPEC:
        header->spec_id[3] ^= 1;
        break;
    case OTHER_KEY_INSIDE:
        header->key[3] ^= 1;
        break;
    case WRONG_RANGE:
        header->first_layer = 1;
        header->flags |= BKV_RECORD_SLICE;
        break;
    default:
        return;
    }
    bkv_record_seal(record);
}

static void tell(fake_call_t *call, lie_t lie, const bkv_key_t *key, uint8_t *record, size_t length) {
    bkv_key_t other = fake_key(9, 9);
    switch (lie) {
    case TOO_SHORT:
        fake_chunk(call, 1, key, length, record, length - 1);
        break;
    case TOO_LONG:
        fake_chunk(call, 1, key, length - 1, record, length);
        break;
    case HUGE:
        fake_chunk(call, 1, key, 1ull << 40, record, length);
        break;
    case TINY:
        fake_chunk(call, 1, key, 127, record, 127);
        break;
    case NO_LENGTH:
        fake_chunk(call, 1, key, 0, record, length);
        break;
    case WRONG_KEY:
        fake_chunk(call, 1, &other, length, record, length);
        break;
    case NO_KEY:
        fake_chunk(call, 1, NULL, length, record, length);
        break;
    case INDEX_BEYOND:
        fake_chunk(call, 2, key, length, record, length);
        break;
    case INDEX_BACK:
        fake_chunk(call, 0, key, length, record, length);
        break;
    case INTERLEAVED:
        fake_chunk(call, 1, key, length, record, 200);
        fake_chunk(call, 2, key, length, record, 200);
        break;
    case EMPTY_CHUNKS:
        fake_chunk(call, 1, key, length, record, 200);
        while (fake_chunk(call, 1, NULL, 0, NULL, 0)) {
        }
        break;
    case ENDLESS:
        fake_chunk(call, 1, key, length, record, 200);
        while (fake_chunk(call, 1, NULL, 0, record, 200)) {
        }
        break;
    case NOT_A_CHUNK:
        fake_write_bytes(call,
                         "\x0a\x50"
                         "abc",
                         5);
        break;
    case GIVEN_UP:
        fake_chunk(call, 1, key, length, record, 200);
        send_missing(call, 1, GRPC_STATUS_DATA_LOSS, "lost on the way");
        break;
    default:
        fake_chunk(call, 1, key, length, record, length);
        break;
    }
}

static void serve_dishonestly(fake_call_t *call, void *user) {
    lie_t lie = (lie_t)atomic_load((atomic_int *)user);
    Balancekv__V1__GetRequest *request = fake_read(call, &balancekv__v1__get_request__descriptor);
    bkv_key_t keys[2];
    for (size_t i = 0; i < 2; i++) {
        memcpy(keys[i].bytes, request->keys[i].data, BKV_KEY_BYTES);
    }
    balancekv__v1__get_request__free_unpacked(request, NULL);
    if (lie != NOTHING) {
        send_record(call, 0, &keys[0]);
    }
    if (lie != LEFT_OUT && lie != NOTHING) {
        size_t length;
        uint8_t *record = fake_record(&keys[1], 4, &length);
        damage(record, length, lie);
        tell(call, lie, &keys[1], record, length);
        free(record);
    }
    fake_finish(call, GRPC_STATUS_OK, "");
}

Test(get, liars) {
    fake_place_t place;
    atomic_int told = 0;
    fake_place_make(&place);
    fake_server_t *server = fake_server_start(place.endpoint, serve_dishonestly, &told);
    bkv_client_t *client = fake_client(&place, 0);
    bkv_spec_id_t id = fake_spec_id();
    bkv_key_t keys[2] = {fake_key(1, 3), fake_key(1, 4)};
    for (lie_t lie = TOO_SHORT; lie < LIES; lie++) {
        told = (int)lie;
        bkv_record_t records[2];
        bkv_error_t err = {0};
        cr_assert(bkv_get(client, &id, keys, 2, NULL, 0, records, &err) == expected[lie].status, "lie %d: %s", lie,
                  err.message);
        cr_assert(strstr(err.message, expected[lie].message) != NULL, "lie %d: %s", lie, err.message);
        if (lie != NOTHING) {
            assert_record(&records[0], 3); // what is good is handed over
        }
        cr_assert(records[1].status == expected[lie].status && records[1].data == NULL, "lie %d", lie);
    }
    bkv_client_destroy(client);
    fake_server_stop(server);
    fake_place_remove(&place);
}

static void serve_forever(fake_call_t *call, void *user) {
    (void)user;
    bkv_key_t key = fake_key(1, 3);
    fake_chunk(call, 0, &key, 1 << 20, "x", 1); // and then nothing
}

Test(get, never_ends) {
    fake_place_t place;
    fake_place_make(&place);
    fake_server_t *server = fake_server_start(place.endpoint, serve_forever, NULL);
    bkv_client_t *client = fake_client(&place, 0);
    bkv_spec_id_t id = fake_spec_id();
    bkv_key_t key = fake_key(1, 3);
    bkv_record_t record;
    uint64_t start = fake_now_ms();
    cr_assert(bkv_get(client, &id, &key, 1, NULL, 300, &record, NULL) == BKV_DEADLINE_EXCEEDED);
    cr_assert(fake_now_ms() - start < 5000);
    cr_assert(record.status == BKV_DEADLINE_EXCEEDED && record.data == NULL);
    bkv_client_destroy(client);
    fake_server_stop(server);
    fake_place_remove(&place);
}

// ---- Fold ----

// What a fold's answer looks like: records of these tokens, one after another from position 0 on.
typedef struct folded {
    uint32_t count, tokens[4];
    int64_t gap;          // between the first two
    uint32_t first_index; // of the first record
} folded_t;

static void serve_fold(fake_call_t *call, void *user) {
    const folded_t *folded = user;
    Balancekv__V1__FoldRequest *request = fake_read(call, &balancekv__v1__fold_request__descriptor);
    uint64_t position = 0;
    for (uint32_t i = 0; i < folded->count; i++) {
        bkv_key_t key = fake_key(42, (uint8_t)i);
        size_t length;
        uint8_t *record = fake_record(&key, folded->tokens[i], &length); // too large for small budgets, sent all the same
        ((bkv_record_header_t *)record)->position = position;
        bkv_record_seal(record);
        fake_chunk(call, folded->first_index + i, &key, length, record, length);
        position += folded->tokens[i] + (i == 0 ? (uint64_t)folded->gap : 0);
        free(record);
    }
    grpc_status_code code =
        request->n_profile > 0 && request->profile[0]->rate == 99 ? GRPC_STATUS_INVALID_ARGUMENT : GRPC_STATUS_OK;
    balancekv__v1__fold_request__free_unpacked(request, NULL);
    fake_finish(call, code, code == GRPC_STATUS_OK ? "" : "profile[0].rate: not that one");
}

// One Fold of a server that answers so.
static bkv_status_t fold_of(folded_t folded, const bkv_fold_request_t *params, bkv_record_t *records, size_t *count,
                            bkv_error_t *err) {
    fake_place_t place;
    fake_place_make(&place);
    fake_server_t *server = fake_server_start(place.endpoint, serve_fold, &folded);
    bkv_client_t *client = fake_client(&place, 0);
    bkv_spec_id_t id = fake_spec_id();
    bkv_key_t keys[2] = {fake_key(1, 3), fake_key(1, 4)};
    bkv_status_t status = bkv_fold_remote(client, &id, keys, 2, params, 0, records, count, err);
    bkv_client_destroy(client);
    fake_server_stop(server);
    fake_place_remove(&place);
    return status;
}

Test(get, fold) {
    bkv_key_t fold = fake_key(42, 0);
    bkv_fold_request_t params = {.budget_bytes = 1 << 20};
    bkv_record_t record;
    size_t count;
    bkv_error_t err = {0};
    cr_assert(fold_of((folded_t){1, {5}, 0, 0}, &params, &record, &count, &err) == BKV_OK, "%s", err.message);
    cr_assert(count == 1 && memcmp(&record.key, &fold, sizeof fold) == 0);
    assert_record(&record, 5);
    params.budget_bytes = 200;
    cr_assert(fold_of((folded_t){1, {5}, 0, 0}, &params, &record, &count, &err) == BKV_INTERNAL, "beyond the budget");
    cr_assert(count == 0 && record.data == NULL && record.status == BKV_INTERNAL);
    params.budget_bytes = 1 << 20;
    cr_assert(fold_of((folded_t){0, {0}, 0, 0}, &params, &record, &count, &err) == BKV_INTERNAL, "no record at all");
    cr_assert(fold_of((folded_t){2, {5, 5}, 0, 0}, &params, &record, &count, &err) == BKV_INTERNAL, "more than asked for");
    cr_assert(count == 0 && record.data == NULL);
}

static void assert_none(const bkv_record_t *records, size_t count) {
    cr_assert(count == 0);
    for (size_t i = 0; i < 3; i++) {
        cr_assert(records[i].data == NULL && records[i].status != BKV_OK);
    }
}

Test(get, fold_in_bands) {
    bkv_fold_request_t params = {.rate = 8, .profile = {.count = 3, .bands = {{16, 4}, {64, 8}, {0, 16}}}};
    bkv_record_t records[BKV_FOLD_RECORDS];
    size_t count, length = 0;
    bkv_error_t err = {0};
    bkv_key_t any = fake_key(42, 0);
    const uint32_t tokens[] = {9, 4, 2};
    free(fake_record(&any, 9, &length));
    cr_assert(fold_of((folded_t){3, {9, 4, 2}, 0, 0}, &params, records, &count, &err) == BKV_OK, "%s", err.message);
    cr_assert(count == 3);
    for (uint32_t i = 0; i < 3; i++) {
        bkv_shape_t shape;
        bkv_record_shape(records[i].data, &shape);
        cr_assert(shape.tokens == tokens[i] && records[i].key.bytes[1] == i);
        bkv_record_free(&records[i]);
    }
    cr_assert(fold_of((folded_t){2, {9, 4}, 0, 0}, &params, records, &count, &err) == BKV_OK, "fewer bands than asked for");
    cr_assert(count == 2 && records[2].data == NULL);
    bkv_record_free(&records[0]);
    bkv_record_free(&records[1]);

    cr_assert(fold_of((folded_t){2, {9, 4}, 1, 0}, &params, records, &count, &err) == BKV_DATA_LOSS, "a gap between two");
    assert_none(records, count);
    cr_assert(fold_of((folded_t){2, {9, 4}, 0, 1}, &params, records, &count, &err) == BKV_INTERNAL, "the first one missing");
    assert_none(records, count);
    cr_assert(fold_of((folded_t){1, {9}, 0, BKV_FOLD_RECORDS}, &params, records, &count, &err) == BKV_INTERNAL, "beyond all");
    assert_none(records, count);
    params.rate = 0;
    params.budget_bytes = length + 100;
    cr_assert(fold_of((folded_t){3, {9, 9, 9}, 0, 0}, &params, records, &count, &err) == BKV_INTERNAL,
              "together beyond the budget");
    assert_none(records, count);
    params.profile.bands[0].rate = 99;
    cr_assert(fold_of((folded_t){0, {0}, 0, 0}, &params, records, &count, &err) == BKV_INVALID_ARGUMENT);
    cr_assert(strstr(err.message, "profile[0].rate") != NULL, "%s", err.message);
    params.profile.bands[1].age = 3;
    cr_assert(fold_of((folded_t){0, {0}, 0, 0}, &params, records, &count, &err) == BKV_INVALID_ARGUMENT);
    cr_assert(strstr(err.message, "profile[1].age: 3") != NULL, "refused before it is sent: %s", err.message);
}
