// reading.h - one bkv_cluster_fetch: what fetch.c, which decides whom to ask for which record, and ask.c, which puts one such
// question and takes in what comes of it, know of it together.
//
// A key is settled once, when its record is pinned here or cannot be had. Until then it has at most two questions under way: one,
// and where that owner is silent for longer than it is used to be, one to the next owner besides. Of two good answers the second
// finds the record resident, or the key settled.
//
// Locks. `lock` guards all that changes in the reading and its questions. Starts and cancels of the peers' calls happen under
// it, so that no callback of a call can come before the call is written down, nor a cancel after its end; the peers hold no lock
// of theirs when they call back. Records are verified, published and unpinned without it.
#ifndef BKV_READING_H
#define BKV_READING_H

#include "daemon/cluster/alarm.h"
#include "daemon/cluster/internal.h"
#include "daemon/cluster/owners.h"

typedef struct bkv_reading bkv_reading_t;
typedef struct bkv_ask bkv_ask_t;

// A record that is looked for.
typedef struct bkv_sought {
    uint32_t place; // among the caller's names
    uint16_t to;    // the owner that it is asked of next; only while questions are being put together
    uint8_t next;   // of its owners, the first that has not been asked
    uint8_t asked;  // questions under way
    bool due;       // is to be asked of its next owner
    bool settled;   // found[place] has been written, and is the caller's now
    bool damaged;   // it came from somebody, and not as it should be
    bool unheard;   // somebody who may have it did not answer
} bkv_sought_t;

typedef struct bkv_making {
    bkv_ask_t *ask;
    uint32_t keys;
} bkv_making_t;

struct bkv_reading {
    bkv_cluster_t *cluster;
    pthread_mutex_t lock;
    _Atomic uint32_t refs; // questions whose `done` has not come, alarms that are set, and one until all is settled
    uint64_t deadline_ms;
    bkv_found_t *found; // the caller's
    bkv_cluster_done_t done;
    void *user;
    bkv_owners_t owners;  // of names
    bkv_making_t *making; // [owners]: questions that are being put together
    bkv_ask_t *asks;      // all there have been
    uint32_t running;     // of them, those whose `done` has not come
    uint32_t open;        // keys that are not settled
    bool told, let_go;    // the caller that all is settled; of the owners' peers
    bkv_name_t *names;    // [count]
    uint32_t count;
    bkv_sought_t sought[];
};

// What came of one record of a question.
typedef enum bkv_outcome {
    BKV_CAME,       // it is pinned
    BKV_ABSENT,     // the owner has it not
    BKV_DAMAGED,    // what came is not that record
    BKV_NO_ROOM,    // here
    BKV_UNANSWERED, // the question broke off
    BKV_UNWANTED,   // the key was settled before it began to come
} bkv_outcome_t;

typedef struct bkv_ask_item {
    uint32_t key; // in the reading
    bool ended, coming;
    bkv_outcome_t refusal; // why it has no slot
    uint64_t bytes, ttl_ms;
    bkv_slot_t slot; // data NULL: none
} bkv_ask_item_t;

// A question to one owner.
struct bkv_ask {
    bkv_reading_t *reading;
    bkv_ask_t *older; // in reading->asks
    const bkv_owner_t *owner;
    bkv_peer_call_t *call;
    bkv_alarm_t alarm;
    uint64_t heard_us;     // when something last began or ended
    uint64_t coming_bytes; // of records that have begun to come, and not ended
    uint32_t failed;       // ended otherwise than well since its keys were last passed on
    bool ended;
    uint32_t count;
    bkv_ask_item_t items[];
};

// ---- fetch.c's ----

// [lock] Takes in what came of a question about a key; pin is that of a record that came. Returns whether it has gone to the
// caller.
bool bkv_reading_take(bkv_reading_t *reading, const bkv_ask_t *ask, uint32_t key, bkv_outcome_t outcome, const bkv_pin_t *pin);

// [lock] Asks the next owner of every key that is due.
void bkv_reading_pass_on(bkv_reading_t *reading);

// [lock] Takes the lock off, and does what has become due: tells the caller when all is settled, gives the peers back when no
// question is under way either. Who calls it has a reference of its own.
void bkv_reading_unlock(bkv_reading_t *reading);

void bkv_reading_unref(bkv_reading_t *reading);

// ---- ask.c's ----

// [lock] A question to an owner with room for so many keys; NULL: no memory.
bkv_ask_t *bkv_ask_new(bkv_reading_t *reading, const bkv_owner_t *owner, uint32_t capacity);
void bkv_ask_add(bkv_ask_t *ask, uint32_t key);

// [lock] Puts it. False: the owner cannot be asked now, and nothing has begun.
bool bkv_ask_start(bkv_ask_t *ask);

// [lock] What has not come is not wanted any more.
void bkv_ask_cancel(bkv_ask_t *ask);

#endif
