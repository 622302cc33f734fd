// peers.c - all other members: which are known, what is under way with them, the end.
#include "daemon/cluster/peer/internal.h"

#include "daemon/cluster/peer/verbs.h"
#include "daemon/observe/clock.h"
#include "proto/pem.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#define PROBE_STEP 64 // peers that are asked at one look

// gRPC is started once and never stopped: grpc_shutdown may block for 10 s, and its threads end with the process anyway.
static pthread_once_t grpc_started = PTHREAD_ONCE_INIT;

gpr_timespec bkv_peers_timespec(uint64_t ms) {
    if (ms == UINT64_MAX) {
        return gpr_inf_future(GPR_CLOCK_MONOTONIC);
    }
    return (gpr_timespec){
        .tv_sec = (int64_t)(ms / 1000), .tv_nsec = (int32_t)(ms % 1000) * 1000000, .clock_type = GPR_CLOCK_MONOTONIC};
}

// ---- what is under way ----

bool bkv_peers_enter(bkv_peers_t *peers) {
    pthread_mutex_lock(&peers->lock);
    bool open = !atomic_load(&peers->closing);
    peers->live += open;
    pthread_mutex_unlock(&peers->lock);
    return open;
}

void bkv_peers_hold(bkv_peers_t *peers) {
    pthread_mutex_lock(&peers->lock);
    peers->live++;
    pthread_mutex_unlock(&peers->lock);
}

void bkv_peers_leave(bkv_peers_t *peers) {
    pthread_mutex_lock(&peers->lock);
    if (--peers->live == 0) {
        pthread_cond_broadcast(&peers->idle);
    }
    pthread_mutex_unlock(&peers->lock);
}

// ---- the table ----

static bkv_peer_t **bucket_of(bkv_peers_t *peers, const char *id, uint64_t epoch) {
    uint64_t hash = 0xcbf29ce484222325u ^ epoch; // FNV-1a (Fowler, Noll, Vo)
    for (; *id != '\0'; id++) {
        hash = (hash ^ (unsigned char)*id) * 0x100000001b3u;
    }
    return &peers->buckets[(hash ^ hash >> 32) % BKV_PEER_BUCKETS];
}

// A reference; NULL: not there. The lock is held.
static bkv_peer_t *find(bkv_peers_t *peers, const bkv_placement_member_t *place) {
    bkv_peer_t *peer = *bucket_of(peers, place->id, place->epoch);
    while (peer != NULL && (peer->epoch != place->epoch || strcmp(peer->id, place->id) != 0)) {
        peer = peer->next;
    }
    return peer != NULL ? bkv_peer_hold(peer) : NULL;
}

static bkv_peer_t *look_up(bkv_peers_t *peers, const bkv_placement_member_t *place, bool *closing) {
    pthread_mutex_lock(&peers->lock);
    bkv_peer_t *peer = find(peers, place);
    *closing = atomic_load(&peers->closing);
    pthread_mutex_unlock(&peers->lock);
    return peer;
}

// Puts a new peer into the table, unless another thread was faster. Returns the one that is there, referenced; NULL: the end has
// begun.
static bkv_peer_t *add(bkv_peers_t *peers, bkv_peer_t *made, const bkv_placement_member_t *place) {
    pthread_mutex_lock(&peers->lock);
    bkv_peer_t *peer = find(peers, place);
    if (peer == NULL && !atomic_load(&peers->closing)) {
        bkv_peer_t **bucket = bucket_of(peers, place->id, place->epoch);
        made->next = *bucket;
        *bucket = made;
        peer = bkv_peer_hold(made);
        atomic_fetch_add(&peers->counters.peers, 1);
        made = NULL;
    }
    pthread_mutex_unlock(&peers->lock);
    bkv_peer_release(made);
    return peer;
}

// The channel is made without the lock, as gRPC's work is never under one.
bkv_peer_t *bkv_peers_get(bkv_peers_t *peers, const bkv_member_t *member) {
    bool closing;
    bkv_peer_t *peer = look_up(peers, &member->place, &closing);
    if (peer != NULL || closing) {
        return peer;
    }
    peer = bkv_peer_new(peers, member);
    return peer != NULL ? add(peers, peer, &member->place) : NULL;
}

static bool has(const bkv_view_t *view, const bkv_peer_t *peer) {
    if (view == NULL) {
        return false;
    }
    uint16_t at = bkv_placement_find(view->placement, peer->id);
    return at != BKV_NO_MEMBER && view->members[at].place.epoch == peer->epoch;
}

// Takes out of the table those that are in neither view, as a list.
static bkv_peer_t *take_out(bkv_peers_t *peers, const bkv_view_t *view, const bkv_view_t *other) {
    bkv_peer_t *gone = NULL;
    pthread_mutex_lock(&peers->lock);
    for (uint32_t i = 0; i < BKV_PEER_BUCKETS; i++) {
        bkv_peer_t **at = &peers->buckets[i];
        while (*at != NULL) {
            bkv_peer_t *peer = *at;
            if (has(view, peer) || has(other, peer)) {
                at = &peer->next;
            } else {
                *at = peer->next;
                peer->next = gone;
                gone = peer;
                atomic_fetch_sub(&peers->counters.peers, 1);
            }
        }
    }
    pthread_mutex_unlock(&peers->lock);
    return gone;
}

static void close_all(bkv_peers_t *peers, bkv_peer_t *gone) {
    while (gone != NULL) {
        bkv_peer_t *peer = gone;
        gone = peer->next;
        atomic_store(&peer->closed, true);
        bkv_peer_calls_cancel(peers, peer);
        bkv_peer_release(peer);
    }
}

void bkv_peers_keep(bkv_peers_t *peers, const bkv_view_t *view, const bkv_view_t *other) {
    close_all(peers, take_out(peers, view, other));
}

// ---- probes ----

void bkv_peers_probe(bkv_peers_t *peers, uint64_t now_ms) {
    bkv_peer_t *due[PROBE_STEP];
    size_t count = 0;
    if (atomic_load(&peers->counters.peers_suspected) == 0) {
        return;
    }
    pthread_mutex_lock(&peers->lock);
    for (uint32_t i = 0; i < BKV_PEER_BUCKETS; i++) {
        for (bkv_peer_t *peer = peers->buckets[i]; peer != NULL && count < PROBE_STEP; peer = peer->next) {
            if (bkv_pulse_probe(&peer->pulse, now_ms)) {
                due[count++] = bkv_peer_hold(peer);
            }
        }
    }
    pthread_mutex_unlock(&peers->lock);
    for (size_t i = 0; i < count; i++) {
        bkv_peer_probe(due[i]);
        bkv_peer_release(due[i]);
    }
}

// ---- metrics ----

void bkv_peers_metrics(bkv_peers_t *peers, bkv_peers_metrics_t *metrics) {
#define X(name, is_counter, help) metrics->name = atomic_load_explicit(&peers->counters.name, memory_order_relaxed);
    BKV_PEERS_METRICS(X)
#undef X
}

// ---- create, destroy ----

static bool set(const char *text) {
    return text != NULL && text[0] != '\0';
}

// Members speak TLS with each other where there is a CA, and show each other the certificates that they listen with.
static bkv_status_t make_credentials(bkv_peers_t *peers, const bkv_peers_config_t *config, bkv_error_t *err) {
    if (!set(config->tls_ca)) {
        peers->credentials = grpc_insecure_credentials_create();
        return BKV_OK;
    }
    if (!set(config->tls_cert) || !set(config->tls_key)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "cluster.peer_ca: needs listen.tls_cert and listen.tls_key");
    }
    if (!set(config->tls_name)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "cluster.peer_name: missing; cluster.peer_ca needs it");
    }
    peers->tls_name = strdup(config->tls_name);
    if (peers->tls_name == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "cluster: out of memory");
    }
    const bkv_pem_files_t files = {.ca = config->tls_ca,
                                   .cert = config->tls_cert,
                                   .key = config->tls_key,
                                   .ca_option = "cluster.peer_ca",
                                   .cert_option = "listen.tls_cert",
                                   .key_option = "listen.tls_key"};
    return bkv_pem_credentials(&files, &peers->credentials, err);
}

static void peers_free(bkv_peers_t *peers) {
    bkv_peer_verbs_close(peers);
    if (peers->credentials != NULL) {
        grpc_channel_credentials_release(peers->credentials);
    }
    pthread_cond_destroy(&peers->idle);
    pthread_mutex_destroy(&peers->lock);
    free(peers->tls_name);
    free(peers);
}

bkv_status_t bkv_peers_create(const bkv_peers_config_t *config, bkv_peers_t **peers, bkv_error_t *err) {
    pthread_once(&grpc_started, grpc_init);
    assert(config->timeout_ms > 0 && config->max_batch > 0);
    bkv_peers_t *made = calloc(1, sizeof(*made));
    if (made == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "cluster: out of memory");
    }
    made->store = config->store;
    made->record_max = bkv_store_max_record(config->store);
    made->timeout_ms = config->timeout_ms;
    made->max_batch = config->max_batch;
    pthread_mutex_init(&made->lock, NULL);
    pthread_cond_init(&made->idle, NULL);
    bkv_status_t status = make_credentials(made, config, err);
    if (status == BKV_OK) {
        status = bkv_peer_verbs_open(made, config, err);
    }
    if (status == BKV_OK) {
        status = bkv_peer_lanes_start(made, err);
    }
    if (status != BKV_OK) {
        bkv_peer_lanes_end(made);
        peers_free(made);
        return status;
    }
    *peers = made;
    return BKV_OK;
}

void bkv_peers_destroy(bkv_peers_t *peers) {
    if (peers == NULL) {
        return;
    }
    pthread_mutex_lock(&peers->lock);
    atomic_store(&peers->closing, true);
    pthread_mutex_unlock(&peers->lock);
    bkv_peer_calls_cancel(peers, NULL);
    pthread_mutex_lock(&peers->lock);
    while (peers->live > 0) {
        pthread_cond_wait(&peers->idle, &peers->lock);
    }
    pthread_mutex_unlock(&peers->lock);
    bkv_peer_t *all = take_out(peers, NULL, NULL);
    for (bkv_peer_t *peer = all; peer != NULL; peer = peer->next) {
        assert(atomic_load(&peer->refs) == 1);
    }
    close_all(peers, all);
    bkv_peer_lanes_end(peers);
    peers_free(peers);
}
