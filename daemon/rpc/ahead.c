// ahead.c - see ahead.h.
#include "daemon/rpc/ahead.h"

#include <assert.h>

#define NONE UINT32_MAX

void bkv_ahead_init(bkv_ahead_t *ahead, bkv_call_t *call, const bkv_spec_id_t *spec_id, const bkv_key_t *keys, uint32_t count,
                    void (*begins)(bkv_call_t *call), void (*arrived)(void *call)) {
    *ahead = (bkv_ahead_t){
        .call = call,
        .spec_id = *spec_id,
        .keys = keys,
        .count = count,
        .begins = begins,
        .arrived = arrived,
        .window = BKV_AHEAD_WINDOW,
        .retried = NONE,
    };
}

static void give_up_windows(bkv_ahead_t *ahead) {
    bkv_bring_free(ahead->now);
    bkv_bring_free(ahead->next);
    ahead->now = NULL;
    ahead->next = NULL;
}

void bkv_ahead_deinit(bkv_ahead_t *ahead) {
    give_up_windows(ahead);
}

// ---- windows ----

static void on_brought(void *user) {
    bkv_ahead_t *ahead = user;
    atomic_fetch_add(&ahead->arrivals, 1);
    ahead->arrived(ahead->call);
}

// Starts a window with the records from `first` on; NULL: no memory.
static bkv_bring_t *make_window(bkv_ahead_t *ahead, uint32_t first) {
    uint32_t left = ahead->count - first;
    bkv_bring_t *bring =
        bkv_bring_new(ahead->call->server, &ahead->spec_id, ahead->keys + first, left < ahead->window ? left : ahead->window);
    if (bring != NULL) {
        ahead->begins(ahead->call);
        if (bkv_bring_start(bring, ahead->call->deadline_ms, on_brought, ahead)) {
            on_brought(ahead); // all of it is here
        }
    }
    return bring;
}

static uint32_t end_of_now(const bkv_ahead_t *ahead) {
    return ahead->first + bkv_bring_count(ahead->now);
}

// Makes `now` the window that the record is in. False: no memory.
static bool move_to(bkv_ahead_t *ahead, uint32_t number) {
    while (ahead->now != NULL && number >= end_of_now(ahead)) {
        ahead->first = end_of_now(ahead);
        bkv_bring_free(ahead->now);
        ahead->now = ahead->next;
        ahead->next = NULL;
    }
    if (ahead->now == NULL) {
        ahead->first = number;
        ahead->now = make_window(ahead, number);
    }
    return ahead->now != NULL;
}

// ---- the sender's questions ----

bkv_reach_t bkv_ahead_reach(bkv_ahead_t *ahead, uint32_t number, bkv_error_t *err) {
    if (ahead->restart) {
        if (ahead->next != NULL && bkv_bring_under_way(ahead->next)) {
            return BKV_REACH_COMING;
        }
        give_up_windows(ahead);
        ahead->restart = false;
    }
    if (!move_to(ahead, number)) {
        bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "keys: no memory to bring them here");
        return BKV_REACH_FAILED;
    }
    if (bkv_bring_under_way(ahead->now)) {
        return BKV_REACH_COMING;
    }
    bkv_status_t status = bkv_bring_status(ahead->now, number - ahead->first, err);
    if (status != BKV_OK) {
        return status == BKV_RESOURCE_EXHAUSTED ? BKV_REACH_NO_ROOM : BKV_REACH_FAILED;
    }
    if (ahead->next == NULL && ahead->window > 1 && end_of_now(ahead) < ahead->count) {
        ahead->next = make_window(ahead, end_of_now(ahead)); // without memory: when it is due
    }
    return BKV_REACH_HERE;
}

bool bkv_ahead_retry(bkv_ahead_t *ahead, uint32_t number) {
    uint32_t length = bkv_bring_count(ahead->now);
    bkv_status_t status = bkv_bring_status(ahead->now, number - ahead->first, NULL);
    if (status == BKV_RESOURCE_EXHAUSTED) {
        if (length == 1 && ahead->next == NULL) {
            return false; // nothing of this call's is in its way
        }
        ahead->window = length > 1 ? length / 2 : 1;
    } else if (ahead->retried == number || bkv_bring_came(ahead->now, number - ahead->first)) {
        return false;
    } else {
        ahead->retried = number;
    }
    ahead->restart = true;
    return true;
}

bool bkv_ahead_taken(bkv_ahead_t *ahead, uint32_t number) {
    assert(ahead->now != NULL && number >= ahead->first);
    bool came = bkv_bring_came(ahead->now, number - ahead->first);
    bkv_bring_unpin(ahead->now, number - ahead->first);
    return came;
}
