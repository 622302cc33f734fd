// lookup.c - Lookup: asked of one daemon, or where routes are known of each owner for its own blocks.
#include "client/client.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

// ---- from one daemon ----

typedef struct lookup_call {
    bkv_call_t call; // first
    size_t count;
    bool *resident; // NULL: not wanted
    size_t *prefix; // NULL: not wanted
} lookup_call_t;

static bkv_status_t lookup_take(bkv_call_t *call, grpc_byte_buffer *message, bkv_error_t *err) {
    lookup_call_t *lookup = (lookup_call_t *)call;
    Balancekv__V1__LookupResponse *response =
        (Balancekv__V1__LookupResponse *)bkv_client_unpack(&balancekv__v1__lookup_response__descriptor, message);
    if (response == NULL) {
        return bkv_fail(err, BKV_INTERNAL, "%s: the response is not a LookupResponse", call->kind->method);
    }
    bkv_status_t status = BKV_OK;
    if (response->n_states != lookup->count) {
        status = bkv_fail(err, BKV_INTERNAL, "Lookup: %zu states for %zu keys", response->n_states, lookup->count);
    } else {
        bkv_client_saw_epoch(call->client, call, response->boot_epoch);
        size_t prefix = 0;
        for (size_t i = 0; i < lookup->count; i++) {
            bool resident = response->states[i] == BALANCEKV__V1__KEY_STATE__KEY_RESIDENT;
            prefix += resident && prefix == i;
            if (lookup->resident != NULL) {
                lookup->resident[i] = resident;
            }
        }
        if (lookup->prefix != NULL) {
            *lookup->prefix = prefix;
        }
    }
    balancekv__v1__lookup_response__free_unpacked(response, NULL);
    return status;
}

static const bkv_call_kind_t lookup_kind = {
    .method = BKV_CLIENT_SERVICE "Lookup",
    .shape = BKV_UNARY,
    .names_spec = true,
    .take = lookup_take,
};

static bkv_call_t *lookup_one(bkv_client_t *client, const bkv_spec_id_t *id, const bkv_key_t *keys, size_t count,
                              uint32_t timeout_ms, bool *resident, size_t *prefix) {
    lookup_call_t *lookup = bkv_call_new(sizeof *lookup, &lookup_kind, client, id, timeout_ms);
    ProtobufCBinaryData *list = bkv_client_key_list(keys, count);
    if (lookup == NULL || list == NULL) {
        free(list);
        bkv_call_free((bkv_call_t *)lookup);
        return NULL;
    }
    lookup->count = count;
    lookup->resident = resident;
    lookup->prefix = prefix;
    Balancekv__V1__LookupRequest request = BALANCEKV__V1__LOOKUP_REQUEST__INIT;
    request.spec_id = bkv_client_spec_bytes(id);
    request.n_keys = count;
    request.keys = list;
    lookup->call.request = bkv_client_pack(&request.base);
    free(list);
    return (bkv_call_t *)lookup;
}

// ---- in parts, from the owners ----

typedef struct lookup_fan {
    bkv_fan_t fan; // first
    size_t count;
    bool *resident; // NULL: not wanted
    size_t *prefix; // NULL: not wanted
    bool *came;     // [count], one part after the other
    bool *all;      // [count], in order
} lookup_fan_t;

static void lookup_fan_finish(bkv_call_t *call) {
    lookup_fan_t *lookup = (lookup_fan_t *)call;
    const bkv_client_split_t *split = lookup->fan.split;
    bkv_fan_finish(&lookup->fan);
    if (call->error.status != BKV_OK) {
        return;
    }
    const bool *came = lookup->came;
    for (size_t i = 0; i < split->count; i++) {
        for (size_t j = 0; j < split->parts[i].count; j++) {
            lookup->all[split->parts[i].numbers[j]] = came[j];
        }
        came += split->parts[i].count;
    }
    size_t prefix = 0;
    while (prefix < lookup->count && lookup->all[prefix]) {
        prefix++;
    }
    if (lookup->resident != NULL) {
        memcpy(lookup->resident, lookup->all, lookup->count * sizeof *lookup->all);
    }
    if (lookup->prefix != NULL) {
        *lookup->prefix = prefix;
    }
}

static void lookup_fan_clean(bkv_call_t *call) {
    bkv_fan_clean(call);
    free(((lookup_fan_t *)call)->came);
}

static const bkv_call_kind_t lookup_fan_kind = {
    .method = BKV_CLIENT_SERVICE "Lookup",
    .start = bkv_fan_start,
    .finish = lookup_fan_finish,
    .clean = lookup_fan_clean,
};

// Takes the split over, also where it fails.
static bkv_call_t *lookup_fan_new(bkv_client_t *client, const bkv_spec_id_t *id, size_t count, uint32_t timeout_ms,
                                  bool *resident, size_t *prefix, bkv_client_split_t *split) {
    lookup_fan_t *lookup = bkv_fan_new(sizeof *lookup, &lookup_fan_kind, client, id, timeout_ms, split);
    if (lookup == NULL) {
        free(split);
        return NULL;
    }
    lookup->count = count;
    lookup->resident = resident;
    lookup->prefix = prefix;
    lookup->came = calloc(2 * count, sizeof *lookup->came);
    lookup->all = lookup->came != NULL ? lookup->came + count : NULL;
    bool good = lookup->came != NULL, *came = lookup->came;
    for (size_t i = 0; good && i < split->count; i++) {
        const bkv_client_part_t *part = &split->parts[i];
        bkv_call_t *call = lookup_one(client, id, part->keys, part->count, timeout_ms, came, NULL);
        good = call != NULL;
        if (good) {
            bkv_fan_set(&lookup->fan, i, call);
        }
        came += part->count;
    }
    if (!good) {
        bkv_call_free(&lookup->fan.call);
        return NULL;
    }
    return &lookup->fan.call;
}

// ---- the calls ----

static bkv_call_t *lookup_new(bkv_client_t *client, const bkv_spec_id_t *id, const bkv_key_t *keys, size_t count,
                              uint32_t timeout_ms, bool *resident, size_t *prefix) {
    bkv_client_split_t *split = bkv_client_route_split(client, keys, count);
    if (split != NULL && split->count > 1) {
        return lookup_fan_new(client, id, count, timeout_ms, resident, prefix, split);
    }
    bkv_call_t *call = lookup_one(client, id, keys, count, timeout_ms, resident, prefix);
    if (call != NULL && split != NULL) {
        bkv_client_route_to(call, &split->parts[0]);
    }
    free(split);
    return call;
}

bkv_status_t bkv_lookup(bkv_client_t *client, const bkv_spec_id_t *id, const bkv_key_t *keys, size_t count, uint32_t timeout_ms,
                        bool *resident, size_t *prefix, bkv_error_t *err) {
    assert(client != NULL && id != NULL && (keys != NULL || count == 0));
    if (count == 0) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "keys: none given");
    }
    bkv_call_t *call = lookup_new(client, id, keys, count, timeout_ms, resident, prefix);
    bkv_status_t status = bkv_call_run(call, err);
    bkv_call_free(call);
    return status;
}

bkv_status_t bkv_lookup_submit(bkv_queue_t *queue, uint64_t tag, const bkv_spec_id_t *id, const bkv_key_t *keys, size_t count,
                               uint32_t timeout_ms, bool *resident, size_t *prefix) {
    assert(queue != NULL && id != NULL && (keys != NULL || count == 0));
    if (count == 0) {
        return BKV_INVALID_ARGUMENT;
    }
    return bkv_call_submit(lookup_new(bkv_queue_client(queue), id, keys, count, timeout_ms, resident, prefix), queue, tag);
}
