// unit_fixture.c - see unit_fixture.h.
#include "unit_fixture.h"

#include "daemon/observe/clock.h"

#include <criterion/criterion.h>
#include <infiniband/verbs.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#define ARENA   (UINT64_C(48) << 20)
#define STAGING (UINT64_C(8) << 20)

// ---- daemon and clients ----

static _Atomic uint64_t ahead_ms;
static const char *device_name = "rxe0";

void fixture_device(const char *name) {
    device_name = name;
}

void fixture_advance(uint64_t ms) {
    atomic_fetch_add(&ahead_ms, ms);
}

uint64_t fixture_now(void) {
    return bkv_now_ms() + atomic_load(&ahead_ms);
}

bkv_transports_config_t fixture_config(const daemon_t *daemon) {
    return (bkv_transports_config_t){.pipeline = daemon->pipeline,
                                     .store = daemon->store,
                                     .max_sessions = 16,
                                     .idle_ms = 60000,
                                     .verbs_device = device_name,
                                     .verbs_gid = -1,
                                     .verbs_sessions = SESSIONS,
                                     .now_ms = fixture_now};
}

void daemon_open(daemon_t *daemon) {
    bkv_error_t error = {.message = ""};
    const bkv_store_config_t store = {.arena_bytes = ARENA, .slab_bytes = 4 << 20, .arena_fd = -1};
    cr_assert_eq(bkv_store_create(&store, fixture_now(), &daemon->store, NULL, &error), BKV_OK, "%s", error.message);
    const bkv_pipeline_config_t pipeline = {.store = daemon->store,
                                            .backend = bkv_backend_get("ref"),
                                            .compute_threads = 2,
                                            .max_jobs = 64,
                                            .staging_bytes = STAGING,
                                            .max_block_bytes = BLOCK,
                                            .max_specs = 4,
                                            .max_batch = 64,
                                            .now_ms = fixture_now};
    cr_assert_eq(bkv_pipeline_create(&pipeline, &daemon->pipeline, &error), BKV_OK, "%s", error.message);
    daemon->model = (bkv_model_t){
        .name = "test",
        .shape = {.layers = 4, .heads = 4, .tokens = 256, .key_dim = 64, .value_dim = 64, .dtype = BKV_FP32},
        .params = {.codec = BKV_CODEC_RAW, .sink = 4, .seed = 11},
    };
    cr_assert_eq(bkv_model_complete(&daemon->model, &error), BKV_OK, "%s", error.message);
    cr_assert_eq(bkv_model_table_add(bkv_pipeline_models(daemon->pipeline), &daemon->model, &error), BKV_OK);
    const bkv_transports_config_t config = fixture_config(daemon);
    cr_assert_eq(bkv_transports_create(&config, &daemon->transports, &error), BKV_OK, "%s", error.message);
}

void daemon_close(daemon_t *daemon) {
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

uint32_t daemon_sessions(const daemon_t *daemon) {
    bkv_transport_metrics_t metrics;
    bkv_transports_metrics(daemon->transports, &metrics);
    return (uint32_t)metrics.sessions;
}

void client_open(client_t *client) {
    bkv_error_t error = {.message = ""};
    bkv_verbs_choice_t choice;
    cr_assert_eq(bkv_verbs_choose(device_name, &choice, &error), BKV_OK);
    cr_assert_eq(bkv_verbs_open(&choice, &client->device, &error), BKV_OK, "%s", error.message);
    client->window = aligned_alloc(4096, WINDOW);
    cr_assert_eq(bkv_verbs_register(client->device, client->window, WINDOW, BKV_VERBS_WRITE, &client->region, &error), BKV_OK,
                 "%s", error.message);
    cr_assert_eq(bkv_verbs_link_init(&client->link, client->device, NULL, 1, BKV_VERBS_WRITE, &error), BKV_OK, "%s",
                 error.message);
    bkv_verbs_link_describe(&client->link, client->region, &client->end);
}

bkv_status_t client_attach(client_t *client, daemon_t *daemon, bkv_error_t *error) {
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

void client_start(client_t *client, daemon_t *daemon) {
    bkv_error_t error = {.message = ""};
    client_open(client);
    cr_assert_eq(client_attach(client, daemon, &error), BKV_OK, "%s", error.message);
}

void client_close(client_t *client) {
    bkv_verbs_link_deinit(&client->link);
    bkv_verbs_unregister(client->region);
    bkv_verbs_close(client->device);
    free(client->window);
}

// ---- transfers ----

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

void outcome_wait(outcome_t *outcome) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += 20;
    cr_assert_eq(sem_timedwait(&outcome->called, &until), 0, "never called back");
    cr_assert_eq(outcome->calls, 1);
}

bkv_key_t fixture_key(uint32_t number) {
    bkv_key_t key = {{0}};
    memcpy(key.bytes, &number, sizeof(number));
    return key;
}

// Numbers that are finite and all different from block to block.
void fixture_fill(uint8_t *to, uint64_t bytes, uint32_t seed) {
    float *values = (float *)(void *)to;
    for (uint64_t i = 0; i < bytes / sizeof(float); i++) {
        values[i] = (float)(i * 7 % 4093) + (float)seed * 0.25f;
    }
}

bkv_status_t put_begin(daemon_t *daemon, const client_t *client, uint32_t key, bkv_codec_t codec, uint64_t offset,
                       outcome_t *outcome) {
    const bkv_ingest_args_t args = {.spec_id = daemon->model.id,
                                    .key = fixture_key(key),
                                    .tokens = 256,
                                    .payload_bytes = BLOCK,
                                    .codec = codec,
                                    .rate = 16};
    const bkv_place_t place = {.offset = offset, .bytes = BLOCK};
    bkv_session_t *session;
    bkv_ingest_t *ingest;
    outcome_init(outcome);
    bkv_status_t status = bkv_session_find(daemon->transports, &client->session, &session, &outcome->error);
    if (status != BKV_OK) {
        return status;
    }
    status = bkv_ingest_begin(daemon->pipeline, &args, fixture_now(), &ingest, &outcome->error);
    if (status == BKV_OK) {
        status = bkv_session_fetch(session, &place, ingest, on_put, outcome, &outcome->error);
        if (status != BKV_OK) {
            bkv_ingest_abort(ingest);
        }
    }
    bkv_session_release(session);
    return status;
}

void put_block(daemon_t *daemon, client_t *client, uint32_t key, bkv_codec_t codec) {
    outcome_t outcome;
    fixture_fill(client->window, BLOCK, key);
    cr_assert_eq(put_begin(daemon, client, key, codec, 0, &outcome), BKV_OK, "%s", outcome.error.message);
    outcome_wait(&outcome);
    cr_assert_eq(outcome.error.status, BKV_OK, "%s", outcome.error.message);
}

bkv_status_t get_begin(daemon_t *daemon, const client_t *client, uint32_t key, const bkv_deliver_range_t *range,
                       uint64_t offset, bkv_delivery_t *delivery, outcome_t *outcome) {
    const bkv_key_t name = fixture_key(key);
    bkv_session_t *session;
    outcome_init(outcome);
    cr_assert_eq(bkv_session_find(daemon->transports, &client->session, &session, &outcome->error), BKV_OK, "%s",
                 outcome->error.message);
    bkv_status_t status =
        bkv_deliver_unverified(daemon->pipeline, &daemon->model.id, &name, range, fixture_now(), delivery, &outcome->error);
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

void get_and_compare(daemon_t *daemon, client_t *client, uint32_t key, const bkv_deliver_range_t *range) {
    const uint64_t offset = 5 << 20;
    bkv_delivery_t delivery = {0};
    outcome_t outcome;
    memset(client->window + offset, 0xee, WINDOW - offset);
    cr_assert_eq(get_begin(daemon, client, key, range, offset, &delivery, &outcome), BKV_OK, "%s", outcome.error.message);
    outcome_wait(&outcome);
    cr_assert_eq(outcome.error.status, BKV_OK, "%s", outcome.error.message);
    cr_assert_eq(memcmp(client->window + offset, delivery.data, delivery.length), 0);
    cr_assert_eq(client->window[offset + delivery.length], 0xee, "more was written than the record");
    bkv_delivery_release(daemon->pipeline, &delivery);
}
