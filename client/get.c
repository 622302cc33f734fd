// get.c - Get and Fold: records come in chunks, are put together in memory of their own, checked and handed over.
//
// Nothing that a daemon says is trusted: not how long a record is, not which it is, not that it is one. Chunks are copied
// together and summed on the client's thread, while they are in its cache; structure is checked by whoever takes the
// completion.
#include "client.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

// The largest record to make room for, where the daemon has not said what its largest block is; as large as a slab may be.
#define RECORD_MAX (1ull << 30)

// What a record may have beyond the payload of its block: header, directory, padding and a native section's index.
#define RECORD_EXTRA (16ull << 20)

typedef struct fetch_call {
    bkv_call_t call; // first
    size_t count;
    bkv_record_t *records; // not yet: status OK, no data
    bkv_range_t range;
    uint64_t record_max; // of the next record; of a Fold: what is left of `budget`
    uint64_t budget;     // of a Fold: most bytes of all records
    size_t *folded;      // of a Fold: how many records came, at most `count`; NULL: a Get

    size_t index;      // the record that is coming
    uint64_t received; // bytes of it
    bool open;         // it has begun and is not complete
    bkv_sum_t *sum;    // of its bytes
    bkv_error_t first; // the first record's that there is not
} fetch_call_t;

void bkv_record_free(bkv_record_t *record) {
    if (record != NULL) {
        bkv_client_buffer_free(record->data);
        record->data = NULL;
        record->length = 0;
    }
}

static void record_fail(bkv_record_t *record, bkv_status_t status) {
    bkv_record_free(record);
    record->status = status;
}

static void fetch_reset(bkv_call_t *call) {
    fetch_call_t *fetch = (fetch_call_t *)call;
    for (size_t i = 0; i < fetch->count; i++) {
        record_fail(&fetch->records[i], BKV_OK);
    }
    fetch->index = 0;
    fetch->received = 0;
    fetch->open = false;
    bkv_sum_restart(fetch->sum);
    fetch->first = (bkv_error_t){0};
    if (fetch->folded != NULL) {
        fetch->record_max = fetch->budget;
    } else {
        pthread_mutex_lock(&call->client->lock);
        uint64_t block = call->client->max_block_bytes;
        pthread_mutex_unlock(&call->client->lock);
        fetch->record_max = block != 0 && block < RECORD_MAX ? block + RECORD_EXTRA : RECORD_MAX;
    }
}

// ---- chunks ----

// A record that the daemon says it cannot give.
static bkv_status_t take_missing(fetch_call_t *fetch, const Balancekv__V1__RecordChunk *head, bkv_error_t *err) {
    bkv_record_t *record = &fetch->records[fetch->index];
    if (fetch->received > 0) {
        return bkv_fail(err, BKV_INTERNAL, "record %zu: given up by the daemon half-way", fetch->index);
    }
    record_fail(record, bkv_client_status(head->code));
    fetch->open = false;
    if (fetch->first.status == BKV_OK) {
        char text[160];
        bkv_client_text(head->message, strlen(head->message), text, sizeof text);
        bkv_fail(&fetch->first, record->status, "keys[%zu]: %s", fetch->index, text);
    }
    return BKV_OK;
}

// Makes room for a record, of which this is the first chunk.
static bkv_status_t take_first(fetch_call_t *fetch, const Balancekv__V1__RecordChunk *head, bkv_error_t *err) {
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
    record->data = bkv_client_buffer_take(fetch->call.client->buffers, record->length);
    if (record->data == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "record %zu: no memory for %zu bytes", fetch->index, record->length);
    }
    return BKV_OK;
}

// Which record the chunk belongs to: the one that is coming, or else any after it.
static bkv_status_t take_index(fetch_call_t *fetch, const Balancekv__V1__RecordChunk *head, bkv_error_t *err) {
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

// The record is complete. One whose sum is wrong was damaged on its way or by the daemon, and is as good as missing.
static void take_last(fetch_call_t *fetch) {
    bkv_record_t *record = &fetch->records[fetch->index];
    assert(record->data != NULL);
    uint64_t said = ((const bkv_record_header_t *)record->data)->checksum, sum = bkv_sum_value(fetch->sum);
    if (sum != said) {
        record_fail(record, BKV_DATA_LOSS);
        if (fetch->first.status == BKV_OK) {
            bkv_fail(&fetch->first, BKV_DATA_LOSS, "record %zu: checksum: the record says %016llx, its bytes give %016llx",
                     fetch->index, (unsigned long long)said, (unsigned long long)sum);
        }
    }
    fetch->open = false;
    fetch->index++;
}

static bkv_status_t take_chunk(fetch_call_t *fetch, const bkv_client_chunk_t *chunk, grpc_byte_buffer *message,
                               bkv_error_t *err) {
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
    if (chunk->data_bytes > record->length - fetch->received || (chunk->data_bytes == 0 && !first)) {
        return bkv_fail(err, BKV_INTERNAL, "record %zu: data: %llu bytes where %llu were missing", fetch->index,
                        (unsigned long long)chunk->data_bytes, (unsigned long long)(record->length - fetch->received));
    }
    bkv_client_copy(message, chunk->data_at, chunk->data_bytes, (uint8_t *)record->data + fetch->received);
    fetch->received += chunk->data_bytes;
    bkv_sum_advance(fetch->sum, record->data, fetch->received);
    if (fetch->received == record->length) {
        take_last(fetch);
    }
    return BKV_OK;
}

static bkv_status_t fetch_take(bkv_call_t *call, grpc_byte_buffer *message, bkv_error_t *err) {
    fetch_call_t *fetch = (fetch_call_t *)call;
    bkv_client_chunk_t chunk;
    if (!bkv_client_chunk_parse(&chunk, message)) {
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

static bkv_status_t record_validate(const fetch_call_t *fetch, size_t i, bkv_error_t *err) {
    const bkv_record_t *record = &fetch->records[i];
    bkv_status_t status = bkv_record_check(record->data, record->length, err);
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

static bool complete(const fetch_call_t *fetch, size_t i) {
    return fetch->records[i].data != NULL && !(fetch->open && fetch->index == i);
}

// How many records there must be: of a Fold those that came, but one at least.
static size_t due(const fetch_call_t *fetch) {
    size_t came = fetch->index + (fetch->open ? 1 : 0);
    return fetch->folded == NULL ? fetch->count : came > 0 ? came : 1;
}

// Gives every record its status, and the call the first's that is not OK.
static void fetch_finish(bkv_call_t *call) {
    fetch_call_t *fetch = (fetch_call_t *)call;
    bkv_error_t first = {.status = BKV_OK};
    for (size_t i = 0; i < due(fetch); i++) {
        bkv_record_t *record = &fetch->records[i];
        bkv_error_t error = {.status = record->status};
        if (error.status != BKV_OK) {
            error = fetch->first; // noted when it came; the first of those is the first one here
        } else if (complete(fetch, i)) {
            bkv_error_t cause = {.status = BKV_OK};
            if (record_validate(fetch, i, &cause) != BKV_OK) {
                bkv_fail(&error, BKV_DATA_LOSS, "record %zu: %.200s", i, cause.message);
            }
        } else if (call->error.status != BKV_OK) {
            error = call->error;
        } else {
            bkv_fail(&error, BKV_INTERNAL, "record %zu: never came, though the call ended well", i);
        }
        if (error.status != BKV_OK) {
            record_fail(record, record->status != BKV_OK ? record->status : error.status);
            first = first.status == BKV_OK ? error : first;
        }
    }
    if (first.status != BKV_OK) {
        call->error = first;
    }
    if (fetch->folded != NULL) {
        *fetch->folded = call->error.status == BKV_OK ? due(fetch) : 0;
        for (size_t i = *fetch->folded; i < fetch->count && call->error.status != BKV_OK; i++) {
            record_fail(&fetch->records[i], call->error.status); // a part of a fold is of no use
        }
    }
}

static void fetch_clean(bkv_call_t *call) {
    bkv_sum_destroy(((fetch_call_t *)call)->sum);
}

// A fetch of `count` records; NULL: out of memory.
static fetch_call_t *fetch_new(const bkv_call_kind_t *kind, bkv_client_t *client, const bkv_spec_id_t *id, uint32_t timeout_ms,
                               bkv_record_t *records, size_t count) {
    fetch_call_t *fetch = bkv_call_new(sizeof *fetch, kind, client, id, timeout_ms);
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

static const bkv_call_kind_t get_kind = {
    .method = BKV_CLIENT_SERVICE "Get",
    .shape = BKV_CALL_DOWNLOAD,
    .names_spec = true,
    .reset = fetch_reset,
    .take = fetch_take,
    .finish = fetch_finish,
    .clean = fetch_clean,
};

static const bkv_call_kind_t fold_kind = {
    .method = BKV_CLIENT_SERVICE "Fold",
    .shape = BKV_CALL_DOWNLOAD,
    .names_spec = true,
    .may_miss = true,
    .reset = fetch_reset,
    .take = fetch_take,
    .finish = fetch_finish,
    .clean = fetch_clean,
};

// ---- Get ----

static void records_init(bkv_record_t *records, const bkv_key_t *keys, size_t count, bkv_status_t status) {
    for (size_t i = 0; i < count; i++) {
        records[i] = (bkv_record_t){.status = status};
        if (keys != NULL) {
            records[i].key = keys[i];
        }
    }
}

static bkv_call_t *get_new(bkv_client_t *client, const bkv_spec_id_t *id, const bkv_key_t *keys, size_t count,
                           const bkv_range_t *range, uint32_t timeout_ms, bkv_record_t *records) {
    fetch_call_t *fetch = fetch_new(&get_kind, client, id, timeout_ms, records, count);
    ProtobufCBinaryData *list = bkv_client_key_list(keys, count);
    records_init(records, keys, count, fetch != NULL && list != NULL ? BKV_OK : BKV_RESOURCE_EXHAUSTED);
    if (fetch == NULL || list == NULL) {
        free(list);
        bkv_call_free((bkv_call_t *)fetch);
        return NULL;
    }
    fetch->range = range != NULL ? *range : (bkv_range_t){0};
    Balancekv__V1__GetRequest request = BALANCEKV__V1__GET_REQUEST__INIT;
    request.spec_id = bkv_client_spec_bytes(id);
    request.n_keys = count;
    request.keys = list;
    request.first_layer = fetch->range.first_layer;
    request.layers = fetch->range.layers;
    request.first_head = fetch->range.first_head;
    request.heads = fetch->range.heads;
    fetch->call.request = bkv_client_pack(&request.base);
    free(list);
    return (bkv_call_t *)fetch;
}

bkv_status_t bkv_get(bkv_client_t *client, const bkv_spec_id_t *id, const bkv_key_t *keys, size_t count,
                     const bkv_range_t *range, uint32_t timeout_ms, bkv_record_t *records, bkv_error_t *err) {
    assert(client != NULL && id != NULL && ((keys != NULL && records != NULL) || count == 0));
    if (count == 0) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "keys: none given");
    }
    bkv_call_t *call = get_new(client, id, keys, count, range, timeout_ms, records);
    bkv_status_t status = bkv_call_run(call, err);
    bkv_call_free(call);
    return status;
}

bkv_status_t bkv_get_submit(bkv_queue_t *queue, uint64_t tag, const bkv_spec_id_t *id, const bkv_key_t *keys, size_t count,
                            const bkv_range_t *range, uint32_t timeout_ms, bkv_record_t *records) {
    assert(queue != NULL && id != NULL && ((keys != NULL && records != NULL) || count == 0));
    if (count == 0) {
        return BKV_INVALID_ARGUMENT;
    }
    bkv_call_t *call = get_new(bkv_queue_client(queue), id, keys, count, range, timeout_ms, records);
    bkv_status_t status = bkv_call_submit(call, queue, tag);
    if (status != BKV_OK) {
        records_init(records, keys, count, status);
    }
    return status;
}

// ---- Fold ----

static size_t fold_room(const bkv_fold_request_t *params) {
    return params->profile.count > 0 ? BKV_FOLD_RECORDS : 1;
}

static bkv_call_t *fold_new(bkv_client_t *client, const bkv_spec_id_t *id, const bkv_key_t *keys, size_t count,
                            const bkv_fold_request_t *params, uint32_t timeout_ms, bkv_record_t *records,
                            size_t *record_count) {
    fetch_call_t *fetch = fetch_new(&fold_kind, client, id, timeout_ms, records, fold_room(params));
    ProtobufCBinaryData *list = bkv_client_key_list(keys, count);
    records_init(records, NULL, fold_room(params), fetch != NULL && list != NULL ? BKV_OK : BKV_RESOURCE_EXHAUSTED);
    *record_count = 0;
    if (fetch == NULL || list == NULL) {
        free(list);
        bkv_call_free((bkv_call_t *)fetch);
        return NULL;
    }
    fetch->folded = record_count;
    fetch->budget = params->budget_bytes != 0 && params->budget_bytes < RECORD_MAX ? params->budget_bytes : RECORD_MAX;
    Balancekv__V1__Band bands[BKV_MAX_BANDS], *profile[BKV_MAX_BANDS];
    for (uint32_t i = 0; i < params->profile.count; i++) {
        balancekv__v1__band__init(&bands[i]);
        bands[i].age = params->profile.bands[i].age;
        bands[i].rate = params->profile.bands[i].rate;
        profile[i] = &bands[i];
    }
    Balancekv__V1__FoldRequest request = BALANCEKV__V1__FOLD_REQUEST__INIT;
    request.spec_id = bkv_client_spec_bytes(id);
    request.n_keys = count;
    request.keys = list;
    request.budget_bytes = params->budget_bytes;
    request.rate = params->rate;
    request.ttl_ms = params->ttl_ms;
    request.n_profile = params->profile.count;
    request.profile = profile;
    fetch->call.request = bkv_client_pack(&request.base);
    free(list);
    return (bkv_call_t *)fetch;
}

bkv_status_t bkv_fold_remote(bkv_client_t *client, const bkv_spec_id_t *id, const bkv_key_t *keys, size_t count,
                             const bkv_fold_request_t *params, uint32_t timeout_ms, bkv_record_t *records, size_t *record_count,
                             bkv_error_t *err) {
    assert(client != NULL && id != NULL && (keys != NULL || count == 0) && params != NULL && records != NULL &&
           record_count != NULL);
    *record_count = 0;
    bkv_status_t status = bkv_profile_check(&params->profile, err);
    if (status != BKV_OK) {
        return status;
    }
    bkv_call_t *call = fold_new(client, id, keys, count, params, timeout_ms, records, record_count);
    status = bkv_call_run(call, err);
    bkv_call_free(call);
    return status;
}

bkv_status_t bkv_fold_submit(bkv_queue_t *queue, uint64_t tag, const bkv_spec_id_t *id, const bkv_key_t *keys, size_t count,
                             const bkv_fold_request_t *params, uint32_t timeout_ms, bkv_record_t *records,
                             size_t *record_count) {
    assert(queue != NULL && id != NULL && (keys != NULL || count == 0) && params != NULL && records != NULL &&
           record_count != NULL);
    if (bkv_profile_check(&params->profile, NULL) != BKV_OK) {
        return BKV_INVALID_ARGUMENT;
    }
    bkv_call_t *call = fold_new(bkv_queue_client(queue), id, keys, count, params, timeout_ms, records, record_count);
    bkv_status_t status = bkv_call_submit(call, queue, tag);
    if (status != BKV_OK) {
        records_init(records, NULL, fold_room(params), status);
    }
    return status;
}
