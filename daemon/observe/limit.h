// limit.h - at most so many events a second, and how many were held back. Not thread-safe: its owner has a lock.
#ifndef BKV_LIMIT_H
#define BKV_LIMIT_H

#include <stdbool.h>
#include <stdint.h>

typedef struct bkv_limit {
    uint32_t per_second;
    uint32_t taken;      // in this second
    uint64_t held;       // since the last event that was let through
    uint64_t started_ms; // of this second
} bkv_limit_t;

// Whether an event may pass now. If it may, *held is how many were held back before it.
bool bkv_limit_take(bkv_limit_t *limit, uint64_t now_ms, uint64_t *held);

#endif
