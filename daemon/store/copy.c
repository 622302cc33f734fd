// copy.c - (contract only so far)
#include "internal.h"

bkv_status_t bkv_store_adopt(bkv_store_t *store, bkv_slot_t *slot, uint64_t ttl_ms, bool copy, uint64_t now_ms, bkv_pin_t *pin,
                             bkv_error_t *err) {
    (void)copy;
    return pin != NULL ? bkv_store_publish_pinned(store, slot, ttl_ms, 0, now_ms, pin, err)
                       : bkv_store_publish(store, slot, ttl_ms, 0, now_ms, err);
}
bool bkv_store_set_copy(bkv_store_t *store, const bkv_name_t *name, bool copy, uint64_t now_ms) {
    (void)copy;
    return bkv_store_contains(store, &name->spec_id, &name->key, now_ms);
}
uint64_t bkv_store_ttl(const bkv_store_t *store, const bkv_pin_t *pin, uint64_t now_ms) {
    (void)store, (void)pin, (void)now_ms;
    return 0;
}
size_t bkv_store_list(bkv_store_t *store, uint64_t *cursor, bkv_store_item_t *items, size_t capacity, uint64_t now_ms,
                      bool *more) {
    (void)store, (void)cursor, (void)items, (void)capacity, (void)now_ms;
    *more = false;
    return 0;
}
