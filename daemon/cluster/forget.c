// forget.c - Drop: forgets records here and at all members at the same time, as copies may be anywhere.
//
// Who does not answer within the peer timeout is not waited for. What it still has then comes to light again when it does:
// records of dropped keys are no wrong answer, their time ends by eviction.
#include "daemon/cluster/internal.h"

#include "daemon/observe/clock.h"

#include <stdlib.h>

typedef struct forget {
    bkv_cluster_t *cluster;
    pthread_mutex_t lock; // guards had
    bool *had;            // the caller's
    uint32_t count;
    bkv_cluster_done_t done;
    void *user;
    _Atomic uint32_t left; // members to be heard, and the starter
} forget_t;

static void release(forget_t *forget) {
    if (atomic_fetch_sub(&forget->left, 1) == 1) {
        forget->done(forget->user);
        bkv_cluster_release(forget->cluster);
        pthread_mutex_destroy(&forget->lock);
        free(forget);
    }
}

static void on_forgotten(void *user, const bkv_error_t *error, const bool *had) {
    forget_t *forget = user;
    if (error->status == BKV_OK) {
        pthread_mutex_lock(&forget->lock);
        for (uint32_t i = 0; i < forget->count; i++) {
            forget->had[i] |= had[i];
        }
        pthread_mutex_unlock(&forget->lock);
    }
    release(forget);
}

static void ask(forget_t *forget, const bkv_member_t *member, const bkv_name_t *names, uint64_t deadline_ms) {
    bkv_peer_t *peer = bkv_peers_get(forget->cluster->peers, member);
    if (peer == NULL) {
        return;
    }
    atomic_fetch_add(&forget->left, 1);
    if (bkv_peer_forget(peer, names, forget->count, deadline_ms, on_forgotten, forget, NULL) != BKV_OK) {
        atomic_fetch_sub(&forget->left, 1); // not the last one: the starter is still there
    }
    bkv_peer_release(peer);
}

void bkv_cluster_forget(bkv_cluster_t *cluster, const bkv_name_t *names, uint32_t count, uint64_t deadline_ms, bool *had,
                        bkv_cluster_done_t done, void *user) {
    uint64_t now_ms = bkv_now_ms();
    for (uint32_t i = 0; i < count; i++) {
        had[i] = bkv_store_drop(cluster->store, &names[i].spec_id, &names[i].key, now_ms);
    }
    forget_t *forget = count > 0 ? malloc(sizeof(*forget)) : NULL;
    if (forget == NULL) {
        done(user);
        return;
    }
    *forget = (forget_t){.cluster = cluster, .had = had, .count = count, .done = done, .user = user};
    pthread_mutex_init(&forget->lock, NULL);
    atomic_init(&forget->left, 1);
    bkv_cluster_hold(cluster);
    uint64_t timeout_ms = now_ms + cluster->peer_timeout_ms;
    const bkv_view_t *view = bkv_membership_view(cluster->membership);
    for (uint32_t i = 0; i < view->count; i++) {
        if (i != view->self) {
            ask(forget, &view->members[i], names, deadline_ms < timeout_ms ? deadline_ms : timeout_ms);
        }
    }
    bkv_view_give(view);
    release(forget);
}
