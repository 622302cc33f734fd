// drive.c - who drives a client: takes gRPC's completions, runs their steps and starts the attempts that are due. One thread at a
// time does.
//
// A synchronous caller drives while it waits, if nobody else does: its result then needs no hand-over between threads (a Get of
// 64 KiB by shm, p50: 54 us with one, 41 us without). Others that wait meanwhile follow: they sleep until their call is done, or
// until it is theirs to lead. The client's own thread drives while calls of queues are in flight and no caller drives, and when
// nobody has called for a while, so that gRPC sees what becomes of the connection. To a caller that comes then it leaves the
// driving after the next event. It does not take it back right after the call: that would be the hand-over that is to be saved.
//
// A caller that drives cannot be held up by a daemon that does not read: gRPC's sockets do not block, what is half-way into one
// waits in an attempt of its own (call.h), and gRPC's timers end the wait of whoever polls.
#include "client/client.h"

#include <assert.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>

// How long nobody has called before the client's thread drives again.
#define LULL_MS   20
#define NS_PER_MS 1000000ull

// ---- an event that does nothing but end the driver's wait: an empty batch, which gRPC hands back at once ----

typedef struct kick {
    bkv_batch_tag_t tag;
    grpc_call *grpc;
} kick_t;

static void on_kick(void *owner, bool ok) {
    (void)ok;
    kick_t *kick = owner;
    grpc_call_unref(kick->grpc);
    free(kick);
}

static void kick_driver(bkv_client_t *client) {
    kick_t *kick = calloc(1, sizeof *kick);
    if (kick == NULL) {
        abort(); // as gRPC does without memory
    }
    kick->tag = (bkv_batch_tag_t){.run = on_kick, .owner = kick};
    kick->grpc =
        grpc_channel_create_call(client->endpoints[0]->channel, NULL, GRPC_PROPAGATE_DEFAULTS, client->completions,
                                 grpc_slice_from_static_string("/wake"), NULL, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
    bkv_batch_start(kick->grpc, NULL, 0, &kick->tag);
}

// Where nobody drives, whoever does next looks at the timers first.
void bkv_client_wake(bkv_client_t *client) {
    pthread_mutex_lock(&client->lock);
    bool asleep = client->driven && !pthread_equal(client->driver, pthread_self());
    pthread_mutex_unlock(&client->lock);
    if (asleep) {
        kick_driver(client);
    }
}

// ---- driving ----

// Until there is an event, or an attempt is due. A caller's own call may be over before. False: there will be no more events.
static bool step(bkv_client_t *client, const bkv_call_t *call) {
    uint64_t next_ns = bkv_client_run_timers(client);
    if (call != NULL && atomic_load(&call->done)) {
        return true;
    }
    gpr_timespec until = next_ns == UINT64_MAX ? gpr_inf_future(GPR_CLOCK_MONOTONIC) : bkv_client_timespec(next_ns);
    grpc_event event = grpc_completion_queue_next(client->completions, until, NULL);
    if (event.type == GRPC_OP_COMPLETE) {
        bkv_batch_back(&event);
    }
    return event.type != GRPC_QUEUE_SHUTDOWN;
}

// The lock must be held, as for the next two.
static void take(bkv_client_t *client) {
    client->driven = true;
    client->driver = pthread_self();
    client->turns++;
}

static void followers_remove(bkv_client_t *client, bkv_call_t *call) {
    bkv_call_t **at = &client->followers;
    while (*at != call) {
        at = &(*at)->follower_next;
    }
    *at = call->follower_next;
    call->follows = false;
}

// Leaves the driving to the follower that came last, as it has the longest to wait; NULL: none follows. The caller must post its
// `turn` after the lock's release.
static bkv_call_t *pass_on(bkv_client_t *client) {
    bkv_call_t *next = client->followers;
    if (next != NULL) {
        followers_remove(client, next);
        next->leads = true;
        client->driver = next->caller;
        client->turns++;
        return next;
    }
    client->driven = false;
    if (client->queued > 0) {
        pthread_cond_signal(&client->work);
    }
    return NULL;
}

// ---- synchronous callers ----

// Sleeps until the call is done or leads. The lock is held before and after.
static void follow(bkv_client_t *client, bkv_call_t *call) {
    call->caller = pthread_self();
    call->follows = true;
    call->follower_next = client->followers;
    client->followers = call;
    pthread_mutex_unlock(&client->lock);
    while (sem_wait(&call->turn) != 0) {
        assert(errno == EINTR);
    }
    pthread_mutex_lock(&client->lock);
}

void bkv_client_await(bkv_client_t *client, bkv_call_t *call) {
    pthread_mutex_lock(&client->lock);
    while (!atomic_load(&call->done)) {
        if (!client->driven) {
            take(client);
            call->leads = true;
        }
        if (call->leads) {
            pthread_mutex_unlock(&client->lock);
            step(client, call);
            pthread_mutex_lock(&client->lock);
        } else {
            follow(client, call);
        }
    }
    bkv_call_t *next = call->leads ? pass_on(client) : NULL;
    client->callers--;
    if (--client->live_count == 0) {
        pthread_cond_broadcast(&client->changed);
    }
    pthread_mutex_unlock(&client->lock);
    if (next != NULL) {
        sem_post(&next->turn);
    }
}

void bkv_client_tell(bkv_client_t *client, bkv_call_t *call) {
    pthread_mutex_lock(&client->lock);
    bool follows = call->follows;
    bool leads = call->leads && !pthread_equal(client->driver, pthread_self());
    if (follows) {
        followers_remove(client, call);
    }
    atomic_store(&call->done, true);
    pthread_mutex_unlock(&client->lock);
    if (follows) {
        sem_post(&call->turn); // which is safe though the call may be gone before it returns, as a condition would not be
    } else if (leads) {
        kick_driver(client);
    }
}

// ---- the client's thread ----

// Sleeps until the client's thread is to drive. The lock is held before and after.
static void rest(bkv_client_t *client) {
    bool lull = false;
    while (client->driven || (client->queued == 0 && !client->ending && !lull)) {
        uint64_t turns = client->turns;
        gpr_timespec due = bkv_client_timespec(bkv_client_now_ns() + LULL_MS * NS_PER_MS);
        struct timespec until = {.tv_sec = due.tv_sec, .tv_nsec = due.tv_nsec};
        bool late = pthread_cond_timedwait(&client->work, &client->lock, &until) == ETIMEDOUT;
        lull = late && client->turns == turns && client->callers == 0;
    }
}

void *bkv_client_drive(void *argument) {
    bkv_client_t *client = argument;
    bool more;
    pthread_mutex_lock(&client->lock);
    do {
        rest(client);
        take(client);
        bool keep;
        do {
            pthread_mutex_unlock(&client->lock);
            more = step(client, NULL);
            pthread_mutex_lock(&client->lock);
            keep = client->queued > 0 || client->callers == 0;
        } while (more && keep);
        bkv_call_t *next = pass_on(client);
        if (next != NULL) {
            pthread_mutex_unlock(&client->lock);
            sem_post(&next->turn);
            pthread_mutex_lock(&client->lock);
        }
    } while (more);
    client->thread_ended = true;
    bool abandoned = client->abandoned;
    pthread_cond_broadcast(&client->changed);
    pthread_mutex_unlock(&client->lock);
    if (abandoned) {
        bkv_client_free(client);
    }
    return NULL;
}
