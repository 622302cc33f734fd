// internal.h - what the membership's files share; nobody else includes it.
//
// Files: membership.c (create, destroy, status, the thread that makes views), registration.c (the lease and this daemon's
// record), roster.c (the others' records, from the watch), changes.c (a line of log for each change).
#ifndef BKV_MEMBERSHIP_INTERNAL_H
#define BKV_MEMBERSHIP_INTERNAL_H

#include "daemon/cluster/members/membership.h"

#include "daemon/observe/limit.h"

#include <pthread.h>

#define BKV_MEMBERSHIP_KEY_MAX 192

// The etcd thread's. What this daemon has in etcd, as far as it knows.
typedef struct bkv_registration {
    bool held;           // nothing is registered yet: bkv_membership_announce
    bool asking, kicked; // a question is on its way; after its answer, ask the next one at once
    bool configured;     // `cluster` is what etcd says
    bool registered;     // the record is there, under `lease`
    bool admitted;       // it once was
    bool leaving, left;
    int64_t lease;           // 0: none
    uint64_t lease_until_ms; // confirmed until
    uint32_t ttl_s;          // of the lease: etcd may give more than was asked for
    int64_t revision;        // of the record; 0: not there
    uint64_t epoch, last_epoch;
    uint32_t wanted, written; // generations of `self`: the newest, the record's
    uint32_t sent;            // that is on its way
    uint64_t asked_ms;
    uint32_t failures; // in a row
    bkv_etcd_timer_t timer;
} bkv_registration_t;

// The etcd thread's. All records there are.
typedef struct bkv_roster {
    bkv_member_t *members, *incoming; // [BKV_MEMBERS_MAX], ascending by id; of a listing that is not complete
    uint32_t count, incoming_count;
    bool listing, listed_config; // listed_config: there was one in this listing
    bool changed;                // since the last view
    int64_t revision;            // of etcd, up to which the list is
    uint64_t hold_until_ms;
    bkv_etcd_timer_t timer; // of what is held back until then
    bkv_limit_t limit;      // of complaints
} bkv_roster_t;

struct bkv_membership {
    // Fixed.
    bkv_etcd_t *etcd;
    char id[BKV_MEMBER_NAME_MAX]; // "": only watches
    char prefix[BKV_MEMBERSHIP_KEY_MAX], config_key[BKV_MEMBERSHIP_KEY_MAX], member_prefix[BKV_MEMBERSHIP_KEY_MAX],
        own_key[BKV_MEMBERSHIP_KEY_MAX];
    uint32_t ttl_s;
    void (*on_change)(void *user, const bkv_view_t *was, const bkv_view_t *now);
    void *user;
    bkv_views_t views;

    // The etcd thread's.
    bkv_registration_t registration;
    bkv_roster_t roster;
    bkv_etcd_watch_t *watch;
    bool dead; // destroyed: callbacks do nothing

    pthread_mutex_t lock; // a leaf
    pthread_cond_t changed;
    atomic_uint refs;                 // of the owner, and of each question on its way
    bkv_member_t self;                // [lock]
    bkv_cluster_config_t cluster;     // [lock] proposed, until registration.configured
    bkv_membership_status_t status;   // [lock]
    bkv_membership_metrics_t metrics; // [lock] rejoins_total, failures_total, watching
    bkv_member_t *pending;            // [lock] for the next view; NULL: nothing new
    uint32_t pending_count;           // [lock]
    int64_t pending_revision;         // [lock]
    bool publishing;                  // [lock] a view is being made
    bool ending;                      // [lock]
    bool detached;                    // [lock] the etcd thread is through with it
    pthread_t publisher;
};

void bkv_membership_unref(bkv_membership_t *membership);

// Sets state and trouble (NULL: none), and logs what is new.
void bkv_membership_set_state(bkv_membership_t *membership, bkv_membership_state_t state, const bkv_error_t *trouble);

// ---- registration.c: all on the etcd thread ----

void bkv_registration_start(bkv_membership_t *membership);
void bkv_registration_stop(bkv_membership_t *membership);
void bkv_registration_leave(bkv_membership_t *membership);
void bkv_registration_kick(bkv_membership_t *membership); // something has changed: do now what is to be done next

// What the watch has seen of this daemon's own key: a record (NULL: it is gone) as of a revision.
void bkv_registration_saw(bkv_membership_t *membership, const bkv_member_t *record, int64_t revision);
void bkv_registration_saw_config(bkv_membership_t *membership, const void *record, size_t length);
void bkv_registration_lost_config(bkv_membership_t *membership); // etcd has none any more: it gets the one we have

// ---- roster.c ----

bkv_status_t bkv_roster_init(bkv_roster_t *roster, bkv_error_t *err);
void bkv_roster_deinit(bkv_roster_t *roster);
void bkv_roster_hold(
    bkv_membership_t *membership); // etcd is in trouble: for a while, members that go are not believed to be gone
extern const bkv_etcd_watcher_t bkv_roster_watcher; // user: the membership

// ---- changes.c ----

// One line for each member that is new, gone or changed, up to a limit.
void bkv_changes_log(const bkv_view_t *was, const bkv_view_t *now);

#endif
