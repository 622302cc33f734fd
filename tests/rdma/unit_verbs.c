// unit_verbs.c - what the verbs transport does for clients that do as they should, and whom it refuses, on a real RDMA device.
// test_unit.py runs it in a guest.
#include "unit_fixture.h"

#include <criterion/criterion.h>
#include <string.h>

static const bkv_deliver_range_t everything = {0};

// ---- what works ----

Test(verbs, payloads_are_read_and_records_written) {
    daemon_t daemon;
    client_t client;
    daemon_open(&daemon);
    client_start(&client, &daemon);
    put_block(&daemon, &client, 1, BKV_CODEC_RAW);     // straight into the arena
    put_block(&daemon, &client, 2, BKV_CODEC_BALANCE); // into staging memory
    get_and_compare(&daemon, &client, 1, &everything);
    get_and_compare(&daemon, &client, 2, &everything);
    get_and_compare(&daemon, &client, 1, &(bkv_deliver_range_t){.first_layer = 1, .layers = 2, .first_head = 1, .heads = 1});
    const bkv_key_t name = fixture_key(1);
    bkv_delivery_t delivery;
    cr_assert_eq(bkv_deliver(daemon.pipeline, &daemon.model.id, &name, &everything, fixture_now(), &delivery, NULL), BKV_OK);
    fixture_fill(client.window, BLOCK, 1);
    cr_assert_eq(memcmp(delivery.data + delivery.length - BLOCK, client.window, BLOCK), 0,
                 "a raw record ends with its payload");
    bkv_delivery_release(daemon.pipeline, &delivery);
    client_close(&client);
    daemon_close(&daemon);
}

Test(verbs, a_resident_key_is_not_read_again) {
    daemon_t daemon;
    client_t client;
    outcome_t outcome;
    daemon_open(&daemon);
    client_start(&client, &daemon);
    put_block(&daemon, &client, 1, BKV_CODEC_RAW);
    bkv_verbs_link_deinit(&client.link); // so that a READ would fail
    cr_assert_eq(put_begin(&daemon, &client, 1, BKV_CODEC_RAW, 0, &outcome), BKV_OK, "%s", outcome.error.message);
    outcome_wait(&outcome);
    cr_assert_eq(outcome.error.status, BKV_OK, "%s", outcome.error.message);
    cr_assert(outcome.put.duplicate);
    client_close(&client);
    daemon_close(&daemon);
}

Test(verbs, many_transfers_of_several_clients_at_once) {
    daemon_t daemon;
    client_t client[SESSIONS];
    outcome_t outcome[SESSIONS][2];
    daemon_open(&daemon);
    for (uint32_t i = 0; i < SESSIONS; i++) {
        client_start(&client[i], &daemon);
        fixture_fill(client[i].window, BLOCK, i + 1);
        fixture_fill(client[i].window + BLOCK, BLOCK, i + 11);
    }
    for (uint32_t i = 0; i < SESSIONS; i++) {
        for (uint32_t j = 0; j < 2; j++) {
            cr_assert_eq(put_begin(&daemon, &client[i], i + 1 + 10 * j, BKV_CODEC_RAW, j * BLOCK, &outcome[i][j]), BKV_OK);
        }
    }
    for (uint32_t i = 0; i < SESSIONS; i++) {
        outcome_wait(&outcome[i][0]);
        outcome_wait(&outcome[i][1]);
        cr_assert_eq(outcome[i][0].error.status, BKV_OK, "%s", outcome[i][0].error.message);
        cr_assert_eq(outcome[i][1].error.status, BKV_OK, "%s", outcome[i][1].error.message);
        get_and_compare(&daemon, &client[i], i + 11, &everything);
        client_close(&client[i]);
    }
    daemon_close(&daemon);
}

Test(verbs, a_damaged_record_is_not_written) {
    daemon_t daemon;
    client_t client;
    bkv_delivery_t delivery = {0};
    outcome_t outcome;
    const bkv_key_t name = fixture_key(1);
    daemon_open(&daemon);
    client_start(&client, &daemon);
    put_block(&daemon, &client, 1, BKV_CODEC_RAW);
    cr_assert_eq(bkv_deliver(daemon.pipeline, &daemon.model.id, &name, &everything, fixture_now(), &delivery, NULL), BKV_OK);
    ((uint8_t *)(uintptr_t)delivery.data)[delivery.length - 1] ^= 1; // as a bad memory would
    bkv_delivery_release(daemon.pipeline, &delivery);
    memset(client.window, 0xee, WINDOW);
    cr_assert_eq(get_begin(&daemon, &client, 1, &everything, 0, &delivery, &outcome), BKV_OK);
    outcome_wait(&outcome);
    cr_assert_eq(outcome.error.status, BKV_DATA_LOSS, "%s", outcome.error.message);
    cr_assert_eq(client.window[0], 0xee);
    bkv_delivery_release(daemon.pipeline, &delivery);
    cr_assert_not(bkv_store_contains(daemon.store, &daemon.model.id, &name, fixture_now()));
    client_close(&client);
    daemon_close(&daemon);
}

// ---- attach ----

Test(verbs, only_so_many_sessions_and_no_nonsense) {
    daemon_t daemon;
    client_t client[SESSIONS], extra;
    bkv_error_t error = {.message = ""};
    daemon_open(&daemon);
    for (int i = 0; i < SESSIONS; i++) {
        client_start(&client[i], &daemon);
    }
    client_open(&extra);
    cr_assert_eq(client_attach(&extra, &daemon, &error), BKV_RESOURCE_EXHAUSTED);
    cr_assert_not_null(strstr(error.message, "transport.verbs_sessions"), "%s", error.message);
    cr_assert_eq(bkv_session_detach(daemon.transports, &client[0].session, NULL, NULL, NULL), BKV_OK);
    const bkv_verbs_end_t sound = extra.end;
    extra.end.bytes = 0;
    cr_assert_eq(client_attach(&extra, &daemon, &error), BKV_INVALID_ARGUMENT);
    cr_assert_eq(strncmp(error.message, "verbs.bytes: ", 13), 0, "%s", error.message);
    extra.end = sound;
    extra.end.reads = 0;
    cr_assert_eq(client_attach(&extra, &daemon, &error), BKV_INVALID_ARGUMENT);
    cr_assert_eq(strncmp(error.message, "verbs.reads: ", 13), 0, "%s", error.message);
    extra.end = sound;
    extra.end.queue_pair = 0;
    cr_assert_eq(client_attach(&extra, &daemon, &error), BKV_INVALID_ARGUMENT);
    cr_assert_eq(strncmp(error.message, "verbs.queue_pair: ", 18), 0, "%s", error.message);
    extra.end = sound;
    cr_assert_eq(client_attach(&extra, &daemon, &error), BKV_OK, "%s", error.message);
    client_close(&extra);
    for (int i = 0; i < SESSIONS; i++) {
        client_close(&client[i]);
    }
    daemon_close(&daemon);
}

Test(verbs, a_device_asked_for_by_name_must_be_there) {
    daemon_t daemon;
    bkv_transports_t *transports;
    bkv_error_t error = {.message = ""};
    const char *names[BKV_TRANSPORT_KINDS + 1];
    daemon_open(&daemon);
    cr_assert_eq(bkv_transports_offer(daemon.transports, false, names), 2);
    cr_assert_str_eq(names[0], "verbs");
    bkv_transports_config_t config = fixture_config(&daemon);
    config.verbs_device = "rxe9";
    cr_assert_eq(bkv_transports_create(&config, &transports, &error), BKV_FAILED_PRECONDITION);
    cr_assert_not_null(strstr(error.message, "transport.verbs: no RDMA device is to be had: there is none named rxe9"), "%s",
                       error.message);
    config.verbs_device = "off";
    cr_assert_eq(bkv_transports_create(&config, &transports, &error), BKV_OK, "%s", error.message);
    cr_assert_eq(bkv_transports_offer(transports, false, names), 1);
    bkv_transports_destroy(transports);
    daemon_close(&daemon);
}
