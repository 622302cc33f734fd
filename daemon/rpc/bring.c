// bring.c - see bring.h.
#include "daemon/rpc/bring.h"

#include "daemon/observe/clock.h"

#include <assert.h>
#include <inttypes.h>
#include <stdlib.h>

typedef enum part_state {
    UNPINNED, // here when it was looked for, or let go of
    PINNED,   // was here
    CAME,     // from the pool, pinned
    LET_GO,   // came from the pool, and is pinned no more
    LACKING,  // see found.status
} part_state_t;

struct bkv_bring {
    bkv_server_t *server;
    void (*then)(void *user);
    void *user;
    _Atomic bool under_way;
    uint32_t count;
    bkv_found_t *found;   // [count]
    part_state_t *states; // [count]
    bkv_name_t names[];
};

bkv_bring_t *bkv_bring_new(bkv_server_t *server, const bkv_spec_id_t *spec_id, const bkv_key_t *keys, uint32_t count) {
    assert(server->config.cluster != NULL);
    bkv_bring_t *bring = calloc(1, sizeof(*bring) + count * sizeof(bring->names[0]));
    bkv_found_t *found = calloc(count + (size_t)1, sizeof(found[0]));
    part_state_t *states = calloc(count + (size_t)1, sizeof(states[0]));
    if (bring == NULL || found == NULL || states == NULL) {
        free(bring);
        free(found);
        free(states);
        return NULL;
    }
    bring->server = server;
    bring->count = count;
    bring->found = found;
    bring->states = states;
    for (uint32_t i = 0; i < count; i++) {
        bring->names[i] = (bkv_name_t){.spec_id = *spec_id, .key = keys[i]};
    }
    return bring;
}

// ---- bringing ----

static bool all_here(const bkv_bring_t *bring, uint64_t now_ms) {
    for (uint32_t i = 0; i < bring->count; i++) {
        if (!bkv_store_contains(bring->server->config.store, &bring->names[i].spec_id, &bring->names[i].key, now_ms)) {
            return false;
        }
    }
    return true;
}

// Whoever uses a record verifies it; what matters now is that it stays. Absent ones are asked about first, lest they count as
// misses of this store twice.
static void pin_what_is_here(bkv_bring_t *bring, uint64_t now_ms) {
    bkv_store_t *store = bring->server->config.store;
    for (uint32_t i = 0; i < bring->count; i++) {
        const bkv_name_t *name = &bring->names[i];
        bkv_found_t *found = &bring->found[i];
        found->status = BKV_NOT_FOUND;
        if (bkv_store_contains(store, &name->spec_id, &name->key, now_ms)) {
            found->status = bkv_store_pin_unverified(store, &name->spec_id, &name->key, now_ms, &found->pin, NULL);
        }
        bring->states[i] = found->status == BKV_OK ? PINNED : LACKING;
    }
}

static void on_fetched(void *user) {
    bkv_bring_t *bring = user;
    for (uint32_t i = 0; i < bring->count; i++) {
        if (bring->states[i] == LACKING && bring->found[i].status == BKV_OK) {
            bring->states[i] = CAME;
        }
    }
    void (*then)(void *) = bring->then;
    void *to = bring->user;
    atomic_store(&bring->under_way, false); // from here on it may be freed
    then(to);
}

bool bkv_bring_start(bkv_bring_t *bring, uint64_t deadline_ms, void (*then)(void *user), void *user) {
    uint64_t now_ms = bkv_now_ms();
    if (all_here(bring, now_ms)) {
        return true;
    }
    bring->then = then;
    bring->user = user;
    atomic_store(&bring->under_way, true);
    pin_what_is_here(bring, now_ms);
    bkv_cluster_fetch(bring->server->config.cluster, bring->names, bring->count, deadline_ms, bring->found, on_fetched, bring);
    return false;
}

bool bkv_bring_under_way(const bkv_bring_t *bring) {
    return atomic_load(&bring->under_way);
}

// ---- what came of it ----

uint32_t bkv_bring_count(const bkv_bring_t *bring) {
    return bring->count;
}

static const char *text_of(bkv_status_t status) {
    switch (status) {
    case BKV_NOT_FOUND:
        return "no daemon of the cluster has it";
    case BKV_DATA_LOSS:
        return "it is damaged at all daemons that have it";
    case BKV_RESOURCE_EXHAUSTED:
        return "arena: no room to bring it here, all that is large enough is pinned, leased or being filled";
    case BKV_BUSY:
        return "a daemon that may have it cannot be reached";
    case BKV_DEADLINE_EXCEEDED:
        return "deadline: no daemon that may have it answered in time";
    default:
        return "this daemon stops";
    }
}

bkv_status_t bkv_bring_status(const bkv_bring_t *bring, uint32_t number, bkv_error_t *err) {
    if (bring->states[number] != LACKING) {
        return BKV_OK;
    }
    return bkv_fail(err, bring->found[number].status, "key: %s", text_of(bring->found[number].status));
}

bkv_status_t bkv_bring_result(const bkv_bring_t *bring, bkv_error_t *err) {
    for (uint32_t i = 0; i < bring->count; i++) {
        if (bring->states[i] == LACKING) {
            return bkv_fail(err, bring->found[i].status, "keys[%" PRIu32 "]: %s", i, text_of(bring->found[i].status));
        }
    }
    return BKV_OK;
}

bool bkv_bring_came(const bkv_bring_t *bring, uint32_t number) {
    return bring->states[number] == CAME || bring->states[number] == LET_GO;
}

// ---- letting go ----

void bkv_bring_unpin(bkv_bring_t *bring, uint32_t number) {
    part_state_t state = bring->states[number];
    if (state == PINNED || state == CAME) {
        bring->states[number] = state == CAME ? LET_GO : UNPINNED;
        bkv_store_unpin(bring->server->config.store, &bring->found[number].pin);
    }
}

void bkv_bring_used(bkv_bring_t *bring) {
    for (uint32_t i = 0; i < bring->count; i++) {
        bkv_bring_unpin(bring, i);
        if (bring->states[i] == LET_GO) {
            bkv_cluster_used(bring->server->config.cluster, &bring->names[i]);
        }
    }
}

void bkv_bring_free(bkv_bring_t *bring) {
    if (bring == NULL) {
        return;
    }
    assert(!bkv_bring_under_way(bring));
    for (uint32_t i = 0; i < bring->count; i++) {
        bkv_bring_unpin(bring, i);
    }
    free(bring->found);
    free(bring->states);
    free(bring);
}
