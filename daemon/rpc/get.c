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
    status = bkv_records_reach_out(call, err);
    return status == BKV_OK ? bkv_records_set_room(records, request->place, err) : status;
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
//
// In a cluster a fold is made of what is here, if that is enough: its own record or inner nodes may be here without its parts.
// Only when one of those is missing all parts are brought here, and the fold is made again.

static void on_folded(void *user, const bkv_error_t *error, bkv_fold_result_t *result);

// On a thread of the cluster's: the parts are here, as far as there are any.
static void on_brought(void *user) {
    bkv_call_t *call = user;
    bkv_records_t *records = call->body;
    bkv_error_t error;
    bkv_status_t status = bkv_bring_result(records->brought, &error);
    if (status == BKV_OK) {
        status = bkv_fold_start(call->server->config.pipeline, &records->parts, on_folded, call, &error);
    }
    if (status != BKV_OK) {
        bkv_call_fail(call, &error);
    } // else on_folded may have ended the call already
}

// Whether the parts are worth looking for in the pool; then that has begun.
static bool bring_parts(bkv_call_t *call, bkv_status_t missing) {
    bkv_records_t *records = call->body;
    bool gone = missing == BKV_NOT_FOUND || missing == BKV_DATA_LOSS;
    if (call->server->config.cluster == NULL || records->brought != NULL || !gone) {
        return false;
    }
    const bkv_fold_args_t *parts = &records->parts;
    records->brought = bkv_bring_new(call->server, &parts->spec_id, parts->keys, parts->count);
    if (records->brought == NULL) {
        return false;
    }
    if (bkv_bring_start(records->brought, call->deadline_ms, on_brought, call)) {
        on_brought(call); // somebody else has brought them just now
    }
    return true;
}

// On a compute thread: hands the records over to be sent.
static void on_folded(void *user, const bkv_error_t *error, bkv_fold_result_t *result) {
    bkv_call_t *call = user;
    bkv_records_t *records = call->body;
    if (error->status != BKV_OK && bring_parts(call, error->status)) {
        return;
    }
    if (records->brought != NULL) {
        bkv_bring_used(records->brought);
    }
    if (error->status != BKV_OK) {
        bkv_call_fail(call, error);
        return;
    }
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
    bool alone = call->server->config.cluster == NULL;
    bkv_records_t *records = bkv_records_new(call, alone ? 0 : keyed.count);
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
    if (!alone) {
        memcpy(records->keys, keyed.keys, keyed.count * sizeof(records->keys[0]));
        records->parts = args;
        records->parts.keys = records->keys;
    }
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
