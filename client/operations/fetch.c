// fetch.c - records on their way in, for Get and Fold: they come in chunks and are put together in memory of their own, or lie in
// the window at last, where the call has named room for them. They are checked and handed over.
//
// Nothing that a daemon says is trusted: not how long a record is, not where, not which it is, not that it is one. Chunks are
// copied together and summed on the client's thread, while they are in its cache; structure is checked by whoever takes the
// completion. What the daemon has placed is not summed again where the daemon did it last, as it wrote there (shm): a sum would
// find nothing but a daemon that lies, and that one can as well lie in the sum.
#include "client/operations/fetch.h"

#include "proto/answer.h"
#include "proto/chunk.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

// What a record may have beyond the payload of its block: header, directory, padding and a native section's index.
#define RECORD_EXTRA (16ull << 20)

void bkv_record_free(bkv_record_t *record) {
    if (record != NULL) {
        if (record->owner != NULL) {
            bkv_client_region_release(record->owner);
        } else {
            bkv_client_buffer_free(record->data);
        }
        record->data = record->owner = NULL;
        record->length = 0;
    }
}

static void record_fail(bkv_record_t *record, bkv_status_t status) {
    bkv_record_free(record);
    record->status = status;
}

// A record's number to the caller.
static size_t number_of(const bkv_fetch_t *fetch, size_t i) {
    return fetch->numbers != NULL ? fetch->numbers[i] : i;
}

// ---- room in the window ----

// Takes what there is, as records that do not fit come as data: all of the room, or half of it, and so on, as long as one record
// fits. No call gets more than half of the window.
static void room_take(bkv_fetch_t *fetch) {
    bkv_client_window_t *window = fetch->call.window;
    uint64_t most = window != NULL ? bkv_client_window_bytes(window) / 2 : 0;
    uint64_t bytes = fetch->room_bytes < most ? fetch->room_bytes : most;
    assert(fetch->room == NULL && fetch->count > 0);
    uint64_t least = fetch->room_bytes / fetch->count;
    for (; fetch->room == NULL && bytes >= BKV_PLACE_LEAST && bytes >= least; bytes /= 2) {
        fetch->room = bkv_client_region_take(window, bytes);
    }
    fetch->room_used = 0;
}

// Records keep what they lie in; the rest goes back to the window.
static void fetch_settle(bkv_call_t *call, bool answered) {
    bkv_fetch_t *fetch = (bkv_fetch_t *)call;
    if (fetch->room == NULL) {
        return;
    }
    if (!answered) {
        bkv_client_region_lose(fetch->room);
    } else if (fetch->room_used > 0) {
        bkv_client_region_trim(fetch->room, fetch->room_used);
    }
    bkv_client_region_release(fetch->room);
    fetch->room = NULL;
}

// The request, and the room of this attempt behind it: messages of protobuf that follow one another are one.
static grpc_byte_buffer *fetch_next(bkv_call_t *call, bool *last) {
    bkv_fetch_t *fetch = (bkv_fetch_t *)call;
    *last = true;
    if (fetch->room == NULL) {
        return grpc_raw_byte_buffer_create(&call->request, 1);
    }
    Balancekv__V1__Place place = BALANCEKV__V1__PLACE__INIT;
    place.session = bkv_client_session_bytes(call->window);
    place.offset = bkv_client_region_offset(fetch->room);
    place.bytes = bkv_client_region_bytes(fetch->room);
    Balancekv__V1__GetRequest get = BALANCEKV__V1__GET_REQUEST__INIT;
    Balancekv__V1__FoldRequest fold = BALANCEKV__V1__FOLD_REQUEST__INIT;
    get.place = fold.place = &place;
    grpc_slice rest = bkv_client_pack(fetch->folded != NULL ? &fold.base : &get.base);
    grpc_byte_buffer *message = grpc_raw_byte_buffer_create((grpc_slice[]){call->request, rest}, 2);
    grpc_slice_unref(rest);
    return message;
}

// ---- the start of an attempt ----

static void fetch_reset(bkv_call_t *call) {
    bkv_fetch_t *fetch = (bkv_fetch_t *)call;
    for (size_t i = 0; i < fetch->count; i++) {
        record_fail(&fetch->records[i], BKV_OK);
    }
    fetch->index = 0;
    fetch->received = 0;
    fetch->open = false;
    bkv_sum_restart(fetch->sum);
    fetch->first = (bkv_error_t){0};
    room_take(fetch);
    if (fetch->folded != NULL) {
        fetch->record_max = fetch->budget;
    } else {
        pthread_mutex_lock(&call->client->lock);
        uint64_t block = call->endpoint->max_block_bytes;
        pthread_mutex_unlock(&call->client->lock);
        fetch->record_max = block != 0 && block < BKV_FETCH_MOST ? block + RECORD_EXTRA : BKV_FETCH_MOST;
    }
}

// ---- chunks ----

// A record that the daemon says it cannot give.
static bkv_status_t take_missing(bkv_fetch_t *fetch, const Balancekv__V1__RecordChunk *head, bkv_error_t *err) {
    bkv_record_t *record = &fetch->records[fetch->index];
    if (fetch->received > 0) {
        return bkv_fail(err, BKV_INTERNAL, "record %zu: given up by the daemon half-way", fetch->index);
    }
    record_fail(record, bkv_answer_status(head->code));
    fetch->open = false;
    if (fetch->first.status == BKV_OK) {
        char text[160];
        bkv_answer_text(head->message, strlen(head->message), text, sizeof text);
        bkv_fail(&fetch->first, record->status, "keys[%zu]: %s", number_of(fetch, fetch->index), text);
    }
    return BKV_OK;
}

// A record begins, of which this is the first chunk.
static bkv_status_t take_first(bkv_fetch_t *fetch, const Balancekv__V1__RecordChunk *head, bkv_error_t *err) {
    bkv_record_t *record = &fetch->records[fetch->index];
    if (head->key.len != BKV_KEY_BYTES ||
        (fetch->folded == NULL && memcmp(head->key.data, record->key.bytes, BKV_KEY_BYTES) != 0)) {
        return bkv_fail(err, BKV_INTERNAL, "record %zu: key: not the one asked for", fetch->index);
    }
    if (head->record_bytes < sizeof(bkv_record_header_t) || head->record_bytes > fetch->record_max) {
        return bkv_fail(err, BKV_INTERNAL, "record %zu: record_bytes: %llu is not between %zu and %llu", fetch->index,
                        (unsigned long long)head->record_bytes, sizeof(bkv_record_header_t),
                        (unsigned long long)fetch->record_max);
    }
    memcpy(record->key.bytes, head->key.data, BKV_KEY_BYTES);
    record->length = (size_t)head->record_bytes;
    if (fetch->folded != NULL) {
        fetch->record_max -= head->record_bytes;
    }
    if (fetch->largest < head->record_bytes) {
        fetch->largest = head->record_bytes;
    }
    return BKV_OK;
}

// All of it lies in our room, or so the daemon says: behind those placed before it, and nowhere else.
static bkv_status_t take_placed(bkv_fetch_t *fetch, const bkv_chunk_t *chunk, bkv_error_t *err) {
    bkv_record_t *record = &fetch->records[fetch->index];
    if (fetch->room == NULL) {
        return bkv_fail(err, BKV_INTERNAL, "record %zu: placed: no room was given for it", fetch->index);
    }
    uint64_t start = bkv_client_region_offset(fetch->room), bytes = bkv_client_region_bytes(fetch->room);
    uint64_t offset = chunk->head->place_offset, used = (fetch->room_used + 63) / 64 * 64;
    if (offset % 64 != 0 || offset < start || offset - start < used || offset - start > bytes ||
        record->length > bytes - (offset - start)) {
        return bkv_fail(err, BKV_INTERNAL, "record %zu: place_offset: %llu and %zu bytes from there are not within %llu + %llu",
                        fetch->index, (unsigned long long)offset, record->length, (unsigned long long)start,
                        (unsigned long long)bytes);
    }
    if (chunk->data_bytes > 0) {
        return bkv_fail(err, BKV_INTERNAL, "record %zu: data: %llu bytes of a record that is placed", fetch->index,
                        (unsigned long long)chunk->data_bytes);
    }
    record->data = bkv_client_region_memory(fetch->room) + (offset - start);
    record->owner = bkv_client_region_retain(fetch->room);
    fetch->room_used = offset - start + record->length;
    fetch->open = false;
    fetch->index++;
    return BKV_OK;
}

// The record is complete. One whose sum is wrong was damaged on its way or by the daemon, and is as good as missing.
static void take_last(bkv_fetch_t *fetch) {
    bkv_record_t *record = &fetch->records[fetch->index];
    assert(record->data != NULL);
    uint64_t said = ((const bkv_record_header_t *)record->data)->checksum, sum = bkv_sum_value(fetch->sum);
    if (sum != said) {
        record_fail(record, BKV_DATA_LOSS);
        if (fetch->first.status == BKV_OK) {
            bkv_fail(&fetch->first, BKV_DATA_LOSS, "record %zu: checksum: the record says %016llx, its bytes give %016llx",
                     number_of(fetch, fetch->index), (unsigned long long)said, (unsigned long long)sum);
        }
    }
    fetch->open = false;
    fetch->index++;
}

// The next bytes of a record, into memory of its own.
static bkv_status_t take_data(bkv_fetch_t *fetch, const bkv_chunk_t *chunk, grpc_byte_buffer *message, bool first,
                              bkv_error_t *err) {
    bkv_record_t *record = &fetch->records[fetch->index];
    if (first && (record->data = bkv_client_buffer_take(fetch->call.client->buffers, record->length)) == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "record %zu: no memory for %zu bytes", fetch->index, record->length);
    }
    if (chunk->data_bytes > record->length - fetch->received || (chunk->data_bytes == 0 && !first)) {
        return bkv_fail(err, BKV_INTERNAL, "record %zu: data: %llu bytes where %llu were missing", fetch->index,
                        (unsigned long long)chunk->data_bytes, (unsigned long long)(record->length - fetch->received));
    }
    bkv_chunk_copy(message, chunk->data_at, chunk->data_bytes, (uint8_t *)record->data + fetch->received);
    fetch->received += chunk->data_bytes;
    bkv_sum_advance(fetch->sum, record->data, fetch->received);
    if (fetch->received == record->length) {
        take_last(fetch);
    }
    return BKV_OK;
}

// Which record the chunk belongs to: the one that is coming, or else any after it.
static bkv_status_t take_index(bkv_fetch_t *fetch, const Balancekv__V1__RecordChunk *head, bkv_error_t *err) {
    bool next = !fetch->open && head->index >= fetch->index && head->index < fetch->count;
    bool same = fetch->open && head->index == fetch->index;
    if (!next && !same) {
        return bkv_fail(err, BKV_INTERNAL, "chunk: index: %u of %zu records, where %s%zu was due", head->index, fetch->count,
                        fetch->open ? "the rest of " : "", fetch->index);
    }
    if (next) {
        fetch->index = head->index;
        fetch->received = 0;
        fetch->open = true;
        bkv_sum_restart(fetch->sum);
    }
    return BKV_OK;
}

static bkv_status_t take_chunk(bkv_fetch_t *fetch, const bkv_chunk_t *chunk, grpc_byte_buffer *message, bkv_error_t *err) {
    bkv_status_t status = take_index(fetch, chunk->head, err);
    if (status != BKV_OK) {
        return status;
    }
    bkv_record_t *record = &fetch->records[fetch->index];
    if (chunk->head->code != 0) {
        status = take_missing(fetch, chunk->head, err);
        fetch->index += status == BKV_OK;
        return status;
    }
    bool first = record->data == NULL;
    if (first) {
        status = take_first(fetch, chunk->head, err);
    }
    if (status != BKV_OK) {
        return status;
    }
    if (!chunk->head->placed) {
        return take_data(fetch, chunk, message, first, err);
    }
    return first ? take_placed(fetch, chunk, err)
                 : bkv_fail(err, BKV_INTERNAL, "record %zu: placed: it has begun to come as data", fetch->index);
}

static bkv_status_t fetch_take(bkv_call_t *call, grpc_byte_buffer *message, bkv_error_t *err) {
    bkv_fetch_t *fetch = (bkv_fetch_t *)call;
    bkv_chunk_t chunk;
    if (!bkv_chunk_parse(&chunk, message)) {
        return bkv_fail(err, BKV_INTERNAL, "%s: the response is not a RecordChunk", call->kind->method);
    }
    bkv_status_t status = take_chunk(fetch, &chunk, message, err);
    if (status == BKV_OK) {
        bkv_client_saw_epoch(call->client, call, chunk.head->boot_epoch);
    }
    balancekv__v1__record_chunk__free_unpacked(chunk.head, NULL);
    return status;
}

// ---- the whole ----

// Is it the part of the model that was asked for?
static bool in_range(const bkv_record_header_t *header, const bkv_range_t *range) {
    return header->first_layer == range->first_layer && header->first_head == range->first_head &&
           (range->layers == 0 || header->layers == range->layers) && (range->heads == 0 || header->heads == range->heads);
}

// Does a fold's record begin where the one before it ends?
static bool follows(const bkv_record_t *before, const bkv_record_header_t *header) {
    const bkv_record_header_t *last = before->data;
    return last == NULL || header->position == last->position + last->tokens;
}

static bkv_status_t record_validate(const bkv_fetch_t *fetch, size_t i, bkv_error_t *err) {
    const bkv_record_t *record = &fetch->records[i];
    bkv_status_t status = BKV_OK;
    if (record->owner != NULL && !bkv_client_window_kind(bkv_client_region_window(record->owner))->verified) {
        status = bkv_record_verify(record->data, record->length, err);
    }
    if (status == BKV_OK) {
        status = bkv_record_check(record->data, record->length, err);
    }
    if (status != BKV_OK) {
        return status;
    }
    const bkv_record_header_t *header = record->data;
    if (memcmp(header->key, record->key.bytes, BKV_KEY_BYTES) != 0) {
        return bkv_fail(err, BKV_DATA_LOSS, "key: the record is another block's");
    }
    if (memcmp(header->spec_id, fetch->call.spec_id.bytes, BKV_SPEC_ID_BYTES) != 0) {
        return bkv_fail(err, BKV_DATA_LOSS, "spec_id: the record is another spec's");
    }
    if (!in_range(header, &fetch->range)) {
        return bkv_fail(err, BKV_DATA_LOSS, "layers, heads: the record is not the range asked for");
    }
    if (fetch->folded != NULL && i > 0 && !follows(record - 1, header)) {
        return bkv_fail(err, BKV_DATA_LOSS, "position: the record does not follow the one before it");
    }
    return BKV_OK;
}

static bool complete(const bkv_fetch_t *fetch, size_t i) {
    return fetch->records[i].data != NULL && !(fetch->open && fetch->index == i);
}

// How many records there must be: of a Fold those that came, but one at least.
static size_t due(const bkv_fetch_t *fetch) {
    size_t came = fetch->index + (fetch->open ? 1 : 0);
    return fetch->folded == NULL ? fetch->count : came > 0 ? came : 1;
}

// Gives every record its status, and the call the first's that is not OK.
static void fetch_finish(bkv_call_t *call) {
    bkv_fetch_t *fetch = (bkv_fetch_t *)call;
    bkv_error_t first = {.status = BKV_OK};
    for (size_t i = 0; i < due(fetch); i++) {
        bkv_record_t *record = &fetch->records[i];
        bkv_error_t error = {.status = record->status};
        if (error.status != BKV_OK) {
            error = fetch->first; // noted when it came; the first of those is the first one here
        } else if (complete(fetch, i)) {
            bkv_error_t cause = {.status = BKV_OK};
            if (record_validate(fetch, i, &cause) != BKV_OK) {
                bkv_fail(&error, BKV_DATA_LOSS, "record %zu: %.200s", number_of(fetch, i), cause.message);
            }
        } else if (call->error.status != BKV_OK) {
            error = call->error;
        } else {
            bkv_fail(&error, BKV_INTERNAL, "record %zu: never came, though the call ended well", number_of(fetch, i));
        }
        if (error.status != BKV_OK) {
            record_fail(record, record->status != BKV_OK ? record->status : error.status);
            first = first.status == BKV_OK ? error : first;
        }
    }
    if (first.status != BKV_OK) {
        call->error = first;
    }
    bool whole = memcmp(&fetch->range, &(bkv_range_t){0}, sizeof fetch->range) == 0;
    if (fetch->folded == NULL && whole && fetch->largest > 0) {
        bkv_client_spec_saw(call->client, &call->spec_id, fetch->largest);
    }
    if (fetch->folded != NULL) {
        *fetch->folded = call->error.status == BKV_OK ? due(fetch) : 0;
        for (size_t i = *fetch->folded; i < fetch->count && call->error.status != BKV_OK; i++) {
            record_fail(&fetch->records[i], call->error.status); // a part of a fold is of no use
        }
    }
}

static void fetch_clean(bkv_call_t *call) {
    bkv_sum_destroy(((bkv_fetch_t *)call)->sum);
}

const bkv_call_kind_t bkv_fetch_get = {
    .method = BKV_CLIENT_SERVICE "Get",
    .shape = BKV_DOWNLOAD,
    .names_spec = true,
    .reset = fetch_reset,
    .next = fetch_next,
    .take = fetch_take,
    .settle = fetch_settle,
    .finish = fetch_finish,
    .clean = fetch_clean,
};

const bkv_call_kind_t bkv_fetch_fold = {
    .method = BKV_CLIENT_SERVICE "Fold",
    .shape = BKV_DOWNLOAD,
    .names_spec = true,
    .may_miss = true,
    .reset = fetch_reset,
    .next = fetch_next,
    .take = fetch_take,
    .settle = fetch_settle,
    .finish = fetch_finish,
    .clean = fetch_clean,
};

bkv_fetch_t *bkv_fetch_new(const bkv_call_kind_t *kind, bkv_client_t *client, const bkv_spec_id_t *id, uint32_t timeout_ms,
                           bkv_record_t *records, size_t count) {
    bkv_fetch_t *fetch = bkv_call_new(sizeof *fetch, kind, client, id, timeout_ms);
    if (fetch == NULL) {
        return NULL;
    }
    fetch->records = records;
    fetch->count = count;
    fetch->sum = bkv_sum_create();
    if (fetch->sum == NULL) {
        bkv_call_free(&fetch->call);
        return NULL;
    }
    return fetch;
}
