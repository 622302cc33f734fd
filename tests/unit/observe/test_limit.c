// test_limit.c - the limit on events a second, and the count of what was held back.
#include "daemon/observe/limit.h"

#include <criterion/criterion.h>

Test(observe_limit, lets_so_many_pass_and_counts_the_rest) {
    bkv_limit_t limit = {.per_second = 3};
    uint64_t held = 99, passed = 0;
    for (int i = 0; i < 10; i++) {
        passed += bkv_limit_take(&limit, 5000, &held);
    }
    cr_assert_eq(passed, 3);
    cr_assert_eq(held, 0);
    cr_assert_not(bkv_limit_take(&limit, 5999, &held));
    cr_assert(bkv_limit_take(&limit, 6000, &held));
    cr_assert_eq(held, 8);
    cr_assert(bkv_limit_take(&limit, 6001, &held));
    cr_assert_eq(held, 0);
}
