// test_etcd_watch.c - watches of a real etcd that is killed, stopped, compacted and replaced under them.
#include "asker.h"
#include "impostor.h"

#include "daemon/observe/clock.h"
#include "etcd.pb-c.h"

#include <criterion/criterion.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define LEASE 0x1234567890

static seen_t seen;

typedef struct rig {
    etcd_server_t server;
    bkv_etcd_t *etcd;
} rig_t;

static void put(const rig_t *rig, const char *key, const char *value) {
    const answer_t *answer = ask(rig->etcd, (question_t){.kind = ASK_PUT, .key = key, .value = value});
    cr_assert_eq(answer->error.status, BKV_OK, "%s", answer->error.message);
}

static void open_rig(rig_t *rig) {
    etcd_server_init(&rig->server);
    etcd_server_start(&rig->server);
    rig->etcd = asker_create(&rig->server);
    put(rig, "/p/a", "1");
    put(rig, "/q/b", "not under the prefix");
    seen_start(&seen, rig->etcd, "/p/");
    cr_assert(seen_wait(&seen, 1, "/p/a", "1"));
}

static void close_rig(rig_t *rig) {
    cr_assert_not(seen.went_back);
    bkv_etcd_destroy(rig->etcd);
    etcd_server_clear(&rig->server);
}

Test(etcd_watch, listing_then_changes, .timeout = 60) {
    rig_t rig;
    open_rig(&rig);
    put(&rig, "/p/b", "2");
    put(&rig, "/p/a", "3");
    put(&rig, "/q/c", "4");
    cr_assert(seen_wait(&seen, 2, "/p/a", "3"));
    cr_assert_eq(ask(rig.etcd, (question_t){.kind = ASK_REMOVE, .key = "/p/b"})->error.status, BKV_OK);
    cr_assert(seen_wait(&seen, 1, "/p/b", NULL));
    cr_assert_eq(ask(rig.etcd, (question_t){.kind = ASK_GRANT, .lease = LEASE, .ttl_s = 1})->error.status, BKV_OK);
    cr_assert_eq(ask(rig.etcd, (question_t){.kind = ASK_PUT, .key = "/p/l", .lease = LEASE})->error.status, BKV_OK);
    cr_assert(seen_wait(&seen, 2, "/p/l", ""));
    cr_assert(seen_wait(&seen, 1, "/p/l", NULL)); // expires
    cr_assert(seen.resets == 1 && seen.losses == 0 && seen.puts == 4 && seen.removals == 2);
    seen_stop(&seen, rig.etcd);
    put(&rig, "/p/z", "unseen");
    cr_assert_eq(seen.puts, 4);
    close_rig(&rig);
}

Test(etcd_watch, a_long_listing_comes_in_pages, .timeout = 60) {
    rig_t rig;
    static seen_t second;
    char key[32];
    open_rig(&rig);
    for (int i = 0; i < 520; i++) {
        snprintf(key, sizeof(key), "/p/k%03d", i);
        put(&rig, key, "x");
    }
    seen_start(&second, rig.etcd, "/p/");
    cr_assert(seen_wait(&second, 521, "/p/k519", "x"));
    cr_assert_eq(second.resets, 1);
    cr_assert(seen_wait(&seen, 521, "/p/k519", "x"));
    cr_assert_eq(seen.puts, 521);
    close_rig(&rig);
}

// A quiet watch is not taken for a dead one.
Test(etcd_watch, silence_is_kept_up, .timeout = 60) {
    rig_t rig;
    open_rig(&rig);
    sleep(12);
    cr_assert(seen.losses == 0 && seen.resets == 1);
    put(&rig, "/p/a", "2");
    cr_assert(seen_wait(&seen, 1, "/p/a", "2"));
    close_rig(&rig);
}

Test(etcd_watch, a_killed_etcd_that_comes_back_leaves_no_gap, .timeout = 60) {
    rig_t rig;
    open_rig(&rig);
    put(&rig, "/p/b", "2");
    cr_assert(seen_wait(&seen, 2, "/p/b", "2"));
    etcd_server_kill(&rig.server);
    cr_assert(seen_wait_lost(&seen));
    etcd_server_start(&rig.server);
    put(&rig, "/p/c", "3");
    put(&rig, "/p/a", "4");
    cr_assert(seen_wait(&seen, 3, "/p/a", "4"));
    cr_assert_eq(seen.resets, 1, "it went on where it was");
    cr_assert_eq(seen.puts, 4, "nothing came twice");
    close_rig(&rig);
}

Test(etcd_watch, a_stopped_etcd_is_noticed_and_gone_on_with, .timeout = 60) {
    rig_t rig;
    open_rig(&rig);
    etcd_server_stop(&rig.server);
    cr_assert(seen_wait_lost(&seen));
    etcd_server_continue(&rig.server);
    put(&rig, "/p/b", "2");
    cr_assert(seen_wait(&seen, 2, "/p/b", "2"));
    cr_assert_eq(seen.resets, 1);
    close_rig(&rig);
}

// While the watcher cannot reach it, things change in etcd and their history is thrown away.
Test(etcd_watch, compaction_of_what_was_missed_makes_a_new_listing, .timeout = 60) {
    rig_t rig;
    open_rig(&rig);
    put(&rig, "/p/b", "2");
    cr_assert(seen_wait(&seen, 2, "/p/b", "2"));
    etcd_server_kill(&rig.server);
    etcd_server_t elsewhere = rig.server;
    elsewhere.port = free_port();
    snprintf(elsewhere.endpoint, sizeof(elsewhere.endpoint), "127.0.0.1:%d", elsewhere.port);
    etcd_server_start(&elsewhere);
    etcd_server_control(&elsewhere, "del /p/b");
    for (int i = 0; i < 5; i++) {
        etcd_server_control(&elsewhere, "put /p/c 3");
    }
    etcd_server_control(&elsewhere, "compact 9");
    etcd_server_kill(&elsewhere);
    etcd_server_start(&rig.server);
    cr_assert(seen_wait(&seen, 2, "/p/c", "3"));
    cr_assert_eq(seen.resets, 2);
    put(&rig, "/p/d", "4");
    cr_assert(seen_wait(&seen, 3, "/p/d", "4"));
    close_rig(&rig);
}

// etcd loses everything: its revisions begin at 1 again, far behind the watcher's.
Test(etcd_watch, an_etcd_that_was_wiped_is_noticed, .timeout = 60) {
    rig_t rig;
    open_rig(&rig);
    for (int i = 0; i < 20; i++) {
        put(&rig, "/p/b", "2");
    }
    cr_assert(seen_wait(&seen, 2, "/p/b", "2"));
    etcd_server_kill(&rig.server);
    etcd_server_wipe(&rig.server);
    etcd_server_start(&rig.server);
    cr_assert(seen_wait(&seen, 0, "/p/a", NULL));
    put(&rig, "/p/new", "5");
    cr_assert(seen_wait(&seen, 1, "/p/new", "5"));
    seen.went_back = false; // they did, and the watcher was told by a reset
    close_rig(&rig);
}

// The stream is on an endpoint that falls silent; a call finds out first, and the watch moves with it.
Test(etcd_watch, watches_move_to_the_endpoint_that_answers, .timeout = 60) {
    etcd_server_t one, two;
    etcd_server_init(&one);
    etcd_server_init(&two);
    etcd_server_start(&one);
    const char *endpoints[] = {one.endpoint, two.endpoint};
    const bkv_etcd_options_t options = {.endpoints = endpoints, .endpoint_count = 2, .attempt_ms = 500};
    rig_t rig = {.server = one};
    cr_assert_eq(bkv_etcd_create(&options, &rig.etcd, NULL), BKV_OK);
    put(&rig, "/p/a", "1");
    seen_start(&seen, rig.etcd, "/p/");
    cr_assert(seen_wait(&seen, 1, "/p/a", "1"));
    etcd_server_stop(&one);
    etcd_server_start(&two); // another etcd altogether: not the same store, which is noticed as well
    put(&rig, "/p/b", "2");
    cr_assert(seen_wait(&seen, 1, "/p/b", "2"));
    bkv_etcd_destroy(rig.etcd);
    etcd_server_clear(&one);
    etcd_server_clear(&two);
}

// ---- revisions ----

typedef struct teller {
    _Atomic uint32_t listings;
    _Atomic int64_t asked_from;
} teller_t;

static Etcdserverpb__KeyValue last_key(int64_t revision) {
    Etcdserverpb__KeyValue kv = ETCDSERVERPB__KEY_VALUE__INIT;
    kv.key = (ProtobufCBinaryData){.data = (uint8_t *)"/p/a", .len = 4};
    kv.value = (ProtobufCBinaryData){.data = (uint8_t *)"1", .len = 1};
    kv.mod_revision = revision;
    return kv;
}

// At first the listing itself is of the last number there is, later of the one before it.
static void tell_listing(impostor_call_t *call, teller_t *teller) {
    bool first = atomic_fetch_add(&teller->listings, 1) == 0;
    Etcdserverpb__ResponseHeader header = ETCDSERVERPB__RESPONSE_HEADER__INIT;
    Etcdserverpb__RangeResponse response = ETCDSERVERPB__RANGE_RESPONSE__INIT;
    Etcdserverpb__KeyValue kv = last_key(1), *kvs[] = {&kv};
    header.revision = first ? INT64_MAX : INT64_MAX - 1;
    response.header = &header;
    response.n_kvs = 1;
    response.kvs = kvs;
    impostor_reply(call, &response.base);
}

static void tell_changes(impostor_call_t *call, teller_t *teller) {
    Etcdserverpb__WatchRequest *request = impostor_request(call, &etcdserverpb__watch_request__descriptor);
    if (request == NULL) {
        return;
    }
    atomic_store(&teller->asked_from, request->create_request->start_revision);
    etcdserverpb__watch_request__free_unpacked(request, NULL);
    Etcdserverpb__ResponseHeader header = ETCDSERVERPB__RESPONSE_HEADER__INIT;
    Etcdserverpb__WatchResponse response = ETCDSERVERPB__WATCH_RESPONSE__INIT;
    Etcdserverpb__KeyValue kv = last_key(INT64_MAX);
    Etcdserverpb__Event event = ETCDSERVERPB__EVENT__INIT, *events[] = {&event};
    header.revision = INT64_MAX;
    event.type = ETCDSERVERPB__EVENT__EVENT_TYPE__DELETE;
    event.kv = &kv;
    response.header = &header;
    response.n_events = 1;
    response.events = events;
    impostor_send(call, &response.base);
    response.canceled = true;
    impostor_send(call, &response.base);
    impostor_hush(call);
}

static void tell(impostor_call_t *call, void *user) {
    if (strcmp(impostor_method(call), "Range") == 0) {
        tell_listing(call, user);
    } else if (strcmp(impostor_method(call), "Watch") == 0) {
        tell_changes(call, user);
    }
}

// What says that it is an etcd may say any number. From a revision on there must be a next one to ask for.
Test(etcd_watch, the_last_revision_that_there_is_is_none, .timeout = 60) {
    teller_t teller = {.listings = 0};
    impostor_t *impostor = impostor_start(tell, &teller);
    char endpoint[32];
    snprintf(endpoint, sizeof(endpoint), "127.0.0.1:%u", impostor_port(impostor));
    const char *endpoints[] = {endpoint};
    const bkv_etcd_options_t options = {.endpoints = endpoints, .endpoint_count = 1};
    bkv_etcd_t *etcd;
    cr_assert_eq(bkv_etcd_create(&options, &etcd, NULL), BKV_OK);
    seen_start(&seen, etcd, "/p/");
    for (uint64_t until = bkv_now_ms() + 20000; atomic_load(&teller.listings) < 3 && bkv_now_ms() < until;) {
        usleep(1000);
    }
    cr_assert(seen_wait(&seen, 1, "/p/a", "1"));
    cr_assert_eq(seen.losses, 1, "the first listing counts for nothing");
    cr_assert_eq(seen.removals, 0, "nor does what is said to have come after all others");
    cr_assert_eq(atomic_load(&teller.asked_from), INT64_MAX);
    bkv_etcd_destroy(etcd);
    impostor_stop(impostor);
}

// ---- login and TLS ----

static bkv_etcd_t *login(const etcd_server_t *server, const char *user, const char *password) {
    const char *endpoints[] = {server->endpoint};
    const bkv_etcd_options_t options = {
        .endpoints = endpoints, .endpoint_count = 1, .attempt_ms = 500, .user = user, .password = password};
    bkv_etcd_t *etcd = NULL;
    cr_assert_eq(bkv_etcd_create(&options, &etcd, NULL), BKV_OK);
    return etcd;
}

Test(etcd_watch, user_and_password, .timeout = 100) {
    rig_t rig;
    etcd_server_init(&rig.server);
    etcd_server_start(&rig.server);
    const char *const steps[] = {"user add root:secret",
                                 "user grant-role root root",
                                 "user add bkv:word",
                                 "role add bkv",
                                 "role grant-permission bkv readwrite --prefix /p/",
                                 "user grant-role bkv bkv",
                                 "auth enable"};
    for (size_t i = 0; i < sizeof(steps) / sizeof(steps[0]); i++) {
        etcd_server_control(&rig.server, steps[i]);
    }
    bkv_etcd_t *stranger = asker_create(&rig.server), *liar = login(&rig.server, "bkv", "wrong");
    cr_assert_eq(ask(stranger, (question_t){.kind = ASK_PUT, .key = "/p/a"})->error.status, BKV_UNAUTHENTICATED);
    const answer_t *answer = ask(liar, (question_t){.kind = ASK_PUT, .key = "/p/a"});
    cr_assert_eq(answer->error.status, BKV_UNAUTHENTICATED, "%s", answer->error.message);
    rig.etcd = login(&rig.server, "bkv", "word");
    put(&rig, "/p/a", "1");
    cr_assert_eq(ask(rig.etcd, (question_t){.kind = ASK_PUT, .key = "/q/a"})->error.status, BKV_PERMISSION_DENIED);
    seen_start(&seen, rig.etcd, "/p/");
    cr_assert(seen_wait(&seen, 1, "/p/a", "1"));
    put(&rig, "/p/b", "2");
    cr_assert(seen_wait(&seen, 2, "/p/b", "2"));
    etcd_server_kill(&rig.server); // forgets its tokens
    etcd_server_start(&rig.server);
    put(&rig, "/p/c", "3");
    cr_assert(seen_wait(&seen, 3, "/p/c", "3"));
    bkv_etcd_destroy(stranger);
    bkv_etcd_destroy(liar);
    close_rig(&rig);
}

Test(etcd_watch, a_login_where_none_is_needed, .timeout = 60) {
    rig_t rig;
    etcd_server_init(&rig.server);
    etcd_server_start(&rig.server);
    rig.etcd = login(&rig.server, "bkv", "word");
    put(&rig, "/p/a", "1");
    close_rig(&rig);
}

static bkv_etcd_t *secure(const etcd_server_t *server, const char *ca, const char *client) {
    static char files[3][96];
    snprintf(files[0], sizeof(files[0]), "%s/%s.pem", server->folder, ca);
    snprintf(files[1], sizeof(files[1]), "%s/%s.pem", server->folder, client);
    snprintf(files[2], sizeof(files[2]), "%s/%s.key", server->folder, client);
    bool certified = client[0] != '\0';
    const char *endpoints[] = {server->endpoint};
    const bkv_etcd_options_t options = {.endpoints = endpoints,
                                        .endpoint_count = 1,
                                        .attempt_ms = 500,
                                        .tls_ca = files[0],
                                        .tls_cert = certified ? files[1] : NULL,
                                        .tls_key = certified ? files[2] : NULL};
    bkv_etcd_t *etcd = NULL;
    bkv_error_t err;
    cr_assert_eq(bkv_etcd_create(&options, &etcd, &err), BKV_OK, "%s", err.message);
    return etcd;
}

Test(etcd_watch, tls_with_certificates_of_a_private_ca, .timeout = 100) {
    rig_t rig;
    etcd_server_init(&rig.server);
    etcd_server_certificates(&rig.server);
    etcd_server_start(&rig.server);
    rig.etcd = secure(&rig.server, "ca", "client");
    put(&rig, "/p/a", "1");
    seen_start(&seen, rig.etcd, "/p/");
    put(&rig, "/p/a", "2");
    cr_assert(seen_wait(&seen, 1, "/p/a", "2"));
    bkv_etcd_t *fooled = secure(&rig.server, "other-ca", "client"), *nameless = secure(&rig.server, "ca", ""),
               *plain = asker_create(&rig.server);
    bkv_etcd_t *const refused[] = {fooled, nameless, plain};
    for (int i = 0; i < 3; i++) {
        const answer_t *answer = ask(refused[i], (question_t){.kind = ASK_PUT, .key = "/p/x", .timeout_ms = 1500});
        cr_assert_eq(answer->error.status, BKV_DEADLINE_EXCEEDED, "%d: %s", i, answer->error.message);
        bkv_etcd_destroy(refused[i]);
    }
    char cert[96], key[96], ca[96];
    snprintf(ca, sizeof(ca), "%s/ca.pem", rig.server.folder);
    snprintf(cert, sizeof(cert), "%s/client.pem", rig.server.folder);
    snprintf(key, sizeof(key), "%s/server.key", rig.server.folder);
    const char *endpoints[] = {rig.server.endpoint};
    const bkv_etcd_options_t mixed = {
        .endpoints = endpoints, .endpoint_count = 1, .tls_ca = ca, .tls_cert = cert, .tls_key = key};
    bkv_error_t err;
    bkv_etcd_t *etcd;
    cr_assert_eq(bkv_etcd_create(&mixed, &etcd, &err), BKV_INVALID_ARGUMENT);
    cr_assert_not_null(strstr(err.message, "not the key"), "%s", err.message);
    close_rig(&rig);
}
