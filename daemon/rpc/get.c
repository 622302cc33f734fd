// get.c - Get and Fold: what is asked for. Sending it is records.c's.
#include "daemon/rpc/keyed.h"
#include "daemon/rpc/records.h"

#include <string.h>

// ---- Get ----

static bkv_status_t get_begin(bkv_call_t *call, bkv_bump_t *bump, const Balancekv__V1__GetRequest *request, bkv_error_t *err) {
    bkv_keyed_t keyed;
    bkv_status_t status = bkv_keyed_get(call, bump, &request->spec_id, request->n_keys, request->keys, &keyed, err);
    if (status != BKV_OK) {
        return status;
    }
    bkv_records_t *records = bkv_records_new(call, keyed.count);
    if (records == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "keys: no memory for them");
    }
    records->spec_id = keyed.spec_id;
    records->range = (bkv_deliver_range_t){.first_layer = request->first_layer,
                                           .layers = request->layers,
                                           .first_head = request->first_head,
                                           .heads = request->heads};
    memcpy(records->keys, keyed.keys, keyed.count * sizeof(records->keys[0]));
    return bkv_records_set_room(records, request->place, err);
}

void bkv_handle_get(bkv_call_t *call, bkv_bump_t *bump) {
    const Balancekv__V1__GetRequest *request =
        (const Balancekv__V1__GetRequest *)bkv_call_request(call, &balancekv__v1__get_request__descriptor, bump);
    if (request == NULL) {
        return;
    }
    bkv_error_t error;
    if (get_begin(call, bump, request, &error) != BKV_OK) {
        bkv_call_fail(call, &error);
    } else {
        bkv_records_send(call);
    }
}

// ---- Fold ----

// On a compute thread: hands the records over to be sent.
static void on_folded(void *user, const bkv_error_t *error, bkv_fold_result_t *result) {
    bkv_call_t *call = user;
    if (error->status != BKV_OK) {
        bkv_call_fail(call, error);
        return;
    }
    bkv_records_t *records = call->body;
    records->folded = *result;
    records->count = result->count;
    bkv_records_send(call);
}

static bkv_status_t fold_begin(bkv_call_t *call, bkv_bump_t *bump, const Balancekv__V1__FoldRequest *request,
                               bkv_error_t *err) {
    bkv_keyed_t keyed;
    bkv_fold_args_t args = {.budget = request->budget_bytes, .rate = request->rate, .ttl_ms = request->ttl_ms};
    bkv_status_t status = bkv_keyed_get(call, bump, &request->spec_id, request->n_keys, request->keys, &keyed, err);
    if (status == BKV_OK) {
        status = bkv_keyed_need(&keyed, err);
    }
    if (status == BKV_OK) {
        status = bkv_wire_get_profile(request->n_profile, request->profile, &args.profile, err);
    }
    if (status != BKV_OK) {
        return status;
    }
    bkv_records_t *records = bkv_records_new(call, 0);
    if (records == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "keys: no memory for them");
    }
    records->fold = true;
    records->no_data = request->no_data;
    status = bkv_records_set_room(records, request->place, err);
    if (status != BKV_OK) {
        return status;
    }
    args.spec_id = keyed.spec_id;
    args.keys = keyed.keys;
    args.count = keyed.count;
    return bkv_fold_start(call->server->config.pipeline, &args, on_folded, call, err);
}

void bkv_handle_fold(bkv_call_t *call, bkv_bump_t *bump) {
    const Balancekv__V1__FoldRequest *request =
        (const Balancekv__V1__FoldRequest *)bkv_call_request(call, &balancekv__v1__fold_request__descriptor, bump);
    if (request == NULL) {
        return;
    }
    bkv_error_t error;
    if (fold_begin(call, bump, request, &error) != BKV_OK) {
        bkv_call_fail(call, &error);
    } // else on_folded may have ended the call already
}
