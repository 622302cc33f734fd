// watchdog.c - see watchdog.h.
#include "daemon/observe/watchdog.h"

bool bkv_watchdog_check(bkv_watchdog_t *watchdog, uint64_t ended, uint64_t pending, uint64_t now_ms) {
    if (pending == 0 || ended != watchdog->ended || watchdog->since_ms == 0) {
        watchdog->ended = ended;
        watchdog->since_ms = now_ms;
        return true;
    }
    return now_ms - watchdog->since_ms <= watchdog->stall_ms;
}
