// criterion.h - the part of criterion's interface that the unit tests use, for `make tsan` alone.
//
// criterion runs each test in a process of its own making (boxfort), which ThreadSanitizer cannot start. Under TSan the same
// tests compile against this header instead and runner.c forks for each.
#ifndef BKV_TSAN_CRITERION_H
#define BKV_TSAN_CRITERION_H

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct tsan_test {
    const char *suite, *name;
    void (*run)(void);
    void (*init)(void), (*fini)(void);
    double timeout;
    int signal, exit_code; // what the test is expected to end with
    bool disabled;
    const char *description;
    struct tsan_test *next;
} tsan_test_t;

void tsan_register(tsan_test_t *test);
// message begins with a blank. Fatal: ends the test.
__attribute__((format(printf, 5, 6))) void tsan_fail(const char *file, int line, const char *what, bool fatal,
                                                     const char *message, ...);
__attribute__((format(printf, 1, 2), noreturn)) void tsan_skip(const char *why, ...);

#define Test(suite_, name_, ...)                                                                                               \
    static void suite_##_##name_##_run(void);                                                                                  \
    __attribute__((constructor)) static void suite_##_##name_##_register(void) {                                               \
        static tsan_test_t test = {.suite = #suite_, .name = #name_, .run = suite_##_##name_##_run, ##__VA_ARGS__};            \
        tsan_register(&test);                                                                                                  \
    }                                                                                                                          \
    static void suite_##_##name_##_run(void)

#define TSAN_CHECK(condition, what, fatal, ...)                                                                                \
    do {                                                                                                                       \
        if (!(condition)) {                                                                                                    \
            tsan_fail(__FILE__, __LINE__, what, fatal, " " __VA_ARGS__);                                                       \
        }                                                                                                                      \
    } while (0)

#define cr_assert(c, ...)               TSAN_CHECK(c, #c, true, ##__VA_ARGS__)
#define cr_assert_not(c, ...)           TSAN_CHECK(!(c), "!(" #c ")", true, ##__VA_ARGS__)
#define cr_assert_eq(a, b, ...)         TSAN_CHECK((a) == (b), #a " == " #b, true, ##__VA_ARGS__)
#define cr_assert_neq(a, b, ...)        TSAN_CHECK((a) != (b), #a " != " #b, true, ##__VA_ARGS__)
#define cr_assert_lt(a, b, ...)         TSAN_CHECK((a) < (b), #a " < " #b, true, ##__VA_ARGS__)
#define cr_assert_gt(a, b, ...)         TSAN_CHECK((a) > (b), #a " > " #b, true, ##__VA_ARGS__)
#define cr_assert_leq(a, b, ...)        TSAN_CHECK((a) <= (b), #a " <= " #b, true, ##__VA_ARGS__)
#define cr_assert_geq(a, b, ...)        TSAN_CHECK((a) >= (b), #a " >= " #b, true, ##__VA_ARGS__)
#define cr_assert_null(a, ...)          TSAN_CHECK((a) == NULL, #a " == NULL", true, ##__VA_ARGS__)
#define cr_assert_not_null(a, ...)      TSAN_CHECK((a) != NULL, #a " != NULL", true, ##__VA_ARGS__)
#define cr_assert_str_eq(a, b, ...)     TSAN_CHECK(strcmp(a, b) == 0, #a " is " #b, true, ##__VA_ARGS__)
#define cr_assert_str_neq(a, b, ...)    TSAN_CHECK(strcmp(a, b) != 0, #a " is not " #b, true, ##__VA_ARGS__)
#define cr_assert_arr_eq(a, b, n, ...)  TSAN_CHECK(memcmp(a, b, n) == 0, #a " equals " #b, true, ##__VA_ARGS__)
#define cr_assert_arr_neq(a, b, n, ...) TSAN_CHECK(memcmp(a, b, n) != 0, #a " differs from " #b, true, ##__VA_ARGS__)
#define cr_assert_float_eq(a, b, e, ...)                                                                                       \
    TSAN_CHECK(fabs((double)(a) - (double)(b)) <= (double)(e), #a " near " #b, true, ##__VA_ARGS__)
#define cr_expect(c, ...)              TSAN_CHECK(c, #c, false, ##__VA_ARGS__)
#define cr_expect_not(c, ...)          TSAN_CHECK(!(c), "!(" #c ")", false, ##__VA_ARGS__)
#define cr_expect_eq(a, b, ...)        TSAN_CHECK((a) == (b), #a " == " #b, false, ##__VA_ARGS__)
#define cr_expect_neq(a, b, ...)       TSAN_CHECK((a) != (b), #a " != " #b, false, ##__VA_ARGS__)
#define cr_expect_lt(a, b, ...)        TSAN_CHECK((a) < (b), #a " < " #b, false, ##__VA_ARGS__)
#define cr_expect_gt(a, b, ...)        TSAN_CHECK((a) > (b), #a " > " #b, false, ##__VA_ARGS__)
#define cr_expect_leq(a, b, ...)       TSAN_CHECK((a) <= (b), #a " <= " #b, false, ##__VA_ARGS__)
#define cr_expect_geq(a, b, ...)       TSAN_CHECK((a) >= (b), #a " >= " #b, false, ##__VA_ARGS__)
#define cr_expect_null(a, ...)         TSAN_CHECK((a) == NULL, #a " == NULL", false, ##__VA_ARGS__)
#define cr_expect_not_null(a, ...)     TSAN_CHECK((a) != NULL, #a " != NULL", false, ##__VA_ARGS__)
#define cr_expect_str_eq(a, b, ...)    TSAN_CHECK(strcmp(a, b) == 0, #a " is " #b, false, ##__VA_ARGS__)
#define cr_expect_arr_eq(a, b, n, ...) TSAN_CHECK(memcmp(a, b, n) == 0, #a " equals " #b, false, ##__VA_ARGS__)
#define cr_log_info(...)               fprintf(stderr, __VA_ARGS__)
#define cr_skip_test(...)              tsan_skip(__VA_ARGS__)

#endif
