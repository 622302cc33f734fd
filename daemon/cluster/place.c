// place.c - Put's share of the cluster: gives a record that was just published here to its owners, all at the same time.
//
// A placement counts the owners that have not answered; who takes that to 0 says how many have the record. An owner that is
// silent costs the peer timeout at most, and once peers.c suspects it nothing; what it missed, the mover brings it later.
#include "daemon/cluster/internal.h"

#include "daemon/observe/clock.h"

#include <stdlib.h>

typedef struct place place_t;

// An owner that is to have it.
typedef struct part {
    place_t *place;
    bkv_peer_t *peer; // NULL: cannot be spoken to
} part_t;

struct place {
    bkv_cluster_t *cluster;
    bkv_name_t name;
    bool known, own; // own: this daemon is an owner
    uint64_t deadline_ms;
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
    if (have == place->count + place->own) {
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
    if (part->peer != NULL) {
        bkv_peer_release(part->peer);
    }
    place_release(place);
}

// How long an owner is waited for.
static uint64_t patience(const place_t *place) {
    uint64_t until_ms = bkv_now_ms() + place->cluster->peer_timeout_ms;
    return until_ms < place->deadline_ms ? until_ms : place->deadline_ms;
}

static void on_store(void *user, const bkv_error_t *error, const bkv_status_t *results) {
    part_end(user, error->status == BKV_OK ? results[0] : error->status == BKV_NOT_FOUND ? BKV_BUSY : error->status);
}

static void store(part_t *part) {
    bkv_status_t status = bkv_peer_store(part->peer, &part->place->name, 1, patience(part->place), on_store, part, NULL);
    if (status != BKV_OK) {
        part_end(part, BKV_BUSY);
    }
}

static void on_have(void *user, const bkv_error_t *error, const uint64_t *bytes) {
    part_t *part = user;
    if (error->status != BKV_OK) {
        part_end(part, BKV_BUSY);
    } else if (bytes[0] != 0) {
        part_end(part, BKV_ALREADY_EXISTS);
    } else {
        store(part);
    }
}

static void part_start(part_t *part) {
    place_t *place = part->place;
    if (part->peer == NULL) {
        part_end(part, BKV_BUSY);
    } else if (!place->known) {
        store(part);
    } else if (bkv_peer_have(part->peer, &place->name, 1, patience(place), on_have, part, NULL) != BKV_OK) {
        part_end(part, BKV_BUSY);
    }
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
            bkv_peer_t *peer = bkv_peers_get(place->cluster->peers, &view->members[owners[i]]);
            place->parts[place->count++] = (part_t){.place = place, .peer = peer};
        }
    }
    bool others = view->count > (view->self != BKV_NO_MEMBER ? 1 : 0);
    bkv_view_give(view);
    return others;
}

void bkv_cluster_place(bkv_cluster_t *cluster, const bkv_name_t *name, bool known, uint64_t deadline_ms, bkv_placed_t done,
                       void *user) {
    place_t *place = calloc(1, sizeof(*place));
    if (place == NULL) {
        bkv_mover_again(cluster->mover, name);
        done(user, 0);
        return;
    }
    *place =
        (place_t){.cluster = cluster, .name = *name, .known = known, .deadline_ms = deadline_ms, .done = done, .user = user};
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
