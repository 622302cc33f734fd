// call.c - the course of a call: its attempts, and after each what comes next; the result, and who is told. How an attempt goes is
// attempt.c's business, what is sent and received operations/', where to go endpoints/', when to sleep and what to cancel
// client.c's, which thread runs this drive.c's.
#include "client/attempt.h"
#include "client/client.h"

#include <assert.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#define NS_PER_MS 1000000ull

// Pauses between attempts double from the first to the longest; half of each is random.
#define PAUSE_FIRST_MS   10
#define PAUSE_LONGEST_MS 500

// Time that an attempt must have left: with less, it would rather end by the deadline, and hide what those before it have heard.
#define ATTEMPT_MS 50

// How the daemon says that a session has ended: of a Put's block with "block[N]." before it.
#define SESSION_FIELD "place.session: "

// How often a call looks for another session.
#define REJOIN_MOST 3

static const bkv_call_kind_t open_kind = {.method = BKV_CLIENT_SERVICE "Open", .shape = BKV_UNARY};

void bkv_call_conclude(bkv_call_t *call) {
    bkv_client_t *client = call->client;
    bkv_client_remove(client, call);
    if (call->over != NULL) {
        call->over(call);
    } else if (call->queue != NULL) {
        bkv_queue_deliver(call->queue, call);
    } else {
        bkv_client_tell(client, call);
    }
    bkv_client_leave(client);
}

// ---- before an attempt ----

// Where the next attempt goes. At another endpoint the call begins anew. The lock must be held.
static void choose_endpoint(bkv_call_t *call) {
    bkv_client_endpoint_t *endpoint = bkv_client_endpoint_choose(call);
    if (endpoint != call->endpoint) {
        call->endpoint = endpoint;
        call->reopening = call->reopened = false;
        call->missed.status = BKV_OK;
        call->rejoined = call->busy = 0;
    }
    call->moving = false;
    call->begun_ns = bkv_client_now_ns();
}

// Is the next attempt to be the call itself, or an Open before it? Returns the request, referenced.
static grpc_slice choose_request(bkv_call_t *call) {
    bkv_client_t *client = call->client;
    pthread_mutex_lock(&client->lock);
    choose_endpoint(call);
    bkv_client_spec_t *spec = call->kind->names_spec ? bkv_client_spec_find(client, &call->spec_id) : NULL;
    bkv_client_opened_t opened = {.known = false};
    if (spec != NULL) {
        opened = bkv_client_spec_opened(spec, call->endpoint);
    }
    call->spec_epoch = opened.boot_epoch;
    if (spec != NULL && !(opened.known && opened.boot_epoch == call->endpoint->boot_epoch) && !call->reopened) {
        call->reopening = call->reopened = true;
    }
    grpc_slice request = grpc_slice_ref(spec != NULL && call->reopening ? spec->request : call->request);
    pthread_mutex_unlock(&client->lock);
    return request;
}

// Shows the attempt to those who may want to cancel it. False: somebody wanted to already.
static bool attempt_publish(bkv_attempt_t *attempt) {
    bkv_call_t *call = attempt->call;
    pthread_mutex_lock(&call->client->lock);
    bool go = !call->cancelled && !call->client->closing;
    call->cancelled = !go;
    call->attempt = attempt;
    bool wake = bkv_client_watch_begin(call->client);
    pthread_mutex_unlock(&call->client->lock);
    if (wake) {
        bkv_client_wake(call->client);
    }
    return go;
}

// SplitMix64 (Steele, Lea, Flood 2014): any thread may take the next one.
static uint64_t next_random(bkv_client_t *client) {
    uint64_t z = atomic_fetch_add(&client->jitter, 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static uint64_t pause_ns(bkv_call_t *call) {
    uint64_t ms = PAUSE_LONGEST_MS;
    if (call->attempts < 6) {
        ms = PAUSE_FIRST_MS << (call->attempts - 1);
    }
    uint64_t half = ms * NS_PER_MS / 2;
    return half + next_random(call->client) % half;
}

// UNAVAILABLE: not connected, connection lost, or the daemon is busy or draining. Try again while there is time.
static void pause_or_conclude(bkv_call_t *call) {
    uint64_t due_ns = bkv_client_now_ns() + pause_ns(call);
    if (due_ns + ATTEMPT_MS * NS_PER_MS >= call->deadline_ns) {
        bkv_error_t last = call->error;
        bkv_fail(&call->error, BKV_BUSY, "tried %u times within %u ms: %.200s", call->attempts, call->timeout_ms, last.message);
        bkv_call_conclude(call);
    } else if (!bkv_client_pause(call->client, call, due_ns)) {
        bkv_fail(&call->error, BKV_CANCELLED, "cancelled by its caller");
        bkv_call_conclude(call);
    }
}

// After BUSY: goes elsewhere at once, where that makes sense and there is time, or waits. answered: by the daemon's own word.
static void try_again(bkv_call_t *call, bool answered) {
    bool time = bkv_client_now_ns() + ATTEMPT_MS * NS_PER_MS < call->deadline_ns;
    if (time && bkv_client_endpoint_forsake(call, answered)) {
        bkv_call_start(call);
    } else if (call->kind->fail_fast) {
        bkv_call_conclude(call);
    } else {
        pause_or_conclude(call);
    }
}

void bkv_call_move(bkv_call_t *call) {
    bkv_fail(&call->error, BKV_BUSY, "%.150s: does not answer", call->endpoint->target.address);
    call->attempts++;
    try_again(call, false);
}

// Finds the memory that the attempt may use. False: the call goes on elsewhere, or is over.
static bool find_window(bkv_call_t *call) {
    const bkv_client_link_t *link = &call->endpoint->link;
    bool again = call->rejoined < REJOIN_MOST || !link->automatic;
    if (!call->places || !again || call->reopening || !bkv_client_link_wanted(link, call->place_bytes)) {
        return true;
    }
    switch (bkv_client_link_join(call)) {
    case BKV_LINK_READY:
        return true;
    case BKV_LINK_REFUSED:
        call->attempts++;
        if (call->error.status == BKV_BUSY) {
            try_again(call, true);
        } else {
            bkv_call_conclude(call);
        }
        return false;
    default:
        return false;
    }
}

void bkv_call_start(bkv_call_t *call) {
    grpc_slice request = choose_request(call);
    if (!find_window(call)) {
        grpc_slice_unref(request);
        return;
    }
    call->attempts++;
    bkv_attempt_t *attempt = bkv_attempt_new(call, call->reopening ? &open_kind : call->kind, request);
    grpc_slice_unref(request);
    if (attempt == NULL) {
        bkv_fail(&call->error, BKV_RESOURCE_EXHAUSTED, "client: out of memory");
        bkv_call_conclude(call);
        return;
    }
    if (!attempt_publish(attempt)) {
        grpc_call_cancel(attempt->exchange.grpc, NULL); // before its first batch: they all end at once
    }
    bkv_attempt_start(attempt);
}

// ---- after an attempt ----

// NOT_FOUND, perhaps for the spec, because the daemon was restarted. True: the call goes on.
static bool reopen(bkv_call_t *call, bool answered) {
    if (!call->kind->names_spec || answered || call->reopened) {
        return false;
    }
    pthread_mutex_lock(&call->client->lock);
    bkv_client_spec_t *spec = bkv_client_spec_find(call->client, &call->spec_id);
    bool known = spec != NULL;
    bool reopened_meanwhile = known && bkv_client_spec_opened(spec, call->endpoint).boot_epoch != call->spec_epoch;
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
    if (bkv_client_spec_reopened(call, answer, &boot_epoch, &call->error) != BKV_OK) {
        bkv_call_conclude(call);
    } else if (call->missed.status != BKV_OK && call->kind->may_miss && boot_epoch == call->spec_epoch) {
        call->error = call->missed;
        bkv_call_conclude(call);
    } else {
        bkv_call_start(call);
    }
}

// The attempt uses no memory any more. True: the daemon knew nothing of the session, and the call is to be tried again with
// another, or in the end without one.
static bool settle(bkv_call_t *call, const bkv_attempt_t *attempt, bool answered) {
    bkv_client_window_t *window = call->window;
    if (attempt->kind == call->kind && call->kind->settle != NULL) {
        call->kind->settle(call, answered);
    }
    call->window = NULL;
    bool lost = window != NULL && answered && call->error.status == BKV_FAILED_PRECONDITION &&
                strstr(call->error.message, SESSION_FIELD) != NULL;
    if (lost) {
        bkv_client_link_gone(call->endpoint, window);
        call->rejoined++;
    }
    bkv_client_window_release(window);
    return lost && call->rejoined <= REJOIN_MOST;
}

// What the end of an attempt says of its endpoint.
static void notice(bkv_call_t *call, bool answered) {
    if (answered) {
        bkv_client_endpoint_heard(call, call->error.status != BKV_BUSY);
    } else if (call->error.status == BKV_DEADLINE_EXCEEDED) {
        bkv_client_endpoint_unheard(call);
    }
}

// Decides what comes next. The call goes on, or is gone, without the attempt.
void bkv_call_attempted(bkv_attempt_t *attempt) {
    bkv_call_t *call = attempt->call;
    pthread_mutex_lock(&call->client->lock);
    call->attempt = NULL;
    bool cancelled = call->cancelled, moving = call->moving;
    pthread_mutex_unlock(&call->client->lock);
    call->error = bkv_attempt_result(attempt, cancelled, moving);
    bool answered = bkv_attempt_answered(attempt);
    notice(call, answered);
    if (settle(call, attempt, answered)) {
        bkv_call_start(call);
    } else if (call->error.status == BKV_BUSY) {
        try_again(call, answered);
    } else if (call->error.status == BKV_NOT_FOUND && call->kind->one_has_it && bkv_client_endpoint_ask_next(call)) {
        bkv_call_start(call);
    } else if (call->error.status == BKV_OK && call->reopening) {
        reopen_end(call, attempt->exchange.received);
    } else if (call->error.status != BKV_NOT_FOUND || !reopen(call, attempt->exchange.answered)) {
        bkv_call_conclude(call);
    }
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
    call->request = grpc_empty_slice();
    sem_init(&call->turn, 0, 0);
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
    sem_destroy(&call->turn);
    free(call);
}

static void call_begin(bkv_call_t *call) {
    call->started_ns = bkv_client_now_ns();
    call->deadline_ns = call->started_ns + call->timeout_ms * NS_PER_MS;
    bkv_client_enter(call->client, call);
    if (call->kind->start != NULL) {
        call->kind->start(call);
    } else {
        bkv_call_start(call);
    }
}

void bkv_call_bind(bkv_call_t *call, bkv_client_endpoint_t *endpoint) {
    call->endpoint = endpoint;
    call->bound = true;
}

void bkv_call_detach(bkv_call_t *call, void (*over)(bkv_call_t *call)) {
    call->over = over;
    call_begin(call);
}

bkv_status_t bkv_call_run(bkv_call_t *call, bkv_error_t *err) {
    if (call == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "client: out of memory");
    }
    call_begin(call);
    bkv_client_await(call->client, call);
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
