// text.c - see text.h.
#include "text.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

bool bkv_text_u64(const char *text, uint64_t max, uint64_t *value) {
    bool hex = text[0] == '0' && (text[1] == 'x' || text[1] == 'X');
    const char *digits = hex ? text + 2 : text;
    size_t length = strlen(digits);
    // strtoull would also take blanks and a sign.
    if (length == 0 || strspn(digits, hex ? "0123456789abcdefABCDEF" : "0123456789") != length) {
        return false;
    }
    errno = 0;
    unsigned long long parsed = strtoull(digits, NULL, hex ? 16 : 10);
    if (errno != 0 || parsed > max) {
        return false;
    }
    *value = parsed;
    return true;
}

bool bkv_text_real(const char *text, float *value) {
    if (text[0] == '\0' || strspn(text, "0123456789.eE+-") != strlen(text)) {
        return false;
    }
    char *end;
    errno = 0;
    float parsed = strtof(text, &end);
    if (*end != '\0' || errno != 0 || !isfinite(parsed)) {
        return false;
    }
    *value = parsed;
    return true;
}

// A number that may have a fraction, followed by a unit: *unit points behind the number.
static bool scan(const char *text, double *number, const char **unit) {
    size_t length = strspn(text, "0123456789.");
    if (length == 0 || length >= BKV_TEXT_MAX) {
        return false;
    }
    char digits[BKV_TEXT_MAX];
    memcpy(digits, text, length);
    digits[length] = '\0';
    char *end;
    *number = strtod(digits, &end);
    *unit = text + length;
    return *end == '\0';
}

bool bkv_text_size(const char *text, uint64_t *bytes) {
    if (bkv_text_u64(text, UINT64_MAX, bytes)) {
        return true;
    }
    static const char *const units[] = {"B", "K", "KB", "KiB", "M", "MB", "MiB", "G", "GB", "GiB", "T", "TB", "TiB"};
    double number;
    const char *unit;
    if (!scan(text, &number, &unit)) {
        return false;
    }
    for (size_t i = 0; i < sizeof units / sizeof *units; i++) {
        if (strcmp(unit, units[i]) == 0) {
            double scaled = number * ldexp(1.0, (int)(10 * ((i + 2) / 3)));
            if (scaled >= ldexp(1.0, 63)) {
                return false;
            }
            *bytes = (uint64_t)scaled;
            return true;
        }
    }
    return false;
}

bool bkv_text_duration(const char *text, uint32_t *ms) {
    static const struct {
        const char *name;
        double ms;
    } units[] = {{"", 1}, {"ms", 1}, {"s", 1000}, {"m", 60000}, {"h", 3600000}};
    double number;
    const char *unit;
    if (!scan(text, &number, &unit)) {
        return false;
    }
    for (size_t i = 0; i < sizeof units / sizeof *units; i++) {
        if (strcmp(unit, units[i].name) == 0) {
            double scaled = number * units[i].ms;
            if (scaled > UINT32_MAX) {
                return false;
            }
            *ms = (uint32_t)scaled;
            return true;
        }
    }
    return false;
}

// Three significant digits, which is what a person reads.
static const char *three_digits(double value, const char *unit, char *out) {
    int decimals = value >= 99.95 ? 0 : value >= 9.995 ? 1 : 2;
    snprintf(out, BKV_TEXT_MAX, "%.*f%s", decimals, value, unit);
    return out;
}

const char *bkv_text_of_bytes(double bytes, char *out) {
    static const char *const units[] = {" KiB", " MiB", " GiB", " TiB", " PiB"};
    if (fabs(bytes) < 1024) {
        snprintf(out, BKV_TEXT_MAX, "%.0f B", bytes);
        return out;
    }
    double scaled = bytes / 1024;
    size_t unit = 0;
    while (fabs(scaled) >= 1024 && unit + 1 < sizeof units / sizeof *units) {
        scaled /= 1024;
        unit++;
    }
    return three_digits(scaled, units[unit], out);
}

const char *bkv_text_of_ns(double ns, char *out) {
    if (ns < 1e3) {
        snprintf(out, BKV_TEXT_MAX, "%.0f ns", ns);
        return out;
    }
    if (ns < 1e6) {
        return three_digits(ns / 1e3, " us", out);
    }
    if (ns < 1e9) {
        return three_digits(ns / 1e6, " ms", out);
    }
    if (ns < 60e9) {
        return three_digits(ns / 1e9, " s", out);
    }
    double seconds = floor(ns / 1e9);
    if (seconds < 3600) {
        snprintf(out, BKV_TEXT_MAX, "%.0fm %02.0fs", floor(seconds / 60), fmod(seconds, 60));
        return out;
    }
    snprintf(out, BKV_TEXT_MAX, "%.0fh %02.0fm", floor(seconds / 3600), floor(fmod(seconds, 3600) / 60));
    return out;
}

const char *bkv_text_of_count(double count, char *out) {
    if (fabs(count) < 10000) {
        snprintf(out, BKV_TEXT_MAX, count == floor(count) ? "%.0f" : "%.2f", count);
        return out;
    }
    if (fabs(count) < 1e6) {
        return three_digits(count / 1e3, "k", out);
    }
    return fabs(count) < 1e9 ? three_digits(count / 1e6, "M", out) : three_digits(count / 1e9, "G", out);
}
