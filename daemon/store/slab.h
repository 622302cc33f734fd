// slab.h - cuts the arena into slots: which slab serves which size class, which slots are free, whose the others are.
//
// Size classes are whole pages, eight per doubling, from one page to a slab; each is then widened to what a slab divided by
// its number of slots gives, so that no slab has an unused end. Rounding costs a record less than a page or a ninth of its
// slot; records over an eighth of a slab more, since there the classes are slab / n: up to half of a slot just above slab / 2.
// A slab belongs to one class from the first slot taken until the last one is given back; then any class may have it.
// All bookkeeping is private memory: nothing that another process may write decides where a record goes. Only a slab's class
// is also told to the arena, for recover.c.
//
// Not thread-safe: the caller holds the store's space lock.
#ifndef BKV_SLAB_H
#define BKV_SLAB_H

#include "arena.h"

#define BKV_CLASSES_MAX   192         // 8 + 8 per doubling up to the largest slab, 2^23 pages, and some
#define BKV_OWNER_FILLING 0x7fffffffu // the slot is reserved and not yet an entry's; entries have smaller numbers
#define BKV_NO_SLAB       UINT32_MAX

typedef struct bkv_size_class {
    uint32_t pages;     // of one slot
    uint32_t slots;     // in one slab
    uint32_t slabs;     // that it has now
    uint32_t with_room; // first slab of it with a free slot
} bkv_size_class_t;

typedef struct bkv_slab {
    uint32_t size_class; // BKV_NO_CLASS: free
    uint32_t used;       // slots taken
    uint32_t fresh;      // slots from here on have not been taken since the slab got its class
    uint32_t returned;   // first of the slots given back, linked through `owner`
    uint32_t prev, next; // in its class's list of slabs with room, or in the list of free slabs
} bkv_slab_t;

typedef struct bkv_slabs {
    bkv_arena_t *arena;
    uint32_t slab_pages, slab_count, class_count;
    uint32_t free;    // first free slab
    bkv_slab_t *slab; // [slab_count]
    uint32_t *owner;  // [pages], at a slot's first page: an entry, BKV_OWNER_FILLING, or the next of `returned`
    bkv_size_class_t classes[BKV_CLASSES_MAX];
} bkv_slabs_t;

// All slabs free. RESOURCE_EXHAUSTED: no memory.
bkv_status_t bkv_slabs_init(bkv_slabs_t *slabs, bkv_arena_t *arena, bkv_error_t *err);
void bkv_slabs_deinit(bkv_slabs_t *slabs);

// The smallest class whose slots hold `bytes`; BKV_NO_CLASS where a slab does not.
uint32_t bkv_slabs_class_for(const bkv_slabs_t *slabs, uint64_t bytes);

uint64_t bkv_slabs_slot_bytes(const bkv_slabs_t *slabs, uint32_t size_class);

// Of a slot in use: its slab, its class, its bytes.
uint32_t bkv_slabs_slab_of(const bkv_slabs_t *slabs, uint32_t page);
uint32_t bkv_slabs_class_of(const bkv_slabs_t *slabs, uint32_t page);
uint64_t bkv_slabs_bytes_of(const bkv_slabs_t *slabs, uint32_t page);

// First page of slot `index` of a slab that has a class.
uint32_t bkv_slabs_slot_page(const bkv_slabs_t *slabs, uint32_t slab, uint32_t index);

// Takes a free slot of the class, giving it a free slab if it needs one. false: neither is there. Its owner is FILLING.
bool bkv_slabs_take(bkv_slabs_t *slabs, uint32_t size_class, uint32_t *page);

// Gives a slot back. A slab none of whose slots is taken becomes free.
void bkv_slabs_give(bkv_slabs_t *slabs, uint32_t page);

// Of a slot in use: which entry has it.
void bkv_slabs_set_owner(bkv_slabs_t *slabs, uint32_t page, uint32_t entry);

// Slot `index` of the slab: true and *owner (an entry or FILLING) if it is taken.
bool bkv_slabs_owner(const bkv_slabs_t *slabs, uint32_t slab, uint32_t index, uint32_t *owner);

// For recovery: takes slot `index` of a slab that is free or has only slots adopted before, in ascending order, in size_class.
void bkv_slabs_adopt(bkv_slabs_t *slabs, uint32_t slab, uint32_t size_class, uint32_t index);

#endif
