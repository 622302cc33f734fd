// Which transport is used: the choice, attaching and waiting for it, fd sockets that lie, and what is left when there is none.
#include "placing.h"

#include <criterion/criterion.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define WINDOW  (4u << 20)
#define PAYLOAD 200000u

#define ATTACH_MS 1900 // the client gives attaching up after two seconds: what waits for none of it takes less

typedef struct scene {
    placing_t daemon;
    bkv_client_t *client;
    bkv_spec_id_t id;
    uint8_t *payload;
    bkv_key_t key;
} scene_t;

static void scene_make(scene_t *scene, const char *transport, uint64_t window) {
    placing_start(&scene->daemon, window);
    scene->client = placing_client(&scene->daemon, transport, 0, &scene->id);
    scene->payload = malloc(PAYLOAD);
    scene->key = fake_key(1, 7);
}

static void scene_end(scene_t *scene) {
    bkv_client_destroy(scene->client);
    placing_stop(&scene->daemon);
    free(scene->payload);
}

static bkv_status_t put(scene_t *scene, uint32_t timeout_ms, bkv_error_t *err) {
    return placing_put(scene->client, &scene->id, &scene->key, scene->payload, PAYLOAD, 1, timeout_ms, NULL, err);
}

// ---- options ----

static bkv_status_t create(const char *transport, uint64_t bytes, bkv_error_t *err) {
    bkv_client_t *client = NULL;
    bkv_client_options_t options = {.endpoint = "unix:/nowhere", .transport = transport, .window_bytes = bytes};
    bkv_status_t status = bkv_client_create(&options, &client, err);
    bkv_client_destroy(client);
    return status;
}

Test(link, options) {
    bkv_error_t err = {0};
    static const char *const good[] = {"auto", "inline", "shm", "verbs", "", NULL};
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        cr_assert(create(good[i], 0, &err) == BKV_OK, "%s", err.message);
    }
    cr_assert(create("cuda-ipc", 0, &err) == BKV_INVALID_ARGUMENT && strstr(err.message, "transport: \"cuda-ipc\"") != NULL);
    cr_assert(create("auto", 65535, &err) == BKV_INVALID_ARGUMENT && strstr(err.message, "window_bytes: 65535") != NULL);
    setenv("BKV_TRANSPORT", "pigeon", 1);
    cr_assert(create(NULL, 0, &err) == BKV_INVALID_ARGUMENT && strstr(err.message, "pigeon") != NULL);
    cr_assert(create("inline", 0, &err) == BKV_OK, "the option comes first");
}

Test(link, named_inline) {
    scene_t scene;
    setenv("BKV_TRANSPORT", "inline", 1);
    scene_make(&scene, NULL, WINDOW);
    cr_assert(put(&scene, 0, NULL) == BKV_OK && scene.daemon.plain == 1 && scene.daemon.share.attaches == 0);
    void *buffer = bkv_buffer_get(scene.client, PAYLOAD);
    cr_assert(buffer != NULL && (uintptr_t)buffer % 64 == 0);
    bkv_buffer_put(scene.client, buffer);
    cr_assert(scene.daemon.share.attaches == 0);
    scene_end(&scene);
}

// ---- no window to be had ----

Test(link, auto_falls_back_and_remembers) {
    scene_t scene;
    scene_make(&scene, NULL, WINDOW);
    scene.daemon.no_attach = true;
    for (unsigned i = 1; i <= 3; i++) {
        cr_assert(put(&scene, 0, NULL) == BKV_OK && scene.daemon.plain == i);
    }
    cr_assert(scene.daemon.share.attaches == 1, "refused once, it is not asked again at once");
    scene_end(&scene);
}

Test(link, what_is_not_offered_is_not_asked_for) {
    scene_t scene;
    placing_start(&scene.daemon, WINDOW);
    scene.daemon.not_offered = true;
    scene.client = placing_client(&scene.daemon, "auto", 0, &scene.id);
    scene.payload = malloc(PAYLOAD);
    scene.key = fake_key(1, 7);
    cr_assert(put(&scene, 0, NULL) == BKV_OK && scene.daemon.plain == 1 && scene.daemon.share.attaches == 0);
    scene_end(&scene);
}

Test(link, named_and_not_to_be_had) {
    scene_t scene;
    bkv_error_t err = {0};
    bkv_record_t record;
    scene_make(&scene, "shm", WINDOW);
    scene.daemon.no_attach = true;
    for (int i = 0; i < 2; i++) {
        cr_assert(put(&scene, 0, &err) == BKV_UNIMPLEMENTED, "%s", err.message);
        cr_assert(strcmp(err.message, "transport: shm: switched off") == 0, "%s", err.message);
    }
    cr_assert(bkv_get(scene.client, &scene.id, &scene.key, 1, NULL, 0, &record, &err) == BKV_UNIMPLEMENTED);
    cr_assert(record.status == BKV_UNIMPLEMENTED && scene.daemon.share.attaches == 1 && scene.daemon.puts == 0);
    void *buffer = bkv_buffer_get(scene.client, PAYLOAD); // memory all the same
    cr_assert(buffer != NULL);
    bkv_buffer_put(scene.client, buffer);
    scene_end(&scene);
}

Test(link, named_and_on_the_wrong_road) {
    bkv_client_t *client = NULL;
    bkv_client_options_t options = {.endpoint = "127.0.0.1:9", .transport = "shm"};
    bkv_spec_id_t id = fake_spec_id();
    bkv_key_t key = fake_key(1, 1);
    uint8_t payload[100] = {0};
    bkv_error_t err = {0};
    cr_assert(bkv_client_create(&options, &client, &err) == BKV_OK);
    cr_assert(placing_put(client, &id, &key, payload, sizeof payload, 1, 1000, NULL, &err) == BKV_UNIMPLEMENTED);
    cr_assert(strstr(err.message, "not reached by a unix socket") != NULL, "%s", err.message);
    bkv_client_destroy(client);
}

static void *serve_again(void *argument) {
    scene_t *scene = argument;
    usleep(300000);
    scene->daemon.busy = false;
    return NULL;
}

Test(link, named_waits_for_a_daemon_that_is_busy) {
    scene_t scene;
    pthread_t thread;
    bkv_error_t err = {0};
    scene_make(&scene, "shm", WINDOW);
    scene.daemon.busy = true;
    uint64_t start = fake_now_ms();
    bkv_status_t status = put(&scene, 300, &err); // whichever comes first: the last pause too many, or the deadline
    cr_assert(status == BKV_BUSY || status == BKV_DEADLINE_EXCEEDED);
    cr_assert(strstr(err.message, "draining") != NULL, "%s", err.message);
    cr_assert(fake_now_ms() - start < 5000);
    pthread_create(&thread, NULL, serve_again, &scene);
    cr_assert(put(&scene, 0, &err) == BKV_OK, "%s", err.message);
    cr_assert(scene.daemon.placed == 1);
    pthread_join(thread, NULL);
    scene_end(&scene);
}

// ---- fd sockets that lie ----

static const struct {
    const char *message;
} expected[SHARE_LIES] = {
    [SHARE_NO_DESCRIPTOR] = {"no descriptor"},
    [SHARE_NOT_SEALED] = {"not sealed"},
    [SHARE_TOO_SMALL] = {"smaller than"},
    [SHARE_OTHER_SIZE] = {"by one answer"},
    [SHARE_OTHER_SESSION] = {"not an answer to what was asked"},
    [SHARE_OTHER_OP] = {"not an answer to what was asked"},
    [SHARE_SHORT] = {"not an answer"},
    [SHARE_HANGS_UP] = {"fd socket:"},
    [SHARE_REFUSES] = {"fd socket: xxxx"},
};

Test(link, fd_sockets_that_lie) {
    for (share_lie_t lie = SHARE_NO_DESCRIPTOR; lie < SHARE_LIES; lie++) {
        scene_t scene;
        bkv_error_t err = {0};
        if (lie == SHARE_SILENT) {
            continue;
        }
        scene_make(&scene, "shm", WINDOW);
        scene.daemon.share.lie = (int)lie;
        cr_assert(put(&scene, 0, &err) == BKV_UNIMPLEMENTED, "lie %d: %s", lie, err.message);
        cr_assert(strstr(err.message, expected[lie].message) != NULL, "lie %d: %s", lie, err.message);
        cr_assert(scene.daemon.share.takes == 1 && scene.daemon.share.detaches == 1, "the session is not left behind");
        scene_end(&scene);
    }
}

Test(link, no_fd_socket) {
    scene_t scene;
    bkv_error_t err = {0};
    scene_make(&scene, "shm", WINDOW);
    unlink(scene.daemon.share.path);
    cr_assert(put(&scene, 0, &err) == BKV_UNIMPLEMENTED && strstr(err.message, ".fd: No such file") != NULL, "%s", err.message);
    scene_end(&scene);
}

// ---- waiting ----

Test(link, a_silent_fd_socket_holds_up_nobody_for_long) {
    scene_t scene;
    bkv_error_t err = {0};
    scene_make(&scene, "auto", WINDOW);
    scene.daemon.share.lie = SHARE_SILENT;
    uint64_t start = fake_now_ms();
    cr_assert(put(&scene, 200, &err) == BKV_DEADLINE_EXCEEDED, "%s", err.message);
    uint64_t took = fake_now_ms() - start;
    cr_assert(took >= 190 && took < ATTACH_MS, "%llu ms", (unsigned long long)took);
    cr_assert(put(&scene, 0, &err) == BKV_OK, "%s", err.message); // when attaching was given up
    took = fake_now_ms() - start;
    cr_assert(scene.daemon.plain == 1 && took < ATTACH_MS + 4000, "%llu ms", (unsigned long long)took);
    start = fake_now_ms();
    cr_assert(put(&scene, 0, &err) == BKV_OK && fake_now_ms() - start < ATTACH_MS);
    scene_end(&scene);
}

static void *put_for_ever(void *argument) {
    scene_t *scene = argument;
    bkv_error_t err = {0};
    cr_assert(put(scene, 60000, &err) == BKV_CANCELLED, "%s", err.message);
    return NULL;
}

Test(link, destroy_waits_for_no_fd_socket) {
    scene_t scene;
    pthread_t thread;
    scene_make(&scene, "shm", WINDOW);
    scene.daemon.share.lie = SHARE_SILENT;
    pthread_create(&thread, NULL, put_for_ever, &scene);
    while (scene.daemon.share.takes == 0) {
        usleep(1000);
    }
    uint64_t start = fake_now_ms();
    bkv_client_destroy(scene.client);
    cr_assert(fake_now_ms() - start < ATTACH_MS);
    pthread_join(thread, NULL);
    placing_stop(&scene.daemon);
    free(scene.payload);
}

#define CALLS 8

Test(link, submitted_calls_wait_without_blocking) {
    scene_t scene;
    bkv_queue_t *queue;
    bkv_put_t puts[CALLS];
    bkv_put_result_t results[CALLS];
    bkv_completion_t done[CALLS];
    scene_make(&scene, "shm", WINDOW);
    scene.daemon.attach_ms = 1200;
    memset(scene.payload, 1, PAYLOAD);
    cr_assert(bkv_queue_create(scene.client, CALLS, &queue, NULL) == BKV_OK);
    uint64_t start = fake_now_ms();
    for (size_t i = 0; i < CALLS; i++) {
        puts[i] = (bkv_put_t){
            .key = fake_key(3, (uint8_t)i), .tokens = PLACING_TOKENS, .payload = scene.payload, .payload_bytes = PAYLOAD};
        cr_assert(bkv_put_submit(queue, i, &scene.id, &puts[i], 1, i == 0 ? 100 : 0, &results[i]) == BKV_OK);
    }
    cr_assert(fake_now_ms() - start < 1000, "submitting waits for nothing");
    cr_assert(bkv_queue_poll(queue, done, CALLS, 1000) == 1, "the one in a hurry is over first");
    cr_assert(done[0].tag == 0 && done[0].error.status == BKV_DEADLINE_EXCEEDED);
    for (size_t count = 1; count < CALLS;) {
        size_t now = bkv_queue_poll(queue, done, CALLS, 20000);
        cr_assert(now > 0);
        for (size_t i = 0; i < now; i++) {
            cr_assert(done[i].error.status == BKV_OK, "%s", done[i].error.message);
            cr_assert(results[done[i].tag].stored_bytes == PAYLOAD);
        }
        count += now;
    }
    cr_assert(scene.daemon.share.attaches == 1 && scene.daemon.placed == CALLS - 1);
    bkv_queue_destroy(queue);
    scene_end(&scene);
}

Test(link, cancelled_while_waiting) {
    scene_t scene;
    bkv_queue_t *queue;
    bkv_record_t record;
    scene_make(&scene, "shm", WINDOW);
    scene.daemon.attach_ms = 1200;
    cr_assert(bkv_queue_create(scene.client, 1, &queue, NULL) == BKV_OK);
    cr_assert(bkv_get_submit(queue, 1, &scene.id, &scene.key, 1, NULL, 0, &record) == BKV_OK);
    uint64_t start = fake_now_ms();
    bkv_queue_destroy(queue);
    cr_assert(fake_now_ms() - start < 1000 && record.data == NULL);
    cr_assert(put(&scene, 0, NULL) == BKV_OK && scene.daemon.placed == 1 && scene.daemon.gets == 0);
    scene_end(&scene);
}

// ---- bkv_transports ----

static const bkv_transport_info_t *find(const bkv_transport_info_t *info, const char *name) {
    for (size_t i = 0; i < BKV_TRANSPORTS; i++) {
        if (strcmp(info[i].name, name) == 0) {
            return &info[i];
        }
    }
    cr_assert(false, "no %s", name);
    return info;
}

Test(link, transports) {
    scene_t scene;
    bkv_transport_info_t info[BKV_TRANSPORTS];
    size_t count = 0;
    bkv_error_t err = {0};
    scene_make(&scene, "auto", WINDOW);
    cr_assert(bkv_transports(scene.client, 0, info, &count, &err) == BKV_OK && count == BKV_TRANSPORTS, "%s", err.message);
    const bkv_transport_info_t *shm = find(info, "shm"), *plain = find(info, "inline"), *verbs = find(info, "verbs");
    cr_assert(shm->offered && shm->usable && shm->chosen && shm->reason[0] == '\0');
    cr_assert(plain->offered && plain->usable && !plain->chosen);
    cr_assert(!verbs->offered && !verbs->usable && strcmp(verbs->reason, "not offered by the daemon") == 0);
    cr_assert(scene.daemon.share.attaches == 1 && scene.daemon.share.detaches == 1, "tried out, and given back");
    cr_assert(put(&scene, 0, NULL) == BKV_OK && scene.daemon.placed == 1);
    cr_assert(bkv_transports(scene.client, 0, info, &count, &err) == BKV_OK && find(info, "shm")->chosen);
    cr_assert(scene.daemon.share.attaches == 2, "what is in use is not tried out");
    scene_end(&scene);

    scene_make(&scene, "auto", WINDOW);
    scene.daemon.no_attach = true;
    cr_assert(bkv_transports(scene.client, 0, info, &count, &err) == BKV_OK);
    shm = find(info, "shm");
    cr_assert(shm->offered && !shm->usable && !shm->chosen && strcmp(shm->reason, "shm: switched off") == 0, "%s", shm->reason);
    cr_assert(find(info, "inline")->chosen);
    scene_end(&scene);
}
