// shared.c - bkv_buffer_get and bkv_buffer_put: memory for payloads in the window of the endpoint that Puts go to, so that a Put
// only names it.
#include "client/client.h"

#include <assert.h>
#include <stdlib.h>

// How long bkv_buffer_get waits for a window to be attached.
#define ATTACH_MS 2000

struct bkv_client_shared {
    bkv_client_region_t *region; // held
    struct bkv_client_shared *next;
};

static bool within(const bkv_client_region_t *region, const void *payload, uint64_t bytes) {
    uintptr_t start = (uintptr_t)bkv_client_region_memory(region), at = (uintptr_t)payload;
    uint64_t length = bkv_client_region_bytes(region);
    return at >= start && at - start <= length && bytes <= length - (at - start);
}

bkv_client_region_t *bkv_client_shared_find(bkv_client_t *client, const void *payload, uint64_t bytes, uint64_t *offset) {
    bkv_client_region_t *found = NULL;
    pthread_mutex_lock(&client->lock);
    for (bkv_client_shared_t *shared = client->shared; shared != NULL && found == NULL; shared = shared->next) {
        if (within(shared->region, payload, bytes)) {
            found = bkv_client_region_retain(shared->region);
        }
    }
    pthread_mutex_unlock(&client->lock);
    if (found != NULL && bkv_client_region_lost(found)) {
        bkv_client_region_release(found);
        return NULL;
    }
    if (found != NULL) {
        *offset = bkv_client_region_offset(found) + ((uintptr_t)payload - (uintptr_t)bkv_client_region_memory(found));
    }
    return found;
}

static void *shared_take(bkv_client_endpoint_t *endpoint, size_t bytes) {
    bkv_client_t *client = endpoint->client;
    bkv_client_window_t *window = bkv_client_link_window(endpoint, ATTACH_MS);
    bkv_client_shared_t *shared = window != NULL ? calloc(1, sizeof *shared) : NULL;
    bkv_client_region_t *region = shared != NULL ? bkv_client_region_take(window, bytes) : NULL;
    bkv_client_window_release(window);
    if (region == NULL) {
        free(shared);
        return NULL;
    }
    shared->region = region;
    pthread_mutex_lock(&client->lock);
    shared->next = client->shared;
    client->shared = shared;
    pthread_mutex_unlock(&client->lock);
    return bkv_client_region_memory(region);
}

void *bkv_buffer_get(bkv_client_t *client, size_t bytes) {
    assert(client != NULL);
    size_t wanted = bytes > 0 ? bytes : 1;
    pthread_mutex_lock(&client->lock);
    bkv_client_endpoint_t *endpoint = bkv_client_endpoint_first(client);
    pthread_mutex_unlock(&client->lock);
    void *memory = bkv_client_link_wanted(&endpoint->link, wanted) ? shared_take(endpoint, wanted) : NULL;
    return memory != NULL ? memory : bkv_client_buffer_take(client->buffers, wanted);
}

void bkv_buffer_put(bkv_client_t *client, void *buffer) {
    assert(client != NULL);
    bkv_client_shared_t *shared;
    pthread_mutex_lock(&client->lock);
    bkv_client_shared_t **at = &client->shared;
    while (*at != NULL && bkv_client_region_memory((*at)->region) != buffer) {
        at = &(*at)->next;
    }
    shared = *at;
    if (shared != NULL) {
        *at = shared->next;
    }
    pthread_mutex_unlock(&client->lock);
    if (shared != NULL) {
        bkv_client_region_release(shared->region);
        free(shared);
    } else {
        bkv_client_buffer_free(buffer);
    }
}

void bkv_client_shared_free(bkv_client_t *client) {
    while (client->shared != NULL) {
        bkv_client_shared_t *shared = client->shared;
        client->shared = shared->next;
        bkv_client_region_release(shared->region);
        free(shared);
    }
}
