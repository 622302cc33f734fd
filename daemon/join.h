// join.h - from the [cluster] options to a cluster: names, addresses, certificates, weight.
#ifndef BKV_JOIN_H
#define BKV_JOIN_H

#include "daemon/cluster/cluster.h"
#include "daemon/config.h"
#include "daemon/transport/transport.h"

// Creates the cluster that the configuration names; *cluster is NULL where it names none. Nothing is registered yet, but
// the other members are known on return, unless etcd cannot be reached.
// INVALID_ARGUMENT names the option.
bkv_status_t bkv_join_create(const bkv_config_t *config, bkv_store_t *store, bkv_cluster_t **cluster, bkv_error_t *err);

// Registers this daemon, which serves by now; port: what listen.tcp got.
bkv_status_t bkv_join_announce(const bkv_config_t *config, bkv_cluster_t *cluster, const bkv_transports_t *transports, int port,
                               bkv_error_t *err);

#endif
