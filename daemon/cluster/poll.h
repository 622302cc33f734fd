// poll.h - asks all owners of a batch of names at the same time which of them they have: what Lookup and Where go by.
#ifndef BKV_POLL_H
#define BKV_POLL_H

#include "daemon/cluster/owners.h"

// What an asker makes of what it has heard so far.
typedef enum bkv_verdict {
    BKV_WAIT,           // for all owners
    BKV_WAIT_PATIENTLY, // for no owner longer than it usually takes, or a moment
    BKV_ENOUGH,
} bkv_verdict_t;

typedef struct bkv_poll_kind {
    // Whom the names belong to: of[names], before anything else. NULL: that is of no interest.
    bkv_verdict_t (*known)(void *user, const bkv_owned_t *of);
    // An owner has answered about names keys[0..count): bytes[i], 0: not there. bytes NULL: it has not, and will not.
    // left[key]: owners of that name that are still to be heard. One call after the other, none after done. With everything heard
    // the verdict does not matter.
    bkv_verdict_t (*heard)(void *user, const bkv_owner_t *owner, const uint32_t *keys, uint32_t count, const uint64_t *bytes,
                           const uint8_t *left);
    void (*done)(void *user); // once
} bkv_poll_kind_t;

// names, kind and user must live until done, which may run before this returns. Who has not answered by the deadline, or within
// the peer timeout, will not.
void bkv_poll_start(bkv_cluster_t *cluster, const bkv_name_t *names, uint32_t count, uint64_t deadline_ms,
                    const bkv_poll_kind_t *kind, void *user);

#endif
