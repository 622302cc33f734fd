// test_etcd.c - calls to a real etcd: what they do, how they fail, and when.
#include "asker.h"

#include "daemon/observe/clock.h"
#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define LEASE 0x1234567890

// ---- what they do ----

Test(etcd, keys_are_put_listed_and_removed, .timeout = 60) {
    etcd_server_t server;
    etcd_server_init(&server);
    etcd_server_start(&server);
    bkv_etcd_t *etcd = asker_create(&server);
    const answer_t *answer = ask(etcd, (question_t){.kind = ASK_PUT, .key = "/a/1", .value = "one"});
    cr_assert_eq(answer->error.status, BKV_OK, "%s", answer->error.message);
    int64_t revision = answer->reply.revision;
    cr_assert_gt(revision, 1);
    cr_assert_eq(ask(etcd, (question_t){.kind = ASK_PUT, .key = "/a/2", .value = ""})->error.status, BKV_OK);
    cr_assert_eq(ask(etcd, (question_t){.kind = ASK_PUT, .key = "/a0", .value = "behind the prefix"})->error.status, BKV_OK);
    cr_assert_eq(ask(etcd, (question_t){.kind = ASK_PUT, .key = "/a", .value = "before it"})->error.status, BKV_OK);
    answer = ask(etcd, (question_t){.kind = ASK_LIST, .key = "/a/", .limit = 10});
    cr_assert_eq(answer->reply.count, 2);
    cr_assert_str_eq(answer->kvs[0].key, "/a/1");
    cr_assert_str_eq(answer->kvs[0].value, "one");
    cr_assert_eq(answer->kvs[0].mod_revision, revision);
    cr_assert_str_eq(answer->kvs[1].value, "");
    answer = ask(etcd, (question_t){.kind = ASK_LIST, .key = "/a/", .limit = 1});
    cr_assert(answer->reply.count == 1 && answer->reply.more);
    answer = ask(etcd, (question_t){.kind = ASK_LIST, .key = "/a/", .value = "/a/1", .limit = 1});
    cr_assert(answer->reply.count == 1 && !answer->reply.more);
    cr_assert_str_eq(answer->kvs[0].key, "/a/2");
    answer = ask(etcd, (question_t){.kind = ASK_LIST, .key = "/a/", .expected = revision, .limit = 10});
    cr_assert_eq(answer->reply.count, 1);
    cr_assert_eq(ask(etcd, (question_t){.kind = ASK_REMOVE, .key = "/a/1"})->error.status, BKV_OK);
    cr_assert_eq(ask(etcd, (question_t){.kind = ASK_REMOVE, .key = "/a/1"})->error.status, BKV_OK);
    cr_assert_eq(ask(etcd, (question_t){.kind = ASK_LIST, .key = "/a/", .limit = 10})->reply.count, 1);
    etcd_server_control(&server, "compact 5");
    answer = ask(etcd, (question_t){.kind = ASK_LIST, .key = "/a/", .expected = 2, .limit = 10});
    cr_assert_eq(answer->error.status, BKV_FAILED_PRECONDITION, "%s", answer->error.message);
    bkv_etcd_destroy(etcd);
    etcd_server_clear(&server);
}

Test(etcd, a_swap_writes_only_over_what_was_expected, .timeout = 60) {
    etcd_server_t server;
    etcd_server_init(&server);
    etcd_server_start(&server);
    bkv_etcd_t *etcd = asker_create(&server);
    const answer_t *answer = ask(etcd, (question_t){.kind = ASK_SWAP, .key = "/k", .value = "first"});
    cr_assert(answer->error.status == BKV_OK && answer->reply.succeeded);
    int64_t revision = answer->reply.revision;
    answer = ask(etcd, (question_t){.kind = ASK_SWAP, .key = "/k", .value = "second"});
    cr_assert(answer->error.status == BKV_OK && !answer->reply.succeeded && answer->reply.count == 1);
    cr_assert_str_eq(answer->kvs[0].value, "first");
    cr_assert_eq(answer->kvs[0].mod_revision, revision);
    answer = ask(etcd, (question_t){.kind = ASK_SWAP, .key = "/k", .value = "third", .expected = revision});
    cr_assert(answer->error.status == BKV_OK && answer->reply.succeeded);
    answer = ask(etcd, (question_t){.kind = ASK_SWAP, .key = "/other", .value = "x", .expected = revision});
    cr_assert(answer->error.status == BKV_OK && !answer->reply.succeeded && answer->reply.count == 0);
    answer = ask(etcd, (question_t){.kind = ASK_SWAP, .key = "/leased", .value = "x", .lease = LEASE});
    cr_assert_eq(answer->error.status, BKV_NOT_FOUND, "%s", answer->error.message);
    bkv_etcd_destroy(etcd);
    etcd_server_clear(&server);
}

Test(etcd, a_lease_takes_its_keys_along, .timeout = 60) {
    etcd_server_t server;
    etcd_server_init(&server);
    etcd_server_start(&server);
    bkv_etcd_t *etcd = asker_create(&server);
    const answer_t *answer = ask(etcd, (question_t){.kind = ASK_GRANT, .lease = LEASE, .ttl_s = 2});
    cr_assert_eq(answer->error.status, BKV_OK, "%s", answer->error.message);
    cr_assert(answer->reply.lease == LEASE && answer->reply.ttl_s == 2);
    cr_assert_eq(ask(etcd, (question_t){.kind = ASK_GRANT, .lease = LEASE, .ttl_s = 2})->error.status, BKV_FAILED_PRECONDITION);
    cr_assert_eq(ask(etcd, (question_t){.kind = ASK_PUT, .key = "/l", .value = "x", .lease = LEASE})->error.status, BKV_OK);
    for (int i = 0; i < 8; i++) { // twice its time
        usleep(500000);
        answer = ask(etcd, (question_t){.kind = ASK_KEEP, .lease = LEASE});
        cr_assert(answer->error.status == BKV_OK && answer->reply.ttl_s == 2, "%s", answer->error.message);
    }
    cr_assert_eq(ask(etcd, (question_t){.kind = ASK_LIST, .key = "/l", .limit = 1})->kvs[0].lease, LEASE);
    uint64_t start_ms = bkv_now_ms();
    while (ask(etcd, (question_t){.kind = ASK_LIST, .key = "/l", .limit = 1})->reply.count == 1) {
        usleep(50000);
        cr_assert_lt(bkv_now_ms() - start_ms, 10000);
    }
    cr_assert_gt(bkv_now_ms() - start_ms, 1000);
    cr_assert_eq(ask(etcd, (question_t){.kind = ASK_KEEP, .lease = LEASE})->error.status, BKV_NOT_FOUND);
    cr_assert_eq(ask(etcd, (question_t){.kind = ASK_REVOKE, .lease = LEASE})->error.status, BKV_NOT_FOUND);
    cr_assert_eq(ask(etcd, (question_t){.kind = ASK_PUT, .key = "/l", .lease = LEASE})->error.status, BKV_NOT_FOUND);
    cr_assert_eq(ask(etcd, (question_t){.kind = ASK_GRANT, .lease = LEASE + 1, .ttl_s = 100})->error.status, BKV_OK);
    cr_assert_eq(ask(etcd, (question_t){.kind = ASK_PUT, .key = "/m", .value = "x", .lease = LEASE + 1})->error.status, BKV_OK);
    cr_assert_eq(ask(etcd, (question_t){.kind = ASK_REVOKE, .lease = LEASE + 1})->error.status, BKV_OK);
    cr_assert_eq(ask(etcd, (question_t){.kind = ASK_LIST, .key = "/m", .limit = 1})->reply.count, 0);
    bkv_etcd_destroy(etcd);
    etcd_server_clear(&server);
}

// ---- how they fail ----

Test(etcd, what_cannot_be_asked_is_said_at_once, .timeout = 60) {
    static char long_key[BKV_ETCD_KEY_MAX + 2], long_value[BKV_ETCD_VALUE_MAX + 2];
    etcd_server_t server;
    etcd_server_init(&server); // and not started
    bkv_etcd_t *etcd = asker_create(&server);
    memset(long_key, 'k', sizeof(long_key) - 1);
    memset(long_value, 'v', sizeof(long_value) - 1);
    const question_t wrong[] = {
        {.kind = ASK_PUT, .key = ""},
        {.kind = ASK_PUT, .key = long_key},
        {.kind = ASK_PUT, .key = "/k", .value = long_value},
        {.kind = ASK_SWAP, .key = ""},
        {.kind = ASK_REMOVE, .key = ""},
        {.kind = ASK_LIST, .key = ""},
        {.kind = ASK_GRANT, .lease = 0, .ttl_s = 1},
        {.kind = ASK_GRANT, .lease = 1, .ttl_s = 0},
        {.kind = ASK_KEEP, .lease = -1},
        {.kind = ASK_REVOKE, .lease = 0},
    };
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        cr_assert_eq(ask(etcd, wrong[i])->error.status, BKV_INVALID_ARGUMENT, "question %zu", i);
    }
    bkv_etcd_destroy(etcd);
    etcd_server_clear(&server);
}

static void check_options(bkv_etcd_options_t options, const char *word) {
    bkv_etcd_t *etcd = NULL;
    bkv_error_t err = {.message = ""};
    cr_assert_eq(bkv_etcd_create(&options, &etcd, &err), BKV_INVALID_ARGUMENT, "%s", word);
    cr_assert_not_null(strstr(err.message, word), "%s", err.message);
    cr_assert_null(etcd);
}

Test(etcd, options_are_checked, .timeout = 60) {
    static const char *good[] = {"127.0.0.1:2379"}, *const bad[] = {"host",           "host:0", "http://host:2379",
                                                                    "ipv4:1.2.3.4:5", "unix:x", ":1",
                                                                    "a b:1",          "[::1]",  "host:99999"};
    check_options((bkv_etcd_options_t){.endpoints = good, .endpoint_count = 0}, "endpoints");
    check_options((bkv_etcd_options_t){.endpoints = good, .endpoint_count = BKV_ETCD_ENDPOINTS_MAX + 1}, "endpoints");
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        check_options((bkv_etcd_options_t){.endpoints = &bad[i], .endpoint_count = 1}, "endpoints");
    }
    bkv_etcd_options_t options = {.endpoints = good, .endpoint_count = 1};
    options.user = "me";
    check_options(options, "password");
    options.user = NULL;
    options.tls_cert = "/etc/hostname";
    check_options(options, "tls_key");
    options.tls_key = "/etc/hostname";
    check_options(options, "tls_ca");
    options.tls_ca = "/nowhere";
    check_options(options, "/nowhere");
    options.tls_ca = "/etc/hostname";
    check_options(options, "no PEM certificate");
    options = (bkv_etcd_options_t){.endpoints = good, .endpoint_count = 1, .tls_name = "etcd"};
    check_options(options, "tls_ca");
}

Test(etcd, nobody_there_is_a_deadline, .timeout = 60) {
    etcd_server_t server;
    etcd_server_init(&server);
    bkv_etcd_t *etcd = asker_create(&server);
    const answer_t *answer = ask(etcd, (question_t){.kind = ASK_PUT, .key = "/k", .timeout_ms = 700});
    cr_assert_eq(answer->error.status, BKV_DEADLINE_EXCEEDED, "%s", answer->error.message);
    cr_assert(answer->took_ms >= 600 && answer->took_ms < 6000, "%llu ms", (unsigned long long)answer->took_ms);
    etcd_server_start(&server); // and then it is found
    answer = ask(etcd, (question_t){.kind = ASK_PUT, .key = "/k"});
    cr_assert_eq(answer->error.status, BKV_OK, "%s", answer->error.message);
    bkv_etcd_destroy(etcd);
    etcd_server_clear(&server);
}

Test(etcd, a_stopped_etcd_is_a_deadline_and_no_end, .timeout = 60) {
    etcd_server_t server;
    etcd_server_init(&server);
    etcd_server_start(&server);
    bkv_etcd_t *etcd = asker_create(&server);
    int64_t revision = ask(etcd, (question_t){.kind = ASK_PUT, .key = "/k", .value = "before"})->reply.revision;
    etcd_server_stop(&server);
    const answer_t *answer =
        ask(etcd, (question_t){.kind = ASK_SWAP, .key = "/k", .value = "meanwhile", .expected = revision, .timeout_ms = 1200});
    cr_assert_eq(answer->error.status, BKV_DEADLINE_EXCEEDED, "%s", answer->error.message);
    cr_assert(answer->took_ms >= 1100 && answer->took_ms < 6000, "%llu ms", (unsigned long long)answer->took_ms);
    etcd_server_continue(&server);
    // What was given up may be done now, but not over what is written after having looked.
    do {
        revision = ask(etcd, (question_t){.kind = ASK_LIST, .key = "/k", .limit = 1})->kvs[0].mod_revision;
        answer = ask(etcd, (question_t){.kind = ASK_SWAP, .key = "/k", .value = "after", .expected = revision});
        cr_assert_eq(answer->error.status, BKV_OK, "%s", answer->error.message);
    } while (!answer->reply.succeeded);
    usleep(300000);
    cr_assert_str_eq(ask(etcd, (question_t){.kind = ASK_LIST, .key = "/k", .limit = 1})->kvs[0].value, "after");
    bkv_etcd_destroy(etcd);
    etcd_server_clear(&server);
}

// Of three endpoints the first is closed, the second silent.
Test(etcd, the_endpoint_that_answers_is_found, .timeout = 60) {
    etcd_server_t server;
    char closed[32], silent[32];
    int port, fd = silent_endpoint(&port);
    etcd_server_init(&server);
    etcd_server_start(&server);
    etcd_server_control(&server, "endpoint health");
    snprintf(closed, sizeof(closed), "127.0.0.1:%d", free_port());
    snprintf(silent, sizeof(silent), "127.0.0.1:%d", port);
    const char *endpoints[] = {closed, silent, server.endpoint};
    const bkv_etcd_options_t options = {.endpoints = endpoints, .endpoint_count = 3, .attempt_ms = 2000};
    bkv_etcd_t *etcd = NULL;
    cr_assert_eq(bkv_etcd_create(&options, &etcd, NULL), BKV_OK);
    const answer_t *answer = ask(etcd, (question_t){.kind = ASK_PUT, .key = "/k", .timeout_ms = 15000});
    cr_assert_eq(answer->error.status, BKV_OK, "%s", answer->error.message);
    cr_assert_lt(answer->took_ms, 10000);
    for (int i = 0; i < 20; i++) { // and kept: another try of the silent one takes two seconds
        cr_assert_lt(ask(etcd, (question_t){.kind = ASK_PUT, .key = "/k"})->took_ms, 1800);
    }
    bkv_etcd_destroy(etcd);
    etcd_server_clear(&server);
    close(fd);
}

// etcd's own disk quota: what is there stays, and can be kept alive; nothing new gets in.
Test(etcd, a_full_disk_is_an_error_that_changes_nothing, .timeout = 60) {
    etcd_server_t server;
    etcd_server_init(&server);
    server.quota_bytes = 1 << 20;
    etcd_server_start(&server);
    bkv_etcd_t *etcd = asker_create(&server);
    cr_assert_eq(ask(etcd, (question_t){.kind = ASK_GRANT, .lease = LEASE, .ttl_s = 60})->error.status, BKV_OK);
    cr_assert_eq(ask(etcd, (question_t){.kind = ASK_PUT, .key = "/mine", .value = "old", .lease = LEASE})->error.status,
                 BKV_OK);
    int64_t revision = ask(etcd, (question_t){.kind = ASK_LIST, .key = "/mine", .limit = 1})->kvs[0].mod_revision;
    ask_fill(etcd);
    const answer_t *answer =
        ask(etcd, (question_t){.kind = ASK_SWAP, .key = "/mine", .value = "new", .expected = revision, .lease = LEASE});
    cr_assert_eq(answer->error.status, BKV_RESOURCE_EXHAUSTED, "%s", answer->error.message);
    cr_assert_not_null(strstr(answer->error.message, "space"), "%s", answer->error.message);
    cr_assert_eq(ask(etcd, (question_t){.kind = ASK_GRANT, .lease = LEASE + 1, .ttl_s = 60})->error.status,
                 BKV_RESOURCE_EXHAUSTED);
    cr_assert_eq(ask(etcd, (question_t){.kind = ASK_KEEP, .lease = LEASE})->error.status, BKV_OK);
    cr_assert_str_eq(ask(etcd, (question_t){.kind = ASK_LIST, .key = "/mine", .limit = 1})->kvs[0].value, "old");
    bkv_etcd_destroy(etcd);
    etcd_server_clear(&server);
}

// ---- the end ----

typedef struct ending {
    bkv_etcd_t *etcd;
    uint32_t cancelled, refused, timers;
    bkv_etcd_timer_t timer;
} ending_t;

static void on_cancelled(void *user, const bkv_error_t *error, const bkv_etcd_reply_t *reply) {
    ending_t *ending = user;
    (void)reply;
    ending->cancelled += error->status == BKV_CANCELLED;
    // A callback that wants to go on is told that it is over.
    ending->refused += bkv_etcd_keep(ending->etcd, 1, 1000, on_cancelled, user, NULL) == BKV_BUSY;
}

static void on_never(void *user) {
    ending_t *ending = user;
    ending->timers++;
}

static void start_many(void *user) {
    ending_t *ending = user;
    uint32_t started = 0;
    while (bkv_etcd_keep(ending->etcd, 1, 60000, on_cancelled, user, NULL) == BKV_OK) {
        started++;
    }
    cr_assert_eq(started, BKV_ETCD_CALLS_MAX);
    bkv_etcd_timer_start(ending->etcd, &ending->timer, 60000, on_never, ending);
}

Test(etcd, destroy_ends_every_call, .timeout = 60) {
    for (int silent = 0; silent < 2; silent++) {
        char endpoint[32];
        int port, fd = silent_endpoint(&port);
        snprintf(endpoint, sizeof(endpoint), "127.0.0.1:%d", silent ? port : free_port());
        const char *endpoints[] = {endpoint};
        const bkv_etcd_options_t options = {.endpoints = endpoints, .endpoint_count = 1};
        ending_t ending = {0};
        cr_assert_eq(bkv_etcd_create(&options, &ending.etcd, NULL), BKV_OK);
        cr_assert_eq(bkv_etcd_post(ending.etcd, start_many, &ending), BKV_OK);
        usleep(300000);
        uint64_t start_ms = bkv_now_ms();
        bkv_etcd_destroy(ending.etcd);
        cr_assert_lt(bkv_now_ms() - start_ms, 5000);
        cr_assert_eq(ending.cancelled, BKV_ETCD_CALLS_MAX);
        cr_assert_eq(ending.refused, BKV_ETCD_CALLS_MAX);
        cr_assert_eq(ending.timers, 0);
        close(fd);
    }
}

static void count_up(void *user) {
    ++*(uint32_t *)user;
}

Test(etcd, posts_run_all_in_order_or_are_refused, .timeout = 60) {
    etcd_server_t server;
    uint32_t accepted = 0, run = 0;
    etcd_server_init(&server);
    for (int round = 0; round < 20; round++) {
        bkv_etcd_t *etcd = asker_create(&server);
        for (int i = 0; i < 3 * BKV_ETCD_POSTS_MAX; i++) {
            accepted += bkv_etcd_post(etcd, count_up, &run) == BKV_OK;
        }
        bkv_etcd_destroy(etcd);
        cr_assert_eq(run, accepted);
    }
    cr_assert_geq(accepted, 20 * BKV_ETCD_POSTS_MAX);
    etcd_server_clear(&server);
}
