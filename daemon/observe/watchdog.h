// watchdog.h - whether the compute threads still get anywhere. Fed by main's timer, which itself proves that the loop runs.
#ifndef BKV_WATCHDOG_H
#define BKV_WATCHDOG_H

#include <stdbool.h>
#include <stdint.h>

typedef struct bkv_watchdog {
    uint64_t stall_ms; // work without progress for longer than this is a stall
    uint64_t ended;    // jobs, as of the last progress
    uint64_t since_ms; // when that was
} bkv_watchdog_t;

// ended: jobs ever done; pending: jobs waiting or running. Returns false when there has been work, but no progress, for longer
// than stall_ms.
bool bkv_watchdog_check(bkv_watchdog_t *watchdog, uint64_t ended, uint64_t pending, uint64_t now_ms);

#endif
