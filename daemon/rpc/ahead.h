// ahead.h - the records of a Get that are not here, brought from the pool some way ahead of the sender.
//
// They come in windows: while the records of one are sent, the next one's are on their way. A window is never longer than
// BKV_AHEAD_WINDOW, and where the store has no room for so many at once it becomes shorter: a record without room is tried again
// when it is due and everything before it has gone, with half of the window that was too long.
//
// It belongs to the sender of records.c; only what marks itself may be read by others.
#ifndef BKV_RPC_AHEAD_H
#define BKV_RPC_AHEAD_H

#include "daemon/rpc/bring.h"

#define BKV_AHEAD_WINDOW 64

typedef struct bkv_ahead {
    bkv_call_t *call;
    bkv_spec_id_t spec_id;
    const bkv_key_t *keys; // [count]
    uint32_t count;
    void (*begins)(bkv_call_t *call); // a window is about to be brought: arrived follows once
    void (*arrived)(void *call);      // on any thread
    bkv_bring_t *now, *next;          // the window that the sender is in, and the one behind it; NULL: there is none
    uint32_t first;                   // record of `now`
    uint32_t window;                  // length of the next one that is made
    uint32_t retried;                 // the last record that turned out to be gone and was looked for again; UINT32_MAX: none
    bool restart;              // both windows are to be given up, and a new one begins with the next record that is reached
    _Atomic uint32_t arrivals; // windows that have come. Anybody's to read
} bkv_ahead_t;

typedef enum bkv_reach { BKV_REACH_HERE, BKV_REACH_COMING, BKV_REACH_NO_ROOM, BKV_REACH_FAILED } bkv_reach_t;

void bkv_ahead_init(bkv_ahead_t *ahead, bkv_call_t *call, const bkv_spec_id_t *spec_id, const bkv_key_t *keys, uint32_t count,
                    void (*begins)(bkv_call_t *call), void (*arrived)(void *call));

// No window may be on its way.
void bkv_ahead_deinit(bkv_ahead_t *ahead);

// Where a record is; numbers only increase. COMING: look again after the next arrival. NO_ROOM: the store had none for it while
// others were pinned. FAILED: err says why.
bkv_reach_t bkv_ahead_reach(bkv_ahead_t *ahead, uint32_t number, bkv_error_t *err);

// Whether the record is to be looked for once more, as there was no room for it or, being here, it turned out to be gone or
// damaged. It may then be reached again.
bool bkv_ahead_retry(bkv_ahead_t *ahead, uint32_t number);

// The sender has the record, or has given it up. Returns whether it came from the pool.
bool bkv_ahead_taken(bkv_ahead_t *ahead, uint32_t number);

#endif
