// race.c - the fixed-point logarithm of race.h.
#include "proto/race.h"

#define ONE   63                  // 1.0 is 1 << ONE
#define LOG2E 0xb8aa3b295c17f0bcu // log2(e) times 2^63

// log2(x / 2^63) of x in [2^63, 2^64), times 2^63. Squaring a number doubles its logarithm: each time it passes 2, the next
// binary digit is 1.
static uint64_t log2_by_squaring(uint64_t x) {
    uint64_t digits = 0;
    for (int i = 0; i < ONE; i++) {
        bkv_u128_t square = (bkv_u128_t)x * x >> ONE;
        digits <<= 1;
        if (square >> 64 != 0) {
            digits |= 1;
            square >>= 1;
        }
        x = (uint64_t)square;
    }
    return digits;
}

void bkv_race_init(bkv_race_t *race) {
    for (uint64_t j = 0; j < BKV_RACE_SEGMENTS; j++) {
        race->log2_of[j] = log2_by_squaring((BKV_RACE_SEGMENTS + j) << 56);
        race->inverse[j] = (uint64_t)(((bkv_u128_t)1 << 70) / (BKV_RACE_SEGMENTS + j));
    }
}

uint64_t bkv_race_minus_log2(const bkv_race_t *race, uint64_t h) {
    if (h == 0) {
        return 0;
    }
    uint64_t y = 0 - h; // 2^64 (1 - x)
    unsigned zeros = (unsigned)__builtin_clzll(y);
    uint64_t mantissa = y << zeros; // in [1, 2), times 2^63
    unsigned j = (unsigned)(mantissa >> 56) & (BKV_RACE_SEGMENTS - 1);
    // mantissa = c (1 + r) with c = 1 + j / 128, so r < 1 / 128 and four terms of ln(1 + r) do. All of these times 2^64:
    uint64_t r = bkv_race_high(mantissa << 8, race->inverse[j]) >> 6;
    uint64_t r2 = bkv_race_high(r, r), r3 = bkv_race_high(r2, r), r4 = bkv_race_high(r2, r2);
    uint64_t ln = r - r2 / 2 + r3 / 3 - r4 / 4;
    uint64_t fraction = race->log2_of[j] + bkv_race_high(ln, LOG2E); // times 2^63
    uint64_t result = ((uint64_t)(zeros + 1) << 57) - (fraction >> 6);
    return result > h >> 7 ? result : h >> 7; // so that the floor holds where rounding has the last word
}
