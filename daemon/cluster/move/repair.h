// repair.h - what a member must send, and to whom, when the members have changed. Plans only: who calls this sends.
//
// What moves. Between the placement under which all was last in its place (`was`) and the present one (`now`), a key's holders
// are its owners by `was` that are still there under the same epoch; those of its owners by `now` that hold nothing yet are its
// targets. Every holder finds the same plan without a word to the others, and for each target exactly one of them is to send:
//
//   - a holder that owns the key no more, if there is one: it drains, or a newcomer has taken its place. It learns when all
//     that it had has arrived, and may then forget it (`forget`);
//   - else the holders share the keys evenly, by the key's hash: after a crash all survivors repair at the same time.
//
// So a key's movement is its targets, which placement.h keeps at the least that is possible. Whoever has a key that it did not
// own by `was` (a stray: it got it under a placement in between, or was itself restarted with its memory intact) cannot know
// what others hold, and offers it to all present owners.
//
// What the plan cannot know is what memory pressure has evicted meanwhile, and what a target has already. Therefore the
// contract of whoever executes it: ask the target first, for many keys in one message, which of them it lacks (a Lookup: 32
// bytes a key against a record's 100 KiB); send those, at the rate of a bandwidth.h; a record that is not there any more is a
// miss and no error. Then plans may be executed twice, or half, and again under a newer placement, and nothing is sent in vain.
//
// Life of a repair: created when a member first sees a placement that differs from the one it last finished; pulled from by
// _next until that returns 0; told of a send that failed by _failed. _done says whether the pass was clean; if not, _again.
// A new placement before that: _aim; `was` stays what it is, as only that was ever complete. When done, `now` becomes the next
// `was`. What is put meanwhile is replicated by its Put under the placement of that moment, and need not be seen.
#ifndef BKV_REPAIR_H
#define BKV_REPAIR_H

#include "proto/placement.h"

// ---- one key ----

// From the members of one placement to those of another: the same start of the same daemon, or BKV_NO_MEMBER.
typedef struct bkv_succession {
    const bkv_placement_t *was, *now; // borrowed
    uint16_t *heir;                   // [members of was]: its place in now
} bkv_succession_t;

bkv_status_t bkv_succession_init(bkv_succession_t *succession, const bkv_placement_t *was, const bkv_placement_t *now,
                                 bkv_error_t *err);
void bkv_succession_deinit(bkv_succession_t *succession);

typedef struct bkv_repair_step {
    uint16_t targets[BKV_REPLICAS_MAX]; // members of now to send the key to
    uint8_t count;
    bool stray;  // others may be sending it too
    bool forget; // not an owner by now: once all targets have it, it need not be kept here
} bkv_repair_step_t;

// What `self`, a member of now that has the key, must do about it. BKV_NO_MEMBER: it is in no view yet, and does nothing.
void bkv_repair_plan(const bkv_succession_t *succession, uint16_t self, const bkv_key_t *key, bkv_repair_step_t *step);

// ---- all keys of a store ----

typedef struct bkv_repair_item {
    bkv_key_t key;
    bkv_spec_id_t spec_id;
    uint64_t bytes; // of the record
} bkv_repair_item_t;

// The keys of a store, in pieces and in any order that stays the same: copies up to `capacity` of those at *cursor and behind
// it, and moves *cursor past them. 0: there are no more. A key that is resident from before cursor 0 until the end is listed,
// once; one that comes or goes meanwhile may be. Copies of what others own (hot copies) are not listed. Takes no lock for long.
typedef size_t (*bkv_repair_list_t)(void *store, uint64_t *cursor, bkv_repair_item_t *items, size_t capacity);

typedef struct bkv_repair_send {
    bkv_repair_item_t item;
    bkv_repair_step_t step; // with at least one target
} bkv_repair_send_t;

typedef struct bkv_repair_progress {
    uint64_t seen;           // keys looked at in this pass
    uint64_t planned;        // transfers, of this pass
    uint64_t planned_bytes;  // of theirs: an upper bound of what is sent, as targets may have some
    uint32_t passes, failed; // passes begun; transfers of this pass that failed
} bkv_repair_progress_t;

typedef struct bkv_repair bkv_repair_t;

// The placements must live until the repair is destroyed. self: the daemon's id. One thread at a time.
bkv_status_t bkv_repair_create(const bkv_placement_t *was, const bkv_placement_t *now, const char *self, bkv_repair_list_t list,
                               void *store, bkv_repair_t **repair, bkv_error_t *err);
void bkv_repair_destroy(bkv_repair_t *repair); // NULL: nothing

// The next keys for which something must be done, up to capacity; looks at no more than `most` keys for it, so that a caller is
// never away for long (0 with *more: ask again). 0 without *more: the pass is over.
size_t bkv_repair_next(bkv_repair_t *repair, bkv_repair_send_t *sends, size_t capacity, size_t most, bool *more);

void bkv_repair_failed(bkv_repair_t *repair);     // a transfer did: the pass must be made again
bool bkv_repair_done(const bkv_repair_t *repair); // a pass is over, and none of its transfers failed
void bkv_repair_again(bkv_repair_t *repair);      // begins another pass
void bkv_repair_progress(const bkv_repair_t *repair, bkv_repair_progress_t *progress);

#endif
