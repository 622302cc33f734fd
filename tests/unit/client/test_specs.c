// Specs are opened again by themselves when the daemon has been restarted, and only then.
#include "fake.h"

#include <criterion/criterion.h>
#include <string.h>

// A daemon that is "restarted" by a new epoch: it then knows no spec until it is opened.
typedef struct daemon {
    atomic_uint epoch, opened_at; // the spec is known while both are equal
    atomic_uint opens, calls;
    atomic_bool other_id; // after the restart, the spec gets another id
    atomic_bool key_missing;
} daemon_t;

static void serve(fake_call_t *call, void *user) {
    daemon_t *daemon = user;
    if (fake_is(call, "Open")) {
        atomic_fetch_add(&daemon->opens, 1);
        daemon->opened_at = daemon->epoch;
        if (daemon->other_id) {
            uint8_t id[BKV_SPEC_ID_BYTES] = "elsewhere";
            char backend[] = "fake";
            Balancekv__V1__OpenResponse response = BALANCEKV__V1__OPEN_RESPONSE__INIT;
            response.spec_id = (ProtobufCBinaryData){.len = sizeof id, .data = id};
            response.boot_epoch = daemon->epoch;
            response.backend = backend;
            fake_write(call, &response.base);
            fake_finish(call, GRPC_STATUS_OK, "");
        } else {
            fake_open(call, daemon->epoch);
        }
        return;
    }
    atomic_fetch_add(&daemon->calls, 1);
    if (daemon->opened_at != daemon->epoch) {
        fake_finish(call, GRPC_STATUS_NOT_FOUND, "spec_id: unknown");
    } else if (fake_is(call, "Lookup")) {
        fake_lookup(call, daemon->epoch);
    } else if (fake_is(call, "Put")) {
        fake_put(call, daemon->epoch);
    } else if (daemon->key_missing) {
        fake_finish(call, GRPC_STATUS_NOT_FOUND, "keys[0]: not resident");
    } else {
        Balancekv__V1__PinResponse response = BALANCEKV__V1__PIN_RESPONSE__INIT;
        response.lease = 5;
        response.boot_epoch = daemon->epoch;
        fake_write(call, &response.base);
        fake_finish(call, GRPC_STATUS_OK, "");
    }
}

typedef struct scene {
    fake_place_t place;
    daemon_t daemon;
    fake_server_t *server;
    bkv_client_t *client;
    bkv_spec_id_t id;
    bkv_key_t key;
} scene_t;

static void scene_open(scene_t *scene) {
    memset(scene, 0, sizeof *scene);
    scene->daemon.epoch = 1;
    scene->key = fake_key(2, 0);
    fake_place_make(&scene->place);
    scene->server = fake_server_start(scene->place.endpoint, serve, &scene->daemon);
    scene->client = fake_client(&scene->place, 0);
    bkv_spec_t spec = fake_spec();
    bkv_spec_id_t expected = fake_spec_id();
    bkv_limits_t limits;
    bkv_error_t err = {0};
    cr_assert(bkv_open(scene->client, &spec, 0, &scene->id, &limits, &err) == BKV_OK, "%s", err.message);
    cr_assert(memcmp(&scene->id, &expected, sizeof expected) == 0);
    cr_assert(limits.boot_epoch == 1 && limits.max_batch == 4096 && strcmp(limits.backend, "fake") == 0);
    cr_assert(limits.max_message_bytes == 80 << 20 && limits.max_block_bytes == 64 << 20);
}

static void scene_close(scene_t *scene) {
    bkv_client_destroy(scene->client);
    fake_server_stop(scene->server);
    fake_place_remove(&scene->place);
}

static bkv_status_t look_up(scene_t *scene, bkv_error_t *err) {
    return bkv_lookup(scene->client, &scene->id, &scene->key, 1, 0, NULL, NULL, err);
}

Test(specs, opened_again_after_a_restart) {
    scene_t scene;
    bkv_error_t err = {0};
    scene_open(&scene);
    cr_assert(look_up(&scene, &err) == BKV_OK && scene.daemon.opens == 1);
    scene.daemon.epoch = 2;
    cr_assert(look_up(&scene, &err) == BKV_OK, "%s", err.message);
    cr_assert(scene.daemon.opens == 2 && scene.daemon.calls == 3);
    cr_assert(look_up(&scene, &err) == BKV_OK && scene.daemon.opens == 2, "and then no more");

    scene.daemon.epoch = 3; // a Put is sent again from its start
    uint8_t payload[3] = {1, 2, 3};
    bkv_put_t block = {.key = scene.key, .tokens = 1, .payload = payload, .payload_bytes = 3};
    bkv_put_result_t result = {0};
    cr_assert(bkv_put(scene.client, &scene.id, &block, 1, 0, &result, &err) == BKV_OK, "%s", err.message);
    cr_assert(result.stored_bytes == 6 && scene.daemon.opens == 3);
    scene_close(&scene);
}

Test(specs, shares_go_along_again_after_a_restart) {
    scene_t scene;
    bkv_error_t err = {0};
    scene_open(&scene);
    uint8_t shares[4] = {255, 1, 7, 9};
    bkv_spec_t spec = fake_spec();
    bkv_spec_id_t without = scene.id;
    spec.shares = shares;
    spec.share_count = sizeof shares;
    cr_assert(bkv_open(scene.client, &spec, 0, &scene.id, NULL, &err) == BKV_OK, "%s", err.message);
    cr_assert(memcmp(&scene.id, &without, sizeof without) != 0, "the fake's ids depend on the shares");
    memset(shares, 0, sizeof shares); // they were the caller's, for the call only
    scene.daemon.epoch = 2;
    cr_assert(look_up(&scene, &err) == BKV_OK, "%s", err.message); // FAILED_PRECONDITION, had the id become another one
    cr_assert(scene.daemon.opens == 3);
    scene_close(&scene);
}

Test(specs, a_missing_key_is_no_restart) {
    scene_t scene;
    bkv_error_t err = {0};
    uint64_t lease;
    scene_open(&scene);
    scene.daemon.key_missing = true;
    cr_assert(bkv_pin(scene.client, &scene.id, &scene.key, 1, 1000, 0, &lease, &err) == BKV_NOT_FOUND);
    cr_assert(strcmp(err.message, "keys[0]: not resident") == 0, "%s", err.message);
    cr_assert(scene.daemon.calls == 1, "tried again for nothing");
    scene.daemon.epoch = 2; // now it is both: opened again, and the key is still missing
    cr_assert(bkv_pin(scene.client, &scene.id, &scene.key, 1, 1000, 0, &lease, &err) == BKV_NOT_FOUND);
    cr_assert(scene.daemon.calls == 3 && scene.daemon.opened_at == 2);
    scene_close(&scene);
}

Test(specs, unknown_specs_are_not_found) {
    scene_t scene;
    bkv_error_t err = {0};
    scene_open(&scene);
    bkv_spec_id_t stranger = {.bytes = {1, 2, 3}};
    scene.daemon.opened_at = 0;
    cr_assert(bkv_lookup(scene.client, &stranger, &scene.key, 1, 0, NULL, NULL, &err) == BKV_NOT_FOUND);
    cr_assert(scene.daemon.opens == 1, "nobody opened that one");
    scene_close(&scene);
}

Test(specs, another_id_is_said) {
    scene_t scene;
    bkv_error_t err = {0};
    scene_open(&scene);
    scene.daemon.epoch = 2;
    scene.daemon.other_id = true;
    cr_assert(look_up(&scene, &err) == BKV_FAILED_PRECONDITION && strstr(err.message, "spec_id") != NULL, "%s", err.message);
    scene_close(&scene);
}

Test(specs, opened_before_the_call_when_the_restart_is_known) {
    scene_t scene;
    bkv_error_t err = {0};
    scene_open(&scene);
    bkv_spec_t other = fake_spec();
    bkv_spec_id_t other_id;
    scene.daemon.epoch = 2;
    other.model = "other";
    cr_assert(bkv_open(scene.client, &other, 0, &other_id, NULL, &err) == BKV_OK);
    unsigned calls = scene.daemon.calls;
    cr_assert(look_up(&scene, &err) == BKV_OK, "%s", err.message);
    cr_assert(scene.daemon.opens == 3 && scene.daemon.calls == calls + 1, "no attempt was wasted");
    scene_close(&scene);
}
