// lease.c - the table of leases.
#include "lease.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

bkv_status_t bkv_leases_init(bkv_leases_t *leases, uint32_t max, uint32_t max_keys, bkv_error_t *err) {
    uint32_t buckets = 1;
    while (buckets < max && buckets < 1u << 31) {
        buckets *= 2;
    }
    *leases = (bkv_leases_t){
        .max = max,
        .max_keys = max_keys,
        .bucket_mask = buckets - 1,
        .next_expiry_ms = UINT64_MAX,
    };
    leases->lease = calloc(max, sizeof(*leases->lease));
    leases->key = calloc(max_keys, sizeof(*leases->key));
    leases->buckets = malloc(buckets * sizeof(*leases->buckets));
    if (!leases->lease || !leases->key || !leases->buckets) {
        bkv_leases_deinit(leases);
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "max_leases: no memory for %u leases of %u keys", max, max_keys);
    }
    memset(leases->buckets, 0xff, buckets * sizeof(*leases->buckets)); // BKV_NO_LEASE
    for (uint32_t i = 0; i < max; i++) {
        leases->lease[i].next = i + 1 < max ? i + 1 : BKV_NO_LEASE;
    }
    for (uint32_t i = 0; i < max_keys; i++) {
        leases->key[i].next = i + 1 < max_keys ? i + 1 : BKV_NO_LEASE;
    }
    return BKV_OK;
}

void bkv_leases_deinit(bkv_leases_t *leases) {
    free(leases->lease);
    free(leases->key);
    free(leases->buckets);
    *leases = (bkv_leases_t){0};
}

static bkv_status_t draw_id(const bkv_leases_t *leases, uint64_t *id, bkv_error_t *err) {
    do {
        ssize_t n = getrandom(id, sizeof(*id), 0);
        if (n < 0 && errno != EINTR) {
            return bkv_fail(err, BKV_INTERNAL, "lease: getrandom: %s", strerror(errno));
        }
        if (n != (ssize_t)sizeof(*id)) {
            *id = 0;
        }
    } while (*id == 0 || bkv_leases_find(leases, *id) != BKV_NO_LEASE);
    return BKV_OK;
}

bkv_status_t bkv_leases_begin(bkv_leases_t *leases, uint32_t keys, uint64_t expires_ms, uint32_t *lease, bkv_error_t *err) {
    if (leases->count == leases->max) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "leases: all %u are in use", leases->max);
    }
    if (keys > leases->max_keys - leases->key_count) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "keys: %u more under lease would be over the limit of %u", keys,
                        leases->max_keys);
    }
    uint64_t id = 0;
    bkv_status_t status = draw_id(leases, &id, err);
    if (status != BKV_OK) {
        return status;
    }
    *lease = leases->free;
    bkv_lease_t *l = &leases->lease[*lease];
    leases->free = l->next;
    leases->count++;
    uint32_t *bucket = &leases->buckets[id & leases->bucket_mask];
    *l = (bkv_lease_t){.id = id, .expires_ms = expires_ms, .keys = BKV_NO_LEASE, .next = *bucket};
    *bucket = *lease;
    if (expires_ms < leases->next_expiry_ms) {
        leases->next_expiry_ms = expires_ms;
    }
    return BKV_OK;
}

void bkv_leases_add(bkv_leases_t *leases, uint32_t lease, uint32_t entry) {
    uint32_t key = leases->free_keys;
    assert(key != BKV_NO_LEASE);
    leases->free_keys = leases->key[key].next;
    leases->key_count++;
    leases->key[key] = (bkv_lease_key_t){.entry = entry, .next = leases->lease[lease].keys};
    leases->lease[lease].keys = key;
}

uint32_t bkv_leases_find(const bkv_leases_t *leases, uint64_t id) {
    uint32_t lease = id != 0 ? leases->buckets[id & leases->bucket_mask] : BKV_NO_LEASE;
    while (lease != BKV_NO_LEASE && leases->lease[lease].id != id) {
        lease = leases->lease[lease].next;
    }
    return lease;
}

uint32_t bkv_leases_find_ended(bkv_leases_t *leases, uint64_t now_ms) {
    if (now_ms < leases->next_expiry_ms) {
        return BKV_NO_LEASE;
    }
    uint64_t next = UINT64_MAX;
    for (uint32_t i = 0; i < leases->max; i++, leases->cursor++) {
        if (leases->cursor >= leases->max) {
            leases->cursor = 0;
        }
        const bkv_lease_t *l = &leases->lease[leases->cursor];
        if (l->id != 0 && l->expires_ms <= now_ms) {
            return leases->cursor;
        }
        if (l->id != 0 && l->expires_ms < next) {
            next = l->expires_ms;
        }
    }
    leases->next_expiry_ms = next;
    return BKV_NO_LEASE;
}

static void forget(bkv_leases_t *leases, uint32_t lease) {
    bkv_lease_t *l = &leases->lease[lease];
    uint32_t *link = &leases->buckets[l->id & leases->bucket_mask];
    while (*link != lease) {
        assert(*link != BKV_NO_LEASE);
        link = &leases->lease[*link].next;
    }
    *link = l->next;
    *l = (bkv_lease_t){.next = leases->free};
    leases->free = lease;
    leases->count--;
}

bool bkv_leases_end(bkv_leases_t *leases, uint32_t lease, uint32_t *entry) {
    bkv_lease_t *l = &leases->lease[lease];
    uint32_t key = l->keys;
    if (key == BKV_NO_LEASE) {
        forget(leases, lease);
        return false;
    }
    *entry = leases->key[key].entry;
    l->keys = leases->key[key].next;
    leases->key[key].next = leases->free_keys;
    leases->free_keys = key;
    leases->key_count--;
    return true;
}
