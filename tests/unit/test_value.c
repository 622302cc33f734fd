// test_value.c - what option texts mean, what they do not, and that formatting and parsing agree.
#include "daemon/value.h"

#include <criterion/criterion.h>
#include <string.h>

Test(value, sizes) {
    const struct {
        const char *text;
        uint64_t bytes;
    } good[] = {
        {"0", 0},        {"4096", 4096},     {"64K", 65536},     {"64k", 65536},
        {"3M", 3 << 20}, {"1G", 1ull << 30}, {"2T", 2ull << 40}, {"18446744073709551615", UINT64_MAX},
        {"007", 7},
    };
    for (size_t i = 0; i < sizeof(good) / sizeof(good[0]); i++) {
        uint64_t bytes = 1;
        cr_assert_null(bkv_value_parse_size(good[i].text, &bytes), "%s", good[i].text);
        cr_assert_eq(bytes, good[i].bytes, "%s", good[i].text);
    }
    const char *bad[] = {"",     "K",         "1KB",
                         "1 K",  " 1",        "1 ",
                         "-1",   "+1",        "1.5G",
                         "0x10", "1e3",       "18446744073709551616",
                         "1P",   "16777216T", "99999999999999999999999K"};
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        uint64_t bytes;
        cr_assert_not_null(bkv_value_parse_size(bad[i], &bytes), "\"%s\" was taken", bad[i]);
    }
}

Test(value, times) {
    const struct {
        const char *text;
        uint64_t ms;
    } good[] = {{"0", 0}, {"250", 250}, {"250ms", 250}, {"30s", 30000}, {"5m", 300000}, {"1h", 3600000}, {"1H", 3600000}};
    for (size_t i = 0; i < sizeof(good) / sizeof(good[0]); i++) {
        uint64_t ms = 1;
        cr_assert_null(bkv_value_parse_ms(good[i].text, &ms), "%s", good[i].text);
        cr_assert_eq(ms, good[i].ms, "%s", good[i].text);
    }
    const char *bad[] = {"", "s", "1d", "-1s", "1 s", "1s ", "1.5s", "99999999999999999999h"};
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        uint64_t ms;
        cr_assert_not_null(bkv_value_parse_ms(bad[i], &ms), "\"%s\" was taken", bad[i]);
    }
}

Test(value, numbers_and_words) {
    uint32_t number;
    bool yes;
    cr_assert_null(bkv_value_parse_u32("4294967295", &number));
    cr_assert_eq(number, UINT32_MAX);
    cr_assert_not_null(bkv_value_parse_u32("4294967296", &number));
    cr_assert_not_null(bkv_value_parse_u32("1K", &number));
    cr_assert_null(bkv_value_parse_bool("On", &yes));
    cr_assert(yes);
    cr_assert_null(bkv_value_parse_bool("0", &yes));
    cr_assert_not(yes);
    cr_assert_not_null(bkv_value_parse_bool("maybe", &yes));
    cr_assert_not_null(bkv_value_parse_bool("", &yes));
}

Test(value, formatting_parses_back) {
    uint64_t value = 1;
    for (int i = 0; i < 3000; i++) {
        value = value * UINT64_C(6364136223846793005) + 1442695040888963407;
        uint64_t number = value >> (value % 60), back;
        number = i % 3 == 0 ? number & ~UINT64_C(0xfffff) : i % 3 == 1 ? number / 60000 * 60000 : number;
        char text[BKV_VALUE_TEXT];
        bkv_value_format_size(number, text);
        cr_assert_null(bkv_value_parse_size(text, &back), "%s", text);
        cr_assert_eq(back, number, "%s", text);
        bkv_value_format_ms(number, text);
        cr_assert_null(bkv_value_parse_ms(text, &back), "%s", text);
        cr_assert_eq(back, number, "%s", text);
    }
    char text[BKV_VALUE_TEXT];
    bkv_value_format_size(256 << 20, text);
    cr_assert_str_eq(text, "256M");
    bkv_value_format_ms(90000, text);
    cr_assert_str_eq(text, "90s");
    bkv_value_format_ms(0, text);
    cr_assert_str_eq(text, "0");
}
