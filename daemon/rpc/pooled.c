// pooled.c - see pooled.h.
#include "daemon/rpc/pooled.h"

#include "daemon/observe/clock.h"
#include "daemon/rpc/bring.h"

#include <stdlib.h>
#include <string.h>

// The call's body. yes: the record is somewhere (Lookup), or was (Drop).
typedef struct pooled {
    uint32_t count;
    bkv_name_t *names;               // [count]
    bool *yes;                       // [count]
    Balancekv__V1__KeyState *states; // [count]
} pooled_t;

static void pooled_free(void *body) {
    pooled_t *pooled = body;
    free(pooled->names);
    free(pooled->yes);
    free(pooled->states);
    free(pooled);
}

static void fail_memory(bkv_call_t *call) {
    bkv_error_t error;
    bkv_fail(&error, BKV_RESOURCE_EXHAUSTED, "keys: no memory for them");
    bkv_call_fail(call, &error);
}

// NULL: no memory, and the call has been ended.
static pooled_t *pooled_new(bkv_call_t *call, const bkv_keyed_t *keyed) {
    pooled_t *pooled = calloc(1, sizeof(*pooled));
    if (pooled != NULL) {
        pooled->count = keyed->count;
        pooled->names = calloc(keyed->count + (size_t)1, sizeof(pooled->names[0])); // one more: no keys are no failure
        pooled->yes = calloc(keyed->count + (size_t)1, sizeof(pooled->yes[0]));
        pooled->states = calloc(keyed->count + (size_t)1, sizeof(pooled->states[0]));
        call->body = pooled;
        call->body_free = pooled_free;
    }
    if (pooled == NULL || pooled->names == NULL || pooled->yes == NULL || pooled->states == NULL) {
        fail_memory(call);
        return NULL;
    }
    for (uint32_t i = 0; i < keyed->count; i++) {
        pooled->names[i] = (bkv_name_t){.spec_id = keyed->spec_id, .key = keyed->keys[i]};
    }
    return pooled;
}

// ---- Lookup ----

static void on_looked_up(void *user) {
    bkv_call_t *call = user;
    const pooled_t *pooled = call->body;
    Balancekv__V1__LookupResponse reply = BALANCEKV__V1__LOOKUP_RESPONSE__INIT;
    for (uint32_t i = 0; i < pooled->count; i++) {
        pooled->states[i] = pooled->yes[i] ? BALANCEKV__V1__KEY_STATE__KEY_RESIDENT : BALANCEKV__V1__KEY_STATE__KEY_ABSENT;
        reply.prefix += pooled->yes[i] && reply.prefix == i;
    }
    reply.n_states = pooled->count;
    reply.states = pooled->states;
    reply.boot_epoch = call->server->config.boot_epoch;
    bkv_call_reply(call, &reply.base);
}

void bkv_pooled_lookup(bkv_call_t *call, const bkv_keyed_t *keyed, const Balancekv__V1__KeyState *states) {
    pooled_t *pooled = pooled_new(call, keyed);
    if (pooled == NULL) {
        return;
    }
    for (uint32_t i = 0; i < keyed->count; i++) {
        pooled->yes[i] = states[i] == BALANCEKV__V1__KEY_STATE__KEY_RESIDENT;
    }
    bkv_cluster_lookup(call->server->config.cluster, pooled->names, pooled->count, call->deadline_ms, pooled->yes, on_looked_up,
                       call);
}

// ---- Drop ----

static void on_forgotten(void *user) {
    bkv_call_t *call = user;
    const pooled_t *pooled = call->body;
    Balancekv__V1__DropResponse reply = BALANCEKV__V1__DROP_RESPONSE__INIT;
    for (uint32_t i = 0; i < pooled->count; i++) {
        reply.dropped += pooled->yes[i];
    }
    reply.boot_epoch = call->server->config.boot_epoch;
    bkv_call_reply(call, &reply.base);
}

void bkv_pooled_drop(bkv_call_t *call, const bkv_keyed_t *keyed) {
    pooled_t *pooled = pooled_new(call, keyed);
    if (pooled != NULL) {
        bkv_cluster_forget(call->server->config.cluster, pooled->names, pooled->count, call->deadline_ms, pooled->yes,
                           on_forgotten, call);
    }
}

// ---- Pin ----

typedef struct pin {
    bkv_bring_t *bring;
    bkv_spec_id_t spec_id;
    uint64_t ttl_ms;
    uint32_t count;
    bkv_key_t keys[];
} pin_t;

static void pin_free(void *body) {
    pin_t *pin = body;
    bkv_bring_free(pin->bring);
    free(pin);
}

void bkv_reply_pin(bkv_call_t *call, const bkv_spec_id_t *spec_id, const bkv_key_t *keys, uint32_t count, uint64_t ttl_ms) {
    Balancekv__V1__PinResponse reply = BALANCEKV__V1__PIN_RESPONSE__INIT;
    bkv_error_t error;
    if (bkv_store_lease(call->server->config.store, spec_id, keys, count, ttl_ms, bkv_now_ms(), &reply.lease, &error) !=
        BKV_OK) {
        bkv_call_fail(call, &error);
        return;
    }
    reply.boot_epoch = call->server->config.boot_epoch;
    bkv_call_reply(call, &reply.base);
}

// The pins go with the body, when the lease holds the records.
static void on_brought(void *user) {
    bkv_call_t *call = user;
    const pin_t *pin = call->body;
    bkv_error_t error;
    if (bkv_bring_result(pin->bring, &error) != BKV_OK) {
        bkv_call_fail(call, &error);
    } else {
        bkv_reply_pin(call, &pin->spec_id, pin->keys, pin->count, pin->ttl_ms);
    }
}

void bkv_pooled_pin(bkv_call_t *call, const bkv_keyed_t *keyed, uint64_t ttl_ms) {
    pin_t *pin = calloc(1, sizeof(*pin) + keyed->count * sizeof(pin->keys[0]));
    if (pin == NULL) {
        fail_memory(call);
        return;
    }
    pin->spec_id = keyed->spec_id;
    pin->ttl_ms = ttl_ms;
    pin->count = keyed->count;
    memcpy(pin->keys, keyed->keys, keyed->count * sizeof(pin->keys[0]));
    call->body = pin;
    call->body_free = pin_free;
    pin->bring = bkv_bring_new(call->server, &keyed->spec_id, keyed->keys, keyed->count);
    if (pin->bring == NULL) {
        fail_memory(call);
    } else if (bkv_bring_start(pin->bring, call->deadline_ms, on_brought, call)) {
        on_brought(call);
    }
}
