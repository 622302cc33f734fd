// test_args.c - flags become values; nonsense ends with the documented exit code.
#include "daemon/args.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static bkv_args_t parse(int argc, char **argv) {
    bkv_args_t args;
    bkv_args_parse(argc, argv, &args);
    return args;
}

Test(args, flags_become_values) {
    char *argv[] = {"balancekvd", "--arena=2G", "--op-timeout",  "5s",        "--insecure",
                    "-c",         "x.conf",     "--prefault=no", "--socket=", NULL};
    bkv_args_t args = parse(9, argv);
    cr_assert_eq(args.action, BKV_ACTION_RUN);
    cr_assert_str_eq(args.flags.file, "x.conf");
    cr_assert_str_eq(args.flags.values[BKV_OPT_memory_arena], "2G");
    cr_assert_str_eq(args.flags.values[BKV_OPT_limits_op_timeout], "5s");
    cr_assert_str_eq(args.flags.values[BKV_OPT_listen_insecure], "yes");
    cr_assert_str_eq(args.flags.values[BKV_OPT_memory_prefault], "no");
    cr_assert_str_eq(args.flags.values[BKV_OPT_listen_socket], "");
    cr_assert_null(args.flags.values[BKV_OPT_memory_slab]);
}

Test(args, actions) {
    const struct {
        char *flag;
        bkv_action_t action;
    } cases[] = {{"--check-config", BKV_ACTION_CHECK},
                 {"--print-config", BKV_ACTION_PRINT},
                 {"--print-example", BKV_ACTION_EXAMPLE},
                 {"--version", BKV_ACTION_VERSION},
                 {"-V", BKV_ACTION_VERSION}};
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        char *argv[] = {"balancekvd", cases[i].flag, NULL};
        cr_assert_eq(parse(2, argv).action, cases[i].action, "%s", cases[i].flag);
    }
}

// The exit code of a process that parses these; its output is thrown away. With `out`, stdout goes there.
static int exit_code(char *flag, char *out, size_t capacity) {
    int pipe_fds[2];
    cr_assert_eq(pipe(pipe_fds), 0);
    pid_t child = fork();
    if (child == 0) {
        dup2(pipe_fds[1], STDOUT_FILENO);
        close(STDERR_FILENO);
        char *argv[] = {"balancekvd", flag, NULL};
        parse(2, argv);
        _exit(99); // came back
    }
    close(pipe_fds[1]);
    size_t length = 0;
    ssize_t got;
    while (length < capacity - 1 && (got = read(pipe_fds[0], out + length, capacity - 1 - length)) > 0) {
        length += (size_t)got;
    }
    out[length] = '\0';
    close(pipe_fds[0]);
    int status;
    waitpid(child, &status, 0);
    return WEXITSTATUS(status);
}

Test(args, exit_codes_and_help_of_every_option) {
    static char out[65536];
    cr_assert_eq(exit_code("--no-such-flag", out, sizeof(out)), BKV_EXIT_USAGE);
    cr_assert_eq(exit_code("argument", out, sizeof(out)), BKV_EXIT_USAGE);
    cr_assert_eq(exit_code("--help", out, sizeof(out)), BKV_EXIT_OK);
    for (size_t id = 0; id < BKV_OPTION_COUNT; id++) {
        char flag[64];
        snprintf(flag, sizeof(flag), "--%s", bkv_options[id].name);
        for (char *at = flag; *at != '\0'; at++) {
            *at = *at == '_' ? '-' : *at;
        }
        cr_assert_not_null(strstr(out, flag), "--help lacks %s", flag);
    }
}

static const char *read_file(const char *path) {
    static char text[65536];
    FILE *file = fopen(path, "r");
    cr_assert_not_null(file, "run from the repository's root");
    size_t length = fread(text, 1, sizeof(text) - 1, file);
    text[length] = '\0';
    fclose(file);
    return text;
}

// The man page and the shell completion are written by hand; neither may lag behind.
Test(args, man_page_knows_every_option_and_default) {
    const char *text = read_file("deploy/balancekvd.8");
    for (size_t id = 0; id < BKV_OPTION_COUNT; id++) {
        const char *fallback = bkv_options[id].fallback;
        char line[128];
        snprintf(line, sizeof(line), "\n.B %s =%s%s\n", bkv_options[id].name, fallback[0] != '\0' ? " " : "", fallback);
        cr_assert_not_null(strstr(text, line), "no line \"%s\"", line + 1);
    }
}

Test(args, completion_knows_every_flag) {
    const char *text = read_file("deploy/completion/balancekvd");
    for (size_t id = 0; id < BKV_OPTION_COUNT; id++) {
        char flag[64];
        snprintf(flag, sizeof(flag), "--%s", bkv_options[id].name);
        for (char *at = flag; *at != '\0'; at++) {
            *at = *at == '_' ? '-' : *at;
        }
        cr_assert_not_null(strstr(text, flag), "no %s", flag);
    }
}
