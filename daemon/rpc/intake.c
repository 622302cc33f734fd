// intake.c - see intake.h.
//
// A record comes as: its name and length (begin), its header (open_slot, which knows the tenant only now), the rest (fill), and
// its end (finish). `refuse` may come anywhere on the way; what is left of the record is then counted and thrown away.
#include "daemon/rpc/intake.h"

#include "daemon/pipeline/stream.h"
#include "daemon/rpc/status.h"
#include "kernels/seal.h"

#include "peer.pb-c.h"

#include <assert.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define HEAD_MOST   ((size_t)1024)     // bytes of a message beside its data: about 70
#define PIECE_BYTES ((size_t)32 << 10) // what is summed is copied while the nearest cache has it
#define FIRST_ROOM  16u                // codes, doubled as records come

struct bkv_intake {
    bkv_store_t *store;
    const bkv_model_table_t *models;
    uint32_t records_most;
    uint32_t *codes; // [room]
    uint32_t count, room;
    uint64_t bytes_taken;
    bkv_error_t first_error; // of the first record that was refused
    bkv_sum_t *sum;

    // The record that is coming.
    bkv_name_t name;
    uint64_t bytes, received, ttl_ms;
    bool skipped;    // it has its code already
    bkv_slot_t slot; // data NULL: not yet, or no more
    _Alignas(BKV_RECORD_ALIGN) bkv_record_header_t header;
};

bkv_intake_t *bkv_intake_create(bkv_store_t *store, const bkv_model_table_t *models, uint32_t records_most) {
    bkv_intake_t *intake = aligned_alloc(BKV_RECORD_ALIGN, sizeof(*intake));
    if (intake == NULL) {
        return NULL;
    }
    *intake = (bkv_intake_t){.store = store, .models = models, .records_most = records_most, .sum = bkv_sum_create()};
    if (intake->sum == NULL) {
        bkv_intake_destroy(intake);
        return NULL;
    }
    return intake;
}

static void give_slot_up(bkv_intake_t *intake) {
    if (intake->slot.data != NULL) {
        bkv_store_abort(intake->store, &intake->slot);
        intake->slot.data = NULL;
    }
}

void bkv_intake_destroy(bkv_intake_t *intake) {
    if (intake != NULL) {
        give_slot_up(intake);
        bkv_sum_destroy(intake->sum);
        free(intake->codes);
        free(intake);
    }
}

uint64_t bkv_intake_bytes(const bkv_intake_t *intake) {
    return intake->bytes_taken;
}

// ---- what becomes of a record ----

static uint64_t missing(const bkv_intake_t *intake) {
    return intake->bytes - intake->received;
}

// The present record has its code. ALREADY_EXISTS is none to complain of.
static void settle(bkv_intake_t *intake, const bkv_error_t *error) {
    intake->codes[intake->count - 1] = (uint32_t)bkv_status_to_grpc(error->status);
    intake->skipped = true;
    give_slot_up(intake);
    if (error->status != BKV_ALREADY_EXISTS && intake->first_error.status == BKV_OK) {
        bkv_fail(&intake->first_error, error->status, "record[%" PRIu32 "]: %.220s", intake->count - 1, error->message);
    }
}

// A record that is there already is not sent through the store again, if it is sound; if it was but a copy, it is more now. One
// that is damaged goes, and this one takes its place.
static bkv_status_t meet_resident(bkv_intake_t *intake, uint64_t now_ms, bkv_error_t *err) {
    const bkv_name_t *name = &intake->name;
    bkv_pin_t pin;
    if (!bkv_store_contains(intake->store, &name->spec_id, &name->key, now_ms)) {
        return BKV_OK;
    }
    bkv_status_t status = bkv_store_pin(intake->store, &name->spec_id, &name->key, now_ms, &pin, err);
    if (status == BKV_NOT_FOUND || status == BKV_DATA_LOSS) {
        return BKV_OK;
    }
    if (status == BKV_OK) {
        bool there = bkv_store_set_copy(intake->store, name, false, now_ms);
        bkv_store_unpin(intake->store, &pin);
        status = there ? bkv_fail(err, BKV_ALREADY_EXISTS, "name: it is resident already") : BKV_OK;
    }
    return status;
}

static bkv_status_t begin_checked(bkv_intake_t *intake, const Balancekv__Cluster__V1__StoreRecord *record, uint64_t now_ms,
                                  bkv_error_t *err) {
    const uint64_t most = bkv_store_max_record(intake->store);
    if (record->name.len != BKV_NAME_BYTES) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "name: %zu bytes instead of %d", record->name.len, BKV_NAME_BYTES);
    }
    if (record->record_bytes < sizeof(bkv_record_header_t)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "record_bytes: %" PRIu64 " are no record", record->record_bytes);
    }
    if (record->record_bytes > most) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "record_bytes: %" PRIu64 " are more than the %" PRIu64 " of a slab",
                        record->record_bytes, most);
    }
    memcpy(&intake->name, record->name.data, sizeof(intake->name));
    return meet_resident(intake, now_ms, err);
}

// The header has come: is it this record's, and of a kind that is kept?
static bkv_status_t check_header(const bkv_intake_t *intake, bkv_error_t *err) {
    const bkv_record_header_t *header = &intake->header;
    bkv_status_t status = bkv_record_check_header(header, intake->bytes, err);
    if (status != BKV_OK) {
        return status;
    }
    if (header->length != intake->bytes) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "record_bytes: %" PRIu64 ", but the header says %" PRIu64, intake->bytes,
                        header->length);
    }
    if (memcmp(header->spec_id, intake->name.spec_id.bytes, sizeof(header->spec_id)) != 0 ||
        memcmp(header->key, intake->name.key.bytes, sizeof(header->key)) != 0) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "name: not the one in the record's header");
    }
    if (header->flags & BKV_RECORD_SLICE) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "flags: a slice of a record is not kept");
    }
    const bkv_model_t *model = bkv_model_table_find(intake->models, &intake->name.spec_id);
    if (model != NULL && model->tenant != header->tenant) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "tenant: not that of the record's spec");
    }
    return BKV_OK;
}

static bkv_status_t open_slot(bkv_intake_t *intake, uint64_t now_ms, bkv_error_t *err) {
    bkv_status_t status = check_header(intake, err);
    if (status == BKV_OK) {
        status = bkv_store_reserve(intake->store, intake->header.tenant, intake->bytes, now_ms, &intake->slot, err);
    }
    if (status != BKV_OK) {
        intake->slot.data = NULL;
        return status;
    }
    memcpy(intake->slot.data, &intake->header, sizeof(intake->header));
    bkv_sum_restart(intake->sum);
    bkv_sum_advance(intake->sum, &intake->header, sizeof(intake->header));
    return BKV_OK;
}

// All bytes lie in the slot, as they were summed on their way.
static bkv_status_t publish(bkv_intake_t *intake, uint64_t now_ms, bkv_error_t *err) {
    uint64_t sum = bkv_sum_value(intake->sum);
    if (sum != intake->header.checksum) {
        return bkv_fail(err, BKV_DATA_LOSS, "checksum: the record says %016" PRIx64 ", its bytes give %016" PRIx64,
                        intake->header.checksum, sum);
    }
    bkv_status_t status = bkv_record_check(intake->slot.data, intake->bytes, err);
    if (status == BKV_OK) {
        status = bkv_store_adopt(intake->store, &intake->slot, intake->ttl_ms, false, now_ms, NULL, err);
        intake->slot.data = NULL; // the store's, however that went
    }
    return status;
}

// ---- bytes ----

// The next bytes of the record, no more than are missing.
static bkv_status_t put_bytes(bkv_intake_t *intake, const uint8_t *bytes, size_t length, uint64_t now_ms, bkv_error_t *err) {
    const uint64_t at = intake->received;
    intake->received += length;
    intake->bytes_taken += length;
    if (intake->skipped) {
        return BKV_OK;
    }
    bkv_status_t status = BKV_OK;
    if (at < sizeof(intake->header)) {
        memcpy((uint8_t *)&intake->header + at, bytes, length);
        status = intake->received == sizeof(intake->header) ? open_slot(intake, now_ms, err) : BKV_OK;
    } else {
        assert(intake->slot.data != NULL);
        bkv_sum_append(intake->sum, bytes, length);
        bkv_stream_copy(intake->slot.data + at, bytes, length); // nobody reads it soon
    }
    return status == BKV_OK && missing(intake) == 0 ? publish(intake, now_ms, err) : status;
}

// How many bytes of the record go together: its header alone, then pieces.
static size_t piece_of(const bkv_intake_t *intake, size_t left) {
    uint64_t most = PIECE_BYTES;
    if (intake->received < sizeof(intake->header)) {
        most = sizeof(intake->header) - intake->received;
    }
    most = most < missing(intake) ? most : missing(intake);
    return left < most ? left : (size_t)most;
}

static bkv_status_t take_data(bkv_intake_t *intake, bkv_cursor_t *data, size_t left, uint64_t now_ms, bkv_error_t *err) {
    if (left > missing(intake)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "data: %zu bytes where %" PRIu64 " of a record are missing", left,
                        missing(intake));
    }
    while (left > 0) {
        const uint8_t *bytes = NULL;
        size_t length = bkv_cursor_next(data, piece_of(intake, left), &bytes);
        bkv_error_t error;
        assert(length > 0);
        if (put_bytes(intake, bytes, length, now_ms, &error) != BKV_OK) {
            settle(intake, &error);
        }
        left -= length;
    }
    return BKV_OK;
}

// ---- messages ----

// A record whose end has not come when the next one begins, or nothing more.
static void settle_short(bkv_intake_t *intake) {
    if (missing(intake) > 0 && !intake->skipped) {
        bkv_error_t error;
        bkv_fail(&error, BKV_INVALID_ARGUMENT, "record_bytes: %" PRIu64 " of %" PRIu64 " bytes have not come", missing(intake),
                 intake->bytes);
        settle(intake, &error);
    }
}

static bkv_status_t add_code(bkv_intake_t *intake, bkv_error_t *err) {
    if (intake->count == intake->records_most) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "record: one more than %" PRIu32, intake->count);
    }
    if (intake->count == intake->room) {
        uint32_t room = intake->room == 0 ? FIRST_ROOM : 2 * intake->room;
        uint32_t *codes = realloc(intake->codes, room * sizeof(codes[0]));
        if (codes == NULL) {
            return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "record: no memory for it");
        }
        intake->codes = codes;
        intake->room = room;
    }
    intake->codes[intake->count++] = 0;
    return BKV_OK;
}

static bkv_status_t begin(bkv_intake_t *intake, const Balancekv__Cluster__V1__StoreRecord *record, uint64_t now_ms,
                          bkv_error_t *err) {
    settle_short(intake);
    bkv_status_t status = add_code(intake, err);
    if (status != BKV_OK) {
        return status;
    }
    intake->bytes = record->record_bytes;
    intake->received = 0;
    intake->ttl_ms = record->ttl_ms;
    intake->skipped = false;
    bkv_error_t error;
    if (begin_checked(intake, record, now_ms, &error) != BKV_OK) {
        settle(intake, &error);
    }
    return BKV_OK;
}

bkv_status_t bkv_intake_take(bkv_intake_t *intake, grpc_byte_buffer *message, bkv_bump_t *bump, uint64_t now_ms,
                             bkv_error_t *err) {
    bkv_split_t split;
    bkv_status_t status = bkv_wire_check_encoding(message, err);
    if (status == BKV_OK) {
        status = bkv_wire_split(&balancekv__cluster__v1__store_request__descriptor, message, HEAD_MOST, bump, &split, err);
    }
    if (status != BKV_OK) {
        return status;
    }
    const Balancekv__Cluster__V1__StoreRequest *request = (const Balancekv__Cluster__V1__StoreRequest *)split.head;
    if (request->record != NULL) {
        status = begin(intake, request->record, now_ms, err);
    }
    return status == BKV_OK ? take_data(intake, &split.data, split.data_bytes, now_ms, err) : status;
}

void bkv_intake_end(bkv_intake_t *intake, const uint32_t **codes, uint32_t *count, const char **message) {
    settle_short(intake);
    *codes = intake->codes;
    *count = intake->count;
    *message = intake->first_error.status != BKV_OK ? intake->first_error.message : "";
}
