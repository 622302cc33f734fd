// roster.c - takes in what the watch sees: keeps the list of all members, and hands it to the publisher whenever it is whole.
#include "daemon/cluster/members/internal.h"

#include "daemon/observe/clock.h"
#include "daemon/observe/log.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#define COMPLAINTS_PER_SECOND 5

// When etcd stands still for longer than leases last, it ends them all as soon as it goes on, and all members are gone at once,
// to register anew in the next moment. Whoever believed that would look for every block in the wrong place. So for this long
// after trouble with etcd no view is made in which members are missing; a real death is seen that much later then.
#define HOLD_MS 3000

bkv_status_t bkv_roster_init(bkv_roster_t *roster, bkv_error_t *err) {
    *roster = (bkv_roster_t){.limit = {.per_second = COMPLAINTS_PER_SECOND}};
    roster->members = calloc(BKV_MEMBERS_MAX, sizeof(*roster->members));
    roster->incoming = calloc(BKV_MEMBERS_MAX, sizeof(*roster->incoming));
    if (roster->members == NULL || roster->incoming == NULL) {
        bkv_roster_deinit(roster);
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "cluster: no memory for %d members", BKV_MEMBERS_MAX);
    }
    return BKV_OK;
}

void bkv_roster_deinit(bkv_roster_t *roster) {
    free(roster->members);
    free(roster->incoming);
    *roster = (bkv_roster_t){0};
}

// Others may write nonsense as often as they like.
static void complain(bkv_membership_t *membership, const char *id, const char *why) {
    uint64_t held;
    if (bkv_limit_take(&membership->roster.limit, bkv_now_ms(), &held)) {
        bkv_log(BKV_LOG_WARN, 0, "cluster: the record of %s in etcd is not taken: %s", id, why);
    }
}

// ---- the list ----

// Where id is, or would have to be.
static uint32_t place_of(const bkv_member_t *members, uint32_t count, const char *id, bool *there) {
    uint32_t low = 0, high = count;
    while (low < high) {
        uint32_t middle = (low + high) / 2;
        if (strcmp(members[middle].place.id, id) < 0) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    *there = low < count && strcmp(members[low].place.id, id) == 0;
    return low;
}

static void list_remove(bkv_member_t *members, uint32_t *count, const char *id, bool *changed) {
    bool there;
    uint32_t at = place_of(members, *count, id, &there);
    if (there) {
        --*count;
        memmove(&members[at], &members[at + 1], (*count - at) * sizeof(*members));
        *changed = true;
    }
}

static bool list_put(bkv_member_t *members, uint32_t *count, const bkv_member_t *member, bool *changed) {
    bool there;
    uint32_t at = place_of(members, *count, member->place.id, &there);
    if (!there && *count == BKV_MEMBERS_MAX) {
        return false;
    }
    if (!there) {
        memmove(&members[at + 1], &members[at], (*count - at) * sizeof(*members));
        ++*count;
    }
    if (!there || !bkv_member_equal(&members[at], member)) {
        members[at] = *member;
        *changed = true;
    }
    return true;
}

// ---- what the watch says ----

// The id in a member's key; false: it is no such key.
static bool key_id(const bkv_membership_t *membership, bkv_etcd_text_t key, char id[BKV_MEMBER_NAME_MAX]) {
    size_t prefix = strlen(membership->member_prefix), length = key.length - prefix;
    if (key.length <= prefix || length >= BKV_MEMBER_NAME_MAX || memcmp(key.bytes, membership->member_prefix, prefix) != 0) {
        return false;
    }
    memcpy(id, (const char *)key.bytes + prefix, length);
    id[length] = '\0';
    return strlen(id) == length && bkv_member_id_valid(id);
}

static bool is_config(const bkv_membership_t *membership, bkv_etcd_text_t key) {
    return key.length == strlen(membership->config_key) && memcmp(key.bytes, membership->config_key, key.length) == 0;
}

static void on_reset(void *user) {
    bkv_membership_t *membership = user;
    membership->roster.listing = true;
    membership->roster.listed_config = false;
    membership->roster.incoming_count = 0;
}

static void member_put(bkv_membership_t *membership, const char *id, const bkv_etcd_kv_t *kv) {
    bkv_roster_t *roster = &membership->roster;
    bkv_member_t *list = roster->listing ? roster->incoming : roster->members, member;
    uint32_t *count = roster->listing ? &roster->incoming_count : &roster->count;
    bkv_error_t err;
    if (bkv_member_parse(kv->value.bytes, kv->value.length, id, &member, &err) != BKV_OK) {
        complain(membership, id, err.message);
        list_remove(list, count, id, &roster->changed);
        return;
    }
    if (!list_put(list, count, &member, &roster->changed)) {
        complain(membership, id, "there are too many members");
    }
    if (strcmp(id, membership->id) == 0) {
        bkv_registration_saw(membership, &member, kv->mod_revision);
    }
}

static void on_put(void *user, const bkv_etcd_kv_t *kv) {
    bkv_membership_t *membership = user;
    char id[BKV_MEMBER_NAME_MAX];
    if (key_id(membership, kv->key, id)) {
        member_put(membership, id, kv);
    } else if (is_config(membership, kv->key)) {
        membership->roster.listed_config = true;
        bkv_registration_saw_config(membership, kv->value.bytes, kv->value.length);
    }
}

static void on_removed(void *user, bkv_etcd_text_t key, int64_t revision) {
    bkv_membership_t *membership = user;
    bkv_roster_t *roster = &membership->roster;
    char id[BKV_MEMBER_NAME_MAX];
    if (key_id(membership, key, id)) {
        list_remove(roster->members, &roster->count, id, &roster->changed);
        if (strcmp(id, membership->id) == 0) {
            bkv_registration_saw(membership, NULL, revision);
        }
    } else if (is_config(membership, key)) {
        bkv_registration_lost_config(membership);
    }
}

static bool lists_equal(const bkv_roster_t *roster) {
    bool equal = roster->count == roster->incoming_count;
    for (uint32_t i = 0; equal && i < roster->count; i++) {
        equal = bkv_member_equal(&roster->members[i], &roster->incoming[i]);
    }
    return equal;
}

// A listing is complete: it takes the place of what was known before.
static void listing_end(bkv_membership_t *membership, int64_t revision) {
    bkv_roster_t *roster = &membership->roster;
    bkv_member_t *before = roster->members;
    bool same = lists_equal(roster), there;
    roster->members = roster->incoming;
    roster->incoming = before;
    roster->count = roster->incoming_count;
    roster->listing = false;
    roster->changed = roster->changed || !same;
    if (!roster->listed_config && membership->registration.configured) {
        bkv_registration_lost_config(membership);
    }
    place_of(roster->members, roster->count, membership->id, &there);
    if (!there && membership->id[0] != '\0') {
        bkv_registration_saw(membership, NULL, revision);
    }
}

// Hands the list to the publisher. What it has not come to yet is replaced.
static void publish(bkv_membership_t *membership) {
    bkv_roster_t *roster = &membership->roster;
    bkv_member_t *copy = calloc(roster->count + 1u, sizeof(*copy));
    if (copy == NULL) {
        bkv_log(BKV_LOG_ERROR, 0, "cluster: no memory for a view of %u members; the last one stays", roster->count);
        return; // roster->changed stays, so that the next occasion is used
    }
    memcpy(copy, roster->members, roster->count * sizeof(*copy));
    roster->changed = false;
    pthread_mutex_lock(&membership->lock);
    free(membership->pending);
    membership->pending = copy;
    membership->pending_count = roster->count;
    membership->pending_revision = roster->revision;
    pthread_cond_broadcast(&membership->changed);
    pthread_mutex_unlock(&membership->lock);
}

static void set_watching(bkv_membership_t *membership, bool watching) {
    pthread_mutex_lock(&membership->lock);
    membership->metrics.watching = watching;
    pthread_cond_broadcast(&membership->changed);
    pthread_mutex_unlock(&membership->lock);
}

// Whether somebody of the present view is not in the list.
static bool is_smaller(bkv_membership_t *membership) {
    const bkv_roster_t *roster = &membership->roster;
    const bkv_view_t *view = bkv_membership_view(membership);
    bool all = true;
    for (uint32_t i = 0; i < view->count && all; i++) {
        place_of(roster->members, roster->count, view->members[i].place.id, &all);
    }
    bkv_view_give(view);
    return !all;
}

static void on_held(void *user);

// Without the cluster's seed nobody knows where anything is.
static void publish_or_hold(bkv_membership_t *membership) {
    bkv_roster_t *roster = &membership->roster;
    uint64_t now_ms = bkv_now_ms();
    if (!roster->changed || !membership->registration.configured) {
        return;
    }
    if (now_ms < roster->hold_until_ms && is_smaller(membership)) {
        bkv_etcd_timer_start(membership->etcd, &roster->timer, roster->hold_until_ms - now_ms, on_held, membership);
    } else {
        publish(membership);
    }
}

static void on_held(void *user) {
    publish_or_hold(user);
}

// What is held back already is not held back any longer by new trouble.
void bkv_roster_hold(bkv_membership_t *membership) {
    if (!membership->roster.timer.armed) {
        membership->roster.hold_until_ms = bkv_now_ms() + HOLD_MS;
    }
}

static void on_synced(void *user, int64_t revision) {
    bkv_membership_t *membership = user;
    membership->roster.revision = revision;
    if (membership->roster.listing) {
        listing_end(membership, revision);
    }
    publish_or_hold(membership);
    set_watching(membership, true); // after the view is due, for who waits for both
    if (membership->registration.failures > 0) {
        bkv_registration_kick(membership); // etcd is there again
    }
}

static void on_lost(void *user, const bkv_error_t *error) {
    bkv_membership_t *membership = user;
    set_watching(membership, false);
    bkv_roster_hold(membership);
    bkv_log(BKV_LOG_DEBUG, 0, "cluster: watch: %s", error->message);
}

const bkv_etcd_watcher_t bkv_roster_watcher = {
    .reset = on_reset, .put = on_put, .removed = on_removed, .synced = on_synced, .lost = on_lost};
