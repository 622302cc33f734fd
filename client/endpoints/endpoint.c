// endpoint.c - see endpoint.h: which endpoints there are, and which of them a call's next attempt goes to. Who asks after those
// that are down or silent is watch.c.
#include "client/client.h"

#include <assert.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#define NS_PER_MS 1000000ull

// How often a call waits for an endpoint that says it is busy, before it goes to another: 10 + 20 + 40 ms and what the attempts
// take.
#define BUSY_MOST 3

// How a daemon that is about to end says so (daemon/rpc/call.c, daemon/pipeline/pipeline.c).
#define DRAINING "draining"

// ---- making them ----

static void endpoint_free(bkv_client_endpoint_t *endpoint) {
    if (endpoint->channel != NULL) {
        grpc_channel_destroy(endpoint->channel);
    }
    bkv_client_link_deinit(&endpoint->link);
    bkv_client_target_deinit(&endpoint->target);
    free(endpoint);
}

// Takes the target over, also on failure.
static bkv_client_endpoint_t *endpoint_new(bkv_client_t *client, bkv_client_target_t *target, bool listed) {
    bkv_client_endpoint_t *endpoint = calloc(1, sizeof *endpoint);
    if (endpoint == NULL) {
        bkv_client_target_deinit(target);
        return NULL;
    }
    endpoint->client = client;
    endpoint->target = *target;
    endpoint->listed = listed;
    bkv_client_link_init(endpoint);
    endpoint->channel = bkv_client_target_connect(&endpoint->target);
    return endpoint;
}

bkv_status_t bkv_client_endpoints_init(bkv_client_t *client, const bkv_client_options_t *options, bkv_error_t *err) {
    bkv_client_target_t targets[BKV_ENDPOINTS_LISTED];
    uint32_t count = 0;
    bkv_status_t status = bkv_client_targets_init(targets, BKV_ENDPOINTS_LISTED, &count, options, err);
    for (uint32_t i = 0; status == BKV_OK && i < count; i++) {
        client->local = client->local || bkv_client_target_local(&targets[i]);
    }
    for (uint32_t i = 0; status == BKV_OK && i < count; i++) {
        bkv_client_endpoint_t *made = endpoint_new(client, &targets[i], true);
        if (made != NULL) {
            made->number = i;
            client->endpoints[i] = made;
            client->endpoint_count = client->listed = i + 1;
            continue;
        }
        status = bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "client: out of memory");
        for (uint32_t rest = i + 1; rest < count; rest++) {
            bkv_client_target_deinit(&targets[rest]);
        }
    }
    return status;
}

void bkv_client_endpoints_deinit(bkv_client_t *client) {
    for (uint32_t i = 0; i < client->endpoint_count; i++) {
        endpoint_free(client->endpoints[i]);
    }
    client->endpoint_count = 0;
}

// ---- those that are learned ----

// The lock must be held.
static bkv_client_endpoint_t *find(bkv_client_t *client, const char *address) {
    for (uint32_t i = 0; i < client->endpoint_count; i++) {
        if (strcmp(client->endpoints[i]->target.address, address) == 0) {
            return client->endpoints[i];
        }
    }
    return NULL;
}

bkv_client_endpoint_t *bkv_client_endpoint_learn(bkv_client_t *client, const char *address) {
    pthread_mutex_lock(&client->lock);
    bkv_client_endpoint_t *known = find(client, address), *made = NULL;
    bool room = client->endpoint_count < BKV_ENDPOINTS_MAX;
    pthread_mutex_unlock(&client->lock);
    bkv_client_target_t target;
    if (known != NULL || !room || bkv_client_target_learn(&target, &client->options, address) != BKV_OK ||
        (made = endpoint_new(client, &target, false)) == NULL) {
        return known;
    }
    pthread_mutex_lock(&client->lock);
    known = find(client, address); // another thread may have made it meanwhile
    if (known == NULL && client->endpoint_count < BKV_ENDPOINTS_MAX) {
        made->number = client->endpoint_count;
        client->endpoints[client->endpoint_count++] = known = made;
    }
    pthread_mutex_unlock(&client->lock);
    if (known != made) {
        endpoint_free(made);
    }
    return known;
}

bkv_client_endpoint_t *bkv_client_endpoint_find(bkv_client_t *client, char *const *addresses, size_t count) {
    for (uint32_t i = 0; i < client->listed; i++) {
        for (size_t j = 0; j < count; j++) {
            if (strcmp(client->endpoints[i]->target.address, addresses[j]) == 0) {
                return client->endpoints[i];
            }
        }
    }
    return NULL;
}

// ---- where a call goes ----

bool bkv_client_endpoint_others(const bkv_call_t *call) {
    bool others = call->client->listed > 1;
    for (uint32_t i = 0; i < call->owner_count && !others; i++) {
        others = call->owners[i] != call->client->endpoints[0];
    }
    return others && !call->bound;
}

static uint32_t bit(const bkv_client_endpoint_t *endpoint) {
    return 1u << endpoint->number;
}

// The first owner of what the call is about that works and was not tried in this round; then the first listed; where none works,
// the first listed that was not tried. NULL: the round is over.
static bkv_client_endpoint_t *next(bkv_call_t *call) {
    bkv_client_t *client = call->client;
    for (; call->owner_next < call->owner_count; call->owner_next++) {
        if (!call->owners[call->owner_next]->down) {
            return call->owners[call->owner_next];
        }
    }
    bkv_client_endpoint_t *untried = NULL;
    bool works = false;
    for (uint32_t i = 0; i < client->listed; i++) {
        bkv_client_endpoint_t *endpoint = client->endpoints[i];
        bool tried = (call->tried & bit(endpoint)) != 0;
        if (!endpoint->down && !tried) {
            return endpoint;
        }
        works = works || !endpoint->down;
        untried = untried == NULL && !tried ? endpoint : untried;
    }
    return works ? NULL : untried;
}

bkv_client_endpoint_t *bkv_client_endpoint_choose(bkv_call_t *call) {
    if (call->bound) {
        return call->endpoint;
    }
    bkv_client_endpoint_t *endpoint = next(call);
    if (endpoint == NULL) {
        call->tried = 0;
        call->owner_next = 0;
        endpoint = next(call);
    }
    assert(endpoint != NULL);
    return endpoint;
}

bkv_client_endpoint_t *bkv_client_endpoint_first(bkv_client_t *client) {
    for (uint32_t i = 0; i < client->listed; i++) {
        if (!client->endpoints[i]->down) {
            return client->endpoints[i];
        }
    }
    return client->endpoints[0];
}

// Notes that the endpoint was tried in this round. The lock must be held.
static void give_up(bkv_call_t *call) {
    if (call->owner_next < call->owner_count && call->owners[call->owner_next] == call->endpoint) {
        call->owner_next++;
    }
    if (call->endpoint->listed) {
        call->tried |= bit(call->endpoint);
    }
    call->busy = 0;
}

bool bkv_client_endpoint_forsake(bkv_call_t *call, bool answered) {
    if (!bkv_client_endpoint_others(call)) {
        return false;
    }
    bkv_client_t *client = call->client;
    bool waits = answered && strstr(call->error.message, DRAINING) == NULL && !call->kind->fail_fast;
    pthread_mutex_lock(&client->lock);
    bool leaves = !waits || ++call->busy > BUSY_MOST;
    if (leaves) {
        bkv_client_watch_down(call->endpoint);
        give_up(call);
        leaves = next(call) != NULL;
    }
    pthread_mutex_unlock(&client->lock);
    if (!waits) {
        bkv_client_wake(client); // there is somebody to ask after
    }
    return leaves;
}

bool bkv_client_endpoint_ask_next(bkv_call_t *call) {
    if (!bkv_client_endpoint_others(call)) {
        return false;
    }
    pthread_mutex_lock(&call->client->lock);
    give_up(call);
    bool more = next(call) != NULL;
    call->asked_next += more;
    pthread_mutex_unlock(&call->client->lock);
    return more;
}

// One that was given up since the attempt began is not up again because that attempt's answer comes late.
void bkv_client_endpoint_heard(bkv_call_t *call, bool served) {
    bkv_client_endpoint_t *endpoint = call->endpoint;
    bkv_client_t *client = call->client;
    if (!client->watched) {
        return;
    }
    atomic_store_explicit(&endpoint->heard_ns, bkv_client_now_ns(), memory_order_relaxed);
    if (served && !call->bound) {
        pthread_mutex_lock(&client->lock);
        if (endpoint->down && call->begun_ns > endpoint->down_ns) {
            endpoint->down = false;
        }
        endpoint->fruitless = endpoint->silences = 0;
        pthread_mutex_unlock(&client->lock);
    }
}

void bkv_client_endpoint_unheard(bkv_call_t *call) {
    if (!bkv_client_endpoint_others(call)) {
        return;
    }
    bkv_client_endpoint_t *endpoint = call->endpoint;
    pthread_mutex_lock(&call->client->lock);
    if (atomic_load_explicit(&endpoint->heard_ns, memory_order_relaxed) < call->begun_ns) {
        bkv_client_watch_down(endpoint);
    }
    pthread_mutex_unlock(&call->client->lock);
}
