// test_status.c - kernels/status.c: every status has its own name and words; messages are cut, never overrun.
#include "status.h"

#include <criterion/criterion.h>
#include <string.h>

Test(status, names_follow_the_list) {
    cr_assert_str_eq(bkv_status_name(BKV_OK), "OK");
    cr_assert_str_eq(bkv_status_name(BKV_INVALID_ARGUMENT), "INVALID_ARGUMENT");
    cr_assert_str_eq(bkv_status_name(BKV_UNAUTHENTICATED), "UNAUTHENTICATED");
    cr_assert_str_eq(bkv_status_name((bkv_status_t)2), "UNKNOWN");
    cr_assert_str_eq(bkv_status_name((bkv_status_t)-1), "UNKNOWN");
}

Test(status, every_text_is_its_own) {
    for (int a = 0; a < 17; a++) {
        cr_assert(strlen(bkv_status_text((bkv_status_t)a)) > 0);
        for (int b = a + 1; b < 17; b++) {
            bool both_unknown = strcmp(bkv_status_name((bkv_status_t)a), "UNKNOWN") == 0 &&
                                strcmp(bkv_status_name((bkv_status_t)b), "UNKNOWN") == 0;
            cr_assert(both_unknown || strcmp(bkv_status_text((bkv_status_t)a), bkv_status_text((bkv_status_t)b)) != 0);
        }
    }
}

Test(status, codes_are_those_of_grpc) {
    cr_assert_eq(BKV_NOT_FOUND, 5);
    cr_assert_eq(BKV_RESOURCE_EXHAUSTED, 8);
    cr_assert_eq(BKV_BUSY, 14);
    cr_assert_eq(BKV_DATA_LOSS, 15);
}

Test(status, fail_fills_the_error_and_returns_the_status) {
    bkv_error_t err = {0};
    cr_assert_eq(bkv_fail(&err, BKV_NOT_FOUND, "key: %d of %s", 3, "x"), BKV_NOT_FOUND);
    cr_assert_eq(err.status, BKV_NOT_FOUND);
    cr_assert_str_eq(err.message, "key: 3 of x");
    cr_assert_eq(bkv_fail(NULL, BKV_BUSY, "nobody reads this %d", 1), BKV_BUSY);
}

Test(status, long_messages_are_cut) {
    struct {
        bkv_error_t err;
        char guard[8];
    } box;
    memset(&box, 'g', sizeof(box));
    char text[2 * BKV_MESSAGE_MAX];
    memset(text, 'x', sizeof(text));
    text[sizeof(text) - 1] = 0;
    bkv_fail(&box.err, BKV_INTERNAL, "%s", text);
    cr_assert_eq(strlen(box.err.message), BKV_MESSAGE_MAX - 1);
    cr_assert_arr_eq(box.guard, "gggggggg", 8);
}
