// health.c - grpc.health.v1: Check answers once, Watch keeps the stream and says when it changes. Serving until the drain. The
// service "balancekv.cluster" says besides whether this daemon is a member in good standing: one that is cut off from etcd
// serves, but others will soon take it for gone.
//
// A Watch has no deadline and a drain does not wait for it. It is the one call with two batches in flight: its close is asked
// for at once, because nothing else would tell that an idle watcher has gone. What they share is under the server's lock.
#include "daemon/rpc/call.h"

#include "health.pb-c.h"

#include <stdlib.h>
#include <string.h>

#define SERVICE "balancekv.v1.BalanceKV"
#define CLUSTER "balancekv.cluster"

typedef Grpc__Health__V1__HealthCheckResponse__ServingStatus serving_t;
#define SERVING         GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVING
#define NOT_SERVING     GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__NOT_SERVING
#define SERVICE_UNKNOWN GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVICE_UNKNOWN

typedef struct watch {
    bkv_tag_t close_tag;
    bool known, cluster; // the service
    bool sending, closed;
    serving_t told; // what the watcher was told last
} watch_t;

static serving_t serving(const bkv_server_t *server, bool cluster) {
    bool is = !atomic_load(&server->draining) && (!cluster || bkv_cluster_connected(server->config.cluster));
    return is ? SERVING : NOT_SERVING;
}

static bool is_cluster(const bkv_server_t *server, const char *service) {
    return server->config.cluster != NULL && strcmp(service, CLUSTER) == 0;
}

static bool service_known(const bkv_server_t *server, const char *service) {
    return service[0] == '\0' || strcmp(service, SERVICE) == 0 || is_cluster(server, service);
}

static const Grpc__Health__V1__HealthCheckRequest *health_request(bkv_call_t *call, bkv_bump_t *bump) {
    return (const Grpc__Health__V1__HealthCheckRequest *)bkv_call_request(
        call, &grpc__health__v1__health_check_request__descriptor, bump);
}

void bkv_handle_health_check(bkv_call_t *call, bkv_bump_t *bump) {
    const Grpc__Health__V1__HealthCheckRequest *request = health_request(call, bump);
    if (request == NULL) {
        return;
    }
    if (!service_known(call->server, request->service)) {
        bkv_error_t error;
        bkv_fail(&error, BKV_NOT_FOUND, "service: %.100s is not one of this daemon's", request->service);
        bkv_call_fail(call, &error);
        return;
    }
    Grpc__Health__V1__HealthCheckResponse reply = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__INIT;
    reply.status = serving(call->server, is_cluster(call->server, request->service));
    bkv_call_reply(call, &reply.base);
}

// ---- Watch ----

// Notes that one of the two batches has ended, and ends the call after the last one.
static void note(bkv_call_t *call, bool closed) {
    watch_t *watch = call->body;
    pthread_mutex_lock(&call->server->lock);
    if (closed) {
        watch->closed = true;
    } else {
        watch->sending = false;
    }
    bool over = watch->closed && !watch->sending;
    pthread_mutex_unlock(&call->server->lock);
    if (over) {
        call->cancelled = 0; // going away is how a watch ends, not a failure
        bkv_call_end(call);
    }
}

static void on_told(bkv_worker_t *worker, void *owner, bool ok) {
    (void)worker;
    (void)ok; // when the watcher is gone its close says so
    note(owner, false);
}

static void on_closed(bkv_worker_t *worker, void *owner, bool ok) {
    (void)worker;
    (void)ok;
    note(owner, true);
}

// watch->told is on its way; watch->sending keeps everybody else off.
static void tell(bkv_call_t *call) {
    const watch_t *watch = call->body;
    Grpc__Health__V1__HealthCheckResponse news = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__INIT;
    news.status = watch->told;
    bkv_call_send(call, bkv_wire_pack(&news.base, NULL), on_told);
}

static serving_t watched(const bkv_call_t *call) {
    const watch_t *watch = call->body;
    return watch->known ? serving(call->server, watch->cluster) : SERVICE_UNKNOWN;
}

static void refresh(bkv_call_t *call) {
    watch_t *watch = call->body;
    serving_t status = watched(call);
    if (!watch->sending && !watch->closed && watch->told != status) {
        watch->sending = true;
        watch->told = status;
        tell(call);
    }
}

void bkv_handle_health_watch(bkv_call_t *call, bkv_bump_t *bump) {
    const Grpc__Health__V1__HealthCheckRequest *request = health_request(call, bump);
    if (request == NULL) {
        return;
    }
    watch_t *watch = calloc(1, sizeof(*watch));
    if (watch == NULL) {
        bkv_error_t error;
        bkv_fail(&error, BKV_RESOURCE_EXHAUSTED, "no memory for a watch");
        bkv_call_fail(call, &error);
        return;
    }
    call->body = watch;
    call->body_free = free;
    watch->close_tag = (bkv_tag_t){on_closed, call};
    watch->known = service_known(call->server, request->service);
    watch->cluster = is_cluster(call->server, request->service);
    watch->sending = true; // so the call stays until the first news is out
    watch->told = watched(call);
    pthread_mutex_lock(&call->server->lock); // the sweep looks from now on
    call->refresh = refresh;
    pthread_mutex_unlock(&call->server->lock);
    const grpc_op close = {.op = GRPC_OP_RECV_CLOSE_ON_SERVER, .data.recv_close_on_server.cancelled = &call->cancelled};
    bkv_call_batch(call, &close, 1, &watch->close_tag);
    tell(call);
}
