// fetch.c - records that are brought here: by one-sided reads where both ends can (verbs.c), the rest by stream, straight to
// where their sink wants them.
//
// Nothing that a member says is believed: not which record comes, not how long it is, not how much more there is. What the bytes
// are worth is for the sink to find out; but which record they say they are is looked at before anybody reserves room for them.
#include "daemon/cluster/peer/internal.h"

#include "daemon/cluster/peer/verbs.h"
#include "peer.pb-c.h"
#include "proto/chunk.h"

#include <assert.h>
#include <grpc/byte_buffer.h>
#include <stdlib.h>
#include <string.h>

// ---- one record, from whichever source ----

void *bkv_peer_fetch_begin(bkv_peer_fetch_t *fetch, uint32_t index, uint64_t tenant, uint64_t bytes, uint64_t ttl_ms) {
    assert(index < fetch->count && fetch->states[index] == BKV_FETCH_DUE);
    fetch->states[index] = BKV_FETCH_BEGUN;
    fetch->lengths[index] = bytes;
    void *memory = fetch->sink->begin(fetch->user, index, tenant, bytes, ttl_ms);
    if (memory == NULL) {
        bkv_error_t error;
        bkv_fail(&error, BKV_CANCELLED, "%s: not wanted here", fetch->call.peer->id);
        bkv_peer_fetch_end(fetch, index, &error);
    }
    return memory;
}

void bkv_peer_fetch_keep(bkv_peer_fetch_t *fetch, uint32_t index, void *memory) {
    assert(index < fetch->count && fetch->states[index] == BKV_FETCH_BEGUN);
    if (fetch->kept == NULL) {
        fetch->kept = calloc(fetch->count, sizeof(fetch->kept[0]));
    }
    if (fetch->kept == NULL) {
        bkv_error_t error;
        bkv_fail(&error, BKV_RESOURCE_EXHAUSTED, "%s: no memory to ask again", fetch->call.peer->id);
        bkv_peer_fetch_end(fetch, index, &error);
        return;
    }
    fetch->kept[index] = memory;
    fetch->states[index] = BKV_FETCH_KEPT;
}

void bkv_peer_fetch_end(bkv_peer_fetch_t *fetch, uint32_t index, const bkv_error_t *error) {
    assert(index < fetch->count && fetch->states[index] != BKV_FETCH_ENDED);
    bkv_peer_t *peer = fetch->call.peer;
    fetch->states[index] = BKV_FETCH_ENDED;
    fetch->ended++;
    if (error->status == BKV_OK) {
        atomic_fetch_add(&peer->fetched_bytes, fetch->lengths[index]);
        atomic_fetch_add(&peer->peers->counters.peer_fetched_total, 1);
        atomic_fetch_add(&peer->peers->counters.peer_fetched_bytes_total, fetch->lengths[index]);
    }
    fetch->sink->end(fetch->user, index, error);
}

// ---- by stream: what is asked ----

// The part that is due; false: none is.
static bool set_part(bkv_peer_fetch_t *fetch) {
    uint32_t left = fetch->rest_count - fetch->at, most = fetch->call.peer->peers->max_batch;
    fetch->part = left < most ? left : most;
    fetch->position = 0;
    fetch->coming = false;
    return left > 0;
}

static grpc_byte_buffer *fetch_next(bkv_peer_call_t *call, bool *last) {
    bkv_peer_fetch_t *fetch = (bkv_peer_fetch_t *)call;
    *last = true;
    bkv_name_t *names = fetch->part > 0 ? malloc(fetch->part * sizeof(names[0])) : NULL;
    if (names == NULL) {
        *last = fetch->part == 0;
        return NULL;
    }
    for (uint32_t i = 0; i < fetch->part; i++) {
        names[i] = fetch->names[fetch->rest[fetch->at + i]];
    }
    Balancekv__Cluster__V1__FetchRequest request = BALANCEKV__CLUSTER__V1__FETCH_REQUEST__INIT;
    request.names = (ProtobufCBinaryData){.len = fetch->part * sizeof(names[0]), .data = (uint8_t *)names};
    grpc_byte_buffer *message = bkv_peer_pack(&request.base);
    free(names);
    return message;
}

// ---- by stream: what comes ----

// Which of the fetch's records it is that comes.
static uint32_t due_index(const bkv_peer_fetch_t *fetch) {
    return fetch->rest[fetch->at + fetch->position];
}

static void end_due(bkv_peer_fetch_t *fetch, const bkv_error_t *error) {
    if (fetch->states[due_index(fetch)] != BKV_FETCH_ENDED) { // it was not wanted
        bkv_peer_fetch_end(fetch, due_index(fetch), error);
    }
    fetch->coming = false;
    fetch->position++;
}

// Which record the chunk belongs to: the one that is coming, or else any after it.
static bkv_status_t take_index(bkv_peer_fetch_t *fetch, const Balancekv__V1__RecordChunk *head, bkv_error_t *err) {
    bool good = fetch->coming ? head->index == fetch->position : head->index >= fetch->position && head->index < fetch->part;
    if (!good) {
        return bkv_fail(err, BKV_INTERNAL, "chunk.index: %u of %u records, where %u was due", head->index, fetch->part,
                        fetch->position);
    }
    fetch->position = head->index;
    return BKV_OK;
}

static bkv_status_t take_missing(bkv_peer_fetch_t *fetch, const Balancekv__V1__RecordChunk *head, bkv_error_t *err) {
    if (fetch->coming) {
        return bkv_fail(err, BKV_INTERNAL, "chunk.code: record %u is given up half-way", head->index);
    }
    bkv_error_t error;
    bkv_status_t status = head->code == BKV_NOT_FOUND || head->code == BKV_DATA_LOSS ? (bkv_status_t)head->code : BKV_INTERNAL;
    bkv_fail(&error, status, "%s: has it not (code %u)", fetch->call.peer->id, head->code);
    end_due(fetch, &error);
    return BKV_OK;
}

// Is that the header of the record that was asked for, so long as the chunk says?
static bkv_status_t check_header(const bkv_peer_fetch_t *fetch, const Balancekv__V1__RecordChunk *head,
                                 const bkv_record_header_t *header, bkv_error_t *err) {
    const bkv_name_t *name = &fetch->names[due_index(fetch)];
    if (header->magic != BKV_RECORD_MAGIC || header->length != head->record_bytes) {
        return bkv_fail(err, BKV_INTERNAL, "chunk.data: record %u does not begin with a header of that length", head->index);
    }
    if (memcmp(header->key, name->key.bytes, BKV_KEY_BYTES) != 0 ||
        memcmp(header->spec_id, name->spec_id.bytes, BKV_SPEC_ID_BYTES) != 0) {
        return bkv_fail(err, BKV_INTERNAL, "chunk.data: record %u is not the one that was asked for", head->index);
    }
    return BKV_OK;
}

// Where the record that begins is to go: where its sink says, or has said. NULL: nowhere, and it has ended.
static void *place_for(bkv_peer_fetch_t *fetch, uint64_t tenant, uint64_t ttl_ms) {
    uint32_t index = due_index(fetch);
    if (fetch->states[index] != BKV_FETCH_KEPT) {
        return bkv_peer_fetch_begin(fetch, index, tenant, fetch->bytes, ttl_ms);
    }
    if (fetch->lengths[index] != fetch->bytes) {
        bkv_error_t error;
        bkv_fail(&error, BKV_INTERNAL, "%s: a record of %llu bytes has %llu now", fetch->call.peer->id,
                 (unsigned long long)fetch->lengths[index], (unsigned long long)fetch->bytes);
        bkv_peer_fetch_end(fetch, index, &error);
        return NULL;
    }
    fetch->states[index] = BKV_FETCH_BEGUN;
    return fetch->kept[index];
}

// A record begins, of which this is the first chunk; its header must be in it.
static bkv_status_t take_first(bkv_peer_fetch_t *fetch, const bkv_chunk_t *chunk, grpc_byte_buffer *message, bkv_error_t *err) {
    const Balancekv__V1__RecordChunk *head = chunk->head;
    uint64_t most = fetch->call.peer->peers->record_max;
    bkv_record_header_t header;
    if (head->record_bytes < sizeof(header) || head->record_bytes > most) {
        return bkv_fail(err, BKV_INTERNAL, "chunk.record_bytes: %llu is not between %zu and %llu",
                        (unsigned long long)head->record_bytes, sizeof(header), (unsigned long long)most);
    }
    if (chunk->data_bytes < sizeof(header)) {
        return bkv_fail(err, BKV_INTERNAL, "chunk.data: %llu bytes of a record's beginning are less than its header",
                        (unsigned long long)chunk->data_bytes);
    }
    bkv_chunk_copy(message, chunk->data_at, sizeof(header), &header);
    bkv_status_t status = check_header(fetch, head, &header, err);
    if (status == BKV_OK) {
        fetch->coming = true;
        fetch->received = 0;
        fetch->bytes = head->record_bytes;
        fetch->memory = place_for(fetch, header.tenant, head->ttl_ms);
    }
    return status;
}

static bkv_status_t take_data(bkv_peer_fetch_t *fetch, const bkv_chunk_t *chunk, grpc_byte_buffer *message, bkv_error_t *err) {
    uint64_t missing = fetch->bytes - fetch->received;
    if (chunk->data_bytes == 0 || chunk->data_bytes > missing) {
        return bkv_fail(err, BKV_INTERNAL, "chunk.data: %llu bytes where %llu are missing",
                        (unsigned long long)chunk->data_bytes, (unsigned long long)missing);
    }
    if (fetch->memory != NULL) {
        bkv_chunk_copy(message, chunk->data_at, chunk->data_bytes, fetch->memory + fetch->received);
    }
    fetch->received += chunk->data_bytes;
    if (fetch->received == fetch->bytes) {
        end_due(fetch, &(bkv_error_t){.status = BKV_OK});
    }
    return BKV_OK;
}

static bkv_status_t take_chunk(bkv_peer_fetch_t *fetch, const bkv_chunk_t *chunk, grpc_byte_buffer *message, bkv_error_t *err) {
    bkv_status_t status = take_index(fetch, chunk->head, err);
    if (status != BKV_OK) {
        return status;
    }
    if (chunk->head->code != 0) {
        return take_missing(fetch, chunk->head, err);
    }
    if (!fetch->coming) {
        status = take_first(fetch, chunk, message, err);
    }
    return status == BKV_OK ? take_data(fetch, chunk, message, err) : status;
}

static bkv_status_t fetch_take(bkv_peer_call_t *call, grpc_byte_buffer *message, bkv_error_t *err) {
    bkv_chunk_t chunk;
    if (!bkv_chunk_parse(&chunk, message)) {
        return bkv_fail(err, BKV_INTERNAL, "Fetch: the answer is not a RecordChunk");
    }
    bkv_status_t status = take_chunk((bkv_peer_fetch_t *)call, &chunk, message, err);
    balancekv__v1__record_chunk__free_unpacked(chunk.head, NULL);
    return status;
}

// ---- the end ----

// All of a part must have come by its end.
static bool fetch_more(bkv_peer_call_t *call) {
    bkv_peer_fetch_t *fetch = (bkv_peer_fetch_t *)call;
    for (uint32_t i = 0; i < fetch->part; i++) {
        if (fetch->states[fetch->rest[fetch->at + i]] != BKV_FETCH_ENDED) {
            bkv_fail(&call->error, BKV_INTERNAL, "%s: record %u of %u never came, though the call ended well", call->peer->id,
                     i, fetch->part);
            return false;
        }
    }
    fetch->at += fetch->part;
    return set_part(fetch);
}

static void fetch_finish(bkv_peer_call_t *call) {
    bkv_peer_fetch_t *fetch = (bkv_peer_fetch_t *)call;
    for (uint32_t i = 0; i < fetch->count && fetch->ended < fetch->count; i++) {
        if (fetch->states[i] != BKV_FETCH_ENDED) {
            assert(call->error.status != BKV_OK);
            bkv_peer_fetch_end(fetch, i, &call->error);
        }
    }
    fetch->sink->done(fetch->user, &call->error);
}

static void fetch_clean(bkv_peer_call_t *call) {
    bkv_peer_fetch_t *fetch = (bkv_peer_fetch_t *)call;
    free(fetch->kept);
    free(fetch->lengths);
    free(fetch->rest);
    free(fetch->states);
}

static const bkv_peer_kind_t fetch_kind = {
    .method = BKV_PEER_SERVICE "Fetch",
    .shape = BKV_DOWNLOAD,
    .next = fetch_next,
    .take = fetch_take,
    .more = fetch_more,
    .finish = fetch_finish,
    .clean = fetch_clean,
};

// ---- the start ----

// What has not ended goes by stream.
static void set_rest(bkv_peer_fetch_t *fetch) {
    fetch->at = fetch->rest_count = 0;
    for (uint32_t i = 0; i < fetch->count; i++) {
        if (fetch->states[i] != BKV_FETCH_ENDED) {
            assert(fetch->states[i] == BKV_FETCH_DUE || fetch->states[i] == BKV_FETCH_KEPT);
            fetch->rest[fetch->rest_count++] = i;
        }
    }
    set_part(fetch);
}

void bkv_peer_fetch_rest(bkv_peer_fetch_t *fetch) {
    bkv_peer_call_t *call = &fetch->call;
    set_rest(fetch);
    if (fetch->rest_count > 0 && atomic_load(&call->cancelled)) {
        bkv_fail(&call->error, BKV_CANCELLED, "%s: given up", call->peer->id);
    } else if (fetch->rest_count > 0 && bkv_peer_call_attempt(call, &call->error) == BKV_OK) {
        return;
    }
    bkv_peer_call_conclude(call);
}

static bkv_peer_fetch_t *fetch_new(bkv_peer_t *peer, const bkv_name_t *names, uint32_t count, uint64_t deadline_ms) {
    bkv_peer_fetch_t *fetch = bkv_peer_call_new(sizeof(*fetch) + count * sizeof(names[0]), &fetch_kind, peer, deadline_ms);
    if (fetch == NULL) {
        return NULL;
    }
    fetch->count = count;
    fetch->states = calloc((size_t)count + 1, sizeof(fetch->states[0]));
    fetch->rest = calloc((size_t)count + 1, sizeof(fetch->rest[0]));
    fetch->lengths = calloc((size_t)count + 1, sizeof(fetch->lengths[0]));
    if (fetch->states == NULL || fetch->rest == NULL || fetch->lengths == NULL) {
        bkv_peer_call_free(&fetch->call);
        return NULL;
    }
    if (count > 0) {
        memcpy(fetch->names, names, count * sizeof(names[0]));
    }
    return fetch;
}

bkv_status_t bkv_peer_fetch(bkv_peer_t *peer, const bkv_name_t *names, uint32_t count, uint64_t deadline_ms,
                            const bkv_fetch_sink_t *sink, void *user, bkv_peer_call_t **call, bkv_error_t *err) {
    bkv_peer_fetch_t *fetch = fetch_new(peer, names, count, deadline_ms);
    if (fetch == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "%s: no memory for a question", peer->id);
    }
    fetch->sink = sink;
    fetch->user = user;
    bkv_status_t status = bkv_peer_call_admit(&fetch->call, err);
    if (status != BKV_OK) {
        bkv_peer_call_free(&fetch->call);
        return status;
    }
    if (call != NULL) {
        *call = &fetch->call; // its done may run at any time from here on
    }
    if (count > 0 && peer->offers_verbs && peer->peers->verbs != NULL && bkv_peer_verbs_fetch(peer, fetch)) {
        return BKV_OK;
    }
    set_rest(fetch);
    status = bkv_peer_call_attempt(&fetch->call, err);
    if (status != BKV_OK) {
        bkv_peer_call_withdraw(&fetch->call);
        bkv_peer_call_free(&fetch->call);
    }
    return status;
}

void bkv_peer_cancel(bkv_peer_call_t *call) {
    bkv_peer_call_cancel(call);
}
