// seal.c - XXH3-64 over a record: at once, or as it comes.
#include "seal.h"

#include "record.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// libxxhash on x86 also has variants that pick AVX2 or AVX-512 at run time, about twice as fast as the SSE2 one that the
// distributions compile in. Not every build of the library exports them, hence weak: absent, it is NULL.
extern __attribute__((weak)) XXH64_hash_t XXH3_64bits_withSeed_dispatch(const void *input, size_t length, XXH64_hash_t seed);
extern __attribute__((weak)) XXH_errorcode XXH3_64bits_update_dispatch(XXH3_state_t *state, const void *input, size_t length);

#define SEALED_FROM 24

// Those variants return without the instruction vzeroupper (libxxhash 0.8.1), and with the upper halves of the vector
// registers in use every SSE instruction of the thread waits for them: compressing a block right after a seal took three to
// four times as long, 4.4 ms for 1.2 per head.
#if defined(__x86_64__)
__attribute__((target("avx"))) static void upper_halves_clear(void) {
    _mm256_zeroupper();
}
static void registers_settle(void) {
    if (__builtin_cpu_supports("avx")) {
        upper_halves_clear();
    }
}
#else
static void registers_settle(void) {}
#endif

_Static_assert(offsetof(bkv_record_header_t, checksum) + sizeof(uint64_t) == SEALED_FROM,
               "the checksum covers what follows it");

static uint64_t seed_of(const void *record) {
    uint64_t seed;
    memcpy(&seed, record, sizeof(seed));
    return seed;
}

uint64_t bkv_record_checksum(const void *record, size_t length) {
    assert(length >= sizeof(bkv_record_header_t));
    const uint8_t *from = (const uint8_t *)record + SEALED_FROM;
    if (!XXH3_64bits_withSeed_dispatch) {
        return XXH3_64bits_withSeed(from, length - SEALED_FROM, seed_of(record));
    }
    uint64_t sum = XXH3_64bits_withSeed_dispatch(from, length - SEALED_FROM, seed_of(record));
    registers_settle();
    return sum;
}

struct bkv_sum {
    XXH3_state_t *state;
    size_t summed; // bytes of the record dealt with; 0: none yet
};

bkv_sum_t *bkv_sum_create(void) {
    bkv_sum_t *sum = calloc(1, sizeof(*sum));
    if (sum && !(sum->state = XXH3_createState())) {
        free(sum);
        return NULL;
    }
    return sum;
}

void bkv_sum_destroy(bkv_sum_t *sum) {
    if (sum) {
        XXH3_freeState(sum->state);
        free(sum);
    }
}

void bkv_sum_advance(bkv_sum_t *sum, const void *record, size_t available) {
    assert(available >= sum->summed);
    if (available <= SEALED_FROM) {
        return;
    }
    if (sum->summed == 0) {
        XXH3_64bits_reset_withSeed(sum->state, seed_of(record));
        sum->summed = SEALED_FROM;
    }
    bkv_sum_append(sum, (const uint8_t *)record + sum->summed, available - sum->summed);
}

void bkv_sum_append(bkv_sum_t *sum, const void *bytes, size_t length) {
    assert(sum->summed >= SEALED_FROM);
    if (XXH3_64bits_update_dispatch) {
        (void)XXH3_64bits_update_dispatch(sum->state, bytes, length);
        registers_settle();
    } else {
        (void)XXH3_64bits_update(sum->state, bytes, length);
    }
    sum->summed += length;
}

void bkv_sum_restart(bkv_sum_t *sum) {
    sum->summed = 0;
}

uint64_t bkv_sum_value(const bkv_sum_t *sum) {
    assert(sum->summed >= sizeof(bkv_record_header_t));
    return XXH3_64bits_digest(sum->state);
}

void bkv_record_seal(void *record) {
    bkv_record_header_t *header = record;
    header->checksum = bkv_record_checksum(record, (size_t)header->length);
}

bkv_status_t bkv_record_verify(const void *record, size_t length, bkv_error_t *err) {
    const bkv_record_header_t *header = record;
    if (header->length != length || length < sizeof(*header)) {
        return bkv_fail(err, BKV_DATA_LOSS, "length: the record says %llu bytes, %zu are there",
                        (unsigned long long)header->length, length);
    }
    uint64_t sum = bkv_record_checksum(record, length);
    if (sum != header->checksum) {
        return bkv_fail(err, BKV_DATA_LOSS, "checksum: the record says %016llx, its bytes give %016llx",
                        (unsigned long long)header->checksum, (unsigned long long)sum);
    }
    return BKV_OK;
}
