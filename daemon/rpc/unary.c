// unary.c - the calls that are answered on the spot: Open, Lookup, Pin, Unpin, Drop and Stats. One request in, one reply out,
// no waiting in between; what others of a cluster must be asked for goes on in pooled.c. Attend, which waits for a compute thread,
// is in attend.c.
#include "daemon/observe/clock.h"
#include "daemon/rpc/call.h"
#include "daemon/rpc/keyed.h"
#include "daemon/rpc/pooled.h"

#include <stdio.h>
#include <string.h>

#define MAX_LEASE_MS 3600000
#define MAX_METRICS  512

static void no_memory(bkv_call_t *call) {
    bkv_error_t error;
    bkv_fail(&error, BKV_RESOURCE_EXHAUSTED, "request: no memory for its reply");
    bkv_call_fail(call, &error);
}

// The transports that this call's client can use, best first.
static size_t offer(const bkv_call_t *call, const char **names) {
    const bkv_transports_t *transports = call->server->config.transports;
    if (transports == NULL) {
        names[0] = "inline";
        return 1;
    }
    return bkv_transports_offer(transports, bkv_call_is_local(call), names);
}

// ---- Open ----

static bkv_status_t open_spec(const bkv_call_t *call, const Balancekv__V1__Spec *spec, bkv_model_t *model, bkv_error_t *err) {
    bkv_status_t status = bkv_wire_get_spec(spec, model, err);
    if (status == BKV_OK) {
        status = bkv_model_complete(model, err);
    }
    if (status == BKV_OK) {
        status = bkv_model_table_add(bkv_pipeline_models(call->server->config.pipeline), model, err);
    }
    return status;
}

void bkv_handle_open(bkv_call_t *call, bkv_bump_t *bump) {
    const Balancekv__V1__OpenRequest *request =
        (const Balancekv__V1__OpenRequest *)bkv_call_request(call, &balancekv__v1__open_request__descriptor, bump);
    if (request == NULL) {
        return;
    }
    bkv_model_t model;
    bkv_error_t error;
    if (open_spec(call, request->spec, &model, &error) != BKV_OK) {
        bkv_call_fail(call, &error);
        return;
    }
    const bkv_server_config_t *config = &call->server->config;
    Balancekv__V1__Spec spec;
    bkv_wire_set_spec(&model, &spec);
    const char *transports[BKV_TRANSPORT_KINDS + 1];
    Balancekv__V1__OpenResponse reply = BALANCEKV__V1__OPEN_RESPONSE__INIT;
    reply.spec_id = (ProtobufCBinaryData){BKV_SPEC_ID_BYTES, model.id.bytes};
    reply.boot_epoch = config->boot_epoch;
    reply.max_message_bytes = config->max_message;
    reply.max_block_bytes = config->max_block;
    reply.max_batch = config->max_batch;
    reply.n_transports = offer(call, transports);
    reply.transports = (char **)transports; // protobuf-c only reads what it packs
    reply.backend = (char *)config->backend;
    reply.spec = &spec;
    bkv_call_reply(call, &reply.base);
}

// ---- calls over keys ----

void bkv_handle_lookup(bkv_call_t *call, bkv_bump_t *bump) {
    const Balancekv__V1__LookupRequest *request =
        (const Balancekv__V1__LookupRequest *)bkv_call_request(call, &balancekv__v1__lookup_request__descriptor, bump);
    if (request == NULL) {
        return;
    }
    bkv_keyed_t keyed;
    bkv_error_t error;
    if (bkv_keyed_get(call, bump, &request->spec_id, request->n_keys, request->keys, &keyed, &error) != BKV_OK) {
        bkv_call_fail(call, &error);
        return;
    }
    Balancekv__V1__KeyState *states = bkv_bump_alloc(bump, keyed.count * sizeof(states[0]));
    if (states == NULL) {
        no_memory(call);
        return;
    }
    Balancekv__V1__LookupResponse reply = BALANCEKV__V1__LOOKUP_RESPONSE__INIT;
    uint64_t now_ms = bkv_now_ms();
    uint32_t absent = 0;
    for (uint32_t i = 0; i < keyed.count; i++) {
        bool resident = bkv_store_contains(call->server->config.store, &keyed.spec_id, &keyed.keys[i], now_ms);
        states[i] = resident ? BALANCEKV__V1__KEY_STATE__KEY_RESIDENT : BALANCEKV__V1__KEY_STATE__KEY_ABSENT;
        reply.prefix += resident && reply.prefix == i;
        absent += !resident;
    }
    if (absent > 0 && call->server->config.cluster != NULL) {
        bkv_pooled_lookup(call, &keyed, states);
        return;
    }
    reply.n_states = keyed.count;
    reply.states = states;
    reply.boot_epoch = call->server->config.boot_epoch;
    bkv_call_reply(call, &reply.base);
}

static bkv_status_t get_pin(bkv_call_t *call, bkv_bump_t *bump, const Balancekv__V1__PinRequest *request, bkv_keyed_t *keyed,
                            bkv_error_t *err) {
    bkv_status_t status = bkv_keyed_get(call, bump, &request->spec_id, request->n_keys, request->keys, keyed, err);
    if (status == BKV_OK) {
        status = bkv_keyed_need(keyed, err);
    }
    if (status == BKV_OK && (request->ttl_ms == 0 || request->ttl_ms > MAX_LEASE_MS)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "ttl_ms: %llu is not within 1..%d", (unsigned long long)request->ttl_ms,
                        MAX_LEASE_MS);
    }
    return status;
}

void bkv_handle_pin(bkv_call_t *call, bkv_bump_t *bump) {
    const Balancekv__V1__PinRequest *request =
        (const Balancekv__V1__PinRequest *)bkv_call_request(call, &balancekv__v1__pin_request__descriptor, bump);
    if (request == NULL) {
        return;
    }
    bkv_keyed_t keyed;
    bkv_error_t error;
    if (get_pin(call, bump, request, &keyed, &error) != BKV_OK) {
        bkv_call_fail(call, &error);
    } else if (call->server->config.cluster != NULL) {
        bkv_pooled_pin(call, &keyed, request->ttl_ms);
    } else {
        bkv_reply_pin(call, &keyed.spec_id, keyed.keys, keyed.count, request->ttl_ms);
    }
}

void bkv_handle_unpin(bkv_call_t *call, bkv_bump_t *bump) {
    const Balancekv__V1__UnpinRequest *request =
        (const Balancekv__V1__UnpinRequest *)bkv_call_request(call, &balancekv__v1__unpin_request__descriptor, bump);
    if (request == NULL) {
        return;
    }
    bkv_error_t error;
    if (bkv_store_unlease(call->server->config.store, request->lease, &error) != BKV_OK) {
        bkv_call_fail(call, &error);
        return;
    }
    Balancekv__V1__UnpinResponse reply = BALANCEKV__V1__UNPIN_RESPONSE__INIT;
    reply.boot_epoch = call->server->config.boot_epoch;
    bkv_call_reply(call, &reply.base);
}

void bkv_handle_drop(bkv_call_t *call, bkv_bump_t *bump) {
    const Balancekv__V1__DropRequest *request =
        (const Balancekv__V1__DropRequest *)bkv_call_request(call, &balancekv__v1__drop_request__descriptor, bump);
    if (request == NULL) {
        return;
    }
    bkv_keyed_t keyed;
    bkv_error_t error;
    if (bkv_keyed_get(call, bump, &request->spec_id, request->n_keys, request->keys, &keyed, &error) != BKV_OK) {
        bkv_call_fail(call, &error);
        return;
    }
    if (call->server->config.cluster != NULL) {
        bkv_pooled_drop(call, &keyed);
        return;
    }
    Balancekv__V1__DropResponse reply = BALANCEKV__V1__DROP_RESPONSE__INIT;
    uint64_t now_ms = bkv_now_ms();
    for (uint32_t i = 0; i < keyed.count; i++) {
        reply.dropped += bkv_store_drop(call->server->config.store, &keyed.spec_id, &keyed.keys[i], now_ms);
    }
    reply.boot_epoch = call->server->config.boot_epoch;
    bkv_call_reply(call, &reply.base);
}

// ---- Stats ----

typedef struct gathered {
    bkv_bump_t *bump;
    size_t count;
    Balancekv__V1__Metric *metrics[MAX_METRICS];
} gathered_t;

static void gather(void *sink, const char *name, const char *help, bool counter, double value) {
    static const char prefix[] = "balancekv_";
    gathered_t *gathered = sink;
    size_t room = sizeof(prefix) + strlen(name);
    char *full_name = bkv_bump_alloc(gathered->bump, room);
    Balancekv__V1__Metric *metric = bkv_bump_alloc(gathered->bump, sizeof(*metric));
    if (gathered->count == MAX_METRICS || full_name == NULL || metric == NULL) {
        return; // a metric too many is left out, the others are worth more than an error
    }
    snprintf(full_name, room, "%s%s", prefix, name);
    balancekv__v1__metric__init(metric);
    metric->name = full_name;
    metric->help = (char *)help;
    metric->counter = counter;
    metric->value = value;
    gathered->metrics[gathered->count++] = metric;
}

void bkv_handle_stats(bkv_call_t *call, bkv_bump_t *bump) {
    const bkv_server_t *server = call->server;
    const bkv_server_config_t *config = &server->config;
    if (bkv_call_request(call, &balancekv__v1__stats_request__descriptor, bump) == NULL) {
        return;
    }
    gathered_t *gathered = bkv_bump_alloc(bump, sizeof(*gathered));
    if (gathered == NULL) {
        no_memory(call);
        return;
    }
    gathered->bump = bump;
    gathered->count = 0;
    for (size_t i = 0; i < config->source_count; i++) {
        config->sources[i].collect(config->sources[i].owner, gather, gathered);
    }
    Balancekv__V1__StatsResponse reply = BALANCEKV__V1__STATS_RESPONSE__INIT;
    reply.version = (char *)config->version;
    reply.boot_epoch = config->boot_epoch;
    reply.uptime_ms = bkv_now_ms() - server->started_ms;
    reply.backend = (char *)config->backend;
    reply.draining = atomic_load(&server->draining);
    reply.n_metrics = gathered->count;
    reply.metrics = gathered->metrics;
    const char *transports[BKV_TRANSPORT_KINDS + 1];
    reply.n_transports = offer(call, transports);
    reply.transports = (char **)transports;
    bkv_call_reply(call, &reply.base);
}
