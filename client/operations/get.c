// get.c - Get and Fold: what they ask for. How records come in, and what is checked, is fetch.c's.
#include "client/operations/fetch.h"

#include <assert.h>
#include <stdlib.h>

// ---- Get ----

static void records_init(bkv_record_t *records, const bkv_key_t *keys, size_t count, bkv_status_t status) {
    for (size_t i = 0; i < count; i++) {
        records[i] = (bkv_record_t){.status = status};
        if (keys != NULL) {
            records[i].key = keys[i];
        }
    }
}

// NULL: out of memory, and every record says so.
static bkv_call_t *get_one(bkv_client_t *client, const bkv_spec_id_t *id, const bkv_key_t *keys, size_t count,
                           const bkv_range_t *range, uint32_t timeout_ms, bkv_record_t *records) {
    bkv_fetch_t *fetch = bkv_fetch_new(&bkv_fetch_get, client, id, timeout_ms, records, count);
    ProtobufCBinaryData *list = bkv_client_key_list(keys, count);
    records_init(records, keys, count, fetch != NULL && list != NULL ? BKV_OK : BKV_RESOURCE_EXHAUSTED);
    if (fetch == NULL || list == NULL) {
        free(list);
        bkv_call_free((bkv_call_t *)fetch);
        return NULL;
    }
    fetch->range = range != NULL ? *range : (bkv_range_t){0};
    fetch->room_bytes = bkv_client_spec_room(client, id, &fetch->range, count);
    fetch->call.places = true;
    fetch->call.place_bytes = fetch->room_bytes;
    Balancekv__V1__GetRequest request = BALANCEKV__V1__GET_REQUEST__INIT;
    request.spec_id = bkv_client_spec_bytes(id);
    request.n_keys = count;
    request.keys = list;
    request.first_layer = fetch->range.first_layer;
    request.layers = fetch->range.layers;
    request.first_head = fetch->range.first_head;
    request.heads = fetch->range.heads;
    fetch->call.request = bkv_client_pack(&request.base);
    free(list);
    return (bkv_call_t *)fetch;
}

// A Get in parts, each with records of its own.
typedef struct get_fan {
    bkv_fan_t fan; // first
    bkv_record_t *records;
    bkv_record_t *came; // those of the parts, one part after the other
} get_fan_t;

// The records go where they belong; the call's error is that of the first of all that is not there.
static void get_fan_finish(bkv_call_t *call) {
    get_fan_t *get = (get_fan_t *)call;
    const bkv_client_split_t *split = get->fan.split;
    bkv_fan_finish(&get->fan);
    bkv_record_t *came = get->came;
    size_t first = SIZE_MAX;
    for (size_t i = 0; i < split->count; i++) {
        const bkv_client_part_t *part = &split->parts[i];
        for (size_t j = 0; j < part->count; j++) {
            get->records[part->numbers[j]] = came[j];
            if (came[j].status != BKV_OK && part->numbers[j] < first) {
                first = part->numbers[j];
                call->error = get->fan.parts[i]->error; // of the part's first record that is not there, which is this one
            }
        }
        came += part->count;
    }
}

static void get_fan_clean(bkv_call_t *call) {
    bkv_fan_clean(call);
    free(((get_fan_t *)call)->came);
}

static const bkv_call_kind_t get_fan_kind = {
    .method = BKV_CLIENT_SERVICE "Get",
    .start = bkv_fan_start,
    .finish = get_fan_finish,
    .clean = get_fan_clean,
};

// Takes the split over, also where it fails.
static bkv_call_t *get_fan_new(bkv_client_t *client, const bkv_spec_id_t *id, size_t count, const bkv_range_t *range,
                               uint32_t timeout_ms, bkv_record_t *records, bkv_client_split_t *split) {
    get_fan_t *get = bkv_fan_new(sizeof *get, &get_fan_kind, client, id, timeout_ms, split);
    if (get == NULL) {
        free(split);
        return NULL;
    }
    get->records = records;
    get->came = calloc(count, sizeof *get->came);
    bool good = get->came != NULL;
    bkv_record_t *came = get->came;
    for (size_t i = 0; good && i < split->count; i++) {
        const bkv_client_part_t *part = &split->parts[i];
        bkv_call_t *call = get_one(client, id, part->keys, part->count, range, timeout_ms, came);
        good = call != NULL;
        if (good) {
            ((bkv_fetch_t *)call)->numbers = part->numbers;
            bkv_fan_set(&get->fan, i, call);
        }
        came += part->count;
    }
    if (!good) {
        bkv_call_free(&get->fan.call);
        return NULL;
    }
    return &get->fan.call;
}

static bkv_call_t *get_new(bkv_client_t *client, const bkv_spec_id_t *id, const bkv_key_t *keys, size_t count,
                           const bkv_range_t *range, uint32_t timeout_ms, bkv_record_t *records) {
    bkv_client_split_t *split = bkv_client_route_split(client, keys, count);
    bool parts = split != NULL && split->count > 1;
    bkv_call_t *call = parts ? get_fan_new(client, id, count, range, timeout_ms, records, split)
                             : get_one(client, id, keys, count, range, timeout_ms, records);
    if (parts) {
        records_init(records, keys, count, call != NULL ? BKV_OK : BKV_RESOURCE_EXHAUSTED);
        return call;
    }
    if (call != NULL && split != NULL) {
        bkv_client_route_to(call, &split->parts[0]);
    }
    free(split);
    return call;
}

bkv_status_t bkv_get(bkv_client_t *client, const bkv_spec_id_t *id, const bkv_key_t *keys, size_t count,
                     const bkv_range_t *range, uint32_t timeout_ms, bkv_record_t *records, bkv_error_t *err) {
    assert(client != NULL && id != NULL && ((keys != NULL && records != NULL) || count == 0));
    if (count == 0) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "keys: none given");
    }
    bkv_call_t *call = get_new(client, id, keys, count, range, timeout_ms, records);
    bkv_status_t status = bkv_call_run(call, err);
    bkv_call_free(call);
    return status;
}

bkv_status_t bkv_get_submit(bkv_queue_t *queue, uint64_t tag, const bkv_spec_id_t *id, const bkv_key_t *keys, size_t count,
                            const bkv_range_t *range, uint32_t timeout_ms, bkv_record_t *records) {
    assert(queue != NULL && id != NULL && ((keys != NULL && records != NULL) || count == 0));
    if (count == 0) {
        return BKV_INVALID_ARGUMENT;
    }
    bkv_call_t *call = get_new(bkv_queue_client(queue), id, keys, count, range, timeout_ms, records);
    bkv_status_t status = bkv_call_submit(call, queue, tag);
    if (status != BKV_OK) {
        records_init(records, keys, count, status);
    }
    return status;
}

// ---- Fold ----

static size_t fold_room(const bkv_fold_request_t *params) {
    return params->profile.count > 0 ? BKV_FOLD_RECORDS : 1;
}

// Room for what a fold will come to: its budget, or what its rates make of full blocks. Each record may need padding before it.
static uint64_t fold_bytes(bkv_client_t *client, const bkv_spec_id_t *id, size_t count, const bkv_fold_request_t *params) {
    uint64_t bytes = params->budget_bytes, all = count > 0 ? bkv_client_spec_bf16(client, id, count) : 0;
    uint32_t rate = params->rate;
    for (uint32_t i = 0; rate == 0 && i < params->profile.count; i++) {
        rate = params->profile.bands[params->profile.count - 1 - i].rate; // the oldest band has most tokens, by far
    }
    if (bytes == 0 && rate != 0) {
        bytes = all / rate;
    }
    return (bytes < BKV_FETCH_MOST ? bytes : BKV_FETCH_MOST) + 64 * fold_room(params);
}

static bkv_call_t *fold_new(bkv_client_t *client, const bkv_spec_id_t *id, const bkv_key_t *keys, size_t count,
                            const bkv_fold_request_t *params, uint32_t timeout_ms, bkv_record_t *records,
                            size_t *record_count) {
    bkv_fetch_t *fetch = bkv_fetch_new(&bkv_fetch_fold, client, id, timeout_ms, records, fold_room(params));
    ProtobufCBinaryData *list = bkv_client_key_list(keys, count);
    records_init(records, NULL, fold_room(params), fetch != NULL && list != NULL ? BKV_OK : BKV_RESOURCE_EXHAUSTED);
    *record_count = 0;
    if (fetch == NULL || list == NULL) {
        free(list);
        bkv_call_free((bkv_call_t *)fetch);
        return NULL;
    }
    fetch->folded = record_count;
    fetch->budget = params->budget_bytes != 0 && params->budget_bytes < BKV_FETCH_MOST ? params->budget_bytes : BKV_FETCH_MOST;
    fetch->room_bytes = fold_bytes(client, id, count, params);
    fetch->call.places = true;
    fetch->call.place_bytes = fetch->room_bytes;
    Balancekv__V1__Band bands[BKV_MAX_BANDS], *profile[BKV_MAX_BANDS];
    for (uint32_t i = 0; i < params->profile.count; i++) {
        balancekv__v1__band__init(&bands[i]);
        bands[i].age = params->profile.bands[i].age;
        bands[i].rate = params->profile.bands[i].rate;
        profile[i] = &bands[i];
    }
    Balancekv__V1__FoldRequest request = BALANCEKV__V1__FOLD_REQUEST__INIT;
    request.spec_id = bkv_client_spec_bytes(id);
    request.n_keys = count;
    request.keys = list;
    request.budget_bytes = params->budget_bytes;
    request.rate = params->rate;
    request.ttl_ms = params->ttl_ms;
    request.n_profile = params->profile.count;
    request.profile = profile;
    fetch->call.request = bkv_client_pack(&request.base);
    free(list);
    return (bkv_call_t *)fetch;
}

bkv_status_t bkv_fold_remote(bkv_client_t *client, const bkv_spec_id_t *id, const bkv_key_t *keys, size_t count,
                             const bkv_fold_request_t *params, uint32_t timeout_ms, bkv_record_t *records, size_t *record_count,
                             bkv_error_t *err) {
    assert(client != NULL && id != NULL && (keys != NULL || count == 0) && params != NULL && records != NULL &&
           record_count != NULL);
    *record_count = 0;
    bkv_status_t status = bkv_profile_check(&params->profile, err);
    if (status != BKV_OK) {
        return status;
    }
    bkv_call_t *call = fold_new(client, id, keys, count, params, timeout_ms, records, record_count);
    status = bkv_call_run(call, err);
    bkv_call_free(call);
    return status;
}

bkv_status_t bkv_fold_submit(bkv_queue_t *queue, uint64_t tag, const bkv_spec_id_t *id, const bkv_key_t *keys, size_t count,
                             const bkv_fold_request_t *params, uint32_t timeout_ms, bkv_record_t *records,
                             size_t *record_count) {
    assert(queue != NULL && id != NULL && (keys != NULL || count == 0) && params != NULL && records != NULL &&
           record_count != NULL);
    if (bkv_profile_check(&params->profile, NULL) != BKV_OK) {
        return BKV_INVALID_ARGUMENT;
    }
    bkv_call_t *call = fold_new(bkv_queue_client(queue), id, keys, count, params, timeout_ms, records, record_count);
    bkv_status_t status = bkv_call_submit(call, queue, tag);
    if (status != BKV_OK) {
        records_init(records, NULL, fold_room(params), status);
    }
    return status;
}
