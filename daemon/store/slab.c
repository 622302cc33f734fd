// slab.c - free slots and free slabs. Which record must leave when there are none is evict.c's business.
#include "slab.h"

#include <assert.h>
#include <stdlib.h>

// Links of free slots: FREE_MARK | slot index. Taken slots have it clear.
#define FREE_MARK 0x80000000u
#define FREE_END  0xffffffffu

static void list_push(bkv_slabs_t *slabs, uint32_t *head, uint32_t slab) {
    slabs->slab[slab].prev = BKV_NO_SLAB;
    slabs->slab[slab].next = *head;
    if (*head != BKV_NO_SLAB) {
        slabs->slab[*head].prev = slab;
    }
    *head = slab;
}

static void list_remove(bkv_slabs_t *slabs, uint32_t *head, uint32_t slab) {
    bkv_slab_t *s = &slabs->slab[slab];
    if (s->prev != BKV_NO_SLAB) {
        slabs->slab[s->prev].next = s->next;
    } else {
        assert(*head == slab);
        *head = s->next;
    }
    if (s->next != BKV_NO_SLAB) {
        slabs->slab[s->next].prev = s->prev;
    }
}

// Eight sizes per doubling, each widened to slab / n; see slab.h.
static void make_classes(bkv_slabs_t *slabs) {
    uint32_t last = 0;
    for (uint64_t octave = 1; octave <= slabs->slab_pages; octave *= 2) {
        uint64_t step = octave < 8 ? 1 : octave / 8;
        for (uint64_t pages = octave; pages < 2 * octave && pages <= slabs->slab_pages; pages += step) {
            uint32_t slots = slabs->slab_pages / (uint32_t)pages;
            uint32_t wide = slabs->slab_pages / slots;
            if (wide > last) {
                assert(slabs->class_count < BKV_CLASSES_MAX);
                slabs->classes[slabs->class_count++] =
                    (bkv_size_class_t){.pages = wide, .slots = slots, .with_room = BKV_NO_SLAB};
                last = wide;
            }
        }
    }
    assert(last == slabs->slab_pages);
}

bkv_status_t bkv_slabs_init(bkv_slabs_t *slabs, bkv_arena_t *arena, bkv_error_t *err) {
    *slabs = (bkv_slabs_t){
        .arena = arena,
        .slab_pages = (uint32_t)(arena->slab_bytes / BKV_PAGE_BYTES),
        .slab_count = arena->slab_count,
        .free = BKV_NO_SLAB,
    };
    slabs->slab = calloc(slabs->slab_count, sizeof(*slabs->slab));
    slabs->owner = calloc((size_t)slabs->slab_count * slabs->slab_pages, sizeof(*slabs->owner));
    if (!slabs->slab || !slabs->owner) {
        bkv_slabs_deinit(slabs);
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "arena: no memory for the tables of %u slabs", slabs->slab_count);
    }
    make_classes(slabs);
    for (uint32_t slab = slabs->slab_count; slab-- > 0;) {
        slabs->slab[slab].size_class = BKV_NO_CLASS;
        list_push(slabs, &slabs->free, slab);
    }
    return BKV_OK;
}

void bkv_slabs_deinit(bkv_slabs_t *slabs) {
    free(slabs->slab);
    free(slabs->owner);
    slabs->slab = NULL;
    slabs->owner = NULL;
}

uint32_t bkv_slabs_class_for(const bkv_slabs_t *slabs, uint64_t bytes) {
    uint32_t low = 0;
    uint32_t high = slabs->class_count;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (bkv_slabs_slot_bytes(slabs, middle) < bytes) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low < slabs->class_count ? low : BKV_NO_CLASS;
}

uint64_t bkv_slabs_slot_bytes(const bkv_slabs_t *slabs, uint32_t size_class) {
    return (uint64_t)slabs->classes[size_class].pages * BKV_PAGE_BYTES;
}

uint32_t bkv_slabs_slab_of(const bkv_slabs_t *slabs, uint32_t page) {
    return page / slabs->slab_pages;
}

uint32_t bkv_slabs_class_of(const bkv_slabs_t *slabs, uint32_t page) {
    uint32_t size_class = slabs->slab[bkv_slabs_slab_of(slabs, page)].size_class;
    assert(size_class < slabs->class_count);
    return size_class;
}

uint64_t bkv_slabs_bytes_of(const bkv_slabs_t *slabs, uint32_t page) {
    return bkv_slabs_slot_bytes(slabs, bkv_slabs_class_of(slabs, page));
}

uint32_t bkv_slabs_slot_page(const bkv_slabs_t *slabs, uint32_t slab, uint32_t index) {
    return slab * slabs->slab_pages + index * slabs->classes[slabs->slab[slab].size_class].pages;
}

static bool has_room(const bkv_slabs_t *slabs, const bkv_slab_t *slab) {
    return slab->used < slabs->classes[slab->size_class].slots;
}

// Gives a free slab to a class. Its slots are all FREE in the arena: they were set so when their records left.
static void assign(bkv_slabs_t *slabs, uint32_t slab, uint32_t size_class) {
    list_remove(slabs, &slabs->free, slab);
    slabs->slab[slab] = (bkv_slab_t){.size_class = size_class, .returned = FREE_END};
    slabs->classes[size_class].slabs++;
    list_push(slabs, &slabs->classes[size_class].with_room, slab);
    bkv_arena_set_class(slabs->arena, slab, size_class);
}

bool bkv_slabs_take(bkv_slabs_t *slabs, uint32_t size_class, uint32_t *page) {
    bkv_size_class_t *c = &slabs->classes[size_class];
    if (c->with_room == BKV_NO_SLAB) {
        if (slabs->free == BKV_NO_SLAB) {
            return false;
        }
        assign(slabs, slabs->free, size_class);
    }
    uint32_t slab = c->with_room;
    bkv_slab_t *s = &slabs->slab[slab];
    uint32_t index;
    if (s->returned != FREE_END) {
        index = s->returned & ~FREE_MARK;
        s->returned = slabs->owner[bkv_slabs_slot_page(slabs, slab, index)];
    } else {
        index = s->fresh++;
    }
    s->used++;
    if (!has_room(slabs, s)) {
        list_remove(slabs, &c->with_room, slab);
    }
    *page = bkv_slabs_slot_page(slabs, slab, index);
    slabs->owner[*page] = BKV_OWNER_FILLING;
    return true;
}

void bkv_slabs_give(bkv_slabs_t *slabs, uint32_t page) {
    uint32_t slab = bkv_slabs_slab_of(slabs, page);
    bkv_slab_t *s = &slabs->slab[slab];
    bkv_size_class_t *c = &slabs->classes[s->size_class];
    assert(s->used > 0 && !(slabs->owner[page] & FREE_MARK));
    if (!has_room(slabs, s)) {
        list_push(slabs, &c->with_room, slab);
    }
    slabs->owner[page] = s->returned;
    s->returned = FREE_MARK | (page - slab * slabs->slab_pages) / c->pages;
    s->used--;
    if (s->used == 0) {
        list_remove(slabs, &c->with_room, slab);
        c->slabs--;
        s->size_class = BKV_NO_CLASS;
        list_push(slabs, &slabs->free, slab);
    }
}

void bkv_slabs_set_owner(bkv_slabs_t *slabs, uint32_t page, uint32_t entry) {
    assert(entry < BKV_OWNER_FILLING && !(slabs->owner[page] & FREE_MARK));
    slabs->owner[page] = entry;
}

bool bkv_slabs_owner(const bkv_slabs_t *slabs, uint32_t slab, uint32_t index, uint32_t *owner) {
    const bkv_slab_t *s = &slabs->slab[slab];
    if (s->size_class == BKV_NO_CLASS || index >= s->fresh) {
        return false;
    }
    *owner = slabs->owner[bkv_slabs_slot_page(slabs, slab, index)];
    return !(*owner & FREE_MARK);
}

void bkv_slabs_adopt(bkv_slabs_t *slabs, uint32_t slab, uint32_t size_class, uint32_t index) {
    bkv_slab_t *s = &slabs->slab[slab];
    bkv_size_class_t *c = &slabs->classes[size_class];
    if (s->size_class == BKV_NO_CLASS) {
        assign(slabs, slab, size_class);
    }
    assert(s->size_class == size_class && index >= s->fresh && index < c->slots);
    for (; s->fresh < index; s->fresh++) {
        slabs->owner[bkv_slabs_slot_page(slabs, slab, s->fresh)] = s->returned;
        s->returned = FREE_MARK | s->fresh;
    }
    s->fresh++;
    s->used++;
    slabs->owner[bkv_slabs_slot_page(slabs, slab, index)] = BKV_OWNER_FILLING;
    if (!has_room(slabs, s)) {
        list_remove(slabs, &c->with_room, slab);
    }
}
