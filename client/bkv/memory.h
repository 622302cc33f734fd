// memory.h - allocation for the command line: it either succeeds or ends the program with a message and exit status 1.
//
// For a short-lived program that is the honest way out; the library underneath (client/*.c) never does that.
#ifndef BKV_CLI_MEMORY_H
#define BKV_CLI_MEMORY_H

#include <stddef.h>

#define BKV_CLI_ALIGN 64

void *bkv_xcalloc(size_t count, size_t size); // zeroed; count * size is checked for overflow
void *bkv_xrealloc(void *old, size_t count, size_t size);
void *bkv_xaligned(size_t bytes); // BKV_CLI_ALIGN aligned, not zeroed; bytes may be 0
char *bkv_xstrdup(const char *text);

#endif
