// Questions to another member, and what is thought of one that answers, or does not.
#include "world.h"

#include "daemon/cluster/members/view.h"
#include "daemon/observe/clock.h"

#include <criterion/criterion.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

// Busy machines, and builds with sanitizers, are slow.
#define SOON 5000

static bkv_peer_health_t health_of(const asking_t *asking) {
    bkv_peer_health_t health;
    bkv_peer_get_health(asking->peer, &health);
    return health;
}

static bkv_peers_metrics_t metrics_of(const asking_t *asking) {
    bkv_peers_metrics_t metrics;
    bkv_peers_metrics(asking->peers, &metrics);
    return metrics;
}

// A port that nobody listens at, or, with a socket kept, where connections are taken and nothing is ever said.
static uint16_t free_port(int *keep) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof(address);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    cr_assert(bind(fd, (struct sockaddr *)&address, sizeof(address)) == 0);
    cr_assert(getsockname(fd, (struct sockaddr *)&address, &length) == 0);
    if (keep != NULL) {
        cr_assert(listen(fd, 16) == 0);
        *keep = fd;
    } else {
        close(fd);
    }
    return ntohs(address.sin_port);
}

// ---- answers ----

Test(peers, answers_come_in_the_order_of_the_names, .timeout = 60) {
    world_t world;
    asking_t asking;
    world_init(&world, 100);
    impostor_t *impostor = impostor_start(world_script, &world);
    asking_open(&asking, impostor_port(impostor), SOON, 64);
    const told_t *told = ask_have(&asking, 50, 200, SOON);
    cr_assert_eq(told->error.status, BKV_OK, "%s", told->error.message);
    for (uint32_t i = 0; i < 200; i++) {
        cr_assert_eq(told->bytes[i], i < 50 ? 1024 : 0, "%u", i);
    }
    cr_assert_eq(atomic_load(&world.haves), 4, "200 names in messages of 64");
    cr_assert_eq(atomic_load(&world.largest), 64);
    told = ask_forget(&asking, 99, 130, SOON);
    cr_assert_eq(told->error.status, BKV_OK, "%s", told->error.message);
    cr_assert(told->had[0] && !told->had[1] && !told->had[129]);
    cr_assert_eq(atomic_load(&world.forgets), 3);
    told = ask_drain(&asking, BKV_DRAIN_UNDO, SOON);
    cr_assert(told->error.status == BKV_OK && !told->progress.draining && !told->progress.done);
    told = ask_drain(&asking, BKV_DRAIN_ASK, SOON);
    cr_assert(told->error.status == BKV_OK && told->progress.draining && told->progress.done);
    cr_assert(told->progress.left_keys == 1 && told->progress.left_bytes == 2 && told->progress.moved_keys == 3 &&
              told->progress.moved_bytes == UINT64_C(1) << 40);
    cr_assert_eq(metrics_of(&asking).peer_calls_total, 4);
    cr_assert_eq(metrics_of(&asking).peer_calls_failed_total, 0);
    cr_assert_eq(metrics_of(&asking).peers, 1);
    asking_close(&asking);
    impostor_stop(impostor);
}

Test(peers, questions_may_be_large_or_empty, .timeout = 60) {
    world_t world;
    asking_t asking;
    world_init(&world, 4000);
    impostor_t *impostor = impostor_start(world_script, &world);
    asking_open(&asking, impostor_port(impostor), SOON, 4096);
    const told_t *told = ask_have(&asking, 0, 4096, 4 * SOON);
    cr_assert_eq(told->error.status, BKV_OK, "%s", told->error.message);
    cr_assert(told->bytes[0] == 1024 && told->bytes[3999] == 1024 && told->bytes[4000] == 0);
    cr_assert_eq(atomic_load(&world.haves), 1);
    told = ask_have(&asking, 0, 0, SOON);
    cr_assert_eq(told->error.status, BKV_OK);
    told = ask_forget(&asking, 0, 0, UINT32_MAX);
    cr_assert_eq(told->error.status, BKV_OK);
    told = ask_store(&asking, 0, 0, SOON);
    cr_assert_eq(told->error.status, BKV_OK);
    cr_assert_eq(impostor_calls(impostor), 1, "there was nothing to say");
    asking_close(&asking);
    impostor_stop(impostor);
}

typedef struct refusal {
    grpc_status_code code;
    bkv_status_t status;
} refusal_t;

static void refuse(impostor_call_t *call, void *user) {
    impostor_end(call, ((const refusal_t *)user)->code, "so it \n is");
}

Test(peers, statuses_are_those_that_the_header_names, .timeout = 60) {
    static const refusal_t refusals[] = {
        {GRPC_STATUS_UNAVAILABLE, BKV_BUSY},
        {GRPC_STATUS_RESOURCE_EXHAUSTED, BKV_BUSY},
        {GRPC_STATUS_CANCELLED, BKV_BUSY},
        {GRPC_STATUS_PERMISSION_DENIED, BKV_PERMISSION_DENIED},
        {GRPC_STATUS_UNAUTHENTICATED, BKV_UNAUTHENTICATED},
        {GRPC_STATUS_DEADLINE_EXCEEDED, BKV_DEADLINE_EXCEEDED},
        {GRPC_STATUS_UNIMPLEMENTED, BKV_INTERNAL},
        {GRPC_STATUS_NOT_FOUND, BKV_INTERNAL},
        {GRPC_STATUS_UNKNOWN, BKV_INTERNAL},
        {GRPC_STATUS_OK, BKV_INTERNAL}, // without a response
    };
    for (size_t i = 0; i < sizeof(refusals) / sizeof(refusals[0]); i++) {
        asking_t asking;
        refusal_t refusal = refusals[i];
        impostor_t *impostor = impostor_start(refuse, &refusal);
        asking_open(&asking, impostor_port(impostor), SOON, 0);
        const told_t *told = ask_have(&asking, 0, 3, SOON);
        cr_assert_eq(told->error.status, refusal.status, "%d: %s", (int)refusal.code, told->error.message);
        cr_assert(strchr(told->error.message, '\n') == NULL && strncmp(told->error.message, "n2: ", 4) == 0);
        cr_assert(!health_of(&asking).suspected, "it has answered: %d", (int)refusal.code);
        cr_assert_eq(health_of(&asking).failures, 1);
        asking_close(&asking);
        impostor_stop(impostor);
    }
}

static void nonsense(impostor_call_t *call, void *user) {
    free(impostor_read(call, &(size_t){0}));
    impostor_write(call, user, strlen(user));
    impostor_end(call, GRPC_STATUS_OK, "");
}

Test(peers, nonsense_is_an_error, .timeout = 60) {
    static const char *const answers[] = {"\xff\xff\xff", "", "\x0a\x02\x01\x02" /* two of three */,
                                          "\x0a\x04\x01\x02\x03\x04"};
    for (size_t i = 0; i < sizeof(answers) / sizeof(answers[0]); i++) {
        asking_t asking;
        impostor_t *impostor = impostor_start(nonsense, (void *)(uintptr_t)answers[i]);
        asking_open(&asking, impostor_port(impostor), SOON, 0);
        cr_assert_eq(ask_have(&asking, 0, 3, SOON)->error.status, BKV_INTERNAL, "%zu", i);
        cr_assert_eq(ask_forget(&asking, 0, 3, SOON)->error.status, BKV_INTERNAL, "%zu", i);
        record_put(asking.store, 0, 1024, 0);
        cr_assert_eq(ask_store(&asking, 0, 3, SOON)->error.status, BKV_INTERNAL, "%zu", i);
        asking_close(&asking);
        impostor_stop(impostor);
    }
}

// ---- silence ----

Test(peers, who_is_silent_is_passed_over_until_it_answers, .timeout = 60) {
    world_t world;
    asking_t asking;
    world_init(&world, 10);
    impostor_t *impostor = impostor_start(world_script, &world);
    asking_open(&asking, impostor_port(impostor), ASKING_TIMEOUT, 0);
    cr_assert_eq(ask_have(&asking, 0, 1, SOON)->error.status, BKV_OK);
    atomic_store(&world.silent, true);
    const told_t *told = ask_have(&asking, 0, 1, 10 * SOON); // its own deadline is far
    cr_assert_eq(told->error.status, BKV_DEADLINE_EXCEEDED, "%s", told->error.message);
    cr_assert(told->took_ms >= ASKING_TIMEOUT - 10 && told->took_ms < SOON, "%llu ms", (unsigned long long)told->took_ms);
    cr_assert(health_of(&asking).suspected);
    cr_assert_eq(metrics_of(&asking).peers_suspected, 1);
    told = ask_have(&asking, 0, 1, SOON);
    cr_assert(told->refused && told->error.status == BKV_BUSY && told->took_ms < ASKING_TIMEOUT);
    pause_ms(3 * ASKING_TIMEOUT);
    cr_assert(health_of(&asking).suspected, "probes were not answered either");
    atomic_store(&world.silent, false);
    cr_assert(becomes_suspected(&asking, false, SOON));
    cr_assert(atomic_load(&world.probes) >= 1);
    cr_assert_eq(ask_have(&asking, 0, 1, SOON)->error.status, BKV_OK);
    cr_assert_eq(metrics_of(&asking).peers_suspected, 0);
    asking_close(&asking);
    impostor_stop(impostor);
}

Test(peers, many_short_questions_find_silence_too, .timeout = 60) {
    world_t world;
    asking_t asking;
    world_init(&world, 10);
    atomic_store(&world.silent, true);
    impostor_t *impostor = impostor_start(world_script, &world);
    asking_open(&asking, impostor_port(impostor), 1000, 0);
    uint32_t asked = 0;
    for (; asked < 40 && !health_of(&asking).suspected; asked++) {
        const told_t *told = ask_have(&asking, 0, 1, 100);
        cr_assert_eq(told->error.status, BKV_DEADLINE_EXCEEDED, "%s", told->error.message);
    }
    cr_assert(asked >= 2 && asked <= 12, "%u questions of 100 ms", asked);
    asking_close(&asking);
    impostor_stop(impostor);
}

Test(peers, one_question_that_stalls_is_no_silence_of_the_peer, .timeout = 60) {
    world_t world;
    asking_t asking;
    world_init(&world, 10);
    atomic_store(&world.silent, true);
    impostor_t *impostor = impostor_start(world_script, &world);
    asking_open(&asking, impostor_port(impostor), 1000, 0);
    fetching_t *stalls = fetching_new();
    fetch_start(&asking, stalls, 0, 1, 10 * SOON);
    while (atomic_load(&world.hushed) == 0) {
        pause_ms(2);
    }
    atomic_store(&world.silent, false);
    while (sem_trywait(&stalls->done) != 0) {
        cr_assert_eq(ask_have(&asking, 0, 1, SOON)->error.status, BKV_OK);
        pause_ms(20);
    }
    sem_post(&stalls->done);
    fetch_wait(stalls);
    cr_assert_eq(stalls->error.status, BKV_DEADLINE_EXCEEDED, "%s", stalls->error.message);
    cr_assert(!health_of(&asking).suspected);
    fetch_clear(stalls);
    asking_close(&asking);
    impostor_stop(impostor);
}

Test(peers, nobody_listens_and_then_somebody_does, .timeout = 60) {
    world_t world;
    asking_t asking;
    uint16_t port = free_port(NULL);
    world_init(&world, 10);
    asking_open(&asking, port, ASKING_TIMEOUT, 0);
    const told_t *told = ask_have(&asking, 0, 1, SOON);
    cr_assert_eq(told->error.status, BKV_BUSY, "%s", told->error.message);
    cr_assert(health_of(&asking).suspected);
    cr_assert_eq(health_of(&asking).latency_us, 0);
    impostor_t *impostor = impostor_start_at(port, world_script, &world);
    cr_assert(becomes_suspected(&asking, false, 2 * SOON));
    cr_assert_eq(ask_have(&asking, 0, 1, SOON)->error.status, BKV_OK);
    impostor_stop(impostor); // and it is gone again
    cr_assert_neq(ask_have(&asking, 0, 1, SOON)->error.status, BKV_OK);
    cr_assert(becomes_suspected(&asking, true, SOON));
    asking_close(&asking);
}

Test(peers, connections_that_lead_nowhere_are_silence, .timeout = 60) {
    int fd;
    asking_t asking;
    asking_open(&asking, free_port(&fd), 600, 0); // less than gRPC gives a connection
    const told_t *told = ask_have(&asking, 0, 1, SOON);
    cr_assert_eq(told->error.status, BKV_DEADLINE_EXCEEDED, "%s", told->error.message);
    cr_assert(told->took_ms < SOON && health_of(&asking).suspected);
    asking_close(&asking);
    close(fd);
}

Test(peers, latency_and_patience_follow_what_is_measured, .timeout = 120) {
    world_t world;
    asking_t asking;
    world_init(&world, 10);
    impostor_t *impostor = impostor_start(world_script, &world);
    asking_open(&asking, impostor_port(impostor), 2000, 0);
    atomic_store(&world.delay_ms, 20);
    for (uint32_t i = 0; i < 100; i++) {
        cr_assert_eq(ask_have(&asking, 0, 1, SOON)->error.status, BKV_OK);
    }
    bkv_peer_health_t health = health_of(&asking);
    cr_assert(health.latency_us >= 19000 && health.latency_us < 500000, "%llu", (unsigned long long)health.latency_us);
    cr_assert(health.patience_us >= 20000 && health.patience_us <= 2000000, "%llu", (unsigned long long)health.patience_us);
    asking_close(&asking);
    impostor_stop(impostor);
}

// ---- who is there ----

static bkv_view_t view_of(const bkv_member_t *members, uint32_t count) {
    static bkv_placement_member_t places[8];
    bkv_view_t view = {.members = members, .count = count, .self = BKV_NO_MEMBER};
    bkv_placement_t *placement = NULL;
    bkv_error_t err = {0};
    for (uint32_t i = 0; i < count; i++) {
        places[i] = members[i].place;
    }
    const bkv_placement_config_t config = {.members = places, .count = count, .replicas = 1};
    cr_assert_eq(bkv_placement_create(&config, NULL, &placement, &err), BKV_OK, "%s", err.message);
    view.placement = placement;
    return view;
}

Test(peers, one_for_each_start_of_a_member, .timeout = 60) {
    asking_t asking;
    uint16_t port = free_port(NULL);
    asking_open(&asking, port, 0, 0);
    bkv_member_t first = impostor_member("n2", 1, port), again = impostor_member("n2", 2, port);
    bkv_peer_t *same = bkv_peers_get(asking.peers, &first), *other = bkv_peers_get(asking.peers, &again);
    cr_assert(same == asking.peer && other != NULL && other != same);
    cr_assert_eq(metrics_of(&asking).peers, 2);
    static const char *const bad[] = {"", "host", "host:0", "host:65536", "http://host:1", "unix:/x", "a b:1", "[::1]", ":1"};
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        bkv_member_t nowhere = impostor_member("n3", i, port);
        strcpy(nowhere.addresses[0], bad[i]);
        cr_assert_null(bkv_peers_get(asking.peers, &nowhere), "%s", bad[i]);
        nowhere.address_count = 2; // the second is as good
        strcpy(nowhere.addresses[1], "[::1]:7000");
        bkv_peer_t *peer = bkv_peers_get(asking.peers, &nowhere);
        cr_assert_not_null(peer);
        bkv_peer_release(peer);
    }
    bkv_peer_release(same);
    bkv_peer_release(bkv_peer_hold(other));
    bkv_peer_release(other);
    asking_close(&asking);
}

Test(peers, who_is_in_no_view_is_closed, .timeout = 60) {
    world_t world;
    asking_t asking;
    world_init(&world, 10);
    atomic_store(&world.silent, true);
    impostor_t *impostor = impostor_start(world_script, &world);
    asking_open(&asking, impostor_port(impostor), 10 * SOON, 0);
    bkv_member_t members[2] = {impostor_member("n1", 7, 1), impostor_member("n2", 1, impostor_port(impostor))};
    bkv_member_t restarted[2] = {members[0], impostor_member("n2", 2, impostor_port(impostor))};
    bkv_view_t with = view_of(members, 2), without = view_of(restarted, 2);
    fetching_t *waits = fetching_new();
    fetch_start(&asking, waits, 0, 5, 20 * SOON);
    bkv_peers_keep(asking.peers, &without, &with); // the one that repair starts from has it
    bkv_peers_keep(asking.peers, &with, NULL);
    cr_assert(sem_trywait(&waits->done) != 0);
    uint64_t start_ms = bkv_now_ms();
    bkv_peers_keep(asking.peers, &without, NULL);
    fetch_wait(waits);
    cr_assert(bkv_now_ms() - start_ms < SOON);
    cr_assert_eq(waits->error.status, BKV_CANCELLED);
    cr_assert_eq(metrics_of(&asking).peers, 0);
    atomic_store(&world.silent, false);
    const told_t *told = ask_have(&asking, 0, 1, SOON);
    cr_assert(told->refused && told->error.status == BKV_BUSY, "%s", told->error.message);
    fetch_clear(waits);
    bkv_placement_destroy((bkv_placement_t *)(uintptr_t)with.placement);
    bkv_placement_destroy((bkv_placement_t *)(uintptr_t)without.placement);
    asking_close(&asking);
    impostor_stop(impostor);
}

Test(peers, only_so_many_questions_at_a_time, .timeout = 60) {
    world_t world;
    asking_t asking;
    world_init(&world, 10);
    atomic_store(&world.silent, true);
    impostor_t *impostor = impostor_start(world_script, &world);
    asking_open(&asking, impostor_port(impostor), 10 * SOON, 0);
    static fetching_t *waits[1025];
    uint32_t started = 0;
    for (; started < 1025; started++) {
        waits[started] = fetching_new();
        fetch_start(&asking, waits[started], 0, 1, 10 * SOON);
        if (waits[started]->refused) {
            break;
        }
    }
    cr_assert_eq(started, 1024);
    cr_assert_eq(waits[started]->error.status, BKV_BUSY);
    for (uint32_t i = 0; i < started; i++) {
        bkv_peer_cancel(waits[i]->call);
    }
    for (uint32_t i = 0; i <= started; i++) {
        fetch_wait(waits[i]);
        fetch_clear(waits[i]);
    }
    atomic_store(&world.silent, false);
    cr_assert_eq(ask_have(&asking, 0, 1, SOON)->error.status, BKV_OK);
    asking_close(&asking);
    impostor_stop(impostor);
}

// ---- the end ----

Test(peers, the_end_ends_all_questions, .timeout = 60) {
    world_t world;
    asking_t asking;
    world_init(&world, 10);
    atomic_store(&world.silent, true);
    impostor_t *impostor = impostor_start(world_script, &world);
    asking_open(&asking, impostor_port(impostor), 10 * SOON, 0);
    fetching_t *waits[20];
    for (uint32_t i = 0; i < 20; i++) {
        waits[i] = fetching_new();
        fetch_start(&asking, waits[i], 0, 5, UINT32_MAX);
    }
    uint64_t start_ms = bkv_now_ms();
    asking_close(&asking);
    cr_assert(bkv_now_ms() - start_ms < SOON);
    for (uint32_t i = 0; i < 20; i++) {
        cr_assert(waits[i]->over && waits[i]->error.status == BKV_CANCELLED, "%s", waits[i]->error.message);
        fetch_wait(waits[i]);
        fetch_clear(waits[i]);
    }
    impostor_stop(impostor);
}

typedef struct chain {
    asking_t *asking;
    uint32_t left;
    bkv_error_t last;
    sem_t over;
} chain_t;

static void on_link(void *user, const bkv_error_t *error, const uint64_t *bytes) {
    chain_t *chain = user;
    bkv_name_t name = record_name(0);
    (void)bytes;
    chain->last = *error;
    if (--chain->left == 0 || error->status != BKV_OK ||
        bkv_peer_have(chain->asking->peer, &name, 1, UINT64_MAX, on_link, chain, &chain->last) != BKV_OK) {
        sem_post(&chain->over);
    }
}

Test(peers, answers_may_ask_again, .timeout = 60) {
    world_t world;
    asking_t asking;
    world_init(&world, 10);
    impostor_t *impostor = impostor_start(world_script, &world);
    asking_open(&asking, impostor_port(impostor), SOON, 0);
    chain_t chain = {.asking = &asking, .left = 50};
    bkv_name_t name = record_name(0);
    sem_init(&chain.over, 0, 0);
    cr_assert_eq(bkv_peer_have(asking.peer, &name, 1, UINT64_MAX, on_link, &chain, NULL), BKV_OK);
    while (sem_wait(&chain.over) != 0) {
    }
    cr_assert(chain.left == 0 && chain.last.status == BKV_OK, "%s", chain.last.message);
    asking_close(&asking);
    impostor_stop(impostor);
}

// ---- options ----

Test(peers, tls_files_are_checked, .timeout = 60) {
    asking_t asking = {.store = asking_store()};
    static const struct {
        const char *ca, *cert, *key, *name, *says;
    } wrong[] = {
        {"/nowhere", "/etc/hostname", "/etc/hostname", "bkv", "cluster.peer_ca: /nowhere: No such file"},
        {"/etc/hostname", "/etc/hostname", "/etc/hostname", "bkv", "cluster.peer_ca: /etc/hostname: no PEM certificate"},
        {"/etc/hostname", "", NULL, "bkv", "cluster.peer_ca: needs listen.tls_cert"},
        {"/etc/hostname", "/etc/hostname", "/etc/hostname", "", "cluster.peer_name: missing"},
    };
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        bkv_peers_t *peers = NULL;
        bkv_error_t err = {0};
        bkv_peers_config_t config = asking_config(&asking, 0, 0);
        config.tls_ca = wrong[i].ca;
        config.tls_cert = wrong[i].cert;
        config.tls_key = wrong[i].key;
        config.tls_name = wrong[i].name;
        cr_assert_eq(bkv_peers_create(&config, &peers, &err), BKV_INVALID_ARGUMENT);
        cr_assert(strncmp(err.message, wrong[i].says, strlen(wrong[i].says)) == 0, "%s", err.message);
    }
    bkv_peers_destroy(NULL);
    bkv_peer_release(NULL);
    bkv_store_destroy(asking.store);
}
