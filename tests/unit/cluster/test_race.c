// test_race.c - the fixed-point logarithm against libm's, and what a race promises of its numbers.
#include "members.h"

#include "proto/race.h"
#include <criterion/criterion.h>
#include <math.h>

static double exact(uint64_t h) {
    return (double)(-log1pl(-ldexpl((long double)h, -64)) / logl(2));
}

static void check(const bkv_race_t *race, uint64_t h) {
    uint64_t fixed = bkv_race_minus_log2(race, h);
    double error = fabs(ldexp((double)fixed, -57) - exact(h));
    cr_assert_lt(error, 0x1p-36, "h %llx: off by %g", (unsigned long long)h, error);
    cr_assert_geq(fixed, h >> 7);
    cr_assert_leq(fixed, 1ull << 63);
}

Test(race, logarithm_is_near_libm) {
    bkv_race_t race;
    bkv_race_init(&race);
    uint64_t state = 1;
    for (int i = 0; i < ROUNDS(200000); i++) {
        uint64_t h = random_next(&state);
        check(&race, h);
        check(&race, h >> (i % 40));        // near 0
        check(&race, ~(h >> (i % 40)) - 1); // near 1
    }
    check(&race, 0);
    check(&race, 1);
    cr_assert_eq(bkv_race_minus_log2(&race, UINT64_MAX), 1ull << 63);
}

Test(race, no_time_is_below_its_floor) {
    bkv_race_t race;
    bkv_race_init(&race);
    uint64_t state = 2;
    for (int i = 0; i < ROUNDS(200000); i++) {
        uint64_t h = random_next(&state) >> (i % 64);
        uint64_t share = bkv_race_share((uint32_t)(random_next(&state) % BKV_WEIGHT_MAX) + 1);
        cr_assert_geq(bkv_race_time(&race, h, share), bkv_race_floor(h, share));
    }
}

// Times of weight w have the mean 1 / w of those of weight 1.
Test(race, times_are_exponential) {
    bkv_race_t race;
    bkv_race_init(&race);
    uint64_t state = 3;
    const uint32_t weights[] = {1, 3, 1000, BKV_WEIGHT_MAX};
    for (int w = 0; w < 4; w++) {
        double sum = 0, squares = 0;
        const int n = ROUNDS(100000);
        for (int i = 0; i < n; i++) {
            double time = ldexp((double)bkv_race_time(&race, random_next(&state), bkv_race_share(weights[w])), -57);
            sum += time;
            squares += time * time;
        }
        double mean = sum / n * weights[w] * log(2), square = squares / n * weights[w] * weights[w] * log(2) * log(2);
        cr_assert_float_eq(mean, 1, 0.02, "weight %u: mean %g", weights[w], mean);
        cr_assert_float_eq(square, 2, 0.1, "weight %u: second moment %g", weights[w], square);
    }
}
