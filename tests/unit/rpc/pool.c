// pool.c - see pool.h.
#include "pool.h"

#include "daemon/observe/clock.h"
#include "kernels/codec.h"
#include "kernels/seal.h"

#include <criterion/criterion.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static pool_t *present; // each test has a process of its own

// NULL: it is a real cluster.
static pool_t *pool_of(bkv_cluster_t *cluster) {
    return cluster == (bkv_cluster_t *)present ? present : NULL;
}

void __real_bkv_cluster_fetch(bkv_cluster_t *cluster, const bkv_name_t *names, uint32_t count, uint64_t deadline_ms,
                              bkv_found_t *found, bkv_cluster_done_t done, void *user);
void __wrap_bkv_cluster_fetch(bkv_cluster_t *cluster, const bkv_name_t *names, uint32_t count, uint64_t deadline_ms,
                              bkv_found_t *found, bkv_cluster_done_t done, void *user);
void __real_bkv_cluster_used(bkv_cluster_t *cluster, const bkv_name_t *name);
void __wrap_bkv_cluster_used(bkv_cluster_t *cluster, const bkv_name_t *name);
void __real_bkv_cluster_lookup(bkv_cluster_t *cluster, const bkv_name_t *names, uint32_t count, uint64_t deadline_ms,
                               bool *have, bkv_cluster_done_t done, void *user);
void __wrap_bkv_cluster_lookup(bkv_cluster_t *cluster, const bkv_name_t *names, uint32_t count, uint64_t deadline_ms,
                               bool *have, bkv_cluster_done_t done, void *user);
void __real_bkv_cluster_forget(bkv_cluster_t *cluster, const bkv_name_t *names, uint32_t count, uint64_t deadline_ms, bool *had,
                               bkv_cluster_done_t done, void *user);
void __wrap_bkv_cluster_forget(bkv_cluster_t *cluster, const bkv_name_t *names, uint32_t count, uint64_t deadline_ms, bool *had,
                               bkv_cluster_done_t done, void *user);

// ---- records ----

static uint32_t number_of(const bkv_name_t *name) {
    uint32_t number;
    memcpy(&number, name->key.bytes, sizeof(number));
    return number;
}

static bkv_status_t adopt(pool_t *pool, uint32_t number, bool copy, bkv_pin_t *pin) {
    const bkv_shape_t shape = {
        .layers = 1, .heads = RIG_HEADS, .tokens = RIG_TOKENS, .key_dim = RIG_DIM, .value_dim = RIG_DIM, .dtype = BKV_FP32};
    bkv_record_id_t id = {.tenant = 0};
    rig_key(number, id.key.bytes);
    memcpy(id.spec_id.bytes, pool->spec_id, sizeof(id.spec_id.bytes));
    bkv_slot_t slot;
    bkv_status_t status =
        bkv_store_reserve(pool->store, id.tenant, bkv_raw_payload(&shape) + RIG_BLOCK, bkv_now_ms(), &slot, NULL);
    if (status != BKV_OK) {
        return status;
    }
    float *payload = rig_payload(RIG_BLOCK, number + 1);
    bkv_raw_begin(&shape, &id, slot.data);
    memcpy(slot.data + bkv_raw_payload(&shape), payload, RIG_BLOCK);
    free(payload);
    bkv_record_seal(slot.data);
    return bkv_store_adopt(pool->store, &slot, 0, copy, bkv_now_ms(), pin, NULL);
}

void pool_put(pool_t *pool, uint32_t number) {
    cr_assert_eq(adopt(pool, number, false, NULL), BKV_OK);
}

void pool_add(pool_t *pool, uint32_t first, uint32_t count) {
    for (uint32_t i = 0; i < count; i++) {
        pool->has[first + i] = true;
    }
}

// ---- Fetch ----

typedef struct question {
    pool_t *pool;
    const bkv_name_t *names;
    uint32_t count;
    bkv_found_t *found;
    bkv_cluster_done_t done;
    void *user;
} question_t;

static void bring(pool_t *pool, const bkv_name_t *name, bkv_found_t *found, uint32_t *room) {
    uint32_t number = number_of(name);
    found->status = bkv_store_pin(pool->store, &name->spec_id, &name->key, bkv_now_ms(), &found->pin, NULL);
    if (found->status == BKV_OK) {
        return;
    }
    if (number >= POOL_RECORDS || !pool->has[number] || pool->fails[number] != BKV_OK) {
        found->status = number < POOL_RECORDS && pool->fails[number] != BKV_OK ? pool->fails[number] : BKV_NOT_FOUND;
        return;
    }
    found->status = *room == 0 ? BKV_RESOURCE_EXHAUSTED : adopt(pool, number, true, &found->pin);
    *room -= *room > 0;
    found->status = found->status == BKV_ALREADY_EXISTS ? BKV_OK : found->status;
    if (found->status == BKV_OK && pool->vanish) {
        bkv_store_drop(pool->store, &name->spec_id, &name->key, bkv_now_ms());
    }
}

static void *answer(void *user) {
    question_t question = *(question_t *)user;
    pool_t *pool = question.pool;
    free(user);
    usleep(atomic_load(&pool->delay_us));
    uint32_t most = atomic_load(&pool->most), room = most != 0 ? most : UINT32_MAX;
    for (uint32_t i = 0; i < question.count; i++) {
        if (question.found[i].status != BKV_OK) {
            bring(pool, &question.names[i], &question.found[i], &room);
        }
    }
    question.done(question.user);
    atomic_fetch_sub(&pool->under_way, 1);
    return NULL;
}

void __wrap_bkv_cluster_fetch(bkv_cluster_t *cluster, const bkv_name_t *names, uint32_t count, uint64_t deadline_ms,
                              bkv_found_t *found, bkv_cluster_done_t done, void *user) {
    pool_t *pool = pool_of(cluster);
    if (pool == NULL) {
        __real_bkv_cluster_fetch(cluster, names, count, deadline_ms, found, done, user);
        return;
    }
    question_t *question = malloc(sizeof(*question));
    *question = (question_t){.pool = pool, .names = names, .count = count, .found = found, .done = done, .user = user};
    atomic_fetch_add(&pool->fetches, 1);
    atomic_fetch_add(&pool->asked, count);
    if (count > atomic_load(&pool->longest)) {
        atomic_store(&pool->longest, count);
    }
    atomic_fetch_add(&pool->under_way, 1);
    if (atomic_load(&pool->delay_us) == 0) {
        answer(question);
        return;
    }
    pthread_t thread;
    cr_assert_eq(pthread_create(&thread, NULL, answer, question), 0);
    pthread_detach(thread);
}

void __wrap_bkv_cluster_used(bkv_cluster_t *cluster, const bkv_name_t *name) {
    pool_t *pool = pool_of(cluster);
    if (pool == NULL) {
        __real_bkv_cluster_used(cluster, name);
        return;
    }
    atomic_fetch_add(&pool->used, 1);
    bkv_store_drop_copy(pool->store, name, bkv_now_ms());
}

// ---- Lookup, Forget ----

void __wrap_bkv_cluster_lookup(bkv_cluster_t *cluster, const bkv_name_t *names, uint32_t count, uint64_t deadline_ms,
                               bool *have, bkv_cluster_done_t done, void *user) {
    const pool_t *pool = pool_of(cluster);
    if (pool == NULL) {
        __real_bkv_cluster_lookup(cluster, names, count, deadline_ms, have, done, user);
        return;
    }
    for (uint32_t i = 0; i < count; i++) {
        uint32_t number = number_of(&names[i]);
        have[i] |= number < POOL_RECORDS && pool->has[number];
    }
    done(user);
}

void __wrap_bkv_cluster_forget(bkv_cluster_t *cluster, const bkv_name_t *names, uint32_t count, uint64_t deadline_ms, bool *had,
                               bkv_cluster_done_t done, void *user) {
    pool_t *pool = pool_of(cluster);
    if (pool == NULL) {
        __real_bkv_cluster_forget(cluster, names, count, deadline_ms, had, done, user);
        return;
    }
    for (uint32_t i = 0; i < count; i++) {
        uint32_t number = number_of(&names[i]);
        had[i] = bkv_store_drop(pool->store, &names[i].spec_id, &names[i].key, bkv_now_ms());
        had[i] |= number < POOL_RECORDS && pool->has[number];
        if (number < POOL_RECORDS) {
            pool->has[number] = false;
        }
    }
    done(user);
}

// ---- the whole ----

void pool_open(pool_t *pool, rig_t *rig, bool sharing) {
    *pool = (pool_t){.store = NULL};
    present = pool;
    peer_daemon_init(&rig->daemon, &rig->config);
    pool->store = rig->daemon.store;
    rig->config.cluster = (bkv_cluster_t *)pool;
    rig->config.max_batch = 256;
    if (sharing) {
        rig->config.transports = sharing_create(rig->config.pipeline);
    }
    rig_start(rig);
    rig_open_spec(rig, RIG_TOKENS);
    memcpy(pool->spec_id, rig->spec_id, sizeof(pool->spec_id));
}

void pool_close(pool_t *pool, rig_t *rig) {
    rig_close(rig); // waits for every call
    for (int i = 0; i < 500 && atomic_load(&pool->under_way) > 0; i++) {
        usleep(1000); // an answer that is just returning
    }
    cr_assert_eq(atomic_load(&pool->under_way), 0);
}
