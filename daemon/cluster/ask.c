// ask.c - one question of a reading to one owner: where its records are put, what is made of them, and how long it may be silent.
//
// A record goes straight into a slot of the store, which nobody else sees, and is published when its header, structure and
// checksum are what they should be. Verifying costs what reading the bytes once costs, on the peers' thread that brought them.
//
// Silence. Each word of an owner, that a record begins or has ended, gives it as much time again as it usually needs for an
// answer, and more for the bytes that are coming. When that is over its keys are asked of their next owners as well: a hedge. The
// question itself goes on, until the peers give it up.
#include "daemon/cluster/reading.h"

#include "daemon/observe/clock.h"
#include "kernels/seal.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#define SLOW_RATE 64 // bytes a microsecond; a record that comes more slowly is worth asking for elsewhere

// ---- taking in ----

static bool is_that_record(const bkv_ask_item_t *item, const bkv_name_t *name) {
    _Alignas(BKV_RECORD_ALIGN) bkv_record_header_t header;
    memcpy(&header, item->slot.data, sizeof(header));
    return header.length == item->bytes && header.tenant == item->slot.tenant &&
           memcmp(header.key, name->key.bytes, sizeof(header.key)) == 0 &&
           memcmp(header.spec_id, name->spec_id.bytes, sizeof(header.spec_id)) == 0 &&
           bkv_record_check(item->slot.data, item->bytes, NULL) == BKV_OK &&
           bkv_record_verify(item->slot.data, item->bytes, NULL) == BKV_OK;
}

// Another question has brought it, or a Put; and that may have decayed.
static bkv_outcome_t check_older(bkv_store_t *store, const bkv_pin_t *pin) {
    if (bkv_record_verify(pin->data, pin->length, NULL) == BKV_OK) {
        return BKV_CAME;
    }
    bkv_store_damaged(store, pin);
    bkv_store_unpin(store, pin);
    return BKV_DAMAGED;
}

static bkv_outcome_t publish(const bkv_ask_t *ask, bkv_ask_item_t *item, bkv_pin_t *pin) {
    const bkv_reading_t *reading = ask->reading;
    bkv_store_t *store = reading->cluster->store;
    if (!is_that_record(item, &reading->names[item->key])) {
        bkv_store_abort(store, &item->slot);
        return BKV_DAMAGED;
    }
    bool copy = !reading->owners.of[item->key].self;
    switch (bkv_store_adopt(store, &item->slot, item->ttl_ms, copy, bkv_now_ms(), pin, NULL)) {
    case BKV_OK:
        return BKV_CAME;
    case BKV_ALREADY_EXISTS:
        return check_older(store, pin);
    default:
        return BKV_NO_ROOM;
    }
}

// What a record that has not begun to come ended with.
static bkv_outcome_t outcome_of(const bkv_error_t *error) {
    return error->status == BKV_NOT_FOUND ? BKV_ABSENT : error->status == BKV_DATA_LOSS ? BKV_DAMAGED : BKV_UNANSWERED;
}

// ---- the sink ----

// [lock]
static void hear(bkv_ask_t *ask) {
    ask->heard_us = bkv_now_us();
}

// [lock] What it did not bring, and nobody else is asked for, goes on. Not what other questions did not bring: they pass that on
// themselves, all together.
static void pass_on(bkv_ask_t *ask) {
    ask->failed = 0;
    for (uint32_t i = 0; i < ask->count; i++) {
        bkv_sought_t *sought = &ask->reading->sought[ask->items[i].key];
        sought->due = sought->due || (ask->items[i].ended && !sought->settled && sought->asked == 0);
    }
    bkv_reading_pass_on(ask->reading);
}

static void *on_begin(void *user, uint32_t index, uint64_t tenant, uint64_t bytes, uint64_t ttl_ms) {
    bkv_ask_t *ask = user;
    bkv_reading_t *reading = ask->reading;
    bkv_ask_item_t *item = &ask->items[index];
    pthread_mutex_lock(&reading->lock);
    hear(ask);
    if (ask->failed > 0) { // those before this one need not wait for it
        pass_on(ask);
    }
    bool wanted = !reading->sought[item->key].settled;
    bkv_reading_unlock(reading);
    item->bytes = bytes;
    item->ttl_ms = ttl_ms;
    item->refusal = BKV_UNWANTED;
    if (!wanted) {
        return NULL;
    }
    if (bytes < sizeof(bkv_record_header_t)) {
        item->refusal = BKV_DAMAGED;
        return NULL;
    }
    if (bkv_store_reserve(reading->cluster->store, tenant, bytes, bkv_now_ms(), &item->slot, NULL) != BKV_OK) {
        item->refusal = BKV_NO_ROOM;
        return NULL;
    }
    pthread_mutex_lock(&reading->lock);
    item->coming = true;
    ask->coming_bytes += bytes;
    pthread_mutex_unlock(&reading->lock);
    return item->slot.data;
}

static void on_end(void *user, uint32_t index, const bkv_error_t *error) {
    bkv_ask_t *ask = user;
    bkv_reading_t *reading = ask->reading;
    bkv_store_t *store = reading->cluster->store;
    bkv_ask_item_t *item = &ask->items[index];
    bkv_pin_t pin = {0};
    bkv_outcome_t outcome;
    if (item->slot.data == NULL) {
        outcome = item->refusal != BKV_CAME ? item->refusal : outcome_of(error);
    } else if (error->status != BKV_OK) {
        bkv_store_abort(store, &item->slot);
        outcome = BKV_UNANSWERED;
    } else {
        outcome = publish(ask, item, &pin);
    }
    pthread_mutex_lock(&reading->lock);
    assert(!item->ended);
    hear(ask);
    item->ended = true;
    ask->coming_bytes -= item->coming ? item->bytes : 0;
    ask->failed += outcome != BKV_CAME;
    bool taken = bkv_reading_take(reading, ask, item->key, outcome, &pin);
    bkv_reading_unlock(reading);
    if (outcome == BKV_CAME && !taken) {
        bkv_store_unpin(store, &pin);
    }
}

static void on_done(void *user, const bkv_error_t *error) {
    (void)error; // each key has its own
    bkv_ask_t *ask = user;
    bkv_reading_t *reading = ask->reading;
    pthread_mutex_lock(&reading->lock);
    ask->ended = true;
    reading->running--;
    if (bkv_alarm_cancel(reading->cluster->alarms, &ask->alarm)) {
        atomic_fetch_sub(&reading->refs, 1); // not the last one: this question's is still there
    }
    pass_on(ask);
    bkv_reading_unlock(reading);
    bkv_reading_unref(reading);
}

static const bkv_fetch_sink_t sink = {.begin = on_begin, .end = on_end, .done = on_done};

// ---- silence ----

// [lock] Until when it may say nothing.
static uint64_t may_be_silent_until_us(const bkv_ask_t *ask) {
    return ask->heard_us + ask->owner->health.patience_us + ask->coming_bytes / SLOW_RATE;
}

// [lock]
static void set_alarm(bkv_ask_t *ask) {
    atomic_fetch_add(&ask->reading->refs, 1);
    bkv_alarm_set(ask->reading->cluster->alarms, &ask->alarm, may_be_silent_until_us(ask));
}

// [lock] Its keys are asked of the next owner too, each that no other question is about already.
static void hedge(bkv_ask_t *ask) {
    bkv_reading_t *reading = ask->reading;
    for (uint32_t i = 0; i < ask->count; i++) {
        bkv_sought_t *sought = &reading->sought[ask->items[i].key];
        if (!ask->items[i].ended && !sought->settled && sought->asked == 1 &&
            sought->next < reading->owners.of[ask->items[i].key].count) {
            sought->due = true;
            bkv_cluster_count(&reading->cluster->counters.remote_hedged_total, 1);
        }
    }
    pass_on(ask);
}

static void on_alarm(void *user) {
    bkv_ask_t *ask = user;
    bkv_reading_t *reading = ask->reading;
    pthread_mutex_lock(&reading->lock);
    if (!ask->ended && bkv_now_us() < may_be_silent_until_us(ask)) {
        set_alarm(ask);
    } else if (!ask->ended) {
        hedge(ask);
    }
    bkv_reading_unlock(reading);
    bkv_reading_unref(reading);
}

// ---- asking ----

bkv_ask_t *bkv_ask_new(bkv_reading_t *reading, const bkv_owner_t *owner, uint32_t capacity) {
    bkv_ask_t *ask = calloc(1, sizeof(*ask) + capacity * sizeof(ask->items[0]));
    if (ask != NULL) {
        ask->reading = reading;
        ask->owner = owner;
        ask->alarm = (bkv_alarm_t){.ring = on_alarm, .user = ask};
        ask->older = reading->asks;
        reading->asks = ask;
    }
    return ask;
}

void bkv_ask_add(bkv_ask_t *ask, uint32_t key) {
    ask->items[ask->count++].key = key;
}

bool bkv_ask_start(bkv_ask_t *ask) {
    bkv_reading_t *reading = ask->reading;
    bkv_name_t *names = malloc(ask->count * sizeof(names[0]));
    if (names == NULL || ask->owner->peer == NULL) {
        free(names);
        ask->ended = true;
        return false;
    }
    for (uint32_t i = 0; i < ask->count; i++) {
        names[i] = reading->names[ask->items[i].key];
    }
    atomic_fetch_add(&reading->refs, 1);
    hear(ask);
    bkv_status_t status =
        bkv_peer_fetch(ask->owner->peer, names, ask->count, reading->deadline_ms, &sink, ask, &ask->call, NULL);
    free(names);
    if (status != BKV_OK) {
        ask->ended = true;
        atomic_fetch_sub(&reading->refs, 1); // not the last one: who starts has one
        return false;
    }
    reading->running++;
    set_alarm(ask);
    return true;
}

void bkv_ask_cancel(bkv_ask_t *ask) {
    if (!ask->ended && ask->call != NULL) {
        bkv_peer_cancel(ask->call);
    }
}
