// owners.c - see owners.h.
#include "daemon/cluster/owners.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#define NOT_YET UINT16_MAX

// What a batch is looked up with.
typedef struct lookup {
    bkv_cluster_t *cluster;
    bkv_owners_t *owners;
    const bkv_view_t *view, *origin; // origin NULL: the present one says it all
    uint16_t *at;                    // [members of view, then of origin]: their places in owners, or NOT_YET
} lookup_t;

static bool is_self(const lookup_t *lookup, const bkv_member_t *member) {
    return strcmp(member->place.id, lookup->cluster->id) == 0;
}

static uint16_t add_owner(lookup_t *lookup, const bkv_member_t *member, bool gone) {
    bkv_owners_t *owners = lookup->owners;
    bkv_owner_t *owner = &owners->owners[owners->count];
    *owner = (bkv_owner_t){.peer = bkv_peers_get(lookup->cluster->peers, member), .gone = gone};
    memcpy(owner->id, member->place.id, sizeof(owner->id));
    if (owner->peer != NULL) {
        bkv_peer_get_health(owner->peer, &owner->health);
    }
    return (uint16_t)owners->count++;
}

static uint16_t owner_of_view(lookup_t *lookup, uint16_t member) {
    uint16_t *at = &lookup->at[member];
    if (*at == NOT_YET) {
        *at = add_owner(lookup, &lookup->view->members[member], false);
    }
    return *at;
}

// A member of both views is one, also when it was started again in between: it may have kept its memory.
static uint16_t owner_of_origin(lookup_t *lookup, uint16_t member) {
    uint16_t *at = &lookup->at[lookup->view->count + member];
    if (*at == NOT_YET) {
        const bkv_member_t *was = &lookup->origin->members[member];
        uint16_t now = bkv_placement_find(lookup->view->placement, was->place.id);
        *at = now != BKV_NO_MEMBER ? owner_of_view(lookup, now) : add_owner(lookup, was, true);
    }
    return *at;
}

// Whether a is to be asked before b. Who has never been asked has latency 0, and so is tried.
static bool is_better(const bkv_owner_t *a, const bkv_owner_t *b) {
    if (a->gone != b->gone) {
        return b->gone;
    }
    if (a->health.suspected != b->health.suspected) {
        return b->health.suspected;
    }
    return a->health.latency_us < b->health.latency_us;
}

// Puts an owner in its place among those of a name, once.
static void insert(const bkv_owners_t *owners, bkv_owned_t *owned, uint16_t owner) {
    uint32_t at = 0;
    for (uint32_t i = 0; i < owned->count; i++) {
        if (owned->owners[i] == owner) {
            return;
        }
        at += is_better(&owners->owners[owner], &owners->owners[owned->owners[i]]) ? 0 : 1;
    }
    memmove(&owned->owners[at + 1], &owned->owners[at], (owned->count - at) * sizeof(owned->owners[0]));
    owned->owners[at] = owner;
    owned->count++;
}

static void look_up(lookup_t *lookup, const bkv_key_t *key, bkv_owned_t *owned) {
    uint16_t members[BKV_REPLICAS_MAX];
    uint32_t count = bkv_placement_owners(lookup->view->placement, key, members);
    for (uint32_t i = 0; i < count; i++) {
        if (is_self(lookup, &lookup->view->members[members[i]])) {
            owned->self = true;
        } else {
            insert(lookup->owners, owned, owner_of_view(lookup, members[i]));
        }
    }
    count = lookup->origin != NULL ? bkv_placement_owners(lookup->origin->placement, key, members) : 0;
    for (uint32_t i = 0; i < count; i++) {
        if (!is_self(lookup, &lookup->origin->members[members[i]])) {
            insert(lookup->owners, owned, owner_of_origin(lookup, members[i]));
        }
    }
}

static bkv_status_t look_up_all(lookup_t *lookup, const bkv_name_t *names, uint32_t count, bkv_error_t *err) {
    bkv_owners_t *owners = lookup->owners;
    size_t members = lookup->view->count + (lookup->origin != NULL ? lookup->origin->count : 0);
    size_t most = (size_t)count * BKV_OWNERS_MAX < members ? (size_t)count * BKV_OWNERS_MAX : members;
    lookup->at = malloc((members + 1) * sizeof(lookup->at[0]));
    owners->owners = calloc(most + 1, sizeof(owners->owners[0]));
    owners->of = calloc(count + (size_t)1, sizeof(owners->of[0]));
    if (lookup->at == NULL || owners->owners == NULL || owners->of == NULL) {
        free(lookup->at);
        bkv_owners_deinit(owners);
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "keys: no memory to ask for them");
    }
    memset(lookup->at, 0xff, (members + 1) * sizeof(lookup->at[0])); // NOT_YET
    for (uint32_t i = 0; i < count; i++) {
        look_up(lookup, &names[i].key, &owners->of[i]);
    }
    free(lookup->at);
    return BKV_OK;
}

bkv_status_t bkv_owners_init(bkv_owners_t *owners, bkv_cluster_t *cluster, const bkv_name_t *names, uint32_t count,
                             bkv_error_t *err) {
    *owners = (bkv_owners_t){0};
    lookup_t lookup = {
        .cluster = cluster,
        .owners = owners,
        .view = bkv_membership_view(cluster->membership),
        .origin = bkv_mover_origin(cluster->mover),
    };
    bkv_status_t status = look_up_all(&lookup, names, count, err);
    bkv_view_give(lookup.view);
    if (lookup.origin != NULL) {
        bkv_view_give(lookup.origin);
    }
    return status;
}

void bkv_owners_let_go(bkv_owners_t *owners) {
    for (uint32_t i = 0; i < owners->count; i++) {
        assert(owners->owners != NULL);
        bkv_peer_release(owners->owners[i].peer);
        owners->owners[i].peer = NULL;
    }
}

void bkv_owners_deinit(bkv_owners_t *owners) {
    bkv_owners_let_go(owners);
    free(owners->owners);
    free(owners->of);
    *owners = (bkv_owners_t){0};
}
