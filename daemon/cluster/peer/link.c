// link.c - see link.h.
#include "daemon/cluster/peer/link.h"

#include "daemon/cluster/peer/verbs.h"
#include "daemon/observe/clock.h"
#include "daemon/observe/log.h"
#include "peer.pb-c.h"
#include "proto/verbs_window.h"

#include <assert.h>
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct bkv_peers_verbs verbs_t;
typedef struct bkv_peer_verbs link_t;

// ---- ways ----

// [lock]
static void unref(bkv_way_t *way) {
    verbs_t *verbs = way->verbs;
    if (--way->refs == 0) {
        way->next = verbs->unused;
        verbs->unused = way;
        pthread_cond_signal(&verbs->changed);
    }
}

void bkv_way_put(bkv_way_t *way, uint64_t hold) {
    pthread_mutex_lock(&way->verbs->lock);
    if (hold != 0 && way->release_count < BKV_HOLDS_MAX / 2) { // else its time ends it
        way->releases[way->release_count++] = hold;
    }
    unref(way);
    pthread_mutex_unlock(&way->verbs->lock);
}

uint32_t bkv_way_releases(bkv_way_t *way, uint64_t releases[BKV_HOLDS_MAX / 2]) {
    pthread_mutex_lock(&way->verbs->lock);
    uint32_t count = way->release_count;
    memcpy(releases, way->releases, count * sizeof(releases[0]));
    way->release_count = 0;
    pthread_mutex_unlock(&way->verbs->lock);
    return count;
}

// [lock] The link has no way any more.
static void let_go(link_t *link) {
    if (link->way != NULL) {
        unref(link->way);
        link->way = NULL;
    }
    link->state = BKV_LINK_NONE;
}

// ---- what is wanted ----

// [lock]
static void enqueue(verbs_t *verbs, link_t *link, bkv_link_state_t state) {
    link->state = state;
    link->next = NULL;
    *verbs->todo_end = link;
    verbs->todo_end = &link->next;
    pthread_cond_signal(&verbs->changed);
}

// [lock] Destroying the peers waits until a link that is being made is made.
static void want(verbs_t *verbs, link_t *link) {
    if (bkv_peers_enter(verbs->peers)) {
        bkv_peer_hold(link->peer);
        enqueue(verbs, link, BKV_LINK_WANTED);
    }
}

bkv_way_t *bkv_link_get(bkv_peer_t *peer, uint64_t now_ms) {
    verbs_t *verbs = peer->peers->verbs;
    bkv_way_t *way = NULL;
    pthread_mutex_lock(&verbs->lock);
    if (peer->verbs == NULL) {
        peer->verbs = calloc(1, sizeof(*peer->verbs));
        if (peer->verbs != NULL) {
            peer->verbs->peer = peer;
        }
    }
    link_t *link = peer->verbs;
    if (link != NULL && link->state == BKV_LINK_READY) {
        way = link->way;
        way->refs++;
    } else if (link != NULL && link->state == BKV_LINK_NONE && now_ms >= link->retry_ms && bkv_verbs_usable(verbs->verbs)) {
        want(verbs, link);
    }
    pthread_mutex_unlock(&verbs->lock);
    return way;
}

// [lock]
static void set_back(link_t *link, uint64_t now_ms) {
    link->pause_ms = link->pause_ms == 0 ? BKV_LINK_PAUSE_MS : 2 * link->pause_ms;
    link->pause_ms = link->pause_ms < BKV_LINK_PAUSE_MAX ? link->pause_ms : BKV_LINK_PAUSE_MAX;
    link->retry_ms = now_ms + link->pause_ms;
    let_go(link);
}

void bkv_link_failed(bkv_peer_t *peer, const bkv_way_t *way, bool again, uint64_t now_ms) {
    verbs_t *verbs = peer->peers->verbs;
    link_t *link = peer->verbs;
    pthread_mutex_lock(&verbs->lock);
    if (link->state == BKV_LINK_READY && link->way == way) {
        if (again) {
            let_go(link);
        } else {
            set_back(link, now_ms);
        }
    }
    pthread_mutex_unlock(&verbs->lock);
}

void bkv_link_worked(bkv_peer_t *peer) {
    verbs_t *verbs = peer->peers->verbs;
    pthread_mutex_lock(&verbs->lock);
    peer->verbs->pause_ms = 0;
    pthread_mutex_unlock(&verbs->lock);
}

void bkv_peer_verbs_forget(bkv_peer_t *peer) {
    link_t *link = peer->verbs;
    if (link == NULL) {
        return;
    }
    verbs_t *verbs = peer->peers->verbs;
    pthread_mutex_lock(&verbs->lock);
    assert(link->state == BKV_LINK_NONE || link->state == BKV_LINK_READY);
    let_go(link);
    pthread_mutex_unlock(&verbs->lock);
    free(link);
    peer->verbs = NULL;
}

// ---- making one ----

// On the thread: the attempt is over, one way or the other.
static void conclude(verbs_t *verbs, link_t *link, const bkv_error_t *error) {
    bkv_peer_t *peer = link->peer;
    pthread_mutex_lock(&verbs->lock);
    if (error->status == BKV_OK) {
        link->state = BKV_LINK_READY;
    } else {
        set_back(link, bkv_now_ms());
    }
    pthread_mutex_unlock(&verbs->lock);
    if (error->status == BKV_OK) {
        bkv_log(BKV_LOG_INFO, 0, "member %s: records come by RDMA", peer->id);
    } else if (error->status != BKV_CANCELLED) {
        bkv_log(BKV_LOG_INFO, 0, "member %s: no RDMA for now, records come by gRPC: %s", peer->id, error->message);
    }
    bkv_peer_release(peer);
    bkv_peers_leave(verbs->peers);
}

bkv_status_t bkv_way_answered(bkv_way_t *way, const ProtobufCMessage *message, bkv_verbs_end_t *other, bkv_error_t *err) {
    const Balancekv__Cluster__V1__LinkResponse *response = (const Balancekv__Cluster__V1__LinkResponse *)message;
    if (response->verbs == NULL || response->link.len != sizeof(way->id.bytes)) {
        return bkv_fail(err, BKV_INTERNAL, "Link: not an answer");
    }
    memcpy(way->id.bytes, response->link.data, sizeof(way->id.bytes));
    bkv_status_t status = bkv_verbs_window_get(response->verbs, other, err);
    if (status == BKV_OK && (other->bytes == 0 || other->reads == 0)) {
        status = bkv_fail(err, BKV_INTERNAL, "Link: an answer without an arena that can be read");
    }
    way->bytes = other->bytes;
    return status;
}

// On a thread of the peers'.
static void on_answer(void *user, const bkv_error_t *error, const ProtobufCMessage *response) {
    link_t *link = user;
    verbs_t *verbs = link->way->verbs;
    link->answer = *error;
    if (error->status == BKV_OK) {
        bkv_way_answered(link->way, response, &link->other, &link->answer);
    }
    pthread_mutex_lock(&verbs->lock);
    enqueue(verbs, link, BKV_LINK_ANSWERED);
    pthread_mutex_unlock(&verbs->lock);
}

static bkv_status_t make_way(verbs_t *verbs, bkv_way_t **made, bkv_error_t *err) {
    bkv_way_t *way = calloc(1, sizeof(*way));
    if (way == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for a link");
    }
    way->verbs = verbs;
    way->refs = 1;
    bkv_status_t status = bkv_verbs_path_init(&way->path, verbs->verbs, err);
    if (status != BKV_OK) {
        free(way);
        return status;
    }
    *made = way;
    return BKV_OK;
}

static bkv_status_t ask(verbs_t *verbs, link_t *link, bkv_error_t *err) {
    struct ibv_mr *arena; // where what is read goes to
    bkv_status_t status = bkv_peer_device_arena(&verbs->device, &arena, err);
    if (status == BKV_OK) {
        status = make_way(verbs, &link->way, err);
    }
    if (status != BKV_OK) {
        return status;
    }
    bkv_verbs_end_t end;
    Balancekv__V1__VerbsWindow window;
    Balancekv__Cluster__V1__LinkRequest request = BALANCEKV__CLUSTER__V1__LINK_REQUEST__INIT;
    bkv_verbs_link_describe(&link->way->path.link, NULL, &end);
    bkv_verbs_window_set(&end, &window);
    request.verbs = &window;
    request.member = verbs->self;
    pthread_mutex_lock(&verbs->lock);
    link->state = BKV_LINK_ASKED;
    pthread_mutex_unlock(&verbs->lock);
    return bkv_peer_ask(link->peer, BKV_PEER_SERVICE "Link", &request.base, &balancekv__cluster__v1__link_response__descriptor,
                        bkv_now_ms() + BKV_LINK_ASK_MS, on_answer, link, err);
}

static void proceed(verbs_t *verbs, link_t *link, bkv_link_state_t state) {
    bkv_error_t error = {.status = BKV_OK};
    if (state == BKV_LINK_WANTED) {
        if (ask(verbs, link, &error) != BKV_OK) {
            conclude(verbs, link, &error);
        }
        return;
    }
    assert(state == BKV_LINK_ANSWERED);
    if (link->answer.status == BKV_OK) {
        bkv_verbs_path_connect(&link->way->path, &link->other, &link->answer);
    }
    error = link->answer;
    conclude(verbs, link, &error);
}

// ---- the thread ----

static void free_unused(bkv_way_t *way) {
    while (way != NULL) {
        bkv_way_t *next = way->next;
        bkv_verbs_path_deinit(&way->path);
        free(way);
        way = next;
    }
}

// Waits for something to do, or for the next tick. [lock]
static void wait_for_work(verbs_t *verbs) {
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += BKV_LINK_TICK_MS * 1000000L;
    until.tv_sec += until.tv_nsec / 1000000000L;
    until.tv_nsec %= 1000000000L;
    while (!verbs->ending && verbs->todo == NULL && verbs->unused == NULL &&
           pthread_cond_timedwait(&verbs->changed, &verbs->lock, &until) == 0) {
    }
}

static void *links_main(void *argument) {
    verbs_t *verbs = argument;
    pthread_mutex_lock(&verbs->lock);
    while (!verbs->ending || verbs->unused != NULL) {
        wait_for_work(verbs);
        link_t *link = verbs->todo;
        bkv_link_state_t state = link != NULL ? link->state : BKV_LINK_NONE;
        if (link != NULL) {
            verbs->todo = link->next;
            verbs->todo_end = verbs->todo != NULL ? verbs->todo_end : &verbs->todo;
        }
        bkv_way_t *unused = verbs->unused;
        verbs->unused = NULL;
        pthread_mutex_unlock(&verbs->lock);
        free_unused(unused);
        if (link != NULL) {
            proceed(verbs, link, state);
        }
        bkv_serve_tick(verbs->serve, bkv_now_ms());
        pthread_mutex_lock(&verbs->lock);
    }
    pthread_mutex_unlock(&verbs->lock);
    return NULL;
}

void bkv_links_init(verbs_t *verbs) {
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&verbs->changed, &attr);
    pthread_condattr_destroy(&attr);
    verbs->todo_end = &verbs->todo;
}

bkv_status_t bkv_links_start(verbs_t *verbs, bkv_error_t *err) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int cause = pthread_create(&verbs->thread, NULL, links_main, verbs);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (cause != 0) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "cluster: no thread for RDMA links: %s", strerror(cause));
    }
    pthread_setname_np(verbs->thread, "bkv-peer-links");
    verbs->running = true;
    return BKV_OK;
}

void bkv_links_stop(verbs_t *verbs) {
    if (!verbs->running) {
        return;
    }
    pthread_mutex_lock(&verbs->lock);
    verbs->ending = true;
    pthread_cond_signal(&verbs->changed);
    pthread_mutex_unlock(&verbs->lock);
    pthread_join(verbs->thread, NULL);
}
