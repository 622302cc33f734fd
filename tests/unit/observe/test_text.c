// test_text.c - UTF-8 by its definition, at every edge of it, and escaping that never cuts a character.
#include "daemon/observe/text.h"

#include <criterion/criterion.h>
#include <string.h>

Test(observe_text, utf8_edges) {
    const struct {
        const char *text;
        size_t length;
    } cases[] = {
        {"a", 1},
        {"\x7f", 1},
        {"\x80", 0},
        {"\xc2\x80", 2},
        {"\xc1\xbf", 0},
        {"\xc2", 0},
        {"\xe0\xa0\x80", 3},
        {"\xe0\x9f\xbf", 0},
        {"\xed\x9f\xbf", 3},
        {"\xed\xa0\x80", 0},
        {"\xee\x80\x80", 3},
        {"\xe1\x80", 0},
        {"\xf0\x90\x80\x80", 4},
        {"\xf0\x8f\xbf\xbf", 0},
        {"\xf4\x8f\xbf\xbf", 4},
        {"\xf4\x90\x80\x80", 0},
        {"\xf8\x88\x80\x80\x80", 0},
        {"\xff", 0},
        {"", 0},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        cr_assert_eq(bkv_utf8_sequence(cases[i].text), cases[i].length, "case %zu", i);
    }
    cr_assert(bkv_utf8_check(""));
    cr_assert(bkv_utf8_check("gr\xc3\xbc\xc3\x9f\x65"));
    cr_assert_not(bkv_utf8_check("gr\xc3"));
}

Test(observe_text, escapes) {
    char out[64];
    cr_assert_eq(bkv_text_line("a\nb\t\x7f", out, sizeof(out)), 13 + 1);
    cr_assert_str_eq(out, "a\\x0ab\\x09\\x7f");
    bkv_text_json("q\"\\\n\xc3\xa9\xc3", out, sizeof(out));
    cr_assert_str_eq(out, "q\\\"\\\\\\u000a\xc3\xa9\\ufffd");
}

Test(observe_text, cut_between_characters) {
    char out[8];
    for (size_t capacity = 1; capacity <= sizeof(out); capacity++) {
        memset(out, 'X', sizeof(out));
        size_t length = bkv_text_json("\xc3\xa9\xc3\xa9\n", out, capacity);
        cr_assert_lt(length, capacity);
        cr_assert_eq(strlen(out), length);
        cr_assert(bkv_utf8_check(out));
    }
}
