// log.h - one line per event, to journald, as text on stderr, or as JSON on stderr.
//
// A line has a level, a request id (0: none), a message, and key=value fields that become journald fields or JSON members.
// Thread-safe. Below the level nothing is formatted. The log is the one process-wide object of the daemon: it is set up
// once in main before any thread starts, and only its level changes afterwards.
#ifndef BKV_LOG_H
#define BKV_LOG_H

#include "kernels/status.h"

#include <stdbool.h>
#include <stdint.h>

typedef enum bkv_log_level { BKV_LOG_ERROR, BKV_LOG_WARN, BKV_LOG_INFO, BKV_LOG_DEBUG } bkv_log_level_t;
typedef enum bkv_log_target { BKV_LOG_TEXT, BKV_LOG_JSON, BKV_LOG_JOURNALD } bkv_log_target_t;

// target "auto": journald when $JOURNAL_STREAM names stderr, else text. INVALID_ARGUMENT for other words.
bkv_status_t bkv_log_setup(const char *target, const char *level, bkv_error_t *err);
bkv_status_t bkv_log_set_level(const char *level, bkv_error_t *err);
bool bkv_log_enabled(bkv_log_level_t level);

// The line's level, the request it belongs to, printf-style message.
void bkv_log(bkv_log_level_t level, uint64_t request, const char *format, ...) BKV_PRINTF(3, 4);

// The line that ends a failed request: operation, status and message. Client mistakes (INVALID_ARGUMENT, NOT_FOUND, ...) are
// info, DATA_LOSS and INTERNAL are errors, the rest warnings. At most 100 such lines a second are written; a following line
// says how many were held back.
void bkv_log_failure(uint64_t request, const char *operation, const bkv_error_t *error);

#endif
