// fixture.c - small stores, records that can be told apart, and an audit of a store's accounts.
#include "fixture.h"

#include "kernels/seal.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

const bkv_spec_id_t fixture_spec = {{0x5e, 0xc1}};

uint64_t fixture_random(uint64_t *state) {
    uint64_t z = (*state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

bkv_store_config_t fixture_config(uint64_t arena_bytes, uint64_t slab_bytes) {
    return (bkv_store_config_t){.arena_bytes = arena_bytes, .slab_bytes = slab_bytes, .arena_fd = -1};
}

bkv_store_t *fixture_store(const bkv_store_config_t *config) {
    bkv_store_t *store = NULL;
    bkv_error_t err = {0};
    bkv_status_t status = bkv_store_create(config, NOW, &store, NULL, &err);
    cr_assert_eq(status, BKV_OK, "create: %s", err.message);
    return store;
}

bkv_key_t fixture_key(uint64_t number) {
    bkv_key_t key;
    uint64_t state = number;
    for (size_t i = 0; i < sizeof(key.bytes); i += 8) {
        uint64_t word = fixture_random(&state);
        memcpy(key.bytes + i, &word, 8);
    }
    return key;
}

static void payload(uint8_t *out, uint64_t number, size_t length) {
    uint64_t state = ~number;
    for (size_t i = 0; i < length; i += 8) {
        uint64_t word = fixture_random(&state);
        memcpy(out + i, &word, 8);
    }
}

void fixture_fill(uint8_t *data, uint64_t number, uint64_t length, uint64_t tenant) {
    cr_assert(length >= 160 && length % 16 == 0);
    bkv_record_header_t header = {
        .magic = BKV_RECORD_MAGIC,
        .version = BKV_RECORD_VERSION,
        .codec = BKV_CODEC_RAW,
        .length = length,
        .tenant = tenant,
        .tokens = 1,
        .layers = 1,
        .heads = 1,
        .key_dim = 8,
        .value_dim = 8,
        .dtype = BKV_BF16,
    };
    bkv_key_t key = fixture_key(number);
    memcpy(header.key, key.bytes, sizeof(header.key));
    memcpy(header.spec_id, fixture_spec.bytes, sizeof(header.spec_id));
    payload(data + sizeof(header), number, length - sizeof(header));
    memcpy(data, &header, sizeof(header));
    bkv_record_seal(data);
}

bool fixture_matches(const uint8_t *data, uint64_t number, uint64_t length) {
    bkv_key_t key = fixture_key(number);
    uint64_t state = ~number;
    bool same = memcmp(data + offsetof(bkv_record_header_t, key), key.bytes, sizeof(key.bytes)) == 0;
    for (size_t i = sizeof(bkv_record_header_t); same && i < length; i += 8) {
        uint64_t word = fixture_random(&state);
        same = memcmp(data + i, &word, 8) == 0;
    }
    return same;
}

bkv_status_t fixture_put(bkv_store_t *store, uint64_t number, uint64_t length, uint64_t tenant, uint64_t ttl_ms,
                         uint64_t now_ms, bkv_error_t *err) {
    bkv_slot_t slot;
    bkv_status_t status = bkv_store_reserve(store, tenant, length, now_ms, &slot, err);
    if (status != BKV_OK) {
        return status;
    }
    cr_assert(slot.capacity >= length && (uintptr_t)slot.data % 64 == 0);
    fixture_fill(slot.data, number, length, tenant);
    return bkv_store_publish(store, &slot, ttl_ms, 2 * length, now_ms, err);
}

void fixture_add(bkv_store_t *store, uint64_t number, uint64_t length) {
    bkv_error_t err = {0};
    bkv_status_t status = fixture_put(store, number, length, TENANT, 0, NOW, &err);
    cr_assert_eq(status, BKV_OK, "put %llu: %s", (unsigned long long)number, err.message);
}

bkv_status_t fixture_get(bkv_store_t *store, uint64_t number, uint64_t now_ms) {
    bkv_key_t key = fixture_key(number);
    bkv_pin_t pin;
    bkv_status_t status = bkv_store_pin(store, &fixture_spec, &key, now_ms, &pin, NULL);
    if (status == BKV_OK) {
        cr_assert(fixture_matches(pin.data, number, pin.length), "record %llu has other bytes", (unsigned long long)number);
        bkv_store_unpin(store, &pin);
    }
    return status;
}

bool fixture_has(bkv_store_t *store, uint64_t number) {
    bkv_key_t key = fixture_key(number);
    return bkv_store_contains(store, &fixture_spec, &key, NOW);
}

bkv_store_metrics_t fixture_metrics(bkv_store_t *store) {
    bkv_store_metrics_t metrics;
    bkv_store_metrics(store, &metrics);
    return metrics;
}

static uint64_t audit_slabs(bkv_store_t *store, uint64_t *filling) {
    uint64_t slot_bytes = 0;
    uint64_t live = 0;
    for (uint32_t slab = 0; slab < store->slabs.slab_count; slab++) {
        uint32_t c = store->slabs.slab[slab].size_class;
        uint32_t used = 0;
        for (uint32_t i = 0; c != BKV_NO_CLASS && i < store->slabs.classes[c].slots; i++) {
            uint32_t owner;
            if (!bkv_slabs_owner(&store->slabs, slab, i, &owner)) {
                continue;
            }
            used++;
            slot_bytes += bkv_slabs_slot_bytes(&store->slabs, c);
            uint32_t page = bkv_slabs_slot_page(&store->slabs, slab, i);
            if (owner == BKV_OWNER_FILLING) {
                (*filling)++;
                cr_assert(!bkv_arena_is_live(&store->arena, page));
            } else {
                const bkv_entry_t *e = &store->index.entries[owner];
                bool linked = e->flags & BKV_ENTRY_LINKED;
                cr_assert_eq(e->page, page);
                cr_assert_eq(bkv_arena_is_live(&store->arena, page), linked);
                cr_assert(linked || e->pins > 0);
            }
        }
        cr_assert_eq(store->slabs.slab[slab].used, used);
    }
    for (uint32_t page = 0; page < store->slabs.slab_count * store->slabs.slab_pages; page++) {
        live += bkv_arena_is_live(&store->arena, page) ? 1 : 0;
    }
    cr_assert_eq(live, store->counts.entries);
    return slot_bytes;
}

static uint64_t audit_queue(const bkv_store_t *store, const bkv_sieve_t *queue, const bkv_sieve_link_t *links, bool copies) {
    uint64_t n = 0;
    for (uint32_t e = queue->newest; e != BKV_SIEVE_END; e = links[e].older) {
        cr_assert_eq((store->index.entries[e].flags & BKV_ENTRY_COPY) != 0, copies);
        n++;
    }
    cr_assert_eq(n, queue->count);
    return n;
}

void fixture_audit(bkv_store_t *store) {
    bkv_store_metrics_t m = fixture_metrics(store);
    uint64_t filling = 0;
    cr_assert_eq(audit_slabs(store, &filling), m.slot_bytes);
    cr_assert_eq(filling, store->filling);
    uint64_t linked = 0, copies = 0, bytes = 0, pins = 0;
    for (uint32_t i = 0; i < store->index.fresh; i++) {
        const bkv_entry_t *e = &store->index.entries[i];
        pins += e->pins;
        if (e->flags & BKV_ENTRY_LINKED) {
            linked++;
            copies += e->flags & BKV_ENTRY_COPY ? 1 : 0;
            bytes += bkv_entry_length(e);
        }
    }
    cr_assert_eq(linked, m.entries);
    cr_assert_eq(copies, m.copies);
    cr_assert_eq(bytes, m.resident_bytes);
    cr_assert_eq(pins, m.pinned);
    uint64_t by_class = 0, by_tenant = 0, used = 0;
    for (uint32_t c = 0; c < store->slabs.class_count; c++) {
        by_class += audit_queue(store, &store->evict.classes[c].owned, store->evict.by_class, false);
        by_class += audit_queue(store, &store->evict.classes[c].copies, store->evict.by_class, true);
    }
    for (uint32_t t = 0; t < store->tenants.fresh; t++) {
        by_tenant += audit_queue(store, &store->tenants.slot[t].owned, store->evict.by_tenant, false);
        by_tenant += audit_queue(store, &store->tenants.slot[t].copies, store->evict.by_tenant, true);
        used += store->tenants.slot[t].used;
        cr_assert_eq(store->tenants.slot[t].busy, 0);
    }
    cr_assert_eq(by_class, m.entries);
    cr_assert_eq(by_tenant, m.entries);
    cr_assert_eq(used, m.slot_bytes);
    uint64_t gone = m.dropped_total + m.evicted_capacity_total + m.evicted_quota_total + m.evicted_slab_total +
                    m.expired_total + m.corrupt_total;
    cr_assert_eq(m.published_total + m.adopted_total + m.recovered_total, m.entries + gone);
}

void fixture_path(char *path, size_t size) {
    const char *folder = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";
    snprintf(path, size, "%s/bkv-test-XXXXXX", folder);
    int fd = mkstemp(path);
    cr_assert(fd >= 0);
    close(fd);
}
