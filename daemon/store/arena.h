// arena.h - the memory that outlives the process: one shared mapping, and what a successor must know to read it again.
//
//     head, a multiple of 2 MiB
//       page 0    magic, versions, geometry
//       classes   one u32 per slab: its size class + 1, or 0 while it has had none
//       states    one byte per 4 KiB page: LIVE where a slot begins whose record has been published
//     slabs       slab_count * slab_bytes, the first at a multiple of 2 MiB, so that huge pages fit
//
// A slot's state is what makes a crash harmless: it is FREE from before the first byte of a record is written until after the
// last one, so that half a record is never found. Everything else that the store knows is private memory and made anew by
// recover.c. What is read from the head is checked against the slabs' own bounds: another process may have written it.
#ifndef BKV_ARENA_H
#define BKV_ARENA_H

#include "kernels/status.h"

#include <stdbool.h>
#include <stdint.h>

#define BKV_PAGE_BYTES 4096u
#define BKV_NO_CLASS   UINT32_MAX

typedef enum bkv_slot_state { BKV_SLOT_FREE = 0, BKV_SLOT_LIVE = 1 } bkv_slot_state_t;

typedef struct bkv_arena {
    int fd;
    uint8_t *map; // the whole file
    uint64_t map_bytes;
    uint32_t *classes;
    uint8_t *states;
    uint8_t *slabs;
    uint64_t slab_bytes; // multiple of BKV_PAGE_BYTES
    uint32_t slab_count;
} bkv_arena_t;

// Maps slab_count slabs of slab_bytes (a multiple of BKV_PAGE_BYTES; all pages together fewer than 2^32): of fd where that is
// >= 0 (duplicated; the caller's stays his), else of the file `path`, else of a new memfd. *intact: it holds what a
// predecessor left; otherwise it is empty, cleared if need be. FAILED_PRECONDITION: another process has it.
// RESOURCE_EXHAUSTED: no room for it. INVALID_ARGUMENT: not a file that can be mapped, not this user's alone, or one that holds
// something else (it is left as it is). Nothing is held after a failure.
bkv_status_t bkv_arena_open(bkv_arena_t *arena, const char *path, int fd, uint64_t slab_bytes, uint32_t slab_count,
                            bool prefault, bool *intact, bkv_error_t *err);
void bkv_arena_close(bkv_arena_t *arena);

// Where slot or page number `page` of the slabs lies.
uint8_t *bkv_arena_at(const bkv_arena_t *arena, uint32_t page);

// BKV_NO_CLASS while the slab has had none. The number is as found: compare it with the classes there are.
uint32_t bkv_arena_class(const bkv_arena_t *arena, uint32_t slab);
void bkv_arena_set_class(bkv_arena_t *arena, uint32_t slab, uint32_t size_class);

// set_state(LIVE) publishes: everything written to the slot before is there for whoever finds it LIVE.
bool bkv_arena_is_live(const bkv_arena_t *arena, uint32_t page);
void bkv_arena_set_state(bkv_arena_t *arena, uint32_t page, bkv_slot_state_t state);

#endif
