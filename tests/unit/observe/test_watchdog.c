// test_watchdog.c - only work without progress is a stall.
#include "daemon/observe/watchdog.h"

#include <criterion/criterion.h>

Test(observe_watchdog, idle_is_alive_however_long) {
    bkv_watchdog_t watchdog = {.stall_ms = 100};
    for (uint64_t now = 1; now < 100000; now += 1000) {
        cr_assert(bkv_watchdog_check(&watchdog, 0, 0, now));
    }
}

Test(observe_watchdog, work_without_progress_is_a_stall) {
    bkv_watchdog_t watchdog = {.stall_ms = 100};
    cr_assert(bkv_watchdog_check(&watchdog, 7, 0, 1000));
    cr_assert(bkv_watchdog_check(&watchdog, 7, 2, 1050));
    cr_assert(bkv_watchdog_check(&watchdog, 7, 2, 1100));
    cr_assert_not(bkv_watchdog_check(&watchdog, 7, 2, 1101));
    cr_assert(bkv_watchdog_check(&watchdog, 8, 1, 1102), "one job ended");
    cr_assert(bkv_watchdog_check(&watchdog, 8, 1, 1202));
    cr_assert_not(bkv_watchdog_check(&watchdog, 8, 1, 1203));
    cr_assert(bkv_watchdog_check(&watchdog, 8, 0, 1204), "nothing left to do");
}

Test(observe_watchdog, work_at_the_first_look_is_given_its_time) {
    bkv_watchdog_t watchdog = {.stall_ms = 100};
    cr_assert(bkv_watchdog_check(&watchdog, 0, 1, 500000));
    cr_assert(bkv_watchdog_check(&watchdog, 0, 1, 500100));
    cr_assert_not(bkv_watchdog_check(&watchdog, 0, 1, 500101));
}
