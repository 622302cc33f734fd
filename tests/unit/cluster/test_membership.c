// test_membership.c - members of a cluster and a real etcd, which is killed, stopped, wiped and filled under them.
#include "asker.h"
#include "members.h"

#include "daemon/cluster/members/membership.h"
#include "daemon/observe/clock.h"
#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define TTL_S   2
#define LONG_S  8 // of one who is to be found gone before its lease ends
#define KEPT_S  5 // of those whose lease is to be kept, whatever holds this machine up for a moment
#define WAIT_MS 20000

// A daemon, as far as the cluster sees it: its own etcd client, its own membership.
typedef struct node {
    bkv_etcd_t *etcd;
    bkv_membership_t *membership;
    atomic_uint changes, last_count, shrinks; // shrinks: views with fewer members than the last
} node_t;

static void on_change(void *user, const bkv_view_t *was, const bkv_view_t *now) {
    node_t *node = user;
    cr_assert_eq(now->version, was->version + 1);
    atomic_fetch_add(&node->changes, 1);
    atomic_fetch_add(&node->shrinks, now->count < was->count);
    atomic_store(&node->last_count, now->count);
}

static bkv_member_t named(const char *id) {
    bkv_member_t self = {.capacity_bytes = 1 << 30, .address_count = id[0] != '\0', .transport_count = 1};
    snprintf(self.place.id, sizeof(self.place.id), "%s", id);
    snprintf(self.addresses[0], sizeof(self.addresses[0]), "%s.example:7420", id);
    snprintf(self.transports[0], sizeof(self.transports[0]), "inline");
    self.place.weight = 100;
    return self;
}

static void node_start_as(node_t *node, const etcd_server_t *server, const bkv_member_t *self, uint32_t replicas,
                          uint32_t ttl_s) {
    bkv_error_t err;
    atomic_store(&node->changes, 0);
    atomic_store(&node->shrinks, 0);
    node->etcd = asker_create(server);
    const bkv_membership_config_t config = {.etcd = node->etcd,
                                            .cluster = "test",
                                            .self = *self,
                                            .ttl_s = ttl_s,
                                            .replicas = replicas,
                                            .on_change = on_change,
                                            .user = node};
    cr_assert_eq(bkv_membership_create(&config, &node->membership, &err), BKV_OK, "%s", err.message);
}

static void node_start_for(node_t *node, const etcd_server_t *server, const char *id, uint32_t replicas, uint32_t ttl_s) {
    const bkv_member_t self = named(id);
    node_start_as(node, server, &self, replicas, ttl_s);
}

static void node_start(node_t *node, const etcd_server_t *server, const char *id, uint32_t replicas) {
    node_start_for(node, server, id, replicas, TTL_S);
}

static void node_crash(node_t *node) {
    bkv_membership_destroy(node->membership);
    bkv_etcd_destroy(node->etcd);
    node->membership = NULL;
}

static bkv_membership_status_t status_of(node_t *node) {
    bkv_membership_status_t status;
    bkv_membership_get_status(node->membership, &status);
    return status;
}

// The members that a node sees, as "a b c".
static void seen_by(node_t *node, char out[256]) {
    const bkv_view_t *view = bkv_membership_view(node->membership);
    out[0] = '\0';
    for (uint32_t i = 0; i < view->count; i++) {
        snprintf(out + strlen(out), 256 - strlen(out), i > 0 ? " %s" : "%s", view->members[i].place.id);
    }
    bkv_view_give(view);
}

static uint64_t wait_for_members(node_t *node, const char *ids) {
    char now[256];
    uint64_t start_ms = bkv_now_ms();
    for (seen_by(node, now); strcmp(now, ids) != 0; seen_by(node, now)) {
        cr_assert_lt(bkv_now_ms() - start_ms, WAIT_MS, "sees \"%s\" and not \"%s\"", now, ids);
        usleep(10000);
    }
    return bkv_now_ms() - start_ms;
}

static void wait_for_state(node_t *node, bkv_membership_state_t state) {
    uint64_t start_ms = bkv_now_ms();
    while (status_of(node).state != state) {
        cr_assert_lt(bkv_now_ms() - start_ms, WAIT_MS, "is %s and not %s: %s", bkv_membership_state_name(status_of(node).state),
                     bkv_membership_state_name(state), status_of(node).trouble.message);
        usleep(10000);
    }
}

static bkv_member_t member_seen(node_t *node, const char *id) {
    const bkv_view_t *view = bkv_membership_view(node->membership);
    uint16_t at = bkv_placement_find(view->placement, id);
    cr_assert_neq(at, BKV_NO_MEMBER);
    bkv_member_t member = view->members[at];
    bkv_view_give(view);
    return member;
}

static void server_up(etcd_server_t *server) {
    etcd_server_init(server);
    etcd_server_start(server);
}

Test(membership, two_see_each_other_and_place_alike, .timeout = 60) {
    etcd_server_t server;
    node_t a = {0}, b = {0}, watcher = {0};
    server_up(&server);
    node_start_for(&a, &server, "a", 2, KEPT_S);
    wait_for_members(&a, "a");
    node_start_for(&b, &server, "b", 1, KEPT_S); // the cluster has 2 by now
    node_start(&watcher, &server, "", 1);
    wait_for_members(&a, "a b");
    wait_for_members(&b, "a b");
    wait_for_members(&watcher, "a b");
    cr_assert_eq(status_of(&a).state, BKV_MEMBERSHIP_MEMBER);
    bkv_member_t seen = member_seen(&b, "a"), expected = named("a");
    cr_assert_eq(seen.place.epoch, status_of(&a).epoch);
    expected.place.epoch = seen.place.epoch;
    cr_assert(bkv_member_equal(&seen, &expected));
    const bkv_view_t *of_a = bkv_membership_view(a.membership), *of_b = bkv_membership_view(b.membership);
    cr_assert(of_a->self == 0 && of_b->self == 1);
    for (uint32_t i = 0; i < 1000; i++) {
        uint16_t by_a[BKV_REPLICAS_MAX], by_b[BKV_REPLICAS_MAX];
        bkv_key_t key = key_number(i);
        cr_assert_eq(bkv_placement_owners(of_a->placement, &key, by_a), 2);
        cr_assert_eq(bkv_placement_owners(of_b->placement, &key, by_b), 2);
        cr_assert(by_a[0] == by_b[0] && by_a[1] == by_b[1]);
    }
    bkv_view_give(of_a);
    bkv_view_give(of_b);
    unsigned changes = atomic_load(&a.changes);
    sleep(KEPT_S + 1); // kept alive, and nothing changes
    cr_assert(atomic_load(&a.changes) == changes && atomic_load(&a.last_count) == 2);
    bkv_membership_metrics_t metrics;
    bkv_membership_get_metrics(a.membership, &metrics);
    cr_assert(metrics.members == 2 && metrics.connected == 1 && metrics.watching == 1 && metrics.rejoins_total == 0);
    node_crash(&a);
    node_crash(&b);
    node_crash(&watcher);
    etcd_server_clear(&server);
}

Test(membership, a_death_is_seen_after_the_lease_and_a_leave_at_once, .timeout = 60) {
    etcd_server_t server;
    node_t a = {0}, b = {0}, c = {0};
    server_up(&server);
    node_start(&a, &server, "a", 2);
    node_start(&b, &server, "b", 2);
    node_start_for(&c, &server, "c", 2, LONG_S);
    wait_for_members(&a, "a b c");
    node_crash(&b);
    uint64_t took_ms = wait_for_members(&a, "a c");
    cr_assert(took_ms > 500 && took_ms < TTL_S * 1000 + 6000, "%llu ms", (unsigned long long)took_ms);
    cr_assert_eq(bkv_membership_leave(c.membership, 5000, NULL), BKV_OK);
    took_ms = wait_for_members(&a, "a");
    cr_assert_lt(took_ms, LONG_S * 500, "%llu ms", (unsigned long long)took_ms);
    cr_assert_eq(status_of(&c).state, BKV_MEMBERSHIP_LEFT);
    wait_for_members(&c, "a"); // who has left still sees
    node_start(&b, &server, "b", 2);
    took_ms = wait_for_members(&a, "a b");
    cr_assert_lt(took_ms, 6000);
    node_crash(&a);
    node_crash(&b);
    node_crash(&c);
    etcd_server_clear(&server);
}

Test(membership, a_drain_and_a_weight_are_seen_by_all, .timeout = 60) {
    etcd_server_t server;
    node_t a = {0}, b = {0};
    server_up(&server);
    node_start(&a, &server, "a", 1);
    node_start(&b, &server, "b", 1);
    wait_for_members(&a, "a b");
    uint64_t epoch = member_seen(&a, "b").place.epoch, start_ms = bkv_now_ms();
    cr_assert_eq(bkv_membership_set_draining(b.membership, true), BKV_OK);
    cr_assert_eq(bkv_membership_set_weight(b.membership, 7), BKV_OK);
    while (!member_seen(&a, "b").place.draining || member_seen(&a, "b").place.weight != 7) {
        cr_assert_lt(bkv_now_ms() - start_ms, 10000);
        usleep(10000);
    }
    cr_assert_eq(member_seen(&a, "b").place.epoch, epoch);
    const bkv_view_t *view = bkv_membership_view(a.membership);
    for (uint32_t i = 0; i < 1000; i++) {
        uint16_t owners[BKV_REPLICAS_MAX];
        bkv_key_t key = key_number(i);
        cr_assert(bkv_placement_owners(view->placement, &key, owners) == 1 && owners[0] == 0);
    }
    bkv_view_give(view);
    node_crash(&a);
    node_crash(&b);
    etcd_server_clear(&server);
}

// ---- etcd fails ----

Test(membership, without_etcd_it_keeps_on_trying, .timeout = 60) {
    etcd_server_t server;
    node_t a = {0};
    etcd_server_init(&server);
    node_start(&a, &server, "a", 1);
    usleep(1500000);
    cr_assert_eq(status_of(&a).state, BKV_MEMBERSHIP_JOINING);
    cr_assert_neq(status_of(&a).trouble.status, BKV_OK);
    const bkv_view_t *view = bkv_membership_view(a.membership);
    cr_assert(view->version == 1 && view->count == 0);
    bkv_view_give(view);
    etcd_server_start(&server);
    wait_for_members(&a, "a");
    wait_for_state(&a, BKV_MEMBERSHIP_MEMBER);
    cr_assert_eq(status_of(&a).trouble.status, BKV_OK);
    node_crash(&a);
    etcd_server_clear(&server);
}

Test(membership, etcd_restarts_within_the_lease_and_nobody_is_lost, .timeout = 60) {
    etcd_server_t server;
    node_t a = {0}, b = {0};
    server_up(&server);
    node_start_for(&a, &server, "a", 2, KEPT_S);
    node_start_for(&b, &server, "b", 2, KEPT_S);
    wait_for_members(&a, "a b");
    wait_for_members(&b, "a b");
    uint64_t epoch = status_of(&a).epoch;
    unsigned changes = atomic_load(&a.changes);
    etcd_server_kill(&server);
    etcd_server_start(&server);
    sleep(KEPT_S + TTL_S);
    wait_for_state(&a, BKV_MEMBERSHIP_MEMBER);
    wait_for_state(&b, BKV_MEMBERSHIP_MEMBER);
    cr_assert_eq(status_of(&a).epoch, epoch);
    cr_assert_eq(atomic_load(&a.changes), changes, "not even a new view");
    node_crash(&b); // and it still watches
    wait_for_members(&a, "a");
    node_crash(&a);
    etcd_server_clear(&server);
}

Test(membership, cut_off_it_keeps_its_view_and_says_so, .timeout = 60) {
    etcd_server_t server;
    node_t a = {0}, b = {0};
    server_up(&server);
    node_start(&a, &server, "a", 2);
    node_start(&b, &server, "b", 2);
    wait_for_members(&a, "a b");
    etcd_server_stop(&server);
    wait_for_state(&a, BKV_MEMBERSHIP_CUT_OFF);
    sleep(TTL_S);
    wait_for_members(&a, "a b");
    cr_assert_neq(status_of(&a).trouble.status, BKV_OK);
    etcd_server_continue(&server);
    wait_for_state(&a, BKV_MEMBERSHIP_MEMBER);
    wait_for_state(&b, BKV_MEMBERSHIP_MEMBER);
    sleep(2 * TTL_S);
    wait_for_members(&a, "a b"); // the leases were lost, but nobody has been counted out for it
    wait_for_members(&b, "a b");
    cr_assert(atomic_load(&a.shrinks) == 0 && atomic_load(&b.shrinks) == 0);
    cr_assert_eq(member_seen(&a, "b").place.epoch, status_of(&b).epoch);
    node_crash(&b);
    wait_for_members(&a, "a");
    node_start(&b, &server, "b", 2);
    wait_for_members(&a, "a b");
    node_crash(&a);
    node_crash(&b);
    etcd_server_clear(&server);
}

// The lease is taken away by another hand: the record goes, and comes again under a new epoch.
Test(membership, a_lost_lease_is_a_new_epoch, .timeout = 60) {
    etcd_server_t server;
    node_t a = {0}, b = {0};
    server_up(&server);
    node_start(&a, &server, "a", 2);
    node_start(&b, &server, "b", 2);
    wait_for_members(&b, "a b");
    uint64_t epoch = status_of(&a).epoch;
    bkv_etcd_t *etcd = asker_create(&server);
    const answer_t *answer = ask(etcd, (question_t){.kind = ASK_LIST, .key = "/balancekv/test/members/a", .limit = 1});
    cr_assert_eq(answer->reply.count, 1);
    cr_assert_eq(ask(etcd, (question_t){.kind = ASK_REVOKE, .lease = answer->kvs[0].lease})->error.status, BKV_OK);
    uint64_t start_ms = bkv_now_ms();
    while (status_of(&a).epoch == epoch || status_of(&a).state != BKV_MEMBERSHIP_MEMBER ||
           member_seen(&b, "a").place.epoch != status_of(&a).epoch) {
        cr_assert_lt(bkv_now_ms() - start_ms, 15000);
        usleep(10000);
        wait_for_members(&b, "a b");
    }
    bkv_membership_metrics_t metrics;
    bkv_membership_get_metrics(a.membership, &metrics);
    cr_assert_eq(metrics.rejoins_total, 1);
    bkv_etcd_destroy(etcd);
    node_crash(&a);
    node_crash(&b);
    etcd_server_clear(&server);
}

Test(membership, a_record_deleted_by_hand_is_written_again, .timeout = 60) {
    etcd_server_t server;
    node_t a = {0}, b = {0};
    server_up(&server);
    node_start(&a, &server, "a", 2);
    node_start(&b, &server, "b", 2);
    wait_for_members(&b, "a b");
    uint64_t epoch = status_of(&a).epoch;
    unsigned changes = atomic_load(&b.changes);
    etcd_server_control(&server, "del /balancekv/test/members/a");
    uint64_t start_ms = bkv_now_ms();
    while (atomic_load(&b.changes) == changes) {
        cr_assert_lt(bkv_now_ms() - start_ms, 15000);
        usleep(1000);
    }
    wait_for_members(&b, "a b");
    cr_assert_eq(member_seen(&b, "a").place.epoch, epoch, "the lease was there all the time");
    etcd_server_control(&server, "put /balancekv/test/members/a nonsense");
    wait_for_members(&b, "b"); // not a member for the others, until it sees to that itself
    etcd_server_control(&server, "del /balancekv/test/members/a");
    wait_for_members(&b, "a b");
    node_crash(&a);
    node_crash(&b);
    etcd_server_clear(&server);
}

Test(membership, an_etcd_that_lost_everything_is_filled_again, .timeout = 60) {
    etcd_server_t server;
    node_t a = {0}, b = {0};
    server_up(&server);
    node_start(&a, &server, "a", 2);
    node_start(&b, &server, "b", 2);
    wait_for_members(&a, "a b");
    wait_for_members(&b, "a b");
    const bkv_view_t *before = bkv_membership_view(a.membership);
    etcd_server_kill(&server);
    etcd_server_wipe(&server);
    etcd_server_start(&server);
    uint64_t start_ms = bkv_now_ms(), epoch = before->members[0].place.epoch;
    while (status_of(&a).epoch == epoch || status_of(&b).state != BKV_MEMBERSHIP_MEMBER) {
        cr_assert_lt(bkv_now_ms() - start_ms, WAIT_MS);
        usleep(10000);
    }
    sleep(4);
    wait_for_members(&a, "a b");
    wait_for_members(&b, "a b");
    cr_assert(atomic_load(&a.shrinks) == 0 && atomic_load(&b.shrinks) == 0);
    const bkv_view_t *after = bkv_membership_view(b.membership);
    for (uint32_t slot = 0; slot < BKV_PLACEMENT_SLOTS; slot += 1001) { // the seed is what it was
        uint16_t was[BKV_REPLICAS_MAX], is[BKV_REPLICAS_MAX];
        bkv_placement_slot_owners(before->placement, slot, was);
        bkv_placement_slot_owners(after->placement, slot, is);
        cr_assert(was[0] == is[0] && was[1] == is[1]);
    }
    bkv_view_give(before);
    bkv_view_give(after);
    node_crash(&a);
    node_crash(&b);
    etcd_server_clear(&server);
}

Test(membership, a_full_etcd_takes_nobody_in_and_loses_nobody, .timeout = 60) {
    etcd_server_t server;
    node_t a = {0}, b = {0};
    etcd_server_init(&server);
    server.quota_bytes = 1 << 20;
    etcd_server_start(&server);
    node_start(&a, &server, "a", 2);
    wait_for_members(&a, "a");
    bkv_etcd_t *etcd = asker_create(&server);
    ask_fill(etcd);
    node_start(&b, &server, "b", 2);
    sleep(2 * TTL_S);
    cr_assert_eq(status_of(&a).state, BKV_MEMBERSHIP_MEMBER);
    cr_assert_eq(status_of(&b).state, BKV_MEMBERSHIP_JOINING);
    cr_assert_eq(status_of(&b).trouble.status, BKV_RESOURCE_EXHAUSTED, "%s", status_of(&b).trouble.message);
    wait_for_members(&b, "a");
    bkv_etcd_destroy(etcd);
    node_crash(&a);
    node_crash(&b);
    etcd_server_clear(&server);
}

// ---- one id, two daemons ----

Test(membership, an_id_belongs_to_who_holds_it, .timeout = 60) {
    etcd_server_t server;
    node_t first = {0}, second = {0};
    server_up(&server);
    node_start_for(&first, &server, "a", 2, LONG_S);
    wait_for_members(&first, "a");
    uint64_t epoch = status_of(&first).epoch;
    bkv_member_t elsewhere = named("a");
    snprintf(elsewhere.addresses[0], sizeof(elsewhere.addresses[0]), "another.example:7420");
    node_start_as(&second, &server, &elsewhere, 2, TTL_S);
    wait_for_state(&second, BKV_MEMBERSHIP_BLOCKED);
    cr_assert_not_null(strstr(status_of(&second).trouble.message, "a.example:7420"), "%s", status_of(&second).trouble.message);
    sleep(LONG_S + TTL_S);
    cr_assert_eq(status_of(&second).state, BKV_MEMBERSHIP_BLOCKED);
    cr_assert(status_of(&first).state == BKV_MEMBERSHIP_MEMBER && status_of(&first).epoch == epoch);
    cr_assert_eq(bkv_membership_leave(first.membership, 5000, NULL), BKV_OK);
    uint64_t start_ms = bkv_now_ms();
    wait_for_state(&second, BKV_MEMBERSHIP_MEMBER);
    cr_assert_lt(bkv_now_ms() - start_ms, LONG_S * 500);
    node_crash(&first);
    node_crash(&second);
    etcd_server_clear(&server);
}

// The daemon was killed, and its lease goes on; the new one has its addresses.
Test(membership, who_starts_where_it_was_killed_takes_its_place_at_once, .timeout = 60) {
    etcd_server_t server;
    node_t first = {0}, second = {0}, other = {0};
    server_up(&server);
    node_start_for(&first, &server, "a", 2, LONG_S);
    node_start_for(&other, &server, "b", 2, LONG_S);
    wait_for_members(&other, "a b");
    uint64_t epoch = member_seen(&other, "a").place.epoch, start_ms = bkv_now_ms();
    node_crash(&first);
    node_start_for(&second, &server, "a", 2, LONG_S);
    wait_for_state(&second, BKV_MEMBERSHIP_MEMBER);
    while (member_seen(&other, "a").place.epoch == epoch) {
        cr_assert_lt(bkv_now_ms() - start_ms, WAIT_MS);
        usleep(10000);
    }
    cr_assert_lt(bkv_now_ms() - start_ms, LONG_S * 500);
    cr_assert_eq(member_seen(&other, "a").place.epoch, status_of(&second).epoch);
    sleep(LONG_S); // the first one's lease ends, and nothing with it
    cr_assert_eq(status_of(&second).state, BKV_MEMBERSHIP_MEMBER);
    cr_assert_eq(atomic_load(&other.shrinks), 0);
    node_crash(&second);
    node_crash(&other);
    etcd_server_clear(&server);
}

// Two daemons with one id and, by mistake, the same addresses: the later one has it, and they do not take it from each other.
Test(membership, an_id_and_an_address_given_twice_change_hands_once, .timeout = 60) {
    etcd_server_t server;
    node_t first = {0}, second = {0};
    server_up(&server);
    node_start_for(&first, &server, "a", 2, LONG_S);
    wait_for_state(&first, BKV_MEMBERSHIP_MEMBER);
    node_start_for(&second, &server, "a", 2, LONG_S);
    wait_for_state(&second, BKV_MEMBERSHIP_MEMBER);
    wait_for_state(&first, BKV_MEMBERSHIP_BLOCKED);
    uint64_t epoch = status_of(&second).epoch;
    sleep(LONG_S + TTL_S);
    cr_assert_eq(status_of(&first).state, BKV_MEMBERSHIP_BLOCKED);
    cr_assert(status_of(&second).state == BKV_MEMBERSHIP_MEMBER && status_of(&second).epoch == epoch);
    node_crash(&first);
    node_crash(&second);
    etcd_server_clear(&server);
}

Test(membership, what_cannot_be_registered_is_refused) {
    etcd_server_t server;
    bkv_membership_t *membership = NULL;
    bkv_error_t err;
    etcd_server_init(&server);
    bkv_etcd_t *etcd = asker_create(&server);
    const bkv_membership_config_t good = {.etcd = etcd, .cluster = "test", .self = named("a"), .ttl_s = 5, .replicas = 2};
    bkv_membership_config_t config = good;
    config.cluster = "a/b";
    cr_assert_eq(bkv_membership_create(&config, &membership, &err), BKV_INVALID_ARGUMENT);
    cr_assert_not_null(strstr(err.message, "cluster"));
    config = good;
    config.ttl_s = 0;
    cr_assert_eq(bkv_membership_create(&config, &membership, &err), BKV_INVALID_ARGUMENT);
    config = good;
    config.replicas = BKV_REPLICAS_MAX + 1;
    cr_assert_eq(bkv_membership_create(&config, &membership, &err), BKV_INVALID_ARGUMENT);
    config = good;
    config.self.addresses[0][0] = ' ';
    cr_assert_eq(bkv_membership_create(&config, &membership, &err), BKV_INVALID_ARGUMENT);
    cr_assert_null(membership);
    cr_assert_eq(bkv_membership_create(&good, &membership, &err), BKV_OK);
    cr_assert_eq(bkv_membership_leave(membership, 300, &err), BKV_OK, "it never was one: %s", err.message);
    bkv_membership_destroy(membership);
    bkv_etcd_destroy(etcd);
    etcd_server_clear(&server);
}
