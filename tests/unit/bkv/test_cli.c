// test_cli.c - client/bkv/cli.c: options into fields, complaints that name the option, statuses into exit statuses.
#include "client/bkv/cli.h"

#include <criterion/criterion.h>
#include <string.h>

#define PARSE(cli, groups, err, ...)                                                                                           \
    bkv_cli_parse(cli, groups, (int)(sizeof(char *[]){__VA_ARGS__} / sizeof(char *)), (char *[]){__VA_ARGS__, NULL}, false, err)

Test(bkv_cli, fills_fields_and_keeps_operands) {
    bkv_cli_t cli = {.given = 0};
    char *argv[] = {"get",    "k1",     "--layer-range", "2:5", "--timeout=2s", "--codec", "dense4",
                    "--seed", "0xffff", "--budget",      "64K", "--json",       "k2",      NULL};
    cr_assert_eq(bkv_cli_parse(&cli, BKV_CLI_ANY_GROUP, 13, argv, false, NULL), BKV_OK);
    cr_expect_eq(cli.layer_range.first, 2);
    cr_expect_eq(cli.layer_range.count, 3);
    cr_expect_eq(cli.timeout, 2000);
    cr_expect_eq(cli.codec, BKV_CODEC_DENSE4);
    cr_expect_eq(cli.seed, 0xffff);
    cr_expect_eq(cli.budget, 65536);
    cr_expect(cli.json);
    cr_assert_eq(cli.arg_count, 2);
    cr_expect_str_eq(cli.args[0], "k1");
    cr_expect_str_eq(cli.args[1], "k2");
    cr_expect(bkv_cli_given(&cli, BKV_OPT_seed));
    cr_expect_not(bkv_cli_given(&cli, BKV_OPT_rate));
}

Test(bkv_cli, ranges) {
    bkv_cli_t cli = {.given = 0};
    cr_expect_eq(PARSE(&cli, BKV_CLI_RANGE, NULL, "get", "--head-range", "3"), BKV_OK);
    cr_expect(cli.head_range.first == 3 && cli.head_range.count == 1);
    cr_expect_eq(PARSE(&cli, BKV_CLI_RANGE, NULL, "get", "--head-range", "3:"), BKV_OK);
    cr_expect(cli.head_range.first == 3 && cli.head_range.count == 0, "open end: 0 means all from there on");
    char *bad[] = {"", ":", ":3", "3:3", "4:3", "1:2:3", "a", "70000", "1:70000", "123456789012345678901234567890123456789"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        cr_expect_neq(PARSE(&cli, BKV_CLI_RANGE, NULL, "get", "--head-range", bad[i]), BKV_OK, "\"%s\" was taken", bad[i]);
    }
}

Test(bkv_cli, complaints_name_the_option) {
    bkv_error_t err;
    bkv_cli_t cli = {.given = 0};
    cr_expect_eq(PARSE(&cli, BKV_CLI_CODEC, &err, "put", "--rate", "many"), BKV_INVALID_ARGUMENT);
    cr_expect(cli.usage);
    cr_expect_not_null(strstr(err.message, "--rate: \"many\""));
    cr_expect_eq(PARSE(&cli, BKV_CLI_CODEC, &err, "put", "--rate"), BKV_INVALID_ARGUMENT);
    cr_expect_not_null(strstr(err.message, "--rate: needs a value"));
    cr_expect_eq(PARSE(&cli, BKV_CLI_CODEC, &err, "put", "--codec", "zip"), BKV_INVALID_ARGUMENT);
    cr_expect_not_null(strstr(err.message, "dense8"));
    cr_expect_eq(PARSE(&cli, BKV_CLI_ALL, &err, "ping", "--rate", "8"), BKV_INVALID_ARGUMENT, "not an option of this command");
    cr_expect_not_null(strstr(err.message, "--rate: no such option"));
    cr_expect_eq(PARSE(&cli, BKV_CLI_CODEC, &err, "put", "--rate", "4294967296"), BKV_INVALID_ARGUMENT);
    cr_expect_eq(PARSE(&cli, BKV_CLI_CONNECT, &err, "put", "--timeout", "soon"), BKV_INVALID_ARGUMENT);
}

Test(bkv_cli, common_options_may_precede_the_command) {
    bkv_cli_t cli = {.given = 0};
    char *argv[] = {"bkv", "--endpoint", "localhost:1", "put", "--rate", "8", NULL};
    cr_assert_eq(bkv_cli_parse(&cli, BKV_CLI_ALL | BKV_CLI_CONNECT, 6, argv, true, NULL), BKV_OK);
    cr_assert_eq(cli.arg_count, 3);
    cr_expect_str_eq(cli.args[0], "put");
    cr_assert_eq(bkv_cli_parse(&cli, BKV_CLI_CODEC, cli.arg_count, cli.args, false, NULL), BKV_OK);
    cr_expect_str_eq(cli.endpoint, "localhost:1");
    cr_expect_eq(cli.rate, 8);
    cr_expect_eq(cli.arg_count, 0);
}

Test(bkv_cli, exit_statuses) {
    cr_expect_eq(bkv_cli_exit(BKV_OK, false), 0);
    cr_expect_eq(bkv_cli_exit(BKV_INTERNAL, false), 1);
    cr_expect_eq(bkv_cli_exit(BKV_INVALID_ARGUMENT, false), 1);
    cr_expect_eq(bkv_cli_exit(BKV_INVALID_ARGUMENT, true), 2);
    cr_expect_eq(bkv_cli_exit(BKV_NOT_FOUND, false), 3);
    cr_expect_eq(bkv_cli_exit(BKV_BUSY, false), 4);
    cr_expect_eq(bkv_cli_exit(BKV_DEADLINE_EXCEEDED, false), 4);
    cr_expect_eq(bkv_cli_exit(BKV_DATA_LOSS, false), 5);
    cr_expect_eq(bkv_cli_exit(BKV_RESOURCE_EXHAUSTED, false), 6);
    cr_expect_eq(bkv_cli_exit(BKV_UNAUTHENTICATED, false), 7);
}

Test(bkv_cli, codec_defaults) {
    bkv_cli_t cli = {.given = 0};
    bkv_codec_params_t params = bkv_cli_codec(&cli);
    cr_expect(params.codec == BKV_CODEC_BALANCE && params.rate == 16 && params.sink == BKV_DEFAULT_SINK && params.seed == 0);
    cr_assert_eq(PARSE(&cli, BKV_CLI_CODEC, NULL, "x", "--sink", "0", "--rate", "8", "--seed", "9"), BKV_OK);
    params = bkv_cli_codec(&cli);
    cr_expect(params.rate == 8 && params.sink == 0 && params.seed == 9, "a zero that was asked for is no default");
}
