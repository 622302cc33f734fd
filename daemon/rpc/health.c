// health.c - grpc.health.v1: Check answers once, Watch keeps the stream and says when it changes. Serving until the drain.
//
// A Watch has no deadline and a drain does not wait for it. It is the one call with two batches in flight: its close is asked
// for at once, because nothing else would tell that an idle watcher has gone.
#include "daemon/rpc/call.h"

#include "health.pb-c.h"

#include <stdlib.h>
#include <string.h>

#define SERVICE "balancekv.v1.BalanceKV"

typedef Grpc__Health__V1__HealthCheckResponse__ServingStatus serving_t;
#define SERVING         GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVING
#define NOT_SERVING     GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__NOT_SERVING
#define SERVICE_UNKNOWN GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVICE_UNKNOWN

typedef struct watch {
    bkv_tag_t close_tag;
    bool known; // the service
    bool sending, closed;
    serving_t told; // what the watcher was told last
} watch_t;

static serving_t serving(const bkv_server_t *server) {
    return atomic_load(&server->draining) ? NOT_SERVING : SERVING;
}

static bool service_known(const char *service) {
    return service[0] == '\0' || strcmp(service, SERVICE) == 0;
}

static const Grpc__Health__V1__HealthCheckRequest *health_request(bkv_call_t *call) {
    return (const Grpc__Health__V1__HealthCheckRequest *)bkv_call_request(call,
                                                                          &grpc__health__v1__health_check_request__descriptor);
}

void bkv_handle_health_check(bkv_call_t *call) {
    const Grpc__Health__V1__HealthCheckRequest *request = health_request(call);
    if (request == NULL) {
        return;
    }
    if (!service_known(request->service)) {
        bkv_error_t error;
        bkv_fail(&error, BKV_NOT_FOUND, "service: %.100s is not one of this daemon's", request->service);
        bkv_call_fail(call, &error);
        return;
    }
    Grpc__Health__V1__HealthCheckResponse reply = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__INIT;
    reply.status = serving(call->server);
    bkv_call_reply(call, &reply.base);
}

// ---- Watch ----

static void on_told(void *owner, bool ok) {
    (void)ok; // when the watcher is gone its close says so
    bkv_call_t *call = owner;
    watch_t *watch = call->body;
    watch->sending = false;
    if (watch->closed) {
        bkv_call_end(call);
    }
}

static void on_closed(void *owner, bool ok) {
    (void)ok;
    bkv_call_t *call = owner;
    watch_t *watch = call->body;
    watch->closed = true;
    call->cancelled = 0; // going away is how a watch ends, not a failure
    if (!watch->sending) {
        bkv_call_end(call);
    }
}

static void tell(bkv_call_t *call, serving_t status) {
    watch_t *watch = call->body;
    watch->sending = true;
    watch->told = status;
    Grpc__Health__V1__HealthCheckResponse news = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__INIT;
    news.status = status;
    bkv_call_send(call, bkv_wire_pack(&news.base, NULL), on_told);
}

static void refresh(bkv_call_t *call) {
    const watch_t *watch = call->body;
    serving_t status = watch->known ? serving(call->server) : SERVICE_UNKNOWN;
    if (!watch->sending && !watch->closed && watch->told != status) {
        tell(call, status);
    }
}

void bkv_handle_health_watch(bkv_call_t *call) {
    const Grpc__Health__V1__HealthCheckRequest *request = health_request(call);
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
    watch->known = service_known(request->service);
    watch->close_tag = (bkv_tag_t){on_closed, call};
    call->body = watch;
    call->body_free = free;
    call->refresh = refresh;
    call->deadline_ms = UINT64_MAX;
    call->counted = false;
    atomic_fetch_sub(&call->server->open, 1);
    const grpc_op close = {.op = GRPC_OP_RECV_CLOSE_ON_SERVER, .data.recv_close_on_server.cancelled = &call->cancelled};
    bkv_call_batch(call, &close, 1, &watch->close_tag);
    tell(call, watch->known ? serving(call->server) : SERVICE_UNKNOWN); // both complete on this thread, later
}
