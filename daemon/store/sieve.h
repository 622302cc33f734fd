// sieve.h - the queue that SIEVE needs: newest at the head, and a hand that walks from the oldest towards the newest.
//
// Zhang, Yang, Yue, Vigfusson, Rashmi: SIEVE is Simpler than LRU: an Efficient Turn-Key Eviction Algorithm for Web Caches,
// NSDI 2024. A use sets an entry's visited bit and moves nothing; the hand clears set bits and stops at the first clear one,
// which is evicted, and stays there: survivors keep their place, newcomers are met soon. So one long scan of blocks that
// nobody asks for again passes through the young end of the queue and leaves the working set alone, where LRU would lose all of
// it; and a use needs only the entry's own lock, not the queue's, which is why it is not S3-FIFO either (three queues and a
// ghost table for about the same hit rate).
//
// This file knows links and the hand; who is visited, pinned or worth evicting is evict.c's business. Links are arrays of the
// owner's, indexed by entry, one per kind of queue that an entry can be in. Not thread-safe.
#ifndef BKV_SIEVE_H
#define BKV_SIEVE_H

#include <stdint.h>

#define BKV_SIEVE_END UINT32_MAX

typedef struct bkv_sieve_link {
    uint32_t newer, older;
} bkv_sieve_link_t;

typedef struct bkv_sieve {
    uint32_t newest, oldest, hand; // hand END: start again at the oldest
    uint32_t count;
} bkv_sieve_t;

void bkv_sieve_init(bkv_sieve_t *queue);
void bkv_sieve_push(bkv_sieve_t *queue, bkv_sieve_link_t *links, uint32_t entry);

// The hand, if it is there, moves on to the next newer entry.
void bkv_sieve_remove(bkv_sieve_t *queue, bkv_sieve_link_t *links, uint32_t entry);

// The entry under the hand; END only when the queue is empty.
uint32_t bkv_sieve_hand(const bkv_sieve_t *queue);

// Moves the hand on; after the newest comes the oldest.
void bkv_sieve_advance(bkv_sieve_t *queue, const bkv_sieve_link_t *links);

#endif
