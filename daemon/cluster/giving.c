// giving.c - see giving.h.
//
// A lane is an owner and a kind of call: what waits for it, and how many calls are under way. It is there only as long as one of
// these is more than none.
#include "daemon/cluster/giving.h"

#include "daemon/observe/clock.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#define CALL_GIFTS 256u
#define CALL_BYTES (8u << 20)
#define CALLS_MAX  4u

typedef struct bkv_giving_lane {
    struct bkv_giving_lane *next;
    bkv_peer_t *peer; // a reference of its own, so that no other peer gets its address meanwhile
    bool ask;
    uint32_t calls;
    uint32_t waiting;
    uint64_t waiting_bytes;
    bkv_gift_t *first, *last;
} lane_t;

typedef struct call {
    bkv_giving_t *giving;
    lane_t *lane; // there as long as it counts this call
    bkv_peer_t *peer;
    bool ask;
    uint32_t count;
    uint64_t deadline_ms;
    bkv_gift_t *first; // [count]
    bkv_name_t names[CALL_GIFTS];
    bkv_status_t results[CALL_GIFTS];
} call_t;

void bkv_giving_init(bkv_giving_t *giving, uint32_t timeout_ms) {
    *giving = (bkv_giving_t){.timeout_ms = timeout_ms};
    pthread_mutex_init(&giving->lock, NULL);
}

void bkv_giving_deinit(bkv_giving_t *giving) {
    for (uint32_t i = 0; i < BKV_GIVING_BUCKETS; i++) {
        assert(giving->lanes[i] == NULL);
    }
    pthread_mutex_destroy(&giving->lock);
}

// ---- lanes: all under the lock ----

static lane_t **find_lane(bkv_giving_t *giving, const bkv_peer_t *peer, bool ask) {
    lane_t **at = &giving->lanes[((uintptr_t)peer >> 6 ^ (uintptr_t)peer >> 12) % BKV_GIVING_BUCKETS];
    while (*at != NULL && ((*at)->peer != peer || (*at)->ask != ask)) {
        at = &(*at)->next;
    }
    return at;
}

static lane_t *need_lane(bkv_giving_t *giving, bkv_peer_t *peer, bool ask) {
    lane_t **at = find_lane(giving, peer, ask);
    if (*at == NULL) {
        lane_t *lane = calloc(1, sizeof(*lane));
        if (lane != NULL) {
            *lane = (lane_t){.peer = bkv_peer_hold(peer), .ask = ask};
        }
        *at = lane;
    }
    return *at;
}

static void drop_lane(lane_t **at) {
    lane_t *lane = *at;
    *at = lane->next;
    bkv_peer_release(lane->peer);
    free(lane);
}

static void add_gift(lane_t *lane, bkv_gift_t *gift) {
    gift->next = NULL;
    if (lane->first == NULL) {
        lane->first = gift;
    } else {
        lane->last->next = gift;
    }
    lane->last = gift;
    lane->waiting++;
    lane->waiting_bytes += gift->bytes;
}

static bkv_gift_t *take_gift(lane_t *lane) {
    bkv_gift_t *gift = lane->first;
    lane->first = gift->next;
    lane->waiting--;
    lane->waiting_bytes -= gift->bytes;
    return gift;
}

static bool is_due(const lane_t *lane) {
    bool full = lane->waiting >= CALL_GIFTS || lane->waiting_bytes >= CALL_BYTES;
    return lane->first != NULL && (lane->calls == 0 || (full && lane->calls < CALLS_MAX));
}

static void load(call_t *call, lane_t *lane) {
    bkv_gift_t **end = &call->first;
    uint64_t bytes = 0;
    while (lane->first != NULL && call->count < CALL_GIFTS && (call->count == 0 || bytes + lane->first->bytes <= CALL_BYTES)) {
        bkv_gift_t *gift = *end = take_gift(lane);
        end = &gift->next;
        *end = NULL;
        bytes += gift->bytes;
        call->names[call->count++] = gift->name;
        call->deadline_ms = gift->deadline_ms < call->deadline_ms ? gift->deadline_ms : call->deadline_ms;
    }
    lane->calls++;
}

// ---- results ----

// NOT_FOUND and ALREADY_EXISTS say something of a record, never of a call.
static bkv_status_t failure(const bkv_error_t *error) {
    return error->status == BKV_NOT_FOUND || error->status == BKV_ALREADY_EXISTS ? BKV_BUSY : error->status;
}

static bkv_status_t denial(uint64_t bytes) {
    return bytes != 0 ? BKV_ALREADY_EXISTS : BKV_NOT_FOUND;
}

static void pump(bkv_giving_t *giving, const bkv_peer_t *peer, bool ask);

// The lane's next call begins before the givers of this one are told: the cluster may be gone once the last of them is.
static void end_call(call_t *call) {
    bkv_giving_t *giving = call->giving;
    pthread_mutex_lock(&giving->lock);
    call->lane->calls--;
    pthread_mutex_unlock(&giving->lock);
    pump(giving, call->peer, call->ask);
    bkv_gift_t *gift = call->first;
    for (uint32_t i = 0; i < call->count; i++) {
        bkv_gift_t *next = gift->next;
        gift->done(gift, call->results[i]);
        gift = next;
    }
    free(call);
}

static void fail_call(call_t *call, const bkv_error_t *error) {
    for (uint32_t i = 0; i < call->count; i++) {
        call->results[i] = failure(error);
    }
    end_call(call);
}

static void on_store(void *user, const bkv_error_t *error, const bkv_status_t *results) {
    call_t *call = user;
    if (error->status != BKV_OK) {
        fail_call(call, error);
        return;
    }
    memcpy(call->results, results, call->count * sizeof(results[0]));
    end_call(call);
}

static void on_have(void *user, const bkv_error_t *error, const uint64_t *bytes) {
    call_t *call = user;
    if (error->status != BKV_OK) {
        fail_call(call, error);
        return;
    }
    for (uint32_t i = 0; i < call->count; i++) {
        call->results[i] = denial(bytes[i]);
    }
    end_call(call);
}

static void on_lone_store(void *user, const bkv_error_t *error, const bkv_status_t *results) {
    bkv_gift_t *gift = user;
    gift->done(gift, error->status != BKV_OK ? failure(error) : results[0]);
}

static void on_lone_have(void *user, const bkv_error_t *error, const uint64_t *bytes) {
    bkv_gift_t *gift = user;
    gift->done(gift, error->status != BKV_OK ? failure(error) : denial(bytes[0]));
}

// ---- calls ----

// Needs no memory of ours.
static void give_alone(bkv_gift_t *gift) {
    bkv_status_t status = gift->ask ? bkv_peer_have(gift->peer, &gift->name, 1, gift->deadline_ms, on_lone_have, gift, NULL)
                                    : bkv_peer_store(gift->peer, &gift->name, 1, gift->deadline_ms, on_lone_store, gift, NULL);
    if (status != BKV_OK) {
        gift->done(gift, BKV_BUSY);
    }
}

static bkv_status_t begin(call_t *call, bkv_error_t *err) {
    return call->ask ? bkv_peer_have(call->peer, call->names, call->count, call->deadline_ms, on_have, call, err)
                     : bkv_peer_store(call->peer, call->names, call->count, call->deadline_ms, on_store, call, err);
}

// The next call of a lane, if it is time for it, counted. Without memory for one, the first that waits is in *alone.
static call_t *next_call(bkv_giving_t *giving, const bkv_peer_t *peer, bool ask, bkv_gift_t **alone) {
    call_t *call = NULL;
    *alone = NULL;
    pthread_mutex_lock(&giving->lock);
    lane_t **at = find_lane(giving, peer, ask);
    if (*at != NULL && is_due(*at)) {
        call = malloc(sizeof(*call));
        if (call != NULL) {
            call->giving = giving;
            call->lane = *at;
            call->peer = (*at)->peer;
            call->ask = ask;
            call->count = 0;
            call->deadline_ms = UINT64_MAX;
            load(call, *at);
        } else {
            *alone = take_gift(*at);
        }
    }
    if (*at != NULL && (*at)->calls == 0 && (*at)->first == NULL) {
        drop_lane(at);
    }
    pthread_mutex_unlock(&giving->lock);
    return call;
}

// Begins whatever it is time for. A call that is refused ends here, and takes the next one with it.
static void pump(bkv_giving_t *giving, const bkv_peer_t *peer, bool ask) {
    bkv_gift_t *alone;
    for (;;) {
        call_t *call = next_call(giving, peer, ask, &alone);
        bkv_error_t error;
        if (alone != NULL) {
            give_alone(alone);
        } else if (call == NULL) {
            return;
        } else if (begin(call, &error) != BKV_OK) {
            fail_call(call, &error);
        }
    }
}

void bkv_giving_give(bkv_giving_t *giving, bkv_gift_t *gift) {
    const bkv_peer_t *peer = gift->peer; // the gift may be gone before pump is
    bool ask = gift->ask, soon = gift->deadline_ms < bkv_now_ms() + 2 * (uint64_t)giving->timeout_ms;
    pthread_mutex_lock(&giving->lock);
    lane_t *lane = soon ? NULL : need_lane(giving, gift->peer, ask);
    if (lane != NULL) {
        add_gift(lane, gift);
    }
    pthread_mutex_unlock(&giving->lock);
    if (lane != NULL) {
        pump(giving, peer, ask);
    } else {
        give_alone(gift);
    }
}
