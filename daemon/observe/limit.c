// limit.c - a fixed window of one second; bursts of twice the limit across its edge do no harm in a log.
#include "daemon/observe/limit.h"

bool bkv_limit_take(bkv_limit_t *limit, uint64_t now_ms, uint64_t *held) {
    if (now_ms - limit->started_ms >= 1000) {
        limit->started_ms = now_ms;
        limit->taken = 0;
    }
    if (limit->taken >= limit->per_second) {
        limit->held++;
        return false;
    }
    limit->taken++;
    *held = limit->held;
    limit->held = 0;
    return true;
}
