// Records given to another member.
#include "relay.h"
#include "world.h"

#include "daemon/observe/clock.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

#define SOON 5000

static bkv_status_t result_of(uint32_t number) {
    return number % 7 == 6 ? BKV_DATA_LOSS : number % 3 == 2 ? BKV_ALREADY_EXISTS : BKV_OK;
}

static bool nothing_is_pinned(void *store) {
    return store_pinned(store) == 0;
}

Test(peers_store, records_arrive_whole_and_each_has_a_result, .timeout = 60) {
    static const uint64_t lengths[] = {160, 64 << 10, (1u << 20) + 32, (1u << 20) + (65u << 10), (3u << 20) + 16};
    for (size_t i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++) {
        world_t world;
        asking_t asking;
        world_init(&world, 0);
        impostor_t *impostor = impostor_start(world_script, &world);
        asking_open(&asking, impostor_port(impostor), SOON, 0);
        uint64_t taken = 0;
        for (uint32_t n = 0; n < 8; n++) {
            record_put(asking.store, n, lengths[i], n == 7 ? 100000 : 0);
            taken += result_of(n) == BKV_OK;
        }
        const told_t *told = ask_store(&asking, 0, 8, SOON);
        cr_assert_eq(told->error.status, BKV_OK, "%s", told->error.message);
        for (uint32_t n = 0; n < 8; n++) {
            cr_assert_eq(told->results[n], result_of(n), "%u: %d", n, (int)told->results[n]);
        }
        intake_count_t taken_in = world_taken(&world);
        cr_assert(!taken_in.wrong && taken_in.records == 8 && taken_in.bytes == 8 * lengths[i]);
        cr_assert(taken_in.last_ttl_ms > 0 && taken_in.last_ttl_ms <= 100000, "what is left of the last one's time");
        cr_assert(becomes(nothing_is_pinned, asking.store, SOON));
        bkv_peers_metrics_t metrics;
        bkv_peers_metrics(asking.peers, &metrics);
        cr_assert(metrics.peer_stored_total == taken && metrics.peer_stored_bytes_total == taken * lengths[i]);
        asking_close(&asking);
        impostor_stop(impostor);
    }
}

Test(peers_store, what_has_vanished_is_not_sent, .timeout = 60) {
    world_t world;
    asking_t asking;
    world_init(&world, 0);
    impostor_t *impostor = impostor_start(world_script, &world);
    asking_open(&asking, impostor_port(impostor), SOON, 4);
    record_put(asking.store, 1, 1024, 0);
    record_put(asking.store, 6, 1024, 0);
    record_put(asking.store, 15, 1024, 0);
    const told_t *told = ask_store(&asking, 0, 16, SOON);
    cr_assert_eq(told->error.status, BKV_OK, "%s", told->error.message);
    for (uint32_t n = 0; n < 16; n++) {
        bool there = n == 1 || n == 6 || n == 15;
        cr_assert_eq(told->results[n], there ? result_of(n) : BKV_NOT_FOUND, "%u: %d", n, (int)told->results[n]);
    }
    cr_assert(!world_taken(&world).wrong && world_taken(&world).records == 3);
    cr_assert_eq(atomic_load(&world.stores), 3, "a part of which nothing is left is not sent");
    told = ask_store(&asking, 100, 16, SOON);
    cr_assert(told->error.status == BKV_OK && told->results[0] == BKV_NOT_FOUND && told->results[15] == BKV_NOT_FOUND);
    cr_assert_eq(atomic_load(&world.stores), 3);
    asking_close(&asking);
    impostor_stop(impostor);
}

Test(peers_store, many_go_in_parts, .timeout = 120) {
    world_t world;
    asking_t asking;
    world_init(&world, 0);
    impostor_t *impostor = impostor_start(world_script, &world);
    asking_open(&asking, impostor_port(impostor), SOON, 1000);
    for (uint32_t n = 0; n < 4096; n++) {
        record_put(asking.store, n, 160, 0);
    }
    const told_t *told = ask_store(&asking, 0, 4096, 6 * SOON);
    cr_assert_eq(told->error.status, BKV_OK, "%s", told->error.message);
    for (uint32_t n = 0; n < 4096; n++) {
        cr_assert_eq(told->results[n], result_of(n), "%u", n);
    }
    cr_assert(!world_taken(&world).wrong && world_taken(&world).records == 4096);
    cr_assert_eq(atomic_load(&world.stores), 5);
    asking_close(&asking);
    impostor_stop(impostor);
}

// A peer that is slow to read holds the sender up, which then has few records pinned; and it is not silent.
Test(peers_store, slow_readers_are_waited_for, .timeout = 60) {
    world_t world;
    asking_t asking;
    world_init(&world, 0);
    world.read_delay_ms = 40;
    impostor_t *impostor = impostor_start(world_script, &world);
    asking_open(&asking, impostor_port(impostor), 400, 0);
    for (uint32_t n = 0; n < 30; n++) {
        record_put(asking.store, n, 1 << 20, 0);
    }
    const told_t *told = ask_store(&asking, 0, 30, UINT32_MAX);
    cr_assert_eq(told->error.status, BKV_OK, "%s", told->error.message);
    cr_assert(told->took_ms >= 30 * 40 && !world_taken(&world).wrong && world_taken(&world).records == 30);
    asking_close(&asking);
    impostor_stop(impostor);
}

// Answers before all has been said: the rest is not sent, and the answer is none.
static void answer_early(impostor_call_t *call, void *user) {
    free(impostor_read(call, &(size_t){0}));
    if (*(bool *)user) {
        impostor_write(call, "", 0);
        impostor_end(call, GRPC_STATUS_OK, "");
    } else {
        impostor_end(call, GRPC_STATUS_PERMISSION_DENIED, "not you");
    }
}

Test(peers_store, answers_may_come_early, .timeout = 60) {
    for (int well = 0; well < 2; well++) {
        asking_t asking;
        bool ok = well != 0;
        impostor_t *impostor = impostor_start(answer_early, &ok);
        asking_open(&asking, impostor_port(impostor), SOON, 0);
        for (uint32_t n = 0; n < 40; n++) {
            record_put(asking.store, n, 2 << 20, 0);
        }
        const told_t *told = ask_store(&asking, 0, 40, 2 * SOON);
        cr_assert_eq(told->error.status, well ? BKV_INTERNAL : BKV_PERMISSION_DENIED, "%s", told->error.message);
        cr_assert(becomes_suspected(&asking, false, 0));
        asking_close(&asking);
        impostor_stop(impostor);
    }
}

// ---- a peer that stands still, as one that has been stopped ----

Test(peers_store, a_peer_that_stands_still_is_given_up, .timeout = 120) {
    world_t world;
    asking_t asking;
    world_init(&world, 0);
    impostor_t *impostor = impostor_start(world_script, &world);
    relay_t *relay = relay_start(impostor_port(impostor));
    asking_open(&asking, relay_port(relay), ASKING_TIMEOUT, 0);
    for (uint32_t n = 0; n < 40; n++) {
        record_put(asking.store, n, 2 << 20, 0);
    }
    cr_assert_eq(ask_have(&asking, 0, 1, SOON)->error.status, BKV_OK);
    relay_freeze(relay, true);
    const told_t *told = ask_store(&asking, 0, 40, UINT32_MAX);
    cr_assert_eq(told->error.status, BKV_DEADLINE_EXCEEDED, "%s", told->error.message);
    cr_assert(told->took_ms < 2 * SOON, "%llu", (unsigned long long)told->took_ms);
    cr_assert(becomes_suspected(&asking, true, 0));
    relay_freeze(relay, false);
    cr_assert(becomes_suspected(&asking, false, 2 * SOON));
    cr_assert(becomes(nothing_is_pinned, asking.store, 2 * SOON));
    told = ask_store(&asking, 0, 40, UINT32_MAX);
    cr_assert_eq(told->error.status, BKV_OK, "%s", told->error.message);
    asking_close(&asking);
    relay_stop(relay);
    impostor_stop(impostor);
}

// The end comes while gRPC has records half-way in a socket that nobody reads. It lets go of them when the connection is given up,
// and until then the store must not go away.
Test(peers_store, the_end_waits_for_what_is_half_way_in_a_socket, .timeout = 120) {
    world_t world;
    asking_t asking;
    world_init(&world, 0);
    impostor_t *impostor = impostor_start(world_script, &world);
    relay_t *relay = relay_start(impostor_port(impostor));
    asking_open(&asking, relay_port(relay), ASKING_TIMEOUT, 0);
    for (uint32_t n = 0; n < 40; n++) {
        record_put(asking.store, n, 2 << 20, 0);
    }
    cr_assert_eq(ask_have(&asking, 0, 1, SOON)->error.status, BKV_OK);
    relay_freeze(relay, true);
    cr_assert_eq(ask_store(&asking, 0, 40, UINT32_MAX)->error.status, BKV_DEADLINE_EXCEEDED);
    uint64_t start_ms = bkv_now_ms();
    asking_close(&asking); // asserts that nothing is pinned
    cr_assert(bkv_now_ms() - start_ms < 4 * SOON, "%llu ms", (unsigned long long)(bkv_now_ms() - start_ms));
    relay_freeze(relay, false);
    relay_stop(relay);
    impostor_stop(impostor);
}
