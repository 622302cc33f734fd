// members.c - the other members of pool.h, and all else that is not under test: what a question comes to, by a member's temper.
//
// Each question has a thread of its own. One that is given up, or whose deadline passes, ends soon after that.
#include "pool.h"

#include "daemon/observe/clock.h"
#include "kernels/seal.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

// ---- who is there ----

const bkv_view_t *bkv_membership_view(bkv_membership_t *membership) {
    return bkv_view_take(&((pool_t *)membership)->views);
}

const bkv_view_t *bkv_mover_origin(bkv_mover_t *mover) {
    const pool_t *pool = (pool_t *)mover;
    return pool->origin != NULL ? bkv_view_hold(pool->origin) : NULL;
}

void bkv_cluster_hold(bkv_cluster_t *cluster) {
    atomic_fetch_add(&cluster->busy, 1);
}

void bkv_cluster_release(bkv_cluster_t *cluster) {
    atomic_fetch_sub(&cluster->busy, 1);
}

bkv_peer_t *bkv_peers_get(bkv_peers_t *peers, const bkv_member_t *member) {
    pool_t *pool = (pool_t *)peers;
    peer_t *peer = &pool->peers[member->place.id[1] - '0'];
    cr_assert(peer->number != SELF, "a daemon asks itself");
    return bkv_peer_hold(peer);
}

bkv_peer_t *bkv_peer_hold(bkv_peer_t *peer) {
    atomic_fetch_add(&peer->refs, 1);
    return peer;
}

void bkv_peer_release(bkv_peer_t *peer) {
    if (peer != NULL) {
        cr_assert(atomic_fetch_sub(&peer->refs, 1) > 0);
    }
}

void bkv_peer_get_health(const bkv_peer_t *peer, bkv_peer_health_t *health) {
    *health = (bkv_peer_health_t){
        .suspected = atomic_load(&peer->suspected),
        .latency_us = atomic_load(&peer->latency_us),
        .patience_us = atomic_load(&peer->patience_us),
    };
}

// ---- questions ----

struct bkv_peer_call {
    bkv_peer_t *peer;
    void (*run)(bkv_peer_call_t *call);
    bkv_name_t *names;
    uint32_t count;
    uint64_t deadline_ms;
    bool cancelled; // [pool->lock]
    const bkv_fetch_sink_t *sink;
    bkv_peer_have_t have;
    bkv_peer_forget_t forget;
    void *user;
};

// Waits; false: the question has been given up, or its time is over.
static bool pass_us(bkv_peer_call_t *call, uint64_t us) {
    pool_t *pool = call->peer->pool;
    uint64_t until_us = us == UINT64_MAX ? us : bkv_now_us() + us;
    uint64_t end_ms = bkv_now_ms() + TIMEOUT_MS; // as the peers do with one that says nothing
    end_ms = call->deadline_ms < end_ms ? call->deadline_ms : end_ms;
    pthread_mutex_lock(&pool->lock);
    while (!call->cancelled && bkv_now_ms() < end_ms && bkv_now_us() < until_us) {
        struct timespec at;
        clock_gettime(CLOCK_REALTIME, &at);
        uint64_t left_us = until_us - bkv_now_us() < 5000 ? until_us - bkv_now_us() : 5000;
        at.tv_nsec += (long)left_us * 1000;
        at.tv_sec += at.tv_nsec / 1000000000;
        at.tv_nsec %= 1000000000;
        pthread_cond_timedwait(&pool->changed, &pool->lock, &at);
    }
    bool passed = !call->cancelled && bkv_now_us() >= until_us;
    pthread_mutex_unlock(&pool->lock);
    return passed;
}

static bkv_error_t why(bkv_peer_call_t *call) {
    bkv_error_t error;
    pthread_mutex_lock(&call->peer->pool->lock);
    bkv_fail(&error,
             call->cancelled                     ? BKV_CANCELLED
             : bkv_now_ms() >= call->deadline_ms ? BKV_DEADLINE_EXCEEDED
                                                 : BKV_BUSY,
             "given up");
    pthread_mutex_unlock(&call->peer->pool->lock);
    return error;
}

static void *run(void *user) {
    bkv_peer_call_t *call = user;
    bkv_peer_t *peer = call->peer;
    pool_t *pool = peer->pool;
    call->run(call);
    free(call->names);
    free(call);
    bkv_peer_release(peer);
    atomic_fetch_sub(&pool->calls, 1);
    return NULL;
}

static bkv_status_t start(bkv_peer_call_t question, const bkv_name_t *names, bkv_peer_call_t **out, bkv_error_t *err) {
    bkv_peer_t *peer = question.peer;
    if (atomic_load(&peer->temper) == REFUSING) {
        return bkv_fail(err, BKV_BUSY, "suspected");
    }
    bkv_peer_call_t *call = malloc(sizeof(*call));
    *call = question;
    call->names = malloc(call->count * sizeof(names[0]));
    memcpy(call->names, names, call->count * sizeof(names[0]));
    if (out != NULL) {
        *out = call;
    }
    bkv_peer_hold(peer);
    atomic_fetch_add(&peer->pool->calls, 1);
    pthread_t thread;
    cr_assert_eq(pthread_create(&thread, NULL, run, call), 0);
    pthread_detach(thread);
    return BKV_OK;
}

void bkv_peer_cancel(bkv_peer_call_t *call) {
    pool_t *pool = call->peer->pool;
    pthread_mutex_lock(&pool->lock);
    call->cancelled = true;
    pthread_cond_broadcast(&pool->changed);
    pthread_mutex_unlock(&pool->lock);
}

// Whether the member comes to answer at all.
static bool comes_to_it(bkv_peer_call_t *call) {
    temper_t temper = atomic_load(&call->peer->temper);
    return temper != FAILING && pass_us(call, temper == SILENT ? UINT64_MAX : atomic_load(&call->peer->delay_us));
}

// ---- Have, Forget ----

static void run_have(bkv_peer_call_t *call) {
    bkv_error_t error = {.status = BKV_OK};
    if (!comes_to_it(call)) {
        error = why(call);
        call->have(call->user, &error, NULL);
        return;
    }
    uint64_t *bytes = calloc(call->count, sizeof(bytes[0]));
    for (uint32_t i = 0; i < call->count && atomic_load(&call->peer->temper) != DENYING; i++) {
        bkv_record_header_t header;
        bkv_store_peek(call->peer->store, &call->names[i].spec_id, &call->names[i].key, bkv_now_ms(), &header, &bytes[i]);
    }
    call->have(call->user, &error, bytes);
    free(bytes);
}

bkv_status_t bkv_peer_have(bkv_peer_t *peer, const bkv_name_t *names, uint32_t count, uint64_t deadline_ms,
                           bkv_peer_have_t done, void *user, bkv_error_t *err) {
    atomic_fetch_add(&peer->haves, 1);
    return start(
        (bkv_peer_call_t){
            .peer = peer, .run = run_have, .count = count, .deadline_ms = deadline_ms, .have = done, .user = user},
        names, NULL, err);
}

static void run_forget(bkv_peer_call_t *call) {
    bkv_error_t error = {.status = BKV_OK};
    if (!comes_to_it(call)) {
        error = why(call);
        call->forget(call->user, &error, NULL);
        return;
    }
    bool *had = calloc(call->count, sizeof(had[0]));
    for (uint32_t i = 0; i < call->count; i++) {
        had[i] = bkv_store_drop(call->peer->store, &call->names[i].spec_id, &call->names[i].key, bkv_now_ms());
    }
    call->forget(call->user, &error, had);
    free(had);
}

bkv_status_t bkv_peer_forget(bkv_peer_t *peer, const bkv_name_t *names, uint32_t count, uint64_t deadline_ms,
                             bkv_peer_forget_t done, void *user, bkv_error_t *err) {
    atomic_fetch_add(&peer->forgets, 1);
    return start(
        (bkv_peer_call_t){
            .peer = peer, .run = run_forget, .count = count, .deadline_ms = deadline_ms, .forget = done, .user = user},
        names, NULL, err);
}

// ---- Fetch ----

// What the member sends for a pinned record; malloc'd.
static uint8_t *bytes_of(const bkv_pin_t *pin, temper_t temper) {
    uint8_t *bytes = aligned_alloc(64, (pin->length + 63) / 64 * 64);
    memcpy(bytes, pin->data, pin->length);
    bkv_record_header_t *header = (void *)bytes;
    if (temper == DAMAGING) {
        bytes[pin->length / 2] ^= 1;
    } else if (temper == LYING) {
        header->key[5] ^= 1;
        bkv_record_seal(bytes);
    } else if (temper == SHRINKING) {
        header->length -= 16;
        bkv_record_seal(bytes);
    }
    return bytes;
}

// False: the call has broken off here, and *error says why.
static bool send_record(bkv_peer_call_t *call, uint32_t index, temper_t temper, bkv_error_t *error) {
    bkv_peer_t *peer = call->peer;
    const bkv_name_t *name = &call->names[index];
    bkv_pin_t pin;
    bkv_error_t none = {.status = BKV_OK};
    if (!pass_us(call, atomic_load(&peer->delay_us)) || (temper == VANISHING && index >= call->count / 2)) {
        *error = why(call);
        return false;
    }
    if (temper == DENYING || bkv_store_pin(peer->store, &name->spec_id, &name->key, bkv_now_ms(), &pin, NULL) != BKV_OK) {
        bkv_fail(&none, BKV_NOT_FOUND, "it is not here");
        call->sink->end(call->user, index, &none);
        return true;
    }
    const bkv_record_header_t *header = (const void *)pin.data;
    uint8_t *to = call->sink->begin(call->user, index, header->tenant, pin.length, 0);
    bool over = false;
    if (to == NULL) {
        bkv_fail(&none, BKV_CANCELLED, "not wanted");
    } else if (temper == STALLING) {
        memcpy(to, pin.data, pin.length / 2);
        over = !pass_us(call, UINT64_MAX);
        *error = why(call);
    } else {
        uint8_t *bytes = bytes_of(&pin, temper);
        memcpy(to, bytes, pin.length);
        free(bytes);
    }
    bkv_store_unpin(peer->store, &pin);
    if (!over) {
        call->sink->end(call->user, index, &none);
    }
    return !over;
}

static void run_fetch(bkv_peer_call_t *call) {
    bkv_error_t error = {.status = BKV_OK};
    temper_t temper = atomic_load(&call->peer->temper);
    uint32_t index = 0;
    bool goes_on = comes_to_it(call);
    if (!goes_on) {
        error = why(call);
    }
    while (goes_on && index < call->count) {
        goes_on = send_record(call, index, temper, &error);
        index += goes_on;
    }
    for (; index < call->count; index++) {
        call->sink->end(call->user, index, &error);
    }
    call->sink->done(call->user, &error);
}

bkv_status_t bkv_peer_fetch(bkv_peer_t *peer, const bkv_name_t *names, uint32_t count, uint64_t deadline_ms,
                            const bkv_fetch_sink_t *sink, void *user, bkv_peer_call_t **call, bkv_error_t *err) {
    atomic_fetch_add(&peer->fetches, 1);
    atomic_fetch_add(&peer->asked, count);
    return start(
        (bkv_peer_call_t){
            .peer = peer, .run = run_fetch, .count = count, .deadline_ms = deadline_ms, .sink = sink, .user = user},
        names, call, err);
}
