// unit_verbs.c - the verbs transport on a real RDMA device, without gRPC: a store, a pipeline and the transports as in the daemon,
// and clients that are one end of a link with a window each, in the same process. test_unit.py runs it in a guest.
#include "daemon/observe/clock.h"
#include "daemon/transport/transport.h"
#include "kernels/summary.h"

#include <criterion/criterion.h>
#include <infiniband/verbs.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define ARENA    (UINT64_C(48) << 20)
#define STAGING  (UINT64_C(8) << 20)
#define WINDOW   (UINT64_C(8) << 20)
#define BLOCK    (UINT64_C(2) << 20) // a payload: 256 tokens; two work requests
#define SESSIONS 3
#define MANY     6 // transfers at once
#define SOON_MS  3000

// ---- daemon and clients ----

typedef struct daemon {
    bkv_store_t *store;
    bkv_pipeline_t *pipeline;
    bkv_transports_t *transports;
    bkv_model_t model;
} daemon_t;

static _Atomic uint64_t skipped_ms; // by which the daemon's clock is ahead
static const char *device_name = "rxe0";

static uint64_t clock_ms(void) {
    return bkv_now_ms() + atomic_load(&skipped_ms);
}

static bkv_transports_config_t transports_config(const daemon_t *daemon) {
    return (bkv_transports_config_t){.pipeline = daemon->pipeline,
                                     .store = daemon->store,
                                     .max_sessions = 16,
                                     .idle_ms = 60000,
                                     .verbs_device = device_name,
                                     .verbs_gid = -1,
                                     .verbs_sessions = SESSIONS,
                                     .now_ms = clock_ms};
}

static void daemon_open(daemon_t *daemon) {
    bkv_error_t error = {.message = ""};
    const bkv_store_config_t store = {.arena_bytes = ARENA, .slab_bytes = 4 << 20, .arena_fd = -1};
    cr_assert_eq(bkv_store_create(&store, clock_ms(), &daemon->store, NULL, &error), BKV_OK, "%s", error.message);
    const bkv_pipeline_config_t pipeline = {.store = daemon->store,
                                            .backend = bkv_backend_get("ref"),
                                            .compute_threads = 2,
                                            .max_jobs = 64,
                                            .staging_bytes = STAGING,
                                            .max_block_bytes = BLOCK,
                                            .max_specs = 4,
                                            .max_batch = 64,
                                            .now_ms = clock_ms};
    cr_assert_eq(bkv_pipeline_create(&pipeline, &daemon->pipeline, &error), BKV_OK, "%s", error.message);
    daemon->model = (bkv_model_t){
        .name = "test",
        .shape = {.layers = 4, .heads = 4, .tokens = 256, .key_dim = 64, .value_dim = 64, .dtype = BKV_FP32},
        .params = {.codec = BKV_CODEC_RAW, .sink = 4, .seed = 11},
    };
    cr_assert_eq(bkv_model_complete(&daemon->model, &error), BKV_OK, "%s", error.message);
    cr_assert_eq(bkv_model_table_add(bkv_pipeline_models(daemon->pipeline), &daemon->model, &error), BKV_OK);
    const bkv_transports_config_t config = transports_config(daemon);
    cr_assert_eq(bkv_transports_create(&config, &daemon->transports, &error), BKV_OK, "%s", error.message);
}

// Nothing is held any more.
static void daemon_close(daemon_t *daemon) {
    bkv_store_metrics_t store;
    bkv_pipeline_metrics_t pipeline;
    bkv_transports_destroy(daemon->transports);
    cr_assert(bkv_pipeline_wait_idle(daemon->pipeline, SOON_MS));
    bkv_store_metrics(daemon->store, &store);
    bkv_pipeline_metrics(daemon->pipeline, &pipeline);
    cr_assert_eq(store.pinned, 0);
    cr_assert_eq(pipeline.staging_bytes, 0);
    bkv_pipeline_destroy(daemon->pipeline);
    bkv_store_destroy(daemon->store);
}

static uint32_t sessions(const daemon_t *daemon) {
    bkv_transport_metrics_t metrics;
    bkv_transports_metrics(daemon->transports, &metrics);
    return (uint32_t)metrics.sessions;
}

typedef struct client {
    bkv_verbs_device_t *device;
    uint8_t *window;
    struct ibv_mr *region;
    bkv_verbs_link_t link;
    bkv_verbs_end_t end;
    bkv_session_id_t session;
} client_t;

static void client_open(client_t *client) {
    bkv_error_t error = {.message = ""};
    bkv_verbs_choice_t choice;
    cr_assert_eq(bkv_verbs_choose(device_name, &choice, &error), BKV_OK);
    cr_assert_eq(bkv_verbs_open(&choice, &client->device, &error), BKV_OK, "%s", error.message);
    client->window = aligned_alloc(4096, WINDOW);
    cr_assert_eq(bkv_verbs_register(client->device, client->window, WINDOW, true, &client->region, &error), BKV_OK, "%s",
                 error.message);
    cr_assert_eq(bkv_verbs_link_init(&client->link, client->device, NULL, 1, true, &error), BKV_OK, "%s", error.message);
    bkv_verbs_link_describe(&client->link, client->region, &client->end);
}

static bkv_status_t client_attach(client_t *client, daemon_t *daemon, bkv_error_t *error) {
    const bkv_attach_args_t args = {.kind = BKV_TRANSPORT_VERBS, .verbs = client->end};
    bkv_attach_result_t result;
    bkv_status_t status = bkv_session_attach(daemon->transports, &args, &result, error);
    if (status == BKV_OK) {
        client->session = result.id;
        cr_assert_eq(result.bytes, client->end.bytes);
        status = bkv_verbs_link_connect(&client->link, &result.verbs, error);
    }
    return status;
}

static void client_start(client_t *client, daemon_t *daemon) {
    bkv_error_t error = {.message = ""};
    client_open(client);
    cr_assert_eq(client_attach(client, daemon, &error), BKV_OK, "%s", error.message);
}

static void client_close(client_t *client) {
    bkv_verbs_link_deinit(&client->link);
    bkv_verbs_unregister(client->region);
    bkv_verbs_close(client->device);
    free(client->window);
}

// ---- transfers ----

typedef struct outcome {
    sem_t called;
    unsigned calls;
    bkv_error_t error;
    bkv_ingest_result_t put;
} outcome_t;

static void outcome_init(outcome_t *outcome) {
    *outcome = (outcome_t){.calls = 0};
    sem_init(&outcome->called, 0, 0);
}

static void on_put(void *user, const bkv_error_t *error, const bkv_ingest_result_t *result) {
    outcome_t *outcome = user;
    outcome->calls++;
    outcome->error = *error;
    outcome->put = *result;
    sem_post(&outcome->called);
}

static void on_delivered(void *user, const bkv_error_t *error) {
    on_put(user, error, &(bkv_ingest_result_t){0});
}

static void wait_for(outcome_t *outcome) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += 20;
    cr_assert_eq(sem_timedwait(&outcome->called, &until), 0, "never called back");
    cr_assert_eq(outcome->calls, 1);
}

static bkv_key_t key_of(uint32_t number) {
    bkv_key_t key = {{0}};
    memcpy(key.bytes, &number, sizeof(number));
    return key;
}

// Numbers that are finite and all different from block to block.
static void fill(uint8_t *to, uint64_t bytes, uint32_t seed) {
    float *values = (float *)(void *)to;
    for (uint64_t i = 0; i < bytes / sizeof(float); i++) {
        values[i] = (float)(i * 7 % 4093) + (float)seed * 0.25f;
    }
}

static bkv_status_t put_start(daemon_t *daemon, const client_t *client, uint32_t key, bkv_codec_t codec, uint64_t offset,
                              outcome_t *outcome) {
    const bkv_ingest_args_t args = {
        .spec_id = daemon->model.id, .key = key_of(key), .tokens = 256, .payload_bytes = BLOCK, .codec = codec, .rate = 16};
    const bkv_place_t place = {.offset = offset, .bytes = BLOCK};
    bkv_session_t *session;
    bkv_ingest_t *ingest;
    outcome_init(outcome);
    bkv_status_t status = bkv_session_find(daemon->transports, &client->session, &session, &outcome->error);
    if (status != BKV_OK) {
        return status;
    }
    status = bkv_ingest_begin(daemon->pipeline, &args, clock_ms(), &ingest, &outcome->error);
    if (status == BKV_OK) {
        status = bkv_session_fetch(session, &place, ingest, on_put, outcome, &outcome->error);
        if (status != BKV_OK) {
            bkv_ingest_abort(ingest);
        }
    }
    bkv_session_release(session);
    return status;
}

static void put(daemon_t *daemon, client_t *client, uint32_t key, bkv_codec_t codec) {
    outcome_t outcome;
    fill(client->window, BLOCK, key);
    cr_assert_eq(put_start(daemon, client, key, codec, 0, &outcome), BKV_OK, "%s", outcome.error.message);
    wait_for(&outcome);
    cr_assert_eq(outcome.error.status, BKV_OK, "%s", outcome.error.message);
}

static bkv_status_t get_start(daemon_t *daemon, const client_t *client, uint32_t key, const bkv_deliver_range_t *range,
                              uint64_t offset, bkv_delivery_t *delivery, outcome_t *outcome) {
    const bkv_key_t name = key_of(key);
    bkv_session_t *session;
    outcome_init(outcome);
    cr_assert_eq(bkv_session_find(daemon->transports, &client->session, &session, &outcome->error), BKV_OK, "%s",
                 outcome->error.message);
    bkv_status_t status =
        bkv_deliver_unverified(daemon->pipeline, &daemon->model.id, &name, range, clock_ms(), delivery, &outcome->error);
    if (status == BKV_OK) {
        const bkv_place_t place = {.offset = offset, .bytes = delivery->length};
        status = bkv_session_deliver(session, &place, delivery, on_delivered, outcome, &outcome->error);
        if (status != BKV_OK) {
            bkv_delivery_release(daemon->pipeline, delivery);
        }
    }
    bkv_session_release(session);
    return status;
}

static void get_and_compare(daemon_t *daemon, client_t *client, uint32_t key, const bkv_deliver_range_t *range) {
    const uint64_t offset = 5 << 20;
    bkv_delivery_t delivery = {0};
    outcome_t outcome;
    memset(client->window + offset, 0xee, WINDOW - offset);
    cr_assert_eq(get_start(daemon, client, key, range, offset, &delivery, &outcome), BKV_OK, "%s", outcome.error.message);
    wait_for(&outcome);
    cr_assert_eq(outcome.error.status, BKV_OK, "%s", outcome.error.message);
    cr_assert_eq(memcmp(client->window + offset, delivery.data, delivery.length), 0);
    cr_assert_eq(client->window[offset + delivery.length], 0xee, "more was written than the record");
    bkv_delivery_release(daemon->pipeline, &delivery);
}

static const bkv_deliver_range_t everything = {0};

// ---- what works ----

Test(verbs, payloads_are_read_and_records_written) {
    daemon_t daemon;
    client_t client;
    daemon_open(&daemon);
    client_start(&client, &daemon);
    put(&daemon, &client, 1, BKV_CODEC_RAW);     // straight into the arena
    put(&daemon, &client, 2, BKV_CODEC_BALANCE); // into staging memory
    get_and_compare(&daemon, &client, 1, &everything);
    get_and_compare(&daemon, &client, 2, &everything);
    get_and_compare(&daemon, &client, 1, &(bkv_deliver_range_t){.first_layer = 1, .layers = 2, .first_head = 1, .heads = 1});
    const bkv_key_t name = key_of(1);
    bkv_delivery_t delivery;
    cr_assert_eq(bkv_deliver(daemon.pipeline, &daemon.model.id, &name, &everything, clock_ms(), &delivery, NULL), BKV_OK);
    fill(client.window, BLOCK, 1);
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
    put(&daemon, &client, 1, BKV_CODEC_RAW);
    bkv_verbs_link_deinit(&client.link); // so that a READ would fail
    cr_assert_eq(put_start(&daemon, &client, 1, BKV_CODEC_RAW, 0, &outcome), BKV_OK, "%s", outcome.error.message);
    wait_for(&outcome);
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
        fill(client[i].window, BLOCK, i + 1);
        fill(client[i].window + BLOCK, BLOCK, i + 11);
    }
    for (uint32_t i = 0; i < SESSIONS; i++) {
        for (uint32_t j = 0; j < 2; j++) {
            cr_assert_eq(put_start(&daemon, &client[i], i + 1 + 10 * j, BKV_CODEC_RAW, j * BLOCK, &outcome[i][j]), BKV_OK);
        }
    }
    for (uint32_t i = 0; i < SESSIONS; i++) {
        wait_for(&outcome[i][0]);
        wait_for(&outcome[i][1]);
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
    const bkv_key_t name = key_of(1);
    daemon_open(&daemon);
    client_start(&client, &daemon);
    put(&daemon, &client, 1, BKV_CODEC_RAW);
    cr_assert_eq(bkv_deliver(daemon.pipeline, &daemon.model.id, &name, &everything, clock_ms(), &delivery, NULL), BKV_OK);
    ((uint8_t *)(uintptr_t)delivery.data)[delivery.length - 1] ^= 1; // as a bad memory would
    bkv_delivery_release(daemon.pipeline, &delivery);
    memset(client.window, 0xee, WINDOW);
    cr_assert_eq(get_start(&daemon, &client, 1, &everything, 0, &delivery, &outcome), BKV_OK);
    wait_for(&outcome);
    cr_assert_eq(outcome.error.status, BKV_DATA_LOSS, "%s", outcome.error.message);
    cr_assert_eq(client.window[0], 0xee);
    bkv_delivery_release(daemon.pipeline, &delivery);
    cr_assert_not(bkv_store_contains(daemon.store, &daemon.model.id, &name, clock_ms()));
    client_close(&client);
    daemon_close(&daemon);
}

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
    cr_assert_eq(put_start(&daemon, &bad, 1, BKV_CODEC_RAW, 0, &outcome), BKV_OK);
    wait_for(&outcome);
    assert_failed(&outcome, "remote access error");
    assert_lost(&daemon, &bad);
    put(&daemon, &good, 1, BKV_CODEC_RAW);
    get_and_compare(&daemon, &good, 1, &everything);
    cr_assert_eq(sessions(&daemon), 1);
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
        cr_assert_eq(put_start(&daemon, &gone, i + 1, BKV_CODEC_RAW, 0, &outcome[i]), BKV_OK);
    }
    put(&daemon, &good, 100, BKV_CODEC_RAW); // meanwhile
    for (uint32_t i = 0; i < MANY; i++) {
        wait_for(&outcome[i]);
        assert_failed(&outcome[i], "retry counter exceeded");
    }
    cr_log_info("%d transfers of a client that is gone had failed after %llu ms", MANY,
                (unsigned long long)(bkv_now_ms() - begin));
    cr_assert_lt(bkv_now_ms() - begin, SOON_MS);
    assert_lost(&daemon, &gone);
    client_close(&gone);
    client_start(&gone, &daemon);
    put(&daemon, &gone, 1, BKV_CODEC_RAW);
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
        cr_assert_eq(put_start(&daemon, &client, i + 1, BKV_CODEC_RAW, 0, &outcome[i]), BKV_OK);
    }
    atomic_fetch_add(&skipped_ms, 60000); // sooner than the device's own retries end
    for (uint32_t i = 0; i < MANY; i++) {
        wait_for(&outcome[i]);
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
    fill(client.window, 2 * BLOCK, 1);
    cr_assert_eq(put_start(&daemon, &client, 1, BKV_CODEC_RAW, 0, &outcome[0]), BKV_OK);
    cr_assert_eq(put_start(&daemon, &client, 2, BKV_CODEC_RAW, BLOCK, &outcome[1]), BKV_OK);
    cr_assert_eq(bkv_session_detach(daemon.transports, &client.session, NULL), BKV_OK);
    for (int i = 0; i < 2; i++) {
        wait_for(&outcome[i]);
        cr_assert_eq(outcome[i].error.status, BKV_OK, "%s", outcome[i].error.message);
    }
    assert_lost(&daemon, &client);
    cr_assert_eq(sessions(&daemon), 0);
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
        cr_assert_eq(put_start(&daemon, &client, i + 1, BKV_CODEC_RAW, 0, &outcome[i]), BKV_OK);
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
    device_name = "rxe7";
    daemon_open(daemon);
    client_start(client, daemon);
    put(daemon, client, 1, BKV_CODEC_RAW);
}

Test(verbs, a_port_that_is_down_is_not_offered_and_comes_back) {
    daemon_t daemon;
    client_t client, again;
    outcome_t outcome;
    nic_open(&daemon, &client);
    cr_assert(offered(&daemon));
    sh("ip link set nic7 down");
    wait_until_offered(&daemon, false);
    cr_assert_eq(put_start(&daemon, &client, 2, BKV_CODEC_RAW, 0, &outcome), BKV_OK);
    wait_for(&outcome);
    assert_failed(&outcome, "");
    assert_lost(&daemon, &client);
    sh("ip link set nic7 up");
    wait_until_offered(&daemon, true);
    client_start(&again, &daemon);
    put(&daemon, &again, 3, BKV_CODEC_RAW);
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
    cr_assert_eq(put_start(&daemon, &client, 2, BKV_CODEC_RAW, 0, &outcome), BKV_OK);
    wait_for(&outcome);
    assert_failed(&outcome, "");
    assert_lost(&daemon, &client);
    cr_assert_eq(sessions(&daemon), 0);
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
    cr_assert_eq(bkv_session_detach(daemon.transports, &client[0].session, NULL), BKV_OK);
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
    bkv_transports_config_t config = transports_config(&daemon);
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
