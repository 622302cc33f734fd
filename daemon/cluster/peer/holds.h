// holds.h - records that are kept in place while another daemon reads them: pins with an end, taken by one question and given
// back together. What reads them, and over what, is serve.c's.
//
// A hold lasts until it is released, its time is over, or all of its kind end. There are only so many of them, and so many
// records and bytes in them, as what is held cannot make room. Not thread-safe.
#ifndef BKV_HOLDS_H
#define BKV_HOLDS_H

#include "daemon/store/store.h"

#define BKV_HOLDS_MAX         64   // of one daemon at a time
#define BKV_HOLDS_RECORDS_MAX 8192 // in them

typedef struct bkv_hold bkv_hold_t;

typedef struct bkv_holds {
    bkv_store_t *store;
    bkv_hold_t *first, **end; // oldest first
    uint32_t count, records;
    uint64_t bytes, bytes_max;
    uint64_t last_id;
} bkv_holds_t;

// Where a record lies.
typedef struct bkv_location {
    uint64_t offset; // from the arena's start
    uint64_t bytes;  // 0: not here
    uint64_t tenant, ttl_ms;
} bkv_location_t;

// bytes_max: how much may be held at once.
void bkv_holds_init(bkv_holds_t *holds, bkv_store_t *store, uint64_t bytes_max);
void bkv_holds_deinit(bkv_holds_t *holds); // ends all

// Pins those of names that are here, and says where all of them are; *id: of the hold, 0: none was needed. Statuses, with nothing
// held: RESOURCE_EXHAUSTED: there would be too much; BUSY: a record is pinned too often.
bkv_status_t bkv_holds_take(bkv_holds_t *holds, const bkv_name_t *names, uint32_t count, uint64_t until_ms, uint64_t now_ms,
                            bkv_location_t *locations, uint64_t *id, bkv_error_t *err);

// Nothing happens to what is not there any more.
void bkv_holds_release(bkv_holds_t *holds, uint64_t id);

// Ends those whose time is over.
void bkv_holds_expire(bkv_holds_t *holds, uint64_t now_ms);

#endif
