// transports.c - bkv_transports: what the daemon offers, what works from here, and which of it is in use.
#include "client/client.h"

#include <assert.h>
#include <stdio.h>
#include <string.h>

#define NS_PER_MS 1000000ull

typedef struct transports_call {
    bkv_call_t call; // first
    bkv_transport_info_t *info;
} transports_call_t;

static const char *const names[BKV_TRANSPORTS] = {"shm", "cuda-ipc", "verbs", "inline"};

static const bkv_window_kind_t *const kinds[BKV_TRANSPORTS] = {&bkv_window_shm, NULL, &bkv_window_verbs, NULL};

static bkv_status_t transports_take(bkv_call_t *call, grpc_byte_buffer *message, bkv_error_t *err) {
    bkv_transport_info_t *info = ((transports_call_t *)call)->info;
    Balancekv__V1__StatsResponse *response =
        (Balancekv__V1__StatsResponse *)bkv_client_unpack(&balancekv__v1__stats_response__descriptor, message);
    if (response == NULL) {
        return bkv_fail(err, BKV_INTERNAL, "Stats: the response is not a StatsResponse");
    }
    bkv_client_saw_epoch(call->client, call, response->boot_epoch);
    for (size_t i = 0; i < BKV_TRANSPORTS; i++) {
        info[i].offered = false;
        for (size_t j = 0; j < response->n_transports; j++) {
            info[i].offered = info[i].offered || strcmp(response->transports[j], names[i]) == 0;
        }
    }
    balancekv__v1__stats_response__free_unpacked(response, NULL);
    return BKV_OK;
}

static const bkv_call_kind_t transports_kind = {
    .method = BKV_CLIENT_SERVICE "Stats",
    .shape = BKV_UNARY,
    .take = transports_take,
};

static bool in_use(bkv_client_endpoint_t *endpoint, const bkv_window_kind_t *kind) {
    pthread_mutex_lock(&endpoint->client->lock);
    bkv_client_window_t *window = endpoint->link.window;
    bool used = window != NULL && bkv_client_window_kind(window) == kind;
    pthread_mutex_unlock(&endpoint->client->lock);
    return used;
}

// Attaches the smallest window there is, and gives it up again.
static bkv_status_t try_out(bkv_client_endpoint_t *endpoint, const bkv_window_kind_t *kind, uint64_t deadline_ns,
                            bkv_error_t *err) {
    uint64_t now_ns = bkv_client_now_ns();
    uint32_t left_ms = now_ns < deadline_ns ? (uint32_t)((deadline_ns - now_ns) / NS_PER_MS) : 0;
    if (left_ms == 0) {
        return bkv_fail(err, BKV_DEADLINE_EXCEEDED, "not tried: no time was left");
    }
    bkv_client_window_t *window = NULL;
    bkv_status_t status = bkv_client_attach(endpoint, kind, BKV_WINDOW_LEAST, left_ms, &window, err);
    if (status == BKV_OK) {
        bkv_client_detach(endpoint, window, left_ms);
        bkv_client_window_release(window);
    }
    return status;
}

static void look_at(bkv_client_endpoint_t *endpoint, size_t i, uint64_t deadline_ns, bkv_transport_info_t *info) {
    bkv_error_t error = {.status = BKV_OK};
    if (!info->offered) {
        bkv_fail(&error, BKV_UNIMPLEMENTED, "not offered by the daemon");
    } else if (kinds[i] != NULL && !in_use(endpoint, kinds[i])) {
        try_out(endpoint, kinds[i], deadline_ns, &error);
    } else if (strcmp(names[i], "cuda-ipc") == 0) {
        bkv_fail(&error, BKV_UNIMPLEMENTED, "not tried: it takes GPU memory of the caller's");
    }
    info->usable = error.status == BKV_OK;
    snprintf(info->reason, sizeof info->reason, "%.*s", (int)sizeof info->reason - 1, error.message);
}

bkv_status_t bkv_transports(bkv_client_t *client, uint32_t timeout_ms, bkv_transport_info_t *info, size_t *count,
                            bkv_error_t *err) {
    assert(client != NULL && info != NULL && count != NULL);
    transports_call_t *call = bkv_call_new(sizeof *call, &transports_kind, client, NULL, timeout_ms);
    if (call == NULL) {
        return bkv_call_run(NULL, err);
    }
    for (size_t i = 0; i < BKV_TRANSPORTS; i++) {
        info[i] = (bkv_transport_info_t){.name = names[i]};
    }
    call->info = info;
    bkv_status_t status = bkv_call_run(&call->call, err);
    uint64_t deadline_ns = call->call.deadline_ns;
    bkv_client_endpoint_t *endpoint = call->call.endpoint;
    bkv_call_free(&call->call);
    if (status != BKV_OK) {
        return status;
    }
    bkv_transport_info_t *chosen = NULL, *last = &info[BKV_TRANSPORTS - 1];
    for (size_t i = 0; i < BKV_TRANSPORTS; i++) {
        look_at(endpoint, i, deadline_ns, &info[i]);
        if (kinds[i] != NULL && kinds[i] == endpoint->link.kind && info[i].usable) {
            chosen = &info[i];
        }
    }
    if (chosen == NULL && (endpoint->link.kind == NULL || endpoint->link.automatic)) {
        chosen = last;
    }
    if (chosen != NULL) {
        chosen->chosen = true;
    }
    *count = BKV_TRANSPORTS;
    return BKV_OK;
}
