// warm.c - Warm: copies of records to the daemon's GPU, ahead of Attend. In a cluster they are brought here first.
#include "daemon/rpc/bring.h"
#include "daemon/rpc/keyed.h"

#include <stdlib.h>
#include <string.h>

typedef struct warm {
    bkv_bring_t *bring; // NULL: there is no cluster
    bkv_spec_id_t spec_id;
    uint32_t count;
    bkv_key_t keys[]; // [count]
} warm_t;

static void warm_free(void *body) {
    warm_t *warm = body;
    bkv_bring_free(warm->bring);
    free(warm);
}

static void on_warm(void *user, const bkv_error_t *error, uint32_t count) {
    bkv_call_t *call = user;
    warm_t *warm = call->body;
    if (warm->bring != NULL) {
        bkv_bring_used(warm->bring);
    }
    if (error->status != BKV_OK) {
        bkv_call_fail(call, error);
        return;
    }
    Balancekv__V1__WarmResponse reply = BALANCEKV__V1__WARM_RESPONSE__INIT;
    reply.warm = count;
    reply.boot_epoch = call->server->config.boot_epoch;
    bkv_call_reply(call, &reply.base);
}

// On a thread of the cluster's or the handler's: the records are here, as far as there are any.
static void on_brought(void *user) {
    bkv_call_t *call = user;
    const warm_t *warm = call->body;
    bkv_error_t error;
    if (bkv_warm_start(call->server->config.pipeline, &warm->spec_id, warm->keys, warm->count, on_warm, call, &error) !=
        BKV_OK) {
        bkv_call_fail(call, &error);
    } // else on_warm may have ended the call already
}

static bkv_status_t warm_begin(bkv_call_t *call, bkv_bump_t *bump, const Balancekv__V1__WarmRequest *request,
                               bkv_error_t *err) {
    bkv_keyed_t keyed;
    bkv_status_t status = bkv_keyed_get(call, bump, &request->spec_id, request->n_keys, request->keys, &keyed, err);
    if (status == BKV_OK) {
        status = bkv_keyed_need(&keyed, err);
    }
    if (status != BKV_OK) {
        return status;
    }
    warm_t *warm = calloc(1, sizeof(*warm) + keyed.count * sizeof(warm->keys[0]));
    if (warm == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "keys: no memory for them");
    }
    call->body = warm;
    call->body_free = warm_free;
    warm->spec_id = keyed.spec_id;
    warm->count = keyed.count;
    memcpy(warm->keys, keyed.keys, keyed.count * sizeof(warm->keys[0]));
    if (call->server->config.cluster == NULL) {
        return BKV_OK;
    }
    warm->bring = bkv_bring_new(call->server, &keyed.spec_id, keyed.keys, keyed.count);
    return warm->bring != NULL ? BKV_OK : bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "keys: no memory for them");
}

void bkv_handle_warm(bkv_call_t *call, bkv_bump_t *bump) {
    const Balancekv__V1__WarmRequest *request =
        (const Balancekv__V1__WarmRequest *)bkv_call_request(call, &balancekv__v1__warm_request__descriptor, bump);
    if (request == NULL) {
        return;
    }
    bkv_error_t error;
    if (warm_begin(call, bump, request, &error) != BKV_OK) {
        bkv_call_fail(call, &error);
        return;
    }
    const warm_t *warm = call->body;
    if (warm->bring == NULL || bkv_bring_start(warm->bring, call->deadline_ms, on_brought, call)) {
        on_brought(call);
    }
}
