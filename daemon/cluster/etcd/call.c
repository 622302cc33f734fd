// call.c - one call, from its start to its end, over as many attempts as it takes: which endpoint, when again, with which
// token. What is in the messages is kv.c's.
//
// An attempt may outlive its call (proto/exchange.h), and therefore owns all that gRPC has been given.
#include "daemon/cluster/etcd/internal.h"

#include "daemon/observe/clock.h"
#include "etcd.pb-c.h"
#include "proto/answer.h"

#include <assert.h>
#include <grpc/byte_buffer.h>
#include <stdlib.h>
#include <string.h>

#define LOGIN_MS   5000
#define LOGINS_MAX 2 // of one call: its token was refused

// gRPC counts in milliseconds: a deadline may pass a little early.
#define ROUNDING_MS 5

struct bkv_etcd_attempt {
    bkv_exchange_t exchange;
    bkv_etcd_t *etcd;
    bkv_etcd_call_t *call; // NULL: it has gone on without this attempt
    uint32_t endpoint;
    grpc_metadata metadata[BKV_ETCD_METADATA];
    char *token; // that was sent; NULL: none
};

static void on_timer(void *self);

// ---- what an answer means ----

static bool says(grpc_slice details, const char *words) {
    size_t length = strlen(words), room = GRPC_SLICE_LENGTH(details);
    return memmem(GRPC_SLICE_START_PTR(details), room, words, length) != NULL;
}

static bkv_status_t status_of(grpc_status_code code) {
    bool compacted = code == GRPC_STATUS_OUT_OF_RANGE; // a revision that was
    return compacted ? BKV_FAILED_PRECONDITION : bkv_answer_status((uint32_t)code);
}

static void describe(grpc_slice details, bkv_status_t status, bkv_error_t *error) {
    char text[BKV_MESSAGE_MAX];
    bkv_answer_text(GRPC_SLICE_START_PTR(details), GRPC_SLICE_LENGTH(details), text, sizeof(text));
    bkv_fail(error, status, "%s%.200s", strncmp(text, "etcdserver: ", 12) == 0 ? "" : "etcd: ", text);
}

bkv_etcd_verdict_t bkv_etcd_judge(grpc_status_code code, grpc_slice details, bkv_error_t *error) {
    bkv_status_t status = status_of(code);
    bkv_etcd_verdict_t verdict = BKV_ETCD_FINAL;
    switch ((int)code) {
    case GRPC_STATUS_UNAVAILABLE: // no connection, no leader, a leader that changed
    case GRPC_STATUS_DEADLINE_EXCEEDED:
    case GRPC_STATUS_ABORTED:
    case GRPC_STATUS_CANCELLED: // not by us: the server ends
        verdict = BKV_ETCD_RETRY;
        break;
    case GRPC_STATUS_RESOURCE_EXHAUSTED:
        verdict = says(details, "too many requests") ? BKV_ETCD_RETRY : BKV_ETCD_FINAL;
        break;
    case GRPC_STATUS_UNAUTHENTICATED: // the token is no longer known: etcd was restarted, or it was not used for 5 minutes
        verdict = BKV_ETCD_LOGIN;
        break;
    case GRPC_STATUS_INVALID_ARGUMENT:
        if (says(details, "user name is empty") || says(details, "auth store is old")) {
            status = BKV_UNAUTHENTICATED;
            verdict = BKV_ETCD_LOGIN;
        } else if (says(details, "authentication failed")) {
            status = BKV_UNAUTHENTICATED;
        }
        break;
    default:
        break;
    }
    describe(details, status, error);
    return verdict;
}

// ---- an attempt ----

static void on_over(bkv_exchange_t *exchange);

static grpc_byte_buffer *on_next(bkv_exchange_t *exchange, bool *last) {
    *last = true;
    return grpc_byte_buffer_copy(((bkv_etcd_attempt_t *)exchange)->call->request);
}

static void on_gone(bkv_exchange_t *exchange) {
    bkv_etcd_attempt_t *attempt = (bkv_etcd_attempt_t *)exchange;
    attempt->etcd->attempt_count--;
    bkv_exchange_deinit(exchange);
    bkv_etcd_metadata_free(attempt->metadata, exchange->metadata_count);
    free(attempt->token);
    free(attempt);
}

static const bkv_exchange_hooks_t hooks = {.next = on_next, .over = on_over, .gone = on_gone};

static bkv_etcd_attempt_t *attempt_new(bkv_etcd_call_t *call, uint64_t deadline_ms) {
    bkv_etcd_t *etcd = call->etcd;
    bkv_etcd_attempt_t *attempt = calloc(1, sizeof(*attempt));
    if (attempt == NULL) {
        return NULL;
    }
    attempt->etcd = etcd;
    attempt->call = call;
    attempt->endpoint = etcd->current;
    attempt->token = etcd->token != NULL ? strdup(etcd->token) : NULL;
    bkv_exchange_t *exchange = &attempt->exchange;
    bkv_exchange_init(exchange, &hooks, BKV_UNARY,
                      grpc_channel_create_call(etcd->channels[etcd->current], NULL, GRPC_PROPAGATE_DEFAULTS, etcd->completions,
                                               grpc_slice_from_static_string(call->kind->method), NULL,
                                               bkv_etcd_timespec(deadline_ms), NULL));
    exchange->metadata = attempt->metadata;
    exchange->metadata_count = bkv_etcd_metadata(etcd, attempt->metadata);
    bkv_exchange_prepare(exchange); // without memory gRPC ends the process
    etcd->attempt_count++;
    return attempt;
}

// ---- the end of a call ----

static void call_free(bkv_etcd_t *etcd, bkv_etcd_call_t *call) {
    bkv_etcd_timer_stop(etcd, &call->timer);
    if (call->attempt != NULL) {
        call->attempt->call = NULL;
        grpc_call_cancel(call->attempt->exchange.grpc, NULL);
    }
    if (call->previous != NULL) {
        call->previous->next = call->next;
    } else {
        etcd->calls = call->next;
    }
    if (call->next != NULL) {
        call->next->previous = call->previous;
    }
    etcd->call_count--;
    grpc_byte_buffer_destroy(call->request);
    free(call);
}

static void call_conclude(bkv_etcd_call_t *call, const bkv_error_t *error, const ProtobufCMessage *response) {
    bkv_etcd_t *etcd = call->etcd;
    if (etcd->login == call) {
        etcd->login = NULL;
    }
    call->kind->finish(call, error, response);
    call_free(etcd, call);
}

static void call_too_late(bkv_etcd_call_t *call) {
    bkv_error_t error;
    bkv_fail(&error, BKV_DEADLINE_EXCEEDED, "etcd: not done within %u ms; %.180s", call->timeout_ms,
             call->last.status != BKV_OK ? call->last.message : "nobody has answered");
    call_conclude(call, &error, NULL);
}

void bkv_etcd_calls_cancel(bkv_etcd_t *etcd) {
    bkv_error_t error;
    bkv_fail(&error, BKV_CANCELLED, "etcd: the client is being destroyed");
    if (etcd->login != NULL) {
        call_conclude(etcd->login, &error, NULL); // with those that wait for it
    }
    for (bkv_etcd_call_t *call = etcd->calls, *next; call != NULL; call = next) {
        next = call->next; // which this one's end does not end; and none is started any more
        call_conclude(call, &error, NULL);
    }
}

// ---- the login ----

// What the callers of the login are told: they go on with the token, or try again, or have failed as well.
static void login_finish(bkv_etcd_call_t *login, const bkv_error_t *error, const ProtobufCMessage *response) {
    bkv_etcd_t *etcd = login->etcd;
    bkv_error_t fault = *error;
    const char *token = response != NULL ? ((const Etcdserverpb__AuthenticateResponse *)response)->token : "";
    bool off = fault.status == BKV_FAILED_PRECONDITION; // "authentication is not enabled": none needed
    if (fault.status == BKV_OK || off) {
        grpc_slice slice = grpc_slice_from_copied_string(off ? "" : token);
        bool usable =
            off || (token[0] != '\0' && strlen(token) <= BKV_ETCD_TOKEN_MAX && grpc_header_nonbin_value_is_legal(slice));
        grpc_slice_unref(slice);
        free(etcd->token);
        etcd->token = usable ? strdup(off ? "" : token) : NULL;
        fault.status = BKV_OK;
        if (etcd->token == NULL) {
            bkv_fail(&fault, BKV_INTERNAL, "etcd: the login was answered without a token that could be used");
        }
    }
    for (bkv_etcd_call_t *call = etcd->calls, *next; call != NULL; call = next) {
        next = call->next; // a call that concludes may start others, but those come first in the list
        if (!call->waits_for_login) {
            continue;
        }
        call->waits_for_login = false;
        call->last = fault;
        if (fault.status == BKV_OK || fault.status == BKV_DEADLINE_EXCEEDED) {
            bkv_etcd_timer_start(etcd, &call->timer, 0, on_timer, call);
        } else {
            call_conclude(call, &fault, NULL);
        }
    }
}

static const bkv_etcd_kind_t login_kind = {
    .method = "/etcdserverpb.Auth/Authenticate",
    .response = &etcdserverpb__authenticate_response__descriptor,
    .finish = login_finish,
    .is_login = true,
};

// Has a call wait for a token, and sees that somebody gets one. The login's own end may be before the return.
static void wait_for_login(bkv_etcd_call_t *call, uint64_t left_ms) {
    bkv_etcd_t *etcd = call->etcd;
    call->waits_for_login = true;
    bkv_etcd_timer_start(etcd, &call->timer, left_ms, on_timer, call);
    if (etcd->login != NULL) {
        return;
    }
    Etcdserverpb__AuthenticateRequest request = ETCDSERVERPB__AUTHENTICATE_REQUEST__INIT;
    request.name = etcd->user;
    request.password = etcd->password;
    bkv_error_t error;
    if (bkv_etcd_call_start(etcd, &login_kind, &request.base, 0, LOGIN_MS, NULL, NULL, &error) != BKV_OK) {
        call_conclude(call, &error, NULL);
    }
}

// ---- from attempt to attempt ----

// Goes on with a call, wherever it is.
static void call_next(bkv_etcd_call_t *call) {
    bkv_etcd_t *etcd = call->etcd;
    uint64_t now_ms = bkv_now_ms();
    if (now_ms + ROUNDING_MS >= call->deadline_ms) {
        call_too_late(call);
        return;
    }
    uint64_t left_ms = call->deadline_ms - now_ms;
    if (etcd->user != NULL && etcd->token == NULL && !call->kind->is_login) {
        wait_for_login(call, left_ms);
        return;
    }
    call->attempts++;
    call->attempt = attempt_new(call, now_ms + (left_ms < etcd->attempt_ms ? left_ms : etcd->attempt_ms));
    if (call->attempt == NULL) {
        bkv_error_t error;
        bkv_fail(&error, BKV_RESOURCE_EXHAUSTED, "etcd: out of memory");
        call_conclude(call, &error, NULL);
        return;
    }
    bkv_exchange_start(&call->attempt->exchange);
}

// A pause is over, or the time for which a login was waited for.
static void on_timer(void *self) {
    bkv_etcd_call_t *call = self;
    call->waits_for_login = false;
    call_next(call);
}

// All endpoints have their turn before the first pause.
static void try_again(bkv_etcd_call_t *call) {
    bkv_etcd_t *etcd = call->etcd;
    uint32_t rounds = call->attempts / etcd->endpoint_count;
    bool whole = call->attempts % etcd->endpoint_count == 0;
    uint64_t pause_ms = whole ? bkv_etcd_pause_ms(etcd, rounds) : 0, now_ms = bkv_now_ms();
    if (now_ms + pause_ms > call->deadline_ms) {
        pause_ms = call->deadline_ms > now_ms ? call->deadline_ms - now_ms : 0;
    }
    bkv_etcd_timer_start(etcd, &call->timer, pause_ms, on_timer, call);
}

// A token was refused. It is dropped, unless it has been replaced meanwhile, and the call gets another.
static void login_again(bkv_etcd_call_t *call, const char *refused) {
    bkv_etcd_t *etcd = call->etcd;
    if (etcd->user == NULL || call->kind->is_login || ++call->logins > LOGINS_MAX) {
        call_conclude(call, &call->last, NULL);
        return;
    }
    if (etcd->token != NULL && refused != NULL && strcmp(etcd->token, refused) == 0) {
        free(etcd->token);
        etcd->token = NULL;
    }
    call_next(call);
}

void bkv_etcd_call_answer(bkv_etcd_call_t *call, grpc_byte_buffer *message) {
    ProtobufCMessage *response = bkv_etcd_unpack(call->kind->response, message);
    if (response == NULL) {
        bkv_fail(&call->last, BKV_INTERNAL, "etcd: the answer to %s is none", call->kind->method);
        call_conclude(call, &call->last, NULL);
        return;
    }
    call->last.status = BKV_OK;
    call_conclude(call, &call->last, response);
    protobuf_c_message_free_unpacked(response, NULL);
}

static void on_over(bkv_exchange_t *exchange) {
    bkv_etcd_attempt_t *attempt = (bkv_etcd_attempt_t *)exchange;
    bkv_etcd_call_t *call = attempt->call;
    if (call == NULL) {
        return;
    }
    call->attempt = NULL;
    attempt->call = NULL;
    if (exchange->code == GRPC_STATUS_OK) {
        bkv_etcd_call_answer(call, exchange->received);
        return;
    }
    bkv_etcd_verdict_t verdict = bkv_etcd_judge(exchange->code, exchange->details, &call->last);
    if (verdict == BKV_ETCD_RETRY) {
        bkv_etcd_endpoint_failed(attempt->etcd, attempt->endpoint);
        try_again(call);
    } else if (verdict == BKV_ETCD_LOGIN) {
        login_again(call, attempt->token);
    } else {
        call_conclude(call, &call->last, NULL);
    }
}

bkv_status_t bkv_etcd_call_start(bkv_etcd_t *etcd, const bkv_etcd_kind_t *kind, const ProtobufCMessage *request, int64_t lease,
                                 uint32_t timeout_ms, bkv_etcd_done_t done, void *user, bkv_error_t *err) {
    assert(bkv_etcd_is_own_thread(etcd));
    if (etcd->shutting || (etcd->call_count >= BKV_ETCD_CALLS_MAX && !kind->is_login)) {
        return bkv_fail(err, BKV_BUSY, etcd->shutting ? "etcd: the client is being destroyed" : "etcd: %d calls in flight",
                        BKV_ETCD_CALLS_MAX);
    }
    bkv_etcd_call_t *call = calloc(1, sizeof(*call));
    if (call == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "etcd: out of memory");
    }
    *call = (bkv_etcd_call_t){
        .kind = kind,
        .etcd = etcd,
        .done = done,
        .user = user,
        .lease = lease,
        .request = bkv_etcd_pack(request),
        .timeout_ms = timeout_ms,
        .deadline_ms = bkv_now_ms() + timeout_ms,
        .next = etcd->calls,
    };
    if (call->next != NULL) {
        call->next->previous = call;
    }
    etcd->calls = call;
    etcd->call_count++;
    if (kind->is_login) {
        etcd->login = call;
    }
    // Not now: nobody's callback runs before this has returned.
    bkv_etcd_timer_start(etcd, &call->timer, 0, on_timer, call);
    return BKV_OK;
}
