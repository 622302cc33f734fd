// Put and Get by place: honest daemons and liars, quarantine, windows that are full, worn or gone.
#include "placing.h"

#include <criterion/criterion.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define WINDOW  (4u << 20)
#define PAYLOAD 200000u

typedef struct scene {
    placing_t daemon;
    bkv_client_t *client;
    bkv_spec_id_t id;
    uint8_t *payload;
} scene_t;

static void scene_make(scene_t *scene, const char *transport, uint64_t window) {
    placing_start(&scene->daemon, window);
    scene->client = placing_client(&scene->daemon, transport, window, &scene->id);
    scene->payload = malloc(PAYLOAD);
}

static void scene_end(scene_t *scene) {
    bkv_client_destroy(scene->client);
    placing_stop(&scene->daemon);
    free(scene->payload);
}

static bkv_status_t get(scene_t *scene, size_t count, uint32_t timeout_ms, bkv_record_t *records, bkv_error_t *err) {
    bkv_key_t keys[PLACING_KEYS];
    for (size_t i = 0; i < count; i++) {
        keys[i] = fake_key(1, (uint8_t)i);
    }
    return bkv_get(scene->client, &scene->id, keys, count, NULL, timeout_ms, records, err);
}

static void get_and_check(scene_t *scene, bool in_window) {
    bkv_key_t key = fake_key(1, 0);
    bkv_record_t record;
    bkv_error_t err = {0};
    cr_assert(get(scene, 1, 0, &record, &err) == BKV_OK, "%s", err.message);
    placing_check(&record, &key, in_window);
}

static void put_and_check(scene_t *scene, void *payload, size_t bytes, uint8_t value) {
    bkv_key_t key = fake_key(1, 7);
    bkv_put_result_t result = {0};
    bkv_error_t err = {0};
    cr_assert(placing_put(scene->client, &scene->id, &key, payload, bytes, value, 0, &result, &err) == BKV_OK, "%s",
              err.message);
    cr_assert(result.stored_bytes == (uint64_t)bytes * value && scene->daemon.sums[7] == result.stored_bytes);
}

// ---- Put ----

Test(place, put_copies_what_lies_elsewhere) {
    scene_t scene;
    scene_make(&scene, "auto", WINDOW);
    put_and_check(&scene, scene.payload, PAYLOAD, 3);
    uint64_t offset = scene.daemon.last_offset;
    put_and_check(&scene, scene.payload, PAYLOAD, 5);
    cr_assert(scene.daemon.last_offset == offset, "its room came back");
    cr_assert(scene.daemon.placed == 2 && scene.daemon.plain == 0 && scene.daemon.share.attaches == 1);
    put_and_check(&scene, scene.payload, 100, 7);
    cr_assert(scene.daemon.placed == 2 && scene.daemon.plain == 1, "what is small goes inline");
    scene_end(&scene);
}

Test(place, put_names_what_lies_in_the_window) {
    scene_t scene;
    scene_make(&scene, "auto", WINDOW);
    uint8_t *buffer = bkv_buffer_get(scene.client, 2 * PAYLOAD), *other = bkv_buffer_get(scene.client, PAYLOAD);
    cr_assert(buffer != NULL && other != NULL && (uintptr_t)buffer % 64 == 0);
    put_and_check(&scene, buffer, PAYLOAD, 3);
    const uint8_t *there = share_memory(&scene.daemon.share, 0) + scene.daemon.last_offset;
    buffer[17] = 99;
    cr_assert(there[17] == 99, "the daemon was shown the buffer itself");
    put_and_check(&scene, buffer + 64, PAYLOAD, 4);
    cr_assert(share_memory(&scene.daemon.share, 0) + scene.daemon.last_offset == there + 64);
    put_and_check(&scene, buffer + 8, PAYLOAD, 5);
    const uint8_t *copy = share_memory(&scene.daemon.share, 0) + scene.daemon.last_offset;
    cr_assert(copy < there || copy >= there + 2 * PAYLOAD, "an odd address is copied");
    bkv_buffer_put(scene.client, other);
    bkv_buffer_put(scene.client, buffer);
    void *again = bkv_buffer_get(scene.client, 2 * PAYLOAD);
    cr_assert(again == buffer, "it came back");
    void *large = bkv_buffer_get(scene.client, WINDOW);
    cr_assert(large != NULL);
    memset(large, 1, WINDOW); // more than there is in the window: memory all the same
    bkv_buffer_put(scene.client, large);
    bkv_buffer_put(scene.client, again);
    cr_assert(scene.daemon.placed == 3 && scene.daemon.plain == 0);
    scene_end(&scene);
}

Test(place, put_of_many_takes_what_fits) {
    scene_t scene;
    scene_make(&scene, "auto", 1 << 20);
    bkv_put_t blocks[9];
    bkv_put_result_t results[9];
    bkv_error_t err = {0};
    memset(scene.payload, 2, PAYLOAD);
    for (size_t i = 0; i < 9; i++) {
        size_t bytes = i == 4 ? 50 : PAYLOAD;
        blocks[i] = (bkv_put_t){.key = fake_key(2, (uint8_t)i), .tokens = 1, .payload = scene.payload, .payload_bytes = bytes};
    }
    cr_assert(bkv_put(scene.client, &scene.id, blocks, 9, 0, results, &err) == BKV_OK, "%s", err.message);
    for (size_t i = 0; i < 9; i++) {
        cr_assert(results[i].stored_bytes == 2 * blocks[i].payload_bytes, "block %zu", i);
    }
    cr_assert(scene.daemon.placed == 5 && scene.daemon.plain == 4, "%u by place", scene.daemon.placed);
    scene_end(&scene);
}

// ---- Get ----

Test(place, records_outlive_the_client) {
    scene_t scene;
    bkv_record_t records[3];
    bkv_error_t err = {0};
    scene_make(&scene, "shm", WINDOW);
    cr_assert(get(&scene, 3, 0, records, &err) == BKV_OK, "%s", err.message);
    cr_assert(scene.daemon.placed == 3 && scene.daemon.plain == 0);
    uint64_t offset = scene.daemon.last_offset;
    get_and_check(&scene, true);
    cr_assert(scene.daemon.last_offset > offset, "where records are, no others go");
    bkv_client_destroy(scene.client);
    for (size_t i = 0; i < 3; i++) {
        bkv_key_t key = fake_key(1, (uint8_t)i);
        placing_check(&records[i], &key, true);
    }
    placing_stop(&scene.daemon);
    free(scene.payload);
}

Test(place, what_does_not_fit_comes_as_data) {
    scene_t scene;
    bkv_record_t first[3], second[3];
    bkv_error_t err = {0};
    scene_make(&scene, "auto", 1 << 20); // half of it for one call: one record of 262 KB
    cr_assert(get(&scene, 3, 0, first, &err) == BKV_OK, "%s", err.message);
    cr_assert(get(&scene, 3, 0, second, &err) == BKV_OK, "%s", err.message);
    for (size_t i = 0; i < 3; i++) {
        bkv_key_t key = fake_key(1, (uint8_t)i);
        placing_check(&first[i], &key, i == 0);
        placing_check(&second[i], &key, i == 0);
    }
    scene_end(&scene);
}

Test(place, rooms_follow_what_records_have) {
    scene_t scene;
    bkv_record_t held[12];
    bkv_error_t err = {0};
    bkv_key_t key = fake_key(1, 0);
    scene_make(&scene, "auto", WINDOW);
    for (size_t i = 0; i < 12; i++) { // rooms are trimmed to what is used, so that all of these fit
        cr_assert(get(&scene, 1, 0, &held[i], &err) == BKV_OK, "%s", err.message);
        cr_assert(held[i].owner != NULL, "record %zu", i);
    }
    for (size_t i = 0; i < 12; i++) {
        placing_check(&held[i], &key, true);
    }
    scene_end(&scene);
}

static const struct {
    bkv_status_t status;
    const char *message;
} expected[PLACING_LIES] = {
    [PLACING_BEFORE] = {BKV_INTERNAL, "place_offset:"},
    [PLACING_BEHIND] = {BKV_INTERNAL, "place_offset:"},
    [PLACING_ACROSS] = {BKV_INTERNAL, "place_offset:"},
    [PLACING_OVERLAP] = {BKV_INTERNAL, "place_offset:"},
    [PLACING_UNALIGNED] = {BKV_INTERNAL, "place_offset:"},
    [PLACING_FAR] = {BKV_INTERNAL, "place_offset:"},
    [PLACING_LONG] = {BKV_INTERNAL, "place_offset:"},
    [PLACING_SHORT] = {BKV_DATA_LOSS, "record 1"},
    [PLACING_WITH_DATA] = {BKV_INTERNAL, "data:"},
    [PLACING_AFTER_DATA] = {BKV_INTERNAL, "begun to come as data"},
    [PLACING_TWICE] = {BKV_INTERNAL, "index:"},
    [PLACING_GARBAGE] = {BKV_DATA_LOSS, "record 1"},
    [PLACING_OTHER_KEY] = {BKV_DATA_LOSS, "key:"},
};

Test(place, liars) {
    scene_t scene;
    scene_make(&scene, "shm", 64 << 20);
    get_and_check(&scene, true);
    bkv_record_t first, records[2]; // so that there is something before the room
    bkv_error_t err = {0};
    cr_assert(get(&scene, 1, 0, &first, &err) == BKV_OK);
    for (placing_lie_t lie = PLACING_BEFORE; lie < PLACING_LIES; lie++) {
        scene.daemon.lie = (int)lie;
        bkv_status_t status = get(&scene, 2, 0, records, &err);
        cr_assert(status == expected[lie].status, "lie %d: %d %s", lie, status, err.message);
        cr_assert(strstr(err.message, expected[lie].message) != NULL, "lie %d: %s", lie, err.message);
        cr_assert(records[1].status == status || lie == PLACING_TWICE, "lie %d", lie);
        bkv_key_t key = fake_key(1, 0);
        placing_check(&records[0], &key, true); // what is good is handed over
        bkv_record_free(&records[1]);
        scene.daemon.lie = PLACING_HONEST;
        get_and_check(&scene, true);
    }
    bkv_record_free(&first);
    scene_end(&scene);
}

// ---- quarantine ----

Test(place, what_was_not_answered_is_not_used_again) {
    scene_t scene;
    bkv_key_t key = fake_key(1, 7);
    bkv_record_t record;
    bkv_error_t err = {0};
    scene_make(&scene, "shm", WINDOW);
    get_and_check(&scene, true);
    uint64_t offset = scene.daemon.last_offset;
    get_and_check(&scene, true);
    cr_assert(scene.daemon.last_offset == offset, "after an answer, it is");
    scene.daemon.hang = true;
    cr_assert(get(&scene, 1, 1000, &record, NULL) == BKV_DEADLINE_EXCEEDED);
    cr_assert(scene.daemon.last_offset == offset && record.owner == NULL);
    cr_assert(placing_put(scene.client, &scene.id, &key, scene.payload, PAYLOAD, 1, 1000, NULL, NULL) == BKV_DEADLINE_EXCEEDED);
    uint64_t second = scene.daemon.last_offset;
    cr_assert(second > offset);
    scene.daemon.hang = false;
    get_and_check(&scene, true);
    cr_assert(scene.daemon.last_offset > second, "neither is");
    put_and_check(&scene, scene.payload, PAYLOAD, 2);
    cr_assert(scene.daemon.last_offset > second);
    cr_assert(scene.daemon.share.attaches == 1 && err.status == BKV_OK);
    scene_end(&scene);
}

static void *mend(void *argument) {
    scene_t *scene = argument;
    while (scene->daemon.gets < 2) {
        usleep(1000);
    }
    scene->daemon.break_off = false;
    return NULL;
}

Test(place, each_attempt_has_a_room_of_its_own) {
    scene_t scene;
    pthread_t thread;
    scene_make(&scene, "shm", WINDOW);
    scene.daemon.break_off = true;
    pthread_create(&thread, NULL, mend, &scene);
    get_and_check(&scene, true);
    pthread_join(thread, NULL);
    cr_assert(scene.daemon.gets >= 3 && scene.daemon.last_offset >= 2 * 262144, "%llu",
              (unsigned long long)scene.daemon.last_offset);
    scene_end(&scene);
}

Test(place, a_buffer_that_was_not_answered_for_is_copied) {
    scene_t scene;
    bkv_key_t key = fake_key(1, 7);
    scene_make(&scene, "shm", WINDOW);
    uint8_t *buffer = bkv_buffer_get(scene.client, PAYLOAD);
    put_and_check(&scene, buffer, PAYLOAD, 1);
    scene.daemon.hang = true;
    cr_assert(placing_put(scene.client, &scene.id, &key, buffer, PAYLOAD, 2, 1000, NULL, NULL) == BKV_DEADLINE_EXCEEDED);
    scene.daemon.hang = false;
    put_and_check(&scene, buffer, PAYLOAD, 3);
    cr_assert(scene.daemon.share.attaches == 2, "in another session, for the daemon may read the first one's memory still");
    bkv_buffer_put(scene.client, buffer);
    void *next = bkv_buffer_get(scene.client, PAYLOAD);
    cr_assert(next != NULL && next != buffer);
    bkv_buffer_put(scene.client, next);
    scene_end(&scene);
}

Test(place, a_worn_window_is_replaced) {
    scene_t scene;
    bkv_record_t held, record;
    bkv_error_t err = {0};
    bkv_key_t key = fake_key(1, 0);
    scene_make(&scene, "shm", 2 << 20);
    cr_assert(get(&scene, 1, 0, &held, &err) == BKV_OK, "%s", err.message);
    scene.daemon.hang = true;
    for (int i = 0; i < 4; i++) { // 264 KB each
        cr_assert(get(&scene, 1, 500, &record, NULL) == BKV_DEADLINE_EXCEEDED);
    }
    cr_assert(scene.daemon.share.attaches == 1 && scene.daemon.share.detaches == 0);
    scene.daemon.hang = false;
    get_and_check(&scene, true);
    cr_assert(scene.daemon.share.attaches == 2 && scene.daemon.share.detaches == 1);
    placing_check(&held, &key, true);
    scene_end(&scene);
}

// ---- sessions that end ----

Test(place, a_session_that_is_gone_is_replaced) {
    scene_t scene;
    scene_make(&scene, "shm", WINDOW);
    get_and_check(&scene, true);
    scene.daemon.forget = 1;
    get_and_check(&scene, true);
    cr_assert(scene.daemon.share.attaches == 2 && scene.daemon.gets == 3);
    scene.daemon.forget = 1;
    put_and_check(&scene, scene.payload, PAYLOAD, 3);
    cr_assert(scene.daemon.share.attaches == 3 && scene.daemon.puts == 2);
    scene.daemon.forget = 1000;
    bkv_record_t record;
    bkv_error_t err = {0};
    cr_assert(get(&scene, 1, 0, &record, &err) == BKV_FAILED_PRECONDITION, "%s", err.message);
    cr_assert(strstr(err.message, "place.session") != NULL && scene.daemon.share.attaches < 8);
    scene_end(&scene);
}

Test(place, without_a_session_it_goes_inline_in_the_end) {
    scene_t scene;
    scene_make(&scene, "auto", WINDOW);
    scene.daemon.forget = 1000;
    get_and_check(&scene, false);
    put_and_check(&scene, scene.payload, PAYLOAD, 3);
    cr_assert(scene.daemon.plain == 2 && scene.daemon.share.attaches < 8);
    scene_end(&scene);
}

Test(place, a_restarted_daemon_is_attached_to_again) {
    scene_t scene;
    bkv_record_t held;
    bkv_error_t err = {0};
    bkv_key_t key = fake_key(1, 0);
    scene_make(&scene, "shm", WINDOW);
    uint8_t *buffer = bkv_buffer_get(scene.client, PAYLOAD);
    cr_assert(get(&scene, 1, 0, &held, &err) == BKV_OK, "%s", err.message);
    scene.daemon.epoch = 2;
    get_and_check(&scene, true);
    cr_assert(scene.daemon.share.attaches == 2);
    put_and_check(&scene, buffer, PAYLOAD, 9); // of the old window: copied
    cr_assert(scene.daemon.placed == 3 && scene.daemon.plain == 0);
    bkv_buffer_put(scene.client, buffer);
    placing_check(&held, &key, true);
    scene_end(&scene);
}

// ---- many at once ----

#define THREADS 4
#define ROUNDS  20

typedef struct worker {
    scene_t *scene;
    pthread_t thread;
    uint8_t number;
} worker_t;

static void *work(void *argument) {
    worker_t *worker = argument;
    scene_t *scene = worker->scene;
    uint8_t *payload = worker->number % 2 == 0 ? malloc(PAYLOAD) : bkv_buffer_get(scene->client, PAYLOAD);
    bkv_key_t key = fake_key(1, worker->number);
    for (uint8_t i = 1; i <= ROUNDS; i++) {
        bkv_put_result_t result = {0};
        bkv_record_t record;
        bkv_error_t err = {0};
        cr_assert(placing_put(scene->client, &scene->id, &key, payload, PAYLOAD, i, 0, &result, &err) == BKV_OK, "%s",
                  err.message);
        cr_assert(result.stored_bytes == (uint64_t)PAYLOAD * i);
        cr_assert(bkv_get(scene->client, &scene->id, &key, 1, NULL, 0, &record, &err) == BKV_OK, "%s", err.message);
        placing_check(&record, &key, record.owner != NULL);
    }
    if (worker->number % 2 == 0) {
        free(payload);
    } else {
        bkv_buffer_put(scene->client, payload);
    }
    return NULL;
}

Test(place, many_threads_attach_once) {
    scene_t scene;
    worker_t workers[THREADS];
    scene_make(&scene, "auto", WINDOW);
    scene.daemon.attach_ms = 100;
    for (uint8_t i = 0; i < THREADS; i++) {
        workers[i] = (worker_t){.scene = &scene, .number = i};
        cr_assert(pthread_create(&workers[i].thread, NULL, work, &workers[i]) == 0);
    }
    for (size_t i = 0; i < THREADS; i++) {
        pthread_join(workers[i].thread, NULL);
    }
    cr_assert(scene.daemon.share.attaches == 1 && scene.daemon.placed == 2 * THREADS * ROUNDS);
    scene_end(&scene);
}
