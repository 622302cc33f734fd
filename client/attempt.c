// attempt.c - see attempt.h. The batches of gRPC operations that an attempt is made of, and what its end means.
#include "client/attempt.h"

#include "client/client.h"
#include "proto/handover.h"

#include <assert.h>
#include <grpc/byte_buffer.h>
#include <stdlib.h>
#include <string.h>

#define NS_PER_MS 1000000ull

// gRPC counts in milliseconds: a deadline may pass a little early.
#define ROUNDING_MS 5

// What the daemon sends along with a failure (daemon/rpc/call.c).
#define REQUEST_ID_KEY "bkv-request-id"

// Bytes of a message that only says where a payload lies.
#define SMALL_MESSAGE 2048

static void attempt_free(bkv_attempt_t *attempt) {
    grpc_call_unref(attempt->grpc);
    grpc_byte_buffer_destroy(attempt->message);
    grpc_byte_buffer_destroy(attempt->prepared);
    grpc_byte_buffer_destroy(attempt->received);
    grpc_metadata_array_destroy(&attempt->initial);
    grpc_metadata_array_destroy(&attempt->trailing);
    grpc_slice_unref(attempt->details);
    free(attempt);
}

static void batch_start(bkv_attempt_t *attempt, const grpc_op *ops, size_t count, bkv_call_tag_t *tag) {
    BKV_HAND_OVER(tag);
    grpc_call_error error = grpc_call_start_batch(attempt->grpc, ops, count, tag, NULL);
    assert(error == GRPC_CALL_OK); // anything else is a batch that is wrong in itself
    (void)error;
}

// One of the batches that make the result is back. The sending one does not count: a socket that blocks may keep it.
static void batch_received(bkv_attempt_t *attempt) {
    if (--attempt->waiting > 0) {
        return;
    }
    if (attempt->sending) {
        grpc_call_cancel(attempt->grpc, NULL); // answered early, or late: nobody wants the rest
    }
    bkv_call_attempted(attempt);
    if (!attempt->sending) {
        attempt_free(attempt);
    }
}

static void take(bkv_attempt_t *attempt) {
    bkv_call_t *call = attempt->call;
    attempt->answered = true;
    bkv_client_endpoint_heard(call, false);
    if (attempt->kind->take != NULL && attempt->kind->take(call, attempt->received, &attempt->fault) != BKV_OK) {
        grpc_call_cancel(attempt->grpc, NULL);
    }
}

static void on_status(void *owner, bool ok) {
    bkv_attempt_t *attempt = owner;
    (void)ok; // the status says it
    if (attempt->received != NULL && attempt->kind->shape != BKV_CALL_DOWNLOAD) {
        take(attempt);
    }
    batch_received(attempt);
}

static void receive_next(bkv_attempt_t *attempt) {
    grpc_op op = {.op = GRPC_OP_RECV_MESSAGE, .data.recv_message.recv_message = &attempt->received};
    batch_start(attempt, &op, 1, &attempt->receive_tag);
}

static void on_receive(void *owner, bool ok) {
    bkv_attempt_t *attempt = owner;
    bool more = ok && attempt->received != NULL;
    if (more) {
        take(attempt);
        grpc_byte_buffer_destroy(attempt->received);
        attempt->received = NULL;
    }
    if (more && attempt->fault.status == BKV_OK) {
        receive_next(attempt);
    } else {
        batch_received(attempt);
    }
}

static void prepare(bkv_attempt_t *attempt) {
    attempt->prepared = attempt->kind->next(attempt->call, &attempt->prepared_last);
}

// Whether a message may wait for the next and go out with it.
static bool is_small(grpc_byte_buffer *message) {
    return grpc_byte_buffer_length(message) <= SMALL_MESSAGE;
}

// Sends what is prepared; with the first message go the metadata that open the call.
static void send_prepared(bkv_attempt_t *attempt, bool first) {
    grpc_op ops[3];
    memset(ops, 0, sizeof ops);
    size_t n = 0;
    attempt->message = attempt->prepared;
    attempt->message_last = attempt->prepared_last;
    attempt->prepared = NULL;
    attempt->sending = true;
    if (first) {
        ops[n++].op = GRPC_OP_SEND_INITIAL_METADATA;
    }
    ops[n].op = GRPC_OP_SEND_MESSAGE;
    ops[n].flags = first || attempt->message_last || !is_small(attempt->message) ? 0 : GRPC_WRITE_BUFFER_HINT;
    ops[n++].data.send_message.send_message = attempt->message;
    if (attempt->message_last) {
        ops[n++].op = GRPC_OP_SEND_CLOSE_FROM_CLIENT;
    }
    batch_start(attempt, ops, n, &attempt->send_tag);
}

// The message after the next is made while the next is on its way.
static void send_next(bkv_attempt_t *attempt) {
    if (attempt->prepared == NULL) {
        prepare(attempt);
    }
    send_prepared(attempt, false);
    if (!attempt->message_last) {
        prepare(attempt);
    }
}

static void on_send(void *owner, bool ok) {
    bkv_attempt_t *attempt = owner;
    grpc_byte_buffer_destroy(attempt->message);
    attempt->message = NULL;
    attempt->sending = false;
    if (attempt->call == NULL) {
        attempt_free(attempt); // it was kept for this
    } else if (ok && !attempt->message_last) {
        send_next(attempt);
    }
}

// A batch for the result, which is there when the call has ended; and for a download one for its messages.
static void receive_all(bkv_attempt_t *attempt) {
    bool download = attempt->kind->shape == BKV_CALL_DOWNLOAD;
    grpc_op ops[3];
    memset(ops, 0, sizeof ops);
    ops[0].op = GRPC_OP_RECV_INITIAL_METADATA;
    ops[0].data.recv_initial_metadata.recv_initial_metadata = &attempt->initial;
    ops[1].op = GRPC_OP_RECV_STATUS_ON_CLIENT;
    ops[1].data.recv_status_on_client.trailing_metadata = &attempt->trailing;
    ops[1].data.recv_status_on_client.status = &attempt->code;
    ops[1].data.recv_status_on_client.status_details = &attempt->details;
    ops[2].op = GRPC_OP_RECV_MESSAGE;
    ops[2].data.recv_message.recv_message = &attempt->received;
    batch_start(attempt, ops, download ? 2 : 3, &attempt->status_tag);
    // The driver may end and free the attempt as soon as all of `waiting` have been started, so not before this:
    if (download) {
        receive_next(attempt);
    }
}

bkv_attempt_t *bkv_attempt_new(bkv_call_t *call, const bkv_call_kind_t *kind, grpc_slice request) {
    bkv_attempt_t *attempt = calloc(1, sizeof *attempt);
    if (attempt == NULL) {
        return NULL;
    }
    attempt->call = call;
    attempt->kind = kind;
    attempt->send_tag = (bkv_call_tag_t){.run = on_send, .owner = attempt};
    attempt->status_tag = (bkv_call_tag_t){.run = on_status, .owner = attempt};
    attempt->receive_tag = (bkv_call_tag_t){.run = on_receive, .owner = attempt};
    attempt->code = GRPC_STATUS_UNKNOWN;
    attempt->details = grpc_empty_slice();
    attempt->waiting = kind->shape == BKV_CALL_DOWNLOAD ? 2 : 1;
    grpc_metadata_array_init(&attempt->initial);
    grpc_metadata_array_init(&attempt->trailing);
    attempt->grpc = grpc_channel_create_call(call->endpoint->channel, NULL, GRPC_PROPAGATE_DEFAULTS, call->client->completions,
                                             grpc_slice_from_static_string(kind->method), NULL,
                                             bkv_client_timespec(call->deadline_ns), NULL);
    if (kind->reset != NULL) {
        kind->reset(call);
    }
    if (kind->next != NULL) {
        prepare(attempt);
    } else {
        attempt->prepared = grpc_raw_byte_buffer_create(&request, 1);
        attempt->prepared_last = true;
    }
    return attempt;
}

void bkv_attempt_start(bkv_attempt_t *attempt) {
    send_prepared(attempt, true);
    receive_all(attempt);
}

// ---- its end ----

bkv_error_t bkv_attempt_result(const bkv_attempt_t *attempt, bool cancelled, bool moving) {
    const bkv_call_t *call = attempt->call;
    bool late = bkv_client_now_ns() + ROUNDING_MS * NS_PER_MS >= call->deadline_ns;
    bkv_error_t result = {.status = BKV_OK};
    if (cancelled) {
        bkv_fail(&result, BKV_CANCELLED, "cancelled by its caller");
    } else if (attempt->fault.status != BKV_OK) {
        result = attempt->fault;
    } else if (attempt->code == GRPC_STATUS_CANCELLED && moving) {
        bkv_fail(&result, BKV_BUSY, "%.150s: does not answer", call->endpoint->target.address);
    } else if (attempt->code == GRPC_STATUS_OK && !attempt->answered && attempt->kind->shape != BKV_CALL_DOWNLOAD) {
        // gRPC may drop a response that comes just as the deadline passes, but not its status.
        bkv_fail(&result, late ? BKV_DEADLINE_EXCEEDED : BKV_INTERNAL, "%s: answered OK without a response",
                 attempt->kind->method);
    } else if (attempt->code == GRPC_STATUS_DEADLINE_EXCEEDED && late) {
        bkv_fail(&result, BKV_DEADLINE_EXCEEDED, "not done within %u ms%s%.180s", call->timeout_ms,
                 call->error.status != BKV_OK ? "; before: " : "", call->error.message);
    } else if (attempt->code != GRPC_STATUS_OK) {
        result.status = bkv_client_status((uint32_t)attempt->code);
        bkv_client_text(GRPC_SLICE_START_PTR(attempt->details), GRPC_SLICE_LENGTH(attempt->details), result.message,
                        sizeof result.message);
    }
    return result;
}

// The daemon names its request wherever it fails one, and only it says OK. After an answer that makes no sense, its word counts
// for nothing.
bool bkv_attempt_answered(const bkv_attempt_t *attempt) {
    bool named = false;
    for (size_t i = 0; i < attempt->trailing.count; i++) {
        named = named || grpc_slice_str_cmp(attempt->trailing.metadata[i].key, REQUEST_ID_KEY) == 0;
    }
    return attempt->fault.status == BKV_OK && (named || attempt->code == GRPC_STATUS_OK);
}
