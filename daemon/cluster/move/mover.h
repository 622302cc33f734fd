// mover.h - brings every record to its owners when the members have changed: executes the plans of repair.h.
//
// One thread. It waits until a view has stayed the same for delay_ms (a daemon that is restarted is back by then, and nothing
// need be moved at all), then goes through the store: asks each target which records it lacks, sends those, within a bandwidth.
// What is not this daemon's any more becomes a copy once its owners have it (bkv_store_set_copy), and a copy that is now its own
// is none any more. A pass in which something failed is followed by another, after a pause; a clean one ends it, until the next
// change. When the members change during a pass, it goes on as it was until the new view has lasted for the delay, so that it gets
// on however often daemons come and go. A member that drains waits for nothing.
//
// Nothing is moved while etcd does not confirm that this daemon is a member, and nothing where nobody may own it.
//
// What it remembers is the view under which all was last in its place, `origin`: until the next repair is done, readers ask its
// members too (a block may not have reached its new owners yet), and the plans start from it. A repair is done when all members
// have ended a clean pass under the very same view, of which they ask each other (bkv_peer_drain): who has nothing to send himself
// does not know whether another one, who was to send, has crashed before. Of a daemon that has just been started, which does not
// know what was, origin is the last view without it.
#ifndef BKV_MOVER_H
#define BKV_MOVER_H

#include "daemon/cluster/members/membership.h"
#include "daemon/cluster/peer/peers.h"

typedef struct bkv_mover bkv_mover_t;

typedef struct bkv_mover_config {
    bkv_store_t *store; // these outlive the mover
    bkv_peers_t *peers;
    bkv_membership_t *membership;
    uint64_t delay_ms;
    uint64_t rate;     // bytes a second; 0: no limit
    uint64_t pause_ms; // after a first failure; later ones' grow to 30 times as much. 0: 1000
} bkv_mover_config_t;

typedef enum bkv_mover_state { BKV_MOVER_IDLE, BKV_MOVER_WAITING, BKV_MOVER_MOVING } bkv_mover_state_t;

typedef struct bkv_mover_progress {
    bkv_mover_state_t state;
    uint64_t left_keys, left_bytes;   // estimates: of this pass, what is planned and not yet sent
    uint64_t moved_keys, moved_bytes; // since the last drain began, or the start
    bool handed_over;                 // this member drains, and all that it held is with its present owners
    uint64_t view;                    // the version of the view that this is about: the latest that the mover has looked at
    uint64_t settled;                 // as in proto/peer.proto
} bkv_mover_progress_t;

// X(name, is_counter, help)
#define BKV_MOVER_METRICS(X)                                                                                                   \
    X(repair_moving, false, "1: records are being brought to their owners")                                                    \
    X(repair_left_bytes, false, "bytes that are still to be sent, an estimate")                                                \
    X(repair_passes_total, true, "times that the store was gone through")                                                      \
    X(repair_sent_total, true, "records sent to their owners by repair")                                                       \
    X(repair_sent_bytes_total, true, "their bytes")                                                                            \
    X(repair_failed_total, true, "of its transfers, those that failed and were tried again")

typedef struct bkv_mover_metrics {
#define X(name, is_counter, help) uint64_t name;
    BKV_MOVER_METRICS(X)
#undef X
} bkv_mover_metrics_t;

bkv_status_t bkv_mover_create(const bkv_mover_config_t *config, bkv_mover_t **mover, bkv_error_t *err);

// Stops in the middle: asks nothing of the peers any more, and has no view. What is under way there ends by itself, at the latest
// with the peers. The mover can still be asked and told things. NULL: nothing.
void bkv_mover_stop(bkv_mover_t *mover);
void bkv_mover_destroy(bkv_mover_t *mover); // stops it first. NULL: nothing

// From here on thread-safe, and none of them waits for anything under way.

void bkv_mover_view_changed(bkv_mover_t *mover); // the membership's callback

// A record is not where it belongs, as a Put could not reach all of its owners: it is offered to them soon, also without a change
// of the view, and again until they have it or it has left the store.
void bkv_mover_again(bkv_mover_t *mover, const bkv_name_t *name);

// The view that readers should ask too, to be given back (bkv_view_give); NULL: the present one says it all.
const bkv_view_t *bkv_mover_origin(bkv_mover_t *mover);

void bkv_mover_set_limits(bkv_mover_t *mover, uint64_t delay_ms, uint64_t rate); // SIGHUP

void bkv_mover_get_progress(bkv_mover_t *mover, bkv_mover_progress_t *progress);
void bkv_mover_get_metrics(bkv_mover_t *mover, bkv_mover_metrics_t *metrics);

#endif
