// asking.c - see asking.h.
#include "asking.h"

#include "daemon/observe/clock.h"
#include "kernels/seal.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define PATIENCE_S 30

void pause_ms(uint32_t ms) {
    struct timespec pause = {.tv_sec = ms / 1000, .tv_nsec = (long)(ms % 1000) * 1000000};
    nanosleep(&pause, NULL);
}

bool becomes(bool (*condition)(void *subject), void *subject, uint32_t within_ms) {
    for (uint64_t until = bkv_now_ms() + within_ms; bkv_now_ms() < until; pause_ms(2)) {
        if (condition(subject)) {
            return true;
        }
    }
    return condition(subject);
}

// ---- records ----

static uint64_t word_of(uint64_t number, uint64_t i) {
    uint64_t z = (number << 32) + i + 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    return z ^ (z >> 31);
}

bkv_name_t record_name(uint64_t number) {
    bkv_name_t name;
    memset(&name, 0x5e, sizeof(name));
    for (uint64_t i = 0; i < BKV_KEY_BYTES / 8; i++) {
        uint64_t word = word_of(~number, i);
        memcpy(name.key.bytes + 8 * i, &word, 8);
    }
    return name;
}

void record_make(uint8_t *record, uint64_t number, uint64_t length, uint64_t tenant) {
    bkv_record_header_t header = {
        .magic = BKV_RECORD_MAGIC,
        .version = BKV_RECORD_VERSION,
        .codec = BKV_CODEC_RAW,
        .length = length,
        .tenant = tenant,
        .tokens = 1,
        .layers = 1,
        .heads = 1,
        .key_dim = 8,
        .value_dim = 8,
        .dtype = BKV_BF16,
    };
    bkv_name_t name = record_name(number);
    memcpy(header.key, name.key.bytes, sizeof(header.key));
    memcpy(header.spec_id, name.spec_id.bytes, sizeof(header.spec_id));
    for (uint64_t i = 0; i < (length - sizeof(header)) / 8; i++) {
        uint64_t word = word_of(number, i);
        memcpy(record + sizeof(header) + 8 * i, &word, 8);
    }
    memcpy(record, &header, sizeof(header));
    bkv_record_seal(record);
}

bool record_matches(const uint8_t *record, uint64_t number, uint64_t length) {
    bool same = ((const bkv_record_header_t *)(const void *)record)->length == length;
    for (uint64_t i = 0; same && i < (length - sizeof(bkv_record_header_t)) / 8; i++) {
        uint64_t word = word_of(number, i);
        same = memcmp(record + sizeof(bkv_record_header_t) + 8 * i, &word, 8) == 0;
    }
    return same;
}

void record_put(bkv_store_t *store, uint64_t number, uint64_t length, uint64_t ttl_ms) {
    bkv_slot_t slot;
    bkv_error_t err = {0};
    cr_assert_eq(bkv_store_reserve(store, 7, length, bkv_now_ms(), &slot, &err), BKV_OK, "%s", err.message);
    record_make(slot.data, number, length, 7);
    cr_assert_eq(bkv_store_publish(store, &slot, ttl_ms, length, bkv_now_ms(), &err), BKV_OK, "%s", err.message);
}

uint64_t store_pinned(bkv_store_t *store) {
    bkv_store_metrics_t metrics;
    bkv_store_metrics(store, &metrics);
    return metrics.pinned;
}

// ---- life ----

bkv_store_t *asking_store(void) {
    bkv_store_t *store = NULL;
    bkv_error_t err = {0};
    const bkv_store_config_t config = {.arena_bytes = (uint64_t)128 << 20, .slab_bytes = 16 << 20, .arena_fd = -1};
    cr_assert_eq(bkv_store_create(&config, bkv_now_ms(), &store, NULL, &err), BKV_OK, "%s", err.message);
    return store;
}

bkv_peers_config_t asking_config(const asking_t *asking, uint32_t timeout_ms, uint32_t max_batch) {
    return (bkv_peers_config_t){.store = asking->store,
                                .timeout_ms = timeout_ms != 0 ? timeout_ms : ASKING_TIMEOUT,
                                .max_batch = max_batch != 0 ? max_batch : 4096,
                                .verbs_device = "off",
                                .verbs_gid = -1};
}

void asking_open(asking_t *asking, uint16_t port, uint32_t timeout_ms, uint32_t max_batch) {
    bkv_error_t err = {0};
    asking->store = asking_store();
    bkv_peers_config_t config = asking_config(asking, timeout_ms, max_batch);
    cr_assert_eq(bkv_peers_create(&config, &asking->peers, &err), BKV_OK, "%s", err.message);
    bkv_member_t member = impostor_member("n2", 1, port);
    asking->peer = bkv_peers_get(asking->peers, &member);
    cr_assert_not_null(asking->peer);
}

void asking_close(asking_t *asking) {
    bkv_peer_release(asking->peer);
    bkv_peers_destroy(asking->peers);
    cr_assert_eq(store_pinned(asking->store), 0);
    bkv_store_destroy(asking->store);
}

static bool is_as(void *subject) {
    void **both = subject;
    bkv_peer_health_t health;
    bkv_peer_get_health(((asking_t *)both[0])->peer, &health);
    return health.suspected == *(bool *)both[1];
}

bool becomes_suspected(asking_t *asking, bool suspected, uint32_t within_ms) {
    void *both[2] = {asking, &suspected};
    return becomes(is_as, both, within_ms);
}

// ---- questions ----

typedef struct waiting {
    told_t *told;
    uint32_t count;
    sem_t done;
} waiting_t;

static told_t static_told;

static void wait_for(sem_t *done) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += PATIENCE_S;
    while (sem_timedwait(done, &until) != 0) {
        cr_assert_eq(errno, EINTR, "a question was never answered");
    }
}

static void on_have(void *user, const bkv_error_t *error, const uint64_t *bytes) {
    waiting_t *waiting = user;
    cr_assert_eq(bytes == NULL, error->status != BKV_OK);
    waiting->told->error = *error;
    if (bytes != NULL) {
        memcpy(waiting->told->bytes, bytes, waiting->count * sizeof(bytes[0]));
    }
    sem_post(&waiting->done);
}

static void on_store(void *user, const bkv_error_t *error, const bkv_status_t *results) {
    waiting_t *waiting = user;
    cr_assert_eq(results == NULL, error->status != BKV_OK);
    waiting->told->error = *error;
    if (results != NULL) {
        memcpy(waiting->told->results, results, waiting->count * sizeof(results[0]));
    }
    sem_post(&waiting->done);
}

static void on_forget(void *user, const bkv_error_t *error, const bool *had) {
    waiting_t *waiting = user;
    cr_assert_eq(had == NULL, error->status != BKV_OK);
    waiting->told->error = *error;
    if (had != NULL) {
        memcpy(waiting->told->had, had, waiting->count * sizeof(had[0]));
    }
    sem_post(&waiting->done);
}

static void on_drain(void *user, const bkv_error_t *error, const bkv_drain_progress_t *progress) {
    waiting_t *waiting = user;
    cr_assert_eq(progress == NULL, error->status != BKV_OK);
    waiting->told->error = *error;
    if (progress != NULL) {
        waiting->told->progress = *progress;
    }
    sem_post(&waiting->done);
}

static bkv_name_t *names_from(uint64_t first, uint32_t count) {
    cr_assert(count <= ASKING_NAMES);
    bkv_name_t *names = calloc((size_t)count + 1, sizeof(*names));
    for (uint32_t i = 0; i < count; i++) {
        names[i] = record_name(first + i);
    }
    return names;
}

typedef enum kind { HAVE, STORE, FORGET, DRAIN } kind_t;

static const told_t *ask(asking_t *asking, kind_t kind, uint64_t first, uint32_t count, bkv_drain_order_t order,
                         uint32_t within_ms) {
    waiting_t waiting = {.told = &static_told, .count = count};
    bkv_name_t *names = names_from(first, count);
    uint64_t start_ms = bkv_now_ms(), deadline_ms = within_ms == UINT32_MAX ? UINT64_MAX : start_ms + within_ms;
    bkv_error_t err = {0};
    bkv_status_t status = BKV_INTERNAL;
    memset(&static_told, 0, sizeof(static_told));
    sem_init(&waiting.done, 0, 0);
    switch (kind) {
    case HAVE:
        status = bkv_peer_have(asking->peer, names, count, deadline_ms, on_have, &waiting, &err);
        break;
    case STORE:
        status = bkv_peer_store(asking->peer, names, count, deadline_ms, on_store, &waiting, &err);
        break;
    case FORGET:
        status = bkv_peer_forget(asking->peer, names, count, deadline_ms, on_forget, &waiting, &err);
        break;
    case DRAIN:
        status = bkv_peer_drain(asking->peer, order, deadline_ms, on_drain, &waiting, &err);
        break;
    }
    free(names); // they are copied
    if (status == BKV_OK) {
        wait_for(&waiting.done);
    } else {
        static_told.error = err;
        static_told.refused = true;
    }
    static_told.took_ms = bkv_now_ms() - start_ms;
    sem_destroy(&waiting.done);
    return &static_told;
}

const told_t *ask_have(asking_t *asking, uint64_t first, uint32_t count, uint32_t within_ms) {
    return ask(asking, HAVE, first, count, BKV_DRAIN_ASK, within_ms);
}

const told_t *ask_store(asking_t *asking, uint64_t first, uint32_t count, uint32_t within_ms) {
    return ask(asking, STORE, first, count, BKV_DRAIN_ASK, within_ms);
}

const told_t *ask_forget(asking_t *asking, uint64_t first, uint32_t count, uint32_t within_ms) {
    return ask(asking, FORGET, first, count, BKV_DRAIN_ASK, within_ms);
}

const told_t *ask_drain(asking_t *asking, bkv_drain_order_t order, uint32_t within_ms) {
    return ask(asking, DRAIN, 0, 0, order, within_ms);
}

// ---- fetches ----

static void *on_begin(void *user, uint32_t index, uint64_t tenant, uint64_t bytes, uint64_t ttl_ms) {
    fetching_t *fetching = user;
    cr_assert(!fetching->over && index < fetching->count && fetching->ends[index] == 0);
    fetching->begins[index]++;
    fetching->tenants[index] = tenant;
    fetching->lengths[index] = bytes;
    fetching->ttls[index] = ttl_ms;
    if (index > 0 && index == fetching->cancel_at) {
        bkv_peer_cancel(fetching->call);
    }
    if (fetching->unwanted[index]) {
        return NULL;
    }
    fetching->memory[index] = aligned_alloc(64, (bytes + 63) / 64 * 64);
    return fetching->memory[index];
}

static void on_end(void *user, uint32_t index, const bkv_error_t *error) {
    fetching_t *fetching = user;
    cr_assert(!fetching->over && index < fetching->count);
    fetching->ends[index]++;
    fetching->ended[index] = error->status;
    if (error->status != BKV_OK) {
        memcpy(fetching->why[index], error->message, sizeof(fetching->why[index]) - 1);
    }
}

static void on_done(void *user, const bkv_error_t *error) {
    fetching_t *fetching = user;
    cr_assert(!fetching->over);
    fetching->over = true;
    fetching->error = *error;
    sem_post(&fetching->done);
}

static const bkv_fetch_sink_t sink = {.begin = on_begin, .end = on_end, .done = on_done};

fetching_t *fetching_new(void) {
    return calloc(1, sizeof(fetching_t));
}

void fetch_start(asking_t *asking, fetching_t *fetching, uint64_t first, uint32_t count, uint32_t within_ms) {
    cr_assert(count <= ASKING_NAMES);
    bkv_error_t err = {0};
    sem_init(&fetching->done, 0, 0);
    fetching->count = count;
    for (uint32_t i = 0; i < count; i++) {
        fetching->names[i] = record_name(first + i);
    }
    uint64_t deadline_ms = within_ms == UINT32_MAX ? UINT64_MAX : bkv_now_ms() + within_ms;
    bkv_status_t status =
        bkv_peer_fetch(asking->peer, fetching->names, count, deadline_ms, &sink, fetching, &fetching->call, &err);
    if (status != BKV_OK) {
        fetching->refused = true;
        fetching->error = err;
    }
}

void fetch_wait(fetching_t *fetching) {
    if (fetching->refused) {
        return;
    }
    wait_for(&fetching->done);
    for (uint32_t i = 0; i < fetching->count; i++) {
        cr_assert_eq(fetching->ends[i], 1, "record %u ended %u times", i, fetching->ends[i]);
        cr_assert(fetching->begins[i] <= 1 && (fetching->begins[i] == 1 || fetching->ended[i] != BKV_OK));
    }
}

void fetch_clear(fetching_t *fetching) {
    for (uint32_t i = 0; i < fetching->count; i++) {
        free(fetching->memory[i]);
    }
    sem_destroy(&fetching->done);
    free(fetching);
}
