// value.c - see value.h.
#include "daemon/value.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>

typedef struct unit {
    const char *suffix;
    uint64_t factor;
} unit_t;

// Largest first, as formatting tries them; the one without a suffix last.
static const unit_t size_units[] = {
    {"T", UINT64_C(1) << 40}, {"G", UINT64_C(1) << 30}, {"M", UINT64_C(1) << 20}, {"K", UINT64_C(1) << 10}, {"", 1}, {NULL, 0}};
static const unit_t time_units[] = {{"h", 3600000}, {"m", 60000}, {"s", 1000}, {"ms", 1}, {"", 1}, {NULL, 0}};

// Digits, and where they end. False when there are none or they are too many.
static bool parse_digits(const char *text, uint64_t *value, const char **end) {
    *value = 0;
    const char *at = text;
    for (; *at >= '0' && *at <= '9'; at++) {
        if (__builtin_mul_overflow(*value, 10, value) || __builtin_add_overflow(*value, (uint64_t)(*at - '0'), value)) {
            return false;
        }
    }
    *end = at;
    return at != text;
}

static bool parse_units(const char *text, const unit_t *units, uint64_t *value) {
    const char *suffix;
    if (!parse_digits(text, value, &suffix)) {
        return false;
    }
    for (; units->suffix != NULL; units++) {
        if (strcasecmp(suffix, units->suffix) == 0) {
            return !__builtin_mul_overflow(*value, units->factor, value);
        }
    }
    return false;
}

const char *bkv_value_parse_u32(const char *text, uint32_t *value) {
    uint64_t wide;
    const char *end;
    if (!parse_digits(text, &wide, &end) || *end != '\0' || wide > UINT32_MAX) {
        return "a whole number is expected";
    }
    *value = (uint32_t)wide;
    return NULL;
}

const char *bkv_value_parse_bool(const char *text, bool *value) {
    static const char *const words[] = {"no", "yes", "false", "true", "off", "on", "0", "1"};
    for (size_t i = 0; i < sizeof(words) / sizeof(words[0]); i++) {
        if (strcasecmp(text, words[i]) == 0) {
            *value = i % 2 == 1;
            return NULL;
        }
    }
    return "yes or no is expected";
}

const char *bkv_value_parse_size(const char *text, uint64_t *bytes) {
    return parse_units(text, size_units, bytes) ? NULL : "a size in bytes is expected, such as 4096, 64K, 256M or 1G";
}

const char *bkv_value_parse_ms(const char *text, uint64_t *ms) {
    return parse_units(text, time_units, ms) ? NULL : "a time is expected, such as 250ms, 30s, 5m or 1h";
}

static void format_units(uint64_t value, const unit_t *units, char *out) {
    while (units->factor > 1 && (value == 0 || value % units->factor != 0)) {
        units++;
    }
    snprintf(out, BKV_VALUE_TEXT, "%" PRIu64 "%s", value / units->factor, value == 0 ? "" : units->suffix);
}

void bkv_value_format_size(uint64_t bytes, char out[BKV_VALUE_TEXT]) {
    format_units(bytes, size_units, out);
}

void bkv_value_format_ms(uint64_t ms, char out[BKV_VALUE_TEXT]) {
    format_units(ms, time_units, out);
}
