// test_tenant.c - the table of tenants: full, used again, quotas.
#include "fixture.h"

#include <criterion/criterion.h>

Test(store_tenant, table_is_bounded_and_reused) {
    bkv_tenants_t tenants;
    cr_assert_eq(bkv_tenants_init(&tenants, 0, NULL), BKV_OK);
    for (uint64_t i = 0; i < BKV_TENANTS_MAX; i++) {
        uint32_t slot = bkv_tenants_get(&tenants, i, i % 97); // long chains
        cr_assert_eq(slot, i);
        tenants.slot[slot].used = 1;
    }
    cr_assert_eq(bkv_tenants_get(&tenants, UINT64_MAX, 5), BKV_NO_TENANT);
    cr_assert_eq(bkv_tenants_get(&tenants, 194, 0), 194);
    bkv_tenants_put(&tenants, 194, 0); // still holds something
    cr_assert_eq(bkv_tenants_get(&tenants, UINT64_MAX, 5), BKV_NO_TENANT);
    tenants.slot[194].used = 0;
    tenants.slot[194].busy = 1;
    bkv_tenants_put(&tenants, 194, 0);
    cr_assert_eq(bkv_tenants_get(&tenants, UINT64_MAX, 5), BKV_NO_TENANT);
    tenants.slot[194].busy = 0;
    tenants.slot[194].own_quota = true;
    bkv_tenants_put(&tenants, 194, 0);
    cr_assert_eq(bkv_tenants_get(&tenants, UINT64_MAX, 5), BKV_NO_TENANT);
    tenants.slot[194].own_quota = false;
    bkv_tenants_put(&tenants, 194, 0);
    cr_assert_eq(bkv_tenants_get(&tenants, UINT64_MAX, 5), 194);
    cr_assert_eq(bkv_tenants_get(&tenants, 194, 0), BKV_NO_TENANT); // forgotten, and no room
    cr_assert_eq(bkv_tenants_get(&tenants, 97, 0), 97);             // its chain is whole
    bkv_tenants_deinit(&tenants);
}

Test(store_tenant, quotas) {
    bkv_tenants_t tenants;
    cr_assert_eq(bkv_tenants_init(&tenants, 100, NULL), BKV_OK);
    uint32_t slot = bkv_tenants_get(&tenants, 1, 1);
    cr_assert_eq(bkv_tenants_quota(&tenants, slot), 100);
    tenants.slot[slot].own_quota = true;
    tenants.slot[slot].quota = 7;
    cr_assert_eq(bkv_tenants_quota(&tenants, slot), 7);
    tenants.slot[slot].quota = 0;
    cr_assert_eq(bkv_tenants_quota(&tenants, slot), UINT64_MAX);
    tenants.slot[slot].own_quota = false;
    tenants.default_quota = 0;
    cr_assert_eq(bkv_tenants_quota(&tenants, slot), UINT64_MAX);
    bkv_tenants_deinit(&tenants);
}

// A store forgets tenants with their last record, so that the table does not fill over the years.
Test(store_tenant, store_forgets_idle_tenants) {
    bkv_store_config_t config = fixture_config(MIB, MIB);
    bkv_store_t *store = fixture_store(&config);
    for (uint64_t i = 0; i < BKV_TENANTS_MAX + 100; i++) { // 16 records of 64 KiB fit at once
        cr_assert_eq(fixture_put(store, i, 64 * KIB, i, 0, NOW, NULL), BKV_OK);
    }
    cr_assert_leq(store->tenants.fresh, 17);
    fixture_audit(store);
    bkv_store_destroy(store);
}
