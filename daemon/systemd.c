// systemd.c - sd_notify(3), sd_listen_fds(3) and sd_watchdog_enabled(3).
#include "daemon/systemd.h"

#include "daemon/observe/clock.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <systemd/sd-daemon.h>
#include <unistd.h>

#define ARENA_NAME "arena"

int bkv_systemd_take_arena(void) {
    char **names = NULL;
    int arena = -1;
    int count = sd_listen_fds_with_names(1, &names);
    for (int i = 0; i < count; i++) {
        int fd = SD_LISTEN_FDS_START + i;
        if (arena == -1 && strcmp(names[i], ARENA_NAME) == 0) {
            arena = fd;
        } else {
            close(fd);
        }
    }
    for (int i = 0; i < count; i++) {
        free(names[i]);
    }
    free(names);
    return arena;
}

void bkv_systemd_keep_arena(int fd) {
    sd_pid_notify_with_fds(0, 0, "FDSTORE=1\nFDNAME=" ARENA_NAME, &fd, 1);
}

void bkv_systemd_forget_arena(void) {
    sd_notify(0, "FDSTOREREMOVE=1\nFDNAME=" ARENA_NAME);
}

void bkv_systemd_ready(void) {
    sd_notifyf(0, "READY=1\nMAINPID=%ld", (long)getpid());
}

void bkv_systemd_reloading(void) {
    sd_notifyf(0, "RELOADING=1\nMONOTONIC_USEC=%" PRIu64, bkv_now_us());
}

void bkv_systemd_stopping(void) {
    sd_notify(0, "STOPPING=1");
}

void bkv_systemd_status(const char *format, ...) {
    char status[256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(status, sizeof(status), format, arguments);
    va_end(arguments);
    sd_notifyf(0, "STATUS=%s", status);
}

uint64_t bkv_systemd_watchdog_ms(void) {
    uint64_t timeout_us;
    if (sd_watchdog_enabled(0, &timeout_us) <= 0) {
        return 0;
    }
    uint64_t half_ms = timeout_us / 2000; // twice per timeout, as sd_watchdog_enabled(3) advises
    return half_ms > 0 ? half_ms : 1;
}

void bkv_systemd_alive(void) {
    sd_notify(0, "WATCHDOG=1");
}
