// value.h - the texts of options and what they mean: sizes, times, numbers, yes and no.
//
// Each parse function takes the whole text, strictly, and returns NULL or, in words, what it expected. Formatting gives the
// shortest text that parses to the same value.
#ifndef BKV_VALUE_H
#define BKV_VALUE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define BKV_VALUE_TEXT 32 // room for any formatted value, NUL included

const char *bkv_value_parse_u32(const char *text, uint32_t *value);
const char *bkv_value_parse_bool(const char *text, bool *value);     // yes, no, true, false, on, off, 1, 0
const char *bkv_value_parse_size(const char *text, uint64_t *bytes); // 4096, 64K, 256M, 1G, 2T
const char *bkv_value_parse_ms(const char *text, uint64_t *ms);      // 250, 250ms, 30s, 5m, 1h

void bkv_value_format_size(uint64_t bytes, char out[BKV_VALUE_TEXT]);
void bkv_value_format_ms(uint64_t ms, char out[BKV_VALUE_TEXT]);

#endif
