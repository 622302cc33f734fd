// test_clock.c - the clock runs forward, in the units it says.
#include "daemon/observe/clock.h"

#include <criterion/criterion.h>
#include <time.h>

Test(observe_clock, is_the_monotonic_clock) {
    struct timespec now;
    uint64_t before_us = bkv_now_us();
    clock_gettime(CLOCK_MONOTONIC, &now);
    uint64_t after_us = bkv_now_us();
    uint64_t now_us = (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
    cr_assert(before_us <= now_us && now_us <= after_us);
    cr_assert_leq(after_us / 1000, bkv_now_ms());
}
