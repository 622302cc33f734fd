// hot.c - see hot.h.
#include "daemon/cluster/hot.h"

#include <xxhash.h>

#define MOST UINT8_MAX

void bkv_hot_init(bkv_hot_t *hot, uint32_t wanted, uint64_t secret) {
    hot->secret = secret;
    atomic_init(&hot->wanted, wanted);
    atomic_init(&hot->reads, 0);
    for (uint32_t i = 0; i < BKV_HOT_COUNTERS; i++) {
        atomic_init(&hot->rows[0][i], 0);
        atomic_init(&hot->rows[1][i], 0);
    }
}

void bkv_hot_set_wanted(bkv_hot_t *hot, uint32_t wanted) {
    atomic_store(&hot->wanted, wanted);
}

// Reads that come at the same time are halved or not, as it happens.
static void halve(_Atomic uint8_t *row) {
    for (uint32_t i = 0; i < BKV_HOT_COUNTERS; i++) {
        uint8_t count = atomic_load_explicit(&row[i], memory_order_relaxed);
        if (count != 0) {
            atomic_store_explicit(&row[i], count / 2, memory_order_relaxed);
        }
    }
}

// A counter that is higher than it need be, because another record raised it, is left alone.
static void raise_to(_Atomic uint8_t *counter, uint8_t count) {
    if (atomic_load_explicit(counter, memory_order_relaxed) < count) {
        atomic_store_explicit(counter, count, memory_order_relaxed);
    }
}

bool bkv_hot_read(bkv_hot_t *hot, const bkv_name_t *name) {
    uint32_t wanted = atomic_load_explicit(&hot->wanted, memory_order_relaxed);
    if (wanted == 0) {
        return false;
    }
    uint64_t hash = XXH3_64bits_withSeed(name, sizeof(*name), hot->secret);
    _Atomic uint8_t *a = &hot->rows[0][hash % BKV_HOT_COUNTERS];
    _Atomic uint8_t *b = &hot->rows[1][(hash >> 32) % BKV_HOT_COUNTERS];
    uint8_t count = atomic_load_explicit(a, memory_order_relaxed);
    uint8_t other = atomic_load_explicit(b, memory_order_relaxed);
    count = count < other ? count : other;
    if (count < MOST) {
        count++;
        raise_to(a, count);
        raise_to(b, count);
    }
    if ((atomic_fetch_add_explicit(&hot->reads, 1, memory_order_relaxed) + 1) % BKV_HOT_COUNTERS == 0) {
        halve(hot->rows[0]);
        halve(hot->rows[1]);
    }
    return count >= (wanted < MOST ? wanted : MOST);
}
