// test_bandwidth.c - the token bucket, on a clock of the test's own.
#include "daemon/cluster/move/bandwidth.h"

#include <criterion/criterion.h>

#define S 1000000000ull

// Sends pieces of `bytes` as early as possible for `seconds`; returns how many bytes went.
static uint64_t drive(bkv_bandwidth_t *bandwidth, uint64_t *now_ns, uint64_t seconds, uint64_t bytes) {
    uint64_t end_ns = *now_ns + seconds * S, sent = 0;
    while (*now_ns < end_ns) {
        uint64_t wait_ns = bkv_bandwidth_wait_ns(bandwidth, *now_ns);
        if (wait_ns == 0) {
            bkv_bandwidth_take(bandwidth, bytes, *now_ns);
            sent += bytes;
        }
        *now_ns += wait_ns;
    }
    return sent;
}

Test(bandwidth, the_average_is_the_rate_for_pieces_of_any_size) {
    const uint64_t pieces[] = {1000, 100000, 50000000};
    for (int i = 0; i < 3; i++) {
        bkv_bandwidth_t bandwidth;
        uint64_t now_ns = 12345;
        bkv_bandwidth_init(&bandwidth, 10000000, 0, now_ns);
        uint64_t sent = drive(&bandwidth, &now_ns, 100, pieces[i]);
        cr_assert_geq(sent, 1000000000 - pieces[i]);
        cr_assert_leq(sent, 1000000000 + 1000001 + pieces[i], "%llu", (unsigned long long)sent); // a burst, and one piece
    }
}

Test(bandwidth, slow_rates_do_not_lose_time) {
    bkv_bandwidth_t bandwidth;
    bkv_bandwidth_init(&bandwidth, 3, 1, 0);
    bkv_bandwidth_take(&bandwidth, 301, 0);
    for (uint64_t now_ns = 0; now_ns < 100 * S; now_ns += 12345678) { // asked often, each time for less than a byte
        cr_assert_gt(bkv_bandwidth_wait_ns(&bandwidth, now_ns), 0);
    }
    cr_assert_eq(bkv_bandwidth_wait_ns(&bandwidth, 101 * S), 0);
}

Test(bandwidth, idle_time_is_worth_one_burst) {
    bkv_bandwidth_t bandwidth;
    bkv_bandwidth_init(&bandwidth, 1000, 500, 0);
    uint64_t now_ns = 3600 * S;
    cr_assert_eq(bkv_bandwidth_wait_ns(&bandwidth, now_ns), 0);
    bkv_bandwidth_take(&bandwidth, 500, now_ns);
    cr_assert_eq(bkv_bandwidth_wait_ns(&bandwidth, now_ns), S / 1000);
}

Test(bandwidth, no_rate_is_no_limit) {
    bkv_bandwidth_t bandwidth;
    bkv_bandwidth_init(&bandwidth, 0, 0, 0);
    bkv_bandwidth_take(&bandwidth, UINT64_MAX, 0);
    cr_assert_eq(bkv_bandwidth_wait_ns(&bandwidth, 0), 0);
    bkv_bandwidth_set_rate(&bandwidth, 1000, 5);
    cr_assert_leq(bkv_bandwidth_wait_ns(&bandwidth, 5), S / 1000);
}

Test(bandwidth, extremes_neither_overflow_nor_run_backwards) {
    bkv_bandwidth_t bandwidth;
    bkv_bandwidth_init(&bandwidth, UINT64_MAX, 0, UINT64_MAX / 2);
    for (int i = 0; i < 5; i++) {
        bkv_bandwidth_take(&bandwidth, UINT64_MAX, UINT64_MAX / 2);
    }
    cr_assert_gt(bkv_bandwidth_wait_ns(&bandwidth, UINT64_MAX / 2), 0);
    cr_assert_gt(bkv_bandwidth_wait_ns(&bandwidth, 0), 0); // an earlier reading of the clock
    cr_assert_eq(bkv_bandwidth_wait_ns(&bandwidth, UINT64_MAX), 0);
}
