// recover.c - the scan of an arena that is not ours yet. Nothing read from it is believed beyond its slot's bounds.
#include "recover.h"

#include "daemon/observe/log.h"
#include "internal.h"

#include <string.h>

// Reads a slot's header, once. false: it is no record's, or the record is larger than the slot.
static bool read_header(const bkv_store_t *store, uint32_t page, uint64_t slot_bytes, bkv_record_header_t *header) {
    memcpy(header, bkv_arena_at(&store->arena, page), sizeof(*header));
    return bkv_record_check_header(header, slot_bytes, NULL) == BKV_OK;
}

static bool is_known(bkv_store_t *store, const bkv_record_header_t *header) {
    bkv_key_t key;
    bkv_spec_id_t spec_id;
    memcpy(key.bytes, header->key, sizeof(key.bytes));
    memcpy(spec_id.bytes, header->spec_id, sizeof(spec_id.bytes));
    return bkv_store_contains(store, &spec_id, &key, 0);
}

static bool take_over(bkv_store_t *store, uint32_t slab, uint32_t size_class, uint32_t index, uint32_t page,
                      uint64_t expires_ms) {
    _Alignas(BKV_RECORD_ALIGN) bkv_record_header_t header;
    if (!read_header(store, page, bkv_slabs_slot_bytes(&store->slabs, size_class), &header) || is_known(store, &header)) {
        return false;
    }
    uint32_t tenant = bkv_store_hold_tenant(store, header.tenant);
    if (tenant == BKV_NO_TENANT) {
        return false;
    }
    uint32_t entry = bkv_index_alloc(&store->index);
    if (entry != BKV_NO_ENTRY) {
        bkv_entry_t *e = &store->index.entries[entry];
        memcpy(e->key.bytes, header.key, sizeof(e->key.bytes));
        e->expires_ms = expires_ms;
        e->page = page;
        e->length = (uint32_t)(header.length / BKV_RECORD_ALIGN);
        e->tenant = (uint16_t)tenant;
        bkv_store_adopt_slot(store, tenant, slab, size_class, index);
        bkv_store_enter(store, entry);
    }
    bkv_store_let_go_tenant(store, tenant);
    return entry != BKV_NO_ENTRY;
}

uint64_t bkv_store_recover(bkv_store_t *store, uint64_t now_ms, uint64_t ttl_ms) {
    uint64_t expires_ms = ttl_ms != 0 ? bkv_store_deadline(now_ms, ttl_ms) : 0;
    uint64_t taken = 0;
    uint64_t refused = 0;
    pthread_mutex_lock(&store->space);
    for (uint32_t slab = 0; slab < store->slabs.slab_count; slab++) {
        uint32_t size_class = bkv_arena_class(&store->arena, slab);
        bool sound = size_class < store->slabs.class_count;
        uint32_t slot_pages = sound ? store->slabs.classes[size_class].pages : 1;
        uint32_t slots = sound ? store->slabs.classes[size_class].slots : 0;
        for (uint32_t i = 0; i < store->slabs.slab_pages; i++) {
            uint32_t page = slab * store->slabs.slab_pages + i;
            if (!bkv_arena_is_live(&store->arena, page)) {
                continue;
            }
            uint32_t index = i / slot_pages;
            bool starts_slot = i % slot_pages == 0 && index < slots;
            if (starts_slot && take_over(store, slab, size_class, index, page, expires_ms)) {
                taken++;
            } else {
                bkv_arena_set_state(&store->arena, page, BKV_SLOT_FREE);
                refused++;
            }
        }
    }
    store->counts.recovered_total = taken;
    pthread_mutex_unlock(&store->space);
    if (refused > 0) {
        bkv_log(BKV_LOG_WARN, 0, "arena: took over %llu records, refused %llu that are damaged or too many",
                (unsigned long long)taken, (unsigned long long)refused);
    }
    return taken;
}
