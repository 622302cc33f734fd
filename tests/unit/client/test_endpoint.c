// Several endpoints: one that is dead, drains, is busy or silent is left for the next within the call's deadline, and calls come
// back to it when it serves again.
#include "herd.h"

#include <criterion/criterion.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define BACK_MS 15000 // until calls go to the preferred daemon again: it is asked every second, and gRPC looks as often

typedef struct scene {
    herd_t herd;
    bkv_client_t *client;
    bkv_spec_id_t id;
} scene_t;

static void scene_begin(scene_t *scene, uint32_t daemons) {
    bkv_spec_t spec = fake_spec();
    bkv_error_t err = {0};
    herd_make(&scene->herd, daemons, false);
    for (uint32_t i = 0; i < daemons; i++) {
        herd_start(&scene->herd, i);
    }
    scene->client = herd_client(&scene->herd, 20000);
    cr_assert(bkv_open(scene->client, &spec, 0, &scene->id, NULL, &err) == BKV_OK, "%s", err.message);
    cr_assert(scene->herd.daemons[0].opens == 1);
}

static void scene_end(scene_t *scene) {
    bkv_client_destroy(scene->client);
    herd_end(&scene->herd);
}

static bkv_status_t look_up(scene_t *scene, uint32_t timeout_ms, bkv_error_t *err) {
    bkv_key_t key = fake_key(2, 0);
    bool resident = false;
    bkv_status_t status = bkv_lookup(scene->client, &scene->id, &key, 1, timeout_ms, &resident, NULL, err);
    cr_assert(status != BKV_OK || resident);
    return status;
}

static void assert_found_within(scene_t *scene, uint32_t timeout_ms, uint64_t most_ms) {
    bkv_error_t err = {0};
    uint64_t start = fake_now_ms();
    cr_assert(look_up(scene, timeout_ms, &err) == BKV_OK, "%s", err.message);
    cr_assert(fake_now_ms() - start < most_ms, "it took %d ms", (int)(fake_now_ms() - start));
}

// Until a call is answered by the first daemon.
static void assert_back(scene_t *scene) {
    uint64_t start = fake_now_ms();
    unsigned before = scene->herd.daemons[0].lookups;
    while (scene->herd.daemons[0].lookups == before) {
        cr_assert(fake_now_ms() - start < BACK_MS, "not back at the first daemon");
        assert_found_within(scene, 0, 10000);
        usleep(20000);
    }
}

Test(endpoint, the_first_is_preferred) {
    scene_t scene;
    scene_begin(&scene, 3);
    for (int i = 0; i < 20; i++) {
        assert_found_within(&scene, 0, 5000);
    }
    cr_assert(scene.herd.daemons[0].lookups == 20 && scene.herd.daemons[1].lookups + scene.herd.daemons[2].lookups == 0);
    cr_assert(scene.herd.daemons[0].checks + scene.herd.daemons[1].checks + scene.herd.daemons[2].checks == 0,
              "while all is well nobody is asked");
    scene_end(&scene);
}

// The spec is opened at each by itself, once, as their boots have nothing to do with each other.
Test(endpoint, dead_and_back) {
    scene_t scene;
    scene_begin(&scene, 2);
    assert_found_within(&scene, 0, 5000);
    for (int round = 1; round <= 2; round++) {
        herd_stop(&scene.herd, 0);
        for (int i = 0; i < 10; i++) {
            assert_found_within(&scene, 5000, 4000);
        }
        cr_assert(scene.herd.daemons[1].lookups == 10u * (unsigned)round && scene.herd.daemons[1].opens == 1);
        scene.herd.daemons[0].epoch += 100;
        herd_start(&scene.herd, 0);
        unsigned opens = scene.herd.daemons[0].opens;
        scene.herd.daemons[1].lookups = 0;
        assert_back(&scene);
        scene.herd.daemons[1].lookups = 10u * (unsigned)round;
        cr_assert(scene.herd.daemons[0].opens == opens + 1, "opened again there, and once");
    }
    scene_end(&scene);
}

Test(endpoint, dead_from_the_start) {
    scene_t scene;
    bkv_spec_t spec = fake_spec();
    bkv_error_t err = {0};
    herd_make(&scene.herd, 3, false);
    herd_start(&scene.herd, 2);
    scene.client = herd_client(&scene.herd, 5000);
    cr_assert(bkv_open(scene.client, &spec, 5000, &scene.id, NULL, &err) == BKV_OK, "%s", err.message);
    assert_found_within(&scene, 5000, 4000);
    cr_assert(bkv_ping(scene.client, 5000, NULL, &err) == BKV_OK, "%s", err.message);
    scene_end(&scene);
}

Test(endpoint, draining) {
    scene_t scene;
    scene_begin(&scene, 2);
    scene.herd.daemons[0].mood = HERD_DRAINS;
    assert_found_within(&scene, 5000, 4000);
    assert_found_within(&scene, 5000, 4000);
    cr_assert(scene.herd.daemons[0].lookups == 1 && scene.herd.daemons[1].lookups == 2, "it was asked once");
    cr_assert(bkv_ping(scene.client, 5000, NULL, NULL) == BKV_OK, "somebody serves");
    scene.herd.daemons[0].mood = HERD_SERVES;
    assert_back(&scene);
    scene_end(&scene);
}

// A pause and another try as ever; only when that goes on the next one is asked.
Test(endpoint, busy) {
    scene_t scene;
    scene_begin(&scene, 2);
    scene.herd.daemons[0].mood = HERD_BUSY;
    assert_found_within(&scene, 8000, 7000);
    cr_assert(scene.herd.daemons[0].lookups == 4 && scene.herd.daemons[1].lookups == 1);
    scene.herd.daemons[0].mood = HERD_SERVES;
    assert_back(&scene);
    scene_end(&scene);
}

Test(endpoint, busy_for_a_moment) {
    scene_t scene;
    scene_begin(&scene, 2);
    scene.herd.daemons[0].mood = HERD_BUSY;
    scene.herd.daemons[0].relents = 3;
    assert_found_within(&scene, 8000, 7000);
    cr_assert(scene.herd.daemons[0].lookups == 3 && scene.herd.daemons[1].lookups == 0, "%u, %u", scene.herd.daemons[0].lookups,
              scene.herd.daemons[1].lookups);
    scene_end(&scene);
}

// ---- silence ----

Test(endpoint, silent) {
    scene_t scene;
    scene_begin(&scene, 2);
    scene.herd.daemons[0].mood = HERD_MUTE;
    assert_found_within(&scene, 5000, 4500);
    assert_found_within(&scene, 20000, 5000); // it is known by now
    cr_assert(scene.herd.daemons[0].lookups == 1 && scene.herd.daemons[1].lookups == 2);
    scene.herd.daemons[0].mood = HERD_SERVES;
    assert_back(&scene);
    scene.herd.daemons[0].mood = HERD_MUTE;
    assert_found_within(&scene, 20000, 8000); // with more time it is given more, though not all of it
    scene_end(&scene);
}

// A call with hardly any time does not get through, but those after it do.
Test(endpoint, silent_and_no_time) {
    scene_t scene;
    scene_begin(&scene, 2);
    scene.herd.daemons[0].mood = HERD_MUTE;
    cr_assert(look_up(&scene, 60, NULL) == BKV_DEADLINE_EXCEEDED);
    assert_found_within(&scene, 5000, 4500);
    cr_assert(scene.herd.daemons[0].lookups <= 1, "it need not be found out anew");
    scene_end(&scene);
}

// What takes long is not silence.
Test(endpoint, at_work) {
    scene_t scene;
    bkv_key_t key = fake_key(2, 0);
    bkv_queue_t *queue = NULL;
    bkv_completion_t done;
    scene_begin(&scene, 2);
    scene.herd.daemons[0].mood = HERD_WORKS;
    cr_assert(bkv_queue_create(scene.client, 4, &queue, NULL) == BKV_OK);
    cr_assert(bkv_lookup_submit(queue, 5, &scene.id, &key, 1, 20000, NULL, NULL) == BKV_OK);
    cr_assert(bkv_queue_poll(queue, &done, 1, 2000) == 0);
    cr_assert(scene.herd.daemons[0].checks > 3 && scene.herd.daemons[0].checks < 20, "%u", scene.herd.daemons[0].checks);
    scene.herd.daemons[0].mood = HERD_SERVES;
    cr_assert(bkv_queue_poll(queue, &done, 1, 15000) == 1 && done.tag == 5 && done.error.status == BKV_OK);
    cr_assert(scene.herd.daemons[0].lookups == 1 && scene.herd.daemons[1].lookups == 0);
    bkv_queue_destroy(queue);
    scene_end(&scene);
}

Test(endpoint, silent_to_many) {
    scene_t scene;
    bkv_key_t key = fake_key(2, 0);
    bkv_queue_t *queue = NULL;
    bkv_completion_t done[64];
    scene_begin(&scene, 2);
    scene.herd.daemons[0].mood = HERD_MUTE;
    cr_assert(bkv_queue_create(scene.client, 400, &queue, NULL) == BKV_OK);
    for (uint64_t i = 0; i < 400; i++) { // more than are cancelled at once
        cr_assert(bkv_lookup_submit(queue, i, &scene.id, &key, 1, 20000, NULL, NULL) == BKV_OK);
    }
    uint64_t start = fake_now_ms();
    for (size_t count = 0, now; count < 400; count += now) {
        now = bkv_queue_poll(queue, done, 64, 20000);
        for (size_t i = 0; i < now; i++) {
            cr_assert(done[i].error.status == BKV_OK, "%s", done[i].error.message);
        }
        cr_assert(now > 0);
    }
    cr_assert(fake_now_ms() - start < 10000);
    cr_assert(scene.herd.daemons[1].lookups >= 400);
    bkv_queue_destroy(queue);
    scene_end(&scene);
}

// ---- nobody works ----

Test(endpoint, all_dead) {
    scene_t scene;
    bkv_error_t err = {0};
    scene_begin(&scene, 2);
    herd_stop(&scene.herd, 0);
    herd_stop(&scene.herd, 1);
    uint64_t start = fake_now_ms();
    cr_assert(look_up(&scene, 700, &err) == BKV_BUSY, "%s", err.message);
    cr_assert(fake_now_ms() - start < 5000);
    cr_assert(strstr(err.message, "tried") != NULL && strstr(err.message, "socket") != NULL, "no cause in: %s", err.message);
    start = fake_now_ms();
    cr_assert(bkv_ping(scene.client, 20000, NULL, &err) == BKV_BUSY && fake_now_ms() - start < 5000);
    herd_start(&scene.herd, 1);
    assert_found_within(&scene, 15000, 10000);
    scene_end(&scene);
}

static void *serve_soon(void *argument) {
    usleep(30000);
    ((herd_daemon_t *)argument)->mood = HERD_SERVES;
    return NULL;
}

Test(endpoint, one_dead_the_other_silent_until_it_goes_on) {
    scene_t scene;
    pthread_t thread;
    scene_begin(&scene, 2);
    herd_stop(&scene.herd, 1);
    scene.herd.daemons[0].mood = HERD_MUTE;
    cr_assert(look_up(&scene, 1500, NULL) != BKV_OK);
    cr_assert(pthread_create(&thread, NULL, serve_soon, &scene.herd.daemons[0]) == 0);
    assert_found_within(&scene, 15000, 10000);
    pthread_join(thread, NULL);
    scene_end(&scene);
}

// ---- what else there is ----

Test(endpoint, put_goes_elsewhere_whole) {
    scene_t scene;
    static uint8_t payload[4096];
    bkv_put_result_t result = {0};
    bkv_error_t err = {0};
    memset(payload, 3, sizeof payload);
    scene_begin(&scene, 2);
    scene.herd.daemons[0].mood = HERD_MUTE;
    bkv_put_t put = {.key = fake_key(1, 1), .tokens = 16, .payload = payload, .payload_bytes = sizeof payload};
    cr_assert(bkv_put(scene.client, &scene.id, &put, 1, 5000, &result, &err) == BKV_OK, "%s", err.message);
    cr_assert(result.stored_bytes == 3 * sizeof payload && scene.herd.daemons[1].puts == 1);
    scene_end(&scene);
}

// A lease is of the daemon that gave it: the others do not know it, and are asked all the same.
Test(endpoint, unpin_finds_its_daemon) {
    scene_t scene;
    bkv_error_t err = {0};
    scene_begin(&scene, 3);
    scene.herd.daemons[2].lease = 77;
    cr_assert(bkv_unpin(scene.client, 77, 0, &err) == BKV_OK, "%s", err.message);
    cr_assert(bkv_unpin(scene.client, 78, 0, &err) == BKV_NOT_FOUND);
    for (int i = 0; i < 3; i++) {
        cr_assert(scene.herd.daemons[i].unpins == 2);
    }
    scene_end(&scene);
}

typedef struct waiter {
    scene_t *scene;
    bkv_status_t status;
} waiter_t;

static void *wait_long(void *argument) {
    waiter_t *waiter = argument;
    waiter->status = look_up(waiter->scene, 60000, NULL);
    return NULL;
}

// In every state: waiting for the probe, moved to the next, in the pause after a round.
Test(endpoint, destroyed_under_way) {
    for (unsigned ms = 0; ms < 1600; ms += 400) {
        scene_t scene;
        waiter_t waiters[4];
        pthread_t threads[4];
        scene_begin(&scene, 3);
        for (int i = 0; i < 3; i++) {
            scene.herd.daemons[i].mood = HERD_MUTE;
        }
        for (int i = 0; i < 4; i++) {
            waiters[i] = (waiter_t){.scene = &scene};
            cr_assert(pthread_create(&threads[i], NULL, wait_long, &waiters[i]) == 0);
        }
        while (scene.herd.daemons[0].lookups + scene.herd.daemons[1].lookups + scene.herd.daemons[2].lookups < 4) {
            usleep(1000);
        }
        usleep(ms * 1000);
        uint64_t start = fake_now_ms();
        bkv_client_destroy(scene.client);
        cr_assert(fake_now_ms() - start < 5000);
        for (int i = 0; i < 4; i++) {
            pthread_join(threads[i], NULL);
            cr_assert(waiters[i].status == BKV_CANCELLED, "%s", bkv_status_name(waiters[i].status));
        }
        herd_end(&scene.herd);
    }
}

static void *look_up_for_long(void *argument) {
    scene_t *scene = argument;
    for (int i = 0; i < 150; i++) {
        bkv_error_t err = {0};
        cr_assert(look_up(scene, 20000, &err) == BKV_OK, "%s", err.message);
        usleep(5000);
    }
    return NULL;
}

// Many callers, while first one and then the other does not serve.
Test(endpoint, many_threads) {
    static const herd_mood_t moods[] = {HERD_DRAINS, HERD_MUTE, HERD_BUSY};
    scene_t scene;
    pthread_t threads[6];
    scene_begin(&scene, 2);
    for (int i = 0; i < 6; i++) {
        cr_assert(pthread_create(&threads[i], NULL, look_up_for_long, &scene) == 0);
    }
    for (int i = 0; i < 6; i++) {
        scene.herd.daemons[i % 2].mood = (int)moods[i % 3];
        usleep(150000);
        scene.herd.daemons[i % 2].mood = HERD_SERVES;
    }
    for (int i = 0; i < 6; i++) {
        pthread_join(threads[i], NULL);
    }
    scene_end(&scene);
}

Test(endpoint, lists) {
    static const char *const bad[][2] = {
        {"unix:/a,", "endpoint: \"\""},
        {",unix:/a", "endpoint: \"\""},
        {"unix:/a,unix:/b,unix:/a", "\"unix:/a\" is there twice"},
        {"unix:/a,nonsense", "nonsense"},
        {"a:1,a:2,a:3,a:4,a:5,a:6,a:7,a:8,a:9,a:10,a:11,a:12,a:13,a:14,a:15,a:16,a:17", "more than 16"},
    };
    bkv_client_t *client = NULL;
    bkv_error_t err = {0};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        bkv_client_options_t options = {.endpoint = bad[i][0]};
        cr_assert(bkv_client_create(&options, &client, &err) == BKV_INVALID_ARGUMENT && client == NULL, "%s", bad[i][0]);
        cr_assert(strstr(err.message, bad[i][1]) != NULL, "%s", err.message);
    }
    setenv("BKV_ENDPOINT", "unix:/a,localhost:7420,[::1]:7420", 1);
    cr_assert(bkv_client_create(NULL, &client, &err) == BKV_OK, "%s", err.message);
    bkv_client_destroy(client);
}
