// where.c - which members own keys, and which of them, and of this daemon, have them: for operators, and for clients that route.
#include "daemon/cluster/poll.h"

#include "daemon/observe/clock.h"

#include <stdlib.h>
#include <string.h>

typedef struct where {
    bkv_whereabouts_t *of; // the caller's
    bkv_cluster_done_t done;
    void *user;
} where_t;

static void add_holder(bkv_whereabouts_t *where, const char *id, uint64_t bytes) {
    if (where->holder_count < sizeof(where->holders) / sizeof(where->holders[0])) {
        memcpy(where->holders[where->holder_count++], id, sizeof(where->holders[0]));
        where->bytes = bytes;
    }
}

static bkv_verdict_t on_heard(void *user, const bkv_owner_t *owner, const uint32_t *keys, uint32_t count, const uint64_t *bytes,
                              const uint8_t *left) {
    (void)left;
    const where_t *where = user;
    for (uint32_t i = 0; i < count && bytes != NULL; i++) {
        if (bytes[i] != 0) {
            add_holder(&where->of[keys[i]], owner->id, bytes[i]);
        }
    }
    return BKV_WAIT;
}

static void on_polled(void *user) {
    where_t where = *(where_t *)user;
    free(user);
    where.done(where.user);
}

static const bkv_poll_kind_t kind = {.heard = on_heard, .done = on_polled};

// What needs no question: the owners, and what is here.
static void look_here(bkv_cluster_t *cluster, const bkv_name_t *names, uint32_t count, bool ask, bkv_whereabouts_t *where) {
    const bkv_view_t *view = bkv_membership_view(cluster->membership);
    uint64_t now_ms = bkv_now_ms();
    for (uint32_t i = 0; i < count; i++) {
        uint16_t owners[BKV_REPLICAS_MAX];
        where[i] = (bkv_whereabouts_t){.owner_count = bkv_placement_owners(view->placement, &names[i].key, owners)};
        for (uint32_t o = 0; o < where[i].owner_count; o++) {
            memcpy(where[i].owners[o], view->members[owners[o]].place.id, sizeof(where[i].owners[o]));
        }
        bkv_record_header_t header;
        uint64_t bytes;
        if (ask && bkv_store_peek(cluster->store, &names[i].spec_id, &names[i].key, now_ms, &header, &bytes)) {
            add_holder(&where[i], cluster->id, bytes);
        }
    }
    bkv_view_give(view);
}

void bkv_cluster_where(bkv_cluster_t *cluster, const bkv_name_t *names, uint32_t count, bool ask, uint64_t deadline_ms,
                       bkv_whereabouts_t *where, bkv_cluster_done_t done, void *user) {
    look_here(cluster, names, count, ask, where);
    where_t *request = ask ? malloc(sizeof(*request)) : NULL;
    if (request == NULL) {
        done(user);
        return;
    }
    *request = (where_t){.of = where, .done = done, .user = user};
    bkv_poll_start(cluster, names, count, deadline_ms, &kind, request);
}
