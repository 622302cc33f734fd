// internal.h - what the cluster's own files share; nobody else includes it.
#ifndef BKV_CLUSTER_INTERNAL_H
#define BKV_CLUSTER_INTERNAL_H

#include "daemon/cluster/alarm.h"
#include "daemon/cluster/cluster.h"
#include "daemon/cluster/giving.h"
#include "daemon/cluster/hot.h"

#include <pthread.h>
#include <stdatomic.h>

typedef struct bkv_cluster_counters {
#define X(name, is_counter, help) _Atomic uint64_t name;
    BKV_CLUSTER_METRICS(X)
#undef X
} bkv_cluster_counters_t;

struct bkv_cluster {
    bkv_store_t *store;
    bkv_etcd_t *etcd;
    bkv_membership_t *membership;
    bkv_peers_t *peers;
    bkv_alarms_t *alarms;
    bkv_giving_t giving;
    bkv_mover_t *mover;   // [lock] for the membership's callback, which may come before there is one; requests find it there
    bool ending;          // [lock]
    pthread_mutex_t lock; // a leaf but for those of the mover and the peers
    bkv_hot_t hot;
    bkv_cluster_counters_t counters;
    uint32_t peer_timeout_ms;
    _Atomic uint64_t busy; // requests under way, which destroy waits for
    char *name;
    char id[BKV_MEMBER_NAME_MAX];
};

// Around each request: from its start to the return of its `done`.
void bkv_cluster_hold(bkv_cluster_t *cluster);
void bkv_cluster_release(bkv_cluster_t *cluster);

static inline void bkv_cluster_count(_Atomic uint64_t *counter, uint64_t by) {
    atomic_fetch_add_explicit(counter, by, memory_order_relaxed);
}

#endif
