// cluster.c - Cluster, Where and Drain: the pool as operators, and clients that route by key, want to see it.
#include "daemon/observe/clock.h"
#include "daemon/rpc/keyed.h"
#include "daemon/rpc/peer.h"

#include <stdlib.h>
#include <string.h>

// False: the call has been ended.
static bool in_cluster(bkv_call_t *call) {
    if (call->server->config.cluster != NULL) {
        return true;
    }
    bkv_error_t error;
    bkv_fail(&error, BKV_FAILED_PRECONDITION, "cluster.etcd: not set, this daemon runs alone");
    bkv_call_fail(call, &error);
    return false;
}

static void fail_memory(bkv_call_t *call) {
    bkv_error_t error;
    bkv_fail(&error, BKV_RESOURCE_EXHAUSTED, "request: no memory for its reply");
    bkv_call_fail(call, &error);
}

// ---- Cluster ----

// A member as a message that refers to `member`; NULL: no memory.
static Balancekv__V1__ClusterMember *member_message(bkv_bump_t *bump, bkv_member_t *member, const bkv_peer_health_t *health) {
    Balancekv__V1__ClusterMember *message = bkv_bump_alloc(bump, sizeof(*message));
    char **texts = bkv_bump_alloc(bump, (member->address_count + member->transport_count + 1) * sizeof(texts[0]));
    if (message == NULL || texts == NULL) {
        return NULL;
    }
    for (uint32_t i = 0; i < member->address_count; i++) {
        texts[i] = member->addresses[i];
    }
    for (uint32_t i = 0; i < member->transport_count; i++) {
        texts[member->address_count + i] = member->transports[i];
    }
    balancekv__v1__cluster_member__init(message);
    message->id = member->place.id;
    message->epoch = member->place.epoch;
    message->n_addresses = member->address_count;
    message->addresses = texts;
    message->n_transports = member->transport_count;
    message->transports = texts + member->address_count;
    message->capacity_bytes = member->capacity_bytes;
    message->weight = member->place.weight;
    message->domain = member->place.domain;
    message->draining = member->place.draining;
    message->version = member->version;
    message->latency_us = health->latency_us;
    message->suspected = health->suspected;
    return message;
}

static void reply_report(bkv_call_t *call, bkv_bump_t *bump, bkv_cluster_report_t *report) {
    static const char *const repair[] = {"idle", "waiting", "moving"};
    Balancekv__V1__ClusterResponse reply = BALANCEKV__V1__CLUSTER_RESPONSE__INIT;
    reply.members = bkv_bump_alloc(bump, (report->count + 1) * sizeof(reply.members[0]));
    for (uint32_t i = 0; reply.members != NULL && i < report->count; i++) {
        reply.members[i] = member_message(bump, &report->members[i], &report->health[i]);
        if (reply.members[i] == NULL) {
            reply.members = NULL;
        }
    }
    if (reply.members == NULL) {
        fail_memory(call);
        return;
    }
    reply.n_members = report->count;
    reply.name = (char *)(uintptr_t)report->name; // only read, as all of these
    reply.self = report->self;
    reply.state = (char *)(uintptr_t)bkv_membership_state_name(report->membership.state);
    reply.trouble = report->membership.trouble.status != BKV_OK ? report->membership.trouble.message : reply.trouble;
    reply.view = report->view;
    reply.revision = report->revision;
    reply.seed = report->seed;
    reply.replicas = report->replicas;
    reply.repair = (char *)(uintptr_t)repair[report->mover.state];
    reply.repair_left_keys = report->mover.left_keys;
    reply.repair_left_bytes = report->mover.left_bytes;
    reply.repaired_bytes = report->repaired_bytes;
    reply.boot_epoch = call->server->config.boot_epoch;
    bkv_call_reply(call, &reply.base);
}

void bkv_handle_cluster(bkv_call_t *call, bkv_bump_t *bump) {
    if (bkv_call_request(call, &balancekv__v1__cluster_request__descriptor, bump) == NULL || !in_cluster(call)) {
        return;
    }
    bkv_cluster_report_t report;
    bkv_error_t error;
    if (bkv_cluster_get_report(call->server->config.cluster, &report, &error) != BKV_OK) {
        bkv_call_fail(call, &error);
        return;
    }
    reply_report(call, bump, &report);
    bkv_cluster_report_free(&report);
}

// ---- Where ----

typedef struct where {
    uint32_t count;
    bkv_name_t *names;        // [count]
    bkv_whereabouts_t *where; // [count]
} where_t;

static void where_free(void *body) {
    where_t *where = body;
    free(where->names);
    free(where->where);
    free(where);
}

static where_t *where_new(bkv_call_t *call, uint32_t count) {
    where_t *where = calloc(1, sizeof(*where));
    if (where != NULL) {
        where->count = count;
        where->names = calloc(count, sizeof(where->names[0]));
        where->where = calloc(count, sizeof(where->where[0]));
        call->body = where;
        call->body_free = where_free;
    }
    return where != NULL && where->names != NULL && where->where != NULL ? where : NULL;
}

// What one key's answer needs.
typedef struct where_message {
    Balancekv__V1__Whereabouts message;
    char *owners[BKV_REPLICAS_MAX], *holders[BKV_REPLICAS_MAX + 1];
} where_message_t;

static void set_where(where_message_t *out, bkv_whereabouts_t *where) {
    balancekv__v1__whereabouts__init(&out->message);
    for (uint32_t i = 0; i < where->owner_count; i++) {
        out->owners[i] = where->owners[i];
    }
    for (uint32_t i = 0; i < where->holder_count; i++) {
        out->holders[i] = where->holders[i];
    }
    out->message.n_owners = where->owner_count;
    out->message.owners = out->owners;
    out->message.n_holders = where->holder_count;
    out->message.holders = out->holders;
    out->message.record_bytes = where->bytes;
}

static void on_where(void *user) {
    bkv_call_t *call = user;
    where_t *where = call->body;
    Balancekv__V1__WhereResponse reply = BALANCEKV__V1__WHERE_RESPONSE__INIT;
    where_message_t *messages = calloc(where->count, sizeof(*messages));
    Balancekv__V1__Whereabouts **keys = calloc(where->count, sizeof(*keys));
    if (messages == NULL || keys == NULL) {
        fail_memory(call);
    } else {
        for (uint32_t i = 0; i < where->count; i++) {
            set_where(&messages[i], &where->where[i]);
            keys[i] = &messages[i].message;
        }
        reply.n_keys = where->count;
        reply.keys = keys;
        reply.boot_epoch = call->server->config.boot_epoch;
        bkv_call_reply(call, &reply.base);
    }
    free(messages);
    free(keys);
}

// Specs need not be open here: a key's owners depend on the key alone.
static bkv_status_t where_begin(bkv_call_t *call, bkv_bump_t *bump, const Balancekv__V1__WhereRequest *request,
                                bkv_error_t *err) {
    bkv_spec_id_t spec_id = {{0}};
    if (request->n_keys == 0) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "keys: none");
    }
    bkv_status_t status = bkv_wire_check_keys(request->n_keys, request->keys, call->server->config.max_batch, err);
    if (status == BKV_OK && request->spec_id.len != 0) {
        status = bkv_wire_get_spec_id(&request->spec_id, &spec_id, err);
    }
    if (status != BKV_OK) {
        return status;
    }
    bkv_key_t *keys = bkv_bump_alloc(bump, request->n_keys * sizeof(keys[0]));
    where_t *where = where_new(call, (uint32_t)request->n_keys);
    if (keys == NULL || where == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "keys: no memory for them");
    }
    bkv_wire_get_keys(request->n_keys, request->keys, keys);
    for (uint32_t i = 0; i < where->count; i++) {
        where->names[i] = (bkv_name_t){.spec_id = spec_id, .key = keys[i]};
    }
    return BKV_OK;
}

void bkv_handle_where(bkv_call_t *call, bkv_bump_t *bump) {
    const Balancekv__V1__WhereRequest *request =
        (const Balancekv__V1__WhereRequest *)bkv_call_request(call, &balancekv__v1__where_request__descriptor, bump);
    if (request == NULL || !in_cluster(call)) {
        return;
    }
    bkv_error_t error;
    if (where_begin(call, bump, request, &error) != BKV_OK) {
        bkv_call_fail(call, &error);
        return;
    }
    const where_t *where = call->body;
    bkv_cluster_where(call->server->config.cluster, where->names, where->count, request->spec_id.len != 0, call->deadline_ms,
                      where->where, on_where, call);
}

// ---- Drain ----

static void on_drain(void *user, const bkv_error_t *error, const bkv_drain_progress_t *progress) {
    bkv_call_t *call = user;
    if (error->status != BKV_OK) {
        bkv_call_fail(call, error);
        return;
    }
    Balancekv__V1__DrainResponse reply = BALANCEKV__V1__DRAIN_RESPONSE__INIT;
    reply.draining = progress->draining;
    reply.done = progress->done;
    reply.left_keys = progress->left_keys;
    reply.left_bytes = progress->left_bytes;
    reply.moved_keys = progress->moved_keys;
    reply.moved_bytes = progress->moved_bytes;
    reply.boot_epoch = call->server->config.boot_epoch;
    bkv_call_reply(call, &reply.base);
}

void bkv_handle_drain(bkv_call_t *call, bkv_bump_t *bump) {
    const Balancekv__V1__DrainRequest *request =
        (const Balancekv__V1__DrainRequest *)bkv_call_request(call, &balancekv__v1__drain_request__descriptor, bump);
    if (request == NULL || !in_cluster(call)) {
        return;
    }
    bkv_error_t error;
    if (!bkv_call_is_operator(call, &error)) {
        bkv_call_fail(call, &error);
        return;
    }
    bkv_drain_order_t order = request->ask ? BKV_DRAIN_ASK : request->undo ? BKV_DRAIN_UNDO : BKV_DRAIN_BEGIN;
    bkv_cluster_drain(call->server->config.cluster, request->member, order, call->deadline_ms, on_drain, call);
}
