// config_check.h - whether values that parse also make sense; for config.c.
#ifndef BKV_CONFIG_CHECK_H
#define BKV_CONFIG_CHECK_H

#include "daemon/config.h"

// Ranges, words, and options that do not go together. INVALID_ARGUMENT names the option and where it was set.
bkv_status_t bkv_config_check(const bkv_config_t *config, bkv_error_t *err);

// INVALID_ARGUMENT: "file:line: [section] key: reason" or "--flag: reason", by where the option was set.
bkv_status_t bkv_config_refuse(const bkv_config_t *config, size_t id, bkv_error_t *err, const char *format, ...)
    BKV_PRINTF(4, 5);

// Other rooms name an option as "section.key: reason". Rewrites such an INVALID_ARGUMENT to say where the option was set.
void bkv_config_locate(const bkv_config_t *config, bkv_error_t *err);

#endif
