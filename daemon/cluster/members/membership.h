// membership.h - this daemon as a member of a cluster: its record in etcd under a lease, and a view of all members.
//
// What it is: registers the daemon, keeps its lease alive, watches the others, and hands out views (view.h). What it is not: it
// sends nothing to other members, and moves no blocks.
//
// Etcd decides. A member is whoever has a record; a record goes with its lease, when the daemon has not been heard of for ttl_s
// seconds by etcd's own clock. Nobody's wall clock matters, here only durations of the monotonic one do.
//
// A daemon that cannot reach etcd goes on with the view that it has, and with serving: blocks never change, so an old view
// costs misses, not wrong bytes. It says so (BKV_MEMBERSHIP_CUT_OFF) once its lease may have run out. When etcd is there again
// and the lease is not, it registers anew by itself, under a new epoch, by which all others know that it had been gone.
//
// When etcd itself stands still, nobody can keep a lease alive. Members that vanish just after trouble with etcd are therefore
// believed to be gone only some seconds later (roster.c), when those that live have registered again.
//
// An id belongs to who holds the lease of its record. A daemon that starts where one of its id was killed, with the same
// addresses, takes its place at once, under a new epoch. Any other daemon that finds its id taken waits until that record is gone,
// ttl_s at most after a crash and in the case of two daemons with one id for ever; it says so in status and log.
//
// Seed of placement and replicas are kept in etcd as well: who comes first writes them, all others take what is there. If etcd
// has lost everything, the members write the same again.
//
// Threads. What etcd says is taken in on the etcd client's thread; views are made and callbacks called on a thread of the
// membership's own, which makes one view of all that has come meanwhile, because a placement of 1,000 members takes 2 s.
#ifndef BKV_MEMBERSHIP_H
#define BKV_MEMBERSHIP_H

#include "daemon/cluster/etcd/etcd.h"
#include "daemon/cluster/members/view.h"

typedef struct bkv_membership bkv_membership_t;

typedef enum bkv_membership_state {
    BKV_MEMBERSHIP_JOINING, // not registered yet, or not any more; trying
    BKV_MEMBERSHIP_MEMBER,
    BKV_MEMBERSHIP_CUT_OFF, // etcd has not confirmed the lease for its whole time: others may count this daemon as gone
    BKV_MEMBERSHIP_BLOCKED, // another daemon holds the id
    BKV_MEMBERSHIP_LEFT,
} bkv_membership_state_t;

// For health, status and log: "joining", "member", ...
const char *bkv_membership_state_name(bkv_membership_state_t state);

typedef struct bkv_membership_config {
    bkv_etcd_t *etcd;    // outlives the membership; may be used for other things besides
    const char *cluster; // its name: as an id
    bkv_member_t self;   // as it should be registered; epoch is chosen here. An empty id: only watches, never joins
    uint32_t ttl_s;      // 1..3600
    uint32_t replicas;   // if this daemon is the first
    bool later;          // only watches, until bkv_membership_announce

    // Called on the membership's thread, and must not call back into create, leave or destroy. Optional. `was` and `now` are
    // good for the call; who wants to keep one takes the present one by bkv_membership_view.
    void (*on_change)(void *user, const bkv_view_t *was, const bkv_view_t *now);
    void *user;
} bkv_membership_config_t;

// Counters: X(name, is_counter, help)
#define BKV_MEMBERSHIP_METRICS(X)                                                                                              \
    X(members, false, "members in the present view")                                                                           \
    X(draining, false, "of them, those that are about to leave")                                                               \
    X(connected, false, "1: etcd has confirmed this daemon's lease in time; 0: cut off, or not a member")                      \
    X(watching, false, "1: changes of other members are seen; 0: no contact, the view may be old")                             \
    X(view_version, true, "views so far")                                                                                      \
    X(rejoins_total, true, "times this daemon's lease was lost")                                                               \
    X(failures_total, true, "questions that etcd did not answer in time, or refused")

typedef struct bkv_membership_metrics {
#define X(name, is_counter, help) uint64_t name;
    BKV_MEMBERSHIP_METRICS(X)
#undef X
} bkv_membership_metrics_t;

typedef struct bkv_membership_status {
    bkv_membership_state_t state;
    uint64_t since_ms;   // bkv_now_ms when the state began
    uint64_t epoch;      // of the present registration
    bkv_error_t trouble; // what keeps it from being a member; status BKV_OK: nothing
} bkv_membership_status_t;

// Begins to register and watch, and returns at once: with etcd down it goes on trying. INVALID_ARGUMENT names the field.
bkv_status_t bkv_membership_create(const bkv_membership_config_t *config, bkv_membership_t **membership, bkv_error_t *err);

// Waits until all that etcd knows of the members is in the present view, for at most timeout_ms; whether it is. A cluster of which
// etcd knows nothing yet is known at once.
bool bkv_membership_await(bkv_membership_t *membership, uint32_t timeout_ms);

// Ends without leaving: others see it once the lease runs out, as after a crash. All views must have been given back. NULL:
// nothing.
void bkv_membership_destroy(bkv_membership_t *membership);

// Deletes this daemon's record, so that others see it at once; the view is still kept up. Waits for at most timeout_ms.
bkv_status_t bkv_membership_leave(bkv_membership_t *membership, uint32_t timeout_ms, bkv_error_t *err);

// With `later`: registers from now on, with these addresses and transports of `self` (its other fields stay as they were).
// INVALID_ARGUMENT names the field.
bkv_status_t bkv_membership_announce(bkv_membership_t *membership, const bkv_member_t *self, bkv_error_t *err);

// Changes the record as soon as etcd can be reached; for as long as it cannot, the last change counts. Any thread.
bkv_status_t bkv_membership_set_draining(bkv_membership_t *membership, bool draining);
bkv_status_t bkv_membership_set_weight(bkv_membership_t *membership, uint32_t weight);

// The present view, without a lock; give it back (bkv_view_give) when the request is done.
const bkv_view_t *bkv_membership_view(bkv_membership_t *membership);

void bkv_membership_get_status(bkv_membership_t *membership, bkv_membership_status_t *status);
void bkv_membership_get_metrics(bkv_membership_t *membership, bkv_membership_metrics_t *metrics);

#endif
