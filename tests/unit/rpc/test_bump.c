// test_bump.c - the bump gives aligned, disjoint memory up to its limit, and forgets.
#include "daemon/rpc/bump.h"

#include <criterion/criterion.h>
#include <stdint.h>
#include <string.h>

Test(rpc_bump, memory_is_aligned_and_disjoint) {
    bkv_bump_t bump;
    bkv_bump_init(&bump, 1 << 20);
    uint8_t *parts[300];
    for (size_t i = 0; i < 300; i++) { // 300 x up to 1,200 bytes: more than one page
        parts[i] = bkv_bump_alloc(&bump, 4 * i + 1);
        cr_assert_not_null(parts[i]);
        cr_assert_eq((uintptr_t)parts[i] % 16, 0);
        memset(parts[i], (int)(i % 251), 4 * i + 1);
    }
    for (size_t i = 0; i < 300; i++) {
        for (size_t j = 0; j <= 4 * i; j++) {
            cr_assert_eq(parts[i][j], i % 251, "part %zu was overwritten at %zu", i, j);
        }
    }
    bkv_bump_deinit(&bump);
}

Test(rpc_bump, limit_holds_and_is_remembered) {
    bkv_bump_t bump;
    bkv_bump_init(&bump, 1000);
    cr_assert_not_null(bkv_bump_alloc(&bump, 900));
    cr_assert_not(bump.exhausted);
    cr_assert_null(bkv_bump_alloc(&bump, 100), "900 bytes take 912");
    cr_assert(bump.exhausted);
    cr_assert_null(bkv_bump_alloc(&bump, SIZE_MAX));
    cr_assert_not_null(bkv_bump_alloc(&bump, 80), "a smaller one still fits");
    bkv_bump_reset(&bump);
    cr_assert_not(bump.exhausted);
    cr_assert_not_null(bkv_bump_alloc(&bump, 990));
    bkv_bump_deinit(&bump);
}

Test(rpc_bump, single_bytes_cannot_exceed_the_limit) {
    bkv_bump_t bump;
    bkv_bump_init(&bump, 1 << 16);
    size_t given = 0;
    while (bkv_bump_alloc(&bump, 1) != NULL) {
        given++;
    }
    cr_assert_eq(given, (1 << 16) / 16);
    bkv_bump_deinit(&bump);
}

Test(rpc_bump, serves_protobuf_c) {
    bkv_bump_t bump;
    bkv_bump_init(&bump, 64);
    void *memory = bump.allocator.alloc(bump.allocator.allocator_data, 32);
    cr_assert_not_null(memory);
    bump.allocator.free(bump.allocator.allocator_data, memory); // does nothing
    cr_assert_eq(bump.used, 32);
    bkv_bump_deinit(&bump);
}
