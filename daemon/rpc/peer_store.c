// peer_store.c - Peer.Store: a client stream of finished records, read one message at a time; what they say is intake.c's.
//
// A message is read only when the one before it has been used up: what the peer sends meanwhile waits in HTTP/2's flow control.
#include "daemon/observe/clock.h"
#include "daemon/rpc/intake.h"
#include "daemon/rpc/peer.h"

#include "peer.pb-c.h"

#include <inttypes.h>

static void intake_free(void *body) {
    bkv_intake_destroy(body);
}

static void reply(bkv_call_t *call) {
    Balancekv__Cluster__V1__StoreResponse response = BALANCEKV__CLUSTER__V1__STORE_RESPONSE__INIT;
    const uint32_t *codes;
    const char *message;
    uint32_t count;
    bkv_intake_end(call->body, &codes, &count, &message);
    response.n_codes = count;
    response.codes = (uint32_t *)(uintptr_t)codes; // protobuf-c only reads what it packs
    response.message = (char *)(uintptr_t)message;
    response.boot_epoch = call->server->config.boot_epoch;
    bkv_call_reply(call, &response.base);
}

static void on_message(bkv_worker_t *worker, void *owner, bool ok) {
    bkv_call_t *call = owner;
    bkv_intake_t *intake = call->body;
    bkv_error_t error;
    if (!ok) {
        bkv_fail(&error, BKV_RESOURCE_EXHAUSTED, "request: a message larger than max_message %" PRIu64,
                 call->server->config.max_message);
        bkv_call_fail(call, &error);
        return;
    }
    if (call->message == NULL) { // the last has come, or the peer is gone
        reply(call);
        return;
    }
    uint64_t before = bkv_intake_bytes(intake);
    bkv_status_t status = bkv_intake_take(intake, call->message, &worker->bump, bkv_now_ms(), &error);
    atomic_fetch_add(&call->server->bytes_received_total, bkv_intake_bytes(intake) - before);
    if (status != BKV_OK) {
        bkv_call_fail(call, &error);
    } else {
        bkv_call_read(call, on_message);
    }
}

void bkv_handle_peer_store(bkv_call_t *call, bkv_bump_t *bump) {
    (void)bump;
    const bkv_server_config_t *config = &call->server->config;
    bkv_error_t error;
    if (!bkv_call_is_peer(call, &error)) {
        bkv_call_fail(call, &error);
        return;
    }
    call->body = bkv_intake_create(config->store, bkv_pipeline_models(config->pipeline), config->peer_batch);
    call->body_free = intake_free;
    if (call->body == NULL) {
        bkv_fail(&error, BKV_RESOURCE_EXHAUSTED, "request: no memory for it");
        bkv_call_fail(call, &error);
        return;
    }
    bkv_call_read(call, on_message);
}
