// runner.c - runs the tests that criterion.h beside it registered, each in a forked process, for `make tsan`. Of criterion's
// options it knows --filter 'suite/name', with wildcards.
#include "tests/support/tsan/criterion/criterion.h"

#include <fnmatch.h>
#include <stdarg.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define SKIPPED   77  // what the process of a test that skips itself ends with
#define SLOW_S    20  // worth to be told
#define TIMEOUT_S 300 // of a test that names none, as tests/run.sh gives it to criterion

static tsan_test_t *tests;
static const tsan_test_t *present; // in the process of one test
static bool failed;                // likewise

void tsan_register(tsan_test_t *test) {
    test->next = tests;
    tests = test;
}

void tsan_fail(const char *file, int line, const char *what, bool fatal, const char *message, ...) {
    va_list values;
    va_start(values, message);
    fprintf(stderr, "%s:%d: not so: %s:", file, line, what);
    vfprintf(stderr, message, values);
    fputc('\n', stderr);
    va_end(values);
    if (fatal) {
        _exit(1);
    }
    failed = true;
}

void tsan_skip(const char *why, ...) {
    va_list values;
    va_start(values, why);
    printf("[SKIP] %s::%s: ", present->suite, present->name);
    vprintf(why, values);
    putchar('\n');
    va_end(values);
    fflush(stdout);
    _exit(SKIPPED);
}

static int run(const tsan_test_t *test) {
    present = test;
    alarm((unsigned)(test->timeout > 0 ? test->timeout : TIMEOUT_S) * 4 + 60); // TSan is slow
    if (test->init) {
        test->init();
    }
    test->run();
    if (test->fini) {
        test->fini();
    }
    return failed ? 1 : test->exit_code;
}

static bool as_expected(const tsan_test_t *test, int status) {
    if (test->signal != 0) {
        return WIFSIGNALED(status) && WTERMSIG(status) == test->signal;
    }
    return WIFEXITED(status) && WEXITSTATUS(status) == test->exit_code;
}

static bool chosen(const tsan_test_t *test, const char *filter) {
    char name[256];
    snprintf(name, sizeof name, "%s/%s", test->suite, test->name);
    return !test->disabled && (!filter || fnmatch(filter, name, 0) == 0);
}

int main(int argc, char **argv) {
    const char *filter = NULL;
    for (int i = 1; i + 1 < argc; i++) {
        filter = strcmp(argv[i], "--filter") == 0 ? argv[i + 1] : filter;
    }
    setvbuf(stdout, NULL, _IOLBF, 0); // in order with what sanitizer and tests say
    int passed = 0, bad = 0, skipped = 0;
    for (const tsan_test_t *test = tests; test; test = test->next) {
        if (!chosen(test, filter)) {
            continue;
        }
        fflush(NULL);
        pid_t child = fork();
        if (child == 0) {
            exit(run(test));
        }
        int status = 0;
        time_t start = time(NULL);
        bool ended = child >= 0 && waitpid(child, &status, 0) == child;
        if (ended && WIFEXITED(status) && WEXITSTATUS(status) == SKIPPED) {
            skipped++;
        } else if (ended && as_expected(test, status)) {
            passed++;
        } else {
            printf("FAILED %s::%s (status %x)\n", test->suite, test->name, (unsigned)status);
            bad++;
        }
        if (time(NULL) - start >= SLOW_S) {
            printf("[SLOW] %s::%s: %lld s\n", test->suite, test->name, (long long)(time(NULL) - start));
        }
    }
    printf("[====] Synthesis: Tested: %d | Passing: %d | Failing: %d | Crashing: 0\n", passed + bad + skipped, passed, bad);
    return bad != 0;
}
