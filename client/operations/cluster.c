// cluster.c - what an operator asks of a cluster: its members, where blocks are, and to empty a member. Who routes by the same
// answer is route.c.
#include "client/client.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

// ---- an answer that is kept whole ----

// Every public structure of this file points into the response, which is kept for it.
typedef struct kept_call {
    bkv_call_t call; // first
    const ProtobufCMessageDescriptor *type;
    ProtobufCMessage *response;
} kept_call_t;

static void kept_clean(bkv_call_t *call) {
    kept_call_t *kept = (kept_call_t *)call;
    if (kept->response != NULL) {
        protobuf_c_message_free_unpacked(kept->response, NULL);
        kept->response = NULL;
    }
}

static bkv_status_t kept_take(bkv_call_t *call, grpc_byte_buffer *message, bkv_error_t *err) {
    kept_clean(call); // of an earlier attempt
    kept_call_t *kept = (kept_call_t *)call;
    kept->response = bkv_client_unpack(kept->type, message);
    if (kept->response == NULL) {
        return bkv_fail(err, BKV_INTERNAL, "%s: the response is not a %s", call->kind->method, kept->type->short_name);
    }
    return BKV_OK;
}

static const bkv_call_kind_t cluster_kind = {
    .method = BKV_CLIENT_SERVICE "Cluster",
    .shape = BKV_UNARY,
    .take = kept_take,
    .clean = kept_clean,
};

static const bkv_call_kind_t where_kind = {
    .method = BKV_CLIENT_SERVICE "Where",
    .shape = BKV_UNARY,
    .take = kept_take,
    .clean = kept_clean,
};

static const bkv_call_kind_t drain_kind = {
    .method = BKV_CLIENT_SERVICE "Drain",
    .shape = BKV_UNARY,
    .take = kept_take,
    .clean = kept_clean,
};

static kept_call_t *kept_new(const bkv_call_kind_t *kind, const ProtobufCMessageDescriptor *type, bkv_client_t *client,
                             uint32_t timeout_ms) {
    kept_call_t *kept = bkv_call_new(sizeof *kept, kind, client, NULL, timeout_ms);
    if (kept != NULL) {
        kept->type = type;
    }
    return kept;
}

// Runs it; *response is the caller's on BKV_OK. The call is gone.
static bkv_status_t kept_run(kept_call_t *kept, ProtobufCMessage **response, bkv_error_t *err) {
    bkv_status_t status = bkv_call_run((bkv_call_t *)kept, err);
    if (status == BKV_OK) {
        *response = kept->response;
        kept->response = NULL;
    }
    bkv_call_free((bkv_call_t *)kept);
    return status;
}

static bkv_status_t no_memory(bkv_error_t *err) {
    return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "client: out of memory");
}

// ---- Cluster ----

typedef struct cluster {
    bkv_cluster_info_t public; // first
    Balancekv__V1__ClusterResponse *response;
    bkv_cluster_node_t nodes[];
} cluster_t;

static bkv_cluster_node_t node_of(const Balancekv__V1__ClusterMember *member) {
    return (bkv_cluster_node_t){
        .id = member->id,
        .domain = member->domain,
        .version = member->version,
        .epoch = member->epoch,
        .address_count = member->n_addresses,
        .transport_count = member->n_transports,
        .addresses = (const char *const *)member->addresses,
        .transports = (const char *const *)member->transports,
        .capacity_bytes = member->capacity_bytes,
        .weight = member->weight,
        .draining = member->draining,
        .suspected = member->suspected,
        .latency_us = member->latency_us,
    };
}

static bkv_cluster_info_t info_of(const Balancekv__V1__ClusterResponse *response) {
    return (bkv_cluster_info_t){
        .name = response->name,
        .self = response->self,
        .state = response->state,
        .trouble = response->trouble,
        .view = response->view,
        .revision = response->revision,
        .seed = response->seed,
        .replicas = response->replicas,
        .repair = response->repair,
        .repair_left_keys = response->repair_left_keys,
        .repair_left_bytes = response->repair_left_bytes,
        .repaired_bytes = response->repaired_bytes,
        .boot_epoch = response->boot_epoch,
        .count = response->n_members,
    };
}

bkv_status_t bkv_cluster_get(bkv_client_t *client, uint32_t timeout_ms, bkv_cluster_info_t **info, bkv_error_t *err) {
    assert(client != NULL && info != NULL);
    ProtobufCMessage *message = NULL;
    bkv_status_t status =
        kept_run(kept_new(&cluster_kind, &balancekv__v1__cluster_response__descriptor, client, timeout_ms), &message, err);
    if (status != BKV_OK) {
        return status;
    }
    Balancekv__V1__ClusterResponse *response = (Balancekv__V1__ClusterResponse *)message;
    cluster_t *made = calloc(1, sizeof *made + response->n_members * sizeof made->nodes[0]);
    if (made == NULL) {
        protobuf_c_message_free_unpacked(message, NULL);
        return no_memory(err);
    }
    for (size_t i = 0; i < response->n_members; i++) {
        made->nodes[i] = node_of(response->members[i]);
    }
    made->response = response;
    made->public = info_of(response);
    made->public.nodes = made->nodes;
    *info = &made->public;
    return BKV_OK;
}

void bkv_cluster_free(bkv_cluster_info_t *info) {
    if (info != NULL) {
        balancekv__v1__cluster_response__free_unpacked(((cluster_t *)info)->response, NULL);
        free(info);
    }
}

// ---- Where ----

typedef struct where {
    bkv_where_t public; // first
    Balancekv__V1__WhereResponse *response;
    bkv_where_key_t keys[];
} where_t;

static bkv_status_t where_from(Balancekv__V1__WhereResponse *response, size_t count, bkv_where_t **where, bkv_error_t *err) {
    if (response->n_keys != count) {
        return bkv_fail(err, BKV_INTERNAL, "Where: %zu answers for %zu keys", response->n_keys, count);
    }
    where_t *made = calloc(1, sizeof *made + count * sizeof made->keys[0]);
    if (made == NULL) {
        return no_memory(err);
    }
    for (size_t i = 0; i < count; i++) {
        const Balancekv__V1__Whereabouts *key = response->keys[i];
        made->keys[i] = (bkv_where_key_t){
            .owner_count = key->n_owners,
            .holder_count = key->n_holders,
            .owners = (const char *const *)key->owners,
            .holders = (const char *const *)key->holders,
            .record_bytes = key->record_bytes,
        };
    }
    made->response = response;
    made->public = (bkv_where_t){.count = count, .keys = made->keys};
    *where = &made->public;
    return BKV_OK;
}

bkv_status_t bkv_where(bkv_client_t *client, const bkv_spec_id_t *id, const bkv_key_t *keys, size_t count, uint32_t timeout_ms,
                       bkv_where_t **where, bkv_error_t *err) {
    assert(client != NULL && (keys != NULL || count == 0) && where != NULL);
    if (count == 0) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "keys: none given");
    }
    kept_call_t *kept = kept_new(&where_kind, &balancekv__v1__where_response__descriptor, client, timeout_ms);
    ProtobufCBinaryData *list = bkv_client_key_list(keys, count);
    if (kept == NULL || list == NULL) {
        free(list);
        bkv_call_free((bkv_call_t *)kept);
        return no_memory(err);
    }
    Balancekv__V1__WhereRequest request = BALANCEKV__V1__WHERE_REQUEST__INIT;
    if (id != NULL) {
        request.spec_id = bkv_client_spec_bytes(id);
    }
    request.n_keys = count;
    request.keys = list;
    kept->call.request = bkv_client_pack(&request.base);
    free(list);
    ProtobufCMessage *message = NULL;
    bkv_status_t status = kept_run(kept, &message, err);
    if (status == BKV_OK) {
        status = where_from((Balancekv__V1__WhereResponse *)message, count, where, err);
        if (status != BKV_OK) {
            protobuf_c_message_free_unpacked(message, NULL);
        }
    }
    return status;
}

void bkv_where_free(bkv_where_t *where) {
    if (where != NULL) {
        balancekv__v1__where_response__free_unpacked(((where_t *)where)->response, NULL);
        free(where);
    }
}

// ---- Drain ----

bkv_status_t bkv_drain(bkv_client_t *client, const char *member, bkv_drain_step_t step, uint32_t timeout_ms,
                       bkv_drain_state_t *state, bkv_error_t *err) {
    assert(client != NULL);
    kept_call_t *kept = kept_new(&drain_kind, &balancekv__v1__drain_response__descriptor, client, timeout_ms);
    if (kept == NULL) {
        return no_memory(err);
    }
    Balancekv__V1__DrainRequest request = BALANCEKV__V1__DRAIN_REQUEST__INIT;
    request.member = (char *)(member != NULL ? member : ""); // packing only reads it
    request.undo = step == BKV_DRAIN_CLEAR;
    request.ask = step == BKV_DRAIN_LOOK;
    kept->call.request = bkv_client_pack(&request.base);
    ProtobufCMessage *message = NULL;
    bkv_status_t status = kept_run(kept, &message, err);
    if (status != BKV_OK) {
        return status;
    }
    const Balancekv__V1__DrainResponse *response = (const Balancekv__V1__DrainResponse *)message;
    if (state != NULL) {
        *state = (bkv_drain_state_t){
            .draining = response->draining,
            .done = response->done,
            .left_keys = response->left_keys,
            .left_bytes = response->left_bytes,
            .moved_keys = response->moved_keys,
            .moved_bytes = response->moved_bytes,
        };
    }
    protobuf_c_message_free_unpacked(message, NULL);
    return BKV_OK;
}
