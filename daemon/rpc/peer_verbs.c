// peer_verbs.c - one-sided reads, as other daemons ask for them: Link and Locate. What a link is, and what is held in place for it,
// knows cluster/peer/serve.c.
//
// Link registers memory and makes a queue pair, which takes milliseconds at least, so it runs on a compute thread. Locate is
// answered on the spot.
#include "daemon/observe/clock.h"
#include "daemon/rpc/peer.h"
#include "proto/verbs_window.h"

#include "peer.pb-c.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static bkv_status_t find_serve(const bkv_call_t *call, bkv_serve_t **serve, bkv_error_t *err) {
    *serve = bkv_cluster_serve(call->server->config.cluster);
    return *serve != NULL ? BKV_OK : bkv_fail(err, BKV_UNIMPLEMENTED, "transport.verbs: this daemon has no RDMA");
}

// ---- Link ----

typedef struct link {
    bkv_job_t job; // first: the pool knows only this
    bkv_call_t *call;
    bkv_serve_t *serve;
    bkv_verbs_end_t other;
    char member[BKV_MEMBER_NAME_MAX];
} link_t;

static void run_link(bkv_job_t *job, bkv_scratch_t *scratch) {
    (void)scratch;
    const link_t *link = (link_t *)job;
    bkv_link_id_t id;
    bkv_verbs_end_t own;
    bkv_error_t error;
    if (bkv_serve_link(link->serve, link->member, &link->other, bkv_now_ms(), &id, &own, &error) != BKV_OK) {
        bkv_call_fail(link->call, &error);
        return;
    }
    Balancekv__V1__VerbsWindow verbs;
    Balancekv__Cluster__V1__LinkResponse reply = BALANCEKV__CLUSTER__V1__LINK_RESPONSE__INIT;
    bkv_verbs_window_set(&own, &verbs);
    reply.verbs = &verbs;
    reply.link = (ProtobufCBinaryData){sizeof(id.bytes), id.bytes};
    bkv_call_reply(link->call, &reply.base);
}

static void cancel_link(bkv_job_t *job) {
    bkv_error_t error;
    bkv_fail(&error, BKV_CANCELLED, "the daemon stopped first");
    bkv_call_fail(((link_t *)job)->call, &error);
}

static bkv_status_t begin_link(bkv_call_t *call, const Balancekv__Cluster__V1__LinkRequest *request, bkv_error_t *err) {
    bkv_serve_t *serve;
    bkv_status_t status = find_serve(call, &serve, err);
    if (status != BKV_OK) {
        return status;
    }
    if (request->verbs == NULL) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "verbs: missing");
    }
    link_t *link = calloc(1, sizeof(*link));
    if (link == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for a link");
    }
    *link = (link_t){.job = {.run = run_link, .cancel = cancel_link}, .call = call, .serve = serve};
    call->body = link;
    call->body_free = free;
    int length = snprintf(link->member, sizeof(link->member), "%s", request->member);
    if (length < 0 || (size_t)length >= sizeof(link->member)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "member: longer than %zu bytes", sizeof(link->member) - 1);
    }
    status = bkv_verbs_window_get(request->verbs, &link->other, err);
    return status == BKV_OK ? bkv_pipeline_submit(call->server->config.pipeline, &link->job, err) : status;
}

void bkv_handle_peer_link(bkv_call_t *call, bkv_bump_t *bump) {
    const Balancekv__Cluster__V1__LinkRequest *request = (const Balancekv__Cluster__V1__LinkRequest *)bkv_peer_request(
        call, &balancekv__cluster__v1__link_request__descriptor, bump);
    if (request == NULL) {
        return;
    }
    bkv_error_t error;
    if (begin_link(call, request, &error) != BKV_OK) {
        bkv_call_fail(call, &error);
    } // else run_link may have ended the call already
}

// ---- Locate ----

// All of it in the bump, which the reply is packed from at once.
typedef struct answer {
    bkv_location_t *locations;
    Balancekv__Cluster__V1__Location *messages, **pointers;
} answer_t;

static bkv_status_t make_room(bkv_bump_t *bump, uint32_t count, answer_t *answer, bkv_error_t *err) {
    answer->locations = bkv_bump_alloc(bump, (count + 1) * sizeof(answer->locations[0])); // one more: never none
    answer->messages = bkv_bump_alloc(bump, (count + 1) * sizeof(answer->messages[0]));
    answer->pointers = bkv_bump_alloc(bump, (count + 1) * sizeof(answer->pointers[0]));
    if (answer->locations == NULL || answer->messages == NULL || answer->pointers == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "names: no memory for where %u are", count);
    }
    return BKV_OK;
}

static bkv_status_t get_locate(const bkv_call_t *call, const Balancekv__Cluster__V1__LocateRequest *request,
                               bkv_locate_t *locate, bkv_link_id_t *id, bkv_error_t *err) {
    if (request->link.len != sizeof(id->bytes)) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "link: %zu bytes instead of %zu", request->link.len, sizeof(id->bytes));
    }
    memcpy(id->bytes, request->link.data, sizeof(id->bytes));
    if (request->n_release > BKV_HOLDS_MAX) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "release: %zu holds are more than %d", request->n_release, BKV_HOLDS_MAX);
    }
    *locate = (bkv_locate_t){.release = request->release, .release_count = request->n_release};
    return request->names.len == 0 ? BKV_OK
                                   : bkv_peer_names(call->server, &request->names, &locate->names, &locate->count, err);
}

static void reply_locations(bkv_call_t *call, const answer_t *answer, uint32_t count, uint64_t hold) {
    for (uint32_t i = 0; i < count; i++) {
        const bkv_location_t *location = &answer->locations[i];
        Balancekv__Cluster__V1__Location *message = &answer->messages[i];
        balancekv__cluster__v1__location__init(message);
        message->offset = location->offset;
        message->bytes = location->bytes;
        message->tenant = location->tenant;
        message->ttl_ms = location->ttl_ms;
        answer->pointers[i] = message;
    }
    Balancekv__Cluster__V1__LocateResponse reply = BALANCEKV__CLUSTER__V1__LOCATE_RESPONSE__INIT;
    reply.n_locations = count;
    reply.locations = answer->pointers;
    reply.hold = hold;
    reply.hold_ms = BKV_SERVE_HOLD_MS;
    bkv_call_reply(call, &reply.base);
}

void bkv_handle_peer_locate(bkv_call_t *call, bkv_bump_t *bump) {
    const Balancekv__Cluster__V1__LocateRequest *request = (const Balancekv__Cluster__V1__LocateRequest *)bkv_peer_request(
        call, &balancekv__cluster__v1__locate_request__descriptor, bump);
    if (request == NULL) {
        return;
    }
    bkv_serve_t *serve;
    bkv_locate_t locate = {0};
    bkv_link_id_t id;
    answer_t answer = {0};
    uint64_t hold;
    bkv_error_t error;
    if (find_serve(call, &serve, &error) != BKV_OK || get_locate(call, request, &locate, &id, &error) != BKV_OK ||
        make_room(bump, locate.count, &answer, &error) != BKV_OK ||
        bkv_serve_locate(serve, &id, &locate, bkv_now_ms(), answer.locations, &hold, &error) != BKV_OK) {
        bkv_call_fail(call, &error);
        return;
    }
    reply_locations(call, &answer, locate.count, hold);
}
