// recover.h - takes over the records that an earlier process left in the arena.
#ifndef BKV_RECOVER_H
#define BKV_RECOVER_H

#include <stdint.h>

typedef struct bkv_store bkv_store_t;

// Scans the arena of a store that is otherwise new and not yet shown to other threads. Every LIVE slot with a sound header
// becomes an entry, in the order of the arena, unused so far; payloads are verified when they are pinned. All other slots
// become FREE: damaged ones, second ones of a key, those for which there is no entry or tenant left. The arena may hold
// anything at all. Returns how many records were taken over.
uint64_t bkv_store_recover(bkv_store_t *store, uint64_t now_ms, uint64_t ttl_ms);

#endif
