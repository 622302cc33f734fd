// cluster.c - puts the cluster's parts together, joins and leaves, and says what is known. What is asked of the pool is in
// lookup.c, fetch.c, place.c, forget.c and where.c.
#include "daemon/cluster/internal.h"

#include <assert.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

#define COLLECTED_PEERS 64

void bkv_cluster_hold(bkv_cluster_t *cluster) {
    atomic_fetch_add(&cluster->busy, 1);
}

void bkv_cluster_release(bkv_cluster_t *cluster) {
    atomic_fetch_sub(&cluster->busy, 1);
}

// ---- create ----

// On the membership's thread. Peers that repair still starts from are kept too.
static void on_change(void *user, const bkv_view_t *was, const bkv_view_t *now) {
    (void)was;
    bkv_cluster_t *cluster = user;
    pthread_mutex_lock(&cluster->lock);
    if (!cluster->ending) {
        const bkv_view_t *origin = NULL;
        if (cluster->mover != NULL) {
            bkv_mover_view_changed(cluster->mover);
            origin = bkv_mover_origin(cluster->mover);
        }
        bkv_peers_keep(cluster->peers, now, origin);
        if (origin != NULL) {
            bkv_view_give(origin);
        }
    }
    pthread_mutex_unlock(&cluster->lock);
}

static bkv_status_t start_membership(bkv_cluster_t *cluster, const bkv_cluster_options_t *options, bkv_error_t *err) {
    const bkv_membership_config_t config = {
        .etcd = cluster->etcd,
        .cluster = options->name,
        .self = options->self,
        .ttl_s = options->lease_s,
        .replicas = options->replicas,
        .later = true,
        .on_change = on_change,
        .user = cluster,
    };
    return bkv_membership_create(&config, &cluster->membership, err);
}

static bkv_status_t start_mover(bkv_cluster_t *cluster, const bkv_cluster_options_t *options, bkv_error_t *err) {
    const bkv_mover_config_t config = {
        .store = cluster->store,
        .peers = cluster->peers,
        .membership = cluster->membership,
        .delay_ms = options->repair_delay_ms,
        .rate = options->repair_rate,
    };
    bkv_mover_t *mover;
    bkv_status_t status = bkv_mover_create(&config, &mover, err);
    if (status == BKV_OK) {
        pthread_mutex_lock(&cluster->lock);
        cluster->mover = mover;
        bkv_mover_view_changed(mover); // what came before
        pthread_mutex_unlock(&cluster->lock);
    }
    return status;
}

static bkv_status_t start(bkv_cluster_t *cluster, const bkv_cluster_options_t *options, bkv_error_t *err) {
    uint64_t secret = 0;
    if (getrandom(&secret, sizeof(secret), 0) != (ssize_t)sizeof(secret)) {
        return bkv_fail(err, BKV_INTERNAL, "getrandom gives nothing");
    }
    bkv_hot_init(&cluster->hot, options->hot_copies, secret);
    bkv_status_t status = bkv_alarms_create(&cluster->alarms, err);
    if (status == BKV_OK) {
        status = bkv_etcd_create(&options->etcd, &cluster->etcd, err);
    }
    bkv_peers_config_t peers = options->peers;
    peers.self = cluster->id;
    if (status == BKV_OK) {
        status = bkv_peers_create(&peers, &cluster->peers, err);
    }
    if (status == BKV_OK) {
        status = start_membership(cluster, options, err);
    }
    return status == BKV_OK ? start_mover(cluster, options, err) : status;
}

bkv_status_t bkv_cluster_create(const bkv_cluster_options_t *options, bkv_cluster_t **cluster_out, bkv_error_t *err) {
    bkv_cluster_t *cluster = calloc(1, sizeof(*cluster));
    char *name = strdup(options->name);
    if (cluster == NULL || name == NULL) {
        free(cluster);
        free(name);
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "cluster: no memory");
    }
    cluster->store = options->peers.store;
    cluster->name = name;
    cluster->peer_timeout_ms = options->peers.timeout_ms;
    memcpy(cluster->id, options->self.place.id, sizeof(cluster->id));
    pthread_mutex_init(&cluster->lock, NULL);
    bkv_giving_init(&cluster->giving, cluster->peer_timeout_ms);
    bkv_status_t status = start(cluster, options, err);
    if (status != BKV_OK) {
        bkv_cluster_destroy(cluster);
        return status;
    }
    *cluster_out = cluster;
    return BKV_OK;
}

bool bkv_cluster_await(bkv_cluster_t *cluster, uint32_t timeout_ms) {
    return bkv_membership_await(cluster->membership, timeout_ms);
}

bkv_status_t bkv_cluster_join(bkv_cluster_t *cluster, const char *address, const char *const *transports, size_t count,
                              bkv_error_t *err) {
    bkv_member_t self = {.address_count = 1};
    if (strlen(address) >= sizeof(self.addresses[0])) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "cluster.advertise: longer than %zu bytes", sizeof(self.addresses[0]) - 1);
    }
    memcpy(self.addresses[0], address, strlen(address));
    for (size_t i = 0; i < count && i < BKV_MEMBER_TRANSPORTS_MAX; i++) {
        assert(strlen(transports[i]) < sizeof(self.transports[0]));
        memcpy(self.transports[self.transport_count++], transports[i], strlen(transports[i]));
    }
    return bkv_membership_announce(cluster->membership, &self, err);
}

void bkv_cluster_leave(bkv_cluster_t *cluster, uint32_t timeout_ms) {
    bkv_membership_leave(cluster->membership, timeout_ms, NULL); // what etcd does not hear of, it learns from the lease
}

// ---- the end ----

// The end of the peers is the end of every request; then all views are back, which the membership asks for, and nobody has
// anything to tell the mover any more.
void bkv_cluster_destroy(bkv_cluster_t *cluster) {
    if (cluster == NULL) {
        return;
    }
    pthread_mutex_lock(&cluster->lock);
    cluster->ending = true;
    pthread_mutex_unlock(&cluster->lock);
    bkv_mover_stop(cluster->mover);
    bkv_peers_destroy(cluster->peers);
    while (atomic_load(&cluster->busy) != 0) { // a callback that is just returning
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
    bkv_mover_destroy(cluster->mover);
    bkv_alarms_destroy(cluster->alarms);
    bkv_membership_destroy(cluster->membership);
    bkv_etcd_destroy(cluster->etcd);
    bkv_giving_deinit(&cluster->giving);
    pthread_mutex_destroy(&cluster->lock);
    free(cluster->name);
    free(cluster);
}

void bkv_cluster_set_limits(bkv_cluster_t *cluster, uint64_t repair_delay_ms, uint64_t repair_rate, uint32_t hot_copies) {
    bkv_mover_set_limits(cluster->mover, repair_delay_ms, repair_rate);
    bkv_hot_set_wanted(&cluster->hot, hot_copies);
}

// ---- what is known ----

bkv_serve_t *bkv_cluster_serve(const bkv_cluster_t *cluster) {
    return bkv_peers_serve(cluster->peers);
}

bool bkv_cluster_connected(bkv_cluster_t *cluster) {
    bkv_membership_status_t status;
    bkv_membership_get_status(cluster->membership, &status);
    return status.state == BKV_MEMBERSHIP_MEMBER;
}

// X(name, is_counter, help, field of bkv_peer_health_t)
#define PEER_METRICS(X)                                                                                                        \
    X(peer_latency_us, false, "how long this member takes to answer a small question", latency_us)                             \
    X(peer_suspected, false, "1: this member did not answer lately", suspected)                                                \
    X(peer_failures_total, true, "questions that this member did not answer in time, or not at all", failures)                 \
    X(peer_fetched_bytes_by_member_total, true, "bytes of records read from this member", fetched_bytes)                       \
    X(peer_stored_bytes_by_member_total, true, "bytes of records sent to this member", stored_bytes)

static void collect_peer(const char *id, const bkv_peer_health_t *health, bkv_metric_emit_t emit, void *sink) {
    char text[sizeof("cluster_peer_fetched_bytes_by_member_total{member=\"\"}") + BKV_MEMBER_NAME_MAX];
#define X(name, is_counter, help, field)                                                                                       \
    snprintf(text, sizeof(text), "cluster_" #name "{member=\"%s\"}", id);                                                      \
    emit(sink, text, help, is_counter, (double)health->field);
    PEER_METRICS(X)
#undef X
}

// A few figures of each other member; of a large cluster only of the first ones, as a reader has room for so many.
static void collect_peers(bkv_cluster_t *cluster, bkv_metric_emit_t emit, void *sink) {
    const bkv_view_t *view = bkv_membership_view(cluster->membership);
    for (uint32_t i = 0; i < view->count && i < COLLECTED_PEERS; i++) {
        bkv_peer_t *peer = i != view->self ? bkv_peers_get(cluster->peers, &view->members[i]) : NULL;
        if (peer != NULL) {
            bkv_peer_health_t health;
            bkv_peer_get_health(peer, &health);
            collect_peer(view->members[i].place.id, &health, emit, sink);
            bkv_peer_release(peer);
        }
    }
    bkv_view_give(view);
}

void bkv_cluster_collect(void *owner, bkv_metric_emit_t emit, void *sink) {
    bkv_cluster_t *cluster = owner;
    bkv_membership_metrics_t members;
    bkv_mover_metrics_t mover;
    bkv_peers_metrics_t peers;
    bkv_membership_get_metrics(cluster->membership, &members);
    bkv_mover_get_metrics(cluster->mover, &mover);
    bkv_peers_metrics(cluster->peers, &peers);
#define X(name, is_counter, help) emit(sink, "cluster_" #name, help, is_counter, (double)members.name);
    BKV_MEMBERSHIP_METRICS(X)
#undef X
#define X(name, is_counter, help) emit(sink, "cluster_" #name, help, is_counter, (double)mover.name);
    BKV_MOVER_METRICS(X)
#undef X
#define X(name, is_counter, help) emit(sink, "cluster_" #name, help, is_counter, (double)peers.name);
    BKV_PEERS_METRICS(X)
#undef X
#define X(name, is_counter, help) emit(sink, "cluster_" #name, help, is_counter, (double)atomic_load(&cluster->counters.name));
    BKV_CLUSTER_METRICS(X)
#undef X
    collect_peers(cluster, emit, sink);
}

static void report_health(bkv_cluster_t *cluster, bkv_cluster_report_t *report) {
    for (uint32_t i = 0; i < report->count; i++) {
        if (strcmp(report->members[i].place.id, cluster->id) == 0) {
            continue;
        }
        bkv_peer_t *peer = bkv_peers_get(cluster->peers, &report->members[i]);
        if (peer != NULL) {
            bkv_peer_get_health(peer, &report->health[i]);
            bkv_peer_release(peer);
        }
    }
}

bkv_status_t bkv_cluster_get_report(bkv_cluster_t *cluster, bkv_cluster_report_t *report, bkv_error_t *err) {
    const bkv_view_t *view = bkv_membership_view(cluster->membership);
    bkv_mover_metrics_t mover;
    bkv_mover_get_metrics(cluster->mover, &mover);
    *report = (bkv_cluster_report_t){
        .name = cluster->name,
        .repaired_bytes = mover.repair_sent_bytes_total,
        .view = view->version,
        .revision = view->revision,
        .seed = view->seed,
        .replicas = bkv_placement_replicas(view->placement),
        .count = view->count,
        .members = calloc(view->count + 1, sizeof(report->members[0])), // one more: nothing is NULL
        .health = calloc(view->count + 1, sizeof(report->health[0])),
    };
    if (report->members != NULL && view->count > 0) {
        memcpy(report->members, view->members, view->count * sizeof(report->members[0]));
    }
    bkv_view_give(view);
    if (report->members == NULL || report->health == NULL) {
        bkv_cluster_report_free(report);
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "cluster: no memory for a report");
    }
    memcpy(report->self, cluster->id, sizeof(report->self));
    bkv_membership_get_status(cluster->membership, &report->membership);
    bkv_mover_get_progress(cluster->mover, &report->mover);
    report_health(cluster, report);
    return BKV_OK;
}

void bkv_cluster_report_free(bkv_cluster_report_t *report) {
    free(report->members);
    free(report->health);
    *report = (bkv_cluster_report_t){0};
}

// ---- drain ----

void bkv_cluster_drain_self(bkv_cluster_t *cluster, bkv_drain_order_t order, bkv_drain_progress_t *progress) {
    if (order != BKV_DRAIN_ASK) {
        bkv_membership_set_draining(cluster->membership, order == BKV_DRAIN_BEGIN);
    }
    const bkv_view_t *view = bkv_membership_view(cluster->membership);
    bool draining = view->self != BKV_NO_MEMBER && view->members[view->self].place.draining;
    bkv_mover_progress_t mover;
    bkv_mover_get_progress(cluster->mover, &mover);
    bool of_this = mover.view == view->version; // and not of a drain before, that was undone in between
    bkv_view_give(view);
    *progress = (bkv_drain_progress_t){
        .draining = order == BKV_DRAIN_ASK ? draining : order == BKV_DRAIN_BEGIN,
        .done = draining && mover.handed_over && of_this && order != BKV_DRAIN_UNDO,
        .left_keys = mover.left_keys,
        .left_bytes = mover.left_bytes,
        .moved_keys = mover.moved_keys,
        .moved_bytes = mover.moved_bytes,
        .settled = mover.settled,
    };
}

typedef struct drain {
    bkv_cluster_t *cluster;
    bkv_peer_drain_t done;
    void *user;
} drain_t;

static void on_drain(void *user, const bkv_error_t *error, const bkv_drain_progress_t *progress) {
    drain_t *drain = user;
    drain->done(drain->user, error, progress);
    bkv_cluster_release(drain->cluster);
    free(drain);
}

// The member's peer; NULL: err says why not.
static bkv_peer_t *find_peer(bkv_cluster_t *cluster, const char *member, bkv_error_t *err) {
    const bkv_view_t *view = bkv_membership_view(cluster->membership);
    uint16_t found = bkv_placement_find(view->placement, member);
    bkv_peer_t *peer = found != BKV_NO_MEMBER ? bkv_peers_get(cluster->peers, &view->members[found]) : NULL;
    if (found == BKV_NO_MEMBER) {
        bkv_fail(err, BKV_NOT_FOUND, "member: there is no %.64s among the %" PRIu32 " members", member, view->count);
    } else if (peer == NULL) {
        bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "member: no memory to ask %.64s", member);
    }
    bkv_view_give(view);
    return peer;
}

static void pass_on(bkv_cluster_t *cluster, bkv_peer_t *peer, bkv_drain_order_t order, uint64_t deadline_ms,
                    bkv_peer_drain_t done, void *user) {
    bkv_error_t error;
    drain_t *drain = malloc(sizeof(*drain));
    if (drain == NULL) {
        bkv_fail(&error, BKV_RESOURCE_EXHAUSTED, "member: no memory to ask it");
        done(user, &error, NULL);
        return;
    }
    *drain = (drain_t){.cluster = cluster, .done = done, .user = user};
    bkv_cluster_hold(cluster);
    if (bkv_peer_drain(peer, order, deadline_ms, on_drain, drain, &error) != BKV_OK) {
        on_drain(drain, &error, NULL);
    }
}

void bkv_cluster_drain(bkv_cluster_t *cluster, const char *member, bkv_drain_order_t order, uint64_t deadline_ms,
                       bkv_peer_drain_t done, void *user) {
    bkv_error_t error = {.status = BKV_OK};
    if (member[0] == '\0' || strcmp(member, cluster->id) == 0) {
        bkv_drain_progress_t progress;
        bkv_cluster_drain_self(cluster, order, &progress);
        done(user, &error, &progress);
        return;
    }
    bkv_peer_t *peer = find_peer(cluster, member, &error);
    if (peer == NULL) {
        done(user, &error, NULL);
        return;
    }
    pass_on(cluster, peer, order, deadline_ms, done, user);
    bkv_peer_release(peer);
}
