// test_slab.c - size classes, and that no two slots ever overlap.
#include "fixture.h"

#include <criterion/criterion.h>
#include <stdlib.h>

typedef struct {
    bkv_arena_t arena;
    bkv_slabs_t slabs;
} room_t;

static room_t *room(uint64_t slab_bytes, uint32_t count) {
    room_t *r = calloc(1, sizeof(*r));
    bool intact;
    cr_assert_eq(bkv_arena_open(&r->arena, NULL, -1, slab_bytes, count, false, &intact, NULL), BKV_OK);
    cr_assert_eq(bkv_slabs_init(&r->slabs, &r->arena, NULL), BKV_OK);
    return r;
}

static void leave_room(room_t *r) {
    bkv_slabs_deinit(&r->slabs);
    bkv_arena_close(&r->arena);
    free(r);
}

Test(store_slab, classes) {
    static const uint64_t slab_bytes[] = {64 * KIB, MIB, 10 * MIB, 8 * MIB + 12 * KIB, 1024 * MIB};
    for (size_t s = 0; s < sizeof(slab_bytes) / sizeof(*slab_bytes); s++) {
        room_t *r = room(slab_bytes[s], 1);
        const bkv_slabs_t *slabs = &r->slabs;
        uint32_t last = 0;
        for (uint32_t c = 0; c < slabs->class_count; c++) {
            const bkv_size_class_t *k = &slabs->classes[c];
            cr_assert_gt(k->pages, last);
            cr_assert_leq((uint64_t)k->pages * k->slots, slabs->slab_pages);
            cr_assert_lt((uint64_t)slabs->slab_pages - (uint64_t)k->pages * k->slots, k->slots, "an unused end");
            last = k->pages;
        }
        cr_assert_eq(slabs->classes[0].pages, 1);
        cr_assert_eq(last, slabs->slab_pages);
        uint64_t seed = 1;
        for (int i = 0; i < 2000; i++) { // up to an eighth of a slab, rounding costs a page or a ninth and a bit
            uint64_t bytes = 1 + fixture_random(&seed) % (slab_bytes[s] / 8);
            uint64_t slot = bkv_slabs_slot_bytes(slabs, bkv_slabs_class_for(slabs, bytes));
            cr_assert_geq(slot, bytes);
            cr_assert(slot - bytes < BKV_PAGE_BYTES + slot / 4, "%llu in %llu", (unsigned long long)bytes,
                      (unsigned long long)slot);
            cr_assert(slot > slab_bytes[s] / 32 || slot - bytes <= BKV_PAGE_BYTES + slot / 8, "%llu in %llu",
                      (unsigned long long)bytes, (unsigned long long)slot);
        }
        cr_assert_eq(bkv_slabs_class_for(slabs, 0), 0);
        cr_assert_eq(bkv_slabs_class_for(slabs, slab_bytes[s]), slabs->class_count - 1);
        cr_assert_eq(bkv_slabs_class_for(slabs, slab_bytes[s] + 1), BKV_NO_CLASS);
        leave_room(r);
    }
}

// The largest slab there is has a class table that fits, too.
Test(store_slab, class_table_is_large_enough) {
    bkv_arena_t arena = {.slab_bytes = 32 * 1024 * MIB, .slab_count = 1};
    bkv_slabs_t *slabs = calloc(1, sizeof(*slabs));
    cr_assert_eq(bkv_slabs_init(slabs, &arena, NULL), BKV_OK);
    cr_assert_leq(slabs->class_count, BKV_CLASSES_MAX);
    cr_assert_lt(slabs->class_count, 256); // an entry's class is one byte
    bkv_slabs_deinit(slabs);
    free(slabs);
}

#define PAGES (8 * 64)

Test(store_slab, takes_and_gives) {
    room_t *r = room(256 * KIB, 8); // 64 pages each
    bkv_slabs_t *slabs = &r->slabs;
    uint8_t map[PAGES] = {0}; // pages in use
    uint32_t held[PAGES];
    uint32_t count = 0;
    uint64_t seed = 2;
    for (int step = 0; step < 30000; step++) {
        if (fixture_random(&seed) % 100 < 55) {
            uint32_t c = (uint32_t)(fixture_random(&seed) % slabs->class_count);
            uint32_t page;
            if (!bkv_slabs_take(slabs, c, &page)) {
                cr_assert_eq(slabs->free, BKV_NO_SLAB);
                cr_assert_eq(slabs->classes[c].with_room, BKV_NO_SLAB);
                continue;
            }
            cr_assert_eq(bkv_slabs_class_of(slabs, page), c);
            cr_assert_eq(bkv_arena_class(&r->arena, bkv_slabs_slab_of(slabs, page)), c);
            for (uint32_t i = 0; i < slabs->classes[c].pages; i++) {
                cr_assert_eq(map[page + i]++, 0, "page %u given twice", page + i);
            }
            cr_assert_eq(page / 64, (page + slabs->classes[c].pages - 1) / 64, "a slot across slabs");
            bkv_slabs_set_owner(slabs, page, 1000 + page);
            held[count++] = page;
        } else if (count > 0) {
            uint32_t at = (uint32_t)(fixture_random(&seed) % count);
            uint32_t page = held[at];
            held[at] = held[--count];
            uint32_t pages = slabs->classes[bkv_slabs_class_of(slabs, page)].pages;
            for (uint32_t i = 0; i < pages; i++) {
                map[page + i]--;
            }
            bkv_slabs_give(slabs, page);
        }
    }
    uint32_t seen = 0;
    for (uint32_t s = 0; s < 8; s++) {
        for (uint32_t i = 0; i < 64; i++) {
            uint32_t owner;
            if (bkv_slabs_owner(slabs, s, i, &owner)) {
                cr_assert_eq(owner, 1000 + bkv_slabs_slot_page(slabs, s, i));
                seen++;
            }
        }
    }
    cr_assert_eq(seen, count);
    while (count > 0) {
        bkv_slabs_give(slabs, held[--count]);
    }
    for (uint32_t i = 0; i < 8; i++) { // all slabs are anybody's again
        uint32_t page;
        cr_assert(bkv_slabs_take(slabs, slabs->class_count - 1, &page));
    }
    leave_room(r);
}

Test(store_slab, adopts) {
    room_t *r = room(256 * KIB, 2);
    bkv_slabs_t *slabs = &r->slabs;
    static const uint32_t adopted[] = {1, 2, 7, 63};
    for (size_t i = 0; i < 4; i++) {
        bkv_slabs_adopt(slabs, 1, 0, adopted[i]);
    }
    bool taken[64] = {[1] = true, [2] = true, [7] = true, [63] = true};
    for (int i = 0; i < 60; i++) { // exactly the others are free
        uint32_t page;
        cr_assert(bkv_slabs_take(slabs, 0, &page));
        cr_assert_eq(page / 64, 1);
        cr_assert(!taken[page % 64]);
        taken[page % 64] = true;
    }
    uint32_t page;
    cr_assert(bkv_slabs_take(slabs, 0, &page));
    cr_assert_eq(page / 64, 0);
    leave_room(r);
}
