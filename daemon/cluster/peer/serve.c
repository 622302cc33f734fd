// serve.c - see serve.h. Links lie in a table of places, each with a lock of its own; a link's id says which is its place.
#include "daemon/cluster/peer/serve.h"

#include "daemon/cluster/members/member.h"
#include "daemon/observe/log.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

typedef struct bkv_serve_place {
    pthread_mutex_t lock; // all of this
    bool taken;
    bkv_link_id_t id;
    char member[BKV_MEMBER_NAME_MAX];
    bkv_verbs_link_t link;
    bkv_holds_t holds;
    uint64_t used_ms;
} bkv_serve_place_t;

struct bkv_serve {
    bkv_peer_device_t *device;
    uint64_t hold_bytes;  // most for one link
    pthread_mutex_t lock; // who may take a place, or leave one; before a place's
    uint32_t taken;       // [lock]
    bkv_serve_place_t places[BKV_SERVE_LINKS];
};

bkv_status_t bkv_serve_create(bkv_peer_device_t *device, bkv_serve_t **serve_out, bkv_error_t *err) {
    bkv_serve_t *serve = calloc(1, sizeof(*serve));
    if (serve == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for links of other daemons");
    }
    void *arena;
    uint64_t bytes;
    bkv_store_memory(device->store, &arena, &bytes);
    serve->device = device;
    serve->hold_bytes = bytes / BKV_SERVE_SHARE;
    pthread_mutex_init(&serve->lock, NULL);
    for (uint32_t i = 0; i < BKV_SERVE_LINKS; i++) {
        pthread_mutex_init(&serve->places[i].lock, NULL);
    }
    *serve_out = serve;
    return BKV_OK;
}

// ---- places ----

// The link is stopped before what it could read may move. [place->lock]
static void clear(bkv_serve_place_t *place) {
    bkv_verbs_link_deinit(&place->link);
    bkv_holds_deinit(&place->holds);
    place->taken = false;
}

void bkv_serve_destroy(bkv_serve_t *serve) {
    if (serve == NULL) {
        return;
    }
    for (uint32_t i = 0; i < BKV_SERVE_LINKS; i++) {
        if (serve->places[i].taken) {
            clear(&serve->places[i]);
        }
        pthread_mutex_destroy(&serve->places[i].lock);
    }
    pthread_mutex_destroy(&serve->lock);
    free(serve);
}

// The member's own place, or a free one; BKV_SERVE_LINKS: all are others'. [serve->lock]
static uint32_t find_place(const bkv_serve_t *serve, const char *member) {
    uint32_t found = BKV_SERVE_LINKS;
    for (uint32_t i = 0; i < BKV_SERVE_LINKS; i++) {
        const bkv_serve_place_t *place = &serve->places[i];
        if (place->taken && strcmp(place->member, member) == 0) {
            return i;
        }
        if (!place->taken && found == BKV_SERVE_LINKS) {
            found = i;
        }
    }
    return found;
}

// Gives the link a place, in which it takes that of the member's old one. The link is the place's afterwards, or still the caller's.
static bkv_status_t settle(bkv_serve_t *serve, const char *member, const bkv_verbs_link_t *link, uint64_t now_ms,
                           bkv_link_id_t *id, bkv_error_t *err) {
    if (getrandom(id->bytes, sizeof(id->bytes), 0) != (ssize_t)sizeof(id->bytes)) {
        return bkv_fail(err, BKV_INTERNAL, "no random bytes: %s", strerror(errno));
    }
    pthread_mutex_lock(&serve->lock);
    uint32_t index = find_place(serve, member);
    if (index == BKV_SERVE_LINKS) {
        pthread_mutex_unlock(&serve->lock);
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "%d other daemons have links already", BKV_SERVE_LINKS);
    }
    memcpy(id->bytes, &index, sizeof(index));
    bkv_serve_place_t *place = &serve->places[index];
    pthread_mutex_lock(&place->lock);
    if (place->taken) {
        clear(place);
    } else {
        serve->taken++;
    }
    place->taken = true;
    place->id = *id;
    strncpy(place->member, member, sizeof(place->member) - 1);
    place->link = *link;
    place->used_ms = now_ms;
    bkv_holds_init(&place->holds, serve->device->store, serve->hold_bytes);
    pthread_mutex_unlock(&place->lock);
    pthread_mutex_unlock(&serve->lock);
    return BKV_OK;
}

// The link's place, locked; NULL: there is none.
static bkv_serve_place_t *lock_place(bkv_serve_t *serve, const bkv_link_id_t *id) {
    uint32_t index;
    memcpy(&index, id->bytes, sizeof(index));
    if (index >= BKV_SERVE_LINKS) {
        return NULL;
    }
    bkv_serve_place_t *place = &serve->places[index];
    pthread_mutex_lock(&place->lock);
    if (place->taken && memcmp(place->id.bytes, id->bytes, sizeof(id->bytes)) == 0) {
        return place;
    }
    pthread_mutex_unlock(&place->lock);
    return NULL;
}

// ---- what is asked ----

bkv_status_t bkv_serve_link(bkv_serve_t *serve, const char *member, const bkv_verbs_end_t *other, uint64_t now_ms,
                            bkv_link_id_t *id, bkv_verbs_end_t *own, bkv_error_t *err) {
    if (!bkv_member_id_valid(member)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "member: no member has such an id");
    }
    struct ibv_mr *arena;
    bkv_verbs_link_t link;
    bkv_status_t status = bkv_peer_device_arena(serve->device, &arena, err);
    if (status == BKV_OK) {
        status = bkv_verbs_link_init(&link, serve->device->device, NULL, 1, BKV_VERBS_READ, err);
    }
    if (status != BKV_OK) {
        return status;
    }
    bkv_verbs_link_describe(&link, arena, own);
    status = bkv_verbs_link_connect(&link, other, err);
    if (status == BKV_OK) {
        status = settle(serve, member, &link, now_ms, id, err);
    }
    if (status != BKV_OK) {
        bkv_verbs_link_deinit(&link);
        return status;
    }
    bkv_log(BKV_LOG_DEBUG, 0, "cluster: %s reads here by RDMA", member);
    return BKV_OK;
}

bkv_status_t bkv_serve_locate(bkv_serve_t *serve, const bkv_link_id_t *id, const bkv_locate_t *locate, uint64_t now_ms,
                              bkv_location_t *locations, uint64_t *hold, bkv_error_t *err) {
    bkv_serve_place_t *place = lock_place(serve, id);
    if (place == NULL) {
        return bkv_fail(err, BKV_FAILED_PRECONDITION, "link: there is none such; Link again");
    }
    place->used_ms = now_ms;
    for (size_t i = 0; i < locate->release_count; i++) {
        bkv_holds_release(&place->holds, locate->release[i]);
    }
    *hold = 0;
    bkv_status_t status = BKV_OK;
    if (locate->count > 0) {
        bkv_holds_expire(&place->holds, now_ms);
        status = bkv_holds_take(&place->holds, locate->names, locate->count, now_ms + BKV_SERVE_HOLD_MS, now_ms, locations,
                                hold, err);
    }
    pthread_mutex_unlock(&place->lock);
    return status;
}

// ---- the clock ----

void bkv_serve_tick(bkv_serve_t *serve, uint64_t now_ms) {
    for (uint32_t i = 0; i < BKV_SERVE_LINKS; i++) {
        bkv_serve_place_t *place = &serve->places[i];
        pthread_mutex_lock(&serve->lock);
        pthread_mutex_lock(&place->lock);
        if (place->taken && now_ms >= place->used_ms + BKV_SERVE_IDLE_MS) {
            bkv_log(BKV_LOG_DEBUG, 0, "cluster: %s has not read here by RDMA for a while", place->member);
            clear(place);
            serve->taken--;
        } else if (place->taken) {
            bkv_holds_expire(&place->holds, now_ms);
        }
        pthread_mutex_unlock(&place->lock);
        pthread_mutex_unlock(&serve->lock);
    }
}

uint32_t bkv_serve_links(bkv_serve_t *serve) {
    pthread_mutex_lock(&serve->lock);
    uint32_t taken = serve->taken;
    pthread_mutex_unlock(&serve->lock);
    return taken;
}
