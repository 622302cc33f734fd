// watch.c - looks after a client's endpoints where it has several (endpoint.h): asks those that are down whether they serve again,
// and those that are silent whether they are there at all, and has the calls of one that is not go elsewhere.
//
// All of it is the driver's work (drive.c). A look at the calls under way is taken every TICK_MS while there are any, and for a
// second longer, so that a client that calls now and then need not wake its driver for each call.
#include "client/attempt.h"
#include "client/client.h"

#include <stdatomic.h>
#include <stdlib.h>

#define NS_PER_MS   1000000ull
#define TICK_MS     50
#define QUIET_TICKS 20 // without a call under way, until no more looks are taken

// How long a call waits in silence before its daemon's health is asked for, and how long that may take: shares of the call's
// timeout, within bounds. Whoever was silent lately and yet there is given more time at its next silence.
#define LOOK_SHARE     8
#define LOOK_LEAST_MS  50
#define LOOK_MOST_MS   200
#define PROBE_SHARE    4
#define PROBE_LEAST_MS 50
#define PROBE_MOST_MS  1000
#define SILENCES_MOST  3 // doublings

// When one that is down is asked: soon, and then every second; a member that only routing knows (route.h) ever more rarely.
#define AGAIN_FIRST_MS 500u
#define AGAIN_MS       1000u
#define AGAIN_DOUBLED  3 // times
#define AGAIN_LIMIT_MS 1000

// A deadline that is noticed so late says more about this machine than about the daemon.
#define LATE_MS 500

#define PROBES_AT_ONCE 16
#define MOVE_STEP      256

// ---- a probe: a ping of one endpoint that nobody waits for ----

// The lock must be held, as for the next.
static void due_at(bkv_client_t *client, uint64_t due_ns) {
    if (due_ns < atomic_load(&client->watch_ns)) {
        atomic_store(&client->watch_ns, due_ns);
    }
}

static void ask_again(bkv_client_endpoint_t *endpoint, uint64_t now_ns) {
    uint32_t doublings = endpoint->fruitless < AGAIN_DOUBLED ? endpoint->fruitless : AGAIN_DOUBLED;
    uint64_t ms = endpoint->fruitless == 0 ? AGAIN_FIRST_MS : endpoint->listed ? AGAIN_MS : AGAIN_MS << doublings;
    endpoint->probe_ns = now_ns + ms * NS_PER_MS;
    due_at(endpoint->client, endpoint->probe_ns);
}

void bkv_client_watch_down(bkv_client_endpoint_t *endpoint) {
    if (!endpoint->down) {
        endpoint->down = true;
        endpoint->fruitless = 0;
        endpoint->down_ns = bkv_client_now_ns();
        ask_again(endpoint, endpoint->down_ns);
        bkv_client_route_stale(endpoint->client);
    }
}

static void move_away(bkv_client_endpoint_t *endpoint);

// Nothing came in time, and nothing else meanwhile.
static bool is_silent(const bkv_call_t *probe) {
    return atomic_load_explicit(&probe->endpoint->heard_ns, memory_order_relaxed) < probe->begun_ns &&
           bkv_client_now_ns() < probe->deadline_ns + LATE_MS * NS_PER_MS;
}

// What came of it. Any answer at all is one from a daemon that is there.
static void probe_over(bkv_call_t *call) {
    bkv_client_endpoint_t *endpoint = call->endpoint;
    bkv_client_t *client = call->client;
    bkv_status_t status = call->error.status;
    bool silent = status == BKV_DEADLINE_EXCEEDED && is_silent(call);
    pthread_mutex_lock(&client->lock);
    endpoint->probing = false;
    if (status == BKV_OK) {
        endpoint->down = false;
        endpoint->fruitless = 0;
    } else if (endpoint->down) {
        endpoint->fruitless++;
        ask_again(endpoint, bkv_client_now_ns());
    } else if (silent || status == BKV_BUSY) {
        bkv_client_watch_down(endpoint);
    }
    endpoint->silences = silent ? endpoint->silences + 1 : 0;
    pthread_mutex_unlock(&client->lock);
    bkv_call_free(call);
    if (silent) {
        move_away(endpoint);
    }
}

static void probe_start(bkv_client_endpoint_t *endpoint, uint32_t timeout_ms) {
    bkv_client_t *client = endpoint->client;
    bkv_call_t *probe = bkv_client_ping_new(client, timeout_ms);
    if (probe == NULL) { // as if it had not been due
        pthread_mutex_lock(&client->lock);
        endpoint->probing = false;
        ask_again(endpoint, bkv_client_now_ns());
        pthread_mutex_unlock(&client->lock);
        return;
    }
    bkv_call_bind(probe, endpoint);
    bkv_call_detach(probe, probe_over);
}

// ---- calls of an endpoint that is silent ----

// Up to MOVE_STEP attempts, referenced.
static size_t collect(bkv_client_endpoint_t *endpoint, grpc_call **running) {
    size_t count = 0;
    pthread_mutex_lock(&endpoint->client->lock);
    for (bkv_call_t *call = endpoint->client->live; call != NULL && count < MOVE_STEP; call = call->live_next) {
        if (call->endpoint == endpoint && call->attempt != NULL && !call->cancelled && !call->moving &&
            bkv_client_endpoint_others(call)) {
            call->moving = true;
            grpc_call_ref(call->attempt->exchange.grpc);
            running[count++] = call->attempt->exchange.grpc;
        }
    }
    pthread_mutex_unlock(&endpoint->client->lock);
    return count;
}

// Attempts end, and call.c tries again; those that wait for the endpoint's memory do so at once.
static void move_away(bkv_client_endpoint_t *endpoint) {
    bkv_client_t *client = endpoint->client;
    grpc_call *running[MOVE_STEP];
    size_t count;
    do {
        count = collect(endpoint, running);
        for (size_t i = 0; i < count; i++) {
            grpc_call_cancel(running[i], NULL);
            grpc_call_unref(running[i]);
        }
    } while (count == MOVE_STEP);
    pthread_mutex_lock(&client->lock);
    bkv_call_t *waiting = bkv_client_unpark(client, endpoint);
    pthread_mutex_unlock(&client->lock);
    while (waiting != NULL) {
        bkv_call_t *call = waiting;
        waiting = call->timer_next;
        bkv_call_move(call);
    }
}

// ---- looking ----

typedef struct due {
    bkv_client_endpoint_t *endpoint;
    uint32_t timeout_ms;
} due_t;

static uint32_t share(uint32_t ms, uint32_t of, uint32_t least, uint32_t most) {
    uint32_t part = ms / of;
    return part < least ? least : part > most ? most : part;
}

// Has a call waited in silence for too long?
static bool unheard(const bkv_call_t *call, uint64_t now_ns) {
    uint64_t heard_ns = atomic_load_explicit(&call->endpoint->heard_ns, memory_order_relaxed);
    uint64_t since_ns = heard_ns > call->begun_ns ? heard_ns : call->begun_ns;
    uint32_t look_ms = share(call->timeout_ms, LOOK_SHARE, LOOK_LEAST_MS, LOOK_MOST_MS);
    return now_ns > since_ns && now_ns - since_ns >= look_ms * NS_PER_MS;
}

// Notes which endpoints are to be asked because of their calls. The lock must be held, as for the next.
static void look(bkv_client_t *client, uint64_t now_ns, due_t *due, size_t *count) {
    bool any = false;
    for (bkv_call_t *call = client->live; call != NULL; call = call->live_next) {
        bkv_client_endpoint_t *endpoint = call->endpoint;
        if (endpoint == NULL || (call->attempt == NULL && !call->joining) || !bkv_client_endpoint_others(call)) {
            continue;
        }
        any = true;
        if (!endpoint->probing && *count < PROBES_AT_ONCE && unheard(call, now_ns)) {
            uint32_t doublings = endpoint->silences < SILENCES_MOST ? endpoint->silences : SILENCES_MOST;
            endpoint->probing = true;
            due[(*count)++] =
                (due_t){endpoint, share(call->timeout_ms, PROBE_SHARE, PROBE_LEAST_MS, (uint32_t)PROBE_MOST_MS << doublings)};
        }
    }
    client->quiet_ticks = any ? 0 : client->quiet_ticks + 1;
    client->tick_ns = client->quiet_ticks < QUIET_TICKS ? now_ns + TICK_MS * NS_PER_MS : UINT64_MAX;
}

static void revive(bkv_client_t *client, uint64_t now_ns, due_t *due, size_t *count) {
    for (uint32_t i = 0; i < client->endpoint_count; i++) {
        bkv_client_endpoint_t *endpoint = client->endpoints[i];
        if (!endpoint->down || endpoint->probing || !(endpoint->listed || endpoint->wanted)) {
            continue;
        }
        if (endpoint->probe_ns > now_ns || *count == PROBES_AT_ONCE) {
            due_at(client, endpoint->probe_ns);
        } else {
            endpoint->probing = true;
            due[(*count)++] = (due_t){endpoint, AGAIN_LIMIT_MS};
        }
    }
}

bool bkv_client_watch_begin(bkv_client_t *client) {
    client->quiet_ticks = 0;
    if (!client->watched || client->tick_ns != UINT64_MAX) {
        return false;
    }
    client->tick_ns = bkv_client_now_ns() + TICK_MS * NS_PER_MS;
    due_at(client, client->tick_ns);
    return true;
}

uint64_t bkv_client_watch_run(bkv_client_t *client, uint64_t now_ns) {
    uint64_t next_ns = atomic_load(&client->watch_ns);
    if (now_ns < next_ns) {
        return next_ns;
    }
    due_t due[PROBES_AT_ONCE];
    size_t count = 0;
    pthread_mutex_lock(&client->lock);
    atomic_store(&client->watch_ns, UINT64_MAX);
    if (!client->closing) {
        if (now_ns >= client->tick_ns) {
            look(client, now_ns, due, &count);
        }
        due_at(client, client->tick_ns);
        revive(client, now_ns, due, &count);
    }
    next_ns = atomic_load(&client->watch_ns);
    client->live_count += count; // the client stays until they have been started
    pthread_mutex_unlock(&client->lock);
    for (size_t i = 0; i < count; i++) {
        probe_start(due[i].endpoint, due[i].timeout_ms);
        bkv_client_leave(client);
    }
    return next_ns;
}
