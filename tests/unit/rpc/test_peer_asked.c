// Both ends of the Peer service: a daemon's peers (daemon/cluster/peer/) ask a real server.
#include "member.h"

#include "daemon/cluster/peer/peers.h"
#include "daemon/observe/clock.h"
#include "kernels/seal.h"

#include <criterion/criterion.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define COUNT 200
#define SOON  20000

typedef struct both {
    member_t member;
    bkv_store_t *store; // the asker's
    bkv_peers_t *peers;
    bkv_peer_t *peer;
    bkv_name_t names[COUNT];
    // Of the question that is under way.
    sem_t over;
    bkv_error_t error;
    uint32_t asked; // names; 0: all of them
    uint64_t bytes[COUNT];
    bool had[COUNT];
    bkv_status_t results[COUNT];
    bkv_slot_t slots[COUNT];
    uint64_t lengths[COUNT], ttls[COUNT];
} both_t;

static both_t *both_open(uint32_t max_batch) {
    both_t *both = calloc(1, sizeof(*both));
    bkv_error_t err = {0};
    member_open(&both->member);
    const bkv_store_config_t config = {.arena_bytes = (uint64_t)64 << 20, .slab_bytes = 8 << 20, .arena_fd = -1};
    cr_assert_eq(bkv_store_create(&config, bkv_now_ms(), &both->store, NULL, &err), BKV_OK, "%s", err.message);
    const bkv_peers_config_t peers = {
        .store = both->store, .timeout_ms = 5000, .max_batch = max_batch, .verbs_device = "off", .verbs_gid = -1};
    cr_assert_eq(bkv_peers_create(&peers, &both->peers, &err), BKV_OK, "%s", err.message);
    bkv_member_t member = {.place = {.id = "other", .epoch = 1, .weight = 1}, .address_count = 1};
    snprintf(member.addresses[0], sizeof(member.addresses[0]), "127.0.0.1:%d", bkv_server_port(both->member.rig.daemon.server));
    both->peer = bkv_peers_get(both->peers, &member);
    cr_assert_not_null(both->peer);
    for (uint32_t i = 0; i < COUNT; i++) {
        both->names[i] = member_name(&both->member, i);
    }
    sem_init(&both->over, 0, 0);
    return both;
}

static void both_close(both_t *both) {
    bkv_peer_release(both->peer);
    bkv_peers_destroy(both->peers);
    bkv_store_destroy(both->store); // asserts that nothing is pinned
    member_close(&both->member);
    free(both);
}

static void await(both_t *both) {
    while (sem_wait(&both->over) != 0) {
    }
    cr_assert_eq(both->error.status, BKV_OK, "%s", both->error.message);
}

// ---- questions ----

static size_t asked(const both_t *both) {
    return both->asked != 0 ? both->asked : COUNT;
}

static void on_have(void *user, const bkv_error_t *error, const uint64_t *bytes) {
    both_t *both = user;
    both->error = *error;
    if (bytes != NULL) {
        memcpy(both->bytes, bytes, asked(both) * sizeof(bytes[0]));
    }
    sem_post(&both->over);
}

static void on_forget(void *user, const bkv_error_t *error, const bool *had) {
    both_t *both = user;
    both->error = *error;
    if (had != NULL) {
        memcpy(both->had, had, asked(both) * sizeof(had[0]));
    }
    sem_post(&both->over);
}

static void on_store(void *user, const bkv_error_t *error, const bkv_status_t *results) {
    both_t *both = user;
    both->error = *error;
    if (results != NULL) {
        memcpy(both->results, results, asked(both) * sizeof(results[0]));
    }
    sem_post(&both->over);
}

static uint32_t count_have(both_t *both) {
    uint32_t count = 0;
    bkv_error_t err = {0};
    cr_assert_eq(bkv_peer_have(both->peer, both->names, COUNT, bkv_now_ms() + SOON, on_have, both, &err), BKV_OK, "%s",
                 err.message);
    await(both);
    for (uint32_t i = 0; i < COUNT; i++) {
        cr_assert(both->bytes[i] == 0 || both->bytes[i] == both->member.record_length);
        count += both->bytes[i] != 0;
    }
    return count;
}

static void *on_begin(void *user, uint32_t index, uint64_t tenant, uint64_t bytes, uint64_t ttl_ms) {
    both_t *both = user;
    both->lengths[index] = bytes;
    both->ttls[index] = ttl_ms;
    bkv_status_t status = bkv_store_reserve(both->store, tenant, bytes, bkv_now_ms(), &both->slots[index], NULL);
    return status == BKV_OK ? both->slots[index].data : NULL;
}

static void on_end(void *user, uint32_t index, const bkv_error_t *error) {
    both_t *both = user;
    both->results[index] = error->status;
    if (error->status == BKV_OK) {
        const void *record = both->slots[index].data;
        cr_assert_eq(bkv_record_verify(record, both->lengths[index], NULL), BKV_OK, "record %u", index);
        cr_assert_eq(bkv_store_adopt(both->store, &both->slots[index], both->ttls[index], true, bkv_now_ms(), NULL, NULL),
                     BKV_OK);
    }
}

static void on_done(void *user, const bkv_error_t *error) {
    both_t *both = user;
    both->error = *error;
    sem_post(&both->over);
}

static void fetch_all(both_t *both) {
    static const bkv_fetch_sink_t sink = {.begin = on_begin, .end = on_end, .done = on_done};
    bkv_error_t err = {0};
    cr_assert_eq(bkv_peer_fetch(both->peer, both->names, COUNT, bkv_now_ms() + SOON, &sink, both, NULL, &err), BKV_OK, "%s",
                 err.message);
    await(both);
}

// ---- there and back ----

Test(peer_asked, records_go_there_and_back, .timeout = 120) {
    both_t *both = both_open(64); // the server takes no more at once
    bkv_error_t err = {0};
    member_put(&both->member, 0, 150);
    cr_assert_eq(count_have(both), 150);
    fetch_all(both);
    for (uint32_t i = 0; i < COUNT; i++) {
        cr_assert_eq(both->results[i], i < 150 ? BKV_OK : BKV_NOT_FOUND, "%u: %d", i, (int)both->results[i]);
    }
    cr_assert_eq(bkv_peer_forget(both->peer, both->names, COUNT, bkv_now_ms() + SOON, on_forget, both, &err), BKV_OK);
    await(both);
    cr_assert(both->had[0] && both->had[149] && !both->had[150]);
    cr_assert_eq(count_have(both), 0);
    cr_assert_eq(bkv_peer_store(both->peer, both->names, COUNT, bkv_now_ms() + SOON, on_store, both, &err), BKV_OK);
    await(both);
    for (uint32_t i = 0; i < COUNT; i++) {
        cr_assert_eq(both->results[i], i < 150 ? BKV_OK : BKV_NOT_FOUND, "%u: %d", i, (int)both->results[i]);
    }
    cr_assert_eq(count_have(both), 150);
    both->asked = 10;
    cr_assert_eq(bkv_peer_store(both->peer, both->names, 10, bkv_now_ms() + SOON, on_store, both, &err), BKV_OK);
    await(both);
    cr_assert(both->results[0] == BKV_ALREADY_EXISTS && both->results[9] == BKV_ALREADY_EXISTS);
    bkv_peer_health_t health;
    bkv_peer_get_health(both->peer, &health);
    cr_assert(!health.suspected && health.failures == 0);
    cr_assert_eq(health.fetched_bytes, 150 * both->member.record_length);
    cr_assert_eq(health.stored_bytes, 150 * both->member.record_length);
    both_close(both);
}

// A server that ends has said so to those that still ask: that is no silence. Then nobody is there.
Test(peer_asked, a_server_that_has_gone_is_suspected, .timeout = 120) {
    both_t *both = both_open(64);
    bkv_error_t err = {0};
    member_put(&both->member, 0, 1);
    cr_assert_eq(count_have(both), 1);
    peer_daemon_stop(&both->member.rig.daemon);
    both->asked = 1;
    bkv_peer_health_t health = {0};
    for (uint32_t i = 0; i < 100 && !health.suspected; i++) {
        if (bkv_peer_have(both->peer, both->names, 1, bkv_now_ms() + SOON, on_have, both, &err) == BKV_OK) {
            while (sem_wait(&both->over) != 0) {
            }
            cr_assert_eq(both->error.status, BKV_BUSY, "%s", both->error.message);
        }
        bkv_peer_get_health(both->peer, &health);
    }
    cr_assert(health.suspected);
    both_close(both);
}
