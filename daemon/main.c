// main.c - balancekvd: command line and configuration in, exit code out. What runs in between is app.c's and loop.c's.
#include "daemon/app.h"
#include "daemon/observe/log.h"

#include <limits.h>
#include <malloc.h>
#include <signal.h>
#include <stdio.h>

// Messages of many megabytes are allocated and freed all the time. With glibc's defaults each such buffer is mapped, faulted in
// and unmapped anew, which costs more than filling it; so free memory stays with the process (loop.c gives it back when idle).
static void tune_malloc(void) {
    mallopt(M_MMAP_THRESHOLD, 1 << 30);
    mallopt(M_TRIM_THRESHOLD, INT_MAX);
    mallopt(M_TOP_PAD, 64 << 20);
}

static int complain(const bkv_error_t *error) {
    fprintf(stderr, "balancekvd: %s\n", error->message);
    return error->status == BKV_INVALID_ARGUMENT ? BKV_EXIT_USAGE : BKV_EXIT_FAILURE;
}

static int serve(const bkv_args_t *args, bkv_config_t *config) {
    bkv_error_t error;
    bkv_app_t app;
    if (bkv_log_setup(config->log_target, config->log_level, &error) != BKV_OK) {
        bkv_config_destroy(config);
        return complain(&error);
    }
    signal(SIGPIPE, SIG_IGN); // a peer that went away is an error of its call
    bkv_status_t status = bkv_app_start(&app, args, config, &error);
    if (status != BKV_OK) {
        bkv_log(BKV_LOG_ERROR, 0, "cannot start: %s", error.message);
        return status == BKV_INVALID_ARGUMENT ? BKV_EXIT_USAGE : BKV_EXIT_FAILURE;
    }
    int code = bkv_app_run(&app);
    bkv_app_stop(&app);
    bkv_log(BKV_LOG_INFO, 0, "stopped");
    return code;
}

int main(int argc, char **argv) {
    tune_malloc();
    bkv_args_t args;
    bkv_args_parse(argc, argv, &args);
    if (args.action == BKV_ACTION_VERSION) {
        printf("balancekvd %s\n", BKV_VERSION);
        return BKV_EXIT_OK;
    }
    if (args.action == BKV_ACTION_EXAMPLE) {
        bkv_config_print_example(stdout);
        return BKV_EXIT_OK;
    }
    bkv_config_t *config;
    bkv_error_t error;
    if (bkv_config_load(&args.flags, &config, &error) != BKV_OK) {
        return complain(&error);
    }
    if (args.action == BKV_ACTION_RUN) {
        return serve(&args, config);
    }
    if (args.action == BKV_ACTION_PRINT) {
        bkv_config_print(config, stdout);
    }
    bkv_config_destroy(config);
    return BKV_EXIT_OK;
}
