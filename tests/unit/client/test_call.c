// Calls: statuses, deadlines, retries, cancelling, concurrency; against a server that says what the test wants.
#include "fake.h"

#include <criterion/criterion.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

// What the server does with Lookups, and how many came.
typedef struct script {
    atomic_uint lookups;
    unsigned busy_first; // so many are answered UNAVAILABLE
    atomic_int code;     // grpc_status_code
    const char *message;
    bool hang;
} script_t;

static void play(fake_call_t *call, void *user) {
    script_t *script = user;
    unsigned number = atomic_fetch_add(&script->lookups, 1);
    if (script->hang) {
        return;
    }
    if (number < script->busy_first) {
        fake_finish(call, GRPC_STATUS_UNAVAILABLE, "jobs: 1024 are waiting");
    } else if (script->code != (int)GRPC_STATUS_OK) {
        fake_finish(call, (grpc_status_code)script->code, script->message);
    } else {
        fake_lookup(call, 1);
    }
}

static bkv_status_t lookup_one(bkv_client_t *client, uint32_t timeout_ms, bool *resident, bkv_error_t *err) {
    bkv_spec_id_t id = fake_spec_id();
    bkv_key_t key = fake_key(2, 0);
    return bkv_lookup(client, &id, &key, 1, timeout_ms, resident, NULL, err);
}

Test(call, lookup) {
    fake_place_t place;
    script_t script = {0};
    fake_place_make(&place);
    fake_server_t *server = fake_server_start(place.endpoint, play, &script);
    bkv_client_t *client = fake_client(&place, 0);
    bkv_spec_id_t id = fake_spec_id();
    bkv_key_t keys[5] = {fake_key(0, 1), fake_key(2, 1), fake_key(1, 1), fake_key(4, 1), fake_key(3, 1)};
    bool resident[5];
    size_t prefix = 9;
    bkv_error_t err = {0};
    cr_assert(bkv_lookup(client, &id, keys, 5, 0, resident, &prefix, &err) == BKV_OK, "%s", err.message);
    cr_assert(resident[0] && resident[1] && !resident[2] && resident[3] && !resident[4]);
    cr_assert(prefix == 2);
    cr_assert(bkv_lookup(client, &id, keys, 5, 0, NULL, NULL, NULL) == BKV_OK);
    cr_assert(bkv_lookup(client, &id, keys, 0, 0, NULL, NULL, &err) == BKV_INVALID_ARGUMENT);
    bkv_client_destroy(client);
    fake_server_stop(server);
    fake_place_remove(&place);
}

Test(call, busy_is_tried_again) {
    fake_place_t place;
    script_t script = {.busy_first = 3};
    fake_place_make(&place);
    fake_server_t *server = fake_server_start(place.endpoint, play, &script);
    bkv_client_t *client = fake_client(&place, 0);
    bool resident = false;
    bkv_error_t err = {0};
    cr_assert(lookup_one(client, 5000, &resident, &err) == BKV_OK, "%s", err.message);
    cr_assert(resident && script.lookups == 4);
    bkv_client_destroy(client);
    fake_server_stop(server);
    fake_place_remove(&place);
}

Test(call, busy_to_the_end) {
    fake_place_t place;
    script_t script = {.busy_first = 1000000};
    fake_place_make(&place);
    fake_server_t *server = fake_server_start(place.endpoint, play, &script);
    bkv_client_t *client = fake_client(&place, 0);
    bkv_error_t err = {0};
    uint64_t start = fake_now_ms();
    cr_assert(lookup_one(client, 1000, NULL, &err) == BKV_BUSY);
    cr_assert(fake_now_ms() - start < 5000);
    cr_assert(strstr(err.message, "jobs: 1024 are waiting") != NULL, "%s", err.message);
    cr_assert(script.lookups > 2 && script.lookups < 60, "%u attempts", script.lookups);
    bkv_client_destroy(client);
    fake_server_stop(server);
    fake_place_remove(&place);
}

Test(call, deadline) {
    fake_place_t place;
    script_t script = {.hang = true};
    fake_place_make(&place);
    fake_server_t *server = fake_server_start(place.endpoint, play, &script);
    bkv_client_t *client = fake_client(&place, 200);
    bkv_error_t err = {0};
    uint64_t start = fake_now_ms();
    cr_assert(lookup_one(client, 300, NULL, &err) == BKV_DEADLINE_EXCEEDED);
    cr_assert(fake_now_ms() - start >= 290 && fake_now_ms() - start < 5000);
    cr_assert(strstr(err.message, "300 ms") != NULL, "%s", err.message);
    cr_assert(lookup_one(client, 0, NULL, &err) == BKV_DEADLINE_EXCEEDED, "the client's default");
    cr_assert(strstr(err.message, "200 ms") != NULL, "%s", err.message);
    bkv_client_destroy(client);
    fake_server_stop(server);
    fake_place_remove(&place);
}

Test(call, nobody_listens) {
    fake_place_t place;
    fake_place_make(&place);
    bkv_client_t *client = fake_client(&place, 0);
    bkv_error_t err = {0};
    uint64_t start = fake_now_ms();
    cr_assert(lookup_one(client, 1000, NULL, &err) == BKV_BUSY);
    cr_assert(fake_now_ms() - start < 5000);
    cr_assert(strstr(err.message, "socket") != NULL, "no cause in: %s", err.message);
    // A ping says so at once.
    start = fake_now_ms();
    cr_assert(bkv_ping(client, 20000, NULL, &err) == BKV_BUSY);
    cr_assert(fake_now_ms() - start < 5000);
    bkv_client_destroy(client);
    fake_place_remove(&place);
}

typedef struct late {
    fake_place_t place;
    script_t script;
    fake_server_t *server;
} late_t;

static void *start_late(void *argument) {
    late_t *late = argument;
    usleep(300000);
    late->server = fake_server_start(late->place.endpoint, play, &late->script);
    return NULL;
}

Test(call, daemon_comes_late) {
    late_t late = {0};
    fake_place_make(&late.place);
    bkv_client_t *client = fake_client(&late.place, 0);
    pthread_t thread;
    cr_assert(pthread_create(&thread, NULL, start_late, &late) == 0);
    bkv_error_t err = {0};
    uint64_t start = fake_now_ms();
    cr_assert(lookup_one(client, 20000, NULL, &err) == BKV_OK, "%s", err.message);
    cr_assert(fake_now_ms() - start < 10000, "found after %d ms", (int)(fake_now_ms() - start));
    pthread_join(thread, NULL);
    bkv_client_destroy(client);
    fake_server_stop(late.server);
    fake_place_remove(&late.place);
}

Test(call, statuses_come_back) {
    static const struct {
        grpc_status_code code;
        bkv_status_t status;
    } cases[] = {
        {GRPC_STATUS_CANCELLED, BKV_CANCELLED},
        {GRPC_STATUS_UNKNOWN, BKV_INTERNAL},
        {GRPC_STATUS_INVALID_ARGUMENT, BKV_INVALID_ARGUMENT},
        {GRPC_STATUS_DEADLINE_EXCEEDED, BKV_DEADLINE_EXCEEDED},
        {GRPC_STATUS_NOT_FOUND, BKV_NOT_FOUND},
        {GRPC_STATUS_ALREADY_EXISTS, BKV_ALREADY_EXISTS},
        {GRPC_STATUS_PERMISSION_DENIED, BKV_PERMISSION_DENIED},
        {GRPC_STATUS_RESOURCE_EXHAUSTED, BKV_RESOURCE_EXHAUSTED},
        {GRPC_STATUS_FAILED_PRECONDITION, BKV_FAILED_PRECONDITION},
        {GRPC_STATUS_ABORTED, BKV_INTERNAL},
        {GRPC_STATUS_OUT_OF_RANGE, BKV_INTERNAL},
        {GRPC_STATUS_UNIMPLEMENTED, BKV_UNIMPLEMENTED},
        {GRPC_STATUS_INTERNAL, BKV_INTERNAL},
        {GRPC_STATUS_DATA_LOSS, BKV_DATA_LOSS},
        {GRPC_STATUS_UNAUTHENTICATED, BKV_UNAUTHENTICATED},
    };
    fake_place_t place;
    script_t script = {.message = "tokens: 7 \x1b[31mred\x7f\nis wrong"};
    fake_place_make(&place);
    fake_server_t *server = fake_server_start(place.endpoint, play, &script);
    bkv_client_t *client = fake_client(&place, 0);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        bkv_error_t err = {0};
        script.code = (int)cases[i].code;
        cr_assert(lookup_one(client, 0, NULL, &err) == cases[i].status, "code %d", cases[i].code);
        cr_assert(err.status == cases[i].status);
        cr_assert(strcmp(err.message, "tokens: 7  [31mred  is wrong") == 0, "%s", err.message);
    }
    cr_assert(script.lookups == sizeof cases / sizeof cases[0], "none is tried again");
    bkv_client_destroy(client);
    fake_server_stop(server);
    fake_place_remove(&place);
}

// ---- wrong answers ----

static void answer_wrongly(fake_call_t *call, void *user) {
    (void)user;
    Balancekv__V1__LookupResponse response = BALANCEKV__V1__LOOKUP_RESPONSE__INIT;
    if (fake_is(call, "Lookup")) { // no states
        fake_write(call, &response.base);
    } else if (fake_is(call, "Stats")) { // bytes that are no message
        fake_write_bytes(call, "\xff\xff\xff", 3);
    } // Unpin: OK, but nothing at all
    fake_finish(call, GRPC_STATUS_OK, "");
}

Test(call, wrong_answers) {
    fake_place_t place;
    fake_place_make(&place);
    fake_server_t *server = fake_server_start(place.endpoint, answer_wrongly, NULL);
    bkv_client_t *client = fake_client(&place, 0);
    bkv_error_t err = {0};
    cr_assert(lookup_one(client, 0, NULL, &err) == BKV_INTERNAL);
    cr_assert(strstr(err.message, "0 states for 1 keys") != NULL, "%s", err.message);
    bkv_stats_t *stats = NULL;
    cr_assert(bkv_stats_get(client, 0, &stats, &err) == BKV_INTERNAL && stats == NULL);
    cr_assert(bkv_unpin(client, 1, 0, &err) != BKV_OK);
    bkv_client_destroy(client);
    fake_server_stop(server);
    fake_place_remove(&place);
}

// ---- the other operations ----

static void serve_all(fake_call_t *call, void *user) {
    atomic_uint *unpins = user;
    if (fake_is(call, "Pin")) {
        Balancekv__V1__PinResponse response = BALANCEKV__V1__PIN_RESPONSE__INIT;
        response.lease = 77;
        fake_write(call, &response.base);
    } else if (fake_is(call, "Unpin")) {
        // The first answer gets lost, and the lease has gone when it is tried again.
        fake_finish(call, atomic_fetch_add(unpins, 1) == 0 ? GRPC_STATUS_UNAVAILABLE : GRPC_STATUS_NOT_FOUND, "lease: 77");
        return;
    } else if (fake_is(call, "Drop")) {
        Balancekv__V1__DropRequest *request = fake_read(call, &balancekv__v1__drop_request__descriptor);
        Balancekv__V1__DropResponse response = BALANCEKV__V1__DROP_RESPONSE__INIT;
        response.dropped = (uint32_t)request->n_keys;
        fake_write(call, &response.base);
        balancekv__v1__drop_request__free_unpacked(request, NULL);
    } else if (fake_is(call, "Stats")) {
        char name[] = "balancekv_hits_total", help[] = "hits";
        Balancekv__V1__Metric metric = BALANCEKV__V1__METRIC__INIT, *list[1] = {&metric};
        Balancekv__V1__StatsResponse response = BALANCEKV__V1__STATS_RESPONSE__INIT;
        metric.name = name;
        metric.help = help;
        metric.counter = true;
        metric.value = 12.5;
        response.n_metrics = 1;
        response.metrics = list;
        response.uptime_ms = 99;
        response.boot_epoch = 5;
        fake_write(call, &response.base);
    } else if (fake_is(call, "Check")) {
        fake_write_bytes(call, "\x08\x01", 2); // status: SERVING
    } else if (fake_is(call, "Attend")) {
        Balancekv__V1__AttendRequest *request = fake_read(call, &balancekv__v1__attend_request__descriptor);
        Balancekv__V1__AttendResponse response = BALANCEKV__V1__ATTEND_RESPONSE__INIT;
        response.output = request->q; // key_dim == value_dim
        response.lse = (ProtobufCBinaryData){.len = request->q.len / 8, .data = request->q.data};
        fake_write(call, &response.base);
        balancekv__v1__attend_request__free_unpacked(request, NULL);
    }
    fake_finish(call, GRPC_STATUS_OK, "");
}

Test(call, other_operations) {
    fake_place_t place;
    atomic_uint unpins = 0;
    fake_place_make(&place);
    fake_server_t *server = fake_server_start(place.endpoint, serve_all, &unpins);
    bkv_client_t *client = fake_client(&place, 0);
    bkv_spec_id_t id = fake_spec_id();
    bkv_key_t keys[2] = {fake_key(1, 1), fake_key(1, 2)};
    bkv_error_t err = {0};
    uint64_t lease = 0, round_trip = 0;
    size_t dropped = 0;
    cr_assert(bkv_pin(client, &id, keys, 2, 1000, 0, &lease, &err) == BKV_OK && lease == 77, "%s", err.message);
    cr_assert(bkv_unpin(client, lease, 0, &err) == BKV_OK && unpins == 2, "%s", err.message);
    cr_assert(bkv_unpin(client, lease, 0, &err) == BKV_NOT_FOUND);
    cr_assert(bkv_drop(client, &id, keys, 2, 0, &dropped, &err) == BKV_OK && dropped == 2, "%s", err.message);
    cr_assert(bkv_ping(client, 0, &round_trip, &err) == BKV_OK && round_trip > 0, "%s", err.message);
    bkv_stats_t *stats = NULL;
    cr_assert(bkv_stats_get(client, 0, &stats, &err) == BKV_OK, "%s", err.message);
    cr_assert(stats->count == 1 && stats->uptime_ms == 99 && stats->boot_epoch == 5 && !stats->draining);
    cr_assert(strcmp(stats->metrics[0].name, "balancekv_hits_total") == 0 && stats->metrics[0].counter);
    cr_assert(stats->metrics[0].value == 12.5 && strcmp(stats->metrics[0].help, "hits") == 0);
    bkv_stats_free(stats);

    float q[2 * 4 * 8], out[2 * 4 * 8], lse[2 * 4];
    for (size_t i = 0; i < 64; i++) {
        q[i] = (float)i;
    }
    bkv_attend_args_t args = {.layers = 2, .query_heads = 4, .queries = 1, .q = q, .out = out, .lse = lse};
    cr_assert(bkv_attend_remote(client, &id, keys, 2, &args, 2, 8, 8, 0, &err) == BKV_OK, "%s", err.message);
    cr_assert(memcmp(out, q, sizeof q) == 0 && memcmp(lse, q, sizeof lse) == 0);
    cr_assert(bkv_attend_remote(client, &id, keys, 2, &args, 2, 8, 4, 0, &err) == BKV_INTERNAL, "other sizes than asked");
    cr_assert(bkv_attend_remote(client, &id, keys, 2, &args, 3, 8, 8, 0, &err) == BKV_INVALID_ARGUMENT);
    args.queries = 1u << 19;
    args.query_heads = 1024;
    cr_assert(bkv_attend_remote(client, &id, keys, 2, &args, 2, 1024, 8, 0, &err) == BKV_INVALID_ARGUMENT, "too much");
    bkv_client_destroy(client);
    fake_server_stop(server);
    fake_place_remove(&place);
}

// ---- threads, and the end ----

static void *look_up_often(void *client) {
    for (int i = 0; i < 100; i++) {
        bool resident = false;
        cr_assert(lookup_one(client, 0, &resident, NULL) == BKV_OK && resident);
    }
    return NULL;
}

Test(call, many_threads) {
    fake_place_t place;
    script_t script = {.busy_first = 20};
    fake_place_make(&place);
    fake_server_t *server = fake_server_start(place.endpoint, play, &script);
    bkv_client_t *client = fake_client(&place, 30000);
    pthread_t threads[8];
    for (size_t i = 0; i < 8; i++) {
        cr_assert(pthread_create(&threads[i], NULL, look_up_often, client) == 0);
    }
    for (size_t i = 0; i < 8; i++) {
        pthread_join(threads[i], NULL);
    }
    cr_assert(script.lookups == 820);
    bkv_client_destroy(client);
    fake_server_stop(server);
    fake_place_remove(&place);
}

typedef struct waiter {
    bkv_client_t *client;
    bkv_status_t status;
} waiter_t;

static void *wait_long(void *argument) {
    waiter_t *waiter = argument;
    waiter->status = lookup_one(waiter->client, 60000, NULL, NULL);
    return NULL;
}

// hang: calls wait for the server; else they are in the pause between two attempts.
static void destroy_under_calls(bool hang) {
    fake_place_t place;
    script_t script = {.hang = hang, .busy_first = 1000000};
    fake_place_make(&place);
    fake_server_t *server = fake_server_start(place.endpoint, play, &script);
    waiter_t waiters[4];
    pthread_t threads[4];
    bkv_client_t *client = fake_client(&place, 0);
    for (size_t i = 0; i < 4; i++) {
        waiters[i] = (waiter_t){.client = client, .status = BKV_OK};
        cr_assert(pthread_create(&threads[i], NULL, wait_long, &waiters[i]) == 0);
    }
    while (script.lookups < (hang ? 4 : 20)) {
        usleep(1000);
    }
    uint64_t start = fake_now_ms();
    bkv_client_destroy(client);
    cr_assert(fake_now_ms() - start < 5000);
    for (size_t i = 0; i < 4; i++) {
        pthread_join(threads[i], NULL);
        cr_assert(waiters[i].status == BKV_CANCELLED, "%s", bkv_status_name(waiters[i].status));
    }
    fake_server_stop(server);
    fake_place_remove(&place);
}

Test(call, destroy_while_the_daemon_is_silent) {
    destroy_under_calls(true);
}

Test(call, destroy_during_pauses) {
    destroy_under_calls(false);
}

Test(call, destroy_unused) {
    fake_place_t place;
    fake_place_make(&place);
    bkv_client_destroy(fake_client(&place, 0));
    bkv_client_destroy(NULL);
    fake_place_remove(&place);
}

Test(call, two_clients_share_nothing) {
    fake_place_t place;
    script_t script = {0};
    fake_place_make(&place);
    fake_server_t *server = fake_server_start(place.endpoint, play, &script);
    bkv_client_t *one = fake_client(&place, 0), *two = fake_client(&place, 0);
    cr_assert(lookup_one(one, 0, NULL, NULL) == BKV_OK && lookup_one(two, 0, NULL, NULL) == BKV_OK);
    bkv_client_destroy(one);
    cr_assert(lookup_one(two, 0, NULL, NULL) == BKV_OK);
    bkv_client_destroy(two);
    fake_server_stop(server);
    fake_place_remove(&place);
}
