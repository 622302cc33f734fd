// Completion queues: bounds, the event descriptor, order, a thousand calls at once.
#include "fake.h"

#include <criterion/criterion.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct script {
    atomic_uint calls;
    atomic_bool hang;
} script_t;

static void play(fake_call_t *call, void *user) {
    script_t *script = user;
    atomic_fetch_add(&script->calls, 1);
    if (!script->hang) {
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

static void scene_open(scene_t *scene, uint32_t depth, bool hang) {
    memset(scene, 0, sizeof *scene);
    scene->script.hang = hang;
    fake_place_make(&scene->place);
    scene->server = fake_server_start(scene->place.endpoint, play, &scene->script);
    scene->client = fake_client(&scene->place, 30000);
    cr_assert(bkv_queue_create(scene->client, depth, &scene->queue, NULL) == BKV_OK);
}

static void scene_close(scene_t *scene) {
    bkv_queue_destroy(scene->queue);
    bkv_client_destroy(scene->client);
    fake_server_stop(scene->server);
    fake_place_remove(&scene->place);
}

static bool readable(const bkv_queue_t *queue, int wait_ms) {
    struct pollfd fd = {.fd = bkv_queue_fd(queue), .events = POLLIN};
    return poll(&fd, 1, wait_ms) == 1;
}

Test(queue, depth_is_checked) {
    fake_place_t place;
    bkv_queue_t *queue = NULL;
    bkv_error_t err = {0};
    fake_place_make(&place);
    bkv_client_t *client = fake_client(&place, 0);
    cr_assert(bkv_queue_create(client, 0, &queue, &err) == BKV_INVALID_ARGUMENT && strstr(err.message, "depth") != NULL);
    cr_assert(bkv_queue_create(client, 65537, &queue, &err) == BKV_INVALID_ARGUMENT);
    cr_assert(bkv_queue_create(client, 65536, &queue, &err) == BKV_OK);
    bkv_queue_destroy(queue);
    bkv_queue_destroy(NULL);
    bkv_client_destroy(client);
    fake_place_remove(&place);
}

Test(queue, empty) {
    scene_t scene;
    bkv_completion_t completion;
    scene_open(&scene, 4, false);
    cr_assert(!readable(scene.queue, 0));
    cr_assert(bkv_queue_poll(scene.queue, &completion, 1, 0) == 0);
    uint64_t start = fake_now_ms();
    cr_assert(bkv_queue_poll(scene.queue, &completion, 1, 50) == 0);
    cr_assert(fake_now_ms() - start >= 45);
    scene_close(&scene);
}

Test(queue, bounded_until_polled) {
    scene_t scene;
    bkv_completion_t completions[8];
    bkv_spec_id_t id = fake_spec_id();
    bkv_key_t key = fake_key(2, 0);
    bool resident[4] = {0};
    scene_open(&scene, 3, false);
    for (uint64_t i = 0; i < 3; i++) {
        cr_assert(bkv_lookup_submit(scene.queue, 100 + i, &id, &key, 1, 0, &resident[i], NULL) == BKV_OK);
    }
    cr_assert(bkv_lookup_submit(scene.queue, 103, &id, &key, 1, 0, &resident[3], NULL) == BKV_BUSY);
    cr_assert(readable(scene.queue, 5000));
    // Done but not polled still counts.
    while (scene.script.calls < 3) {
        usleep(1000);
    }
    cr_assert(bkv_lookup_submit(scene.queue, 103, &id, &key, 1, 0, &resident[3], NULL) == BKV_BUSY);
    size_t count = 0;
    uint64_t tags = 0;
    while (count < 3) {
        size_t n = bkv_queue_poll(scene.queue, completions, 1, 5000); // one at a time: the rest must stay readable
        cr_assert(n == 1 && completions[0].error.status == BKV_OK);
        tags |= 1ull << (completions[0].tag - 100);
        count += n;
    }
    cr_assert(tags == 7 && resident[0] && resident[1] && resident[2] && !resident[3]);
    cr_assert(!readable(scene.queue, 0), "nothing waits any more");
    cr_assert(bkv_lookup_submit(scene.queue, 103, &id, &key, 1, 0, &resident[3], NULL) == BKV_OK);
    cr_assert(bkv_queue_poll(scene.queue, completions, 8, 5000) == 1 && completions[0].tag == 103 && resident[3]);
    cr_assert(bkv_lookup_submit(scene.queue, 0, &id, &key, 0, 0, NULL, NULL) == BKV_INVALID_ARGUMENT);
    scene_close(&scene);
}

Test(queue, a_thousand_in_flight) {
    enum { COUNT = 1000 };
    scene_t scene;
    bkv_spec_id_t id = fake_spec_id();
    bkv_key_t *keys = calloc(COUNT, sizeof *keys);
    bool *resident = calloc(COUNT, sizeof *resident);
    size_t *prefix = calloc(COUNT, sizeof *prefix);
    unsigned *seen = calloc(COUNT, sizeof *seen);
    scene_open(&scene, COUNT, false);
    for (uint64_t i = 0; i < COUNT; i++) {
        keys[i] = fake_key((uint8_t)i, (uint8_t)(i >> 8));
        cr_assert(bkv_lookup_submit(scene.queue, i, &id, &keys[i], 1, 0, &resident[i], &prefix[i]) == BKV_OK);
    }
    size_t count = 0;
    while (count < COUNT) {
        bkv_completion_t completions[64];
        cr_assert(readable(scene.queue, 20000));
        size_t n = bkv_queue_poll(scene.queue, completions, 64, 0);
        for (size_t i = 0; i < n; i++) {
            cr_assert(completions[i].error.status == BKV_OK, "%s", completions[i].error.message);
            seen[completions[i].tag]++;
        }
        count += n;
    }
    for (size_t i = 0; i < COUNT; i++) {
        cr_assert(seen[i] == 1 && resident[i] == ((uint8_t)i % 2 == 0) && prefix[i] == resident[i], "%zu", i);
    }
    scene_close(&scene);
    free(keys);
    free(resident);
    free(prefix);
    free(seen);
}

Test(queue, destroyed_with_calls_in_flight) {
    scene_t scene;
    bkv_spec_id_t id = fake_spec_id();
    bkv_key_t key = fake_key(2, 0);
    scene_open(&scene, 600, true);
    for (uint64_t i = 0; i < 600; i++) {
        cr_assert(bkv_lookup_submit(scene.queue, i, &id, &key, 1, 0, NULL, NULL) == BKV_OK);
    }
    // Another queue's calls are not touched.
    bkv_queue_t *other = NULL;
    bkv_completion_t completion;
    cr_assert(bkv_queue_create(scene.client, 1, &other, NULL) == BKV_OK);
    cr_assert(bkv_lookup_submit(other, 7, &id, &key, 1, 700, NULL, NULL) == BKV_OK);
    uint64_t start = fake_now_ms();
    bkv_queue_destroy(scene.queue);
    scene.queue = NULL;
    cr_assert(fake_now_ms() - start < 5000);
    cr_assert(bkv_queue_poll(other, &completion, 1, 20000) == 1);
    cr_assert(completion.tag == 7 && completion.error.status == BKV_DEADLINE_EXCEEDED, "%s", completion.error.message);
    bkv_queue_destroy(other);
    scene_close(&scene);
}

Test(queue, deadlines_and_records) {
    scene_t scene;
    bkv_spec_id_t id = fake_spec_id();
    bkv_key_t keys[2] = {fake_key(1, 0), fake_key(1, 1)};
    bkv_record_t records[2], fold;
    const bkv_fold_request_t params = {.budget_bytes = 4096};
    size_t folded = 7;
    bkv_completion_t completions[2];
    scene_open(&scene, 2, true);
    cr_assert(bkv_get_submit(scene.queue, 1, &id, keys, 2, NULL, 200, records) == BKV_OK);
    cr_assert(bkv_fold_submit(scene.queue, 2, &id, keys, 2, &params, 200, &fold, &folded) == BKV_OK);
    bkv_record_t refused[2];
    cr_assert(bkv_get_submit(scene.queue, 3, &id, keys, 2, NULL, 200, refused) == BKV_BUSY);
    cr_assert(refused[0].status == BKV_BUSY && refused[0].data == NULL && refused[1].status == BKV_BUSY);
    size_t count = 0;
    while (count < 2) {
        count += bkv_queue_poll(scene.queue, completions + count, 2 - count, 5000);
    }
    for (size_t i = 0; i < 2; i++) {
        cr_assert(completions[i].error.status == BKV_DEADLINE_EXCEEDED);
        cr_assert(records[i].status == BKV_DEADLINE_EXCEEDED && records[i].data == NULL);
    }
    cr_assert(fold.status == BKV_DEADLINE_EXCEEDED && fold.data == NULL && folded == 0);
    scene_close(&scene);
}
