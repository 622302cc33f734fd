// kv.c - the calls: what they ask for, and what of an answer is believed.
#include "daemon/cluster/etcd/internal.h"

#include "etcd.pb-c.h"

#include <stdlib.h>
#include <string.h>

#define TTL_MAX_S 1000000

static ProtobufCBinaryData as_bytes(bkv_etcd_text_t text) {
    return (ProtobufCBinaryData){.len = text.length, .data = (uint8_t *)text.bytes};
}

static bkv_etcd_text_t as_text(ProtobufCBinaryData bytes) {
    return (bkv_etcd_text_t){.bytes = bytes.data, .length = bytes.len};
}

static bkv_status_t check_key(bkv_etcd_text_t key, bkv_error_t *err) {
    return key.length > 0 && key.length <= BKV_ETCD_KEY_MAX
               ? BKV_OK
               : bkv_fail(err, BKV_INVALID_ARGUMENT, "key: %zu bytes, must be 1 to %d", key.length, BKV_ETCD_KEY_MAX);
}

static bkv_status_t check_pair(bkv_etcd_text_t key, bkv_etcd_text_t value, bkv_error_t *err) {
    bkv_status_t status = check_key(key, err);
    if (status == BKV_OK && value.length > BKV_ETCD_VALUE_MAX) {
        status = bkv_fail(err, BKV_INVALID_ARGUMENT, "value: %zu bytes, at most %d", value.length, BKV_ETCD_VALUE_MAX);
    }
    return status;
}

// ---- answers ----

static void tell(bkv_etcd_call_t *call, const bkv_error_t *error, const bkv_etcd_reply_t *reply) {
    if (error->status == BKV_OK && reply == NULL) {
        bkv_error_t fault;
        bkv_fail(&fault, BKV_INTERNAL, "etcd: the answer to %s lacks what it should have", call->kind->method);
        call->done(call->user, &fault, NULL);
    } else {
        call->done(call->user, error, error->status == BKV_OK ? reply : NULL);
    }
}

bool bkv_etcd_is_revision(int64_t revision) {
    return revision > 0 && revision < INT64_MAX;
}

// A header with a revision: without one an answer is none.
static bool has_header(const Etcdserverpb__ResponseHeader *header, bkv_etcd_reply_t *reply) {
    if (header == NULL || !bkv_etcd_is_revision(header->revision)) {
        return false;
    }
    reply->revision = header->revision;
    reply->cluster = header->cluster_id;
    return true;
}

static bool has_ttl(int64_t lease, int64_t ttl, const bkv_etcd_call_t *call, bkv_etcd_reply_t *reply) {
    if (lease != call->lease || ttl <= 0) {
        return false;
    }
    reply->lease = lease;
    reply->ttl_s = ttl < TTL_MAX_S ? (uint32_t)ttl : TTL_MAX_S;
    return true;
}

static void header_only_finish(bkv_etcd_call_t *call, const bkv_error_t *error, const ProtobufCMessage *response) {
    bkv_etcd_reply_t reply = {0};
    // PutResponse, DeleteRangeResponse and LeaseRevokeResponse begin alike.
    const Etcdserverpb__PutResponse *answer = (const Etcdserverpb__PutResponse *)response;
    tell(call, error, answer != NULL && has_header(answer->header, &reply) ? &reply : NULL);
}

static void list_finish(bkv_etcd_call_t *call, const bkv_error_t *error, const ProtobufCMessage *response) {
    const Etcdserverpb__RangeResponse *answer = (const Etcdserverpb__RangeResponse *)response;
    bkv_etcd_reply_t reply = {0};
    bkv_etcd_kv_t *kvs = NULL;
    bool good = answer != NULL && has_header(answer->header, &reply);
    if (good) {
        kvs = calloc(answer->n_kvs + 1, sizeof(*kvs));
        good = kvs != NULL;
    }
    for (size_t i = 0; good && i < answer->n_kvs; i++) {
        const Etcdserverpb__KeyValue *kv = answer->kvs[i];
        kvs[i] = (bkv_etcd_kv_t){
            .key = as_text(kv->key), .value = as_text(kv->value), .mod_revision = kv->mod_revision, .lease = kv->lease};
    }
    reply.kvs = kvs;
    reply.count = good ? answer->n_kvs : 0;
    reply.more = good && answer->more;
    tell(call, error, good ? &reply : NULL);
    free(kvs);
}

// What a swap found where it did not write.
static const Etcdserverpb__KeyValue *swap_found(const Etcdserverpb__TxnResponse *answer) {
    const Etcdserverpb__ResponseOp *op = answer->n_responses == 1 ? answer->responses[0] : NULL;
    bool is_range = op != NULL && op->response_case == ETCDSERVERPB__RESPONSE_OP__RESPONSE_RESPONSE_RANGE;
    const Etcdserverpb__RangeResponse *range = is_range ? op->response_range : NULL;
    return range != NULL && range->n_kvs == 1 ? range->kvs[0] : NULL;
}

static void swap_finish(bkv_etcd_call_t *call, const bkv_error_t *error, const ProtobufCMessage *response) {
    const Etcdserverpb__TxnResponse *answer = (const Etcdserverpb__TxnResponse *)response;
    bkv_etcd_reply_t reply = {0};
    bkv_etcd_kv_t there;
    bool good = answer != NULL && has_header(answer->header, &reply);
    const Etcdserverpb__KeyValue *found = good && !answer->succeeded ? swap_found(answer) : NULL;
    reply.succeeded = good && answer->succeeded;
    if (found != NULL) {
        there = (bkv_etcd_kv_t){.key = as_text(found->key),
                                .value = as_text(found->value),
                                .mod_revision = found->mod_revision,
                                .lease = found->lease};
        reply.kvs = &there;
        reply.count = 1;
    }
    tell(call, error, good ? &reply : NULL);
}

static void grant_finish(bkv_etcd_call_t *call, const bkv_error_t *error, const ProtobufCMessage *response) {
    const Etcdserverpb__LeaseGrantResponse *answer = (const Etcdserverpb__LeaseGrantResponse *)response;
    bkv_etcd_reply_t reply = {0};
    bool good = answer != NULL && has_header(answer->header, &reply) && has_ttl(answer->id, answer->ttl, call, &reply);
    tell(call, error, good ? &reply : NULL);
}

static void keep_finish(bkv_etcd_call_t *call, const bkv_error_t *error, const ProtobufCMessage *response) {
    const Etcdserverpb__LeaseKeepAliveResponse *answer = (const Etcdserverpb__LeaseKeepAliveResponse *)response;
    bkv_etcd_reply_t reply = {0};
    bkv_error_t gone;
    if (answer != NULL && answer->id == call->lease && answer->ttl <= 0) {
        bkv_fail(&gone, BKV_NOT_FOUND, "etcd: the lease has expired");
        tell(call, &gone, NULL);
        return;
    }
    bool good = answer != NULL && has_header(answer->header, &reply) && has_ttl(answer->id, answer->ttl, call, &reply);
    tell(call, error, good ? &reply : NULL);
}

// ---- leases ----

static const bkv_etcd_kind_t grant_kind = {
    .method = "/etcdserverpb.Lease/LeaseGrant",
    .response = &etcdserverpb__lease_grant_response__descriptor,
    .finish = grant_finish,
};

// One message on a stream that is closed behind it: a call like others, with a deadline and a next endpoint.
static const bkv_etcd_kind_t keep_kind = {
    .method = "/etcdserverpb.Lease/LeaseKeepAlive",
    .response = &etcdserverpb__lease_keep_alive_response__descriptor,
    .finish = keep_finish,
};

static const bkv_etcd_kind_t revoke_kind = {
    .method = "/etcdserverpb.Lease/LeaseRevoke",
    .response = &etcdserverpb__lease_revoke_response__descriptor,
    .finish = header_only_finish,
};

static bkv_status_t check_lease(int64_t lease, bkv_error_t *err) {
    return lease > 0 ? BKV_OK : bkv_fail(err, BKV_INVALID_ARGUMENT, "lease: must be above 0");
}

bkv_status_t bkv_etcd_grant(bkv_etcd_t *etcd, int64_t lease, uint32_t ttl_s, uint32_t timeout_ms, bkv_etcd_done_t done,
                            void *user, bkv_error_t *err) {
    Etcdserverpb__LeaseGrantRequest request = ETCDSERVERPB__LEASE_GRANT_REQUEST__INIT;
    request.id = lease;
    request.ttl = ttl_s;
    bkv_status_t status = check_lease(lease, err);
    if (status == BKV_OK && ttl_s == 0) {
        status = bkv_fail(err, BKV_INVALID_ARGUMENT, "ttl: must be above 0");
    }
    return status != BKV_OK ? status
                            : bkv_etcd_call_start(etcd, &grant_kind, &request.base, lease, timeout_ms, done, user, err);
}

bkv_status_t bkv_etcd_keep(bkv_etcd_t *etcd, int64_t lease, uint32_t timeout_ms, bkv_etcd_done_t done, void *user,
                           bkv_error_t *err) {
    Etcdserverpb__LeaseKeepAliveRequest request = ETCDSERVERPB__LEASE_KEEP_ALIVE_REQUEST__INIT;
    request.id = lease;
    bkv_status_t status = check_lease(lease, err);
    return status != BKV_OK ? status : bkv_etcd_call_start(etcd, &keep_kind, &request.base, lease, timeout_ms, done, user, err);
}

bkv_status_t bkv_etcd_revoke(bkv_etcd_t *etcd, int64_t lease, uint32_t timeout_ms, bkv_etcd_done_t done, void *user,
                             bkv_error_t *err) {
    Etcdserverpb__LeaseRevokeRequest request = ETCDSERVERPB__LEASE_REVOKE_REQUEST__INIT;
    request.id = lease;
    bkv_status_t status = check_lease(lease, err);
    return status != BKV_OK ? status
                            : bkv_etcd_call_start(etcd, &revoke_kind, &request.base, lease, timeout_ms, done, user, err);
}

// ---- keys ----

static const bkv_etcd_kind_t put_kind = {
    .method = "/etcdserverpb.KV/Put",
    .response = &etcdserverpb__put_response__descriptor,
    .finish = header_only_finish,
};

static const bkv_etcd_kind_t remove_kind = {
    .method = "/etcdserverpb.KV/DeleteRange",
    .response = &etcdserverpb__delete_range_response__descriptor,
    .finish = header_only_finish,
};

static const bkv_etcd_kind_t swap_kind = {
    .method = "/etcdserverpb.KV/Txn",
    .response = &etcdserverpb__txn_response__descriptor,
    .finish = swap_finish,
};

static const bkv_etcd_kind_t list_kind = {
    .method = "/etcdserverpb.KV/Range",
    .response = &etcdserverpb__range_response__descriptor,
    .finish = list_finish,
};

bkv_status_t bkv_etcd_put(bkv_etcd_t *etcd, bkv_etcd_text_t key, bkv_etcd_text_t value, int64_t lease, uint32_t timeout_ms,
                          bkv_etcd_done_t done, void *user, bkv_error_t *err) {
    Etcdserverpb__PutRequest request = ETCDSERVERPB__PUT_REQUEST__INIT;
    request.key = as_bytes(key);
    request.value = as_bytes(value);
    request.lease = lease;
    bkv_status_t status = check_pair(key, value, err);
    return status != BKV_OK ? status : bkv_etcd_call_start(etcd, &put_kind, &request.base, lease, timeout_ms, done, user, err);
}

bkv_status_t bkv_etcd_remove(bkv_etcd_t *etcd, bkv_etcd_text_t key, uint32_t timeout_ms, bkv_etcd_done_t done, void *user,
                             bkv_error_t *err) {
    Etcdserverpb__DeleteRangeRequest request = ETCDSERVERPB__DELETE_RANGE_REQUEST__INIT;
    request.key = as_bytes(key);
    bkv_status_t status = check_key(key, err);
    return status != BKV_OK ? status : bkv_etcd_call_start(etcd, &remove_kind, &request.base, 0, timeout_ms, done, user, err);
}

bkv_status_t bkv_etcd_swap(bkv_etcd_t *etcd, bkv_etcd_text_t key, int64_t expected, bkv_etcd_text_t value, int64_t lease,
                           uint32_t timeout_ms, bkv_etcd_done_t done, void *user, bkv_error_t *err) {
    bkv_status_t status = check_pair(key, value, err);
    if (status != BKV_OK) {
        return status;
    }
    Etcdserverpb__Compare compare = ETCDSERVERPB__COMPARE__INIT, *compares[] = {&compare};
    compare.target = ETCDSERVERPB__COMPARE__COMPARE_TARGET__MOD;
    compare.target_union_case = ETCDSERVERPB__COMPARE__TARGET_UNION_MOD_REVISION;
    compare.mod_revision = expected;
    compare.key = as_bytes(key);
    Etcdserverpb__PutRequest put = ETCDSERVERPB__PUT_REQUEST__INIT;
    put.key = as_bytes(key);
    put.value = as_bytes(value);
    put.lease = lease;
    Etcdserverpb__RangeRequest range = ETCDSERVERPB__RANGE_REQUEST__INIT;
    range.key = as_bytes(key);
    Etcdserverpb__RequestOp write = ETCDSERVERPB__REQUEST_OP__INIT, *success[] = {&write};
    write.request_case = ETCDSERVERPB__REQUEST_OP__REQUEST_REQUEST_PUT;
    write.request_put = &put;
    Etcdserverpb__RequestOp look = ETCDSERVERPB__REQUEST_OP__INIT, *failure[] = {&look};
    look.request_case = ETCDSERVERPB__REQUEST_OP__REQUEST_REQUEST_RANGE;
    look.request_range = &range;
    Etcdserverpb__TxnRequest request = ETCDSERVERPB__TXN_REQUEST__INIT;
    request.n_compare = request.n_success = request.n_failure = 1;
    request.compare = compares;
    request.success = success;
    request.failure = failure;
    return bkv_etcd_call_start(etcd, &swap_kind, &request.base, lease, timeout_ms, done, user, err);
}

size_t bkv_etcd_prefix_end(bkv_etcd_text_t prefix, uint8_t end[BKV_ETCD_KEY_MAX]) {
    size_t length = prefix.length;
    memcpy(end, prefix.bytes, length);
    while (length > 0 && end[length - 1] == 0xff) {
        length--;
    }
    if (length == 0) {
        end[0] = 0;
        return 1;
    }
    end[length - 1]++;
    return length;
}

bkv_status_t bkv_etcd_list(bkv_etcd_t *etcd, bkv_etcd_text_t prefix, bkv_etcd_text_t after, int64_t revision, uint32_t limit,
                           uint32_t timeout_ms, bkv_etcd_done_t done, void *user, bkv_error_t *err) {
    uint8_t from[BKV_ETCD_KEY_MAX + 1], end[BKV_ETCD_KEY_MAX];
    bkv_status_t status = check_key(prefix, err);
    if (status == BKV_OK && after.length > 0) {
        status = check_key(after, err);
    }
    if (status != BKV_OK) {
        return status;
    }
    Etcdserverpb__RangeRequest request = ETCDSERVERPB__RANGE_REQUEST__INIT;
    request.key = as_bytes(prefix);
    if (after.length > 0) { // the very next key
        memcpy(from, after.bytes, after.length);
        from[after.length] = 0;
        request.key = (ProtobufCBinaryData){.data = from, .len = after.length + 1};
    }
    request.range_end = (ProtobufCBinaryData){.data = end, .len = bkv_etcd_prefix_end(prefix, end)};
    request.revision = revision;
    request.limit = limit;
    return bkv_etcd_call_start(etcd, &list_kind, &request.base, 0, timeout_ms, done, user, err);
}
