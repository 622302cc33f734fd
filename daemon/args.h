// args.h - the command line: one flag per option of options.h, and what to do instead of running.
#ifndef BKV_ARGS_H
#define BKV_ARGS_H

#include "daemon/config.h"

typedef enum bkv_action {
    BKV_ACTION_RUN,
    BKV_ACTION_CHECK,   // --check-config
    BKV_ACTION_PRINT,   // --print-config
    BKV_ACTION_EXAMPLE, // --print-example
    BKV_ACTION_VERSION, // --version
} bkv_action_t;

// Exit codes, as in the man page.
#define BKV_EXIT_OK      0
#define BKV_EXIT_FAILURE 1 // it could not start or had to stop
#define BKV_EXIT_USAGE   2 // command line or configuration

typedef struct bkv_args {
    bkv_action_t action;
    bkv_flags_t flags; // strings point into argv
} bkv_args_t;

// --help prints and exits with BKV_EXIT_OK; a command line that makes no sense is explained on stderr and ends the process with
// BKV_EXIT_USAGE.
void bkv_args_parse(int argc, char **argv, bkv_args_t *args);

#endif
