// client.c - creates and destroys clients, and knows their calls: those in flight, those on a pause between attempts, those to
// be cancelled. What a call does is call.c's, which thread drives it drive.c's, by which memory payloads move memory/'s.
#include "client/client.h"
#include "client/attempt.h"

#include <assert.h>
#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

#define DEFAULT_TIMEOUT_MS 10000
#define CANCEL_STEP        256
#define NS_PER_S           1000000000ull
#define NS_PER_MS          1000000ull

// How long bkv_client_destroy waits for gRPC to hand back the last batches. Only a socket that blocks takes longer.
#define LINGER_MS 200

// gRPC is started once and never stopped: grpc_shutdown may block for 10 s, and its threads end with the process anyway. The
// library is linked with -z nodelete for the same reason.
static pthread_once_t grpc_started = PTHREAD_ONCE_INIT;

uint64_t bkv_client_now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * NS_PER_S + (uint64_t)now.tv_nsec;
}

gpr_timespec bkv_client_timespec(uint64_t ns) {
    return (gpr_timespec){
        .tv_sec = (int64_t)(ns / NS_PER_S), .tv_nsec = (int32_t)(ns % NS_PER_S), .clock_type = GPR_CLOCK_MONOTONIC};
}

// ---- calls in flight ----

void bkv_client_enter(bkv_client_t *client, bkv_call_t *call) {
    pthread_mutex_lock(&client->lock);
    call->live_next = client->live;
    if (client->live != NULL) {
        client->live->live_previous = call;
    }
    client->live = call;
    client->live_count++;
    bool queued = call->queue != NULL, idle = !client->driven;
    if (queued) {
        client->queued++;
    } else if (call->over == NULL) {
        client->callers++;
        client->live_count++;
    }
    pthread_mutex_unlock(&client->lock);
    if (queued && idle) {
        pthread_cond_signal(&client->work);
    }
}

void bkv_client_remove(bkv_client_t *client, bkv_call_t *call) {
    pthread_mutex_lock(&client->lock);
    assert(!call->paused && call->attempt == NULL);
    if (call->live_previous != NULL) {
        call->live_previous->live_next = call->live_next;
    } else {
        client->live = call->live_next;
    }
    if (call->live_next != NULL) {
        call->live_next->live_previous = call->live_previous;
    }
    client->queued -= call->queue != NULL;
    pthread_mutex_unlock(&client->lock);
}

void bkv_client_leave(bkv_client_t *client) {
    pthread_mutex_lock(&client->lock);
    if (--client->live_count == 0) {
        pthread_cond_broadcast(&client->changed);
    }
    pthread_mutex_unlock(&client->lock);
}

// ---- pauses ----

static void timers_add(bkv_client_t *client, bkv_call_t *call, uint64_t due_ns) {
    call->paused = true;
    call->due_ns = due_ns;
    call->timer_next = client->timers;
    client->timers = call;
    client->live_count++; // keeps the client until whoever drives has been woken
}

bool bkv_client_pause(bkv_client_t *client, bkv_call_t *call, uint64_t due_ns) {
    pthread_mutex_lock(&client->lock);
    bool paused = !call->cancelled;
    if (paused) {
        timers_add(client, call, due_ns);
    }
    pthread_mutex_unlock(&client->lock);
    if (paused) {
        bkv_client_wake(client);
        bkv_client_leave(client);
    }
    return paused;
}

void bkv_client_park(bkv_client_t *client, bkv_call_t *call, uint64_t due_ns) {
    timers_add(client, call, due_ns);
    call->joining = true;
}

static void timers_remove(bkv_client_t *client, bkv_call_t *call) {
    bkv_call_t **at = &client->timers;
    while (*at != call) {
        at = &(*at)->timer_next;
    }
    *at = call->timer_next;
    call->paused = call->joining = false;
}

bkv_call_t *bkv_client_unpark(bkv_client_t *client, const bkv_client_endpoint_t *endpoint) {
    bkv_call_t *list = NULL, *next;
    for (bkv_call_t *call = client->timers; call != NULL; call = next) {
        next = call->timer_next;
        if (call->joining && call->endpoint == endpoint) {
            timers_remove(client, call);
            call->timer_next = list;
            list = call;
        }
    }
    return list;
}

// Takes a call that is due off the timers, or says when the next will be.
static bkv_call_t *timers_take(bkv_client_t *client, uint64_t now_ns, uint64_t *next_ns) {
    bkv_call_t *call;
    *next_ns = UINT64_MAX;
    pthread_mutex_lock(&client->lock);
    for (call = client->timers; call != NULL && call->due_ns > now_ns; call = call->timer_next) {
        *next_ns = call->due_ns < *next_ns ? call->due_ns : *next_ns;
    }
    if (call != NULL) {
        timers_remove(client, call);
    }
    pthread_mutex_unlock(&client->lock);
    return call;
}

uint64_t bkv_client_run_timers(bkv_client_t *client) {
    uint64_t now_ns = bkv_client_now_ns(), next_ns;
    bkv_call_t *call;
    while ((call = timers_take(client, now_ns, &next_ns)) != NULL) {
        bkv_call_start(call);
    }
    uint64_t watch_ns = bkv_client_watch_run(client, now_ns);
    return watch_ns < next_ns ? watch_ns : next_ns;
}

// ---- cancelling ----

// Up to CANCEL_STEP calls: references to those that run, and a list of those on a pause, which are taken off the timers.
static size_t collect(bkv_client_t *client, const bkv_queue_t *queue, grpc_call **running, size_t *count, bkv_call_t **paused) {
    size_t taken = 0;
    *count = 0;
    pthread_mutex_lock(&client->lock);
    for (bkv_call_t *call = client->live; call != NULL && taken < CANCEL_STEP; call = call->live_next) {
        if (call->cancelled || (queue != NULL && call->queue != queue)) {
            continue;
        }
        taken++;
        call->cancelled = true;
        if (call->paused) {
            timers_remove(client, call);
            call->timer_next = *paused;
            *paused = call;
        } else if (call->attempt != NULL) {
            grpc_call_ref(call->attempt->exchange.grpc);
            running[(*count)++] = call->attempt->exchange.grpc;
        }
    }
    pthread_mutex_unlock(&client->lock);
    return taken;
}

void bkv_client_cancel(bkv_client_t *client, const bkv_queue_t *queue) {
    grpc_call *running[CANCEL_STEP];
    size_t taken, count;
    do {
        bkv_call_t *paused = NULL;
        taken = collect(client, queue, running, &count, &paused);
        for (size_t i = 0; i < count; i++) {
            grpc_call_cancel(running[i], NULL);
            grpc_call_unref(running[i]);
        }
        while (paused != NULL) {
            bkv_call_t *call = paused;
            paused = call->timer_next;
            bkv_fail(&call->error, BKV_CANCELLED, "cancelled by its caller");
            bkv_call_conclude(call);
        }
    } while (taken == CANCEL_STEP);
}

// ---- its thread, and its end ----

void bkv_client_free(bkv_client_t *client) {
    bkv_client_shared_free(client);
    bkv_client_route_deinit(client);
    bkv_client_endpoints_deinit(client);
    if (client->completions != NULL) {
        grpc_completion_queue_destroy(client->completions);
    }
    bkv_client_pool_destroy(client->pool);
    bkv_client_buffers_destroy(client->buffers);
    bkv_client_specs_free(client);
    bkv_client_options_deinit(&client->options);
    pthread_cond_destroy(&client->changed);
    pthread_cond_destroy(&client->work);
    pthread_mutex_destroy(&client->lock);
    free(client);
}

// The application's signal handlers are none of our threads' business.
bool bkv_client_spawn(void *(*run)(void *), void *argument, pthread_t *thread) {
    sigset_t all, before;
    pthread_t made;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    bool started = pthread_create(&made, NULL, run, argument) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (started && thread == NULL) {
        pthread_detach(made);
    } else if (started) {
        *thread = made;
    }
    return started;
}

// ---- create, destroy ----

static void locks_init(bkv_client_t *client) {
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&client->changed, &attributes);
    pthread_cond_init(&client->work, &attributes);
    pthread_condattr_destroy(&attributes);
    pthread_mutex_init(&client->lock, NULL);
}

bkv_status_t bkv_client_create(const bkv_client_options_t *options, bkv_client_t **client, bkv_error_t *err) {
    assert(client != NULL);
    pthread_once(&grpc_started, grpc_init);
    bkv_client_t *made = calloc(1, sizeof *made);
    if (made == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "client: out of memory");
    }
    locks_init(made);
    atomic_init(&made->watch_ns, UINT64_MAX);
    made->tick_ns = UINT64_MAX;
    bkv_status_t status = bkv_client_options_init(&made->options, options, err);
    if (status == BKV_OK) {
        status = bkv_client_transport_init(&made->transport, &made->options, err);
    }
    if (status == BKV_OK) {
        status = bkv_client_endpoints_init(made, &made->options, err);
    }
    if (status != BKV_OK) {
        bkv_client_free(made);
        return status;
    }
    made->timeout_ms = made->options.timeout_ms != 0 ? made->options.timeout_ms : DEFAULT_TIMEOUT_MS;
    made->watched = made->listed > 1 || made->options.route;
    atomic_init(&made->jitter, bkv_client_now_ns());
    made->pool = bkv_client_pool_create();
    made->buffers = bkv_client_buffers_create();
    made->completions = grpc_completion_queue_create_for_next(NULL);
    if (made->pool == NULL || made->buffers == NULL || !bkv_client_spawn(bkv_client_drive, made, &made->thread)) {
        grpc_completion_queue_shutdown(made->completions);
        bkv_client_free(made);
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "client: out of memory or threads");
    }
    *client = made;
    return BKV_OK;
}

// Waits for the thread to end; false: it is still waiting for gRPC, and frees the client when that has finished.
static bool thread_end(bkv_client_t *client) {
    gpr_timespec due = bkv_client_timespec(bkv_client_now_ns() + LINGER_MS * NS_PER_MS);
    struct timespec until = {.tv_sec = due.tv_sec, .tv_nsec = due.tv_nsec};
    pthread_mutex_lock(&client->lock);
    while (!client->thread_ended && pthread_cond_timedwait(&client->changed, &client->lock, &until) != ETIMEDOUT) {
    }
    bool ended = client->thread_ended;
    client->abandoned = !ended;
    pthread_t thread = client->thread; // the client may be gone after the unlock
    pthread_mutex_unlock(&client->lock);
    if (ended) {
        pthread_join(thread, NULL);
    } else {
        pthread_detach(thread);
    }
    return ended;
}

void bkv_client_destroy(bkv_client_t *client) {
    if (client == NULL) {
        return;
    }
    bkv_client_links_close(client);
    pthread_mutex_lock(&client->lock);
    client->closing = true;
    pthread_mutex_unlock(&client->lock);
    bkv_client_cancel(client, NULL);
    pthread_mutex_lock(&client->lock);
    while (client->live_count > 0) {
        pthread_cond_wait(&client->changed, &client->lock);
    }
    client->ending = true;
    pthread_cond_signal(&client->work);
    pthread_mutex_unlock(&client->lock);
    grpc_completion_queue_shutdown(client->completions);
    if (thread_end(client)) {
        bkv_client_free(client);
    }
}
