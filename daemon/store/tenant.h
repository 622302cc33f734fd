// tenant.h - who may hold how much: a bounded table from tenant tag to quota, bytes of slots in use, and queues of entries.
//
// A tenant at its quota gives up records of its own. Finding those among everybody's would mean walking over the others', so
// each tenant has SIEVE queues of its own besides those of the size class (evict.c keeps them all).
// A slot of the table is given to another tenant once its bytes are 0 and no quota of its own was set.
//
// Not thread-safe: the caller holds the store's space lock.
#ifndef BKV_TENANT_H
#define BKV_TENANT_H

#include "kernels/status.h"
#include "sieve.h"

#include <stdbool.h>
#include <stdint.h>

#define BKV_TENANTS_MAX 16384u
#define BKV_NO_TENANT   UINT32_MAX

typedef struct bkv_tenant {
    uint64_t tag;   // as in record headers
    uint64_t quota; // bytes of slots, where own_quota; 0: no limit
    uint64_t used;  // bytes of slots, reserved ones included
    bkv_sieve_t owned, copies;
    uint32_t next; // of its chain, or of the free ones
    uint16_t busy; // callers that hold its slot of the table across evictions
    bool own_quota;
} bkv_tenant_t;

typedef struct bkv_tenants {
    bkv_tenant_t *slot; // [BKV_TENANTS_MAX]
    uint32_t *buckets;  // [BKV_TENANTS_MAX]
    uint32_t fresh, free;
    uint64_t default_quota;
} bkv_tenants_t;

bkv_status_t bkv_tenants_init(bkv_tenants_t *tenants, uint64_t default_quota, bkv_error_t *err);
void bkv_tenants_deinit(bkv_tenants_t *tenants);

// The tenant's slot, new if need be; BKV_NO_TENANT when the table is full. hash: of the tag, such that nobody can aim.
uint32_t bkv_tenants_get(bkv_tenants_t *tenants, uint64_t tag, uint64_t hash);

// Forgets a tenant that holds nothing, is not busy and has no quota of its own; else does nothing.
void bkv_tenants_put(bkv_tenants_t *tenants, uint32_t slot, uint64_t hash);

// Bytes of slots that the tenant may use; UINT64_MAX: no limit.
uint64_t bkv_tenants_quota(const bkv_tenants_t *tenants, uint32_t slot);

#endif
