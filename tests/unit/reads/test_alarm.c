// test_alarm.c - what rings when, and what is called off.
#include "daemon/cluster/alarm.h"

#include "daemon/observe/clock.h"

#include <criterion/criterion.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

typedef struct bell {
    bkv_alarm_t alarm;
    bkv_alarms_t *alarms;
    _Atomic uint32_t rung;
    _Atomic uint64_t rung_us;
    uint32_t again; // times that it sets itself
} bell_t;

static void on_ring(void *user) {
    bell_t *bell = user;
    atomic_store(&bell->rung_us, bkv_now_us());
    if (bell->again > 0) {
        bell->again--;
        bkv_alarm_set(bell->alarms, &bell->alarm, bkv_now_us() + 1000);
    }
    atomic_fetch_add(&bell->rung, 1);
}

static void nap_ms(uint32_t ms) {
    nanosleep(&(struct timespec){.tv_sec = ms / 1000, .tv_nsec = (long)(ms % 1000) * 1000000}, NULL);
}

static void wait_for(bell_t *bell, uint32_t times) {
    for (uint32_t i = 0; i < 10000 && atomic_load(&bell->rung) < times; i++) {
        nap_ms(1);
    }
    cr_assert_eq(atomic_load(&bell->rung), times);
}

Test(alarm, rings_in_order_of_time, .timeout = 30) {
    bkv_alarms_t *alarms;
    cr_assert_eq(bkv_alarms_create(&alarms, NULL), BKV_OK);
    nap_ms(5); // it sleeps for ever by now
    static const uint32_t delays_ms[] = {60, 20, 90, 40, 20};
    bell_t bells[5] = {0};
    uint64_t now_us = bkv_now_us();
    for (uint32_t i = 0; i < 5; i++) {
        bells[i].alarm = (bkv_alarm_t){.ring = on_ring, .user = &bells[i]};
        bkv_alarm_set(alarms, &bells[i].alarm, now_us + delays_ms[i] * 1000);
    }
    for (uint32_t i = 0; i < 5; i++) {
        wait_for(&bells[i], 1);
        cr_assert_geq(atomic_load(&bells[i].rung_us), now_us + delays_ms[i] * 1000);
    }
    static const uint32_t order[] = {1, 4, 3, 0, 2};
    for (uint32_t i = 1; i < 5; i++) {
        cr_assert_leq(atomic_load(&bells[order[i - 1]].rung_us), atomic_load(&bells[order[i]].rung_us));
    }
    bkv_alarms_destroy(alarms);
}

Test(alarm, one_that_is_called_off_does_not_ring, .timeout = 30) {
    bkv_alarms_t *alarms;
    cr_assert_eq(bkv_alarms_create(&alarms, NULL), BKV_OK);
    bell_t bells[3] = {0};
    for (uint32_t i = 0; i < 3; i++) {
        bells[i].alarm = (bkv_alarm_t){.ring = on_ring, .user = &bells[i]};
        bkv_alarm_set(alarms, &bells[i].alarm, bkv_now_us() + 50000 + i * 1000);
    }
    cr_assert(bkv_alarm_cancel(alarms, &bells[0].alarm) && bkv_alarm_cancel(alarms, &bells[1].alarm));
    cr_assert(!bkv_alarm_cancel(alarms, &bells[1].alarm));
    wait_for(&bells[2], 1);
    cr_assert(!bkv_alarm_cancel(alarms, &bells[2].alarm));
    cr_assert(atomic_load(&bells[0].rung) == 0 && atomic_load(&bells[1].rung) == 0);
    bkv_alarms_destroy(alarms);
}

Test(alarm, may_be_set_again_by_its_ring, .timeout = 30) {
    bkv_alarms_t *alarms;
    cr_assert_eq(bkv_alarms_create(&alarms, NULL), BKV_OK);
    bell_t bell = {.alarms = alarms, .again = 20};
    bell.alarm = (bkv_alarm_t){.ring = on_ring, .user = &bell};
    bkv_alarm_set(alarms, &bell.alarm, 0); // long past
    wait_for(&bell, 21);
    bkv_alarms_destroy(alarms);
}

// Each is rung or called off, never both: who counts references by that counts right.
Test(alarm, set_and_called_off_at_once_with_ringing, .timeout = 60) {
    bkv_alarms_t *alarms;
    cr_assert_eq(bkv_alarms_create(&alarms, NULL), BKV_OK);
    uint32_t called_off = 0;
    for (uint32_t i = 0; i < 3000; i++) {
        bell_t *bell = calloc(1, sizeof(*bell));
        bell->alarm = (bkv_alarm_t){.ring = on_ring, .user = bell};
        bkv_alarm_set(alarms, &bell->alarm, bkv_now_us() + i % 100);
        uint64_t until_us = bkv_now_us() + i % 97;
        while (bkv_now_us() < until_us) {
        }
        if (bkv_alarm_cancel(alarms, &bell->alarm)) {
            called_off++;
            cr_assert_eq(atomic_load(&bell->rung), 0);
        } else {
            wait_for(bell, 1);
        }
        free(bell);
    }
    cr_assert(called_off > 0 && called_off < 3000, "%u", called_off);
    bkv_alarms_destroy(alarms);
}
