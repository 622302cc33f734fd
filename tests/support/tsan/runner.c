// runner.c - runs the tests that criterion.h beside it registered, each in a forked process, for `make tsan`.
#include "tests/support/tsan/criterion/criterion.h"

#include <sys/wait.h>
#include <unistd.h>

static tsan_test_t *tests;
static bool failed; // in the process of one test

void tsan_register(tsan_test_t *test) {
    test->next = tests;
    tests = test;
}

void tsan_fail(const char *file, int line, const char *what, bool fatal) {
    fprintf(stderr, "%s:%d: not so: %s\n", file, line, what);
    if (fatal) {
        _exit(1);
    }
    failed = true;
}

static int run(const tsan_test_t *test) {
    if (test->timeout > 0) {
        alarm((unsigned)test->timeout * 4 + 60); // TSan is slow
    }
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

int main(void) {
    int passed = 0, bad = 0;
    for (const tsan_test_t *test = tests; test; test = test->next) {
        if (test->disabled) {
            continue;
        }
        fflush(NULL);
        pid_t child = fork();
        if (child == 0) {
            exit(run(test));
        }
        int status = 0;
        if (child < 0 || waitpid(child, &status, 0) < 0 || !as_expected(test, status)) {
            printf("FAILED %s::%s (status %x)\n", test->suite, test->name, (unsigned)status);
            bad++;
        } else {
            passed++;
        }
    }
    printf("[====] Synthesis: Tested: %d | Passing: %d | Failing: %d | Crashing: 0\n", passed + bad, passed, bad);
    return bad != 0;
}
