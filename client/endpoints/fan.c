// fan.c - see route.h. A fan is entered among the client's calls, so that somebody can wait for it; its parts are calls as any,
// with endpoints, attempts and pauses of their own, and are cancelled with its queue or client.
#include "client/client.h"

#include <assert.h>
#include <stdatomic.h>
#include <stdlib.h>

void *bkv_fan_new(size_t size, const bkv_call_kind_t *kind, bkv_client_t *client, const bkv_spec_id_t *id, uint32_t timeout_ms,
                  bkv_client_split_t *split) {
    assert(size >= sizeof(bkv_fan_t) && split->count > 0);
    bkv_fan_t *fan = bkv_call_new(size, kind, client, id, timeout_ms);
    bkv_call_t **parts = calloc(split->count, sizeof *parts);
    if (fan == NULL || parts == NULL) {
        free(parts);
        bkv_call_free((bkv_call_t *)fan);
        return NULL;
    }
    fan->split = split;
    fan->parts = parts;
    atomic_init(&fan->left, split->count);
    return fan;
}

void bkv_fan_set(bkv_fan_t *fan, size_t i, bkv_call_t *part) {
    part->parent = &fan->call;
    bkv_client_route_to(part, &fan->split->parts[i]);
    fan->parts[i] = part;
}

static void part_over(bkv_call_t *part) {
    bkv_fan_t *fan = (bkv_fan_t *)part->parent;
    if (atomic_fetch_sub(&fan->left, 1) == 1) {
        bkv_call_conclude(&fan->call);
    }
}

// Parts that have been started may be over before the last one is; the fan cannot.
void bkv_fan_start(bkv_call_t *call) {
    bkv_fan_t *fan = (bkv_fan_t *)call;
    size_t count = fan->split->count;
    for (size_t i = 0; i < count; i++) {
        bkv_call_t *part = fan->parts[i];
        part->queue = call->queue;
        bkv_call_detach(part, part_over);
    }
}

void bkv_fan_finish(bkv_fan_t *fan) {
    for (size_t i = 0; i < fan->split->count; i++) {
        bkv_call_t *part = fan->parts[i];
        if (part->kind->finish != NULL) {
            part->kind->finish(part);
        }
        if (fan->call.error.status == BKV_OK) {
            fan->call.error = part->error;
        }
    }
}

void bkv_fan_clean(bkv_call_t *call) {
    bkv_fan_t *fan = (bkv_fan_t *)call;
    for (size_t i = 0; fan->split != NULL && i < fan->split->count; i++) {
        bkv_call_free(fan->parts[i]);
    }
    free(fan->parts);
    free(fan->split);
}
