// test_answer.c - codes and words of the other end.
#include "proto/answer.h"

#include <criterion/criterion.h>
#include <string.h>

Test(answer, every_status_of_ours_has_its_code_and_others_are_internal) {
#define X(name, code, text) cr_assert_eq(bkv_answer_status(code), BKV_##name);
    BKV_STATUS_LIST(X)
#undef X
    const uint32_t others[] = {2, 10, 11, 17, 1u << 31, UINT32_MAX};
    for (size_t i = 0; i < sizeof(others) / sizeof(others[0]); i++) {
        cr_assert_eq(bkv_answer_status(others[i]), BKV_INTERNAL, "%u", others[i]);
    }
}

Test(answer, text_is_cut_and_cleaned) {
    char out[8];
    const char text[] = {'k', 'e', 'y', '\x1b', '[', '\0', '\n', '\x7f', (char)0x9b, '!'};
    bkv_answer_text(text, sizeof(text), out, sizeof(out));
    cr_assert_str_eq(out, "key [  ");
    char whole[16];
    bkv_answer_text(text, sizeof(text), whole, sizeof(whole));
    cr_assert_str_eq(whole, "key [    !");
    bkv_answer_text("", 0, out, sizeof(out));
    cr_assert_str_eq(out, "");
    bkv_answer_text("abc", 3, out, 1);
    cr_assert_str_eq(out, "");
}
