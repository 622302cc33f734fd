// hot.h - which records of other owners are read here so often that a copy should stay: counts of reads, forgotten with time.
//
// A small table of counters (a count-min sketch of two rows, 8 bits each), halved after so many reads as it has counters: so "a
// while" is a number of reads, not a time. A record seldom read is counted too high now and then, when it shares both of its
// counters with others; the price is a copy too many, which is the first to make room.
#ifndef BKV_HOT_H
#define BKV_HOT_H

#include "kernels/summary.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#define BKV_HOT_COUNTERS 65536 // in a row

typedef struct bkv_hot {
    _Atomic uint32_t wanted; // reads after which a copy stays; 0: none does
    _Atomic uint64_t reads;
    uint64_t secret; // keys come from outside and may be chosen
    _Atomic uint8_t rows[2][BKV_HOT_COUNTERS];
} bkv_hot_t;

void bkv_hot_init(bkv_hot_t *hot, uint32_t wanted, uint64_t secret);
void bkv_hot_set_wanted(bkv_hot_t *hot, uint32_t wanted);

// Counts a read; whether the record has been read as often as is wanted. Thread-safe, no lock; a count may be lost in a race.
bool bkv_hot_read(bkv_hot_t *hot, const bkv_name_t *name);

#endif
