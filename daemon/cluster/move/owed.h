// owed.h - names of records that a Put could not give to all of their owners: a bounded list, which the mover works off.
//
// A name may be on it twice. When there are too many, only that is known: then all of the store must be gone through. Not
// thread-safe: its owner has a lock.
#ifndef BKV_OWED_H
#define BKV_OWED_H

#include "kernels/summary.h"

#include <stdbool.h>
#include <stddef.h>

#define BKV_OWED_MAX 65536 // names, 3 MiB

typedef struct bkv_owed {
    bkv_name_t *names;
    size_t count, room;
    bool overflow; // names have been left out; the owner takes it back
} bkv_owed_t;

// A zeroed one is empty.
void bkv_owed_deinit(bkv_owed_t *owed);

// Adds a name, or sets overflow where there is no room or memory.
void bkv_owed_add(bkv_owed_t *owed, const bkv_name_t *name);

// Takes up to `most` names off.
size_t bkv_owed_take(bkv_owed_t *owed, bkv_name_t *names, size_t most);

#endif
