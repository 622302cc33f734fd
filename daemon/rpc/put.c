// put.c - Put: a client stream of blocks, taken in one message at a time.
//
// A message is read only when the one before it has been used up: what the client sends meanwhile waits in HTTP/2's flow
// control. A block is committed as soon as its bytes are there; while it is compressed the next one arrives. One that lies in
// memory which the client shares is fetched from there by the transports, several at once if they come. When the daemon is full
// and blocks of this very call are still being worked on, the call waits for one of them instead of giving up. At the end of
// the stream, or at the first failure, it waits for all of them and then answers. In a cluster each block then still goes to its
// owners, while the next ones come in and are compressed.
//
// Who may touch what: the call, the list of items and the message belong to the reader, the event that is being run; each item
// belongs to the pipeline, or to a transport, from its commit to its callback, and in a cluster until it is placed. `busy` counts
// the reader and those items; who takes it to 0 answers.
#include "daemon/observe/clock.h"
#include "daemon/rpc/call.h"

#include <assert.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

// Bytes of a PutRequest beside its data: a PutBlock takes about 130, one that names 65,536 pages of GPU memory up to 680,000.
#define HEAD_MOST ((size_t)768 << 10)

typedef struct put put_t;

// A block, in the order of the stream.
typedef struct item {
    put_t *put;
    struct item *next;
    bkv_name_t name;
    bkv_ingest_result_t result;
    uint32_t replicas;  // owners that have it
    bkv_error_t *error; // NULL: published
} item_t;

struct put {
    bkv_call_t *call;
    item_t *first, *last;
    uint32_t count;    // blocks begun
    bkv_error_t error; // what ended the reading early

    // the message being used up
    bkv_ingest_args_t args; // of its block
    bool begins;            // it has a block that has not begun yet
    bkv_cursor_t data;
    size_t data_left;

    bkv_session_t *session; // of a block that lies in a place, until it is being fetched; NULL: it comes as data
    bkv_wire_place_t place; // there

    bkv_ingest_t *ingest; // of the last item, until committed

    _Atomic uint32_t busy;
    _Atomic uint32_t done; // items that have called back
    _Atomic bool failed;   // one of them in error
    _Atomic bool waiting;  // the reader wants to hear of the next callback
    uint32_t committed;    // items given to the pipeline
    bkv_tag_t wake;
};

static const bkv_error_t no_memory = {.status = BKV_RESOURCE_EXHAUSTED, .message = "no memory to report an error"};

static void drop_place(put_t *put) {
    if (put->session != NULL) {
        bkv_session_release(put->session);
        put->session = NULL;
    }
    bkv_wire_place_clear(&put->place);
}

static void put_free(void *body) {
    put_t *put = body;
    drop_place(put);
    if (put->ingest != NULL) {
        bkv_ingest_abort(put->ingest);
    }
    for (item_t *item = put->first, *next; item != NULL; item = next) {
        next = item->next;
        if (item->error != &no_memory) {
            free(item->error);
        }
        free(item);
    }
    free(put);
}

// ---- the answer ----

// Says which block a failure is of: "block.tokens: ..." becomes "block[3].tokens: ...".
static void locate(uint32_t index, const bkv_error_t *cause, bkv_error_t *error) {
    const char *message = cause->message;
    if (strncmp(message, "block.", 6) == 0) {
        message += 6;
    }
    size_t field = strspn(message, "abcdefghijklmnopqrstuvwxyz0123456789_.[]");
    const char *joint = field > 0 && message[field] == ':' ? "." : ": ";
    bkv_fail(error, cause->status, "block[%" PRIu32 "]%s%.220s", index, joint, message);
}

static void reply(put_t *put) {
    bkv_call_t *call = put->call;
    Balancekv__V1__PutResult *results = calloc(put->count + 1, sizeof(results[0]));
    Balancekv__V1__PutResult **pointers = calloc(put->count + 1, sizeof(pointers[0]));
    if (results == NULL || pointers == NULL) {
        bkv_call_fail(call, &no_memory);
    } else {
        size_t count = 0;
        for (item_t *item = put->first; item != NULL; item = item->next) {
            Balancekv__V1__PutResult *result = pointers[count] = &results[count];
            balancekv__v1__put_result__init(result);
            result->key = (ProtobufCBinaryData){BKV_KEY_BYTES, item->name.key.bytes};
            result->stored_bytes = item->result.stored_bytes;
            result->duplicate = item->result.duplicate;
            result->replicas = item->replicas;
            count++;
        }
        Balancekv__V1__PutResponse response = BALANCEKV__V1__PUT_RESPONSE__INIT;
        response.n_results = count;
        response.results = pointers;
        response.boot_epoch = call->server->config.boot_epoch;
        bkv_call_reply(call, &response.base);
    }
    free(results);
    free(pointers);
}

// Everything has come and called back. On a worker or, when a block came last, on a compute thread.
static void answer(put_t *put) {
    uint32_t index = 0;
    for (const item_t *item = put->first; item != NULL; item = item->next, index++) {
        if (item->error != NULL) {
            bkv_error_t error;
            locate(index, item->error, &error);
            bkv_call_fail(put->call, &error);
            return;
        }
    }
    if (put->error.status != BKV_OK) {
        bkv_call_fail(put->call, &put->error);
    } else {
        reply(put);
    }
}

static void put_release(put_t *put) {
    if (atomic_fetch_sub(&put->busy, 1) == 1) {
        answer(put);
    }
}

// ---- a block is done, on a compute thread; it is placed, on one of the cluster's or here ----

static bkv_error_t *copy_error(const bkv_error_t *error) {
    bkv_error_t *copy = malloc(sizeof(*copy));
    if (copy == NULL) {
        return (bkv_error_t *)&no_memory;
    }
    *copy = *error;
    return copy;
}

static void on_placed(void *user, uint32_t replicas) {
    item_t *item = user;
    item->replicas = replicas;
    put_release(item->put);
}

// What the pipeline had for the block is free again before it is placed: the reader need not wait for that.
static void on_block(void *user, const bkv_error_t *error, const bkv_ingest_result_t *result) {
    item_t *item = user;
    put_t *put = item->put;
    bkv_cluster_t *cluster = put->call->server->config.cluster;
    if (error->status == BKV_OK) {
        item->result = *result;
    } else {
        item->error = copy_error(error);
        atomic_store(&put->failed, true);
    }
    atomic_fetch_add(&put->done, 1);
    if (atomic_exchange(&put->waiting, false)) {
        bkv_call_batch(put->call, NULL, 0, &put->wake); // runs on a worker; the reader is busy, so put stays
    }
    if (cluster != NULL && error->status == BKV_OK) {
        bkv_cluster_place(cluster, &item->name, result->stored_bytes, result->duplicate, put->call->deadline_ms, on_placed,
                          item);
    } else {
        put_release(put);
    }
}

// ---- reading ----

static void put_advance(put_t *put);

// The reader stops. Blocks already committed go on.
static void stop_reading(put_t *put) {
    if (put->ingest != NULL) {
        bkv_ingest_abort(put->ingest);
        put->ingest = NULL;
    }
    bkv_call_drop_message(put->call);
    put_release(put);
}

// Of the block that begins, else of the last one.
static void fail_block(put_t *put, const bkv_error_t *cause) {
    uint32_t index = put->begins || put->count == 0 ? put->count : put->count - 1;
    locate(index, cause, &put->error);
    stop_reading(put);
}

static void fail_stream(put_t *put, const bkv_error_t *error) {
    put->error = *error;
    stop_reading(put);
}

static void on_wake(bkv_worker_t *worker, void *owner, bool ok) {
    (void)worker;
    (void)ok;
    put_advance(owner);
}

// After BUSY: whether to try again, later by on_wake or now. `done` is how many had called back before the attempt.
typedef enum retry { RETRY_NEVER, RETRY_NOW, RETRY_LATER } retry_t;

static retry_t wait_for_own(put_t *put, uint32_t done) {
    if (done == put->committed) {
        return RETRY_NEVER; // none of ours was in the way
    }
    atomic_store(&put->waiting, true);
    if (atomic_load(&put->done) == done) {
        return RETRY_LATER; // the callback that comes next sees `waiting`
    }
    // One has called back meanwhile; has it seen `waiting`, and sent the wake?
    return atomic_exchange(&put->waiting, false) ? RETRY_NOW : RETRY_LATER;
}

static bkv_status_t add_item(put_t *put, bkv_error_t *err) {
    item_t *item = calloc(1, sizeof(*item));
    if (item == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for a block");
    }
    item->put = put;
    item->name = (bkv_name_t){.spec_id = put->args.spec_id, .key = put->args.key};
    if (put->last == NULL) {
        put->first = item;
    } else {
        put->last->next = item;
    }
    put->last = item;
    put->count++;
    return BKV_OK;
}

static bkv_status_t begin_block(put_t *put, bkv_error_t *err) {
    bkv_status_t status = bkv_ingest_begin(put->call->server->config.pipeline, &put->args, bkv_now_ms(), &put->ingest, err);
    if (status == BKV_OK) {
        put->begins = false;
        status = add_item(put, err);
    }
    return status;
}

static bkv_status_t write_data(put_t *put, bkv_error_t *err) {
    if (put->data_left > 0 && put->ingest == NULL) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "data: %zu bytes that belong to no block", put->data_left);
    }
    while (put->data_left > 0) {
        const uint8_t *bytes;
        size_t length = bkv_cursor_next(&put->data, put->data_left, &bytes);
        bkv_status_t status = bkv_ingest_write(put->ingest, bytes, length, err);
        if (status != BKV_OK) {
            return status;
        }
        put->data_left -= length;
    }
    return BKV_OK;
}

static bkv_status_t commit_block(put_t *put, bkv_error_t *err) {
    atomic_fetch_add(&put->busy, 1); // before the callback can come
    bkv_status_t status = put->session != NULL
                              ? bkv_session_fetch(put->session, &put->place.place, put->ingest, on_block, put->last, err)
                              : bkv_ingest_commit(put->ingest, on_block, put->last, err);
    if (status == BKV_OK) {
        drop_place(put);
        put->ingest = NULL;
        put->committed++;
    } else {
        atomic_fetch_sub(&put->busy, 1); // the reader still counts: not the last one
    }
    return status;
}

// Uses the message up as far as possible. BUSY may be tried again.
static bkv_status_t use_message(put_t *put, bkv_error_t *err) {
    bkv_status_t status = put->begins ? begin_block(put, err) : BKV_OK;
    if (status == BKV_OK) {
        status = write_data(put, err);
    }
    bool complete = put->ingest != NULL && (put->session != NULL || bkv_ingest_missing(put->ingest) == 0);
    if (status == BKV_OK && complete) {
        status = commit_block(put, err);
    }
    return status;
}

static void on_message(bkv_worker_t *worker, void *owner, bool ok);

static void use_up(put_t *put) {
    for (;;) {
        bkv_error_t error;
        uint32_t done = atomic_load(&put->done);
        if (atomic_load(&put->failed)) {
            stop_reading(put);
            return;
        }
        bkv_status_t status = use_message(put, &error);
        if (status == BKV_OK) {
            bkv_call_read(put->call, on_message);
            return;
        }
        retry_t retry = status == BKV_BUSY ? wait_for_own(put, done) : RETRY_NEVER;
        if (retry == RETRY_NEVER) {
            fail_block(put, &error);
            return;
        }
        if (retry == RETRY_LATER) {
            return;
        }
    }
}

// The reader counts twice here: once it waits, a callback may set another one going, which may end the call.
static void put_advance(put_t *put) {
    atomic_fetch_add(&put->busy, 1);
    use_up(put);
    put_release(put);
}

// A block whose payload lies in memory that the client shares.
static bkv_status_t take_place(put_t *put, const Balancekv__V1__PutBlock *block, bkv_error_t *err) {
    const bkv_server_t *server = put->call->server;
    const bkv_model_t *model;
    if (put->data_left > 0) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "place: says where the payload lies, and %zu bytes of data come too",
                        put->data_left);
    }
    bkv_status_t status =
        bkv_model_table_require(bkv_pipeline_models(server->config.pipeline), &put->args.spec_id, &model, err);
    if (status == BKV_OK) {
        status = bkv_wire_get_payload_place(block, model->shape.layers, &put->place, err);
    }
    if (status == BKV_OK) {
        status = bkv_call_find_session(server, &put->place.session, &put->session, err);
    }
    if (status != BKV_OK) {
        return status;
    }
    put->args.on_device = bkv_session_on_device(put->session);
    if (put->args.on_device && put->place.place.layout == NULL) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "place.layout: missing, the session's memory is a GPU's");
    }
    return BKV_OK;
}

// A message that starts a block, or only carries data for the present one.
static bkv_status_t take_message(put_t *put, bkv_bump_t *bump, bkv_error_t *err) {
    bkv_call_t *call = put->call;
    bkv_split_t split;
    bkv_status_t status = bkv_wire_check_encoding(call->message, err);
    if (status == BKV_OK) {
        status = bkv_wire_split(&balancekv__v1__put_request__descriptor, call->message, HEAD_MOST, bump, &split, err);
    }
    if (status != BKV_OK) {
        return status;
    }
    put->data = split.data;
    put->data_left = split.data_bytes;
    atomic_fetch_add(&call->server->bytes_received_total, split.data_bytes);
    const Balancekv__V1__PutBlock *block = ((const Balancekv__V1__PutRequest *)split.head)->block;
    if (block == NULL) {
        return BKV_OK;
    }
    if (put->ingest != NULL) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "payload_bytes: %" PRIu64 " bytes are missing where the next block begins",
                        bkv_ingest_missing(put->ingest));
    }
    put->begins = true;
    if (put->count == call->server->config.max_batch) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "key: one block more than max_batch %" PRIu32, put->count);
    }
    status = bkv_wire_get_block(block, &put->args, err);
    return status == BKV_OK && block->place != NULL ? take_place(put, block, err) : status;
}

// The client has sent its last message, or is gone.
static void end_stream(put_t *put) {
    if (put->ingest != NULL) {
        bkv_error_t error;
        put->call->broken = true;
        bkv_fail(&error, BKV_INVALID_ARGUMENT, "payload_bytes: the stream ended with %" PRIu64 " bytes missing",
                 bkv_ingest_missing(put->ingest));
        fail_block(put, &error);
    } else {
        stop_reading(put);
    }
}

static void on_message(bkv_worker_t *worker, void *owner, bool ok) {
    bkv_call_t *call = owner;
    put_t *put = call->body;
    bkv_error_t error;
    if (!ok) {
        bkv_fail(&error, BKV_RESOURCE_EXHAUSTED, "request: a message larger than max_message %" PRIu64,
                 call->server->config.max_message);
        fail_stream(put, &error);
    } else if (call->message == NULL) {
        end_stream(put);
    } else if (take_message(put, &worker->bump, &error) != BKV_OK) {
        fail_block(put, &error);
    } else {
        put_advance(put);
    }
}

void bkv_handle_put(bkv_call_t *call, bkv_bump_t *bump) {
    (void)bump;
    put_t *put = calloc(1, sizeof(*put));
    if (put == NULL) {
        bkv_call_fail(call, &no_memory);
        return;
    }
    put->call = call;
    put->wake = (bkv_tag_t){on_wake, put};
    atomic_init(&put->busy, 1); // the reader
    call->body = put;
    call->body_free = put_free;
    bkv_call_read(call, on_message);
}
