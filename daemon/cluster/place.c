// place.c - Put's share of the cluster: gives a record that was just published here to its owners, all at the same time.
//
// A placement counts the owners that have not answered; who takes that to 0 says how many have the record. An owner that is
// silent costs the peer timeout at most, and once the peers suspect it nothing; what it missed, the mover brings it later. Many
// placements share a call: giving.c.
#include "daemon/cluster/internal.h"

#include "daemon/observe/clock.h"

#include <stdlib.h>

typedef struct place place_t;

// An owner that is to have it.
typedef struct part {
    bkv_gift_t gift; // first: the part is found by it
    place_t *place;
} part_t;

struct place {
    bkv_cluster_t *cluster;
    bkv_name_t name;
    bool known, own; // own: this daemon is an owner
    uint64_t bytes, deadline_ms;
    _Atomic uint32_t waiting; // parts, and who starts them
    _Atomic uint32_t have;    // owners
    _Atomic bool gone;        // it has left the store meanwhile
    bkv_placed_t done;
    void *user;
    uint32_t count;
    part_t parts[BKV_REPLICAS_MAX];
};

static void settle(place_t *place, uint32_t have) {
    bkv_cluster_t *cluster = place->cluster;
    uint32_t owners = place->count + place->own;
    if (owners == 0) {
        return; // all members drain, or want none: it is nobody's copy
    }
    if (have == owners) {
        bkv_cluster_count(&cluster->counters.placed_total, 1);
        if (place->known || !place->own) { // as it is new, it is no copy yet
            bkv_store_set_copy(cluster->store, &place->name, !place->own, bkv_now_ms());
        }
    } else if (!atomic_load(&place->gone)) {
        bkv_cluster_count(&cluster->counters.placed_short_total, 1);
        bkv_mover_again(cluster->mover, &place->name);
    }
}

static void place_release(place_t *place) {
    if (atomic_fetch_sub(&place->waiting, 1) != 1) {
        return;
    }
    bkv_cluster_t *cluster = place->cluster;
    uint32_t have = atomic_load(&place->have);
    settle(place, have);
    place->done(place->user, have);
    free(place);
    bkv_cluster_release(cluster);
}

static void part_end(part_t *part, bkv_status_t result) {
    place_t *place = part->place;
    if (result == BKV_OK || result == BKV_ALREADY_EXISTS) {
        atomic_fetch_add(&place->have, 1);
    } else if (result == BKV_NOT_FOUND) {
        atomic_store(&place->gone, true);
    }
    bkv_peer_release(part->gift.peer);
    place_release(place);
}

// A record that was here before is asked about first, and given where it is lacking.
static void on_given(bkv_gift_t *gift, bkv_status_t result) {
    part_t *part = (part_t *)gift;
    if (gift->ask && result == BKV_NOT_FOUND) {
        gift->ask = false;
        bkv_giving_give(&part->place->cluster->giving, gift);
    } else {
        part_end(part, result);
    }
}

static void part_start(part_t *part) {
    if (part->gift.peer == NULL) { // it has no address
        part_end(part, BKV_BUSY);
    } else {
        bkv_giving_give(&part->place->cluster->giving, &part->gift);
    }
}

static void add_part(place_t *place, const bkv_member_t *owner) {
    place->parts[place->count++] = (part_t){.place = place,
                                            .gift = {.peer = bkv_peers_get(place->cluster->peers, owner),
                                                     .name = place->name,
                                                     .bytes = place->bytes,
                                                     .deadline_ms = place->deadline_ms,
                                                     .ask = place->known,
                                                     .done = on_given}};
}

// The owners by the present view. False: there is no other member.
static bool find_owners(place_t *place) {
    const bkv_view_t *view = bkv_membership_view(place->cluster->membership);
    uint16_t owners[BKV_REPLICAS_MAX];
    uint32_t count = bkv_placement_owners(view->placement, &place->name.key, owners);
    for (uint32_t i = 0; i < count; i++) {
        if (owners[i] == view->self) {
            place->own = true;
        } else {
            add_part(place, &view->members[owners[i]]);
        }
    }
    bool others = view->count > (view->self != BKV_NO_MEMBER ? 1 : 0);
    bkv_view_give(view);
    return others;
}

void bkv_cluster_place(bkv_cluster_t *cluster, const bkv_name_t *name, uint64_t bytes, bool known, uint64_t deadline_ms,
                       bkv_placed_t done, void *user) {
    place_t *place = calloc(1, sizeof(*place));
    if (place == NULL) {
        bkv_mover_again(cluster->mover, name);
        done(user, 0);
        return;
    }
    *place = (place_t){.cluster = cluster,
                       .name = *name,
                       .known = known,
                       .bytes = bytes,
                       .deadline_ms = deadline_ms,
                       .done = done,
                       .user = user};
    if (!find_owners(place)) {
        free(place);
        done(user, 0);
        return;
    }
    bkv_cluster_hold(cluster);
    atomic_init(&place->have, place->own ? 1 : 0);
    atomic_init(&place->waiting, place->count + 1);
    for (uint32_t i = 0; i < place->count; i++) {
        part_start(&place->parts[i]);
    }
    place_release(place);
}
