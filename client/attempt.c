// attempt.c - see attempt.h. What goes into an attempt, and what its end means.
#include "client/attempt.h"

#include "client/client.h"
#include "proto/answer.h"

#include <grpc/byte_buffer.h>
#include <stdlib.h>

#define NS_PER_MS 1000000ull

// gRPC counts in milliseconds: a deadline may pass a little early.
#define ROUNDING_MS 5

static grpc_byte_buffer *on_next(bkv_exchange_t *exchange, bool *last) {
    bkv_attempt_t *attempt = (bkv_attempt_t *)exchange;
    if (attempt->kind->next != NULL) {
        return attempt->kind->next(attempt->call, last);
    }
    *last = true;
    return grpc_raw_byte_buffer_create(&attempt->request, 1);
}

static bool on_take(bkv_exchange_t *exchange, grpc_byte_buffer *message) {
    bkv_attempt_t *attempt = (bkv_attempt_t *)exchange;
    bkv_client_endpoint_heard(attempt->call, false);
    return attempt->kind->take == NULL || attempt->kind->take(attempt->call, message, &attempt->fault) == BKV_OK;
}

static void on_over(bkv_exchange_t *exchange) {
    bkv_call_attempted((bkv_attempt_t *)exchange);
}

static void on_gone(bkv_exchange_t *exchange) {
    bkv_attempt_t *attempt = (bkv_attempt_t *)exchange;
    bkv_exchange_deinit(exchange);
    grpc_slice_unref(attempt->request);
    free(attempt);
}

static const bkv_exchange_hooks_t hooks = {.next = on_next, .take = on_take, .over = on_over, .gone = on_gone};

bkv_attempt_t *bkv_attempt_new(bkv_call_t *call, const bkv_call_kind_t *kind, grpc_slice request) {
    bkv_attempt_t *attempt = calloc(1, sizeof *attempt);
    if (attempt == NULL) {
        return NULL;
    }
    attempt->call = call;
    attempt->kind = kind;
    attempt->request = grpc_slice_ref(request);
    bkv_exchange_init(&attempt->exchange, &hooks, kind->shape,
                      grpc_channel_create_call(call->endpoint->channel, NULL, GRPC_PROPAGATE_DEFAULTS,
                                               call->client->completions, grpc_slice_from_static_string(kind->method), NULL,
                                               bkv_client_timespec(call->deadline_ns), NULL));
    if (kind->reset != NULL) {
        kind->reset(call);
    }
    bkv_exchange_prepare(&attempt->exchange); // without memory gRPC ends the process
    return attempt;
}

void bkv_attempt_start(bkv_attempt_t *attempt) {
    bkv_exchange_start(&attempt->exchange);
}

// ---- its end ----

bkv_error_t bkv_attempt_result(const bkv_attempt_t *attempt, bool cancelled, bool moving) {
    const bkv_call_t *call = attempt->call;
    const bkv_exchange_t *exchange = &attempt->exchange;
    bool late = bkv_client_now_ns() + ROUNDING_MS * NS_PER_MS >= call->deadline_ns;
    bkv_error_t result = {.status = BKV_OK};
    if (cancelled) {
        bkv_fail(&result, BKV_CANCELLED, "cancelled by its caller");
    } else if (attempt->fault.status != BKV_OK) {
        result = attempt->fault;
    } else if (exchange->code == GRPC_STATUS_CANCELLED && moving) {
        bkv_fail(&result, BKV_BUSY, "%.150s: does not answer", call->endpoint->target.address);
    } else if (exchange->code == GRPC_STATUS_OK && !exchange->answered && attempt->kind->shape != BKV_DOWNLOAD) {
        // gRPC may drop a response that comes just as the deadline passes, but not its status.
        bkv_fail(&result, late ? BKV_DEADLINE_EXCEEDED : BKV_INTERNAL, "%s: answered OK without a response",
                 attempt->kind->method);
    } else if (exchange->code == GRPC_STATUS_DEADLINE_EXCEEDED && late) {
        bkv_fail(&result, BKV_DEADLINE_EXCEEDED, "not done within %u ms%s%.180s", call->timeout_ms,
                 call->error.status != BKV_OK ? "; before: " : "", call->error.message);
    } else if (exchange->code != GRPC_STATUS_OK) {
        result.status = bkv_answer_status((uint32_t)exchange->code);
        bkv_answer_text(GRPC_SLICE_START_PTR(exchange->details), GRPC_SLICE_LENGTH(exchange->details), result.message,
                        sizeof result.message);
    }
    return result;
}

// The daemon names its request wherever it fails one, and only it says OK. After an answer that makes no sense, its word counts
// for nothing.
bool bkv_attempt_answered(const bkv_attempt_t *attempt) {
    const bkv_exchange_t *exchange = &attempt->exchange;
    return attempt->fault.status == BKV_OK && (bkv_exchange_named(exchange) || exchange->code == GRPC_STATUS_OK);
}
