// fuzz_intake.c - what another daemon may send to Store: streams of messages, and records that are nearly right.
//
// The first byte chooses, the second how bytes are cut. Messages: the rest is a stream, each message behind its length in two
// bytes. A record: the rest is one, given a length, a name and a checksum that agree, so that what is behind those is reached too,
// and sent in pieces. Whatever is taken in must be sound, and nothing may be left behind; that the store says itself when it is
// destroyed.
#include "daemon/rpc/intake.h"
#include "kernels/seal.h"

#include "peer.pb-c.h"

#include <stdlib.h>
#include <string.h>

#define MAX_BATCH 8
#define NOW       1000
#define RECORD    8192 // bytes of a record, at most

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

// A mistake of ours must be seen also where no sanitizer looks.
static void require(bool condition) {
    if (!condition) {
        abort();
    }
}

static bkv_store_t *new_store(void) {
    const bkv_store_config_t config = {.arena_bytes = 256 << 10,
                                       .slab_bytes = 64 << 10,
                                       .max_entries = 4,
                                       .shards = 1,
                                       .max_leases = 1,
                                       .max_lease_keys = 1,
                                       .arena_fd = -1};
    bkv_store_t *store;
    require(bkv_store_create(&config, NOW, &store, NULL, NULL) == BKV_OK);
    return store;
}

static grpc_byte_buffer *received(const uint8_t *data, size_t size, size_t piece) {
    grpc_slice slices[256];
    size_t count = 0;
    piece = size / piece < 256 ? piece : size;
    for (size_t at = 0; at < size; at += piece) {
        size_t length = piece < size - at ? piece : size - at;
        slices[count++] = grpc_slice_from_copied_buffer((const char *)data + at, length);
    }
    grpc_byte_buffer *message = grpc_raw_byte_buffer_create(slices, count);
    for (size_t i = 0; i < count; i++) {
        grpc_slice_unref(slices[i]);
    }
    return message;
}

static bkv_status_t take(bkv_intake_t *intake, const uint8_t *data, size_t size, size_t piece) {
    bkv_bump_t bump;
    bkv_error_t err = {.status = BKV_OK};
    bkv_bump_init(&bump, (size_t)1 << 20);
    grpc_byte_buffer *message = received(data, size, piece);
    bkv_status_t status = bkv_intake_take(intake, message, &bump, NOW, &err);
    require(status == err.status && (status == BKV_OK || err.message[0] != '\0'));
    grpc_byte_buffer_destroy(message);
    bkv_bump_deinit(&bump);
    return status;
}

// Each record has one code, and the message is there when one of them complains.
static uint32_t check_codes(bkv_intake_t *intake, uint32_t *taken) {
    const uint32_t *codes;
    const char *message;
    uint32_t count, refused = 0;
    bkv_intake_end(intake, &codes, &count, &message);
    require(count <= MAX_BATCH);
    *taken = 0;
    for (uint32_t i = 0; i < count; i++) {
        require(codes[i] <= 16);
        *taken += codes[i] == 0;
        refused += codes[i] != 0 && codes[i] != 6;
    }
    require((refused > 0) == (strncmp(message, "record[", 7) == 0));
    return count;
}

static void check_resident(bkv_store_t *store) {
    bkv_store_item_t items[MAX_BATCH];
    uint64_t cursor = 0;
    bool more;
    size_t count = bkv_store_list(store, &cursor, items, MAX_BATCH, NOW, &more);
    for (size_t i = 0; i < count; i++) {
        bkv_pin_t pin;
        require(bkv_store_pin(store, &items[i].name.spec_id, &items[i].name.key, NOW, &pin, NULL) == BKV_OK);
        require(pin.length == items[i].bytes && bkv_record_check(pin.data, pin.length, NULL) == BKV_OK);
        bkv_store_unpin(store, &pin);
    }
}

static void fuzz_messages(bkv_intake_t *intake, const uint8_t *data, size_t size, size_t piece) {
    bkv_status_t status = BKV_OK;
    while (status == BKV_OK && size >= 2) {
        size_t length = (size_t)data[0] | (size_t)data[1] << 8;
        data += 2;
        size -= 2;
        length = length < size ? length : size;
        status = take(intake, data, length, piece);
        data += length;
        size -= length;
    }
}

// Returns whether all of it was sent.
static bool send_record(bkv_intake_t *intake, const uint8_t *record, size_t length, size_t piece) {
    const bkv_record_header_t *header = (const void *)record;
    uint8_t name[BKV_NAME_BYTES], packed[RECORD + 256];
    memcpy(name, header->spec_id, BKV_SPEC_ID_BYTES);
    memcpy(name + BKV_SPEC_ID_BYTES, header->key, BKV_KEY_BYTES);
    Balancekv__Cluster__V1__StoreRecord head = BALANCEKV__CLUSTER__V1__STORE_RECORD__INIT;
    Balancekv__Cluster__V1__StoreRequest request = BALANCEKV__CLUSTER__V1__STORE_REQUEST__INIT;
    head.name = (ProtobufCBinaryData){sizeof(name), name};
    head.record_bytes = length;
    request.record = &head;
    for (size_t at = 0; at < length; request.record = NULL) {
        size_t part = piece * piece < length - at ? piece * piece : length - at;
        request.data = (ProtobufCBinaryData){part, (uint8_t *)(uintptr_t)record + at};
        size_t bytes = balancekv__cluster__v1__store_request__pack(&request, packed);
        if (take(intake, packed, bytes, piece) != BKV_OK) {
            return false;
        }
        at += part;
    }
    return true;
}

// A record whose header and checksum agree is taken just when it is one. It is sent twice, and is there the second time.
static void fuzz_record(bkv_store_t *store, bkv_intake_t *intake, const uint8_t *data, size_t size, size_t piece) {
    _Alignas(64) uint8_t record[RECORD];
    size_t length = size < sizeof(record) ? size / BKV_RECORD_ALIGN * BKV_RECORD_ALIGN : sizeof(record);
    bkv_record_header_t *header = (void *)record;
    if (length < sizeof(*header)) {
        return;
    }
    memcpy(record, data, length);
    header->length = length;
    bkv_record_seal(record);
    bool sound = bkv_record_check(record, length, NULL) == BKV_OK && (header->flags & BKV_RECORD_SLICE) == 0;
    require(send_record(intake, record, length, piece) && send_record(intake, record, length, piece));
    uint32_t taken;
    require(check_codes(intake, &taken) == 2 && taken == (sound ? 1 : 0));
    bkv_store_metrics_t metrics;
    bkv_store_metrics(store, &metrics);
    require(metrics.adopted_total == taken && metrics.entries == taken && metrics.pinned == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static bkv_model_table_t *models;
    if (models == NULL) {
        models = bkv_model_table_create(1);
    }
    if (size < 2) {
        return 0;
    }
    size_t piece = (size_t)data[1] + 1;
    bkv_store_t *store = new_store();
    bkv_intake_t *intake = bkv_intake_create(store, models, MAX_BATCH);
    require(intake != NULL);
    if (data[0] % 2 == 0) {
        uint32_t taken;
        fuzz_messages(intake, data + 2, size - 2, piece);
        check_codes(intake, &taken);
    } else {
        fuzz_record(store, intake, data + 2, size - 2, piece);
    }
    check_resident(store);
    bkv_intake_destroy(intake);
    bkv_store_destroy(store);
    return 0;
}
