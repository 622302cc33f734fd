// peer.c - the Peer service: who may call it, and what it answers on the spot: Have, Forget, Drain, and what Fetch asks for.
// Store is peer_store.c's, one-sided reads are peer_verbs.c's.
#include "daemon/rpc/peer.h"

#include "daemon/observe/clock.h"
#include "daemon/rpc/records.h"

#include "peer.pb-c.h"

#include <grpc/grpc_security.h>
#include <grpc/support/alloc.h>
#include <string.h>
#include <strings.h>

// ---- who calls ----

static bool given(const char *text) {
    return text != NULL && text[0] != '\0';
}

// DNS names are compared without regard to case (RFC 4343).
static bool is_name(const grpc_auth_property *property, const char *name) {
    return property->value_length == strlen(name) && strncasecmp(property->value, name, property->value_length) == 0;
}

// Whether the certificate that the caller has shown, and gRPC has verified, carries the DNS name. The list holds such names only:
// addresses and URIs, which a certificate may carry as well, are not taken for one.
static bool shows_name(const bkv_call_t *call, const char *name) {
    grpc_auth_context *context = grpc_call_auth_context(call->grpc);
    bool found = false;
    if (context != NULL && grpc_auth_context_peer_is_authenticated(context)) {
        grpc_auth_property_iterator names = grpc_auth_context_find_properties_by_name(context, GRPC_PEER_DNS_PROPERTY_NAME);
        for (const grpc_auth_property *one; !found && (one = grpc_auth_property_iterator_next(&names)) != NULL;) {
            found = is_name(one, name);
        }
    }
    if (context != NULL) {
        grpc_auth_context_release(context);
    }
    return found;
}

static bkv_status_t check_certificate(const bkv_call_t *call, bkv_error_t *err) {
    const bkv_server_config_t *config = &call->server->config;
    if (!given(config->tls_client_ca)) {
        return bkv_fail(err, BKV_PERMISSION_DENIED,
                        "listen.tls_client_ca: not set, so that no caller can show that it is a daemon of the cluster");
    }
    if (!given(config->peer_name)) {
        return bkv_fail(err, BKV_PERMISSION_DENIED, "cluster.peer_name: empty, no certificate is a peer's");
    }
    if (!shows_name(call, config->peer_name)) {
        return bkv_fail(err, BKV_PERMISSION_DENIED, "certificate: does not carry the DNS name %.64s of the cluster's daemons",
                        config->peer_name);
    }
    return BKV_OK;
}

bool bkv_call_is_peer(const bkv_call_t *call, bkv_error_t *err) {
    const bkv_server_config_t *config = &call->server->config;
    if (config->cluster == NULL) {
        bkv_fail(err, BKV_FAILED_PRECONDITION, "cluster.etcd: not set, this daemon runs alone");
        return false;
    }
    if (bkv_call_is_local(call)) {
        bkv_fail(err, BKV_PERMISSION_DENIED, "peer: the unix socket is for workers, daemons come by listen.tcp");
        return false;
    }
    return !given(config->tls_cert) || check_certificate(call, err) == BKV_OK; // plain TCP is only there if it was wanted
}

// gRPC names a caller "ipv4:127.0.0.1:1234" or "ipv6:%5B::1%5D:1234".
static bool is_of_this_host(const bkv_call_t *call) {
    static const char *const loopback[] = {"ipv4:127.", "ipv6:%5B::1%5D:", "ipv6:[::1]:", "ipv6:%5B::ffff:127.",
                                           "ipv6:[::ffff:127."};
    char *peer = grpc_call_get_peer(call->grpc);
    bool found = false;
    for (size_t i = 0; !found && i < sizeof(loopback) / sizeof(loopback[0]); i++) {
        found = strncmp(peer, loopback[i], strlen(loopback[i])) == 0;
    }
    gpr_free(peer);
    return found;
}

bool bkv_call_is_operator(const bkv_call_t *call, bkv_error_t *err) {
    if (bkv_call_is_local(call)) {
        return true;
    }
    if (given(call->server->config.tls_cert)) {
        return check_certificate(call, err) == BKV_OK;
    }
    if (!is_of_this_host(call)) {
        bkv_fail(err, BKV_PERMISSION_DENIED, "operator: only through the unix socket, or from this host where there is no TLS");
        return false;
    }
    return true;
}

// ---- requests ----

const ProtobufCMessage *bkv_peer_request(bkv_call_t *call, const ProtobufCMessageDescriptor *type, bkv_bump_t *bump) {
    bkv_error_t error;
    if (!bkv_call_is_peer(call, &error)) {
        bkv_call_fail(call, &error);
        return NULL;
    }
    return bkv_call_request(call, type, bump);
}

bkv_status_t bkv_peer_names(const bkv_server_t *server, const ProtobufCBinaryData *bytes, const bkv_name_t **names,
                            uint32_t *count, bkv_error_t *err) {
    _Static_assert(sizeof(bkv_name_t) == BKV_NAME_BYTES && _Alignof(bkv_name_t) == 1, "names may be read where they lie");
    const size_t found = bytes->len / BKV_NAME_BYTES;
    if (found == 0 || bytes->len % BKV_NAME_BYTES != 0) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "names: %zu bytes are not one or more names of %d bytes", bytes->len,
                        BKV_NAME_BYTES);
    }
    if (found > server->config.peer_batch) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "names: %zu are more than %u", found, server->config.peer_batch);
    }
    *names = (const bkv_name_t *)(const void *)bytes->data;
    *count = (uint32_t)found;
    return BKV_OK;
}

// Names of a request, with room in the bump for an answer of so many bytes for each. False: the call has been ended.
static bool get_names(bkv_call_t *call, bkv_bump_t *bump, const ProtobufCBinaryData *bytes, size_t answer_bytes,
                      const bkv_name_t **names, uint32_t *count, void **answers) {
    bkv_error_t error;
    bkv_status_t status = bkv_peer_names(call->server, bytes, names, count, &error);
    if (status == BKV_OK) {
        *answers = bkv_bump_alloc(bump, *count * answer_bytes);
        status = *answers != NULL ? BKV_OK : bkv_fail(&error, BKV_RESOURCE_EXHAUSTED, "request: no memory for its reply");
    }
    if (status != BKV_OK) {
        bkv_call_fail(call, &error);
    }
    return status == BKV_OK;
}

void bkv_handle_peer_have(bkv_call_t *call, bkv_bump_t *bump) {
    const Balancekv__Cluster__V1__HaveRequest *request = (const Balancekv__Cluster__V1__HaveRequest *)bkv_peer_request(
        call, &balancekv__cluster__v1__have_request__descriptor, bump);
    const bkv_name_t *names = NULL;
    uint32_t count = 0;
    void *answers;
    if (request == NULL || !get_names(call, bump, &request->names, sizeof(uint64_t), &names, &count, &answers)) {
        return;
    }
    uint64_t *bytes = answers;
    uint64_t now_ms = bkv_now_ms();
    for (uint32_t i = 0; i < count; i++) {
        bkv_record_header_t header;
        bytes[i] = 0;
        (void)bkv_store_peek(call->server->config.store, &names[i].spec_id, &names[i].key, now_ms, &header, &bytes[i]);
    }
    Balancekv__Cluster__V1__HaveResponse reply = BALANCEKV__CLUSTER__V1__HAVE_RESPONSE__INIT;
    reply.n_bytes = count;
    reply.bytes = bytes;
    reply.boot_epoch = call->server->config.boot_epoch;
    bkv_call_reply(call, &reply.base);
}

void bkv_handle_peer_fetch(bkv_call_t *call, bkv_bump_t *bump) {
    const Balancekv__Cluster__V1__FetchRequest *request = (const Balancekv__Cluster__V1__FetchRequest *)bkv_peer_request(
        call, &balancekv__cluster__v1__fetch_request__descriptor, bump);
    if (request == NULL) {
        return;
    }
    const bkv_name_t *names = NULL;
    uint32_t count = 0;
    bkv_error_t error;
    bkv_status_t status = bkv_peer_names(call->server, &request->names, &names, &count, &error);
    if (status == BKV_OK && bkv_records_new_names(call, names, count) == NULL) {
        status = bkv_fail(&error, BKV_RESOURCE_EXHAUSTED, "names: no memory for them");
    }
    if (status != BKV_OK) {
        bkv_call_fail(call, &error);
    } else {
        bkv_records_send(call);
    }
}

void bkv_handle_peer_forget(bkv_call_t *call, bkv_bump_t *bump) {
    const Balancekv__Cluster__V1__ForgetRequest *request = (const Balancekv__Cluster__V1__ForgetRequest *)bkv_peer_request(
        call, &balancekv__cluster__v1__forget_request__descriptor, bump);
    const bkv_name_t *names = NULL;
    uint32_t count = 0;
    void *answers;
    if (request == NULL || !get_names(call, bump, &request->names, sizeof(protobuf_c_boolean), &names, &count, &answers)) {
        return;
    }
    protobuf_c_boolean *had = answers;
    uint64_t now_ms = bkv_now_ms();
    for (uint32_t i = 0; i < count; i++) {
        had[i] = bkv_store_drop(call->server->config.store, &names[i].spec_id, &names[i].key, now_ms);
    }
    Balancekv__Cluster__V1__ForgetResponse reply = BALANCEKV__CLUSTER__V1__FORGET_RESPONSE__INIT;
    reply.n_had = count;
    reply.had = had;
    bkv_call_reply(call, &reply.base);
}

void bkv_handle_peer_drain(bkv_call_t *call, bkv_bump_t *bump) {
    const Balancekv__Cluster__V1__PeerDrainRequest *request =
        (const Balancekv__Cluster__V1__PeerDrainRequest *)bkv_peer_request(
            call, &balancekv__cluster__v1__peer_drain_request__descriptor, bump);
    if (request == NULL) {
        return;
    }
    if (request->ask && request->undo) {
        bkv_error_t error;
        bkv_fail(&error, BKV_INVALID_ARGUMENT, "undo: contradicts ask, which changes nothing");
        bkv_call_fail(call, &error);
        return;
    }
    bkv_drain_order_t order = request->ask ? BKV_DRAIN_ASK : request->undo ? BKV_DRAIN_UNDO : BKV_DRAIN_BEGIN;
    bkv_drain_progress_t progress = {0};
    bkv_cluster_drain_self(call->server->config.cluster, order, &progress);
    Balancekv__Cluster__V1__PeerDrainResponse reply = BALANCEKV__CLUSTER__V1__PEER_DRAIN_RESPONSE__INIT;
    reply.draining = progress.draining;
    reply.done = progress.done;
    reply.left_keys = progress.left_keys;
    reply.left_bytes = progress.left_bytes;
    reply.moved_keys = progress.moved_keys;
    reply.moved_bytes = progress.moved_bytes;
    reply.settled = progress.settled;
    bkv_call_reply(call, &reply.base);
}
