// store.c - records on their way to another member. Messages refer to a record's bytes where they lie in the store: it is pinned
// from when its first message is made until gRPC has let go of the last one, which may be long after the call has ended.
//
// One message is made while the one before it is on its way, so that a peer that is slow to read costs pins on two records and
// what gRPC buffers.
#include "daemon/cluster/peer/internal.h"

#include "daemon/observe/clock.h"
#include "peer.pb-c.h"
#include "proto/answer.h"
#include "proto/chunk.h"
#include "proto/handover.h"

#include <grpc/byte_buffer.h>
#include <grpc/slice.h>
#include <stdlib.h>
#include <string.h>

// As what daemons send to clients: a record a little over a whole number of chunks does not get a tiny last one.
#define CHUNK_BYTES ((uint64_t)1 << 20)
#define CHUNK_SLACK ((uint64_t)64 << 10)

// A record on its way out.
typedef struct parcel {
    bkv_peers_t *peers;
    bkv_pin_t pin;
    _Atomic uint32_t holders; // the call while it sends, and every message that gRPC has not let go of
} parcel_t;

typedef struct storing {
    bkv_peer_call_t call;
    bkv_peer_store_t done;
    void *user;
    uint32_t count, at, part; // the part that is due: names[at..at + part)
    uint32_t next;            // of names: to be taken up next
    uint32_t sent_count;      // of this part
    uint32_t *sent;           // [sent_count] the part's records that went out, in the order of the answer's codes
    uint64_t *lengths;        // [count] of those that went out
    bkv_status_t *results;    // [count]
    parcel_t *parcel;         // of which there is more to send
    uint64_t parcel_sent;     // bytes
    bkv_name_t names[];       // [count]
} storing_t;

// ---- parcels ----

static void parcel_release(void *user) {
    parcel_t *parcel = user;
    BKV_TAKE_OVER(parcel);
    if (atomic_fetch_sub(&parcel->holders, 1) == 1) {
        bkv_peers_t *peers = parcel->peers;
        bkv_store_unpin(peers->store, &parcel->pin);
        free(parcel);
        bkv_peers_leave(peers);
    }
}

static bkv_status_t parcel_new(bkv_peers_t *peers, const bkv_name_t *name, parcel_t **result) {
    parcel_t *parcel = malloc(sizeof(*parcel));
    if (parcel == NULL) {
        return BKV_RESOURCE_EXHAUSTED;
    }
    *parcel = (parcel_t){.peers = peers, .holders = 1};
    bkv_status_t status = bkv_store_pin_unverified(peers->store, &name->spec_id, &name->key, bkv_now_ms(), &parcel->pin, NULL);
    if (status != BKV_OK) {
        free(parcel);
        return status;
    }
    bkv_peers_hold(peers);
    *result = parcel;
    return BKV_OK;
}

static grpc_slice parcel_slice(parcel_t *parcel, uint64_t offset, uint64_t length) {
    atomic_fetch_add(&parcel->holders, 1);
    BKV_HAND_OVER(parcel);
    void *bytes = (void *)(uintptr_t)(parcel->pin.data + offset); // gRPC only reads it
    return grpc_slice_new_with_user_data(bytes, length, parcel_release, parcel);
}

// ---- messages ----

// A message, and behind its other fields the data.
static grpc_byte_buffer *pack_with(const ProtobufCMessage *message, grpc_slice data) {
    grpc_slice slices[2] = {bkv_chunk_pack_before(message, GRPC_SLICE_LENGTH(data)), data};
    grpc_byte_buffer *buffer = grpc_raw_byte_buffer_create(slices, 2); // takes references of its own
    grpc_slice_unref(slices[0]);
    grpc_slice_unref(slices[1]);
    return buffer;
}

// Takes up the next record of the part that is still in the store; false: there is none, or (*enough false) no memory.
static bool take_up(storing_t *storing, bool *enough) {
    bkv_peers_t *peers = storing->call.peer->peers;
    while (storing->next < storing->at + storing->part) {
        uint32_t index = storing->next++;
        bkv_status_t status = parcel_new(peers, &storing->names[index], &storing->parcel);
        storing->results[index] = status;
        if (status == BKV_OK) {
            storing->sent[storing->sent_count++] = index;
            storing->lengths[index] = storing->parcel->pin.length;
            storing->parcel_sent = 0;
            return true;
        }
        if (status == BKV_RESOURCE_EXHAUSTED) {
            *enough = false;
            return false;
        }
    }
    return false;
}

static grpc_byte_buffer *store_next(bkv_peer_call_t *call, bool *last) {
    storing_t *storing = (storing_t *)call;
    bool enough = true;
    if (storing->parcel == NULL && !take_up(storing, &enough)) {
        *last = enough;
        return NULL;
    }
    parcel_t *parcel = storing->parcel;
    uint64_t left = parcel->pin.length - storing->parcel_sent;
    uint64_t length = left <= CHUNK_BYTES + CHUNK_SLACK ? left : CHUNK_BYTES;
    Balancekv__Cluster__V1__StoreRequest request = BALANCEKV__CLUSTER__V1__STORE_REQUEST__INIT;
    Balancekv__Cluster__V1__StoreRecord record = BALANCEKV__CLUSTER__V1__STORE_RECORD__INIT;
    if (storing->parcel_sent == 0) {
        bkv_name_t *name = &storing->names[storing->sent[storing->sent_count - 1]];
        record.name = (ProtobufCBinaryData){.len = BKV_NAME_BYTES, .data = (uint8_t *)name};
        record.record_bytes = parcel->pin.length;
        record.ttl_ms = bkv_store_ttl(call->peer->peers->store, &parcel->pin, bkv_now_ms());
        request.record = &record;
    }
    grpc_byte_buffer *message = pack_with(&request.base, parcel_slice(parcel, storing->parcel_sent, length));
    storing->parcel_sent += length;
    if (length == left) {
        storing->parcel = NULL;
        parcel_release(parcel);
    }
    *last = storing->parcel == NULL && storing->next == storing->at + storing->part;
    return message;
}

// ---- the answer ----

static void count_stored(storing_t *storing, uint32_t index) {
    bkv_peer_t *peer = storing->call.peer;
    atomic_fetch_add(&peer->stored_bytes, storing->lengths[index]);
    atomic_fetch_add(&peer->peers->counters.peer_stored_total, 1);
    atomic_fetch_add(&peer->peers->counters.peer_stored_bytes_total, storing->lengths[index]);
}

static bkv_status_t store_take(bkv_peer_call_t *call, grpc_byte_buffer *message, bkv_error_t *err) {
    storing_t *storing = (storing_t *)call;
    Balancekv__Cluster__V1__StoreResponse *response =
        (void *)bkv_peer_unpack(&balancekv__cluster__v1__store_response__descriptor, message);
    bool whole = storing->parcel == NULL && storing->next == storing->at + storing->part;
    bool good = response != NULL && whole && response->n_codes == storing->sent_count;
    for (uint32_t i = 0; good && i < storing->sent_count; i++) {
        storing->results[storing->sent[i]] = bkv_answer_status(response->codes[i]);
        if (response->codes[i] == BKV_OK) {
            count_stored(storing, storing->sent[i]);
        }
    }
    balancekv__cluster__v1__store_response__free_unpacked(response, NULL);
    return good ? BKV_OK : bkv_fail(err, BKV_INTERNAL, "Store: not an answer about %u records", storing->sent_count);
}

static bool store_more(bkv_peer_call_t *call) {
    storing_t *storing = (storing_t *)call;
    uint32_t left = storing->count - storing->at - storing->part, most = call->peer->peers->max_batch;
    storing->at += storing->part;
    storing->part = left < most ? left : most;
    storing->next = storing->at;
    storing->sent_count = 0;
    return left > 0;
}

static void store_finish(bkv_peer_call_t *call) {
    storing_t *storing = (storing_t *)call;
    storing->done(storing->user, &call->error, call->error.status == BKV_OK ? storing->results : NULL);
}

static void store_clean(bkv_peer_call_t *call) {
    storing_t *storing = (storing_t *)call;
    if (storing->parcel != NULL) {
        parcel_release(storing->parcel);
    }
    free(storing->sent);
    free(storing->lengths);
    free(storing->results);
}

static const bkv_peer_kind_t store_kind = {
    .method = BKV_PEER_SERVICE "Store",
    .shape = BKV_UPLOAD,
    .next = store_next,
    .take = store_take,
    .more = store_more,
    .finish = store_finish,
    .clean = store_clean,
};

bkv_status_t bkv_peer_store(bkv_peer_t *peer, const bkv_name_t *names, uint32_t count, uint64_t deadline_ms,
                            bkv_peer_store_t done, void *user, bkv_error_t *err) {
    storing_t *storing = bkv_peer_call_new(sizeof(*storing) + count * sizeof(names[0]), &store_kind, peer, deadline_ms);
    if (storing == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "%s: no memory for a question", peer->id);
    }
    storing->done = done;
    storing->user = user;
    storing->count = count;
    storing->sent = calloc((size_t)count + 1, sizeof(storing->sent[0]));
    storing->lengths = calloc((size_t)count + 1, sizeof(storing->lengths[0]));
    storing->results = calloc((size_t)count + 1, sizeof(storing->results[0]));
    if (storing->sent == NULL || storing->lengths == NULL || storing->results == NULL) {
        bkv_peer_call_free(&storing->call);
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "%s: no memory for a question", peer->id);
    }
    if (count > 0) {
        memcpy(storing->names, names, count * sizeof(names[0]));
    }
    store_more(&storing->call); // the first part
    return bkv_peer_call_start(&storing->call, err);
}
