// pool.c - see pool.h: the records, the daemon under test, and what waits for it. The other members are members.c's.
#include "pool.h"

#include "daemon/observe/clock.h"
#include "kernels/codec.h"
#include "kernels/seal.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define MIB ((uint64_t)1 << 20)

// ---- records ----

static uint64_t next(uint64_t *state) { // splitmix64
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

bkv_name_t name_of(uint32_t number) {
    bkv_name_t name = {.spec_id = {{0x5e, 0xc1}}};
    uint64_t state = number;
    for (size_t i = 0; i < sizeof(name.key.bytes); i += 8) {
        uint64_t word = next(&state);
        memcpy(name.key.bytes + i, &word, 8);
    }
    return name;
}

void names_of(uint32_t first, uint32_t count, bkv_name_t *names) {
    for (uint32_t i = 0; i < count; i++) {
        names[i] = name_of(first + i);
    }
}

static bkv_shape_t shape_of(uint32_t number) {
    return (bkv_shape_t){
        .layers = 2, .heads = 1, .tokens = 16 + number % 5 * 16, .key_dim = 32, .value_dim = 32, .dtype = BKV_FP32};
}

uint64_t length_of(uint32_t number) {
    bkv_shape_t shape = shape_of(number);
    return bkv_raw_payload(&shape) + bkv_shape_bytes(&shape);
}

static void fill(uint32_t number, uint8_t *record) {
    bkv_name_t name = name_of(number);
    bkv_shape_t shape = shape_of(number);
    const bkv_record_id_t id = {.key = name.key, .spec_id = name.spec_id, .tenant = TENANT};
    size_t length = bkv_raw_begin(&shape, &id, record);
    uint64_t state = ~(uint64_t)number;
    for (size_t i = bkv_raw_payload(&shape); i < length; i += sizeof(float)) {
        float value = (float)(next(&state) >> 40);
        memcpy(record + i, &value, sizeof(value));
    }
    bkv_record_seal(record);
}

void put_at(bkv_store_t *store, uint32_t number) {
    bkv_slot_t slot;
    bkv_error_t err;
    cr_assert_eq(bkv_store_reserve(store, TENANT, length_of(number), bkv_now_ms(), &slot, &err), BKV_OK, "%s", err.message);
    fill(number, slot.data);
    cr_assert_eq(bkv_store_publish(store, &slot, 0, 0, bkv_now_ms(), &err), BKV_OK, "%s", err.message);
}

bool is_record(const bkv_pin_t *pin, uint32_t number) {
    uint8_t *expected = aligned_alloc(64, (length_of(number) + 63) / 64 * 64);
    fill(number, expected);
    bool same = pin->length == length_of(number) && memcmp(pin->data, expected, pin->length) == 0;
    free(expected);
    return same;
}

bool has(bkv_store_t *store, uint32_t number) {
    bkv_name_t name = name_of(number);
    return bkv_store_contains(store, &name.spec_id, &name.key, bkv_now_ms());
}

// ---- owners ----

uint32_t owners_of(pool_t *pool, uint32_t number, uint32_t owners[BKV_REPLICAS_MAX]) {
    const bkv_view_t *view = bkv_view_take(&pool->views);
    bkv_name_t name = name_of(number);
    uint16_t at[BKV_REPLICAS_MAX];
    uint32_t count = bkv_placement_owners(view->placement, &name.key, at);
    for (uint32_t i = 0; i < count; i++) {
        owners[i] = (uint32_t)(view->members[at[i]].place.id[1] - '0');
    }
    bkv_view_give(view);
    return count;
}

uint32_t number_owned_by(pool_t *pool, uint32_t a, uint32_t b, uint32_t from) {
    for (uint32_t number = from;; number++) {
        uint32_t owners[BKV_REPLICAS_MAX];
        cr_assert_eq(owners_of(pool, number, owners), 2);
        if ((owners[0] == a && owners[1] == b) || (owners[0] == b && owners[1] == a)) {
            return number;
        }
    }
}

void put_owned(pool_t *pool, uint32_t number) {
    uint32_t owners[BKV_REPLICAS_MAX];
    uint32_t count = owners_of(pool, number, owners);
    for (uint32_t i = 0; i < count; i++) {
        put_at(owners[i] == SELF ? pool->store : pool->peers[owners[i]].store, number);
    }
}

// ---- the daemon under test ----

static bkv_store_t *new_store(uint64_t arena_bytes) {
    bkv_store_t *store;
    bkv_error_t err;
    const bkv_store_config_t config = {.arena_bytes = arena_bytes, .slab_bytes = MIB / 4, .arena_fd = -1};
    cr_assert_eq(bkv_store_create(&config, bkv_now_ms(), &store, NULL, &err), BKV_OK, "%s", err.message);
    return store;
}

void pool_list(pool_t *pool, uint32_t member, bool listed) {
    pool->listed[member] = listed;
}

void pool_publish(pool_t *pool) {
    bkv_member_t members[MEMBERS];
    uint32_t count = 0;
    for (uint32_t i = 0; i < MEMBERS; i++) {
        if (pool->listed[i]) {
            members[count++] = pool->members[i];
        }
    }
    const bkv_view_config_t config = {
        .members = members, .count = count, .self = "m0", .cluster = {.seed = 42, .replicas = pool->replicas}};
    cr_assert_eq(bkv_views_publish(&pool->views, &config, NULL), BKV_OK);
}

void pool_set_origin(pool_t *pool) {
    if (pool->origin != NULL) {
        bkv_view_give(pool->origin);
    }
    pool->origin = bkv_view_take(&pool->views);
}

pool_t *pool_new(uint32_t replicas, uint64_t arena_bytes) {
    pool_t *pool = calloc(1, sizeof(*pool));
    pool->replicas = replicas;
    pool->store = new_store(arena_bytes);
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->changed, NULL);
    cr_assert_eq(bkv_views_init(&pool->views, NULL), BKV_OK);
    for (uint32_t i = 0; i < MEMBERS; i++) {
        snprintf(pool->members[i].place.id, sizeof(pool->members[i].place.id), "m%u", i);
        pool->members[i].place.epoch = 1;
        pool->members[i].place.weight = 1;
        pool->listed[i] = true;
        pool->peers[i] = (peer_t){.pool = pool, .number = i, .patience_us = 100000, .latency_us = 100 + i};
        pool->peers[i].store = i != SELF ? new_store(32 * MIB) : NULL;
    }
    bkv_cluster_t *cluster = &pool->cluster;
    cluster->store = pool->store;
    cluster->membership = (bkv_membership_t *)pool;
    cluster->peers = (bkv_peers_t *)pool;
    cluster->mover = (bkv_mover_t *)pool;
    cluster->peer_timeout_ms = TIMEOUT_MS;
    strcpy(cluster->id, "m0");
    bkv_hot_init(&cluster->hot, 2, 4711);
    cr_assert_eq(bkv_alarms_create(&cluster->alarms, NULL), BKV_OK);
    pool_publish(pool);
    return pool;
}

uint64_t pinned(pool_t *pool) {
    bkv_store_metrics_t metrics;
    bkv_store_metrics(pool->store, &metrics);
    return metrics.pinned;
}

void pool_free(pool_t *pool) {
    uint64_t give_up_ms = bkv_now_ms() + 20000;
    while (atomic_load(&pool->calls) > 0 || atomic_load(&pool->cluster.busy) > 0) {
        cr_assert(bkv_now_ms() < give_up_ms, "something goes on for ever");
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
    bkv_alarms_destroy(pool->cluster.alarms);
    for (uint32_t i = 0; i < MEMBERS; i++) {
        cr_assert_eq(atomic_load(&pool->peers[i].refs), 0, "m%u is still referred to", i);
        bkv_store_destroy(pool->peers[i].store);
    }
    if (pool->origin != NULL) {
        bkv_view_give(pool->origin);
    }
    bkv_views_deinit(&pool->views);
    bkv_store_destroy(pool->store); // asserts that nothing is pinned or reserved
    pthread_cond_destroy(&pool->changed);
    pthread_mutex_destroy(&pool->lock);
    free(pool);
}

// ---- waiting ----

void waiter_init(waiter_t *waiter) {
    pthread_mutex_init(&waiter->lock, NULL);
    pthread_cond_init(&waiter->changed, NULL);
    waiter->done = 0;
}

void waiter_done(void *user) {
    waiter_t *waiter = user;
    pthread_mutex_lock(&waiter->lock);
    waiter->done++;
    pthread_cond_signal(&waiter->changed);
    pthread_mutex_unlock(&waiter->lock);
}

void waiter_wait(waiter_t *waiter) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += 20;
    int error = 0;
    pthread_mutex_lock(&waiter->lock);
    while (waiter->done == 0 && error != ETIMEDOUT) {
        error = pthread_cond_timedwait(&waiter->changed, &waiter->lock, &until);
    }
    cr_assert_eq(waiter->done, 1, "done %u times", waiter->done);
    waiter->done = 0;
    pthread_mutex_unlock(&waiter->lock);
}

uint64_t fetch_ms(pool_t *pool, const bkv_name_t *names, uint32_t count, uint32_t timeout_ms, bkv_status_t *statuses) {
    bkv_found_t *found = calloc(count, sizeof(*found));
    waiter_t waiter;
    waiter_init(&waiter);
    for (uint32_t i = 0; i < count; i++) {
        found[i].status = BKV_NOT_FOUND;
    }
    uint64_t start_ms = bkv_now_ms();
    bkv_cluster_fetch(&pool->cluster, names, count, timeout_ms != 0 ? start_ms + timeout_ms : NO_END, found, waiter_done,
                      &waiter);
    waiter_wait(&waiter);
    uint64_t took_ms = bkv_now_ms() - start_ms;
    for (uint32_t i = 0; i < count; i++) {
        statuses[i] = found[i].status;
        if (found[i].status == BKV_OK) {
            cr_assert(memcmp(found[i].pin.data + offsetof(bkv_record_header_t, key), names[i].key.bytes, BKV_KEY_BYTES) == 0);
            cr_assert_eq(bkv_record_verify(found[i].pin.data, found[i].pin.length, NULL), BKV_OK);
            bkv_store_unpin(pool->store, &found[i].pin);
        }
    }
    free(found);
    return took_ms;
}

bkv_status_t fetch_one(pool_t *pool, uint32_t number) {
    bkv_name_t name = name_of(number);
    bkv_status_t status;
    fetch_ms(pool, &name, 1, 10000, &status);
    return status;
}
