// attempt.c - puts a call's question to the peer, and says what came of it and what that says of the peer.
#include "daemon/cluster/peer/internal.h"

#include "daemon/observe/clock.h"
#include "proto/answer.h"

#include <stdlib.h>

// What may be in buffers on its way, and the slowest link on which that is no reason to give a call up.
#define BUFFERED_MOST (16u << 20)
#define SLOW_LINK     4096 // bytes a millisecond

static void on_over(bkv_exchange_t *exchange);

static grpc_byte_buffer *on_next(bkv_exchange_t *exchange, bool *last) {
    bkv_peer_attempt_t *attempt = (bkv_peer_attempt_t *)exchange;
    grpc_byte_buffer *message = attempt->call->kind->next(attempt->call, last);
    if (message == NULL && !*last) {
        bkv_fail(&attempt->fault, BKV_RESOURCE_EXHAUSTED, "no memory for a message");
    }
    return message;
}

// gRPC says that a message is sent when it is in somebody's buffers: those of sockets and windows at both ends. Until what is in
// them has gone through a slow link, even a good peer can say nothing.
static void on_sent(bkv_exchange_t *exchange) {
    bkv_peer_attempt_t *attempt = (bkv_peer_attempt_t *)exchange;
    uint64_t buffered = exchange->sent_bytes < BUFFERED_MOST ? exchange->sent_bytes : BUFFERED_MOST;
    atomic_store(&attempt->way_ms, buffered / SLOW_LINK);
    atomic_store(&attempt->progress_ms, bkv_now_ms());
}

static bool on_take(bkv_exchange_t *exchange, grpc_byte_buffer *message) {
    bkv_peer_attempt_t *attempt = (bkv_peer_attempt_t *)exchange;
    bkv_peer_call_t *call = attempt->call;
    uint64_t now_us = bkv_now_us();
    atomic_store(&attempt->progress_ms, bkv_now_ms());
    if (!exchange->answered && !call->kind->probes && call->kind->shape != BKV_UPLOAD) {
        bkv_pulse_answered(&call->peer->pulse, now_us - attempt->started_us, call->kind->small);
    }
    bkv_peer_heard(call->peer, bkv_now_ms());
    return attempt->fault.status == BKV_OK && call->kind->take(call, message, &attempt->fault) == BKV_OK;
}

static void on_gone(bkv_exchange_t *exchange) {
    bkv_peer_attempt_t *attempt = (bkv_peer_attempt_t *)exchange;
    bkv_peers_t *peers = attempt->peers;
    bkv_exchange_deinit(exchange);
    free(attempt);
    bkv_peers_leave(peers);
}

static const bkv_exchange_hooks_t hooks = {.next = on_next, .sent = on_sent, .take = on_take, .over = on_over, .gone = on_gone};

// ---- the start ----

static bkv_peer_attempt_t *attempt_new(bkv_peer_call_t *call) {
    bkv_peer_attempt_t *attempt = calloc(1, sizeof(*attempt));
    if (attempt == NULL) {
        return NULL;
    }
    bkv_peer_t *peer = call->peer;
    attempt->peers = peer->peers;
    attempt->call = call;
    attempt->started_us = bkv_now_us();
    atomic_init(&attempt->progress_ms, bkv_now_ms());
    bkv_exchange_init(&attempt->exchange, &hooks, call->kind->shape,
                      grpc_channel_create_call(peer->channel, NULL, GRPC_PROPAGATE_DEFAULTS, call->lane->completions,
                                               grpc_slice_from_static_string(call->kind->method), NULL,
                                               bkv_peers_timespec(call->deadline_ms), NULL));
    attempt->exchange.metadata_flags = call->kind->probes ? GRPC_INITIAL_METADATA_WAIT_FOR_READY : 0;
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
    if (attempt == NULL || !bkv_exchange_prepare(&attempt->exchange)) {
        if (attempt != NULL) {
            on_gone(&attempt->exchange);
        }
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "%s: no memory for a question", call->peer->id);
    }
    if (!attempt_publish(attempt)) {
        grpc_call_cancel(attempt->exchange.grpc, NULL); // before its first batch: they all end at once
    }
    bkv_exchange_start(&attempt->exchange);
    return BKV_OK;
}

// ---- the end of an attempt ----

// A peer's status, as peers.h has it.
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

static void read_details(const bkv_exchange_t *exchange, char text[BKV_MESSAGE_MAX]) {
    bkv_answer_text(GRPC_SLICE_START_PTR(exchange->details), GRPC_SLICE_LENGTH(exchange->details), text, BKV_MESSAGE_MAX);
}

// What the attempt came to, in our words.
static void attempt_result(const bkv_peer_attempt_t *attempt, bkv_error_t *error) {
    const bkv_exchange_t *exchange = &attempt->exchange;
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
    } else if (exchange->code != GRPC_STATUS_OK) {
        read_details(exchange, text);
        bkv_status_t status = bkv_answer_status((uint32_t)exchange->code);
        bkv_fail(error, call->kind->raw ? status : public_status(status), "%s: %.180s", id, text);
    } else if (!exchange->answered && call->kind->shape != BKV_DOWNLOAD && !exchange->empty) {
        // gRPC may drop a response that comes just as the deadline passes, but not its status.
        bool late = call->deadline_ms <= bkv_now_ms() + 5;
        bkv_fail(error, late ? BKV_DEADLINE_EXCEEDED : BKV_INTERNAL, "%s: answered OK without a response", id);
    }
}

// Was it the daemon that ended the call, or gRPC at this end?
static bool ended_by_peer(const bkv_exchange_t *exchange) {
    return bkv_exchange_named(exchange) ||
           (exchange->code != GRPC_STATUS_UNAVAILABLE && exchange->code != GRPC_STATUS_DEADLINE_EXCEEDED &&
            exchange->code != GRPC_STATUS_CANCELLED);
}

// What the attempt's end says of the peer.
static void attempt_judge(const bkv_peer_attempt_t *attempt) {
    const bkv_exchange_t *exchange = &attempt->exchange;
    bkv_peer_t *peer = attempt->call->peer;
    uint64_t now_ms = bkv_now_ms();
    if (exchange->empty || attempt->fault.status != BKV_OK) {
        return;
    }
    if (!attempt->silent && ended_by_peer(exchange)) {
        bkv_peer_heard(peer, now_ms);
    } else if (!attempt->silent && exchange->code == GRPC_STATUS_UNAVAILABLE) {
        char why[BKV_MESSAGE_MAX];
        read_details(exchange, why);
        bkv_peer_unreachable(peer, now_ms, why);
    } else {
        bkv_peer_unheard(peer, atomic_load(&attempt->progress_ms), now_ms);
    }
}

// The result of an attempt is there: the call goes on, or is gone, without it.
static void on_over(bkv_exchange_t *exchange) {
    bkv_peer_attempt_t *attempt = (bkv_peer_attempt_t *)exchange;
    bkv_peer_call_t *call = attempt->call;
    pthread_mutex_lock(&call->lane->lock);
    call->attempt = NULL;
    pthread_mutex_unlock(&call->lane->lock);
    attempt_judge(attempt);
    attempt_result(attempt, &call->error);
    bool more = call->error.status == BKV_OK && call->kind->more != NULL && call->kind->more(call);
    if (!more || bkv_peer_call_attempt(call, &call->error) != BKV_OK) {
        bkv_peer_call_conclude(call);
    }
}
