// memory.c - see memory.h.
#include "memory.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void *need(void *p, size_t count, size_t size) {
    if (p == NULL) {
        fprintf(stderr, "bkv: out of memory (%zu x %zu bytes)\n", count, size);
        exit(1);
    }
    return p;
}

void *bkv_xcalloc(size_t count, size_t size) {
    return need(calloc(count > 0 ? count : 1, size > 0 ? size : 1), count, size);
}

void *bkv_xrealloc(void *old, size_t count, size_t size) {
    return need(reallocarray(old, count > 0 ? count : 1, size > 0 ? size : 1), count, size);
}

void *bkv_xaligned(size_t bytes) {
    // A size is rounded up as aligned_alloc wants it; one that would wrap cannot be had anyway.
    size_t rounded = bytes > SIZE_MAX - BKV_CLI_ALIGN ? 0 : (bytes / BKV_CLI_ALIGN + 1) * BKV_CLI_ALIGN;
    return need(rounded == 0 ? NULL : aligned_alloc(BKV_CLI_ALIGN, rounded), 1, bytes);
}

char *bkv_xstrdup(const char *text) {
    return need(strdup(text), 1, strlen(text) + 1);
}
