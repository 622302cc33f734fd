// attempt.c - puts a call's question to the peer as a gRPC call: sends, receives, and says what came of it and what that says of
// the peer.
#include "daemon/cluster/peer/internal.h"

#include "daemon/observe/clock.h"
#include "proto/handover.h"

#include <assert.h>
#include <grpc/byte_buffer.h>
#include <stdlib.h>
#include <string.h>

// What a daemon sends along with each failure (daemon/rpc/call.c): it was not gRPC, at this end, that ended the call.
#define REQUEST_ID_KEY "bkv-request-id"

// What may be in buffers on its way, and the slowest link on which that is no reason to give a call up.
#define BUFFERED_MOST (16u << 20)
#define SLOW_LINK     4096 // bytes a millisecond

// ---- batches ----

static void attempt_end(bkv_peer_attempt_t *attempt);

static void attempt_free(bkv_peer_attempt_t *attempt) {
    bkv_peers_t *peers = attempt->peers;
    grpc_call_unref(attempt->grpc);
    grpc_byte_buffer_destroy(attempt->message);
    grpc_byte_buffer_destroy(attempt->prepared);
    grpc_byte_buffer_destroy(attempt->received);
    grpc_metadata_array_destroy(&attempt->initial);
    grpc_metadata_array_destroy(&attempt->trailing);
    grpc_slice_unref(attempt->details);
    free(attempt);
    bkv_peers_leave(peers);
}

static void batch_start(bkv_peer_attempt_t *attempt, const grpc_op *ops, size_t count, bkv_peer_tag_t *tag) {
    BKV_HAND_OVER(tag);
    grpc_call_error error = grpc_call_start_batch(attempt->grpc, ops, count, tag, NULL);
    assert(error == GRPC_CALL_OK); // anything else is a batch that is wrong in itself
    (void)error;
}

// One of the batches that make the result is back. The sending one does not count: a socket that blocks may keep it.
static void batch_received(bkv_peer_attempt_t *attempt) {
    if (--attempt->waiting > 0) {
        return;
    }
    if (attempt->sending) {
        grpc_call_cancel(attempt->grpc, NULL); // answered early, or late: nobody wants the rest
    }
    attempt_end(attempt);
    if (!attempt->sending) {
        attempt_free(attempt);
    }
}

static void take(bkv_peer_attempt_t *attempt) {
    bkv_peer_call_t *call = attempt->call;
    uint64_t now_us = bkv_now_us();
    atomic_store(&attempt->progress_ms, bkv_now_ms());
    if (!attempt->answered && !call->kind->probes && call->kind->shape != BKV_PEER_UPLOAD) {
        bkv_pulse_answered(&call->peer->pulse, now_us - attempt->started_us, call->kind->small);
    }
    attempt->answered = true;
    bkv_peer_heard(call->peer, bkv_now_ms());
    if (attempt->fault.status == BKV_OK && call->kind->take(call, attempt->received, &attempt->fault) != BKV_OK) {
        grpc_call_cancel(attempt->grpc, NULL);
    }
}

static void on_status(void *self, bool ok) {
    bkv_peer_attempt_t *attempt = self;
    (void)ok; // the status says it
    if (attempt->received != NULL && attempt->call->kind->shape != BKV_PEER_DOWNLOAD) {
        take(attempt);
    }
    batch_received(attempt);
}

static void receive_next(bkv_peer_attempt_t *attempt) {
    grpc_op op = {.op = GRPC_OP_RECV_MESSAGE, .data.recv_message.recv_message = &attempt->received};
    batch_start(attempt, &op, 1, &attempt->receive_tag);
}

static void on_receive(void *self, bool ok) {
    bkv_peer_attempt_t *attempt = self;
    bool more = ok && attempt->received != NULL;
    if (more) {
        take(attempt);
        grpc_byte_buffer_destroy(attempt->received);
        attempt->received = NULL;
    }
    if (more && attempt->fault.status == BKV_OK) {
        receive_next(attempt);
    } else {
        batch_received(attempt);
    }
}

// ---- sending ----

// False: no memory.
static bool prepare(bkv_peer_attempt_t *attempt) {
    attempt->prepared = attempt->call->kind->next(attempt->call, &attempt->last);
    attempt->is_prepared = true;
    return attempt->prepared != NULL || attempt->last;
}

// Sends what is prepared; with the first message go the metadata that open the call, with the last one its end.
static void send_prepared(bkv_peer_attempt_t *attempt, bool first) {
    grpc_op ops[3];
    memset(ops, 0, sizeof(ops));
    size_t n = 0;
    attempt->message = attempt->prepared;
    attempt->prepared = NULL;
    attempt->is_prepared = false;
    attempt->sending = true;
    if (first) {
        ops[n].flags = attempt->call->kind->probes ? GRPC_INITIAL_METADATA_WAIT_FOR_READY : 0;
        ops[n++].op = GRPC_OP_SEND_INITIAL_METADATA;
    }
    if (attempt->message != NULL) {
        attempt->sent_bytes += grpc_byte_buffer_length(attempt->message); // which sending empties
        ops[n].op = GRPC_OP_SEND_MESSAGE;
        ops[n++].data.send_message.send_message = attempt->message;
    }
    if (attempt->last) {
        ops[n++].op = GRPC_OP_SEND_CLOSE_FROM_CLIENT;
    }
    batch_start(attempt, ops, n, &attempt->send_tag);
}

// The message after the next is made while the next is on its way.
static void send_next(bkv_peer_attempt_t *attempt) {
    bool good = attempt->is_prepared || prepare(attempt);
    if (good) {
        send_prepared(attempt, false);
        good = attempt->last || prepare(attempt);
    }
    if (!good) {
        bkv_fail(&attempt->fault, BKV_RESOURCE_EXHAUSTED, "no memory for a message");
        grpc_call_cancel(attempt->grpc, NULL);
    }
}

// gRPC says that a message is sent when it is in somebody's buffers: those of sockets and windows at both ends. Until what is in
// them has gone through a slow link, even a good peer can say nothing.
static void note_sent(bkv_peer_attempt_t *attempt) {
    uint64_t buffered = attempt->sent_bytes < BUFFERED_MOST ? attempt->sent_bytes : BUFFERED_MOST;
    atomic_store(&attempt->way_ms, buffered / SLOW_LINK);
    atomic_store(&attempt->progress_ms, bkv_now_ms());
}

static void on_send(void *self, bool ok) {
    bkv_peer_attempt_t *attempt = self;
    bool more = !attempt->last || attempt->is_prepared;
    if (ok) {
        note_sent(attempt);
    }
    grpc_byte_buffer_destroy(attempt->message);
    attempt->message = NULL;
    attempt->sending = false;
    if (attempt->call == NULL) {
        attempt_free(attempt); // it was kept for this
    } else if (ok && more && attempt->fault.status == BKV_OK) {
        send_next(attempt);
    }
}

// ---- the start ----

// A batch for the result, which is there when the call has ended; and for a download one for its messages.
static void receive_all(bkv_peer_attempt_t *attempt, bool download) {
    grpc_op ops[3];
    memset(ops, 0, sizeof(ops));
    ops[0].op = GRPC_OP_RECV_INITIAL_METADATA;
    ops[0].data.recv_initial_metadata.recv_initial_metadata = &attempt->initial;
    ops[1].op = GRPC_OP_RECV_STATUS_ON_CLIENT;
    ops[1].data.recv_status_on_client.trailing_metadata = &attempt->trailing;
    ops[1].data.recv_status_on_client.status = &attempt->code;
    ops[1].data.recv_status_on_client.status_details = &attempt->details;
    ops[2].op = GRPC_OP_RECV_MESSAGE;
    ops[2].data.recv_message.recv_message = &attempt->received;
    batch_start(attempt, ops, download ? 2 : 3, &attempt->status_tag);
    // The lane may end and free the attempt as soon as all of `waiting` have been started, so not before this:
    if (download) {
        receive_next(attempt);
    }
}

// There was nothing to send: an empty batch, which comes back at once.
static void on_nothing(void *self, bool ok) {
    bkv_peer_attempt_t *attempt = self;
    (void)ok;
    attempt->code = GRPC_STATUS_OK;
    batch_received(attempt);
}

static bkv_peer_attempt_t *attempt_new(bkv_peer_call_t *call) {
    bkv_peer_attempt_t *attempt = calloc(1, sizeof(*attempt));
    if (attempt == NULL) {
        return NULL;
    }
    bkv_peer_t *peer = call->peer;
    attempt->peers = peer->peers;
    attempt->call = call;
    attempt->send_tag = (bkv_peer_tag_t){.run = on_send, .self = attempt};
    attempt->status_tag = (bkv_peer_tag_t){.run = on_status, .self = attempt};
    attempt->receive_tag = (bkv_peer_tag_t){.run = on_receive, .self = attempt};
    attempt->code = GRPC_STATUS_UNKNOWN;
    attempt->details = grpc_empty_slice();
    attempt->waiting = call->kind->shape == BKV_PEER_DOWNLOAD ? 2 : 1;
    attempt->started_us = bkv_now_us();
    atomic_init(&attempt->progress_ms, bkv_now_ms());
    grpc_metadata_array_init(&attempt->initial);
    grpc_metadata_array_init(&attempt->trailing);
    attempt->grpc = grpc_channel_create_call(peer->channel, NULL, GRPC_PROPAGATE_DEFAULTS, call->lane->completions,
                                             grpc_slice_from_static_string(call->kind->method), NULL,
                                             bkv_peers_timespec(call->deadline_ms), NULL);
    bkv_peers_hold(peer->peers);
    return attempt;
}

// Shows the attempt to those who may want to cancel it. False: somebody wanted to already.
static bool attempt_publish(bkv_peer_attempt_t *attempt) {
    bkv_peer_call_t *call = attempt->call;
    pthread_mutex_lock(&call->lane->lock);
    call->attempt = attempt;
    bool go = !atomic_load(&call->cancelled);
    pthread_mutex_unlock(&call->lane->lock);
    return go;
}

bkv_status_t bkv_peer_call_attempt(bkv_peer_call_t *call, bkv_error_t *err) {
    bkv_peer_attempt_t *attempt = attempt_new(call);
    if (attempt == NULL || !prepare(attempt)) {
        if (attempt != NULL) {
            attempt_free(attempt);
        }
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "%s: no memory for a question", call->peer->id);
    }
    bool download = call->kind->shape == BKV_PEER_DOWNLOAD; // the call may be over before receive_all is
    if (!attempt_publish(attempt)) {
        grpc_call_cancel(attempt->grpc, NULL); // before its first batch: they all end at once
    }
    if (attempt->prepared == NULL) {
        attempt->waiting = 1;
        attempt->status_tag.run = on_nothing;
        batch_start(attempt, NULL, 0, &attempt->status_tag);
        return BKV_OK;
    }
    send_prepared(attempt, true);
    receive_all(attempt, download);
    return BKV_OK;
}

// ---- the end of an attempt ----

static bkv_status_t status_of(grpc_status_code code) {
    switch ((int)code) {
#define X(name, number, text)                                                                                                  \
    case number:                                                                                                               \
        return BKV_##name;
        BKV_STATUS_LIST(X)
#undef X
    default:
        return BKV_INTERNAL;
    }
}

// The same, as peers.h has it.
static bkv_status_t public_status(bkv_status_t status) {
    switch (status) {
    case BKV_DEADLINE_EXCEEDED:
    case BKV_PERMISSION_DENIED:
    case BKV_UNAUTHENTICATED:
        return status;
    case BKV_BUSY:
    case BKV_RESOURCE_EXHAUSTED:
    case BKV_CANCELLED: // not by us: it ends
        return BKV_BUSY;
    default:
        return BKV_INTERNAL;
    }
}

// Text from outside, made fit to be printed.
static void read_details(const bkv_peer_attempt_t *attempt, char text[BKV_MESSAGE_MAX]) {
    size_t length = GRPC_SLICE_LENGTH(attempt->details);
    length = length < BKV_MESSAGE_MAX - 1 ? length : BKV_MESSAGE_MAX - 1;
    for (size_t i = 0; i < length; i++) {
        unsigned char c = GRPC_SLICE_START_PTR(attempt->details)[i];
        text[i] = (char)(c < 0x20 || c >= 0x7f ? ' ' : c);
    }
    text[length] = '\0';
}

// What the attempt came to, in our words.
static void attempt_result(const bkv_peer_attempt_t *attempt, bkv_error_t *error) {
    const bkv_peer_call_t *call = attempt->call;
    const char *id = call->peer->id;
    char text[BKV_MESSAGE_MAX];
    *error = (bkv_error_t){.status = BKV_OK};
    if (atomic_load(&call->cancelled)) {
        bkv_fail(error, BKV_CANCELLED, "%s: given up", id);
    } else if (attempt->fault.status != BKV_OK) {
        bkv_fail(error, attempt->fault.status, "%s: %.180s", id, attempt->fault.message);
    } else if (attempt->silent) {
        bkv_fail(error, BKV_DEADLINE_EXCEEDED, "%s: has said nothing for %u ms", id, attempt->peers->timeout_ms);
    } else if (attempt->code != GRPC_STATUS_OK) {
        read_details(attempt, text);
        bkv_status_t status = status_of(attempt->code);
        bkv_fail(error, call->kind->raw ? status : public_status(status), "%s: %.180s", id, text);
    } else if (!attempt->answered && call->kind->shape != BKV_PEER_DOWNLOAD && attempt->status_tag.run != on_nothing) {
        // gRPC may drop a response that comes just as the deadline passes, but not its status.
        bool late = call->deadline_ms <= bkv_now_ms() + 5;
        bkv_fail(error, late ? BKV_DEADLINE_EXCEEDED : BKV_INTERNAL, "%s: answered OK without a response", id);
    }
}

// Was it the daemon that ended the call, or gRPC at this end?
static bool ended_by_peer(const bkv_peer_attempt_t *attempt) {
    for (size_t i = 0; i < attempt->trailing.count; i++) {
        if (grpc_slice_str_cmp(attempt->trailing.metadata[i].key, REQUEST_ID_KEY) == 0) {
            return true;
        }
    }
    return attempt->code != GRPC_STATUS_UNAVAILABLE && attempt->code != GRPC_STATUS_DEADLINE_EXCEEDED &&
           attempt->code != GRPC_STATUS_CANCELLED;
}

// What the attempt's end says of the peer.
static void attempt_judge(const bkv_peer_attempt_t *attempt) {
    bkv_peer_t *peer = attempt->call->peer;
    uint64_t now_ms = bkv_now_ms();
    if (attempt->status_tag.run == on_nothing || attempt->fault.status != BKV_OK) {
        return;
    }
    if (!attempt->silent && ended_by_peer(attempt)) {
        bkv_peer_heard(peer, now_ms);
    } else if (!attempt->silent && attempt->code == GRPC_STATUS_UNAVAILABLE) {
        char why[BKV_MESSAGE_MAX];
        read_details(attempt, why);
        bkv_peer_unreachable(peer, now_ms, why);
    } else {
        bkv_peer_unheard(peer, atomic_load(&attempt->progress_ms), now_ms);
    }
}

// The result of an attempt is there: the call goes on, or is gone, without it.
static void attempt_end(bkv_peer_attempt_t *attempt) {
    bkv_peer_call_t *call = attempt->call;
    pthread_mutex_lock(&call->lane->lock);
    call->attempt = NULL;
    pthread_mutex_unlock(&call->lane->lock);
    attempt_judge(attempt);
    attempt_result(attempt, &call->error);
    attempt->call = NULL;
    grpc_byte_buffer_destroy(attempt->prepared); // and with it what it refers to
    attempt->prepared = NULL;
    bool more = call->error.status == BKV_OK && call->kind->more != NULL && call->kind->more(call);
    if (!more || bkv_peer_call_attempt(call, &call->error) != BKV_OK) {
        bkv_peer_call_conclude(call);
    }
}
