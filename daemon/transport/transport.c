// transport.c - which transports this machine has: opening and closing them, offering them, counting what they do. Sessions are
// session.c's, what moves is transfer.c's.
#include "daemon/transport/session.h"

#include "daemon/observe/log.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const bkv_transport_ops_t *const table[BKV_TRANSPORT_KINDS] = {
    [BKV_TRANSPORT_SHM] = &bkv_transport_shm,
    [BKV_TRANSPORT_CUDA_IPC] = &bkv_transport_cuda_ipc,
    [BKV_TRANSPORT_VERBS] = &bkv_transport_verbs,
};

// As bkv_transports_offer names them: a worker's GPU first, then its host's memory, then the network.
static const bkv_transport_kind_t preference[] = {BKV_TRANSPORT_CUDA_IPC, BKV_TRANSPORT_SHM, BKV_TRANSPORT_VERBS};

// ---- open and close ----

static bool has_socket(const bkv_transports_config_t *config) {
    return config->socket_path != NULL && config->socket_path[0] != '\0';
}

static bkv_status_t open_one(bkv_transports_t *transports, bkv_transport_t *transport, bkv_error_t *err) {
    bkv_error_t cause;
    bkv_status_t status;
    if (transport->ops == NULL) {
        status = bkv_fail(&cause, BKV_UNIMPLEMENTED, "not in this build");
    } else if (transport->ops->local && !has_socket(&transports->config)) {
        status = bkv_fail(&cause, BKV_UNIMPLEMENTED, "this daemon has no unix socket (listen.socket)");
    } else {
        status = transport->ops->open(transports, &transport->self, &cause);
    }
    transport->open = status == BKV_OK;
    if (status == BKV_OK) {
        return BKV_OK;
    }
    if (status != BKV_UNIMPLEMENTED) {
        return bkv_fail(err, status, "%s", cause.message);
    }
    snprintf(transport->reason, sizeof(transport->reason), "%.*s", (int)sizeof(transport->reason) - 1, cause.message);
    bkv_log(BKV_LOG_DEBUG, 0, "transport %s: none: %s", transport->ops != NULL ? transport->ops->name : "?", cause.message);
    return BKV_OK;
}

// A daemon that shares nothing with local clients needs no fd socket.
static bkv_status_t open_fd_socket(bkv_transports_t *transports, bkv_error_t *err) {
    for (size_t kind = 0; kind < BKV_TRANSPORT_KINDS; kind++) {
        if (transports->kinds[kind].open && transports->kinds[kind].ops->local) {
            return bkv_fd_socket_create(transports, &transports->fd_socket, err);
        }
    }
    return BKV_OK;
}

bkv_status_t bkv_transports_create(const bkv_transports_config_t *config, bkv_transports_t **transports_out, bkv_error_t *err) {
    assert(config->pipeline != NULL && config->store != NULL && config->now_ms != NULL && config->max_sessions > 0);
    bkv_transports_t *transports = calloc(1, sizeof(*transports));
    if (transports == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for the transports");
    }
    transports->config = *config;
    bkv_status_t status = bkv_sessions_init(transports, err);
    if (status != BKV_OK) {
        free(transports);
        return status;
    }
    for (size_t kind = 0; kind < BKV_TRANSPORT_KINDS && status == BKV_OK; kind++) {
        transports->kinds[kind].ops = table[kind];
        status = open_one(transports, &transports->kinds[kind], err);
    }
    if (status == BKV_OK) {
        status = open_fd_socket(transports, err);
    }
    if (status != BKV_OK) {
        bkv_transports_destroy(transports);
        return status;
    }
    *transports_out = transports;
    return BKV_OK;
}

void bkv_transports_destroy(bkv_transports_t *transports) {
    if (transports == NULL) {
        return;
    }
    bkv_fd_socket_destroy(transports->fd_socket);
    bkv_sessions_end_all(transports);
    for (size_t kind = 0; kind < BKV_TRANSPORT_KINDS; kind++) {
        if (transports->kinds[kind].open) {
            transports->kinds[kind].ops->close(transports->kinds[kind].self);
        }
    }
    bkv_sessions_deinit(transports);
    free(transports);
}

// ---- what there is ----

const bkv_transports_config_t *bkv_transports_config_of(const bkv_transports_t *transports) {
    return &transports->config;
}

size_t bkv_transports_offer(const bkv_transports_t *transports, bool local, const char **names) {
    size_t count = 0;
    for (size_t i = 0; i < sizeof(preference) / sizeof(preference[0]); i++) {
        const bkv_transport_t *transport = &transports->kinds[preference[i]];
        bool here = transport->open && (transport->ops->alive == NULL || transport->ops->alive(transport->self, NULL));
        if (here && (local || !transport->ops->local)) {
            names[count++] = transport->ops->name;
        }
    }
    names[count++] = "inline";
    return count;
}

void bkv_transports_count_window(bkv_transports_t *transports, int64_t bytes) {
    bkv_transport_count(&transports->counters.shm_window_bytes, (uint64_t)bytes); // a negative one wraps around to less
}

void bkv_transports_metrics(bkv_transports_t *transports, bkv_transport_metrics_t *metrics) {
#define X(name, is_counter, help) metrics->name = atomic_load_explicit(&transports->counters.name, memory_order_relaxed);
    BKV_TRANSPORT_METRICS(X)
#undef X
    pthread_mutex_lock(&transports->lock);
    metrics->sessions = transports->count;
    pthread_mutex_unlock(&transports->lock);
}
