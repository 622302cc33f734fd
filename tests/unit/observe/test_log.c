// test_log.c - lines as they arrive on stderr: levels, fields, escaping, the limit on failures.
#include "daemon/observe/log.h"

#include <criterion/criterion.h>
#include <fcntl.h>
#include <jansson.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

// Sends stderr to a file from here on; read_back gives what was written since. The test is a process of its own.
static FILE *captured;

static void capture(const char *target, const char *level) {
    bkv_error_t err;
    cr_assert_eq(bkv_log_setup(target, level, &err), BKV_OK, "%s", err.message);
    captured = tmpfile();
    fcntl(fileno(captured), F_SETFL, O_APPEND);
    dup2(fileno(captured), STDERR_FILENO);
}

static const char *read_back(void) {
    static char text[1 << 18];
    ssize_t length = pread(fileno(captured), text, sizeof(text) - 1, 0);
    text[length > 0 ? length : 0] = '\0';
    int rc = ftruncate(fileno(captured), 0);
    return rc == 0 ? text : NULL;
}

static size_t count_lines(const char *text) {
    size_t lines = 0;
    for (; *text != '\0'; text++) {
        lines += *text == '\n';
    }
    return lines;
}

Test(observe_log, text_lines) {
    capture("text", "info");
    bkv_log(BKV_LOG_INFO, 7, "%d things", 3);
    const char *text = read_back();
    cr_assert_not_null(strstr(text, "Z info  [7] 3 things\n"), "%s", text);
    cr_assert_eq(text[4], '-');
    cr_assert_eq(text[10], 'T');
    bkv_log(BKV_LOG_WARN, 0, "no request");
    cr_assert_not_null(strstr(read_back(), "Z warn  no request\n"));
}

Test(observe_log, levels) {
    capture("text", "warn");
    bkv_log(BKV_LOG_INFO, 0, "hidden");
    bkv_log(BKV_LOG_WARN, 0, "shown");
    cr_assert_not(bkv_log_enabled(BKV_LOG_INFO));
    cr_assert_eq(count_lines(read_back()), 1);
    cr_assert_eq(bkv_log_set_level("debug", NULL), BKV_OK);
    bkv_log(BKV_LOG_DEBUG, 0, "shown now");
    cr_assert_eq(count_lines(read_back()), 1);
    bkv_error_t err;
    cr_assert_eq(bkv_log_set_level("loud", &err), BKV_INVALID_ARGUMENT);
    cr_assert(bkv_log_enabled(BKV_LOG_DEBUG));
    cr_assert_eq(bkv_log_setup("paper", "info", &err), BKV_INVALID_ARGUMENT);
    cr_assert_eq(strncmp(err.message, "log.target: \"paper\"", 19), 0);
}

Test(observe_log, nobody_forges_a_line) {
    capture("text", "info");
    bkv_log(BKV_LOG_INFO, 0, "a\nb\x1b[2J\x7f%s", "\r");
    const char *text = read_back();
    cr_assert_not_null(strstr(text, "a\\x0ab\\x1b[2J\\x7f\\x0d\n"), "%s", text);
    cr_assert_eq(count_lines(text), 1);
}

static json_t *parse(const char *text) {
    json_error_t error;
    json_t *json = json_loads(text, 0, &error);
    cr_assert_not_null(json, "%s in %s", error.text, text);
    return json;
}

Test(observe_log, json_is_json_whatever_is_in_it) {
    capture("json", "info");
    bkv_log(BKV_LOG_INFO, UINT64_C(9007199254740993), "say \"%s\" \\ \n\t\x01 \xc3\xa9 \xff\xed\xa0\x80 end", "hi");
    json_t *json = parse(read_back());
    cr_assert_str_eq(json_string_value(json_object_get(json, "message")),
                     "say \"hi\" \\ \n\t\x01 \xc3\xa9 \xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd end");
    cr_assert_eq(json_integer_value(json_object_get(json, "request")), 9007199254740993);
    cr_assert_str_eq(json_string_value(json_object_get(json, "level")), "info");
    json_decref(json);
    char long_message[5000];
    for (int fill = 0; fill < 4; fill++) { // cut, but still JSON
        memset(long_message, "a\"\x01\xff"[fill], sizeof(long_message) - 1);
        long_message[sizeof(long_message) - 1] = '\0';
        bkv_log(BKV_LOG_INFO, 0, "%s", long_message);
        const char *text = read_back();
        cr_assert_eq(count_lines(text), 1);
        json_decref(parse(text));
    }
}

Test(observe_log, failures_carry_operation_and_status) {
    capture("json", "debug");
    bkv_error_t error;
    bkv_fail(&error, BKV_DATA_LOSS, "bad block");
    bkv_log_failure(5, "Get", &error);
    json_t *json = parse(read_back());
    cr_assert_str_eq(json_string_value(json_object_get(json, "operation")), "Get");
    cr_assert_str_eq(json_string_value(json_object_get(json, "status")), "DATA_LOSS");
    cr_assert_str_eq(json_string_value(json_object_get(json, "message")), "bad block");
    cr_assert_str_eq(json_string_value(json_object_get(json, "level")), "error");
    json_decref(json);
    const struct {
        bkv_status_t status;
        const char *level;
    } cases[] = {{BKV_INVALID_ARGUMENT, "info"},
                 {BKV_NOT_FOUND, "info"},
                 {BKV_BUSY, "warn"},
                 {BKV_RESOURCE_EXHAUSTED, "warn"},
                 {BKV_INTERNAL, "error"}};
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        error.status = cases[i].status;
        bkv_log_failure(5, "Put", &error);
        json = parse(read_back());
        cr_assert_str_eq(json_string_value(json_object_get(json, "level")), cases[i].level);
        json_decref(json);
    }
}

Test(observe_log, a_flood_of_failures_is_held_back) {
    capture("text", "info");
    bkv_error_t error;
    bkv_fail(&error, BKV_NOT_FOUND, "nothing there");
    for (int i = 0; i < 1000; i++) {
        bkv_log_failure(1, "Get", &error);
    }
    size_t lines = count_lines(read_back());
    cr_assert_geq(lines, 100);
    cr_assert_leq(lines, 202, "a new second may have begun meanwhile");
}

static void *log_many(void *argument) {
    for (int i = 0; i < 300; i++) {
        bkv_log(BKV_LOG_INFO, 1, "%s", (const char *)argument);
    }
    return NULL;
}

Test(observe_log, lines_of_threads_do_not_mix) {
    capture("json", "info");
    pthread_t threads[3];
    char *messages[3] = {"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "bbbbbbbbbbbbbbbb", "cccccccccccccccccccccccc"};
    for (int i = 0; i < 3; i++) {
        pthread_create(&threads[i], NULL, log_many, messages[i]);
    }
    for (int i = 0; i < 3; i++) {
        pthread_join(threads[i], NULL);
    }
    char *text = strdup(read_back()), *state = NULL;
    size_t lines = 0;
    for (char *line = strtok_r(text, "\n", &state); line != NULL; line = strtok_r(NULL, "\n", &state)) {
        json_decref(parse(line));
        lines++;
    }
    cr_assert_eq(lines, 900);
    free(text);
}
