// call.c - drives a call: attempts, retries, the result, and who is told. What is sent and received is up to the operations
// (unary.c, put.c, get.c, attend.c), when to sleep and what to cancel to client.c.
#include "client.h"

#include <assert.h>
#include <grpc/byte_buffer.h>
#include <grpc/support/alloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NS_PER_MS 1000000ull

// Pauses between attempts double from the first to the longest; half of each is random.
#define PAUSE_FIRST_MS   10
#define PAUSE_LONGEST_MS 500

// How long after its end a call waits for a socket to take what is under way before it gives the connection up.
#define HELD_MS 50

static const bkv_call_kind_t open_kind = {.method = BKV_CLIENT_SERVICE "Open", .shape = BKV_CALL_UNARY};

static const bkv_call_kind_t *attempt_kind(const bkv_call_t *call) {
    return call->reopening ? &open_kind : call->kind;
}

// ---- references to the caller's memory ----

static void call_complete(bkv_call_t *call) {
    bkv_client_t *client = call->client;
    bkv_client_remove(client, call);
    if (call->queue != NULL) {
        bkv_queue_deliver(call->queue, call);
    } else {
        pthread_mutex_lock(&call->mutex);
        call->done = true;
        pthread_cond_signal(&call->cond);
        pthread_mutex_unlock(&call->mutex);
    }
    bkv_client_leave(client);
}

static void call_release(void *user) {
    bkv_call_t *call = user;
    if (atomic_fetch_sub(&call->holds, 1) == 1) {
        call_complete(call);
    }
}

grpc_byte_buffer *bkv_call_message(bkv_call_t *call, grpc_slice head, const void *bytes, size_t length) {
    atomic_fetch_add(&call->holds, 1);
    grpc_slice slices[2] = {
        head,
        grpc_slice_new_with_user_data((void *)(uintptr_t)bytes, length, call_release, call),
    };
    grpc_byte_buffer *message = grpc_raw_byte_buffer_create(slices, 2);
    grpc_slice_unref(slices[0]);
    grpc_slice_unref(slices[1]);
    return message;
}

void bkv_call_conclude(bkv_call_t *call) {
    if (atomic_load(&call->holds) > 1) {
        bkv_client_wait(call->client, call, BKV_CALL_HELD, bkv_client_now_ns() + HELD_MS * NS_PER_MS);
    }
    call_release(call);
}

// ---- one attempt ----

static void attempt_end(bkv_call_t *call);

static void batch_start(bkv_call_t *call, const grpc_op *ops, size_t count, bkv_call_tag_t *tag) {
    BKV_CALL_RELEASE(tag);
    grpc_call_error error = grpc_call_start_batch(call->grpc, ops, count, tag, NULL);
    assert(error == GRPC_CALL_OK); // anything else is a batch that is wrong in itself
    (void)error;
}

static void batch_done(bkv_call_t *call) {
    if (--call->batches == 0) {
        attempt_end(call);
    }
}

static void take(bkv_call_t *call) {
    call->answered = true;
    if (!call->reopening && call->fault.status == BKV_OK && call->kind->take(call, call->received, &call->fault) != BKV_OK) {
        grpc_call_cancel(call->grpc, NULL);
    }
}

// The reopening's answer stays in call->received for attempt_end.
static void on_status(bkv_call_t *call, bool ok) {
    (void)ok; // the status says it
    call->ended = true;
    if (call->received != NULL && attempt_kind(call)->shape != BKV_CALL_DOWNLOAD) {
        take(call);
    }
    if (call->batches > 1 && call->kind->shape == BKV_CALL_UPLOAD) {
        grpc_call_cancel(call->grpc, NULL); // the daemon has answered early; nobody wants the rest
    }
    batch_done(call);
}

static void send_next(bkv_call_t *call) {
    call->sending = call->kind->next(call, &call->sent_last);
    grpc_op ops[2] = {{.op = GRPC_OP_SEND_MESSAGE, .data.send_message.send_message = call->sending},
                      {.op = GRPC_OP_SEND_CLOSE_FROM_CLIENT}};
    batch_start(call, ops, call->sent_last ? 2 : 1, &call->send_tag);
}

static void on_send(bkv_call_t *call, bool ok) {
    grpc_byte_buffer_destroy(call->sending);
    call->sending = NULL;
    if (ok && !call->sent_last && !call->ended) {
        send_next(call);
    } else {
        batch_done(call);
    }
}

static void receive_next(bkv_call_t *call) {
    grpc_op op = {.op = GRPC_OP_RECV_MESSAGE, .data.recv_message.recv_message = &call->received};
    batch_start(call, &op, 1, &call->receive_tag);
}

static void on_receive(bkv_call_t *call, bool ok) {
    bool more = ok && call->received != NULL;
    if (more) {
        take(call);
        grpc_byte_buffer_destroy(call->received);
        call->received = NULL;
    }
    if (more && call->fault.status == BKV_OK) {
        receive_next(call);
    } else {
        batch_done(call);
    }
}

static grpc_byte_buffer *first_message(bkv_call_t *call, grpc_slice request) {
    if (!call->reopening && call->kind->next != NULL) {
        return call->kind->next(call, &call->sent_last);
    }
    return grpc_raw_byte_buffer_create(&request, 1);
}

// One batch for all of a unary call; for a stream, one that lasts as long as the call and one for its messages.
static void attempt_send(bkv_call_t *call, grpc_slice request) {
    bkv_call_shape_t shape = attempt_kind(call)->shape;
    grpc_op ops[6];
    memset(ops, 0, sizeof ops);
    size_t n = 0;
    ops[n++].op = GRPC_OP_SEND_INITIAL_METADATA;
    ops[n].op = GRPC_OP_RECV_INITIAL_METADATA;
    ops[n++].data.recv_initial_metadata.recv_initial_metadata = &call->initial;
    ops[n].op = GRPC_OP_RECV_STATUS_ON_CLIENT;
    ops[n].data.recv_status_on_client.trailing_metadata = &call->trailing;
    ops[n].data.recv_status_on_client.status = &call->code;
    ops[n++].data.recv_status_on_client.status_details = &call->details;
    if (shape != BKV_CALL_UPLOAD) {
        call->sending = first_message(call, request);
        ops[n].op = GRPC_OP_SEND_MESSAGE;
        ops[n++].data.send_message.send_message = call->sending;
        ops[n++].op = GRPC_OP_SEND_CLOSE_FROM_CLIENT;
    }
    if (shape != BKV_CALL_DOWNLOAD) {
        ops[n].op = GRPC_OP_RECV_MESSAGE;
        ops[n++].data.recv_message.recv_message = &call->received;
    }
    call->batches = shape == BKV_CALL_UNARY ? 1 : 2; // before the first: its completion may be handled before the second
    batch_start(call, ops, n, &call->status_tag);
    if (shape == BKV_CALL_UPLOAD) {
        send_next(call);
    } else if (shape == BKV_CALL_DOWNLOAD) {
        receive_next(call);
    }
}

static void attempt_reset(bkv_call_t *call) {
    call->attempts++;
    call->code = GRPC_STATUS_UNKNOWN;
    call->sent_last = call->ended = call->answered = false;
    call->fault = (bkv_error_t){0};
    grpc_metadata_array_init(&call->initial);
    grpc_metadata_array_init(&call->trailing);
    call->details = grpc_empty_slice();
    if (!call->reopening && call->kind->reset != NULL) {
        call->kind->reset(call);
    }
}

// Is this attempt to be the call itself, or an Open before it? Returns the request, referenced.
static grpc_slice choose_request(bkv_call_t *call) {
    bkv_client_t *client = call->client;
    pthread_mutex_lock(&client->lock);
    bkv_client_spec_t *spec = call->kind->names_spec ? bkv_client_spec_find(client, &call->spec_id) : NULL;
    call->spec_epoch = spec != NULL ? spec->boot_epoch : 0;
    if (spec != NULL && spec->boot_epoch != client->boot_epoch && !call->reopened) {
        call->reopening = call->reopened = true;
    }
    grpc_slice request = grpc_slice_ref(call->reopening ? spec->request : call->request);
    pthread_mutex_unlock(&client->lock);
    return request;
}

// Shows the attempt to those who may want to cancel it. False: somebody wanted to already.
static bool attempt_publish(bkv_call_t *call, grpc_call *grpc, uint64_t connection) {
    bkv_client_t *client = call->client;
    pthread_mutex_lock(&client->lock);
    call->grpc = grpc;
    call->connection = connection;
    call->interrupted = client->connection == NULL || client->connection->number != connection;
    bool go = !call->interrupted && !call->cancelled;
    pthread_mutex_unlock(&client->lock);
    return go;
}

void bkv_call_start(bkv_call_t *call) {
    bkv_client_connection_t *connection = bkv_client_connection_get(call->client);
    if (connection == NULL) {
        bkv_fail(&call->error, BKV_CANCELLED, "cancelled: the client is being destroyed");
        bkv_call_conclude(call);
        return;
    }
    grpc_slice request = choose_request(call);
    attempt_reset(call);
    grpc_call *grpc = grpc_channel_create_call(connection->channel, NULL, GRPC_PROPAGATE_DEFAULTS, call->client->completions,
                                               grpc_slice_from_static_string(attempt_kind(call)->method), NULL,
                                               bkv_client_timespec(call->deadline_ns), NULL);
    if (!attempt_publish(call, grpc, connection->number)) {
        grpc_call_cancel_with_status(grpc, GRPC_STATUS_UNAVAILABLE, "the connection was given up", NULL);
    }
    bkv_client_connection_put(call->client, connection);
    attempt_send(call, request);
    grpc_slice_unref(request);
}

// ---- after an attempt ----

// What the attempt came to, in our words.
static bkv_error_t attempt_result(const bkv_call_t *call, bool cancelled) {
    bkv_error_t error = {.status = BKV_OK};
    if (cancelled) {
        bkv_fail(&error, BKV_CANCELLED, "cancelled by its caller");
    } else if (call->fault.status != BKV_OK) {
        error = call->fault;
    } else if (call->code == GRPC_STATUS_OK && !call->answered && attempt_kind(call)->shape != BKV_CALL_DOWNLOAD) {
        // gRPC may drop a response that comes just as the deadline passes, but not its status.
        bool late = bkv_client_now_ns() >= call->deadline_ns;
        bkv_fail(&error, late ? BKV_DEADLINE_EXCEEDED : BKV_INTERNAL, "%s: answered OK without a response",
                 attempt_kind(call)->method);
    } else if (call->code == GRPC_STATUS_DEADLINE_EXCEEDED && bkv_client_now_ns() >= call->deadline_ns) {
        bkv_fail(&error, BKV_DEADLINE_EXCEEDED, "not done within %u ms%s%.180s", call->timeout_ms,
                 call->error.status != BKV_OK ? "; before: " : "", call->error.message);
    } else if (call->code != GRPC_STATUS_OK) {
        error.status = bkv_client_status((uint32_t)call->code);
        bkv_client_text(GRPC_SLICE_START_PTR(call->details), GRPC_SLICE_LENGTH(call->details), error.message,
                        sizeof error.message);
    }
    return error;
}

static void attempt_clean(bkv_call_t *call) {
    grpc_byte_buffer_destroy(call->sending);
    grpc_byte_buffer_destroy(call->received);
    call->sending = call->received = NULL;
    grpc_metadata_array_destroy(&call->initial);
    grpc_metadata_array_destroy(&call->trailing);
    grpc_slice_unref(call->details);
}

static uint64_t pause_ns(bkv_call_t *call) {
    uint64_t *x = &call->client->jitter;
    *x ^= *x << 13, *x ^= *x >> 7, *x ^= *x << 17;
    uint64_t ms = PAUSE_LONGEST_MS;
    if (call->attempts < 6) {
        ms = PAUSE_FIRST_MS << (call->attempts - 1);
    }
    uint64_t half = ms * NS_PER_MS / 2;
    return half + *x % half;
}

// UNAVAILABLE: not connected, connection lost, or the daemon is busy or draining. Try again while there is time.
static void pause_or_conclude(bkv_call_t *call) {
    uint64_t due_ns = bkv_client_now_ns() + pause_ns(call);
    if (due_ns >= call->deadline_ns) {
        bkv_error_t last = call->error;
        bkv_fail(&call->error, BKV_BUSY, "tried %u times within %u ms: %.200s", call->attempts, call->timeout_ms, last.message);
        bkv_call_conclude(call);
    } else if (!bkv_client_wait(call->client, call, BKV_CALL_PAUSED, due_ns)) {
        bkv_fail(&call->error, BKV_CANCELLED, "cancelled by its caller");
        bkv_call_conclude(call);
    }
}

// NOT_FOUND, perhaps for the spec, because the daemon was restarted. True: the call goes on.
static bool reopen(bkv_call_t *call) {
    if (!call->kind->names_spec || call->answered || call->reopened) {
        return false;
    }
    pthread_mutex_lock(&call->client->lock);
    bkv_client_spec_t *spec = bkv_client_spec_find(call->client, &call->spec_id);
    bool known = spec != NULL;
    bool reopened_meanwhile = known && spec->boot_epoch != call->spec_epoch;
    pthread_mutex_unlock(&call->client->lock);
    if (known) {
        call->missed = call->error;
        call->reopened = true;
        call->reopening = !reopened_meanwhile;
        bkv_call_start(call);
    }
    return known;
}

// The Open before a call has been answered: go on with the call, unless its NOT_FOUND was not about the spec.
static void reopen_end(bkv_call_t *call, grpc_byte_buffer *answer) {
    uint64_t boot_epoch = 0;
    call->reopening = false;
    if (bkv_client_spec_reopened(call->client, &call->spec_id, answer, &boot_epoch, &call->error) != BKV_OK) {
        bkv_call_conclude(call);
    } else if (call->missed.status != BKV_OK && call->kind->may_miss && boot_epoch == call->spec_epoch) {
        call->error = call->missed;
        bkv_call_conclude(call);
    } else {
        bkv_call_start(call);
    }
}

// All batches are back. Decides what comes next; the call may be gone afterwards.
static void attempt_end(bkv_call_t *call) {
    pthread_mutex_lock(&call->client->lock);
    grpc_call *grpc = call->grpc;
    call->grpc = NULL;
    bool cancelled = call->cancelled;
    pthread_mutex_unlock(&call->client->lock);
    grpc_call_unref(grpc);
    call->error = attempt_result(call, cancelled);
    grpc_byte_buffer *answer = call->received;
    call->received = NULL;
    attempt_clean(call);
    if (call->error.status == BKV_BUSY && !call->kind->fail_fast) {
        pause_or_conclude(call);
    } else if (call->error.status == BKV_OK && call->reopening) {
        reopen_end(call, answer);
    } else if (call->error.status != BKV_NOT_FOUND || !reopen(call)) {
        bkv_call_conclude(call);
    }
    grpc_byte_buffer_destroy(answer);
}

// ---- the whole call ----

void *bkv_call_new(size_t size, const bkv_call_kind_t *kind, bkv_client_t *client, const bkv_spec_id_t *id,
                   uint32_t timeout_ms) {
    assert(size >= sizeof(bkv_call_t));
    bkv_call_t *call = calloc(1, size);
    if (call == NULL) {
        return NULL;
    }
    call->kind = kind;
    call->client = client;
    call->timeout_ms = timeout_ms != 0 ? timeout_ms : client->timeout_ms;
    if (id != NULL) {
        call->spec_id = *id;
    }
    call->status_tag = (bkv_call_tag_t){.run = on_status, .call = call};
    call->send_tag = (bkv_call_tag_t){.run = on_send, .call = call};
    call->receive_tag = (bkv_call_tag_t){.run = on_receive, .call = call};
    call->request = grpc_empty_slice();
    atomic_init(&call->holds, 1);
    pthread_mutex_init(&call->mutex, NULL);
    pthread_cond_init(&call->cond, NULL);
    return call;
}

void bkv_call_free(bkv_call_t *call) {
    if (call == NULL) {
        return;
    }
    if (call->kind->clean != NULL) {
        call->kind->clean(call);
    }
    grpc_slice_unref(call->request);
    pthread_cond_destroy(&call->cond);
    pthread_mutex_destroy(&call->mutex);
    free(call);
}

static void call_begin(bkv_call_t *call) {
    call->started_ns = bkv_client_now_ns();
    call->deadline_ns = call->started_ns + call->timeout_ms * NS_PER_MS;
    bkv_client_enter(call->client, call);
    bkv_call_start(call);
}

bkv_status_t bkv_call_run(bkv_call_t *call, bkv_error_t *err) {
    if (call == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "client: out of memory");
    }
    call_begin(call);
    pthread_mutex_lock(&call->mutex);
    while (!call->done) {
        pthread_cond_wait(&call->cond, &call->mutex);
    }
    pthread_mutex_unlock(&call->mutex);
    if (call->kind->finish != NULL) {
        call->kind->finish(call);
    }
    if (call->error.status != BKV_OK && err != NULL) {
        *err = call->error;
    }
    return call->error.status;
}

bkv_status_t bkv_call_submit(bkv_call_t *call, bkv_queue_t *queue, uint64_t tag) {
    if (call == NULL) {
        return BKV_RESOURCE_EXHAUSTED;
    }
    bkv_status_t status = bkv_queue_admit(queue);
    if (status != BKV_OK) {
        bkv_call_free(call);
        return status;
    }
    call->queue = queue;
    call->user_tag = tag;
    call_begin(call);
    return BKV_OK;
}
