// alarm.h - one thread that calls back when a time has come: what hedging and patience go by.
//
// An alarm is memory of its owner's. Between set and its ring, or a cancel that says so, it is the thread's. The pattern for an
// owner that may be freed: a reference is taken when an alarm is set, and given back by whoever learns that it is over, the ring
// itself or the cancel that returned true.
#ifndef BKV_ALARM_H
#define BKV_ALARM_H

#include "kernels/status.h"

#include <stdbool.h>
#include <stdint.h>

typedef struct bkv_alarms bkv_alarms_t;

typedef struct bkv_alarm {
    void (*ring)(void *user); // on the alarms' thread; must not block. It may set the alarm again
    void *user;

    // The thread's.
    uint64_t at_us;
    struct bkv_alarm *earlier, *later;
    bool set;
} bkv_alarm_t;

bkv_status_t bkv_alarms_create(bkv_alarms_t **alarms, bkv_error_t *err);

// None may be set any more. Waits for a ring that is running. NULL: nothing.
void bkv_alarms_destroy(bkv_alarms_t *alarms);

// Rings once, at at_us (bkv_now_us) or soon after it. The alarm, zeroed but for ring and user, must not be set.
void bkv_alarm_set(bkv_alarms_t *alarms, bkv_alarm_t *alarm, uint64_t at_us);

// True: it was set, and does not ring. False: it is not set; it has rung, or rings just now.
bool bkv_alarm_cancel(bkv_alarms_t *alarms, bkv_alarm_t *alarm);

#endif
