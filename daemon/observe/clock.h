// clock.h - the one place that reads the clock.
#ifndef BKV_CLOCK_H
#define BKV_CLOCK_H

#include <stdint.h>

uint64_t bkv_now_ms(void); // CLOCK_MONOTONIC
uint64_t bkv_now_us(void);

#endif
