// systemd.h - the talk with systemd: readiness, status, watchdog, and the arena in its file-descriptor store.
//
// Without systemd ($NOTIFY_SOCKET unset) all of it does nothing.
#ifndef BKV_SYSTEMD_H
#define BKV_SYSTEMD_H

#include "kernels/status.h"

#include <stdint.h>

// The arena that a predecessor left with systemd; -1: none. The caller closes it. Any other descriptor found there is closed.
// Call once, before anything opens descriptors of its own.
int bkv_systemd_take_arena(void);

// Leaves the arena with systemd for a successor.
void bkv_systemd_keep_arena(int fd);
void bkv_systemd_forget_arena(void);

void bkv_systemd_ready(void);
void bkv_systemd_reloading(void); // bkv_systemd_ready follows
void bkv_systemd_stopping(void);
void bkv_systemd_status(const char *format, ...) BKV_PRINTF(1, 2);

// How often bkv_systemd_alive is to be called, in milliseconds; 0: no watchdog.
uint64_t bkv_systemd_watchdog_ms(void);
void bkv_systemd_alive(void);

#endif
