// link.c - see link.h. Who waits for a window and who attaches it; how that is done is attach.c's and the kinds' business.
#include "client/client.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define NS_PER_MS     1000000ull
#define WINDOW_BYTES  (256ull << 20)
#define ATTACH_MS     2000 // at most
#define DETACH_MS     1000
#define CLOSE_MS      50
#define RETRY_MS      5000 // after an attempt to attach was refused
#define LEARNED_SHARE 8    // of the window that a member gets which only routing knows
#define RETRY_SOON_MS 200  // after one that the daemon has not answered, or not yet

// ---- choice ----

static bkv_status_t choose(bkv_client_transport_t *transport, const char *name, bkv_error_t *err) {
    if (strcmp(name, "auto") == 0) {
        transport->automatic = true;
    } else if (strcmp(name, bkv_window_shm.name) == 0) {
        transport->kind = &bkv_window_shm;
    } else if (strcmp(name, bkv_window_verbs.name) == 0) {
        transport->kind = &bkv_window_verbs;
    } else if (strcmp(name, "inline") != 0) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "transport: \"%.32s\" is none of auto, inline, shm and verbs", name);
    }
    return BKV_OK;
}

bkv_status_t bkv_client_transport_init(bkv_client_transport_t *transport, const bkv_client_options_t *options,
                                       bkv_error_t *err) {
    const char *name = options->transport != NULL ? options->transport : getenv("BKV_TRANSPORT");
    *transport = (bkv_client_transport_t){.device = options->verbs_device};
    transport->window_bytes = options->window_bytes != 0 ? options->window_bytes : WINDOW_BYTES;
    bkv_status_t status = choose(transport, name != NULL && name[0] != '\0' ? name : "auto", err);
    if (status == BKV_OK && transport->window_bytes < BKV_WINDOW_LEAST) {
        status = bkv_fail(err, BKV_INVALID_ARGUMENT, "window_bytes: %llu is less than %u",
                          (unsigned long long)transport->window_bytes, BKV_WINDOW_LEAST);
    }
    return status;
}

// A daemon on another host is not asked for shm where one on this host is among the endpoints: by its name, that is what was meant.
// To members that only routing knows, which may be many, goes little but Gets of a few records: less memory, and none by name.
void bkv_client_link_init(bkv_client_endpoint_t *endpoint) {
    const bkv_client_transport_t *transport = &endpoint->client->transport;
    bkv_client_link_t *link = &endpoint->link;
    bool is_unix = bkv_client_target_local(&endpoint->target);
    link->kind = transport->kind;
    link->automatic = transport->automatic;
    link->window_bytes = transport->window_bytes;
    if (transport->automatic) {
        link->kind = is_unix ? &bkv_window_shm : &bkv_window_verbs;
    } else if (link->kind == &bkv_window_shm && !is_unix && (endpoint->client->local || !endpoint->listed)) {
        link->kind = NULL;
    }
    if (!endpoint->listed) {
        link->automatic = true;
        link->window_bytes = link->window_bytes / LEARNED_SHARE;
        link->window_bytes = link->window_bytes > BKV_WINDOW_LEAST ? link->window_bytes : BKV_WINDOW_LEAST;
    }
}

static void give_up(bkv_client_window_t *window) {
    if (window != NULL) {
        bkv_client_window_leave(window);
        bkv_client_window_release(window);
    }
}

void bkv_client_link_deinit(bkv_client_link_t *link) {
    give_up(link->window);
    give_up(link->worn);
    *link = (bkv_client_link_t){.kind = NULL};
}

// Where the session hangs on a connection, the end of that is enough.
static void link_close(bkv_client_endpoint_t *endpoint, uint64_t until_ns) {
    pthread_mutex_t *lock = &endpoint->client->lock;
    pthread_mutex_lock(lock);
    bkv_client_window_t *window = endpoint->link.window;
    endpoint->link.window = NULL;
    endpoint->link.closed = true;
    pthread_mutex_unlock(lock);
    if (window != NULL && !bkv_client_window_kind(window)->held && bkv_client_now_ns() < until_ns) {
        bkv_client_detach(endpoint, window, CLOSE_MS);
    }
    give_up(window);
}

// Those that get no time are found idle by their daemons.
void bkv_client_links_close(bkv_client_t *client) {
    uint64_t until_ns = bkv_client_now_ns() + CLOSE_MS * NS_PER_MS;
    pthread_mutex_lock(&client->lock);
    uint32_t count = client->endpoint_count;
    pthread_mutex_unlock(&client->lock);
    for (uint32_t i = 0; i < count; i++) {
        link_close(client->endpoints[i], until_ns);
    }
}

void bkv_client_link_offered(bkv_client_endpoint_t *endpoint, char *const *names, size_t count) {
    bkv_client_link_t *link = &endpoint->link;
    bool offered = false;
    for (size_t i = 0; i < count && link->kind != NULL; i++) {
        offered = offered || strcmp(names[i], link->kind->name) == 0;
    }
    pthread_mutex_lock(&endpoint->client->lock);
    link->offers_known = count > 0;
    link->offered = offered;
    pthread_mutex_unlock(&endpoint->client->lock);
}

// ---- attaching, on its own thread ----

// What came of it. Whoever waited is started here, by this thread: its payloads are copied by it, not by the client's.
static void attach_end(bkv_client_endpoint_t *endpoint, bkv_client_window_t *window, const bkv_error_t *error) {
    bkv_client_t *client = endpoint->client;
    bkv_client_link_t *link = &endpoint->link;
    pthread_mutex_lock(&client->lock);
    link->attaching = false;
    if (!link->closed) {
        link->window = window;
        window = NULL;
    }
    link->failure = *error;
    bool soon = error->status == BKV_BUSY || error->status == BKV_DEADLINE_EXCEEDED || error->status == BKV_CANCELLED;
    link->retry_ns = bkv_client_now_ns() + (soon ? RETRY_SOON_MS : RETRY_MS) * NS_PER_MS;
    bkv_call_t *waiting = bkv_client_unpark(client, endpoint);
    pthread_cond_broadcast(&client->changed);
    pthread_mutex_unlock(&client->lock);
    give_up(window);
    while (waiting != NULL) {
        bkv_call_t *call = waiting;
        waiting = call->timer_next;
        bkv_call_start(call);
    }
    bkv_client_leave(client);
}

static void *attach_run(void *argument) {
    bkv_client_endpoint_t *endpoint = argument;
    bkv_client_link_t *link = &endpoint->link;
    pthread_mutex_lock(&endpoint->client->lock);
    bkv_client_window_t *worn = link->worn, *window = NULL;
    link->worn = NULL;
    pthread_mutex_unlock(&endpoint->client->lock);
    if (worn != NULL) {
        bkv_client_detach(endpoint, worn, DETACH_MS);
        bkv_client_window_release(worn);
    }
    bkv_error_t error = {.status = BKV_OK};
    bkv_client_attach(endpoint, link->kind, link->window_bytes, ATTACH_MS, &window, &error);
    attach_end(endpoint, window, &error);
    return NULL;
}

// Only the one who has set link->attaching, and has counted the thread among the live calls.
static void attach_begin(bkv_client_endpoint_t *endpoint) {
    if (!bkv_client_spawn(attach_run, endpoint, NULL)) {
        bkv_error_t error;
        bkv_fail(&error, BKV_BUSY, "%s: no thread to attach with", endpoint->link.kind->name);
        attach_end(endpoint, NULL, &error);
    }
}

// ---- who wants a window; the lock must be held ----

// Puts aside a window that is of no more use. *gone, where set, is to be given up after the lock's release.
static void look_over(bkv_client_endpoint_t *endpoint, bkv_client_window_t **gone) {
    bkv_client_link_t *link = &endpoint->link;
    bkv_client_window_t *window = link->window;
    if (window == NULL) {
        return;
    }
    if (endpoint->boot_epoch != 0 && bkv_client_window_epoch(window) != endpoint->boot_epoch) {
        *gone = window; // the session has ended with the daemon that had it
        link->window = NULL;
    } else if (bkv_client_window_worn(window) && link->worn == NULL) {
        link->worn = window;
        link->window = NULL;
    }
}

typedef enum state { HAVE, WAIT, NONE } state_t;

// Is there a window, is one on its way, or is there none for now? *begin: the caller must begin to attach it.
static state_t look(bkv_client_endpoint_t *endpoint, bool *begin) {
    bkv_client_t *client = endpoint->client;
    bkv_client_link_t *link = &endpoint->link;
    *begin = false;
    if (link->window != NULL) {
        return HAVE;
    }
    if (link->kind == NULL || link->closed || client->closing) {
        return NONE;
    }
    bool failed = link->failure.status != BKV_OK;
    if (!link->attaching) {
        if (failed && bkv_client_now_ns() < link->retry_ns) {
            return NONE;
        }
        if (link->offers_known && !link->offered) {
            bkv_fail(&link->failure, BKV_UNIMPLEMENTED, "%s: not offered by the daemon", link->kind->name);
            return NONE;
        }
        *begin = link->attaching = true;
        client->live_count++; // the thread
    }
    // Where it has failed once, what can go inline does not wait to see it fail again.
    return failed && link->automatic ? NONE : WAIT;
}

// Asked for by name, a transport that is not to be had shows with the first call, not with the first large one.
bool bkv_client_link_wanted(const bkv_client_link_t *link, uint64_t bytes) {
    return link->kind != NULL && (bytes >= BKV_PLACE_LEAST || !link->automatic);
}

static bkv_link_answer_t refuse(bkv_call_t *call, const bkv_error_t *why) {
    if (why->status == BKV_OK) {
        return BKV_LINK_READY; // the client is being destroyed, or the deadline has come
    }
    bool soon = why->status == BKV_BUSY || why->status == BKV_DEADLINE_EXCEEDED || why->status == BKV_CANCELLED;
    bkv_fail(&call->error, soon ? BKV_BUSY : BKV_UNIMPLEMENTED, "transport: %.230s", why->message);
    return BKV_LINK_REFUSED;
}

bkv_link_answer_t bkv_client_link_join(bkv_call_t *call) {
    bkv_client_t *client = call->client;
    bkv_client_endpoint_t *endpoint = call->endpoint;
    bkv_client_link_t *link = &endpoint->link;
    bkv_client_window_t *gone = NULL;
    bool begin = false;
    pthread_mutex_lock(&client->lock);
    assert(call->window == NULL);
    bool over = call->cancelled || bkv_client_now_ns() >= call->deadline_ns;
    look_over(endpoint, &gone);
    state_t state = over ? NONE : look(endpoint, &begin);
    if (state == HAVE) {
        call->window = bkv_client_window_retain(link->window);
    } else if (state == WAIT) {
        bkv_client_park(client, call, call->deadline_ns); // and is counted once more, for the wake below
    }
    bkv_error_t failure = over || link->automatic || link->kind == NULL ? (bkv_error_t){.status = BKV_OK} : link->failure;
    pthread_mutex_unlock(&client->lock);
    give_up(gone);
    if (begin) {
        attach_begin(endpoint);
    }
    if (state == WAIT) {
        bkv_client_wake(client);
        bkv_client_leave(client);
        return BKV_LINK_LATER;
    }
    return state == NONE ? refuse(call, &failure) : BKV_LINK_READY;
}

bkv_client_window_t *bkv_client_link_window(bkv_client_endpoint_t *endpoint, uint32_t timeout_ms) {
    bkv_client_t *client = endpoint->client;
    bkv_client_link_t *link = &endpoint->link;
    bkv_client_window_t *gone = NULL, *window = NULL;
    bool begin;
    gpr_timespec due = bkv_client_timespec(bkv_client_now_ns() + timeout_ms * NS_PER_MS);
    struct timespec until = {.tv_sec = due.tv_sec, .tv_nsec = due.tv_nsec};
    pthread_mutex_lock(&client->lock);
    look_over(endpoint, &gone);
    state_t state = look(endpoint, &begin);
    pthread_mutex_unlock(&client->lock);
    give_up(gone);
    if (begin) {
        attach_begin(endpoint);
    }
    pthread_mutex_lock(&client->lock);
    while (state == WAIT && link->attaching && pthread_cond_timedwait(&client->changed, &client->lock, &until) != ETIMEDOUT) {
    }
    if (link->window != NULL) {
        window = bkv_client_window_retain(link->window);
    }
    pthread_mutex_unlock(&client->lock);
    return window;
}

void bkv_client_link_gone(bkv_client_endpoint_t *endpoint, bkv_client_window_t *window) {
    pthread_mutex_lock(&endpoint->client->lock);
    bool ours = endpoint->link.window == window;
    if (ours) {
        endpoint->link.window = NULL;
    }
    pthread_mutex_unlock(&endpoint->client->lock);
    if (ours) {
        give_up(window);
    }
}
