// cli.c - see cli.h. Options are parsed by getopt_long from the one table there.
#include "cli.h"

#include "text.h"

#include <getopt.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

typedef enum kind {
    KIND_FLAG,
    KIND_STRING,
    KIND_U32,
    KIND_U64,
    KIND_REAL,
    KIND_SIZE,
    KIND_MS,
    KIND_CODEC,
    KIND_DTYPE,
    KIND_RANGE
} kind_t;

static const struct {
    const char *flag, *argument, *help;
    size_t offset; // of the field
    kind_t kind;
    uint32_t group;
} options[BKV_OPT_COUNT] = {
#define X(field, flag, kind, argument, group, help)                                                                            \
    [BKV_OPT_##field] = {flag, argument, help, offsetof(bkv_cli_t, field), KIND_##kind, BKV_CLI_##group},
    BKV_CLI_OPTIONS(X)
#undef X
};

// What a value should have been, by kind.
static const char *const expectations[] = {
    [KIND_FLAG] = "a flag",
    [KIND_STRING] = "a text",
    [KIND_U32] = "a whole number below 2^32",
    [KIND_U64] = "a whole number below 2^64",
    [KIND_REAL] = "a number",
    [KIND_SIZE] = "a size (4096, 64K, 2M, 1G)",
    [KIND_MS] = "a time (500ms, 10s, 2m, 1h)",
    [KIND_CODEC] = "raw, dense8, dense4 or balance",
    [KIND_DTYPE] = "bf16, fp16 or fp32",
    [KIND_RANGE] = "a range (3, 2:5 or 2:)",
};

bool bkv_cli_given(const bkv_cli_t *cli, bkv_cli_option_t option) {
    return (cli->given >> option & 1) != 0;
}

// "3" is [3, 4); "2:5" is [2, 5); "2:" is from 2 on, which the wire calls a count of 0.
static bool parse_range(const char *text, bkv_cli_range_t *range) {
    char first[BKV_TEXT_MAX];
    size_t length = strcspn(text, ":");
    uint64_t from, to;
    if (length >= sizeof first) {
        return false;
    }
    memcpy(first, text, length);
    first[length] = '\0';
    if (!bkv_text_u64(first, UINT16_MAX, &from)) {
        return false;
    }
    *range = (bkv_cli_range_t){.first = (uint32_t)from, .count = 1};
    if (text[length] == '\0') {
        return true;
    }
    if (text[length + 1] == '\0') {
        range->count = 0;
        return true;
    }
    if (!bkv_text_u64(text + length + 1, UINT16_MAX, &to) || to <= from) {
        return false;
    }
    range->count = (uint32_t)(to - from);
    return true;
}

static bool parse_value(bkv_cli_t *cli, size_t option, const char *text) {
    void *field = (char *)cli + options[option].offset;
    uint64_t number;
    switch (options[option].kind) {
    case KIND_FLAG:
        *(bool *)field = true;
        return true;
    case KIND_STRING:
        *(const char **)field = text;
        return text[0] != '\0';
    case KIND_U32:
        if (!bkv_text_u64(text, UINT32_MAX, &number)) {
            return false;
        }
        *(uint32_t *)field = (uint32_t)number;
        return true;
    case KIND_U64:
        return bkv_text_u64(text, UINT64_MAX, field);
    case KIND_REAL:
        return bkv_text_real(text, field);
    case KIND_SIZE:
        return bkv_text_size(text, field);
    case KIND_MS:
        return bkv_text_duration(text, field);
    case KIND_CODEC:
        return bkv_codec_parse(text, field);
    case KIND_DTYPE:
        return bkv_dtype_parse(text, field);
    case KIND_RANGE:
        return parse_range(text, field);
    }
    return false;
}

bkv_status_t bkv_cli_parse(bkv_cli_t *cli, uint32_t groups, int argc, char **argv, bool stop, bkv_error_t *err) {
    struct option known[BKV_OPT_COUNT + 1];
    size_t count = 0;
    for (size_t i = 0; i < BKV_OPT_COUNT; i++) {
        if (options[i].group & groups) {
            int has = options[i].kind == KIND_FLAG ? no_argument : required_argument;
            known[count++] = (struct option){.name = options[i].flag, .has_arg = has, .val = (int)i + 256};
        }
    }
    known[count] = (struct option){.name = NULL};
    optind = 0; // glibc: start over
    opterr = 0;
    for (int seen; (seen = getopt_long(argc, argv, stop ? "+:h" : ":h", known, NULL)) != -1;) {
        if (seen == ':') {
            return bkv_cli_usage(cli, err, "%s: needs a value", argv[optind - 1]);
        }
        if (seen == '?') {
            return bkv_cli_usage(cli, err, "%s: no such option", argv[optind - 1]);
        }
        size_t option = seen == 'h' ? (size_t)BKV_OPT_help : (size_t)seen - 256;
        if (!parse_value(cli, option, optarg)) {
            return bkv_cli_usage(cli, err, "--%s: \"%.64s\" is not %s", options[option].flag, optarg,
                                 expectations[options[option].kind]);
        }
        cli->given |= (uint64_t)1 << option;
    }
    cli->args = argv + optind;
    cli->arg_count = argc - optind;
    return BKV_OK;
}

bkv_status_t bkv_cli_usage(bkv_cli_t *cli, bkv_error_t *err, const char *format, ...) {
    char message[BKV_MESSAGE_MAX];
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    cli->usage = true;
    return bkv_fail(err, BKV_INVALID_ARGUMENT, "%s", message);
}

void bkv_cli_help(uint32_t groups, FILE *out) {
    fprintf(out, "Options:\n");
    for (size_t i = 0; i < BKV_OPT_COUNT; i++) {
        if (options[i].group & groups) {
            char left[40];
            bool flag = options[i].kind == KIND_FLAG;
            snprintf(left, sizeof left, "--%s%s%s", options[i].flag, flag ? "" : " ", flag ? "" : options[i].argument);
            fprintf(out, "  %-21s %s\n", left, options[i].help);
        }
    }
}

int bkv_cli_exit(bkv_status_t status, bool usage) {
    switch (status) {
    case BKV_OK:
        return 0;
    case BKV_NOT_FOUND:
        return 3;
    case BKV_BUSY:
    case BKV_DEADLINE_EXCEEDED:
        return 4;
    case BKV_DATA_LOSS:
        return 5;
    case BKV_RESOURCE_EXHAUSTED:
        return 6;
    case BKV_PERMISSION_DENIED:
    case BKV_UNAUTHENTICATED:
        return 7;
    default:
        return usage ? 2 : 1;
    }
}

void bkv_cli_report(const bkv_cli_t *cli, const char *command, const bkv_error_t *err) {
    const char *message = err->message[0] != '\0' ? err->message : bkv_status_text(err->status);
    int code = bkv_cli_exit(err->status, cli->usage);
    if (!cli->json) {
        fprintf(stderr, "bkv: %s%s%s\n", command ? command : "", command ? ": " : "", message);
        if (cli->usage) {
            fprintf(stderr, "Try `bkv %s%s--help`.\n", command ? command : "", command ? " " : "");
        }
        return;
    }
    // Messages may carry bytes from the outside that are not UTF-8: jansson refuses those, the status name remains.
    json_t *text = json_string(message);
    json_t *error = json_pack("{s:{s:s, s:o, s:i, s:s?}}", "error", "status", bkv_status_name(err->status), "message",
                              text ? text : json_string(bkv_status_text(err->status)), "exit", code, "command", command);
    json_dumpf(error, stderr, JSON_COMPACT);
    fputc('\n', stderr);
    json_decref(error);
}

void bkv_cli_print_json(json_t *value, bool line) {
    json_dumpf(value, stdout, line ? JSON_COMPACT : JSON_INDENT(2));
    fputc('\n', stdout);
    fflush(stdout);
    json_decref(value);
}

json_t *bkv_cli_json_hex(const uint8_t *bytes, size_t n) {
    char text[2 * BKV_KEY_BYTES + 1];
    if (n > BKV_KEY_BYTES) {
        return json_null();
    }
    bkv_hex(bytes, n, text);
    return json_string(text);
}

bkv_codec_params_t bkv_cli_codec(const bkv_cli_t *cli) {
    bkv_codec_params_t params = {.codec = BKV_CODEC_BALANCE, .rate = 16, .sink = BKV_DEFAULT_SINK, .seed = cli->seed};
    params.codec = bkv_cli_given(cli, BKV_OPT_codec) ? cli->codec : params.codec;
    params.rate = bkv_cli_given(cli, BKV_OPT_rate) ? cli->rate : params.rate;
    params.sink = bkv_cli_given(cli, BKV_OPT_sink) ? cli->sink : params.sink;
    return params;
}

bkv_status_t bkv_cli_profile(bkv_cli_t *cli, uint32_t rate, bkv_profile_t *profile, bkv_error_t *err) {
    bkv_error_t cause;
    *profile = (bkv_profile_t){.count = 0};
    if (cli->profile == NULL) {
        return BKV_OK;
    }
    if (strcmp(cli->profile, "auto") == 0) {
        if (rate == 0) {
            return bkv_cli_usage(cli, err, "--profile: auto needs --rate");
        }
        bkv_profile_for_rate(rate, profile);
        return BKV_OK;
    }
    if (bkv_profile_parse(cli->profile, profile, &cause) != BKV_OK) {
        return bkv_cli_usage(cli, err, "--%.200s", cause.message);
    }
    return BKV_OK;
}
