// bandwidth.c - see bandwidth.h.
#include "daemon/cluster/move/bandwidth.h"

#define NS_PER_S 1000000000u

__extension__ typedef unsigned __int128 wide_t;

static int64_t clamp(uint64_t bytes) {
    return bytes < INT64_MAX / 4 ? (int64_t)bytes : INT64_MAX / 4;
}

static uint64_t burst_of(uint64_t rate, uint64_t burst) {
    return burst != 0 ? burst : rate / 10 + 1;
}

// Brings the level up to date. Time that is too short for a byte stays to be counted.
static void fill(bkv_bandwidth_t *bandwidth, uint64_t now_ns) {
    if (now_ns <= bandwidth->filled) {
        return; // two threads' clocks, read in one order and used in the other
    }
    wide_t bytes = (wide_t)(now_ns - bandwidth->filled) * bandwidth->rate / NS_PER_S;
    int64_t full = clamp(bandwidth->burst);
    if (bytes >= (wide_t)(full - bandwidth->level)) {
        bandwidth->level = full;
        bandwidth->filled = now_ns;
    } else if (bytes > 0) {
        bandwidth->level += (int64_t)bytes;
        bandwidth->filled += (uint64_t)(bytes * NS_PER_S / bandwidth->rate);
    }
}

void bkv_bandwidth_init(bkv_bandwidth_t *bandwidth, uint64_t rate, uint64_t burst, uint64_t now_ns) {
    *bandwidth = (bkv_bandwidth_t){.rate = rate, .burst = burst_of(rate, burst), .filled = now_ns};
    bandwidth->level = clamp(bandwidth->burst);
}

void bkv_bandwidth_set_rate(bkv_bandwidth_t *bandwidth, uint64_t rate, uint64_t now_ns) {
    fill(bandwidth, now_ns);
    bandwidth->rate = rate;
    bandwidth->burst = burst_of(rate, 0);
    bandwidth->filled = now_ns;
    if (bandwidth->level > clamp(bandwidth->burst)) {
        bandwidth->level = clamp(bandwidth->burst);
    }
}

uint64_t bkv_bandwidth_wait_ns(bkv_bandwidth_t *bandwidth, uint64_t now_ns) {
    if (bandwidth->rate == 0) {
        return 0;
    }
    fill(bandwidth, now_ns);
    if (bandwidth->level > 0) {
        return 0;
    }
    wide_t owed = (wide_t)(1 - bandwidth->level) * NS_PER_S;
    uint64_t due_ns = bandwidth->filled + (uint64_t)((owed + bandwidth->rate - 1) / bandwidth->rate);
    return due_ns > now_ns ? due_ns - now_ns : 1;
}

void bkv_bandwidth_take(bkv_bandwidth_t *bandwidth, uint64_t bytes, uint64_t now_ns) {
    if (bandwidth->rate == 0) {
        return;
    }
    fill(bandwidth, now_ns);
    int64_t taken = clamp(bytes), lowest = -clamp(UINT64_MAX);
    bandwidth->level = bandwidth->level - taken > lowest ? bandwidth->level - taken : lowest;
}
