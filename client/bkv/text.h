// text.h - numbers from and for people: sizes with K/M/G, durations, counts. Nothing here depends on the locale.
#ifndef BKV_CLI_TEXT_H
#define BKV_CLI_TEXT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// Room for any of the formatted texts below.
#define BKV_TEXT_MAX 32

// Decimal, or hexadecimal with 0x; the whole text and nothing but it, at most `max`. False: *value is untouched.
bool bkv_text_u64(const char *text, uint64_t max, uint64_t *value);

// A finite decimal fraction.
bool bkv_text_real(const char *text, float *value);

// "64M", "64MiB", "1.5G", "4096": powers of 1024.
bool bkv_text_size(const char *text, uint64_t *bytes);

// "250ms", "10s", "5m", "1h"; a bare number is milliseconds. Below 2^32 ms.
bool bkv_text_duration(const char *text, uint32_t *ms);

// "1.5 MiB"; returns out, which has room for BKV_TEXT_MAX characters.
const char *bkv_text_of_bytes(double bytes, char *out);

// "12.3 us", "4.56 ms", "1m 40s"; likewise.
const char *bkv_text_of_ns(double ns, char *out);

// "950", "12.3k", "4.56M"; likewise.
const char *bkv_text_of_count(double count, char *out);

#endif
