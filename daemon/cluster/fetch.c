// fetch.c - brings records here from whichever owner answers first: which owner is asked for what, and when all is settled. Single
// questions are ask.c's, whose records are owners.c's.
//
// All keys that have the same best owner go to it in one question. Those that it has not, or that came damaged, go on to their
// next owners together: when a record of the same question begins to come, as that takes time, or when the question is over.
#include "daemon/cluster/reading.h"

#include "daemon/observe/clock.h"

#include <assert.h>
#include <stdlib.h>

#define NOBODY UINT16_MAX

// ---- settling ----

// [lock]
static void settle(bkv_reading_t *reading, bkv_sought_t *sought, bkv_status_t status, const bkv_pin_t *pin) {
    bkv_cluster_counters_t *counters = &reading->cluster->counters;
    bkv_found_t *found = &reading->found[sought->place];
    found->status = status;
    if (pin != NULL) {
        found->pin = *pin;
    }
    sought->settled = true;
    reading->open--;
    bkv_cluster_count(status == BKV_OK          ? &counters->remote_hits_total
                      : status == BKV_NOT_FOUND ? &counters->remote_misses_total
                                                : &counters->remote_failed_total,
                      1);
}

// [lock] Nobody is left to be asked.
static void settle_without(bkv_reading_t *reading, bkv_sought_t *sought) {
    bool late = bkv_now_ms() >= reading->deadline_ms;
    settle(reading, sought,
           sought->unheard   ? (late ? BKV_DEADLINE_EXCEEDED : BKV_BUSY)
           : sought->damaged ? BKV_DATA_LOSS
                             : BKV_NOT_FOUND,
           NULL);
}

bool bkv_reading_take(bkv_reading_t *reading, const bkv_ask_t *ask, uint32_t key, bkv_outcome_t outcome, const bkv_pin_t *pin) {
    bkv_sought_t *sought = &reading->sought[key];
    sought->asked--;
    if (sought->settled) {
        return false;
    }
    if (outcome == BKV_CAME) {
        settle(reading, sought, BKV_OK, pin);
        return true;
    }
    if (outcome == BKV_NO_ROOM) { // whoever sends it
        settle(reading, sought, BKV_RESOURCE_EXHAUSTED, NULL);
        return false;
    }
    sought->damaged |= outcome == BKV_DAMAGED;
    sought->unheard |= outcome == BKV_UNANSWERED && !ask->owner->gone;
    if (sought->asked == 0 && sought->next == reading->owners.of[key].count) {
        settle_without(reading, sought);
    }
    return false;
}

// ---- asking ----

// [lock] Decides whom to ask for a key now, if anybody.
static void choose(bkv_reading_t *reading, uint32_t key, bool late) {
    bkv_sought_t *sought = &reading->sought[key];
    const bkv_owned_t *owned = &reading->owners.of[key];
    sought->to = NOBODY;
    if (sought->settled || !sought->due) {
        return;
    }
    sought->due = false;
    assert(reading->making != NULL);
    if (sought->next < owned->count && !late) {
        sought->to = owned->owners[sought->next++];
        reading->making[sought->to].keys++;
    } else if (sought->asked == 0) {
        sought->unheard |= sought->next < owned->count;
        settle_without(reading, sought);
    }
}

// [lock] Puts a key that has been chosen into its owner's question. False: no memory for one.
static bool add(bkv_reading_t *reading, uint32_t key) {
    bkv_sought_t *sought = &reading->sought[key];
    bkv_making_t *making = &reading->making[sought->to];
    if (making->ask == NULL) {
        making->ask = bkv_ask_new(reading, &reading->owners.owners[sought->to], making->keys);
    }
    if (making->ask != NULL) {
        bkv_ask_add(making->ask, key);
        sought->asked++;
        return true;
    }
    sought->unheard = sought->due = true;
    sought->to = NOBODY;
    return false;
}

// [lock] False: the owner is not to be asked now.
static bool start(bkv_reading_t *reading, bkv_ask_t *ask) {
    if (bkv_ask_start(ask)) {
        return true;
    }
    for (uint32_t i = 0; i < ask->count; i++) {
        bkv_sought_t *sought = &reading->sought[ask->items[i].key];
        sought->asked--;
        sought->unheard |= !ask->owner->gone;
        sought->due = true;
    }
    return false;
}

void bkv_reading_pass_on(bkv_reading_t *reading) {
    bool all;
    do {
        all = true;
        bool late = bkv_now_ms() >= reading->deadline_ms;
        for (uint32_t i = 0; i < reading->count; i++) {
            choose(reading, i, late);
        }
        for (uint32_t i = 0; i < reading->count; i++) {
            if (reading->sought[i].to != NOBODY) {
                all &= add(reading, i);
            }
        }
        for (uint32_t i = 0; i < reading->count; i++) {
            bkv_making_t *making = reading->sought[i].to != NOBODY ? &reading->making[reading->sought[i].to] : NULL;
            if (making != NULL && making->ask != NULL) {
                all &= start(reading, making->ask);
                *making = (bkv_making_t){0};
            }
        }
    } while (!all);
}

// ---- life ----

static void reading_free(bkv_reading_t *reading) {
    while (reading->asks != NULL) {
        bkv_ask_t *ask = reading->asks;
        reading->asks = ask->older;
        free(ask);
    }
    bkv_owners_deinit(&reading->owners);
    pthread_mutex_destroy(&reading->lock);
    free(reading->making);
    free(reading->names);
    free(reading);
}

void bkv_reading_unref(bkv_reading_t *reading) {
    if (atomic_fetch_sub(&reading->refs, 1) == 1) {
        reading_free(reading);
    }
}

void bkv_reading_unlock(bkv_reading_t *reading) {
    bool tell = reading->open == 0 && !reading->told;
    if (tell) {
        reading->told = true;
        for (bkv_ask_t *ask = reading->asks; ask != NULL; ask = ask->older) {
            bkv_ask_cancel(ask);
        }
    }
    bool let_go = reading->open == 0 && reading->running == 0 && !reading->let_go;
    reading->let_go |= let_go;
    pthread_mutex_unlock(&reading->lock);
    if (let_go) {
        bkv_owners_let_go(&reading->owners);
    }
    if (tell) {
        reading->done(reading->user);
        bkv_cluster_release(reading->cluster);
        bkv_reading_unref(reading);
    }
}

// With names and owners of the keys that have not been found; NULL: no memory.
static bkv_reading_t *reading_new(bkv_cluster_t *cluster, const bkv_name_t *names, uint32_t count, const bkv_found_t *found,
                                  uint32_t open) {
    bkv_reading_t *reading = calloc(1, sizeof(*reading) + open * sizeof(reading->sought[0]));
    if (reading == NULL) {
        return NULL;
    }
    reading->cluster = cluster;
    pthread_mutex_init(&reading->lock, NULL);
    atomic_init(&reading->refs, 2); // until all is settled, and the starter's
    reading->names = malloc(open * sizeof(reading->names[0]));
    if (reading->names == NULL) {
        reading_free(reading);
        return NULL;
    }
    for (uint32_t i = 0; i < count; i++) {
        if (found[i].status == BKV_NOT_FOUND) {
            reading->sought[reading->count].place = i;
            reading->sought[reading->count].due = true;
            reading->names[reading->count++] = names[i];
        }
    }
    reading->open = reading->count;
    if (bkv_owners_init(&reading->owners, cluster, reading->names, reading->count, NULL) == BKV_OK) {
        reading->making = calloc(reading->owners.count + (size_t)1, sizeof(reading->making[0]));
    }
    if (reading->making == NULL) {
        reading_free(reading);
        return NULL;
    }
    return reading;
}

// Pins what is here. Returns how many are not, whose status is NOT_FOUND then.
static uint32_t look_here(bkv_cluster_t *cluster, const bkv_name_t *names, uint32_t count, bkv_found_t *found) {
    uint32_t open = 0;
    uint64_t now_ms = bkv_now_ms();
    for (uint32_t i = 0; i < count; i++) {
        if (found[i].status == BKV_OK) {
            continue;
        }
        found[i].status = bkv_store_pin(cluster->store, &names[i].spec_id, &names[i].key, now_ms, &found[i].pin, NULL);
        if (found[i].status == BKV_DATA_LOSS) { // it has been dropped, and others may have it sound
            found[i].status = BKV_NOT_FOUND;
        }
        open += found[i].status == BKV_NOT_FOUND;
    }
    return open;
}

void bkv_cluster_fetch(bkv_cluster_t *cluster, const bkv_name_t *names, uint32_t count, uint64_t deadline_ms,
                       bkv_found_t *found, bkv_cluster_done_t done, void *user) {
    uint32_t open = look_here(cluster, names, count, found);
    bkv_reading_t *reading = open > 0 ? reading_new(cluster, names, count, found, open) : NULL;
    if (reading == NULL) {
        for (uint32_t i = 0; i < count; i++) {
            found[i].status = found[i].status == BKV_NOT_FOUND ? BKV_RESOURCE_EXHAUSTED : found[i].status;
        }
        done(user);
        return;
    }
    reading->deadline_ms = deadline_ms;
    reading->found = found;
    reading->done = done;
    reading->user = user;
    bkv_cluster_hold(cluster);
    pthread_mutex_lock(&reading->lock);
    bkv_reading_pass_on(reading);
    bkv_reading_unlock(reading);
    bkv_reading_unref(reading);
}

void bkv_cluster_used(bkv_cluster_t *cluster, const bkv_name_t *name) {
    if (!bkv_hot_read(&cluster->hot, name)) {
        bkv_store_drop_copy(cluster->store, name, bkv_now_ms());
    } else {
        bkv_cluster_count(&cluster->counters.hot_copies_total, 1);
    }
}
