// fetch.h - a call that brings records: what Get and Fold (get.c) have in common.
#ifndef BKV_CLIENT_FETCH_H
#define BKV_CLIENT_FETCH_H

#include "client/client.h"

// The largest record to make room for, where the daemon has not said what its largest block is; as large as a slab may be.
#define BKV_FETCH_MOST (1ull << 30)

typedef struct bkv_fetch {
    bkv_call_t call; // first
    size_t count;
    bkv_record_t *records; // not yet: status OK, no data
    bkv_range_t range;
    uint64_t record_max;   // of the next record; of a Fold: what is left of `budget`
    uint64_t budget;       // of a Fold: most bytes of all records
    const size_t *numbers; // of a part of a Get: which of the whole's its records are; NULL: it is the whole
    size_t *folded;        // of a Fold: how many records came, at most `count`; NULL: a Get
    uint64_t room_bytes;   // to be taken from the window for them, as a guess; less than BKV_PLACE_LEAST: none

    size_t index;      // the record that is coming
    uint64_t received; // bytes of it
    bool open;         // it has begun and is not complete
    bkv_sum_t *sum;    // of its bytes
    uint64_t largest;  // bytes of a record
    bkv_error_t first; // the first record's that there is not

    bkv_client_region_t *room; // of the attempt; NULL: none
    uint64_t room_used;        // up to the end of the last record in it
} bkv_fetch_t;

extern const bkv_call_kind_t bkv_fetch_get, bkv_fetch_fold;

// A fetch of at most `count` records into `records`, which its caller has initialised. NULL: out of memory.
bkv_fetch_t *bkv_fetch_new(const bkv_call_kind_t *kind, bkv_client_t *client, const bkv_spec_id_t *id, uint32_t timeout_ms,
                           bkv_record_t *records, size_t count);

#endif
