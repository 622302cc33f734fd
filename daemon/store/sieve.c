// sieve.c - a doubly linked queue with a hand.
#include "sieve.h"

#include <assert.h>

void bkv_sieve_init(bkv_sieve_t *queue) {
    *queue = (bkv_sieve_t){BKV_SIEVE_END, BKV_SIEVE_END, BKV_SIEVE_END, 0};
}

void bkv_sieve_push(bkv_sieve_t *queue, bkv_sieve_link_t *links, uint32_t entry) {
    links[entry] = (bkv_sieve_link_t){.newer = BKV_SIEVE_END, .older = queue->newest};
    if (queue->newest != BKV_SIEVE_END) {
        links[queue->newest].newer = entry;
    } else {
        queue->oldest = entry;
    }
    queue->newest = entry;
    queue->count++;
}

void bkv_sieve_remove(bkv_sieve_t *queue, bkv_sieve_link_t *links, uint32_t entry) {
    assert(queue->count > 0);
    bkv_sieve_link_t link = links[entry];
    if (queue->hand == entry) {
        queue->hand = link.newer;
    }
    if (link.newer != BKV_SIEVE_END) {
        links[link.newer].older = link.older;
    } else {
        assert(queue->newest == entry);
        queue->newest = link.older;
    }
    if (link.older != BKV_SIEVE_END) {
        links[link.older].newer = link.newer;
    } else {
        assert(queue->oldest == entry);
        queue->oldest = link.newer;
    }
    queue->count--;
}

uint32_t bkv_sieve_hand(const bkv_sieve_t *queue) {
    return queue->hand != BKV_SIEVE_END ? queue->hand : queue->oldest;
}

void bkv_sieve_advance(bkv_sieve_t *queue, const bkv_sieve_link_t *links) {
    queue->hand = links[bkv_sieve_hand(queue)].newer;
}
