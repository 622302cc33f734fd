// monitor.c - what an operator asks: Ping (the standard health service) and Stats.
#include "client/client.h"
#include "health.pb-c.h"

#include <assert.h>
#include <stdlib.h>

// ---- Ping ----

typedef struct ping_call {
    bkv_call_t call; // first
    uint64_t round_trip_ns;
} ping_call_t;

static bkv_status_t ping_take(bkv_call_t *call, grpc_byte_buffer *message, bkv_error_t *err) {
    ping_call_t *ping = (ping_call_t *)call;
    Grpc__Health__V1__HealthCheckResponse *response = (Grpc__Health__V1__HealthCheckResponse *)bkv_client_unpack(
        &grpc__health__v1__health_check_response__descriptor, message);
    if (response == NULL) {
        return bkv_fail(err, BKV_INTERNAL, "Check: the response is not a HealthCheckResponse");
    }
    ping->round_trip_ns = bkv_client_now_ns() - call->begun_ns;
    bool serving = response->status == GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVING;
    grpc__health__v1__health_check_response__free_unpacked(response, NULL);
    return serving ? BKV_OK : bkv_fail(err, BKV_BUSY, "the daemon answers, but is not serving: it is draining");
}

static const bkv_call_kind_t ping_kind = {
    .method = "/grpc.health.v1.Health/Check",
    .shape = BKV_UNARY,
    .fail_fast = true,
    .take = ping_take,
};

bkv_call_t *bkv_client_ping_new(bkv_client_t *client, uint32_t timeout_ms) {
    static char service[] = "balancekv.v1.BalanceKV";
    bkv_call_t *ping = bkv_call_new(sizeof(ping_call_t), &ping_kind, client, NULL, timeout_ms);
    if (ping != NULL) {
        Grpc__Health__V1__HealthCheckRequest request = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
        request.service = service;
        ping->request = bkv_client_pack(&request.base);
    }
    return ping;
}

bkv_status_t bkv_ping(bkv_client_t *client, uint32_t timeout_ms, uint64_t *round_trip_ns, bkv_error_t *err) {
    assert(client != NULL);
    bkv_call_t *ping = bkv_client_ping_new(client, timeout_ms);
    bkv_status_t status = bkv_call_run(ping, err);
    if (status == BKV_OK && round_trip_ns != NULL) {
        *round_trip_ns = ((ping_call_t *)ping)->round_trip_ns;
    }
    bkv_call_free(ping);
    return status;
}

// ---- Stats ----

// The public part points into the response, which is kept for it.
typedef struct stats {
    bkv_stats_t public; // first
    Balancekv__V1__StatsResponse *response;
} stats_t;

typedef struct stats_call {
    bkv_call_t call; // first
    Balancekv__V1__StatsResponse *response;
} stats_call_t;

static void stats_clean(bkv_call_t *call) {
    stats_call_t *stats = (stats_call_t *)call;
    if (stats->response != NULL) {
        balancekv__v1__stats_response__free_unpacked(stats->response, NULL);
        stats->response = NULL;
    }
}

static bkv_status_t stats_take(bkv_call_t *call, grpc_byte_buffer *message, bkv_error_t *err) {
    stats_clean(call); // of an earlier attempt
    stats_call_t *stats = (stats_call_t *)call;
    stats->response = (Balancekv__V1__StatsResponse *)bkv_client_unpack(&balancekv__v1__stats_response__descriptor, message);
    if (stats->response == NULL) {
        return bkv_fail(err, BKV_INTERNAL, "Stats: the response is not a StatsResponse");
    }
    bkv_client_saw_epoch(call->client, call, stats->response->boot_epoch);
    return BKV_OK;
}

static const bkv_call_kind_t stats_kind = {
    .method = BKV_CLIENT_SERVICE "Stats",
    .shape = BKV_UNARY,
    .take = stats_take,
    .clean = stats_clean,
};

// Takes the response over, unless there is no memory.
static stats_t *stats_from(Balancekv__V1__StatsResponse *response) {
    stats_t *stats = calloc(1, sizeof *stats);
    bkv_metric_t *metrics = calloc(response->n_metrics + 1, sizeof *metrics);
    if (stats == NULL || metrics == NULL) {
        free(stats);
        free(metrics);
        return NULL;
    }
    for (size_t i = 0; i < response->n_metrics; i++) {
        const Balancekv__V1__Metric *metric = response->metrics[i];
        metrics[i] =
            (bkv_metric_t){.name = metric->name, .help = metric->help, .counter = metric->counter, .value = metric->value};
    }
    stats->response = response;
    stats->public = (bkv_stats_t){
        .version = response->version,
        .backend = response->backend,
        .boot_epoch = response->boot_epoch,
        .uptime_ms = response->uptime_ms,
        .draining = response->draining,
        .count = response->n_metrics,
        .metrics = metrics,
    };
    return stats;
}

bkv_status_t bkv_stats_get(bkv_client_t *client, uint32_t timeout_ms, bkv_stats_t **stats, bkv_error_t *err) {
    assert(client != NULL && stats != NULL);
    stats_call_t *call = bkv_call_new(sizeof *call, &stats_kind, client, NULL, timeout_ms);
    if (call == NULL) {
        return bkv_call_run(NULL, err);
    }
    bkv_status_t status = bkv_call_run(&call->call, err);
    if (status == BKV_OK) {
        stats_t *made = stats_from(call->response);
        if (made == NULL) {
            status = bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "client: out of memory");
        } else {
            call->response = NULL;
            *stats = &made->public;
        }
    }
    bkv_call_free(&call->call);
    return status;
}

void bkv_stats_free(bkv_stats_t *stats) {
    if (stats != NULL) {
        free(stats->metrics);
        balancekv__v1__stats_response__free_unpacked(((stats_t *)stats)->response, NULL);
        free(stats);
    }
}
