// Who drives: callers that wait, in turn, and the client's thread; nobody waits for somebody who does not.
#include "process.h"

#include <criterion/criterion.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct script {
    atomic_bool held; // Lookups wait; Stats is never answered
    atomic_uint lookups;
} script_t;

static void play(fake_call_t *call, void *user) {
    script_t *script = user;
    if (fake_is(call, "Lookup")) {
        atomic_fetch_add(&script->lookups, 1);
        while (script->held) {
            usleep(1000);
        }
        fake_lookup(call, 1);
    }
}

typedef struct scene {
    fake_place_t place;
    script_t script;
    fake_server_t *server;
    bkv_client_t *client;
    bkv_queue_t *queue;
} scene_t;

static void scene_open(scene_t *scene, bool held) {
    memset(scene, 0, sizeof *scene);
    scene->script.held = held;
    fake_place_make(&scene->place);
    scene->server = fake_server_start(scene->place.endpoint, play, &scene->script);
    scene->client = fake_client(&scene->place, 30000);
    cr_assert(bkv_queue_create(scene->client, 64, &scene->queue, NULL) == BKV_OK);
}

static void scene_close(scene_t *scene) {
    bkv_queue_destroy(scene->queue);
    bkv_client_destroy(scene->client);
    fake_server_stop(scene->server);
    fake_place_remove(&scene->place);
}

static bkv_status_t look_up(bkv_client_t *client, uint32_t timeout_ms) {
    bkv_spec_id_t id = fake_spec_id();
    bkv_key_t key = fake_key(2, 0);
    return bkv_lookup(client, &id, &key, 1, timeout_ms, NULL, NULL, NULL);
}

static bkv_status_t ask_in_vain(bkv_client_t *client, uint32_t timeout_ms) {
    bkv_stats_t *stats;
    return bkv_stats_get(client, timeout_ms, &stats, NULL);
}

static void submit(bkv_queue_t *queue) {
    bkv_spec_id_t id = fake_spec_id();
    bkv_key_t key = fake_key(2, 0);
    cr_assert(bkv_lookup_submit(queue, 0, &id, &key, 1, 0, NULL, NULL) == BKV_OK);
}

static void assert_polled(bkv_queue_t *queue, size_t count) {
    for (size_t i = 0; i < count; i++) {
        bkv_completion_t completion;
        cr_assert(bkv_queue_poll(queue, &completion, 1, 5000) == 1);
        cr_assert(completion.error.status == BKV_OK, "%s", completion.error.message);
    }
}

typedef struct caller {
    bkv_client_t *client;
    const bkv_put_t *block; // NULL: others say what it does
    const bkv_spec_id_t *id;
    uint32_t timeout_ms;
    bool in_vain;
    pthread_t thread;
    bkv_status_t status;
    uint64_t took_ms;
} caller_t;

static void *call(void *argument) {
    caller_t *caller = argument;
    uint64_t start = fake_now_ms();
    if (caller->block != NULL) {
        caller->status = bkv_put(caller->client, caller->id, caller->block, 1, caller->timeout_ms, NULL, NULL);
    } else if (caller->in_vain) {
        caller->status = ask_in_vain(caller->client, caller->timeout_ms);
    } else {
        caller->status = look_up(caller->client, caller->timeout_ms);
    }
    caller->took_ms = fake_now_ms() - start;
    return NULL;
}

static void caller_start(caller_t *caller) {
    cr_assert(pthread_create(&caller->thread, NULL, call, caller) == 0);
}

static void caller_end(caller_t *caller, bkv_status_t status, uint64_t least_ms, uint64_t most_ms) {
    pthread_join(caller->thread, NULL);
    cr_assert(caller->status == status, "%s", bkv_status_name(caller->status));
    cr_assert(caller->took_ms >= least_ms && caller->took_ms < most_ms, "%llu ms", (unsigned long long)caller->took_ms);
}

// Each of those that drive has a deadline before the next one's; the last is answered.
Test(drive, goes_from_caller_to_caller) {
    scene_t scene;
    scene_open(&scene, true);
    caller_t callers[5];
    for (uint32_t i = 0; i < 5; i++) {
        callers[i] = (caller_t){.client = scene.client, .timeout_ms = 100 + 100 * i, .in_vain = i < 4};
        callers[i].timeout_ms = i < 4 ? callers[i].timeout_ms : 20000;
        caller_start(&callers[i]);
        usleep(5000);
    }
    for (uint32_t i = 0; i < 4; i++) {
        caller_end(&callers[i], BKV_DEADLINE_EXCEEDED, callers[i].timeout_ms - 10, callers[i].timeout_ms + 5000);
    }
    scene.script.held = false;
    caller_end(&callers[4], BKV_OK, 350, 10000);
    scene_close(&scene);
}

// The other way round: the deadlines of those that follow pass while one drives that has long to wait.
Test(drive, followers_are_in_time) {
    scene_t scene;
    scene_open(&scene, true);
    caller_t first = {.client = scene.client, .timeout_ms = 20000}, others[3];
    caller_start(&first);
    while (scene.script.lookups == 0) {
        usleep(1000);
    }
    for (uint32_t i = 0; i < 3; i++) {
        others[i] = (caller_t){.client = scene.client, .timeout_ms = 100, .in_vain = true};
        caller_start(&others[i]);
    }
    for (uint32_t i = 0; i < 3; i++) {
        caller_end(&others[i], BKV_DEADLINE_EXCEEDED, 90, 5000);
    }
    scene.script.held = false;
    caller_end(&first, BKV_OK, 90, 10000);
    scene_close(&scene);
}

// Calls of queues: what a caller drove for goes on when it is gone, whether they came before it or while it drove.
Test(drive, goes_to_the_clients_thread) {
    scene_t scene;
    scene_open(&scene, true);
    for (int round = 0; round < 2; round++) {
        scene.script.held = true;
        submit(scene.queue);
        cr_assert(ask_in_vain(scene.client, 50) == BKV_DEADLINE_EXCEEDED);
        scene.script.held = false;
        assert_polled(scene.queue, 1);
        for (int i = 0; i < 20; i++) {
            cr_assert(look_up(scene.client, 0) == BKV_OK);
        }
        scene.script.held = true;
        caller_t caller = {.client = scene.client, .timeout_ms = 200, .in_vain = true};
        caller_start(&caller);
        usleep(20000);
        submit(scene.queue);
        caller_end(&caller, BKV_DEADLINE_EXCEEDED, 190, 2000);
        scene.script.held = false;
        assert_polled(scene.queue, 1);
        usleep(60000); // and with its thread polling by itself
    }
    scene_close(&scene);
}

static void *mix(void *argument) {
    scene_t *scene = argument;
    bkv_queue_t *queue;
    cr_assert(bkv_queue_create(scene->client, 8, &queue, NULL) == BKV_OK);
    for (uint32_t i = 0; i < 150; i++) {
        submit(queue);
        if (i % 3 != 0) {
            assert_polled(queue, 1);
        }
        cr_assert(look_up(scene->client, 0) == BKV_OK);
        if (i % 3 == 0) {
            assert_polled(queue, 1);
        }
        if (i % 50 == 0) {
            cr_assert(ask_in_vain(scene->client, 30) == BKV_DEADLINE_EXCEEDED);
        }
        for (uint32_t j = 0; j < i % 4; j++) {
            cr_assert(look_up(scene->client, 0) == BKV_OK);
        }
    }
    submit(queue);
    bkv_queue_destroy(queue);
    return NULL;
}

Test(drive, all_at_once) {
    scene_t scene;
    pthread_t threads[4];
    scene_open(&scene, false);
    for (size_t i = 0; i < 4; i++) {
        cr_assert(pthread_create(&threads[i], NULL, mix, &scene) == 0);
    }
    for (size_t i = 0; i < 4; i++) {
        pthread_join(threads[i], NULL);
    }
    scene_close(&scene);
}

// ---- a daemon that is stopped: the one who drives has half of a message in a socket that blocks ----

static void serve(fake_call_t *call, void *user) {
    (void)user;
    if (fake_is(call, "Open")) {
        fake_open(call, 1);
    } else {
        fake_lookup(call, 1);
    }
}

static void start_fake(const fake_place_t *place, uint64_t epoch) {
    (void)epoch;
    fake_server_start(place->endpoint, serve, NULL);
}

#define PAYLOAD (16u << 20)

Test(drive, callers_of_a_stopped_daemon_are_in_time) {
    fake_place_t place;
    process_t process;
    bkv_error_t err = {0};
    fake_place_make(&place);
    process_fork(&process, &place, 1, start_fake);
    process_start(&process);
    bkv_client_t *client = fake_client(&place, 0);
    bkv_spec_t spec = fake_spec();
    bkv_spec_id_t id;
    cr_assert(bkv_open(client, &spec, 10000, &id, NULL, &err) == BKV_OK, "%s", err.message);
    bkv_put_t block = {.key = fake_key(2, 0), .tokens = 1, .payload = calloc(1, PAYLOAD), .payload_bytes = PAYLOAD};
    cr_assert(look_up(client, 10000) == BKV_OK);
    process_stop(&process);
    caller_t callers[6];
    for (uint32_t i = 0; i < 6; i++) { // who drives is one that sends much, then one that follows does
        callers[i] = (caller_t){.client = client, .timeout_ms = 300 + 100 * i, .id = &id, .block = i % 3 == 2 ? NULL : &block};
        caller_start(&callers[i]);
        usleep(20000);
    }
    for (uint32_t i = 0; i < 6; i++) {
        caller_end(&callers[i], BKV_DEADLINE_EXCEEDED, callers[i].timeout_ms - 10, callers[i].timeout_ms + 5000);
    }
    for (uint32_t i = 0; i < 3; i++) {
        callers[i].timeout_ms = 60000;
        caller_start(&callers[i]);
        usleep(20000);
    }
    uint64_t start = fake_now_ms();
    bkv_client_destroy(client);
    uint64_t took = fake_now_ms() - start;
    cr_assert(took < 5000, "%llu ms", (unsigned long long)took);
    for (uint32_t i = 0; i < 3; i++) {
        caller_end(&callers[i], BKV_CANCELLED, 0, 10000);
    }
    free((void *)block.payload);
    process_kill(&process);
    fake_place_remove(&place);
}
