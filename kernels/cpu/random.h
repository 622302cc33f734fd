// random.h - internal: a small deterministic generator (splitmix64, Steele, Lea and Flood, OOPSLA 2014). Not for secrets.
#ifndef BKV_RANDOM_H
#define BKV_RANDOM_H

#include <stdint.h>

typedef struct bkv_random {
    uint64_t state;
} bkv_random_t;

static inline uint64_t bkv_random_next(bkv_random_t *random) {
    uint64_t z = random->state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

// Folds another number into the state, so that streams for different numbers are unrelated.
static inline void bkv_random_mix(bkv_random_t *random, uint64_t number) {
    random->state = bkv_random_next(random) ^ number;
}

// Uniform in [0, 1).
static inline float bkv_random_unit(bkv_random_t *random) {
    return (float)(bkv_random_next(random) >> 40) * 0x1p-24f;
}

// Uniform in [0, n) to within n / 2^32; n < 2^32.
static inline uint32_t bkv_random_below(bkv_random_t *random, uint32_t n) {
    return (uint32_t)(((bkv_random_next(random) >> 32) * n) >> 32);
}

#endif
