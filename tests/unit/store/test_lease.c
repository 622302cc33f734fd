// test_lease.c - the table of leases.
#include "fixture.h"

#include <criterion/criterion.h>

Test(store_lease, gives_back_what_it_was_given) {
    bkv_leases_t leases;
    cr_assert_eq(bkv_leases_init(&leases, 3, 10, NULL), BKV_OK);
    for (int round = 0; round < 100; round++) {
        uint32_t lease[3];
        uint64_t ids[3];
        for (uint32_t i = 0; i < 3; i++) {
            cr_assert_eq(bkv_leases_begin(&leases, 3, 100 + i, &lease[i], NULL), BKV_OK);
            ids[i] = leases.lease[lease[i]].id;
            for (uint32_t k = 0; k < 3; k++) {
                bkv_leases_add(&leases, lease[i], 10 * i + k);
            }
        }
        cr_assert(ids[0] != ids[1] && ids[1] != ids[2] && ids[0] != ids[2]);
        uint32_t more;
        cr_assert_eq(bkv_leases_begin(&leases, 0, 100, &more, NULL), BKV_RESOURCE_EXHAUSTED);
        for (uint32_t i = 0; i < 3; i++) {
            cr_assert_eq(bkv_leases_find(&leases, ids[i]), lease[i]);
            uint32_t seen = 0;
            uint32_t entry;
            while (bkv_leases_end(&leases, lease[i], &entry)) {
                cr_assert_eq(entry / 10, i);
                seen |= 1u << (entry % 10);
            }
            cr_assert_eq(seen, 7);
            cr_assert_eq(bkv_leases_find(&leases, ids[i]), BKV_NO_LEASE);
        }
        cr_assert_eq(leases.count, 0);
        cr_assert_eq(leases.key_count, 0);
    }
    bkv_leases_deinit(&leases);
}

Test(store_lease, keys_are_bounded) {
    bkv_leases_t leases;
    cr_assert_eq(bkv_leases_init(&leases, 3, 10, NULL), BKV_OK);
    uint32_t a, b;
    cr_assert_eq(bkv_leases_begin(&leases, 11, 1, &a, NULL), BKV_RESOURCE_EXHAUSTED);
    cr_assert_eq(bkv_leases_begin(&leases, 10, 1, &a, NULL), BKV_OK);
    for (uint32_t i = 0; i < 10; i++) {
        bkv_leases_add(&leases, a, i);
    }
    cr_assert_eq(bkv_leases_begin(&leases, 1, 1, &b, NULL), BKV_RESOURCE_EXHAUSTED);
    cr_assert_eq(bkv_leases_begin(&leases, 0, 1, &b, NULL), BKV_OK);
    bkv_leases_deinit(&leases);
}

Test(store_lease, finds_what_has_ended) {
    bkv_leases_t leases;
    cr_assert_eq(bkv_leases_init(&leases, 50, 1, NULL), BKV_OK);
    uint64_t seed = 3;
    for (int i = 0; i < 50; i++) {
        uint32_t lease;
        cr_assert_eq(bkv_leases_begin(&leases, 0, 1 + fixture_random(&seed) % 100, &lease, NULL), BKV_OK);
    }
    for (uint64_t now = 0; now <= 100; now++) {
        uint32_t lease, entry;
        while ((lease = bkv_leases_find_ended(&leases, now)) != BKV_NO_LEASE) {
            cr_assert_eq(leases.lease[lease].expires_ms, now);
            cr_assert(!bkv_leases_end(&leases, lease, &entry));
        }
    }
    cr_assert_eq(leases.count, 0);
    cr_assert_eq(leases.next_expiry_ms, UINT64_MAX);
    bkv_leases_deinit(&leases);
}
