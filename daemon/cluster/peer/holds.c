// holds.c - see holds.h.
#include "daemon/cluster/peer/holds.h"

#include <stdlib.h>
#include <string.h>

struct bkv_hold {
    bkv_hold_t *next;
    uint64_t id, until_ms, bytes;
    uint32_t count;
    bkv_pin_t pins[];
};

void bkv_holds_init(bkv_holds_t *holds, bkv_store_t *store, uint64_t bytes_max) {
    *holds = (bkv_holds_t){.store = store, .bytes_max = bytes_max, .end = &holds->first};
}

static void unpin(bkv_holds_t *holds, bkv_hold_t *hold) {
    for (uint32_t i = 0; i < hold->count; i++) {
        bkv_store_unpin(holds->store, &hold->pins[i]);
    }
    free(hold);
}

// Ends the hold that *slot refers to.
static void end(bkv_holds_t *holds, bkv_hold_t **slot) {
    bkv_hold_t *hold = *slot;
    *slot = hold->next;
    if (hold->next == NULL) {
        holds->end = slot;
    }
    holds->count--;
    holds->records -= hold->count;
    holds->bytes -= hold->bytes;
    unpin(holds, hold);
}

void bkv_holds_deinit(bkv_holds_t *holds) {
    while (holds->first != NULL) {
        end(holds, &holds->first);
    }
}

void bkv_holds_release(bkv_holds_t *holds, uint64_t id) {
    for (bkv_hold_t **slot = &holds->first; *slot != NULL; slot = &(*slot)->next) {
        if ((*slot)->id == id) {
            end(holds, slot);
            return;
        }
    }
}

void bkv_holds_expire(bkv_holds_t *holds, uint64_t now_ms) {
    bkv_hold_t **slot = &holds->first;
    while (*slot != NULL) {
        if ((*slot)->until_ms <= now_ms) {
            end(holds, slot);
        } else {
            slot = &(*slot)->next;
        }
    }
}

// One record: pinned, or not here. What its header says is the asker's to check as well.
static bkv_status_t take_one(bkv_holds_t *holds, bkv_hold_t *hold, const bkv_name_t *name, uint64_t now_ms,
                             bkv_location_t *location, bkv_error_t *err) {
    bkv_pin_t pin;
    bkv_record_header_t header;
    *location = (bkv_location_t){0};
    bkv_status_t status = bkv_store_pin_unverified(holds->store, &name->spec_id, &name->key, now_ms, &pin, err);
    if (status != BKV_OK) {
        return status == BKV_NOT_FOUND ? BKV_OK : status;
    }
    void *arena;
    uint64_t arena_bytes;
    bkv_store_memory(holds->store, &arena, &arena_bytes);
    memcpy(&header, pin.data, sizeof(header));
    *location = (bkv_location_t){
        .offset = (uint64_t)(pin.data - (const uint8_t *)arena),
        .bytes = pin.length,
        .tenant = header.tenant,
        .ttl_ms = bkv_store_ttl(holds->store, &pin, now_ms),
    };
    hold->pins[hold->count++] = pin;
    hold->bytes += pin.length;
    if (hold->bytes > holds->bytes_max - holds->bytes) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "names: %llu bytes are held already", (unsigned long long)holds->bytes);
    }
    return BKV_OK;
}

static bkv_status_t take_all(bkv_holds_t *holds, bkv_hold_t *hold, const bkv_name_t *names, uint32_t count, uint64_t now_ms,
                             bkv_location_t *locations, bkv_error_t *err) {
    bkv_status_t status = BKV_OK;
    for (uint32_t i = 0; i < count && status == BKV_OK; i++) {
        status = take_one(holds, hold, &names[i], now_ms, &locations[i], err);
    }
    return status;
}

bkv_status_t bkv_holds_take(bkv_holds_t *holds, const bkv_name_t *names, uint32_t count, uint64_t until_ms, uint64_t now_ms,
                            bkv_location_t *locations, uint64_t *id, bkv_error_t *err) {
    *id = 0;
    if (holds->count == BKV_HOLDS_MAX || count > BKV_HOLDS_RECORDS_MAX - holds->records) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "names: %u records in %u holds are held already", holds->records,
                        holds->count);
    }
    bkv_hold_t *hold = calloc(1, sizeof(*hold) + count * sizeof(hold->pins[0]));
    if (hold == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "names: no memory to hold %u records", count);
    }
    bkv_status_t status = take_all(holds, hold, names, count, now_ms, locations, err);
    if (status != BKV_OK || hold->count == 0) {
        unpin(holds, hold);
        return status;
    }
    hold->id = ++holds->last_id;
    hold->until_ms = until_ms;
    *holds->end = hold;
    holds->end = &hold->next;
    holds->count++;
    holds->records += hold->count;
    holds->bytes += hold->bytes;
    *id = hold->id;
    return BKV_OK;
}
