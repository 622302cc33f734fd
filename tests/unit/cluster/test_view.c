// test_view.c - views under readers that take and give while others are published.
#include "members.h"

#include "daemon/cluster/members/view.h"

#include <criterion/criterion.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define READERS 3

static bkv_views_t views;

static bkv_member_t member_of(uint64_t number) {
    bkv_member_t member = {.capacity_bytes = number};
    snprintf(member.place.id, sizeof(member.place.id), "node-%llu", (unsigned long long)number % 10);
    member.place.weight = 1;
    member.place.epoch = number;
    return member;
}

static bkv_status_t publish(uint64_t number, bkv_error_t *err) {
    bkv_member_t member = member_of(number);
    return bkv_views_publish(&views,
                             &(bkv_view_config_t){.members = &member,
                                                  .count = 1,
                                                  .revision = (int64_t)number,
                                                  .self = "node-3",
                                                  .cluster = {.seed = 1, .replicas = 1}},
                             err);
}

Test(view, the_first_has_no_members) {
    cr_assert_eq(bkv_views_init(&views, NULL), BKV_OK);
    const bkv_view_t *view = bkv_view_take(&views);
    bkv_key_t key = {{0}};
    uint16_t owners[BKV_REPLICAS_MAX];
    cr_assert(view->version == 1 && view->count == 0 && view->revision == 0 && view->self == BKV_NO_MEMBER);
    cr_assert_eq(bkv_placement_owners(view->placement, &key, owners), 0);
    bkv_view_give(view);
    bkv_views_deinit(&views);
}

Test(view, one_that_is_held_stays_as_it_is) {
    bkv_error_t err;
    cr_assert_eq(bkv_views_init(&views, NULL), BKV_OK);
    const bkv_view_t *held[BKV_VIEWS_MAX];
    for (uint64_t i = 0; i < BKV_VIEWS_MAX - 1; i++) {
        cr_assert_eq(publish(i, NULL), BKV_OK);
        held[i] = bkv_view_take(&views);
    }
    cr_assert_eq(publish(99, NULL), BKV_OK); // the first one's place is free by now
    cr_assert_eq(publish(100, &err), BKV_BUSY, "nobody has given any back");
    const bkv_view_t *present = bkv_view_take(&views);
    cr_assert_eq(present->revision, 99);
    bkv_view_give(present);
    for (uint64_t i = 0; i < BKV_VIEWS_MAX - 1; i++) {
        bkv_member_t expected = member_of(i);
        cr_assert(held[i]->version == i + 2 && held[i]->count == 1);
        cr_assert(bkv_member_equal(held[i]->members, &expected));
        cr_assert_eq(held[i]->self, i % 10 == 3 ? 0 : BKV_NO_MEMBER);
        bkv_view_give(held[i]);
    }
    cr_assert_eq(publish(101, NULL), BKV_OK);
    bkv_views_deinit(&views);
}

static atomic_bool stop;

static void *read_views(void *user) {
    uint64_t *reads = user, last = 0;
    while (!atomic_load(&stop)) {
        const bkv_view_t *view = bkv_view_take(&views);
        cr_assert_geq(view->version, last, "views never go back");
        last = view->version;
        if (view->count == 1) {
            cr_assert_eq(view->members[0].capacity_bytes, (uint64_t)view->revision);
            cr_assert_eq(bkv_placement_member(view->placement, 0)->epoch, (uint64_t)view->revision);
        }
        bkv_view_give(view);
        ++*reads;
    }
    return NULL;
}

Test(view, readers_and_a_publisher, .timeout = 60) {
    pthread_t threads[READERS];
    uint64_t reads[READERS] = {0};
    cr_assert_eq(bkv_views_init(&views, NULL), BKV_OK);
    for (int i = 0; i < READERS; i++) {
        cr_assert_eq(pthread_create(&threads[i], NULL, read_views, &reads[i]), 0);
    }
    for (uint64_t number = 1; number <= ROUNDS(60); number++) {
        cr_assert_eq(publish(number, NULL), BKV_OK);
    }
    atomic_store(&stop, true);
    for (int i = 0; i < READERS; i++) {
        pthread_join(threads[i], NULL);
        cr_assert_gt(reads[i], 0);
    }
    bkv_views_deinit(&views);
}
