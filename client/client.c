// client.c - creates and destroys clients, and runs the one thread that drives their calls: gRPC's completions, the pauses
// between attempts, and the end of connections that block. What a call does is call.c's.
#include "client.h"

#include <assert.h>
#include <signal.h>
#include <stdlib.h>
#include <time.h>

#define DEFAULT_TIMEOUT_MS 10000
#define CANCEL_STEP        256
#define NS_PER_S           1000000000ull

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

// ---- connections ----

static bkv_client_connection_t *connection_create(bkv_client_t *client) {
    bkv_client_connection_t *connection = calloc(1, sizeof *connection);
    if (connection != NULL) {
        connection->users = 1;
        connection->channel = bkv_client_target_connect(&client->target);
    }
    return connection;
}

bkv_client_connection_t *bkv_client_connection_get(bkv_client_t *client) {
    pthread_mutex_lock(&client->lock);
    bkv_client_connection_t *connection = client->connection;
    if (connection != NULL) {
        connection->users++;
    }
    pthread_mutex_unlock(&client->lock);
    return connection;
}

void bkv_client_connection_put(bkv_client_t *client, bkv_client_connection_t *connection) {
    pthread_mutex_lock(&client->lock);
    bool last = --connection->users == 0;
    pthread_mutex_unlock(&client->lock);
    if (last) {
        // Its socket is closed, and every slice on its way through it released, when its last call has gone too.
        grpc_channel_destroy(connection->channel);
        free(connection);
    }
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
    pthread_mutex_unlock(&client->lock);
}

static void timers_remove(bkv_client_t *client, bkv_call_t *call) {
    for (bkv_call_t **at = &client->timers; *at != NULL; at = &(*at)->timer_next) {
        if (*at == call) {
            *at = call->timer_next;
            return;
        }
    }
}

void bkv_client_remove(bkv_client_t *client, bkv_call_t *call) {
    pthread_mutex_lock(&client->lock);
    assert(call->stage != BKV_CALL_DONE);
    if (call->stage != BKV_CALL_RUNNING) {
        timers_remove(client, call);
    }
    call->stage = BKV_CALL_DONE;
    if (call->live_previous != NULL) {
        call->live_previous->live_next = call->live_next;
    } else {
        client->live = call->live_next;
    }
    if (call->live_next != NULL) {
        call->live_next->live_previous = call->live_previous;
    }
    pthread_mutex_unlock(&client->lock);
}

void bkv_client_leave(bkv_client_t *client) {
    pthread_mutex_lock(&client->lock);
    if (--client->live_count == 0) {
        pthread_cond_broadcast(&client->idle);
    }
    pthread_mutex_unlock(&client->lock);
}

bool bkv_client_wait(bkv_client_t *client, bkv_call_t *call, bkv_call_stage_t stage, uint64_t due_ns) {
    pthread_mutex_lock(&client->lock);
    bool waits = stage == BKV_CALL_HELD || !call->cancelled;
    if (waits) {
        call->stage = stage;
        call->due_ns = due_ns;
        call->timer_next = client->timers;
        client->timers = call;
    }
    pthread_mutex_unlock(&client->lock);
    return waits;
}

// ---- cancelling ----

// Which calls: of one queue, of one connection, or all.
typedef struct selection {
    const bkv_queue_t *queue; // NULL: any
    uint64_t connection;      // 0: any, and for good: they are not tried again
} selection_t;

static bool selected(const selection_t *selection, const bkv_call_t *call) {
    if (selection->connection != 0) {
        return call->grpc != NULL && call->connection == selection->connection && !call->interrupted;
    }
    return !call->cancelled && (selection->queue == NULL || call->queue == selection->queue);
}

// Up to CANCEL_STEP calls: references to those that run, and a list of those on a pause, which are taken off the timers.
static size_t collect(bkv_client_t *client, const selection_t *selection, grpc_call **running, bkv_call_t **paused) {
    size_t taken = 0, count = 0;
    pthread_mutex_lock(&client->lock);
    for (bkv_call_t *call = client->live; call != NULL && taken < CANCEL_STEP; call = call->live_next) {
        if (!selected(selection, call)) {
            continue;
        }
        taken++;
        if (selection->connection != 0) {
            call->interrupted = true;
        } else {
            call->cancelled = true;
        }
        if (call->stage == BKV_CALL_PAUSED) {
            timers_remove(client, call);
            call->stage = BKV_CALL_RUNNING;
            call->timer_next = *paused;
            *paused = call;
        } else if (call->grpc != NULL) {
            grpc_call_ref(call->grpc);
            running[count++] = call->grpc;
        }
    }
    pthread_mutex_unlock(&client->lock);
    running[count] = NULL;
    return taken;
}

static void cancel(bkv_client_t *client, const selection_t *selection) {
    grpc_call *running[CANCEL_STEP + 1];
    bkv_call_t *paused = NULL;
    size_t taken;
    do {
        taken = collect(client, selection, running, &paused);
        for (size_t i = 0; running[i] != NULL; i++) {
            grpc_call_cancel_with_status(running[i],
                                         selection->connection != 0 ? GRPC_STATUS_UNAVAILABLE : GRPC_STATUS_CANCELLED,
                                         "the connection blocks and was given up", NULL);
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

void bkv_client_cancel(bkv_client_t *client, const bkv_queue_t *queue) {
    cancel(client, &(selection_t){.queue = queue});
}

// ---- the client's thread ----

// A call is over, but the socket still has not taken bytes of its caller: nobody reads at the other end. Closing the
// connection frees them. Other calls on it are tried again on the next one.
static void connection_replace(bkv_client_t *client, uint64_t number) {
    bkv_client_connection_t *next = connection_create(client), *old = next;
    pthread_mutex_lock(&client->lock);
    if (next != NULL && client->connection != NULL && client->connection->number == number) {
        next->number = ++client->connections;
        old = client->connection;
        client->connection = next;
    }
    pthread_mutex_unlock(&client->lock);
    if (old == NULL) {
        return; // out of memory: the daemon or the keepalive will end it
    }
    if (old != next) {
        cancel(client, &(selection_t){.connection = number});
    }
    bkv_client_connection_put(client, old);
}

// Takes a call that is due off the timers. HELD: only *connection is set, for the call may be gone any moment.
static bkv_call_t *timers_take(bkv_client_t *client, uint64_t now_ns, uint64_t *next_ns, uint64_t *connection) {
    bkv_call_t *due = NULL, **place = NULL;
    *next_ns = UINT64_MAX;
    *connection = 0;
    pthread_mutex_lock(&client->lock);
    for (bkv_call_t **at = &client->timers; *at != NULL; at = &(*at)->timer_next) {
        if ((*at)->due_ns <= now_ns) {
            place = at;
            break;
        }
        *next_ns = (*at)->due_ns < *next_ns ? (*at)->due_ns : *next_ns;
    }
    if (place != NULL) {
        due = *place;
        *place = due->timer_next;
        if (due->stage == BKV_CALL_HELD) {
            *connection = due->connection;
            due = NULL;
        } else {
            due->stage = BKV_CALL_RUNNING;
        }
    }
    pthread_mutex_unlock(&client->lock);
    return due;
}

// Does all that is due and returns when there will be more.
static uint64_t run_timers(bkv_client_t *client) {
    uint64_t now_ns = bkv_client_now_ns(), next_ns, connection;
    for (;;) {
        bkv_call_t *call = timers_take(client, now_ns, &next_ns, &connection);
        if (call != NULL) {
            bkv_call_start(call);
        } else if (connection != 0) {
            connection_replace(client, connection);
        } else {
            return next_ns;
        }
    }
}

static void *client_run(void *argument) {
    bkv_client_t *client = argument;
    for (;;) {
        uint64_t next_ns = run_timers(client);
        gpr_timespec until = next_ns == UINT64_MAX ? gpr_inf_future(GPR_CLOCK_MONOTONIC) : bkv_client_timespec(next_ns);
        grpc_event event = grpc_completion_queue_next(client->completions, until, NULL);
        if (event.type == GRPC_QUEUE_SHUTDOWN) {
            return NULL;
        }
        if (event.type == GRPC_OP_COMPLETE) {
            bkv_call_tag_t *tag = event.tag;
            BKV_CALL_ACQUIRE(tag);
            tag->run(tag->call, event.success != 0);
        }
    }
}

// The application's signal handlers are none of this thread's business.
static int thread_start(bkv_client_t *client) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&client->thread, NULL, client_run, client);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return error;
}

// ---- create, destroy ----

static void client_free(bkv_client_t *client) {
    if (client->completions != NULL) {
        grpc_completion_queue_destroy(client->completions);
    }
    bkv_client_specs_free(client);
    bkv_client_target_deinit(&client->target);
    pthread_cond_destroy(&client->idle);
    pthread_mutex_destroy(&client->lock);
    free(client);
}

bkv_status_t bkv_client_create(const bkv_client_options_t *options, bkv_client_t **client, bkv_error_t *err) {
    pthread_once(&grpc_started, grpc_init);
    bkv_client_t *made = calloc(1, sizeof *made);
    if (made == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "client: out of memory");
    }
    pthread_mutex_init(&made->lock, NULL);
    pthread_cond_init(&made->idle, NULL);
    bkv_status_t status = bkv_client_target_init(&made->target, options, err);
    if (status != BKV_OK) {
        client_free(made);
        return status;
    }
    made->timeout_ms = options != NULL && options->timeout_ms != 0 ? options->timeout_ms : DEFAULT_TIMEOUT_MS;
    made->jitter = bkv_client_now_ns() | 1;
    made->connection = connection_create(made);
    made->completions = grpc_completion_queue_create_for_next(NULL);
    if (made->connection != NULL) {
        made->connection->number = ++made->connections;
    }
    if (made->connection == NULL || thread_start(made) != 0) {
        if (made->connection != NULL) {
            bkv_client_connection_put(made, made->connection);
        }
        grpc_completion_queue_shutdown(made->completions);
        client_free(made);
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "client: out of memory or threads");
    }
    *client = made;
    return BKV_OK;
}

void bkv_client_destroy(bkv_client_t *client) {
    if (client == NULL) {
        return;
    }
    pthread_mutex_lock(&client->lock);
    bkv_client_connection_t *connection = client->connection;
    client->connection = NULL; // no new attempts
    pthread_mutex_unlock(&client->lock);
    bkv_client_cancel(client, NULL);
    bkv_client_connection_put(client, connection);
    pthread_mutex_lock(&client->lock);
    while (client->live_count > 0) {
        pthread_cond_wait(&client->idle, &client->lock);
    }
    pthread_mutex_unlock(&client->lock);
    grpc_completion_queue_shutdown(client->completions);
    pthread_join(client->thread, NULL);
    client_free(client);
}
