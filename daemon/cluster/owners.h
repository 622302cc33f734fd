// owners.h - of a batch of names: which other members are to be asked about each, best first.
//
// Those are a name's owners by the present view and, as long as repair has something to move, by the view that repair starts from
// (bkv_mover_origin): a record may not have reached its new owners yet. Such a former owner may not be a member any more. It is
// asked all the same, and last, as who is cut off from etcd goes on serving; but its silence says nothing, as it is probably dead.
#ifndef BKV_OWNERS_H
#define BKV_OWNERS_H

#include "daemon/cluster/internal.h"

#define BKV_OWNERS_MAX (2 * BKV_REPLICAS_MAX)

// A member that some of the names belong to.
typedef struct bkv_owner {
    bkv_peer_t *peer;         // counted; NULL: it has no address that can be used
    bkv_peer_health_t health; // when the batch was looked up
    bool gone;                // in no view but repair's
    char id[BKV_MEMBER_NAME_MAX];
} bkv_owner_t;

// Whom a name belongs to.
typedef struct bkv_owned {
    uint16_t owners[BKV_OWNERS_MAX]; // places in bkv_owners_t.owners: not suspected before suspected, then by latency
    uint8_t count;
    bool self; // to this daemon too, by the present view
} bkv_owned_t;

typedef struct bkv_owners {
    uint32_t count;
    bkv_owner_t *owners; // [count], each once
    bkv_owned_t *of;     // [names]
} bkv_owners_t;

// RESOURCE_EXHAUSTED: no memory; there is nothing to deinit then.
bkv_status_t bkv_owners_init(bkv_owners_t *owners, bkv_cluster_t *cluster, const bkv_name_t *names, uint32_t count,
                             bkv_error_t *err);
void bkv_owners_let_go(bkv_owners_t *owners); // of the peers; nobody can be asked any more
void bkv_owners_deinit(bkv_owners_t *owners); // zeroed ones are left alone

#endif
