// bandwidth.h - a token bucket: so many bytes a second on average, at most `burst` at once. The clock is the caller's. Not
// thread-safe: its owner has a lock.
#ifndef BKV_BANDWIDTH_H
#define BKV_BANDWIDTH_H

#include <stdint.h>

typedef struct bkv_bandwidth {
    uint64_t rate;   // bytes a second; 0: no limit
    uint64_t burst;  // bytes
    int64_t level;   // bytes that may go now; below 0: what was taken ahead
    uint64_t filled; // ns, up to which time the level counts
} bkv_bandwidth_t;

// Starts full. burst 0: what goes in a tenth of a second.
void bkv_bandwidth_init(bkv_bandwidth_t *bandwidth, uint64_t rate, uint64_t burst, uint64_t now_ns);

// A new rate (a reload, or an operator in a hurry), from now on; what was taken ahead stays owed.
void bkv_bandwidth_set_rate(bkv_bandwidth_t *bandwidth, uint64_t rate, uint64_t now_ns);

// How long until something may go, whatever its size: 0, now. A thing larger than the burst goes too, and the rest waits for
// it.
uint64_t bkv_bandwidth_wait_ns(bkv_bandwidth_t *bandwidth, uint64_t now_ns);

// Takes `bytes` off. May be called at any time, also for more than there is.
void bkv_bandwidth_take(bkv_bandwidth_t *bandwidth, uint64_t bytes, uint64_t now_ns);

#endif
