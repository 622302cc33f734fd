// text.h - text of unknown origin: is it UTF-8, and how does it go into a line of a log or a JSON string.
#ifndef BKV_TEXT_H
#define BKV_TEXT_H

#include <stdbool.h>
#include <stddef.h>

// How many bytes the UTF-8 sequence at NUL-terminated `text` takes, 1..4; 0 when it is none (overlong forms, surrogates and
// what is cut short by the end are none).
size_t bkv_utf8_sequence(const char *text);

bool bkv_utf8_check(const char *text);

// Copies `text` as one printable line: control characters become \xNN, so that nobody can forge a line. Cut to fit
// `capacity` (> 0), NUL included. Returns the length without the NUL.
size_t bkv_text_line(const char *text, char *out, size_t capacity);

// Copies `text` as the inside of a JSON string; what is not UTF-8 becomes \ufffd. Cut between characters to fit.
size_t bkv_text_json(const char *text, char *out, size_t capacity);

#endif
