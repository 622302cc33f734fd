// lookup.c - which records are anywhere in the pool: all owners of what is not here are asked at the same time.
//
// A key is settled when one owner says to have it, or when all have been heard. Who stands still should not delay each Lookup of a
// prefix that is new to the pool: once every key that is left has been denied by an owner, perhaps by this daemon, the others are
// waited for no longer than they usually take. Unless records are still on their way to owners: then one that denies says little.
#include "daemon/cluster/poll.h"

#include <stdlib.h>

typedef struct absent {
    uint32_t place; // among the caller's names
    bool denied;    // by one owner at least
    bool settled;
} absent_t;

typedef struct lookup {
    bkv_cluster_done_t done;
    void *user;
    bool *have;         // the caller's
    bool moving;        // owners may not have got all of theirs yet
    uint32_t unsettled; // names
    uint32_t undenied;  // of these
    uint32_t count;
    bkv_name_t *names; // [count], of what is not here
    absent_t absent[];
} lookup_t;

static bkv_verdict_t verdict(const lookup_t *lookup) {
    bool patiently = lookup->undenied == 0 && !lookup->moving;
    return lookup->unsettled == 0 ? BKV_ENOUGH : patiently ? BKV_WAIT_PATIENTLY : BKV_WAIT;
}

static bkv_verdict_t on_known(void *user, const bkv_owned_t *of) {
    lookup_t *lookup = user;
    for (uint32_t i = 0; i < lookup->count; i++) {
        lookup->absent[i].denied = of[i].self;
        lookup->undenied -= of[i].self;
    }
    return verdict(lookup);
}

static void settle(lookup_t *lookup, absent_t *absent) {
    absent->settled = true;
    lookup->unsettled--;
    lookup->undenied -= !absent->denied;
}

static bkv_verdict_t on_heard(void *user, const bkv_owner_t *owner, const uint32_t *keys, uint32_t count, const uint64_t *bytes,
                              const uint8_t *left) {
    (void)owner;
    lookup_t *lookup = user;
    for (uint32_t i = 0; i < count; i++) {
        absent_t *absent = &lookup->absent[keys[i]];
        if (absent->settled) {
            continue;
        }
        bool there = bytes != NULL && bytes[i] != 0;
        if (bytes != NULL && !there && !absent->denied) {
            absent->denied = true;
            lookup->undenied--;
        }
        if (there) {
            lookup->have[absent->place] = true;
        }
        if (there || left[keys[i]] == 0) {
            settle(lookup, absent);
        }
    }
    return verdict(lookup);
}

static void on_polled(void *user) {
    lookup_t *lookup = user;
    bkv_cluster_done_t done = lookup->done;
    void *caller = lookup->user;
    free(lookup->names);
    free(lookup);
    done(caller);
}

static const bkv_poll_kind_t kind = {.known = on_known, .heard = on_heard, .done = on_polled};

// Of the names that are not here; NULL: no memory.
static lookup_t *lookup_new(const bkv_name_t *names, uint32_t count, uint32_t absent, const bool *have) {
    lookup_t *lookup = calloc(1, sizeof(*lookup) + absent * sizeof(lookup->absent[0]));
    bkv_name_t *wanted = malloc(absent * sizeof(wanted[0]));
    if (lookup == NULL || wanted == NULL) {
        free(lookup);
        free(wanted);
        return NULL;
    }
    lookup->names = wanted;
    lookup->unsettled = lookup->undenied = absent;
    for (uint32_t i = 0; i < count; i++) {
        if (!have[i]) {
            wanted[lookup->count] = names[i];
            lookup->absent[lookup->count++].place = i;
        }
    }
    return lookup;
}

static bool is_moving(bkv_cluster_t *cluster) {
    const bkv_view_t *origin = bkv_mover_origin(cluster->mover);
    if (origin != NULL) {
        bkv_view_give(origin);
    }
    return origin != NULL;
}

void bkv_cluster_lookup(bkv_cluster_t *cluster, const bkv_name_t *names, uint32_t count, uint64_t deadline_ms, bool *have,
                        bkv_cluster_done_t done, void *user) {
    uint32_t absent = 0;
    for (uint32_t i = 0; i < count; i++) {
        absent += !have[i];
    }
    lookup_t *lookup = absent > 0 ? lookup_new(names, count, absent, have) : NULL;
    if (lookup == NULL) {
        done(user);
        return;
    }
    lookup->done = done;
    lookup->user = user;
    lookup->have = have;
    lookup->moving = is_moving(cluster);
    bkv_poll_start(cluster, lookup->names, lookup->count, deadline_ms, &kind, lookup);
}
