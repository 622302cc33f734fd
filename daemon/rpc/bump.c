// bump.c - a list of pages that double as needed.
#include "daemon/rpc/bump.h"

#include <stdlib.h>

#define FIRST_PAGE ((size_t)64 << 10)
#define ALIGNMENT  16

struct bkv_bump_page {
    bkv_bump_page_t *older;
    size_t used, capacity;
    _Alignas(ALIGNMENT) unsigned char bytes[];
};

static void *allocate(void *data, size_t bytes) {
    return bkv_bump_alloc(data, bytes);
}

static void forget(void *data, void *pointer) {
    (void)data;
    (void)pointer;
}

void bkv_bump_init(bkv_bump_t *bump, size_t limit) {
    *bump = (bkv_bump_t){.allocator = {.alloc = allocate, .free = forget, .allocator_data = bump}, .limit = limit};
}

static bool add_page(bkv_bump_t *bump, size_t bytes) {
    size_t capacity = bump->pages == NULL ? FIRST_PAGE : bump->pages->capacity * 2;
    while (capacity < bytes) { // at most the limit, far from overflow
        capacity *= 2;
    }
    bkv_bump_page_t *page = malloc(sizeof(*page) + capacity);
    if (page == NULL) {
        return false;
    }
    page->older = bump->pages;
    page->used = 0;
    page->capacity = capacity;
    bump->pages = page;
    return true;
}

void *bkv_bump_alloc(bkv_bump_t *bump, size_t bytes) {
    size_t left = bump->limit - bump->used;
    size_t rounded = bytes > left ? bytes : (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    if (rounded > left) {
        bump->exhausted = true;
        return NULL;
    }
    bkv_bump_page_t *page = bump->pages;
    if (page == NULL || rounded > page->capacity - page->used) {
        if (!add_page(bump, rounded)) {
            bump->exhausted = true;
            return NULL;
        }
        page = bump->pages;
    }
    void *memory = page->bytes + page->used;
    page->used += rounded;
    bump->used += rounded;
    return memory;
}

static void drop_pages(bkv_bump_t *bump, bool all) {
    while (bump->pages != NULL && (all || bump->pages->older != NULL)) {
        bkv_bump_page_t *older = bump->pages->older;
        free(bump->pages);
        bump->pages = older;
    }
}

void bkv_bump_reset(bkv_bump_t *bump) {
    drop_pages(bump, false);
    if (bump->pages != NULL) {
        bump->pages->used = 0;
    }
    bump->used = 0;
    bump->exhausted = false;
}

void bkv_bump_deinit(bkv_bump_t *bump) {
    drop_pages(bump, true);
}
