// app.h - the daemon put together: store, pipeline, transports, cluster, server, and the loop that owns signals and timers.
#ifndef BKV_APP_H
#define BKV_APP_H

#include "daemon/args.h"
#include "daemon/pipeline/pipeline.h"
#include "daemon/rpc/server.h"
#include "daemon/sources.h"

typedef struct bkv_app {
    const bkv_args_t *args; // kept for reloads
    bkv_config_t *config;   // effective; owned
    const bkv_backend_t *backend;
    bkv_store_t *store;
    bkv_pipeline_t *pipeline;
    bkv_transports_t *transports;
    bkv_cluster_t *cluster; // NULL: this daemon runs alone
    bkv_server_t *server;
    bkv_metric_source_t sources[BKV_SOURCE_COUNT];
} bkv_app_t;

// Starts everything and takes config over. On failure what was started is stopped again. INVALID_ARGUMENT: the configuration is
// at fault.
bkv_status_t bkv_app_start(bkv_app_t *app, const bkv_args_t *args, bkv_config_t *config, bkv_error_t *err);

// Reads the configuration again and applies what may change while running. A bad file changes nothing.
void bkv_app_reload(bkv_app_t *app);

// Serves until told to stop, then drains: see loop.c. Returns the exit code.
int bkv_app_run(bkv_app_t *app);

// Stops what is left, in the order of its dependencies. Waits for jobs that are running.
void bkv_app_stop(bkv_app_t *app);

#endif
