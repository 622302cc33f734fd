// internal.h - what the mover's files share; nobody else includes it.
//
// Files: mover.c (create, destroy, what it is told and asked, the thread and what it does when), pass.c (the work itself, a group
// of records at a time), carry.c (takes a group to its targets), owed.c (what Puts could not deliver), repair.c (the plans),
// history.c (the views that they start from), bandwidth.c, confirm.c (asks the others whether they are done, too).
#ifndef BKV_MOVER_INTERNAL_H
#define BKV_MOVER_INTERNAL_H

#include "daemon/cluster/move/mover.h"

#include "daemon/cluster/move/bandwidth.h"
#include "daemon/cluster/move/carry.h"
#include "daemon/cluster/move/history.h"
#include "daemon/cluster/move/owed.h"
#include "daemon/cluster/move/repair.h"

#include <pthread.h>
#include <stdatomic.h>

#define BKV_MOVER_GROUP 4096u // records in a group
#define BKV_MOVER_NEVER UINT64_MAX

// A pass is some rounds through the store: one for each view that plans start from, and one that offers everything that is not
// this daemon's to its owners, of which the plans leave some to others. When that is clean all of it is there, and the daemon may
// forget it.
typedef struct bkv_pass {
    const bkv_view_t *view;                  // towards which; NULL: no pass
    const bkv_view_t *from[BKV_HISTORY_MAX]; // [from_count] held
    uint32_t from_count, round;
    bkv_repair_t *repair;            // of the round
    bool all;                        // there is one round alone, which offers everything
    uint64_t started_ms, total;      // total: records in the store when it began
    uint64_t handled, handled_bytes; // of this round's plan, transfers that are over
    uint64_t sent, sent_bytes, failed, refused;
    uint64_t left_bytes; // of those that failed or were refused
    bkv_error_t error;   // of one of those that failed
} bkv_pass_t;

// A view under which this daemon has nothing left to send, while others may have.
typedef struct bkv_confirm {
    const bkv_view_t *view; // NULL: none
    uint32_t next;          // its members before that one say that they are done, too
} bkv_confirm_t;

struct bkv_mover {
    // Fixed.
    bkv_mover_config_t config;
    bkv_placement_t *nobody; // of no members: after it, all that is here is a stray, and offered to all of its owners
    pthread_t thread;
    bool running;

    // The thread's.
    bkv_pass_t pass;
    bkv_confirm_t confirm;
    bkv_repair_send_t *sends; // [BKV_MOVER_GROUP]
    bkv_carried_t *outcomes;  // [BKV_MOVER_GROUP]
    bkv_name_t *names;        // [BKV_MOVER_GROUP]

    pthread_mutex_t lock; // what follows
    pthread_cond_t changed;
    bool ending;
    uint64_t delay_ms;
    bkv_bandwidth_t bandwidth;
    bkv_history_t history;        // empty: stopped
    _Atomic bool unsettled;       // its origin is not the present view
    bool offer_all;               // the next pass must offer everything
    uint64_t seen;                // the newest view's version, and of that:
    bool member, draining;        // this daemon is in it, and drains
    bool takers;                  // somebody in it may own something
    uint64_t clean, settled_hash; // version, and hash, of the view that the last clean pass was under
    uint64_t confirm_due_ms;      // when to ask the others; NEVER: there is nothing to ask them
    uint32_t confirm_failures;    // in a row
    uint64_t pass_due_ms;         // when to begin the next pass, or begin anew
    uint32_t pass_failures;       // in a row, and of these, those by refusals alone
    uint32_t pass_refusals;
    bkv_owed_t owed;
    uint64_t owed_due_ms;
    uint32_t owed_failures;         // in a row
    bool owing;                     // a group of them is under way
    bool passing;                   // there is a pass
    uint64_t left_keys, left_bytes; // of it, or what the last one has left
    uint64_t moved_keys, moved_bytes;
    bkv_mover_metrics_t metrics;
};

// ---- mover.c, for pass.c ----

// [lock] Looks at the present view, whether it is new.
void bkv_mover_look(bkv_mover_t *mover);

// [lock] Whether anything may be moved now.
bool bkv_mover_may(bkv_mover_t *mover);

// The pace of carry.h.
bkv_carry_pace_t bkv_mover_pace(void *mover, uint64_t bytes);

// [lock] How long to wait after so many failures in a row.
uint64_t bkv_mover_pause_ms(const bkv_mover_t *mover, uint32_t failures);

// ---- pass.c: on the mover's thread, without the lock ----

// Begins a pass towards the present view, instead of any that is under way.
void bkv_pass_begin(bkv_mover_t *mover);
void bkv_pass_step(bkv_mover_t *mover); // a group of it
void bkv_pass_drop(bkv_mover_t *mover);

// A group of what Puts owe.
void bkv_pass_owed(bkv_mover_t *mover);

// ---- confirm.c: likewise ----

uint64_t bkv_confirm_hash(const bkv_view_t *view);

// The view is held, and confirm_due_ms set, for as long as it takes.
void bkv_confirm_begin(bkv_mover_t *mover, const bkv_view_t *view);
void bkv_confirm_step(bkv_mover_t *mover); // asks some members; when all are done, origin is this view
void bkv_confirm_drop(bkv_mover_t *mover);

#endif
