// text.c - UTF-8 by its definition (RFC 3629), and the escapes of JSON (RFC 8259).
#include "daemon/observe/text.h"

#include <assert.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define ESCAPE_MAX 8 // the longest escape, with its NUL

size_t bkv_utf8_sequence(const char *text) {
    static const struct {
        uint8_t mask, lead;
        uint32_t lowest; // code point; below it the form is overlong
    } forms[] = {{0x80, 0x00, 0x1}, {0xe0, 0xc0, 0x80}, {0xf0, 0xe0, 0x800}, {0xf8, 0xf0, 0x10000}};
    const uint8_t *bytes = (const uint8_t *)text;
    for (size_t extra = 0; extra < 4; extra++) {
        if ((bytes[0] & forms[extra].mask) != forms[extra].lead) {
            continue;
        }
        uint32_t point = bytes[0] & (0xffu ^ forms[extra].mask);
        for (size_t i = 1; i <= extra; i++) {
            if ((bytes[i] & 0xc0) != 0x80) { // the terminating NUL too
                return 0;
            }
            point = point << 6 | (bytes[i] & 0x3fu);
        }
        bool surrogate = point >= 0xd800 && point <= 0xdfff;
        return point < forms[extra].lowest || point > 0x10ffff || surrogate ? 0 : extra + 1;
    }
    return 0;
}

bool bkv_utf8_check(const char *text) {
    while (*text != '\0') {
        size_t length = bkv_utf8_sequence(text);
        if (length == 0) {
            return false;
        }
        text += length;
    }
    return true;
}

// Writes how the character at `text` appears in a line, and how many bytes of text it was.
static size_t line_character(const char *text, char escape[ESCAPE_MAX]) {
    uint8_t byte = (uint8_t)text[0];
    if (byte < 0x20 || byte == 0x7f) {
        snprintf(escape, ESCAPE_MAX, "\\x%02x", byte);
    } else {
        escape[0] = text[0];
        escape[1] = '\0';
    }
    return 1;
}

static size_t json_character(const char *text, char escape[ESCAPE_MAX]) {
    uint8_t byte = (uint8_t)text[0];
    size_t length = bkv_utf8_sequence(text);
    if (length == 0) {
        memcpy(escape, "\\ufffd", sizeof("\\ufffd"));
        return 1;
    }
    if (byte == '"' || byte == '\\') {
        escape[0] = '\\';
        escape[1] = text[0];
        escape[2] = '\0';
    } else if (byte < 0x20) {
        snprintf(escape, ESCAPE_MAX, "\\u%04x", byte);
    } else {
        memcpy(escape, text, length);
        escape[length] = '\0';
    }
    return length;
}

static size_t copy_escaped(const char *text, char *out, size_t capacity, size_t (*character)(const char *, char *)) {
    assert(capacity > 0);
    size_t at = 0;
    char escape[ESCAPE_MAX];
    while (*text != '\0') {
        text += character(text, escape);
        size_t length = strlen(escape);
        if (at + length >= capacity) {
            break;
        }
        memcpy(out + at, escape, length);
        at += length;
    }
    out[at] = '\0';
    return at;
}

size_t bkv_text_line(const char *text, char *out, size_t capacity) {
    return copy_escaped(text, out, capacity, line_character);
}

size_t bkv_text_json(const char *text, char *out, size_t capacity) {
    return copy_escaped(text, out, capacity, json_character);
}
