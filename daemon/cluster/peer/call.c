// call.c - one question to a peer, from its admission to its end, and who gives it up. How it is put to the peer is attempt.c's, what
// is in the messages ask.c's, fetch.c's and store.c's.
#include "daemon/cluster/peer/internal.h"

#include <assert.h>
#include <stdlib.h>

#define CANCEL_STEP 64

// ---- the life of a call ----

void *bkv_peer_call_new(size_t size, const bkv_peer_kind_t *kind, bkv_peer_t *peer, uint64_t deadline_ms) {
    assert(size >= sizeof(bkv_peer_call_t));
    bkv_peer_call_t *call = calloc(1, size);
    if (call != NULL) {
        call->kind = kind;
        call->peer = bkv_peer_hold(peer);
        call->deadline_ms = deadline_ms;
    }
    return call;
}

void bkv_peer_call_free(bkv_peer_call_t *call) {
    if (call->kind->clean != NULL) {
        call->kind->clean(call);
    }
    bkv_peer_release(call->peer);
    free(call);
}

static void lane_add(bkv_peer_lane_t *lane, bkv_peer_call_t *call) {
    pthread_mutex_lock(&lane->lock);
    call->next_call = lane->calls;
    call->previous = &lane->calls;
    if (lane->calls != NULL) {
        lane->calls->previous = &call->next_call;
    }
    lane->calls = call;
    pthread_mutex_unlock(&lane->lock);
}

static void lane_remove(bkv_peer_lane_t *lane, bkv_peer_call_t *call) {
    pthread_mutex_lock(&lane->lock);
    assert(call->attempt == NULL);
    *call->previous = call->next_call;
    if (call->next_call != NULL) {
        call->next_call->previous = call->previous;
    }
    pthread_mutex_unlock(&lane->lock);
}

static bkv_status_t check_peer(const bkv_peer_call_t *call, bkv_error_t *err) {
    bkv_peer_t *peer = call->peer;
    if (atomic_load(&peer->closed)) {
        return bkv_fail(err, BKV_BUSY, "%s: is no member any more", peer->id);
    }
    if (!call->kind->probes && bkv_pulse_suspected(&peer->pulse)) {
        return bkv_fail(err, BKV_BUSY, "%s: has not answered lately", peer->id);
    }
    if (atomic_fetch_add(&peer->calls, 1) >= BKV_PEER_CALLS_MAX) {
        atomic_fetch_sub(&peer->calls, 1);
        return bkv_fail(err, BKV_BUSY, "%s: %d questions are under way already", peer->id, BKV_PEER_CALLS_MAX);
    }
    return BKV_OK;
}

bkv_status_t bkv_peer_call_admit(bkv_peer_call_t *call, bkv_error_t *err) {
    bkv_peers_t *peers = call->peer->peers;
    if (!bkv_peers_enter(peers)) {
        return bkv_fail(err, BKV_CANCELLED, "the daemon ends");
    }
    bkv_status_t status = check_peer(call, err);
    if (status != BKV_OK) {
        bkv_peers_leave(peers);
        return status;
    }
    call->lane = &peers->lanes[atomic_fetch_add(&peers->next_lane, 1) % peers->lane_count];
    lane_add(call->lane, call);
    if (atomic_load(&peers->closing) || atomic_load(&call->peer->closed)) { // since the look at these, and after the cancels
        atomic_store(&call->cancelled, true);
    }
    atomic_fetch_add(&peers->counters.peer_calls_total, 1);
    return BKV_OK;
}

void bkv_peer_call_withdraw(bkv_peer_call_t *call) {
    bkv_peer_t *peer = call->peer;
    lane_remove(call->lane, call);
    atomic_fetch_sub(&peer->calls, 1);
    bkv_peers_leave(peer->peers);
}

bkv_status_t bkv_peer_call_start(bkv_peer_call_t *call, bkv_error_t *err) {
    bkv_status_t status = bkv_peer_call_admit(call, err);
    if (status == BKV_OK && (status = bkv_peer_call_attempt(call, err)) != BKV_OK) {
        bkv_peer_call_withdraw(call);
    }
    if (status != BKV_OK) {
        bkv_peer_call_free(call);
    }
    return status;
}

void bkv_peer_call_conclude(bkv_peer_call_t *call) {
    bkv_peer_t *peer = call->peer;
    bkv_peers_t *peers = peer->peers;
    lane_remove(call->lane, call);
    atomic_fetch_sub(&peer->calls, 1);
    if (call->error.status != BKV_OK && call->error.status != BKV_CANCELLED) {
        atomic_fetch_add(&peer->failures, 1);
        atomic_fetch_add(&peers->counters.peer_calls_failed_total, 1);
    }
    call->kind->finish(call);
    bkv_peer_call_free(call);
    bkv_peers_leave(peers);
}

// ---- giving up ----

// Cancels without the lock: gRPC may let go of things then whose owners take other locks.
static void cancel_all(grpc_call **calls, size_t count) {
    for (size_t i = 0; i < count; i++) {
        grpc_call_cancel(calls[i], NULL);
        grpc_call_unref(calls[i]);
    }
}

void bkv_peer_call_cancel(bkv_peer_call_t *call) {
    grpc_call *grpc = NULL;
    pthread_mutex_lock(&call->lane->lock);
    if (!atomic_exchange(&call->cancelled, true) && call->attempt != NULL) {
        grpc = call->attempt->exchange.grpc;
        grpc_call_ref(grpc);
    }
    pthread_mutex_unlock(&call->lane->lock);
    cancel_all(&grpc, grpc != NULL);
}

// Each round takes those that have not been cancelled yet.
static bool lane_cancel(bkv_peer_lane_t *lane, const bkv_peer_t *peer) {
    grpc_call *found[CANCEL_STEP];
    size_t count = 0;
    pthread_mutex_lock(&lane->lock);
    for (bkv_peer_call_t *call = lane->calls; call != NULL && count < CANCEL_STEP; call = call->next_call) {
        if ((peer == NULL || call->peer == peer) && !atomic_exchange(&call->cancelled, true) && call->attempt != NULL) {
            found[count++] = call->attempt->exchange.grpc;
            grpc_call_ref(call->attempt->exchange.grpc);
        }
    }
    pthread_mutex_unlock(&lane->lock);
    cancel_all(found, count);
    return count == CANCEL_STEP;
}

void bkv_peer_calls_cancel(bkv_peers_t *peers, const bkv_peer_t *peer) {
    for (uint32_t i = 0; i < peers->lanes_running; i++) {
        while (lane_cancel(&peers->lanes[i], peer)) {
        }
    }
}

static bool lane_watch(bkv_peer_lane_t *lane, uint64_t now_ms) {
    grpc_call *found[CANCEL_STEP];
    size_t count = 0;
    pthread_mutex_lock(&lane->lock);
    for (bkv_peer_call_t *call = lane->calls; call != NULL && count < CANCEL_STEP; call = call->next_call) {
        bkv_peer_attempt_t *attempt = call->attempt;
        if (attempt != NULL && !attempt->silent &&
            now_ms >= atomic_load(&attempt->progress_ms) + atomic_load(&attempt->way_ms) + lane->peers->timeout_ms) {
            attempt->silent = true;
            found[count++] = attempt->exchange.grpc;
            grpc_call_ref(attempt->exchange.grpc);
        }
    }
    pthread_mutex_unlock(&lane->lock);
    cancel_all(found, count);
    return count == CANCEL_STEP;
}

void bkv_peer_calls_watch(bkv_peer_lane_t *lane, uint64_t now_ms) {
    while (lane_watch(lane, now_ms)) {
    }
}
