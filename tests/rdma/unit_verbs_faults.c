// unit_verbs_faults.c - what becomes of the verbs transport when its clients, their links or its own device fail: who is
// concerned is told in time, and nobody else notices. test_unit.py runs it in a guest.
#include "unit_fixture.h"

#include "daemon/observe/clock.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MANY 6 // transfers at once

static const bkv_deliver_range_t everything = {0};

// ---- what fails, and alone ----

static void assert_lost(daemon_t *daemon, const client_t *client) {
    bkv_session_t *session;
    bkv_error_t error = {.message = ""};
    cr_assert_eq(bkv_session_find(daemon->transports, &client->session, &session, &error), BKV_FAILED_PRECONDITION);
    cr_assert_eq(strncmp(error.message, "place.session: ", 15), 0, "%s", error.message);
}

static void assert_failed(const outcome_t *outcome, const char *why) {
    cr_assert_eq(outcome->error.status, BKV_FAILED_PRECONDITION, "%d: %s", outcome->error.status, outcome->error.message);
    cr_assert_not_null(strstr(outcome->error.message, "its RDMA link has failed"), "%s", outcome->error.message);
    cr_assert_not_null(strstr(outcome->error.message, why), "%s", outcome->error.message);
}

Test(verbs, a_window_that_is_unregistered_costs_its_session_alone) {
    daemon_t daemon;
    client_t bad, good;
    outcome_t outcome;
    daemon_open(&daemon);
    client_start(&bad, &daemon);
    client_start(&good, &daemon);
    bkv_verbs_unregister(bad.region);
    bad.region = NULL;
    cr_assert_eq(put_begin(&daemon, &bad, 1, BKV_CODEC_RAW, 0, &outcome), BKV_OK);
    outcome_wait(&outcome);
    assert_failed(&outcome, "remote access error");
    assert_lost(&daemon, &bad);
    put_block(&daemon, &good, 1, BKV_CODEC_RAW);
    get_and_compare(&daemon, &good, 1, &everything);
    cr_assert_eq(daemon_sessions(&daemon), 1);
    client_close(&bad);
    client_close(&good);
    daemon_close(&daemon);
}

Test(verbs, a_client_that_is_gone_fails_all_of_its_transfers_in_time_and_may_come_again) {
    daemon_t daemon;
    client_t gone, good;
    outcome_t outcome[MANY];
    daemon_open(&daemon);
    client_start(&gone, &daemon);
    client_start(&good, &daemon);
    bkv_verbs_link_deinit(&gone.link);
    uint64_t begin = bkv_now_ms();
    for (uint32_t i = 0; i < MANY; i++) {
        cr_assert_eq(put_begin(&daemon, &gone, i + 1, BKV_CODEC_RAW, 0, &outcome[i]), BKV_OK);
    }
    put_block(&daemon, &good, 100, BKV_CODEC_RAW); // meanwhile
    for (uint32_t i = 0; i < MANY; i++) {
        outcome_wait(&outcome[i]);
        assert_failed(&outcome[i], "retry counter exceeded");
    }
    cr_log_info("%d transfers of a client that is gone had failed after %llu ms", MANY,
                (unsigned long long)(bkv_now_ms() - begin));
    cr_assert_lt(bkv_now_ms() - begin, SOON_MS);
    assert_lost(&daemon, &gone);
    client_close(&gone);
    client_start(&gone, &daemon);
    put_block(&daemon, &gone, 1, BKV_CODEC_RAW);
    client_close(&gone);
    client_close(&good);
    daemon_close(&daemon);
}

Test(verbs, a_link_that_neither_works_nor_says_so_is_given_up) {
    daemon_t daemon;
    client_t client;
    outcome_t outcome[MANY];
    daemon_open(&daemon);
    client_start(&client, &daemon);
    bkv_verbs_link_deinit(&client.link);
    for (uint32_t i = 0; i < MANY; i++) {
        cr_assert_eq(put_begin(&daemon, &client, i + 1, BKV_CODEC_RAW, 0, &outcome[i]), BKV_OK);
    }
    fixture_advance(60000); // sooner than the device's own retries end
    for (uint32_t i = 0; i < MANY; i++) {
        outcome_wait(&outcome[i]);
        cr_assert_eq(outcome[i].error.status, BKV_FAILED_PRECONDITION);
    }
    bool by_clock = strstr(outcome[0].error.message, "nothing moves") != NULL;
    cr_assert(by_clock || strstr(outcome[0].error.message, "retry counter") != NULL, "%s", outcome[0].error.message);
    cr_log_info("given up by %s", by_clock ? "the clock" : "the device");
    client_close(&client);
    daemon_close(&daemon);
}

Test(verbs, an_ended_session_finishes_what_is_under_way) {
    daemon_t daemon;
    client_t client;
    outcome_t outcome[2];
    daemon_open(&daemon);
    client_start(&client, &daemon);
    fixture_fill(client.window, 2 * BLOCK, 1);
    cr_assert_eq(put_begin(&daemon, &client, 1, BKV_CODEC_RAW, 0, &outcome[0]), BKV_OK);
    cr_assert_eq(put_begin(&daemon, &client, 2, BKV_CODEC_RAW, BLOCK, &outcome[1]), BKV_OK);
    cr_assert_eq(bkv_session_detach(daemon.transports, &client.session, NULL, NULL, NULL), BKV_OK);
    for (int i = 0; i < 2; i++) {
        outcome_wait(&outcome[i]);
        cr_assert_eq(outcome[i].error.status, BKV_OK, "%s", outcome[i].error.message);
    }
    assert_lost(&daemon, &client);
    cr_assert_eq(daemon_sessions(&daemon), 0);
    client_close(&client);
    daemon_close(&daemon);
}

Test(verbs, transfers_end_with_the_daemon) {
    daemon_t daemon;
    client_t client;
    outcome_t outcome[MANY];
    daemon_open(&daemon);
    client_start(&client, &daemon);
    bkv_verbs_link_deinit(&client.link);
    for (uint32_t i = 0; i < MANY; i++) {
        cr_assert_eq(put_begin(&daemon, &client, i + 1, BKV_CODEC_RAW, 0, &outcome[i]), BKV_OK);
    }
    uint64_t begin = bkv_now_ms();
    daemon_close(&daemon);
    cr_assert_lt(bkv_now_ms() - begin, SOON_MS);
    for (uint32_t i = 0; i < MANY; i++) {
        cr_assert_eq(outcome[i].calls, 1);
        cr_assert_eq(outcome[i].error.status, BKV_FAILED_PRECONDITION);
    }
    client_close(&client);
}

// ---- the NIC ----

static void sh(const char *command) {
    cr_assert_eq(system(command), 0, "%s", command);
}

static bool offered(const daemon_t *daemon) {
    const char *names[BKV_TRANSPORT_KINDS + 1];
    return bkv_transports_offer(daemon->transports, false, names) == 2;
}

static void wait_until_offered(const daemon_t *daemon, bool wanted) {
    uint64_t until = bkv_now_ms() + SOON_MS;
    while (offered(daemon) != wanted) {
        cr_assert_lt(bkv_now_ms(), until, "verbs is%s offered", wanted ? " not" : " still");
        usleep(10000);
    }
}

// A device of this test's own, which it may break.
static void nic_open(daemon_t *daemon, client_t *client) {
    sh("ip link add nic7 type veth peer name nic8 && ip addr add 10.77.7.1/24 dev nic7 && ip link set nic7 up && ip link set "
       "nic8 up");
    sh("rdma link add rxe7 type rxe netdev nic7");
    fixture_device("rxe7");
    daemon_open(daemon);
    client_start(client, daemon);
    put_block(daemon, client, 1, BKV_CODEC_RAW);
}

Test(verbs, a_port_that_is_down_is_not_offered_and_comes_back) {
    daemon_t daemon;
    client_t client, again;
    outcome_t outcome;
    nic_open(&daemon, &client);
    cr_assert(offered(&daemon));
    sh("ip link set nic7 down");
    wait_until_offered(&daemon, false);
    cr_assert_eq(put_begin(&daemon, &client, 2, BKV_CODEC_RAW, 0, &outcome), BKV_OK);
    outcome_wait(&outcome);
    assert_failed(&outcome, "");
    assert_lost(&daemon, &client);
    sh("ip link set nic7 up");
    wait_until_offered(&daemon, true);
    client_start(&again, &daemon);
    put_block(&daemon, &again, 3, BKV_CODEC_RAW);
    client_close(&client);
    client_close(&again);
    daemon_close(&daemon);
    sh("rdma link delete rxe7 && ip link delete nic7");
}

Test(verbs, a_device_that_is_taken_away_ends_its_sessions) {
    daemon_t daemon;
    client_t client;
    outcome_t outcome;
    nic_open(&daemon, &client);
    sh("ip link delete nic7 &"); // which waits until nobody has the device open
    wait_until_offered(&daemon, false);
    cr_assert_eq(put_begin(&daemon, &client, 2, BKV_CODEC_RAW, 0, &outcome), BKV_OK);
    outcome_wait(&outcome);
    assert_failed(&outcome, "");
    assert_lost(&daemon, &client);
    cr_assert_eq(daemon_sessions(&daemon), 0);
    client_close(&client);
    daemon_close(&daemon);
}
