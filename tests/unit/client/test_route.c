// Routing by key: every daemon is asked for what it owns, results come back in order, and what is not known, not there or not
// willing is gone round.
#include "herd.h"

#include <criterion/criterion.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define KEYS      64
#define SETTLE_MS 20000

typedef struct scene {
    herd_t herd;
    bkv_client_t *client;
    bkv_spec_id_t id;
    bkv_key_t keys[KEYS]; // of any first byte, but none of the first two is odd
} scene_t;

static bkv_key_t some_key(unsigned number) {
    bkv_key_t key = fake_key((uint8_t)(number * 2), (uint8_t)number);
    for (size_t i = 2; i < sizeof key.bytes; i++) {
        key.bytes[i] = (uint8_t)(number * 31 + i * 7);
    }
    return key;
}

// Only the first daemon is listed, unless `all` are.
static void scene_begin(scene_t *scene, uint32_t daemons, uint32_t replicas, bool all) {
    bkv_spec_t spec = fake_spec();
    bkv_error_t err = {0};
    herd_make(&scene->herd, daemons, true);
    scene->herd.replicas = replicas;
    scene->herd.members = daemons;
    scene->herd.seed = 42;
    for (uint32_t i = 0; i < daemons; i++) {
        herd_start(&scene->herd, i);
    }
    for (unsigned i = 0; i < KEYS; i++) {
        scene->keys[i] = some_key(i);
    }
    bkv_client_options_t options = {.endpoint = all ? scene->herd.endpoints : scene->herd.daemons[0].endpoint,
                                    .timeout_ms = 15000,
                                    .transport = "inline",
                                    .route = true};
    cr_assert(bkv_client_create(&options, &scene->client, &err) == BKV_OK, "%s", err.message);
    cr_assert(bkv_open(scene->client, &spec, 0, &scene->id, NULL, &err) == BKV_OK, "%s", err.message);
}

static void scene_end(scene_t *scene) {
    bkv_client_destroy(scene->client);
    herd_end(&scene->herd);
}

static void look_up_all(scene_t *scene) {
    bool resident[KEYS];
    size_t prefix = 0;
    bkv_error_t err = {0};
    memset(resident, 0, sizeof resident);
    cr_assert(bkv_lookup(scene->client, &scene->id, scene->keys, KEYS, 0, resident, &prefix, &err) == BKV_OK, "%s",
              err.message);
    cr_assert(prefix == KEYS);
    for (size_t i = 0; i < KEYS; i++) {
        cr_assert(resident[i]);
    }
}

static unsigned keys_asked(scene_t *scene) {
    unsigned keys = 0;
    for (uint32_t i = 0; i < scene->herd.count; i++) {
        keys += scene->herd.daemons[i].keys;
    }
    return keys;
}

static void forget_counts(scene_t *scene) {
    for (uint32_t i = 0; i < scene->herd.count; i++) {
        scene->herd.daemons[i].keys = scene->herd.daemons[i].strays = scene->herd.daemons[i].lookups = 0;
        scene->herd.daemons[i].gets = 0;
    }
}

// Calls until every key goes to its owner, and forgets the counts.
static void settle(scene_t *scene) {
    uint64_t start = fake_now_ms();
    bool settled = false;
    while (!settled) {
        cr_assert(fake_now_ms() - start < SETTLE_MS, "keys do not go to their owners");
        forget_counts(scene);
        look_up_all(scene);
        settled = true;
        for (uint32_t i = 0; i < scene->herd.members; i++) {
            settled = settled && scene->herd.daemons[i].keys > 0 && scene->herd.daemons[i].strays == 0;
        }
        usleep(1000);
    }
    forget_counts(scene);
}

Test(route, lookups_go_to_the_owners) {
    scene_t scene;
    scene_begin(&scene, 3, 2, false);
    settle(&scene);
    look_up_all(&scene);
    cr_assert(keys_asked(&scene) == KEYS);
    for (int i = 0; i < 3; i++) {
        cr_assert(scene.herd.daemons[i].lookups == 1 && scene.herd.daemons[i].strays == 0 && scene.herd.daemons[i].opens == 1);
    }
    cr_assert(scene.herd.daemons[0].clusters == 1 && scene.herd.daemons[1].clusters == 0, "asked once");
    scene_end(&scene);
}

// What is not there is told by its place in the whole.
Test(route, absent_keys_are_told_in_order) {
    scene_t scene;
    bool resident[KEYS];
    size_t prefix = 99;
    bkv_error_t err = {0};
    scene_begin(&scene, 3, 1, false);
    settle(&scene);
    scene.keys[17].bytes[0]++;
    scene.keys[40].bytes[0]++;
    cr_assert(bkv_lookup(scene.client, &scene.id, scene.keys, KEYS, 0, resident, &prefix, &err) == BKV_OK, "%s", err.message);
    cr_assert(prefix == 17, "%zu", prefix);
    for (size_t i = 0; i < KEYS; i++) {
        cr_assert(resident[i] == (i != 17 && i != 40));
    }
    cr_assert(bkv_lookup(scene.client, &scene.id, scene.keys, KEYS, 0, NULL, NULL, NULL) == BKV_OK);
    scene_end(&scene);
}

static void check_record(bkv_record_t *record, const bkv_key_t *key) {
    size_t length;
    void *expected = fake_record(key, 16, &length);
    cr_assert(record->status == BKV_OK && record->length == length && memcmp(record->data, expected, length) == 0);
    cr_assert(memcmp(record->key.bytes, key->bytes, sizeof key->bytes) == 0);
    free(expected);
    bkv_record_free(record);
}

Test(route, records_come_back_in_order) {
    scene_t scene;
    bkv_record_t records[KEYS];
    bkv_error_t err = {0};
    scene_begin(&scene, 3, 2, false);
    settle(&scene);
    cr_assert(bkv_get(scene.client, &scene.id, scene.keys, KEYS, NULL, 0, records, &err) == BKV_OK, "%s", err.message);
    for (size_t i = 0; i < KEYS; i++) {
        check_record(&records[i], &scene.keys[i]);
    }
    for (int i = 0; i < 3; i++) {
        cr_assert(scene.herd.daemons[i].gets == 1 && scene.herd.daemons[i].strays == 0);
    }
    scene.keys[50].bytes[0]++;
    scene.keys[23].bytes[0]++;
    cr_assert(bkv_get(scene.client, &scene.id, scene.keys, KEYS, NULL, 0, records, &err) == BKV_NOT_FOUND);
    cr_assert(strncmp(err.message, "keys[23]: ", 10) == 0, "%s", err.message);
    for (size_t i = 0; i < KEYS; i++) {
        if (i == 23 || i == 50) {
            cr_assert(records[i].status == BKV_NOT_FOUND && records[i].data == NULL);
        } else {
            check_record(&records[i], &scene.keys[i]);
        }
    }
    scene_end(&scene);
}

Test(route, asynchronous) {
    scene_t scene;
    bkv_record_t records[8][KEYS];
    bkv_queue_t *queue = NULL;
    bkv_completion_t done;
    scene_begin(&scene, 3, 2, false);
    settle(&scene);
    cr_assert(bkv_queue_create(scene.client, 8, &queue, NULL) == BKV_OK);
    for (uint64_t i = 0; i < 8; i++) {
        cr_assert(bkv_get_submit(queue, i, &scene.id, scene.keys, KEYS, NULL, 0, records[i]) == BKV_OK);
    }
    cr_assert(bkv_lookup_submit(queue, 9, &scene.id, scene.keys, KEYS, 0, NULL, NULL) == BKV_BUSY, "a call in parts is one");
    for (int i = 0; i < 8; i++) {
        cr_assert(bkv_queue_poll(queue, &done, 1, 20000) == 1 && done.error.status == BKV_OK, "%s", done.error.message);
        for (size_t j = 0; j < KEYS; j++) {
            check_record(&records[done.tag][j], &scene.keys[j]);
        }
    }
    bkv_queue_destroy(queue);
    scene_end(&scene);
}

// One key: its owner alone. A key of an owner that is dead: the next owner, and when that is dead, too, whoever is listed.
Test(route, dead_owners) {
    scene_t scene;
    scene_begin(&scene, 3, 2, false);
    settle(&scene);
    herd_stop(&scene.herd, 1);
    look_up_all(&scene);
    cr_assert(scene.herd.daemons[0].keys + scene.herd.daemons[2].keys == KEYS);
    forget_counts(&scene);
    herd_stop(&scene.herd, 2);
    look_up_all(&scene);
    look_up_all(&scene);
    cr_assert(scene.herd.daemons[0].keys == 2 * KEYS);
    herd_start(&scene.herd, 1);
    herd_start(&scene.herd, 2);
    settle(&scene);
    scene_end(&scene);
}

Test(route, silent_owner) {
    scene_t scene;
    scene_begin(&scene, 3, 2, false);
    settle(&scene);
    scene.herd.daemons[2].mood = HERD_MUTE;
    uint64_t start = fake_now_ms();
    look_up_all(&scene);
    cr_assert(fake_now_ms() - start < 10000);
    forget_counts(&scene);
    start = fake_now_ms();
    look_up_all(&scene);
    cr_assert(fake_now_ms() - start < 5000 && scene.herd.daemons[2].lookups == 0, "it is known by now");
    scene.herd.daemons[2].mood = HERD_SERVES;
    settle(&scene);
    scene_end(&scene);
}

// The members change: soon after one of them went down, they are asked for again.
Test(route, the_view_changes) {
    scene_t scene;
    scene_begin(&scene, 4, 1, false);
    settle(&scene);
    scene.herd.members = 3;
    scene.herd.view++;
    herd_stop(&scene.herd, 3);
    look_up_all(&scene);
    settle(&scene);
    cr_assert(scene.herd.daemons[0].clusters >= 2);
    scene_end(&scene);
}

Test(route, no_cluster) {
    scene_t scene;
    scene_begin(&scene, 2, 0, true);
    for (int i = 0; i < 5; i++) {
        look_up_all(&scene);
    }
    cr_assert_eq(scene.herd.daemons[0].keys, 5 * KEYS);
    for (uint64_t start = fake_now_ms(); scene.herd.daemons[0].clusters == 0 && fake_now_ms() - start < SETTLE_MS;) {
        usleep(1000); // nobody waits for the answer
    }
    cr_assert_eq(scene.herd.daemons[0].clusters, 1, "asked once");
    scene_end(&scene);
}

// A member that is listed is reached by that endpoint, and not by another.
Test(route, listed_members) {
    scene_t scene;
    scene_begin(&scene, 3, 2, true);
    settle(&scene);
    for (int i = 0; i < 3; i++) {
        cr_assert(scene.herd.daemons[i].opens == 1, "by another endpoint the spec would have been opened again");
    }
    scene_end(&scene);
}

// Without a daemon on this host a Put goes to the owner.
Test(route, puts) {
    scene_t scene;
    static uint8_t payload[1024];
    bkv_put_result_t result;
    bkv_error_t err = {0};
    scene_begin(&scene, 3, 1, false);
    settle(&scene);
    for (size_t i = 0; i < KEYS; i++) {
        bkv_put_t put = {.key = scene.keys[i], .tokens = 16, .payload = payload, .payload_bytes = sizeof payload};
        cr_assert(bkv_put(scene.client, &scene.id, &put, 1, 0, &result, &err) == BKV_OK, "%s", err.message);
    }
    unsigned first = scene.herd.daemons[0].puts, second = scene.herd.daemons[1].puts, third = scene.herd.daemons[2].puts;
    cr_assert(first > 5 && second > 5 && third > 5 && first + second + third == KEYS, "%u, %u, %u", first, second, third);
    scene_end(&scene);
}

// ---- what daemons may say ----

typedef struct liar {
    fake_place_t place;
    atomic_int lie;
    atomic_uint lookups, clusters;
} liar_t;

static void lie(fake_call_t *call, void *user) {
    liar_t *liar = user;
    if (fake_is(call, "Open")) {
        fake_open(call, 1);
    } else if (fake_is(call, "Lookup")) {
        atomic_fetch_add(&liar->lookups, 1);
        fake_lookup(call, 1);
    } else if (fake_is(call, "Cluster")) {
        char id[100], domain[100] = "", other[] = "b";
        char *address = (char *)(liar->lie == 4 ? "unix:/etc/passwd" : "127.0.0.1:1");
        Balancekv__V1__ClusterMember members[2], *list[2] = {&members[0], &members[1]};
        Balancekv__V1__ClusterResponse response = BALANCEKV__V1__CLUSTER_RESPONSE__INIT;
        memset(id, 'a', sizeof id);
        id[liar->lie == 0 ? 99 : 1] = '\0';
        for (int i = 0; i < 2; i++) {
            balancekv__v1__cluster_member__init(&members[i]);
            members[i].id = i == 0 ? id : liar->lie == 1 ? id : other;
            members[i].domain = domain;
            members[i].weight = liar->lie == 2 ? UINT32_MAX : 1;
            members[i].addresses = &address;
            members[i].n_addresses = liar->lie == 5 ? 0 : 1;
        }
        response.self = other;
        response.members = list;
        response.n_members = liar->lie == 3 ? 0 : 2;
        response.replicas = liar->lie == 6 ? 99 : 1;
        response.seed = 1;
        fake_write(call, &response.base);
        fake_finish(call, GRPC_STATUS_OK, "");
        atomic_fetch_add(&liar->clusters, 1);
    } else {
        fake_finish(call, GRPC_STATUS_UNIMPLEMENTED, "nothing else");
    }
}

// An id too long, one twice, a weight beyond all bounds, nobody, an address on this host, none, too many replicas: all keys go to
// the daemon that is listed.
Test(route, lies) {
    for (int i = 0; i < 7; i++) {
        static liar_t liar;
        bkv_client_t *client = NULL;
        bkv_error_t err = {0};
        bkv_spec_id_t id;
        bkv_spec_t spec = fake_spec();
        memset(&liar, 0, sizeof liar);
        liar.lie = i;
        fake_place_make(&liar.place);
        fake_server_t *server = fake_server_start(liar.place.endpoint, lie, &liar);
        bkv_client_options_t options = {.endpoint = liar.place.endpoint, .transport = "inline", .route = true};
        cr_assert(bkv_client_create(&options, &client, &err) == BKV_OK, "%s", err.message);
        cr_assert(bkv_open(client, &spec, 0, &id, NULL, &err) == BKV_OK, "%s", err.message);
        for (unsigned j = 0; j < 40; j++) {
            bkv_key_t key = some_key(j);
            cr_assert(bkv_lookup(client, &id, &key, 1, 0, NULL, NULL, &err) == BKV_OK, "%s", err.message);
            while (j == 0 && liar.clusters == 0) {
                usleep(1000);
            }
        }
        cr_assert(liar.lookups == 40);
        bkv_client_destroy(client);
        fake_server_stop(server);
        fake_place_remove(&liar.place);
    }
}

// ---- the end ----

static void *look_up_in_vain(void *argument) {
    scene_t *scene = argument;
    return (void *)(intptr_t)bkv_lookup(scene->client, &scene->id, scene->keys, KEYS, 60000, NULL, NULL, NULL);
}

Test(route, destroyed_under_way) {
    for (unsigned ms = 0; ms < 900; ms += 300) {
        scene_t scene;
        pthread_t threads[3];
        scene_begin(&scene, 3, 2, true);
        settle(&scene);
        for (int i = 0; i < 3; i++) {
            scene.herd.daemons[i].mood = HERD_MUTE;
        }
        for (int i = 0; i < 3; i++) {
            cr_assert(pthread_create(&threads[i], NULL, look_up_in_vain, &scene) == 0);
        }
        while (scene.herd.daemons[0].lookups + scene.herd.daemons[1].lookups + scene.herd.daemons[2].lookups < 9) {
            usleep(1000);
        }
        usleep(ms * 1000);
        bkv_queue_t *queue = NULL;
        bkv_record_t records[KEYS];
        cr_assert(bkv_queue_create(scene.client, 2, &queue, NULL) == BKV_OK);
        cr_assert(bkv_get_submit(queue, 1, &scene.id, scene.keys, KEYS, NULL, 0, records) == BKV_OK);
        bkv_queue_destroy(queue);
        for (size_t i = 0; i < KEYS; i++) {
            cr_assert(records[i].status == BKV_CANCELLED && records[i].data == NULL);
        }
        bkv_client_destroy(scene.client);
        for (int i = 0; i < 3; i++) {
            void *status;
            pthread_join(threads[i], &status);
            cr_assert((bkv_status_t)(intptr_t)status == BKV_CANCELLED);
        }
        herd_end(&scene.herd);
    }
}
