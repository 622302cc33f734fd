// test_staging.c - extents never overlap, are bounded, joined and reused from the bottom; checked against a map of owners.
#include "daemon/pipeline/staging.h"

#include <criterion/criterion.h>
#include <string.h>

#define UNITS 64

Test(pipeline_staging, random_walk_against_a_map) {
    bkv_staging_t *staging;
    cr_assert_eq(bkv_staging_create(UNITS * BKV_STAGING_UNIT, &staging, NULL), BKV_OK);
    uint8_t *held[UNITS] = {NULL};
    uint64_t bytes[UNITS] = {0};
    uint64_t state = 42, units_held = 0;
    uint32_t refused = 0;
    for (int step = 0; step < 20000; step++) {
        state = state * UINT64_C(6364136223846793005) + 1;
        size_t i = (state >> 40) % UNITS;
        if (held[i] != NULL) {
            for (uint64_t at = 0; at < bytes[i]; at += BKV_STAGING_UNIT) {
                cr_assert_eq(held[i][at], (uint8_t)i); // nobody wrote into it
            }
            bkv_staging_put(staging, held[i]);
            held[i] = NULL;
            units_held -= (bytes[i] + BKV_STAGING_UNIT - 1) / BKV_STAGING_UNIT;
        } else {
            bytes[i] = 1 + (state >> 20) % (9 * BKV_STAGING_UNIT);
            void *memory = NULL;
            bkv_status_t status = bkv_staging_get(staging, bytes[i], &memory, NULL);
            cr_assert(status == BKV_OK || status == BKV_BUSY);
            refused += status == BKV_BUSY;
            if (status == BKV_OK) {
                held[i] = memory;
                units_held += (bytes[i] + BKV_STAGING_UNIT - 1) / BKV_STAGING_UNIT;
                for (uint64_t at = 0; at < bytes[i]; at += BKV_STAGING_UNIT) {
                    held[i][at] = (uint8_t)i;
                }
                held[i][bytes[i] - 1] = (uint8_t)i; // mapped to the last byte
            }
        }
        cr_assert_eq(bkv_staging_used(staging), units_held * BKV_STAGING_UNIT);
    }
    cr_assert_gt(refused, 0);
    for (size_t i = 0; i < UNITS; i++) {
        if (held[i] != NULL) {
            bkv_staging_put(staging, held[i]);
        }
    }
    void *all; // everything was joined again
    cr_assert_eq(bkv_staging_get(staging, UNITS * BKV_STAGING_UNIT, &all, NULL), BKV_OK);
    bkv_staging_put(staging, all);
    bkv_staging_destroy(staging);
}

Test(pipeline_staging, full_is_busy_and_too_large_is_exhausted) {
    bkv_staging_t *staging;
    bkv_error_t err;
    void *first, *second;
    cr_assert_eq(bkv_staging_create(3 * BKV_STAGING_UNIT - 5, &staging, NULL), BKV_OK); // rounded up
    cr_assert_eq(bkv_staging_get(staging, 2 * BKV_STAGING_UNIT, &first, NULL), BKV_OK);
    cr_assert_eq(bkv_staging_get(staging, 2 * BKV_STAGING_UNIT, &second, &err), BKV_BUSY);
    cr_assert_eq(bkv_staging_get(staging, 4 * BKV_STAGING_UNIT, &second, &err), BKV_RESOURCE_EXHAUSTED);
    cr_assert_not_null(strstr(err.message, "memory.staging"));
    cr_assert_eq(bkv_staging_get(staging, UINT64_MAX, &second, &err), BKV_RESOURCE_EXHAUSTED);
    cr_assert_eq(bkv_staging_get(staging, BKV_STAGING_UNIT, &second, &err), BKV_OK);
    bkv_staging_put(staging, first);
    void *again;
    cr_assert_eq(bkv_staging_get(staging, 1, &again, NULL), BKV_OK);
    cr_assert_eq(again, first, "the lowest free memory is used first, because its pages are there already");
    bkv_staging_put(staging, again);
    bkv_staging_put(staging, second);
    bkv_staging_destroy(staging);
}

Test(pipeline_staging, no_memory_or_too_much_is_refused) {
    bkv_staging_t *staging;
    cr_assert_eq(bkv_staging_create(0, &staging, NULL), BKV_INVALID_ARGUMENT);
    cr_assert_eq(bkv_staging_create(UINT64_MAX, &staging, NULL), BKV_INVALID_ARGUMENT);
}
