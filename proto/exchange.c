// exchange.c - see exchange.h. Two batches make the result, one that takes the status and, for a download, one after the other that
// take its messages; the batches that send do not count, as a socket that blocks may keep them.
#include "proto/exchange.h"

#include "proto/answer.h"
#include "proto/handover.h"

#include <assert.h>
#include <grpc/byte_buffer.h>
#include <string.h>

// A message that is no longer may wait for the next one and go out with it.
#define SMALL_MESSAGE 2048

void bkv_batch_start(grpc_call *call, const grpc_op *ops, size_t count, bkv_batch_tag_t *tag) {
    BKV_HAND_OVER(tag);
    grpc_call_error error = grpc_call_start_batch(call, ops, count, tag, NULL);
    assert(error == GRPC_CALL_OK);
    (void)error;
}

void bkv_batch_back(const grpc_event *event) {
    bkv_batch_tag_t *tag = event->tag;
    BKV_TAKE_OVER(tag);
    tag->run(tag->owner, event->success != 0);
}

static void give_up(bkv_exchange_t *exchange) {
    exchange->given_up = true;
    grpc_call_cancel(exchange->grpc, NULL);
}

static void drop_prepared(bkv_exchange_t *exchange) {
    grpc_byte_buffer_destroy(exchange->prepared);
    exchange->prepared = NULL;
}

// ---- receiving ----

static void batch_received(bkv_exchange_t *exchange) {
    if (--exchange->waiting > 0) {
        return;
    }
    bool sending = exchange->sending; // answered early, or late: nobody wants the rest
    if (sending) {
        grpc_call_cancel(exchange->grpc, NULL);
    }
    drop_prepared(exchange); // and with it what it refers to
    exchange->over = true;
    exchange->hooks->over(exchange);
    if (!sending) {
        exchange->hooks->gone(exchange);
    }
}

static void take(bkv_exchange_t *exchange) {
    if (exchange->hooks->take != NULL && !exchange->hooks->take(exchange, exchange->received)) {
        give_up(exchange);
    }
    exchange->answered = true;
}

static void on_status(void *owner, bool ok) {
    bkv_exchange_t *exchange = owner;
    (void)ok; // the status says it
    if (exchange->received != NULL && exchange->shape != BKV_DOWNLOAD) {
        take(exchange);
    }
    batch_received(exchange);
}

static void receive_next(bkv_exchange_t *exchange) {
    grpc_op op = {.op = GRPC_OP_RECV_MESSAGE, .data.recv_message.recv_message = &exchange->received};
    bkv_batch_start(exchange->grpc, &op, 1, &exchange->receive_tag);
}

static void on_receive(void *owner, bool ok) {
    bkv_exchange_t *exchange = owner;
    bool more = ok && exchange->received != NULL;
    if (more) {
        take(exchange);
        grpc_byte_buffer_destroy(exchange->received);
        exchange->received = NULL;
    }
    if (more && !exchange->given_up) {
        receive_next(exchange);
    } else {
        batch_received(exchange);
    }
}

// A batch for the result, which is there when the call has ended; and for a download one for its messages.
static void receive_all(bkv_exchange_t *exchange) {
    bool download = exchange->shape == BKV_DOWNLOAD;
    grpc_op ops[3];
    memset(ops, 0, sizeof(ops));
    ops[0].op = GRPC_OP_RECV_INITIAL_METADATA;
    ops[0].data.recv_initial_metadata.recv_initial_metadata = &exchange->initial;
    ops[1].op = GRPC_OP_RECV_STATUS_ON_CLIENT;
    ops[1].data.recv_status_on_client.trailing_metadata = &exchange->trailing;
    ops[1].data.recv_status_on_client.status = &exchange->code;
    ops[1].data.recv_status_on_client.status_details = &exchange->details;
    ops[2].op = GRPC_OP_RECV_MESSAGE;
    ops[2].data.recv_message.recv_message = &exchange->received;
    bkv_batch_start(exchange->grpc, ops, download ? 2 : 3, &exchange->status_tag);
    // The exchange may be gone as soon as all of `waiting` have been started, so not before this:
    if (download) {
        receive_next(exchange);
    }
}

// ---- sending ----

bool bkv_exchange_prepare(bkv_exchange_t *exchange) {
    exchange->prepared = exchange->hooks->next(exchange, &exchange->last);
    exchange->is_prepared = true;
    return exchange->prepared != NULL || exchange->last;
}

// Sends what is prepared; with the first message go the metadata that open the call, with the last one its end.
static void send_prepared(bkv_exchange_t *exchange, bool first) {
    grpc_op ops[3];
    memset(ops, 0, sizeof(ops));
    size_t n = 0;
    exchange->message = exchange->prepared;
    exchange->prepared = NULL;
    exchange->is_prepared = false;
    exchange->sending = true;
    if (first) {
        ops[n].flags = exchange->metadata_flags;
        ops[n].data.send_initial_metadata.metadata = exchange->metadata;
        ops[n].data.send_initial_metadata.count = exchange->metadata_count;
        ops[n++].op = GRPC_OP_SEND_INITIAL_METADATA;
    }
    if (exchange->message != NULL) {
        size_t length = grpc_byte_buffer_length(exchange->message); // before it is sent, which empties it
        exchange->sent_bytes += length;
        ops[n].flags = first || exchange->last || length > SMALL_MESSAGE ? 0 : GRPC_WRITE_BUFFER_HINT;
        ops[n].op = GRPC_OP_SEND_MESSAGE;
        ops[n++].data.send_message.send_message = exchange->message;
    }
    if (exchange->last) {
        ops[n++].op = GRPC_OP_SEND_CLOSE_FROM_CLIENT;
    }
    bkv_batch_start(exchange->grpc, ops, n, &exchange->send_tag);
}

// The message after the next is made while the next is on its way.
static void send_next(bkv_exchange_t *exchange) {
    bool good = exchange->is_prepared || bkv_exchange_prepare(exchange);
    if (good) {
        send_prepared(exchange, false);
        good = exchange->last || bkv_exchange_prepare(exchange);
    }
    if (!good) {
        give_up(exchange);
    }
}

static void on_send(void *owner, bool ok) {
    bkv_exchange_t *exchange = owner;
    bool more = !exchange->last || exchange->is_prepared;
    grpc_byte_buffer_destroy(exchange->message);
    exchange->message = NULL;
    exchange->sending = false;
    if (exchange->over) {
        exchange->hooks->gone(exchange); // it was kept for this
        return;
    }
    if (ok && exchange->hooks->sent != NULL) {
        exchange->hooks->sent(exchange);
    }
    if (ok && more && !exchange->given_up) {
        send_next(exchange);
    }
}

// ---- life ----

// There was nothing to send: an empty batch, which comes back at once.
static void on_nothing(void *owner, bool ok) {
    bkv_exchange_t *exchange = owner;
    (void)ok;
    exchange->code = GRPC_STATUS_OK;
    batch_received(exchange);
}

void bkv_exchange_init(bkv_exchange_t *exchange, const bkv_exchange_hooks_t *hooks, bkv_exchange_shape_t shape,
                       grpc_call *grpc) {
    exchange->hooks = hooks;
    exchange->shape = shape;
    exchange->grpc = grpc;
    exchange->waiting = shape == BKV_DOWNLOAD ? 2 : 1;
    exchange->code = GRPC_STATUS_UNKNOWN;
    exchange->details = grpc_empty_slice();
    exchange->send_tag = (bkv_batch_tag_t){.run = on_send, .owner = exchange};
    exchange->status_tag = (bkv_batch_tag_t){.run = on_status, .owner = exchange};
    exchange->receive_tag = (bkv_batch_tag_t){.run = on_receive, .owner = exchange};
    grpc_metadata_array_init(&exchange->initial);
    grpc_metadata_array_init(&exchange->trailing);
}

void bkv_exchange_start(bkv_exchange_t *exchange) {
    if (exchange->prepared != NULL) {
        send_prepared(exchange, true);
        receive_all(exchange);
        return;
    }
    exchange->empty = true;
    exchange->waiting = 1;
    exchange->status_tag.run = on_nothing;
    bkv_batch_start(exchange->grpc, NULL, 0, &exchange->status_tag);
}

void bkv_exchange_deinit(bkv_exchange_t *exchange) {
    grpc_call_unref(exchange->grpc);
    drop_prepared(exchange);
    grpc_byte_buffer_destroy(exchange->message);
    grpc_byte_buffer_destroy(exchange->received);
    grpc_metadata_array_destroy(&exchange->initial);
    grpc_metadata_array_destroy(&exchange->trailing);
    grpc_slice_unref(exchange->details);
}

bool bkv_exchange_named(const bkv_exchange_t *exchange) {
    for (size_t i = 0; i < exchange->trailing.count; i++) {
        if (grpc_slice_str_cmp(exchange->trailing.metadata[i].key, BKV_ANSWER_REQUEST_ID) == 0) {
            return true;
        }
    }
    return false;
}
