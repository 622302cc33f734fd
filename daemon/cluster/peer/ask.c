// ask.c - questions of one message each way: Have and Forget, in parts of as many names as a message may have, Drain, probes, and
// whatever else a file of this room wants to know.
#include "daemon/cluster/peer/internal.h"

#include "daemon/observe/clock.h"
#include "peer.pb-c.h"

#include <grpc/byte_buffer.h>
#include <grpc/byte_buffer_reader.h>
#include <stdlib.h>
#include <string.h>

#define SMALL_QUESTION 64 // names: its answer takes no longer than one about a single one

// A suspected peer, which may have to be connected to first, has so long for a probe at least.
#define PROBE_LEAST_MS 500

// ---- messages ----

grpc_byte_buffer *bkv_peer_pack(const ProtobufCMessage *message) {
    grpc_slice slice = grpc_slice_malloc(protobuf_c_message_get_packed_size(message));
    protobuf_c_message_pack(message, GRPC_SLICE_START_PTR(slice));
    grpc_byte_buffer *packed = grpc_raw_byte_buffer_create(&slice, 1);
    grpc_slice_unref(slice);
    return packed;
}

ProtobufCMessage *bkv_peer_unpack(const ProtobufCMessageDescriptor *type, grpc_byte_buffer *message) {
    grpc_byte_buffer_reader reader;
    if (!grpc_byte_buffer_reader_init(&reader, message)) {
        return NULL;
    }
    grpc_slice bytes = grpc_byte_buffer_reader_readall(&reader);
    grpc_byte_buffer_reader_destroy(&reader);
    ProtobufCMessage *unpacked = protobuf_c_message_unpack(type, NULL, GRPC_SLICE_LENGTH(bytes), GRPC_SLICE_START_PTR(bytes));
    grpc_slice_unref(bytes);
    return unpacked;
}

// ---- about names: Have, Forget ----

typedef struct about {
    bkv_peer_call_t call;
    bkv_peer_have_t have; // one of these
    bkv_peer_forget_t forget;
    void *user;
    uint32_t count, at, part; // the part that is due: names[at..at + part)
    union {
        uint64_t *bytes;
        bool *had;
    } results; // [count]
    bkv_name_t names[];
} about_t;

static bool about_more(bkv_peer_call_t *call) {
    about_t *about = (about_t *)call;
    uint32_t left = about->count - about->at - about->part, most = call->peer->peers->max_batch;
    about->at += about->part;
    about->part = left < most ? left : most;
    return left > 0;
}

static ProtobufCBinaryData part_of(about_t *about) {
    return (ProtobufCBinaryData){.len = (size_t)about->part * BKV_NAME_BYTES, .data = (uint8_t *)&about->names[about->at]};
}

// A question of no names has no part, and nothing to send.
static grpc_byte_buffer *have_next(bkv_peer_call_t *call, bool *last) {
    about_t *about = (about_t *)call;
    *last = true;
    Balancekv__Cluster__V1__HaveRequest request = BALANCEKV__CLUSTER__V1__HAVE_REQUEST__INIT;
    request.names = part_of(about);
    return about->part > 0 ? bkv_peer_pack(&request.base) : NULL;
}

static bkv_status_t have_take(bkv_peer_call_t *call, grpc_byte_buffer *message, bkv_error_t *err) {
    about_t *about = (about_t *)call;
    Balancekv__Cluster__V1__HaveResponse *response =
        (void *)bkv_peer_unpack(&balancekv__cluster__v1__have_response__descriptor, message);
    bool good = response != NULL && response->n_bytes == about->part;
    if (good) {
        memcpy(about->results.bytes + about->at, response->bytes, about->part * sizeof(uint64_t));
    }
    balancekv__cluster__v1__have_response__free_unpacked(response, NULL);
    return good ? BKV_OK : bkv_fail(err, BKV_INTERNAL, "Have: not an answer about %u names", about->part);
}

static void have_finish(bkv_peer_call_t *call) {
    about_t *about = (about_t *)call;
    about->have(about->user, &call->error, call->error.status == BKV_OK ? about->results.bytes : NULL);
}

static grpc_byte_buffer *forget_next(bkv_peer_call_t *call, bool *last) {
    about_t *about = (about_t *)call;
    *last = true;
    Balancekv__Cluster__V1__ForgetRequest request = BALANCEKV__CLUSTER__V1__FORGET_REQUEST__INIT;
    request.names = part_of(about);
    return about->part > 0 ? bkv_peer_pack(&request.base) : NULL;
}

static bkv_status_t forget_take(bkv_peer_call_t *call, grpc_byte_buffer *message, bkv_error_t *err) {
    about_t *about = (about_t *)call;
    Balancekv__Cluster__V1__ForgetResponse *response =
        (void *)bkv_peer_unpack(&balancekv__cluster__v1__forget_response__descriptor, message);
    bool good = response != NULL && response->n_had == about->part;
    for (uint32_t i = 0; good && i < about->part; i++) {
        about->results.had[about->at + i] = response->had[i] != 0;
    }
    balancekv__cluster__v1__forget_response__free_unpacked(response, NULL);
    return good ? BKV_OK : bkv_fail(err, BKV_INTERNAL, "Forget: not an answer about %u names", about->part);
}

static void forget_finish(bkv_peer_call_t *call) {
    about_t *about = (about_t *)call;
    about->forget(about->user, &call->error, call->error.status == BKV_OK ? about->results.had : NULL);
}

static void about_clean(bkv_peer_call_t *call) {
    about_t *about = (about_t *)call;
    free(about->forget != NULL ? (void *)about->results.had : (void *)about->results.bytes);
}

#define HAVE                                                                                                                   \
    .method = BKV_PEER_SERVICE "Have", .shape = BKV_UNARY, .next = have_next, .take = have_take, .more = about_more,           \
    .finish = have_finish, .clean = about_clean

static const bkv_peer_kind_t have_few = {HAVE, .small = true};
static const bkv_peer_kind_t have_many = {HAVE};
static const bkv_peer_kind_t forget_kind = {
    .method = BKV_PEER_SERVICE "Forget",
    .shape = BKV_UNARY,
    .next = forget_next,
    .take = forget_take,
    .more = about_more,
    .finish = forget_finish,
    .clean = about_clean,
};

static about_t *about_new(const bkv_peer_kind_t *kind, bkv_peer_t *peer, const bkv_name_t *names, uint32_t count,
                          uint64_t deadline_ms, size_t result_bytes) {
    about_t *about = bkv_peer_call_new(sizeof(*about) + count * sizeof(names[0]), kind, peer, deadline_ms);
    if (about == NULL) {
        return NULL;
    }
    about->count = count;
    about->results.bytes = calloc((size_t)count + 1, result_bytes);
    if (about->results.bytes == NULL) {
        bkv_peer_call_free(&about->call);
        return NULL;
    }
    if (count > 0) {
        memcpy(about->names, names, count * sizeof(names[0]));
    }
    about_more(&about->call); // the first part
    return about;
}

bkv_status_t bkv_peer_have(bkv_peer_t *peer, const bkv_name_t *names, uint32_t count, uint64_t deadline_ms,
                           bkv_peer_have_t done, void *user, bkv_error_t *err) {
    const bkv_peer_kind_t *kind = count <= SMALL_QUESTION ? &have_few : &have_many;
    about_t *about = about_new(kind, peer, names, count, deadline_ms, sizeof(uint64_t));
    if (about == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "%s: no memory for a question", peer->id);
    }
    about->have = done;
    about->user = user;
    return bkv_peer_call_start(&about->call, err);
}

bkv_status_t bkv_peer_forget(bkv_peer_t *peer, const bkv_name_t *names, uint32_t count, uint64_t deadline_ms,
                             bkv_peer_forget_t done, void *user, bkv_error_t *err) {
    about_t *about = about_new(&forget_kind, peer, names, count, deadline_ms, sizeof(bool));
    if (about == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "%s: no memory for a question", peer->id);
    }
    about->forget = done;
    about->user = user;
    return bkv_peer_call_start(&about->call, err);
}

// ---- any single question ----

typedef struct question {
    bkv_peer_call_t call;
    bkv_peer_kind_t kind; // with the method
    const ProtobufCMessageDescriptor *type;
    bkv_peer_answer_t done;
    bkv_peer_drain_t drain; // of a Drain, in the place of done
    void *user;
    grpc_byte_buffer *request;
    ProtobufCMessage *response;
} question_t;

static grpc_byte_buffer *question_next(bkv_peer_call_t *call, bool *last) {
    *last = true;
    return grpc_byte_buffer_copy(((question_t *)call)->request);
}

static bkv_status_t question_take(bkv_peer_call_t *call, grpc_byte_buffer *message, bkv_error_t *err) {
    question_t *question = (question_t *)call;
    question->response = bkv_peer_unpack(question->type, message);
    return question->response != NULL ? BKV_OK : bkv_fail(err, BKV_INTERNAL, "the answer is not a %s", question->type->name);
}

static void question_finish(bkv_peer_call_t *call) {
    question_t *question = (question_t *)call;
    question->done(question->user, &call->error, call->error.status == BKV_OK ? question->response : NULL);
}

static void question_clean(bkv_peer_call_t *call) {
    question_t *question = (question_t *)call;
    grpc_byte_buffer_destroy(question->request);
    protobuf_c_message_free_unpacked(question->response, NULL);
}

static question_t *question_new(bkv_peer_t *peer, const char *method, const ProtobufCMessage *request,
                                const ProtobufCMessageDescriptor *type, uint64_t deadline_ms) {
    question_t *question = bkv_peer_call_new(sizeof(*question), NULL, peer, deadline_ms);
    if (question != NULL) {
        question->kind = (bkv_peer_kind_t){
            .method = method,
            .shape = BKV_UNARY,
            .small = true,
            .next = question_next,
            .take = question_take,
            .finish = question_finish,
            .clean = question_clean,
        };
        question->call.kind = &question->kind;
        question->type = type;
        question->request = bkv_peer_pack(request);
    }
    return question;
}

bkv_status_t bkv_peer_ask(bkv_peer_t *peer, const char *method, const ProtobufCMessage *request,
                          const ProtobufCMessageDescriptor *response, uint64_t deadline_ms, bkv_peer_answer_t done, void *user,
                          bkv_error_t *err) {
    question_t *question = question_new(peer, method, request, response, deadline_ms);
    if (question == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "%s: no memory for a question", peer->id);
    }
    question->kind.raw = true;
    question->done = done;
    question->user = user;
    return bkv_peer_call_start(&question->call, err);
}

// ---- Drain ----

static void drain_finish(bkv_peer_call_t *call) {
    question_t *question = (question_t *)call;
    if (call->error.status != BKV_OK) {
        question->drain(question->user, &call->error, NULL);
        return;
    }
    const Balancekv__Cluster__V1__PeerDrainResponse *response = (const void *)question->response;
    const bkv_drain_progress_t progress = {
        .draining = response->draining != 0,
        .done = response->done != 0,
        .left_keys = response->left_keys,
        .left_bytes = response->left_bytes,
        .moved_keys = response->moved_keys,
        .moved_bytes = response->moved_bytes,
        .settled = response->settled,
    };
    question->drain(question->user, &call->error, &progress);
}

bkv_status_t bkv_peer_drain(bkv_peer_t *peer, bkv_drain_order_t order, uint64_t deadline_ms, bkv_peer_drain_t done, void *user,
                            bkv_error_t *err) {
    Balancekv__Cluster__V1__PeerDrainRequest request = BALANCEKV__CLUSTER__V1__PEER_DRAIN_REQUEST__INIT;
    request.ask = order == BKV_DRAIN_ASK;
    request.undo = order == BKV_DRAIN_UNDO;
    question_t *question = question_new(peer, BKV_PEER_SERVICE "Drain", &request.base,
                                        &balancekv__cluster__v1__peer_drain_response__descriptor, deadline_ms);
    if (question == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "%s: no memory for a question", peer->id);
    }
    question->kind.finish = drain_finish;
    question->drain = done;
    question->user = user;
    return bkv_peer_call_start(&question->call, err);
}

// ---- probes ----

static grpc_byte_buffer *probe_next(bkv_peer_call_t *call, bool *last) {
    (void)call;
    *last = true;
    Balancekv__Cluster__V1__HaveRequest request = BALANCEKV__CLUSTER__V1__HAVE_REQUEST__INIT;
    return bkv_peer_pack(&request.base);
}

static bkv_status_t probe_take(bkv_peer_call_t *call, grpc_byte_buffer *message, bkv_error_t *err) {
    (void)call, (void)message, (void)err;
    return BKV_OK; // that something came is all that was asked
}

static void probe_finish(bkv_peer_call_t *call) {
    (void)call; // the attempt has told the peer
}

static const bkv_peer_kind_t probe_kind = {
    .method = BKV_PEER_SERVICE "Have",
    .shape = BKV_UNARY,
    .probes = true,
    .next = probe_next,
    .take = probe_take,
    .finish = probe_finish,
};

void bkv_peer_probe(bkv_peer_t *peer) {
    uint32_t timeout_ms = peer->peers->timeout_ms;
    uint64_t deadline_ms = bkv_now_ms() + (timeout_ms > PROBE_LEAST_MS ? timeout_ms : PROBE_LEAST_MS);
    bkv_peer_call_t *call = bkv_peer_call_new(sizeof(*call), &probe_kind, peer, deadline_ms);
    if (call != NULL) {
        (void)bkv_peer_call_start(call, NULL); // next time, then
    }
}
