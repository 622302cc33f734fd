// test_text.c - client/bkv/text.c: what people type, and what they read.
#include "client/bkv/text.h"

#include <criterion/criterion.h>
#include <stdint.h>

Test(bkv_text, whole_numbers) {
    uint64_t n = 7;
    cr_expect(bkv_text_u64("0", 10, &n) && n == 0);
    cr_expect(bkv_text_u64("18446744073709551615", UINT64_MAX, &n) && n == UINT64_MAX);
    cr_expect(bkv_text_u64("0xff", 255, &n) && n == 255);
    n = 7;
    const char *bad[] = {"", " 1", "-1", "+1", "1 ", "1x", "0x", "18446744073709551616", "11", "1.0"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        cr_expect_not(bkv_text_u64(bad[i], i == 8 ? 10 : UINT64_MAX, &n), "\"%s\" was taken", bad[i]);
    }
    cr_expect_eq(n, 7, "a refused text changes nothing");
}

Test(bkv_text, sizes) {
    const struct {
        const char *text;
        uint64_t bytes;
    } good[] = {{"0", 0},
                {"4096", 4096},
                {"512B", 512},
                {"64K", 65536},
                {"2M", 2u << 20},
                {"2MB", 2u << 20},
                {"1.5MiB", 3u << 19},
                {"3G", UINT64_C(3) << 30},
                {"1T", UINT64_C(1) << 40},
                {"0.5KiB", 512}};
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        uint64_t bytes = 1;
        cr_expect(bkv_text_size(good[i].text, &bytes), "\"%s\"", good[i].text);
        cr_expect_eq(bytes, good[i].bytes, "\"%s\" is %llu", good[i].text, (unsigned long long)bytes);
    }
    const char *bad[] = {"", "K", "1k", "1X", "-1M", "1..5M", "99999999T", "1 M"};
    uint64_t bytes;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        cr_expect_not(bkv_text_size(bad[i], &bytes), "\"%s\" was taken", bad[i]);
    }
}

Test(bkv_text, durations) {
    uint32_t ms;
    cr_expect(bkv_text_duration("250", &ms) && ms == 250);
    cr_expect(bkv_text_duration("250ms", &ms) && ms == 250);
    cr_expect(bkv_text_duration("1.5s", &ms) && ms == 1500);
    cr_expect(bkv_text_duration("2m", &ms) && ms == 120000);
    cr_expect(bkv_text_duration("1h", &ms) && ms == 3600000);
    cr_expect_not(bkv_text_duration("2000h", &ms));
    cr_expect_not(bkv_text_duration("1d", &ms));
    cr_expect_not(bkv_text_duration("", &ms));
}

Test(bkv_text, fractions) {
    float x;
    cr_expect(bkv_text_real("0.125", &x) && x == 0.125f);
    cr_expect_not(bkv_text_real("nan", &x));
    cr_expect_not(bkv_text_real("1e99", &x));
    cr_expect_not(bkv_text_real("1,5", &x));
    cr_expect_not(bkv_text_real("", &x));
}

Test(bkv_text, for_people) {
    char out[BKV_TEXT_MAX];
    cr_expect_str_eq(bkv_text_of_bytes(0, out), "0 B");
    cr_expect_str_eq(bkv_text_of_bytes(1023, out), "1023 B");
    cr_expect_str_eq(bkv_text_of_bytes(1536, out), "1.50 KiB");
    cr_expect_str_eq(bkv_text_of_bytes(12.34 * 1048576, out), "12.3 MiB");
    cr_expect_str_eq(bkv_text_of_bytes(5e15, out), "4.44 PiB");
    cr_expect_str_eq(bkv_text_of_ns(999, out), "999 ns");
    cr_expect_str_eq(bkv_text_of_ns(1500, out), "1.50 us");
    cr_expect_str_eq(bkv_text_of_ns(123.4e6, out), "123 ms");
    cr_expect_str_eq(bkv_text_of_ns(100e9, out), "1m 40s");
    cr_expect_str_eq(bkv_text_of_ns(7260e9, out), "2h 01m");
    cr_expect_str_eq(bkv_text_of_count(950, out), "950");
    cr_expect_str_eq(bkv_text_of_count(12345, out), "12.3k");
    cr_expect_str_eq(bkv_text_of_count(4.56e6, out), "4.56M");
}
