// join.c - reads what [cluster] says. What the values must be is config_check.c's, what is done with them cluster/'s.
#include "daemon/join.h"

#include "daemon/config_check.h"
#include "daemon/observe/log.h"

#include <errno.h>
#include <openssl/crypto.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define WEIGHT_BYTES ((uint64_t)64 << 20) // of the arena, for each of weight
#define PASSWORD_MAX 256
#define AWAIT_MS     2000 // for etcd to say who is there; without it this daemon begins alone

static bool set(const char *text) {
    return text[0] != '\0';
}

// ---- etcd ----

// Cuts a list of endpoints up where it is. INVALID_ARGUMENT: none, or too many.
static bkv_status_t split_endpoints(char *list, const char *endpoints[BKV_ETCD_ENDPOINTS_MAX], size_t *count,
                                    bkv_error_t *err) {
    char *rest = list, *one;
    *count = 0;
    while ((one = strsep(&rest, ", \t")) != NULL) {
        if (!set(one)) {
            continue;
        }
        if (*count == BKV_ETCD_ENDPOINTS_MAX) {
            return bkv_fail(err, BKV_INVALID_ARGUMENT, "cluster.etcd: more than %d endpoints", BKV_ETCD_ENDPOINTS_MAX);
        }
        endpoints[(*count)++] = one;
    }
    return *count > 0 ? BKV_OK : bkv_fail(err, BKV_INVALID_ARGUMENT, "cluster.etcd: no endpoint in it");
}

// The first line of a file.
static bkv_status_t read_password(const char *path, char password[PASSWORD_MAX], bkv_error_t *err) {
    FILE *file = fopen(path, "re");
    if (file == NULL) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "cluster.etcd_password_file: %s: %s", path, strerror(errno));
    }
    bool read = fgets(password, PASSWORD_MAX, file) != NULL;
    fclose(file);
    if (read) {
        password[strcspn(password, "\r\n")] = '\0';
    }
    if (!read || !set(password) || strlen(password) == PASSWORD_MAX - 1) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "cluster.etcd_password_file: %s: no password of at most %d bytes in it",
                        path, PASSWORD_MAX - 2);
    }
    return BKV_OK;
}

// ---- this daemon ----

static bkv_status_t get_self(const bkv_config_t *config, bkv_member_t *self, bkv_error_t *err) {
    char host[BKV_MEMBER_NAME_MAX] = {0};
    const char *id = config->cluster_node;
    if (!set(id)) {
        gethostname(host, sizeof(host) - 1); // a longer one is cut, and still a name
        id = host;
    }
    if (!bkv_member_id_valid(id)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "cluster.node: \"%.80s\" is not 1 to %d letters, digits, '.', '_' or '-'",
                        id, BKV_MEMBER_NAME_MAX - 1);
    }
    uint64_t weight = config->memory_arena / WEIGHT_BYTES;
    weight = config->cluster_weight != 0 ? config->cluster_weight : weight;
    weight = weight < 1 ? 1 : weight > BKV_WEIGHT_MAX ? BKV_WEIGHT_MAX : weight;
    *self = (bkv_member_t){.capacity_bytes = config->memory_arena};
    self->place.weight = config->cluster_owns ? (uint32_t)weight : 0;
    snprintf(self->place.id, sizeof(self->place.id), "%s", id);
    snprintf(self->place.domain, sizeof(self->place.domain), "%s", config->cluster_domain);
    snprintf(self->version, sizeof(self->version), "%s", BKV_VERSION);
    return BKV_OK;
}

static bkv_peers_config_t get_peers(const bkv_config_t *config, bkv_store_t *store) {
    bool tls = set(config->listen_tls_cert);
    const char *ca = set(config->cluster_peer_ca) ? config->cluster_peer_ca : config->listen_tls_client_ca;
    return (bkv_peers_config_t){
        .store = store,
        .tls_ca = tls ? ca : NULL,
        .tls_cert = config->listen_tls_cert,
        .tls_key = config->listen_tls_key,
        .tls_name = config->cluster_peer_name,
        .timeout_ms = (uint32_t)config->cluster_peer_timeout,
        .max_batch = BKV_PEER_BATCH,
        .verbs_device = config->transport_verbs,
        .verbs_port = config->transport_verbs_port,
        .verbs_gid = bkv_config_verbs_gid(config),
    };
}

// ---- create ----

// The cluster's rooms name options without the section, etcd's among them without "etcd_".
static void name_option(bkv_error_t *err) {
    static const char *const names[][2] = {
        {"endpoints: ", "cluster.etcd: "},
        {"tls_ca: ", "cluster.etcd_ca: "},
        {"tls_cert: ", "cluster.etcd_cert: "},
        {"tls_key: ", "cluster.etcd_key: "},
        {"user", "cluster.etcd_user"},
        {"password: ", "cluster.etcd_password_file: "},
        {"cluster: ", "cluster.cluster_name: "},
        {"domain: ", "cluster.domain: "},
        {"id: ", "cluster.node: "},
    };
    for (size_t i = 0; err->status == BKV_INVALID_ARGUMENT && i < sizeof(names) / sizeof(names[0]); i++) {
        size_t length = strlen(names[i][0]);
        if (strncmp(err->message, names[i][0], length) == 0) {
            const bkv_error_t cause = *err;
            bkv_fail(err, cause.status, "%s%s", names[i][1], cause.message + length);
            return;
        }
    }
}

static bkv_status_t create(const bkv_config_t *config, bkv_store_t *store, char *list, const char *password,
                           bkv_cluster_t **cluster, bkv_error_t *err) {
    const char *endpoints[BKV_ETCD_ENDPOINTS_MAX];
    bkv_cluster_options_t options = {
        .etcd =
            {
                .endpoints = endpoints,
                .tls_ca = config->cluster_etcd_ca,
                .tls_cert = config->cluster_etcd_cert,
                .tls_key = config->cluster_etcd_key,
                .tls_name = config->cluster_etcd_name,
                .user = config->cluster_etcd_user,
                .password = password,
            },
        .name = config->cluster_cluster_name,
        .replicas = config->cluster_replicas,
        .lease_s = (uint32_t)((config->cluster_lease + 999) / 1000),
        .peers = get_peers(config, store),
        .repair_delay_ms = config->cluster_repair_delay,
        .repair_rate = config->cluster_repair_rate,
        .hot_copies = config->cluster_hot_copies,
    };
    bkv_status_t status = split_endpoints(list, endpoints, &options.etcd.endpoint_count, err);
    if (status == BKV_OK) {
        status = get_self(config, &options.self, err);
    }
    if (status == BKV_OK) {
        status = bkv_cluster_create(&options, cluster, err);
        if (status != BKV_OK && err != NULL) {
            name_option(err);
        }
    }
    return status;
}

bkv_status_t bkv_join_create(const bkv_config_t *config, bkv_store_t *store, bkv_cluster_t **cluster, bkv_error_t *err) {
    *cluster = NULL;
    if (!set(config->cluster_etcd)) {
        return BKV_OK;
    }
    char password[PASSWORD_MAX] = {0};
    bkv_status_t status =
        set(config->cluster_etcd_password_file) ? read_password(config->cluster_etcd_password_file, password, err) : BKV_OK;
    if (status != BKV_OK) {
        return status;
    }
    char *list = strdup(config->cluster_etcd);
    status = list != NULL ? create(config, store, list, password, cluster, err)
                          : bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "cluster: no memory");
    OPENSSL_cleanse(password, sizeof(password));
    free(list);
    // Whoever asked a daemon that knows nobody yet would be told that what others have is nowhere.
    if (status == BKV_OK && !bkv_cluster_await(*cluster, AWAIT_MS)) {
        bkv_log(BKV_LOG_WARN, 0, "cluster: etcd has not said within %d ms who is there; serving what is here until then",
                AWAIT_MS);
    }
    return status;
}

// ---- announce ----

bkv_status_t bkv_join_announce(const bkv_config_t *config, bkv_cluster_t *cluster, const bkv_transports_t *transports, int port,
                               bkv_error_t *err) {
    char address[BKV_MEMBER_ADDRESS_MAX];
    const char *names[BKV_TRANSPORT_KINDS + 1];
    size_t count = bkv_transports_offer(transports, false, names);
    int length = set(config->cluster_advertise)
                     ? snprintf(address, sizeof(address), "%s", config->cluster_advertise)
                     : snprintf(address, sizeof(address), "%.*s:%d",
                                (int)(strrchr(config->listen_tcp, ':') - config->listen_tcp), config->listen_tcp, port);
    if (length < 0 || (size_t)length >= sizeof(address)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "cluster.advertise: longer than %zu bytes", sizeof(address) - 1);
    }
    bkv_log(BKV_LOG_INFO, 0, "cluster: joining %s, reached at %s", config->cluster_cluster_name, address);
    if (strncmp(address, "127.", 4) == 0 || strncmp(address, "[::1]:", 6) == 0 || strncmp(address, "localhost:", 10) == 0) {
        bkv_log(BKV_LOG_WARN, 0, "cluster: daemons of other hosts cannot reach %s: set listen.tcp or cluster.advertise",
                address);
    }
    return bkv_cluster_join(cluster, address, names, count, err);
}
