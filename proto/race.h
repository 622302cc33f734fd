// race.h - the arithmetic of weighted rendezvous: who arrives first.
//
// For a slot every member runs a race of its own: its time is an exponentially distributed random number whose rate is its
// weight, drawn from a hash of (slot, member). The first to arrive owns the slot. The least of independent exponential times is
// member i's with probability weight_i / sum of weights, exactly; and nobody's time depends on who else runs, so that a member
// that leaves gives away what it has and changes nothing else.
//
//     h    = mix(slot hash ^ member hash), uniform in [0, 2^64)
//     time = -log2(1 - h / 2^64) / weight
//
// Every host must get the same order, whatever its compiler, flags and libm. So this is integer arithmetic throughout: the
// logarithm is fixed point, from a table that is itself made by repeated squaring of integers, with an error below 2^-36. Since
// -log2(1 - x) >= x, a shift of h bounds a time from below, and the logarithm is computed only for the few that may win.
#ifndef BKV_RACE_H
#define BKV_RACE_H

#include <stdint.h>

#define BKV_RACE_SEGMENTS 128
#define BKV_RACE_NEVER    UINT64_MAX // later than any time

typedef struct bkv_race {
    uint64_t log2_of[BKV_RACE_SEGMENTS]; // log2(1 + j / 128), times 2^63
    uint64_t inverse[BKV_RACE_SEGMENTS]; // 2^70 / (128 + j)
} bkv_race_t;

void bkv_race_init(bkv_race_t *race);

// -log2(1 - h / 2^64) times 2^57; at most 2^63, at least h >> 7.
uint64_t bkv_race_minus_log2(const bkv_race_t *race, uint64_t h);

__extension__ typedef unsigned __int128 bkv_u128_t;

static inline uint64_t bkv_race_high(uint64_t a, uint64_t b) {
    return (uint64_t)((bkv_u128_t)a * b >> 64);
}

// A bijection in which every bit of x changes every bit of the result (MurmurHash3's finaliser).
static inline uint64_t bkv_race_mix(uint64_t x) {
    x = (x ^ x >> 33) * 0xff51afd7ed558ccdu;
    x = (x ^ x >> 33) * 0xc4ceb9fe1a85ec53u;
    return x ^ x >> 33;
}

// What a time is multiplied with in the place of a division. weight >= 1.
static inline uint64_t bkv_race_share(uint32_t weight) {
    return UINT64_MAX / weight;
}

static inline uint64_t bkv_race_time(const bkv_race_t *race, uint64_t h, uint64_t share) {
    return bkv_race_high(bkv_race_minus_log2(race, h), share);
}

// A bound: no time of that h and share is less.
static inline uint64_t bkv_race_floor(uint64_t h, uint64_t share) {
    return bkv_race_high(h >> 7, share);
}

#endif
