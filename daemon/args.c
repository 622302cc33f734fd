// args.c - builds glibc argp's tables from options.h, so that --help can never lag behind.
#include "daemon/args.h"

#include "daemon/value.h"

#include <argp.h>
#include <stdlib.h>
#include <string.h>

#define FLAG_MAX 32
#define HELP_MAX 256

// argp wants each key to be a number that is no character, but for those with a short form.
enum {
    KEY_CONFIG = 'c',
    KEY_VERSION = 'V',
    KEY_OPTIONS = 0x1000, // + bkv_option_id_t
    KEY_CHECK = 0x2000,
    KEY_PRINT,
    KEY_EXAMPLE,
};

// argp only borrows strings, so they live here while it runs.
typedef struct table {
    char flag[BKV_OPTION_COUNT][FLAG_MAX];
    char help[BKV_OPTION_COUNT][HELP_MAX];
    struct argp_option options[2 * BKV_OPTION_COUNT + 8]; // at most a heading for each option, and the fixed ones
    size_t count;
} table_t;

static const char *argument_name(bkv_option_type_t type) {
    switch (type) {
    case BKV_STRING:
        return "TEXT";
    case BKV_BOOL:
        return "yes|no";
    case BKV_U32:
        return "N";
    case BKV_SIZE:
        return "SIZE";
    case BKV_MS:
        return "TIME";
    }
    return NULL;
}

static void add_option(table_t *table, size_t id) {
    const bkv_option_t *option = &bkv_options[id];
    int group = 1;
    for (size_t i = 1; i <= id; i++) {
        group += strcmp(bkv_options[i].section, bkv_options[i - 1].section) != 0;
    }
    if (id == 0 || strcmp(option->section, bkv_options[id - 1].section) != 0) {
        table->options[table->count++] = (struct argp_option){.doc = option->section, .group = group};
    }
    snprintf(table->flag[id], FLAG_MAX, "%s", option->name);
    for (char *at = table->flag[id]; *at != '\0'; at++) {
        *at = *at == '_' ? '-' : *at;
    }
    const char *fallback = option->fallback[0] == '\0' ? "none" : option->fallback;
    snprintf(table->help[id], HELP_MAX, "%s [%s]", option->help, fallback);
    table->options[table->count++] = (struct argp_option){
        .name = table->flag[id],
        .key = KEY_OPTIONS + (int)id,
        .arg = argument_name(option->type),
        .flags = option->type == BKV_BOOL ? OPTION_ARG_OPTIONAL : 0,
        .doc = table->help[id],
        .group = group,
    };
}

static void build_table(table_t *table) {
    static const struct argp_option fixed[] = {
        {"config", KEY_CONFIG, "FILE", 0, "configuration file [" BKV_CONFIG_DEFAULT_FILE ", if it is there]", 0},
        {"check-config", KEY_CHECK, NULL, 0, "check the configuration and exit", 0},
        {"print-config", KEY_PRINT, NULL, 0, "print the effective configuration as a file and exit", 0},
        {"print-example", KEY_EXAMPLE, NULL, 0, "print an example file with every option's default and exit", 0},
        {"version", KEY_VERSION, NULL, 0, "print the version and exit", -1},
    };
    *table = (table_t){.count = 0};
    for (size_t i = 0; i < sizeof(fixed) / sizeof(fixed[0]); i++) {
        table->options[table->count++] = fixed[i];
    }
    for (size_t id = 0; id < BKV_OPTION_COUNT; id++) {
        add_option(table, id);
    }
}

static error_t parse_one(int key, char *argument, struct argp_state *state) {
    bkv_args_t *args = state->input;
    if (key >= KEY_OPTIONS && key < KEY_OPTIONS + BKV_OPTION_COUNT) {
        args->flags.values[key - KEY_OPTIONS] = argument != NULL ? argument : "yes"; // --insecure
        return 0;
    }
    switch (key) {
    case KEY_CONFIG:
        args->flags.file = argument;
        return 0;
    case KEY_CHECK:
        args->action = BKV_ACTION_CHECK;
        return 0;
    case KEY_PRINT:
        args->action = BKV_ACTION_PRINT;
        return 0;
    case KEY_EXAMPLE:
        args->action = BKV_ACTION_EXAMPLE;
        return 0;
    case KEY_VERSION:
        args->action = BKV_ACTION_VERSION;
        return 0;
    case ARGP_KEY_ARG:
        argp_error(state, "unexpected argument \"%s\"", argument);
        return EINVAL;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

void bkv_args_parse(int argc, char **argv, bkv_args_t *args) {
    *args = (bkv_args_t){.action = BKV_ACTION_RUN};
    table_t *table = malloc(sizeof(*table));
    if (table == NULL) {
        abort();
    }
    build_table(table);
    const struct argp argp = {
        .options = table->options,
        .parser = parse_one,
        .doc = "balancekvd keeps compressed KV cache of LLM inference in memory and serves it over gRPC.\v"
               "Flags win over the configuration file, the file over the defaults (in brackets above). Sizes take K, M, G and "
               "T, times ms, s, m and h. Exit status: 0 stopped as told, 1 failed, 2 wrong command line or configuration. See "
               "balancekvd(8).",
    };
    argp_err_exit_status = BKV_EXIT_USAGE;
    argp_parse(&argp, argc, argv, 0, NULL, args);
    free(table);
}
