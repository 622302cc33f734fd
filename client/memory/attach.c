// attach.c - Attach and Detach, waited for: how a window begins and ends. When that is to be, and for whom, is link.c's.
#include "client/client.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#define SESSION_BYTES 16
#define DETACH_MS     500 // of a session that could not be used
#define NS_PER_MS     1000000ull

// ---- Detach ----

static const bkv_call_kind_t detach_kind = {
    .method = BKV_CLIENT_SERVICE "Detach",
    .shape = BKV_UNARY,
    .fail_fast = true,
};

// Whatever comes of it: a session that the daemon still has ends when it has been idle for long enough.
void bkv_client_session_end(bkv_client_endpoint_t *endpoint, const uint8_t *session, uint32_t timeout_ms) {
    bkv_call_t *detach = bkv_call_new(sizeof *detach, &detach_kind, endpoint->client, NULL, timeout_ms);
    if (detach != NULL) {
        bkv_call_bind(detach, endpoint);
        Balancekv__V1__DetachRequest request = BALANCEKV__V1__DETACH_REQUEST__INIT;
        request.session = (ProtobufCBinaryData){.len = SESSION_BYTES, .data = (uint8_t *)session};
        detach->request = bkv_client_pack(&request.base);
    }
    (void)bkv_call_run(detach, NULL);
    bkv_call_free(detach);
}

void bkv_client_detach(bkv_client_endpoint_t *endpoint, bkv_client_window_t *window, uint32_t timeout_ms) {
    bkv_client_session_end(endpoint, bkv_client_window_session(window), timeout_ms);
    bkv_client_window_leave(window);
}

// ---- Attach ----

typedef struct attach_call {
    bkv_call_t call; // first
    Balancekv__V1__AttachResponse *response;
} attach_call_t;

static void attach_clean(bkv_call_t *call) {
    attach_call_t *attach = (attach_call_t *)call;
    if (attach->response != NULL) {
        balancekv__v1__attach_response__free_unpacked(attach->response, NULL);
        attach->response = NULL;
    }
}

static bkv_status_t attach_take(bkv_call_t *call, grpc_byte_buffer *message, bkv_error_t *err) {
    attach_clean(call); // of an earlier attempt
    attach_call_t *attach = (attach_call_t *)call;
    attach->response = (Balancekv__V1__AttachResponse *)bkv_client_unpack(&balancekv__v1__attach_response__descriptor, message);
    if (attach->response == NULL) {
        return bkv_fail(err, BKV_INTERNAL, "Attach: the response is not an AttachResponse");
    }
    if (attach->response->session.len != SESSION_BYTES) {
        return bkv_fail(err, BKV_INTERNAL, "Attach: session: %zu bytes, not %d", attach->response->session.len, SESSION_BYTES);
    }
    if (attach->response->boot_epoch == 0) {
        return bkv_fail(err, BKV_INTERNAL, "Attach: boot_epoch: none, so that nobody could tell when the session has ended");
    }
    bkv_client_saw_epoch(call->client, call, attach->response->boot_epoch);
    return BKV_OK;
}

static const bkv_call_kind_t attach_kind = {
    .method = BKV_CLIENT_SERVICE "Attach",
    .shape = BKV_UNARY,
    .fail_fast = true,
    .take = attach_take,
    .clean = attach_clean,
};

bkv_status_t bkv_client_session_ask(bkv_client_endpoint_t *endpoint, const Balancekv__V1__AttachRequest *request,
                                    uint32_t timeout_ms, Balancekv__V1__AttachResponse **response, bkv_error_t *err) {
    attach_call_t *attach = bkv_call_new(sizeof *attach, &attach_kind, endpoint->client, NULL, timeout_ms);
    if (attach == NULL) {
        bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "client: out of memory");
        return BKV_RESOURCE_EXHAUSTED;
    }
    bkv_call_bind(&attach->call, endpoint);
    attach->call.request = bkv_client_pack(&request->base);
    bkv_status_t status = bkv_call_run(&attach->call, err);
    if (status == BKV_OK) {
        *response = attach->response;
        attach->response = NULL;
    }
    bkv_call_free(&attach->call);
    return status;
}

// The client is being destroyed: whatever waits is to give up.
static bool stop(void *user) {
    bkv_client_t *client = user;
    pthread_mutex_lock(&client->lock);
    bool closing = client->closing;
    pthread_mutex_unlock(&client->lock);
    return closing;
}

// From the daemon's answer to a window. `state` is closed on failure.
static bkv_status_t window_make(bkv_client_endpoint_t *endpoint, const bkv_window_kind_t *kind, void *state,
                                const bkv_window_args_t *args, const Balancekv__V1__AttachResponse *response,
                                bkv_client_window_t **window, bkv_error_t *err) {
    uint8_t *memory = NULL;
    uint64_t bytes = 0;
    bkv_status_t status = kind->take(state, args, response, &memory, &bytes, err);
    if (status == BKV_OK) {
        *window = bkv_client_window_create(kind, state, memory, bytes, response->session.data, response->boot_epoch);
        if (*window == NULL) {
            status = bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "client: out of memory");
        }
    }
    if (status != BKV_OK) {
        kind->close(state);
        bkv_client_session_end(endpoint, response->session.data, DETACH_MS);
    }
    return status;
}

bkv_status_t bkv_client_attach(bkv_client_endpoint_t *endpoint, const bkv_window_kind_t *kind, uint64_t bytes,
                               uint32_t timeout_ms, bkv_client_window_t **window, bkv_error_t *err) {
    bkv_window_args_t args = {.endpoint = endpoint->target.address,
                              .device = endpoint->client->transport.device,
                              .bytes = bytes,
                              .deadline_ns = bkv_client_now_ns() + timeout_ms * NS_PER_MS,
                              .stop = stop,
                              .user = endpoint->client};
    Balancekv__V1__AttachRequest request = BALANCEKV__V1__ATTACH_REQUEST__INIT;
    void *state = NULL;
    bkv_status_t status = kind->offer(&args, &request, &state, err);
    if (status != BKV_OK) {
        return status;
    }
    Balancekv__V1__AttachResponse *response;
    status = bkv_client_session_ask(endpoint, &request, timeout_ms, &response, err);
    if (status != BKV_OK) {
        kind->close(state);
        return status;
    }
    status = window_make(endpoint, kind, state, &args, response, window, err);
    balancekv__v1__attach_response__free_unpacked(response, NULL);
    return status;
}
