// bump.h - short-lived memory for one step of one call: requests as protobuf-c unpacks them, replies before they are packed.
//
// Allocation moves a pointer, nothing is freed singly, a reset forgets everything. One worker thread owns one bump. Its limit
// is what bounds the memory that a hostile message can make protobuf-c take (a two-byte unknown field costs it 32).
#ifndef BKV_BUMP_H
#define BKV_BUMP_H

#include <protobuf-c/protobuf-c.h>
#include <stdbool.h>
#include <stddef.h>

typedef struct bkv_bump_page bkv_bump_page_t;

typedef struct bkv_bump {
    ProtobufCAllocator allocator; // hand &bump->allocator to protobuf-c
    bkv_bump_page_t *pages;       // newest first; the oldest is kept over a reset
    size_t used;                  // bytes given out since the reset, rounded up to whole 16s
    size_t limit;                 // most bytes ever given out at once
    bool exhausted;               // an allocation since the reset was refused
} bkv_bump_t;

void bkv_bump_init(bkv_bump_t *bump, size_t limit);
void bkv_bump_deinit(bkv_bump_t *bump);

// Memory until the next reset, 16-byte aligned. NULL beyond the limit or when there is none; `exhausted` remembers that.
void *bkv_bump_alloc(bkv_bump_t *bump, size_t bytes);

void bkv_bump_reset(bkv_bump_t *bump);

#endif
