// tenant.c - the table of tenants.
#include "tenant.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

bkv_status_t bkv_tenants_init(bkv_tenants_t *tenants, uint64_t default_quota, bkv_error_t *err) {
    *tenants = (bkv_tenants_t){.default_quota = default_quota, .free = BKV_NO_TENANT};
    tenants->slot = calloc(BKV_TENANTS_MAX, sizeof(*tenants->slot));
    tenants->buckets = malloc(BKV_TENANTS_MAX * sizeof(*tenants->buckets));
    if (!tenants->slot || !tenants->buckets) {
        bkv_tenants_deinit(tenants);
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "tenants: no memory for a table of %u", BKV_TENANTS_MAX);
    }
    memset(tenants->buckets, 0xff, BKV_TENANTS_MAX * sizeof(*tenants->buckets)); // BKV_NO_TENANT
    return BKV_OK;
}

void bkv_tenants_deinit(bkv_tenants_t *tenants) {
    free(tenants->slot);
    free(tenants->buckets);
    *tenants = (bkv_tenants_t){0};
}

static uint32_t *bucket_of(const bkv_tenants_t *tenants, uint64_t hash) {
    return &tenants->buckets[hash % BKV_TENANTS_MAX];
}

uint32_t bkv_tenants_get(bkv_tenants_t *tenants, uint64_t tag, uint64_t hash) {
    uint32_t *bucket = bucket_of(tenants, hash);
    for (uint32_t slot = *bucket; slot != BKV_NO_TENANT; slot = tenants->slot[slot].next) {
        if (tenants->slot[slot].tag == tag) {
            return slot;
        }
    }
    uint32_t slot = tenants->free;
    if (slot != BKV_NO_TENANT) {
        tenants->free = tenants->slot[slot].next;
    } else if (tenants->fresh < BKV_TENANTS_MAX) {
        slot = tenants->fresh++;
    } else {
        return BKV_NO_TENANT;
    }
    tenants->slot[slot] = (bkv_tenant_t){.tag = tag, .next = *bucket};
    bkv_sieve_init(&tenants->slot[slot].owned);
    bkv_sieve_init(&tenants->slot[slot].copies);
    *bucket = slot;
    return slot;
}

void bkv_tenants_put(bkv_tenants_t *tenants, uint32_t slot, uint64_t hash) {
    bkv_tenant_t *tenant = &tenants->slot[slot];
    if (tenant->used > 0 || tenant->busy > 0 || tenant->own_quota) {
        return;
    }
    assert(tenant->owned.count == 0 && tenant->copies.count == 0);
    uint32_t *link = bucket_of(tenants, hash);
    while (*link != slot) {
        assert(*link != BKV_NO_TENANT);
        link = &tenants->slot[*link].next;
    }
    *link = tenant->next;
    tenant->next = tenants->free;
    tenants->free = slot;
}

uint64_t bkv_tenants_quota(const bkv_tenants_t *tenants, uint32_t slot) {
    const bkv_tenant_t *tenant = &tenants->slot[slot];
    uint64_t quota = tenant->own_quota ? tenant->quota : tenants->default_quota;
    return quota != 0 ? quota : UINT64_MAX;
}
