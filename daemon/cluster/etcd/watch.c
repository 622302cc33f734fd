// watch.c - keeps a watcher informed: a listing in pages, then a stream of changes from the revision of the listing on.
//
//     listing -> streaming -> (stream lost) pause -> streaming from the last revision seen
//        ^                        |
//        +------------------------+ what happened meanwhile was compacted, or this is another etcd, or it will not say why
//
// A stream that brings nothing may be quiet or dead: every now and then etcd is asked for its progress, and one that does not
// answer is left for the next endpoint. Progress is not taken for a revision to resume from: releases of etcd announce it
// before events that come before it.
#include "daemon/cluster/etcd/internal.h"

#include "daemon/observe/clock.h"
#include "etcd.pb-c.h"

#include <assert.h>
#include <grpc/byte_buffer.h>
#include <stdlib.h>
#include <string.h>

#define PAGE        256
#define LIST_MS     5000
#define PROGRESS_MS 2000
#define SILENT_MS   5000 // without an answer

// One gRPC stream. It lives until its batches are back; its watch may have left it before that.
typedef struct stream {
    bkv_etcd_t *etcd;
    bkv_etcd_watch_t *watch; // NULL: it has left
    uint32_t endpoint;
    grpc_call *grpc;
    bkv_batch_tag_t send_tag, receive_tag, status_tag;
    uint32_t pending; // batches that are not back
    bool sending;
    uint64_t heard_ms; // when something was last received
    grpc_byte_buffer *sent, *received;
    grpc_metadata metadata[BKV_ETCD_METADATA];
    size_t metadata_count;
    grpc_metadata_array initial, trailing;
    grpc_status_code code;
    grpc_slice details;
} stream_t;

struct bkv_etcd_watch {
    bkv_etcd_t *etcd;
    const bkv_etcd_watcher_t *watcher;
    void *user;
    uint8_t prefix[BKV_ETCD_KEY_MAX];
    size_t prefix_length;
    int64_t revision; // up to which the watcher knows all; 0: it must be listed
    uint64_t cluster; // the etcd of that revision
    bool listing;     // a page is on its way
    bool dead;        // destroyed; freed when that page is there
    bool lost;        // the watcher has been told
    int64_t list_revision;
    uint32_t listed;
    stream_t *stream;       // NULL: none
    bkv_etcd_timer_t timer; // of the next try, or the next question about progress
    uint32_t failures;      // in a row
    bkv_etcd_watch_t *next;
};

static void watch_go_on(void *user);

static bkv_etcd_text_t prefix_of(const bkv_etcd_watch_t *watch) {
    return (bkv_etcd_text_t){.bytes = watch->prefix, .length = watch->prefix_length};
}

static bool is_under(const bkv_etcd_watch_t *watch, const void *key, size_t length) {
    return length > watch->prefix_length && length <= BKV_ETCD_KEY_MAX && memcmp(key, watch->prefix, watch->prefix_length) == 0;
}

// ---- losing and regaining ----

// Leaves the stream, which ends by itself.
static void stream_leave(bkv_etcd_watch_t *watch) {
    if (watch->stream != NULL) {
        watch->stream->watch = NULL;
        grpc_call_cancel(watch->stream->grpc, NULL);
        watch->stream = NULL;
    }
}

static void watch_lost(bkv_etcd_watch_t *watch, const bkv_error_t *error) {
    stream_leave(watch);
    if (!watch->lost) {
        watch->lost = true;
        watch->watcher->lost(watch->user, error);
    }
    uint64_t pause_ms = bkv_etcd_pause_ms(watch->etcd, ++watch->failures);
    bkv_etcd_timer_start(watch->etcd, &watch->timer, pause_ms, watch_go_on, watch);
}

static void watch_synced(bkv_etcd_watch_t *watch) {
    watch->lost = false;
    watch->watcher->synced(watch->user, watch->revision);
}

// There is no way on from the revision: begin with a listing.
static void watch_relist(bkv_etcd_watch_t *watch) {
    stream_leave(watch);
    watch->revision = 0;
    bkv_etcd_timer_start(watch->etcd, &watch->timer, bkv_etcd_pause_ms(watch->etcd, ++watch->failures), watch_go_on, watch);
}

// The endpoint of a stream has failed.
static void watch_stream_failed(bkv_etcd_watch_t *watch, const bkv_error_t *error) {
    uint32_t endpoint = watch->stream->endpoint;
    watch_lost(watch, error);
    bkv_etcd_endpoint_failed(watch->etcd, endpoint);
}

void bkv_etcd_watches_move(bkv_etcd_t *etcd, uint32_t endpoint) {
    bkv_error_t error;
    bkv_fail(&error, BKV_BUSY, "etcd: %s does not answer", etcd->endpoints[endpoint]);
    for (bkv_etcd_watch_t *watch = etcd->watches; watch != NULL; watch = watch->next) {
        if (watch->stream != NULL && watch->stream->endpoint == endpoint) {
            watch_lost(watch, &error);
        }
    }
}

// ---- the listing ----

static void page_ask(bkv_etcd_watch_t *watch, bkv_etcd_text_t after);

static bool page_take(bkv_etcd_watch_t *watch, const bkv_etcd_reply_t *reply, bkv_error_t *fault) {
    if (watch->list_revision == 0) {
        watch->list_revision = reply->revision;
        watch->cluster = reply->cluster;
        watch->watcher->reset(watch->user);
    }
    for (size_t i = 0; i < reply->count; i++) {
        if (!is_under(watch, reply->kvs[i].key.bytes, reply->kvs[i].key.length)) {
            bkv_fail(fault, BKV_INTERNAL, "etcd: a listing has keys that were not asked for");
            return false;
        }
        if (++watch->listed > BKV_ETCD_LIST_MAX) {
            bkv_fail(fault, BKV_RESOURCE_EXHAUSTED, "etcd: more than %d keys under the prefix", BKV_ETCD_LIST_MAX);
            return false;
        }
        watch->watcher->put(watch->user, &reply->kvs[i]);
    }
    return true;
}

static void page_done(void *user, const bkv_error_t *error, const bkv_etcd_reply_t *reply) {
    bkv_etcd_watch_t *watch = user;
    bkv_error_t fault = *error;
    watch->listing = false;
    if (watch->dead) {
        free(watch);
    } else if (reply == NULL || !page_take(watch, reply, &fault)) {
        watch_lost(watch, &fault);
    } else if (reply->more && reply->count > 0) {
        page_ask(watch, reply->kvs[reply->count - 1].key);
    } else {
        watch->revision = watch->list_revision;
        watch_synced(watch);
        bkv_etcd_timer_start(watch->etcd, &watch->timer, 0, watch_go_on, watch);
    }
}

static void page_ask(bkv_etcd_watch_t *watch, bkv_etcd_text_t after) {
    bkv_error_t error;
    watch->listing = true;
    if (bkv_etcd_list(watch->etcd, prefix_of(watch), after, watch->list_revision, PAGE, LIST_MS, page_done, watch, &error) !=
        BKV_OK) {
        watch->listing = false;
        watch_lost(watch, &error);
    }
}

// ---- what a stream brings ----

static void event_take(bkv_etcd_watch_t *watch, const Etcdserverpb__Event *event) {
    const Etcdserverpb__KeyValue *kv = event->kv;
    bkv_etcd_text_t key = {.bytes = kv->key.data, .length = kv->key.len};
    if (event->type == ETCDSERVERPB__EVENT__EVENT_TYPE__DELETE) {
        watch->watcher->removed(watch->user, key, kv->mod_revision);
    } else {
        const bkv_etcd_kv_t put = {.key = key,
                                   .value = {.bytes = kv->value.data, .length = kv->value.len},
                                   .mod_revision = kv->mod_revision,
                                   .lease = kv->lease};
        watch->watcher->put(watch->user, &put);
    }
}

static bool is_new(const bkv_etcd_watch_t *watch, const Etcdserverpb__KeyValue *kv) {
    return kv->mod_revision > watch->revision && bkv_etcd_is_revision(kv->mod_revision) &&
           is_under(watch, kv->key.data, kv->key.len);
}

// The events of a message; several may be of one revision, but a revision is never in two messages.
static void events_take(bkv_etcd_watch_t *watch, const Etcdserverpb__WatchResponse *response) {
    int64_t last = watch->revision;
    for (size_t i = 0; i < response->n_events; i++) {
        const Etcdserverpb__Event *event = response->events[i];
        const Etcdserverpb__KeyValue *kv = event->kv;
        if (kv != NULL && is_new(watch, kv)) {
            event_take(watch, event);
            last = kv->mod_revision > last ? kv->mod_revision : last;
        }
    }
    if (last > watch->revision) {
        watch->revision = last;
        watch_synced(watch);
    }
}

static void response_take(bkv_etcd_watch_t *watch, const Etcdserverpb__WatchResponse *response) {
    const Etcdserverpb__ResponseHeader *header = response->header;
    bool other = header == NULL || header->cluster_id != watch->cluster;
    // An etcd that has lost its data counts from 1 again, and would be silent until it comes to where it was.
    bool behind = response->created && header != NULL && header->revision < watch->revision;
    if (other || behind || response->canceled || response->compact_revision != 0) {
        watch_relist(watch);
        return;
    }
    if (response->created && watch->lost) {
        watch_synced(watch);
    }
    watch->failures = 0;
    events_take(watch, response);
}

void bkv_etcd_watch_take(bkv_etcd_watch_t *watch, grpc_byte_buffer *message) {
    Etcdserverpb__WatchResponse *response =
        (Etcdserverpb__WatchResponse *)bkv_etcd_unpack(&etcdserverpb__watch_response__descriptor, message);
    if (response != NULL) {
        response_take(watch, response);
        etcdserverpb__watch_response__free_unpacked(response, NULL);
    } else {
        watch_relist(watch);
    }
}

// ---- the stream ----

static void stream_free(stream_t *stream) {
    stream->etcd->attempt_count--;
    grpc_call_unref(stream->grpc);
    grpc_byte_buffer_destroy(stream->sent);
    grpc_byte_buffer_destroy(stream->received);
    bkv_etcd_metadata_free(stream->metadata, stream->metadata_count);
    grpc_metadata_array_destroy(&stream->initial);
    grpc_metadata_array_destroy(&stream->trailing);
    grpc_slice_unref(stream->details);
    free(stream);
}

static void stream_batch_back(stream_t *stream) {
    if (--stream->pending == 0) {
        stream_free(stream);
    }
}

static void stream_batch(stream_t *stream, const grpc_op *ops, size_t count, bkv_batch_tag_t *tag) {
    stream->pending++;
    bkv_batch_start(stream->grpc, ops, count, tag);
}

static void on_sent(void *self, bool ok) {
    (void)ok; // the status says it
    stream_t *stream = self;
    stream->sending = false;
    stream_batch_back(stream);
}

static void stream_receive(stream_t *stream) {
    grpc_op op = {.op = GRPC_OP_RECV_MESSAGE, .data.recv_message.recv_message = &stream->received};
    stream_batch(stream, &op, 1, &stream->receive_tag);
}

static void on_received(void *self, bool ok) {
    stream_t *stream = self;
    if (ok && stream->received != NULL && stream->watch != NULL) {
        stream->heard_ms = bkv_now_ms();
        bkv_etcd_watch_take(stream->watch, stream->received);
        grpc_byte_buffer_destroy(stream->received);
        stream->received = NULL;
        if (stream->watch != NULL) {
            stream_receive(stream);
        }
    }
    stream_batch_back(stream);
}

static void on_status(void *self, bool ok) {
    (void)ok;
    stream_t *stream = self;
    if (stream->watch != NULL) {
        bkv_error_t error;
        bkv_etcd_judge(stream->code, stream->details, &error);
        if (stream->code == GRPC_STATUS_OK) {
            bkv_fail(&error, BKV_BUSY, "etcd: %s has ended the watch", stream->etcd->endpoints[stream->endpoint]);
        }
        watch_stream_failed(stream->watch, &error);
    }
    stream_batch_back(stream);
}

static void stream_send(stream_t *stream, const Etcdserverpb__WatchRequest *request, bool first) {
    grpc_op ops[2];
    memset(ops, 0, sizeof(ops));
    grpc_byte_buffer_destroy(stream->sent);
    stream->sent = bkv_etcd_pack(&request->base);
    stream->sending = true;
    ops[0].op = GRPC_OP_SEND_MESSAGE;
    ops[0].data.send_message.send_message = stream->sent;
    ops[1].op = GRPC_OP_SEND_INITIAL_METADATA;
    ops[1].data.send_initial_metadata.metadata = stream->metadata;
    ops[1].data.send_initial_metadata.count = stream->metadata_count;
    stream_batch(stream, ops, first ? 2 : 1, &stream->send_tag);
}

static stream_t *stream_new(bkv_etcd_watch_t *watch) {
    bkv_etcd_t *etcd = watch->etcd;
    stream_t *stream = calloc(1, sizeof(*stream));
    if (stream == NULL) {
        return NULL;
    }
    *stream = (stream_t){
        .etcd = etcd,
        .watch = watch,
        .endpoint = etcd->current,
        .send_tag = {.run = on_sent, .owner = stream},
        .receive_tag = {.run = on_received, .owner = stream},
        .status_tag = {.run = on_status, .owner = stream},
        .heard_ms = bkv_now_ms(),
        .code = GRPC_STATUS_UNKNOWN,
        .details = grpc_empty_slice(),
    };
    stream->grpc = grpc_channel_create_call(etcd->channels[etcd->current], NULL, GRPC_PROPAGATE_DEFAULTS, etcd->completions,
                                            grpc_slice_from_static_string("/etcdserverpb.Watch/Watch"), NULL,
                                            gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
    stream->metadata_count = bkv_etcd_metadata(etcd, stream->metadata);
    grpc_metadata_array_init(&stream->initial);
    grpc_metadata_array_init(&stream->trailing);
    etcd->attempt_count++;
    return stream;
}

static void stream_start(bkv_etcd_watch_t *watch) {
    bkv_error_t error;
    stream_t *stream = watch->stream = stream_new(watch);
    if (stream == NULL) {
        bkv_fail(&error, BKV_RESOURCE_EXHAUSTED, "etcd: out of memory");
        watch_lost(watch, &error);
        return;
    }
    uint8_t end[BKV_ETCD_KEY_MAX];
    Etcdserverpb__WatchCreateRequest create = ETCDSERVERPB__WATCH_CREATE_REQUEST__INIT;
    create.key = (ProtobufCBinaryData){.data = watch->prefix, .len = watch->prefix_length};
    create.range_end = (ProtobufCBinaryData){.data = end, .len = bkv_etcd_prefix_end(prefix_of(watch), end)};
    create.start_revision = watch->revision + 1;
    Etcdserverpb__WatchRequest request = ETCDSERVERPB__WATCH_REQUEST__INIT;
    request.request_union_case = ETCDSERVERPB__WATCH_REQUEST__REQUEST_UNION_CREATE_REQUEST;
    request.create_request = &create;
    stream_send(stream, &request, true);
    grpc_op ops[2];
    memset(ops, 0, sizeof(ops));
    ops[0].op = GRPC_OP_RECV_INITIAL_METADATA;
    ops[0].data.recv_initial_metadata.recv_initial_metadata = &stream->initial;
    ops[1].op = GRPC_OP_RECV_MESSAGE;
    ops[1].data.recv_message.recv_message = &stream->received;
    stream_batch(stream, ops, 2, &stream->receive_tag);
    grpc_op op = {.op = GRPC_OP_RECV_STATUS_ON_CLIENT};
    op.data.recv_status_on_client.trailing_metadata = &stream->trailing;
    op.data.recv_status_on_client.status = &stream->code;
    op.data.recv_status_on_client.status_details = &stream->details;
    stream_batch(stream, &op, 1, &stream->status_tag);
    bkv_etcd_timer_start(watch->etcd, &watch->timer, PROGRESS_MS, watch_go_on, watch);
}

static void stream_check(bkv_etcd_watch_t *watch) {
    stream_t *stream = watch->stream;
    if (bkv_now_ms() - stream->heard_ms > SILENT_MS) {
        bkv_error_t error;
        bkv_fail(&error, BKV_BUSY, "etcd: %s has been silent for %d ms", watch->etcd->endpoints[stream->endpoint], SILENT_MS);
        watch_stream_failed(watch, &error);
        return;
    }
    if (!stream->sending) {
        Etcdserverpb__WatchProgressRequest progress = ETCDSERVERPB__WATCH_PROGRESS_REQUEST__INIT;
        Etcdserverpb__WatchRequest request = ETCDSERVERPB__WATCH_REQUEST__INIT;
        request.request_union_case = ETCDSERVERPB__WATCH_REQUEST__REQUEST_UNION_PROGRESS_REQUEST;
        request.progress_request = &progress;
        stream_send(stream, &request, false);
    }
    bkv_etcd_timer_start(watch->etcd, &watch->timer, PROGRESS_MS, watch_go_on, watch);
}

// ---- the watch ----

static void watch_go_on(void *user) {
    bkv_etcd_watch_t *watch = user;
    if (watch->stream != NULL) {
        stream_check(watch);
    } else if (watch->revision != 0) {
        stream_start(watch);
    } else if (!watch->listing) {
        watch->list_revision = 0;
        watch->listed = 0;
        page_ask(watch, (bkv_etcd_text_t){.length = 0});
    }
}

bkv_status_t bkv_etcd_watch_create(bkv_etcd_t *etcd, bkv_etcd_text_t prefix, const bkv_etcd_watcher_t *watcher, void *user,
                                   bkv_etcd_watch_t **watch, bkv_error_t *err) {
    assert(bkv_etcd_is_own_thread(etcd));
    if (prefix.length == 0 || prefix.length > BKV_ETCD_KEY_MAX / 2) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "prefix: %zu bytes, must be 1 to %d", prefix.length, BKV_ETCD_KEY_MAX / 2);
    }
    bkv_etcd_watch_t *made = calloc(1, sizeof(*made));
    if (made == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "etcd: out of memory");
    }
    made->etcd = etcd;
    made->watcher = watcher;
    made->user = user;
    memcpy(made->prefix, prefix.bytes, prefix.length);
    made->prefix_length = prefix.length;
    made->next = etcd->watches;
    etcd->watches = made;
    bkv_etcd_timer_start(etcd, &made->timer, 0, watch_go_on, made);
    *watch = made;
    return BKV_OK;
}

void bkv_etcd_watch_destroy(bkv_etcd_watch_t *watch) {
    if (watch == NULL) {
        return;
    }
    bkv_etcd_watch_t **at = &watch->etcd->watches;
    while (*at != watch) {
        at = &(*at)->next;
    }
    *at = watch->next;
    stream_leave(watch);
    bkv_etcd_timer_stop(watch->etcd, &watch->timer);
    watch->dead = true;
    if (!watch->listing) {
        free(watch);
    }
}

void bkv_etcd_watches_end(bkv_etcd_t *etcd) {
    for (bkv_etcd_watch_t *watch = etcd->watches, *next; watch != NULL; watch = next) {
        next = watch->next;
        assert(next != watch);
        bkv_etcd_watch_destroy(watch);
    }
}
