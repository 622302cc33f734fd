// unary.c - the operations of one request and one response: Pin, Unpin, Drop, Warm. Each is a request packed once, a
// function that takes the response, and the public function.
#include "client/client.h"

#include <assert.h>
#include <stdlib.h>

// Unpacks a response, or says what it is not.
static void *unpack(const bkv_call_t *call, const ProtobufCMessageDescriptor *descriptor, grpc_byte_buffer *message,
                    bkv_error_t *err) {
    void *response = bkv_client_unpack(descriptor, message);
    if (response == NULL) {
        bkv_fail(err, BKV_INTERNAL, "%s: the response is not a %s", call->kind->method, descriptor->short_name);
    }
    return response;
}

static bkv_status_t no_keys(bkv_error_t *err) {
    return bkv_fail(err, BKV_INVALID_ARGUMENT, "keys: none given");
}

// ---- Pin, Unpin, Drop, Warm: one number comes back ----

typedef struct number_call {
    bkv_call_t call; // first
    uint64_t number;
} number_call_t;

static bkv_status_t pin_take(bkv_call_t *call, grpc_byte_buffer *message, bkv_error_t *err) {
    Balancekv__V1__PinResponse *response = unpack(call, &balancekv__v1__pin_response__descriptor, message, err);
    if (response == NULL) {
        return BKV_INTERNAL;
    }
    ((number_call_t *)call)->number = response->lease;
    bkv_client_saw_epoch(call->client, call, response->boot_epoch);
    balancekv__v1__pin_response__free_unpacked(response, NULL);
    return BKV_OK;
}

static const bkv_call_kind_t pin_kind = {
    .method = BKV_CLIENT_SERVICE "Pin",
    .shape = BKV_UNARY,
    .names_spec = true,
    .may_miss = true,
    .take = pin_take,
};

bkv_status_t bkv_pin(bkv_client_t *client, const bkv_spec_id_t *id, const bkv_key_t *keys, size_t count, uint64_t ttl_ms,
                     uint32_t timeout_ms, uint64_t *lease, bkv_error_t *err) {
    assert(client != NULL && id != NULL && (keys != NULL || count == 0) && lease != NULL);
    if (count == 0) {
        return no_keys(err);
    }
    number_call_t *pin = bkv_call_new(sizeof *pin, &pin_kind, client, id, timeout_ms);
    ProtobufCBinaryData *list = bkv_client_key_list(keys, count);
    bkv_status_t status;
    if (pin == NULL || list == NULL) {
        status = bkv_call_run(NULL, err);
    } else {
        Balancekv__V1__PinRequest request = BALANCEKV__V1__PIN_REQUEST__INIT;
        request.spec_id = bkv_client_spec_bytes(id);
        request.n_keys = count;
        request.keys = list;
        request.ttl_ms = ttl_ms;
        pin->call.request = bkv_client_pack(&request.base);
        status = bkv_call_run(&pin->call, err);
        *lease = status == BKV_OK ? pin->number : 0;
    }
    free(list);
    bkv_call_free((bkv_call_t *)pin);
    return status;
}

static bkv_status_t unpin_take(bkv_call_t *call, grpc_byte_buffer *message, bkv_error_t *err) {
    Balancekv__V1__UnpinResponse *response = unpack(call, &balancekv__v1__unpin_response__descriptor, message, err);
    if (response == NULL) {
        return BKV_INTERNAL;
    }
    bkv_client_saw_epoch(call->client, call, response->boot_epoch);
    balancekv__v1__unpin_response__free_unpacked(response, NULL);
    return BKV_OK;
}

// If an earlier attempt's answer was lost, that one, or the restart, may have ended the lease. It has ended; that was asked.
static void unpin_finish(bkv_call_t *call) {
    if (call->error.status == BKV_NOT_FOUND && call->attempts > 1 + call->asked_next) {
        call->error = (bkv_error_t){.status = BKV_OK};
    }
}

static const bkv_call_kind_t unpin_kind = {
    .method = BKV_CLIENT_SERVICE "Unpin",
    .shape = BKV_UNARY,
    .one_has_it = true,
    .take = unpin_take,
    .finish = unpin_finish,
};

bkv_status_t bkv_unpin(bkv_client_t *client, uint64_t lease, uint32_t timeout_ms, bkv_error_t *err) {
    assert(client != NULL);
    bkv_call_t *call = bkv_call_new(sizeof *call, &unpin_kind, client, NULL, timeout_ms);
    if (call != NULL) {
        Balancekv__V1__UnpinRequest request = BALANCEKV__V1__UNPIN_REQUEST__INIT;
        request.lease = lease;
        call->request = bkv_client_pack(&request.base);
    }
    bkv_status_t status = bkv_call_run(call, err);
    bkv_call_free(call);
    return status;
}

static bkv_status_t drop_take(bkv_call_t *call, grpc_byte_buffer *message, bkv_error_t *err) {
    Balancekv__V1__DropResponse *response = unpack(call, &balancekv__v1__drop_response__descriptor, message, err);
    if (response == NULL) {
        return BKV_INTERNAL;
    }
    ((number_call_t *)call)->number = response->dropped;
    bkv_client_saw_epoch(call->client, call, response->boot_epoch);
    balancekv__v1__drop_response__free_unpacked(response, NULL);
    return BKV_OK;
}

static const bkv_call_kind_t drop_kind = {
    .method = BKV_CLIENT_SERVICE "Drop",
    .shape = BKV_UNARY,
    .names_spec = true,
    .take = drop_take,
};

static bkv_status_t warm_take(bkv_call_t *call, grpc_byte_buffer *message, bkv_error_t *err) {
    Balancekv__V1__WarmResponse *response = unpack(call, &balancekv__v1__warm_response__descriptor, message, err);
    if (response == NULL) {
        return BKV_INTERNAL;
    }
    ((number_call_t *)call)->number = response->warm;
    bkv_client_saw_epoch(call->client, call, response->boot_epoch);
    balancekv__v1__warm_response__free_unpacked(response, NULL);
    return BKV_OK;
}

static const bkv_call_kind_t warm_kind = {
    .method = BKV_CLIENT_SERVICE "Warm",
    .shape = BKV_UNARY,
    .names_spec = true,
    .take = warm_take,
};

// What Drop and Warm have in common: keys out, how many of them back. A message of each looks the same as one of the other.
static bkv_status_t count_keys(bkv_client_t *client, const bkv_call_kind_t *kind, const bkv_spec_id_t *id,
                               const bkv_key_t *keys, size_t count, uint32_t timeout_ms, size_t *number, bkv_error_t *err) {
    assert(client != NULL && id != NULL && (keys != NULL || count == 0));
    if (count == 0) {
        return no_keys(err);
    }
    number_call_t *call = bkv_call_new(sizeof *call, kind, client, id, timeout_ms);
    ProtobufCBinaryData *list = bkv_client_key_list(keys, count);
    bkv_status_t status;
    if (call == NULL || list == NULL) {
        status = bkv_call_run(NULL, err);
    } else {
        Balancekv__V1__DropRequest request = BALANCEKV__V1__DROP_REQUEST__INIT;
        request.spec_id = bkv_client_spec_bytes(id);
        request.n_keys = count;
        request.keys = list;
        call->call.request = bkv_client_pack(&request.base);
        status = bkv_call_run(&call->call, err);
        if (status == BKV_OK && number != NULL) {
            *number = (size_t)call->number;
        }
    }
    free(list);
    bkv_call_free((bkv_call_t *)call);
    return status;
}

bkv_status_t bkv_drop(bkv_client_t *client, const bkv_spec_id_t *id, const bkv_key_t *keys, size_t count, uint32_t timeout_ms,
                      size_t *dropped, bkv_error_t *err) {
    return count_keys(client, &drop_kind, id, keys, count, timeout_ms, dropped, err);
}

bkv_status_t bkv_warm(bkv_client_t *client, const bkv_spec_id_t *id, const bkv_key_t *keys, size_t count, uint32_t timeout_ms,
                      size_t *warm, bkv_error_t *err) {
    return count_keys(client, &warm_kind, id, keys, count, timeout_ms, warm, err);
}
