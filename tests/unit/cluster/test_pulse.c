// What is made of a peer's answers and of its silence.
#include "daemon/cluster/peer/pulse.h"

#include <criterion/criterion.h>

#define TIMEOUT 1000 // ms

typedef struct reading {
    bool suspected;
    uint64_t latency_us, patience_us;
} reading_t;

static reading_t read_pulse(bkv_pulse_t *pulse) {
    reading_t reading;
    bkv_pulse_read(pulse, &reading.suspected, &reading.latency_us, &reading.patience_us);
    return reading;
}

Test(pulse, nothing_is_known_at_first) {
    bkv_pulse_t pulse;
    bkv_pulse_init(&pulse, TIMEOUT);
    reading_t reading = read_pulse(&pulse);
    cr_assert(!reading.suspected && reading.latency_us == 0);
    cr_assert(reading.patience_us > 16000 && reading.patience_us < 25000, "%llu", (unsigned long long)reading.patience_us);
    bkv_pulse_deinit(&pulse);
}

Test(pulse, patience_is_near_the_95th_percentile) {
    bkv_pulse_t pulse;
    bkv_pulse_init(&pulse, TIMEOUT);
    for (uint32_t i = 0; i < 2000; i++) {
        bkv_pulse_answered(&pulse, 3000 + i % 100 * 10, true); // up to 4 ms
        if (i % 25 == 0) {
            bkv_pulse_answered(&pulse, 200000, false); // and 4 % of 200 ms
        }
    }
    reading_t reading = read_pulse(&pulse);
    cr_assert(reading.patience_us >= 3950 && reading.patience_us <= 5120, "%llu", (unsigned long long)reading.patience_us);
    cr_assert(reading.latency_us >= 3000 && reading.latency_us <= 4000, "%llu", (unsigned long long)reading.latency_us);
    for (uint32_t i = 0; i < 2000; i++) { // it becomes slower: that is what is usual soon
        bkv_pulse_answered(&pulse, 50000, true);
    }
    reading = read_pulse(&pulse);
    cr_assert(reading.patience_us >= 50000 && reading.patience_us <= 65536, "%llu", (unsigned long long)reading.patience_us);
    cr_assert(reading.latency_us >= 49000, "%llu", (unsigned long long)reading.latency_us);
    bkv_pulse_deinit(&pulse);
}

Test(pulse, patience_has_bounds) {
    bkv_pulse_t pulse;
    bkv_pulse_init(&pulse, 50);
    for (uint32_t i = 0; i < 1000; i++) {
        bkv_pulse_answered(&pulse, 0, true);
    }
    cr_assert_eq(read_pulse(&pulse).patience_us, 1000);
    cr_assert_eq(read_pulse(&pulse).latency_us, 1);
    for (uint32_t i = 0; i < 1000; i++) {
        bkv_pulse_answered(&pulse, UINT64_MAX >> 8, false);
    }
    cr_assert_eq(read_pulse(&pulse).patience_us, 50000);
    bkv_pulse_deinit(&pulse);
}

Test(pulse, silence_adds_up_until_a_word_comes) {
    bkv_pulse_t pulse;
    bkv_pulse_init(&pulse, TIMEOUT);
    uint64_t now = 1000000;
    for (uint32_t i = 0; i < 9; i++) { // asked for 100 ms at a time, with long pauses
        cr_assert(!bkv_pulse_silent(&pulse, now, now + 100));
        now += 60000;
    }
    cr_assert(!bkv_pulse_heard(&pulse, now));
    for (uint32_t i = 0; i < 9; i++, now += 60000) {
        cr_assert(!bkv_pulse_silent(&pulse, now, now + 100));
    }
    cr_assert(bkv_pulse_silent(&pulse, now, now + 100));
    cr_assert(!bkv_pulse_silent(&pulse, now, now + 5000), "that is no news");
    cr_assert(bkv_pulse_suspected(&pulse));
    cr_assert(bkv_pulse_heard(&pulse, now + 5000));
    cr_assert(!bkv_pulse_suspected(&pulse));
    bkv_pulse_deinit(&pulse);
}

Test(pulse, no_time_counts_twice) {
    bkv_pulse_t pulse;
    bkv_pulse_init(&pulse, TIMEOUT);
    for (uint32_t i = 0; i < 100; i++) { // a hundred questions at the same time
        cr_assert(!bkv_pulse_silent(&pulse, 1000, 1500));
    }
    bkv_pulse_heard(&pulse, 3000);
    cr_assert(!bkv_pulse_silent(&pulse, 2000, 3900), "it spoke at 3000");
    cr_assert(bkv_pulse_silent(&pulse, 2000, 4000));
    bkv_pulse_deinit(&pulse);
}

Test(pulse, probes_come_ever_more_rarely) {
    bkv_pulse_t pulse;
    bkv_pulse_init(&pulse, TIMEOUT);
    cr_assert(!bkv_pulse_probe(&pulse, 1000), "who is not suspected is not probed");
    cr_assert(bkv_pulse_unreachable(&pulse, 1000));
    cr_assert(!bkv_pulse_unreachable(&pulse, 1001));
    uint64_t now = 1000, pauses[8];
    for (uint32_t i = 0; i < 8; i++) {
        uint64_t before = now;
        while (!bkv_pulse_probe(&pulse, now)) {
            now++;
        }
        pauses[i] = now - before;
        cr_assert(i == 0 || pauses[i] >= pauses[i - 1]);
    }
    cr_assert(pauses[0] <= 250 && pauses[7] >= 1000 && pauses[7] <= 2000);
    bkv_pulse_heard(&pulse, now);
    cr_assert(!bkv_pulse_probe(&pulse, now + 100000));
    bkv_pulse_deinit(&pulse);
}
