// app.c - turns a configuration into a running store, pipeline, transports, cluster and server, and back. The event loop is loop.c.
#include "daemon/app.h"

#include "daemon/config_check.h"
#include "daemon/join.h"
#include "daemon/observe/clock.h"
#include "daemon/observe/log.h"
#include "daemon/systemd.h"
#include "daemon/value.h"

#include <errno.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

#define LEAVE_MS 1000 // for etcd to hear that this daemon goes; otherwise the lease tells it

static const char *size_text(uint64_t bytes, char out[BKV_VALUE_TEXT]) {
    bkv_value_format_size(bytes, out);
    return out;
}

// ---- store ----

static bkv_store_config_t store_config(const bkv_config_t *config, int arena_fd) {
    return (bkv_store_config_t){
        .arena_bytes = config->memory_arena,
        .slab_bytes = config->memory_slab,
        .max_entries = config->memory_max_entries,
        .tenant_quota = config->memory_tenant_quota,
        .recovered_ttl_ms = config->memory_ttl,
        .prefault = config->memory_prefault,
        .arena_path = config->memory_arena_path[0] != '\0' ? config->memory_arena_path : NULL,
        .arena_fd = arena_fd,
    };
}

static bkv_status_t create_store(bkv_app_t *app, int arena_fd, bkv_error_t *err) {
    bkv_store_config_t config = store_config(app->config, arena_fd);
    return bkv_store_create(&config, bkv_now_ms(), &app->store, NULL, err);
}

// An arena with a path is kept by its file system; a memfd by systemd, so that a restart finds its records again.
static bkv_status_t start_store(bkv_app_t *app, bkv_error_t *err) {
    int inherited = bkv_systemd_take_arena();
    bool has_path = app->config->memory_arena_path[0] != '\0';
    bkv_status_t status = BKV_OK;
    if (inherited >= 0 && !has_path) {
        status = create_store(app, inherited, err);
        if (status != BKV_OK && err != NULL) {
            bkv_log(BKV_LOG_WARN, 0, "arena: the one kept by systemd cannot be used (%s); starting with an empty one",
                    err->message);
        }
    }
    if (inherited >= 0) {
        close(inherited);
        if (app->store == NULL) {
            bkv_systemd_forget_arena();
        }
    }
    if (app->store != NULL) {
        return BKV_OK;
    }
    status = create_store(app, -1, err);
    if (status == BKV_OK && !has_path) {
        bkv_systemd_keep_arena(bkv_store_fd(app->store));
    }
    return status;
}

// A tenant without room in the store's table keeps the default quota: worth a line, not a reason to stop.
static void set_quota(bkv_app_t *app, const bkv_tenant_quota_t *tenant, uint64_t bytes) {
    bkv_error_t error;
    if (bkv_store_set_quota(app->store, bkv_tenant_tag(tenant->name), bytes, &error) != BKV_OK) {
        bkv_log(BKV_LOG_WARN, 0, "[tenant %s]: no quota could be set: %s", tenant->name, error.message);
    }
}

static void apply_quotas(bkv_app_t *app) {
    for (uint32_t i = 0; i < app->config->tenant_count; i++) {
        set_quota(app, &app->config->tenants[i], app->config->tenants[i].bytes);
    }
}

// ---- pipeline, transports and server ----

static bkv_status_t start_pipeline(bkv_app_t *app, bkv_error_t *err) {
    const bkv_config_t *config = app->config;
    if (config->memory_staging < config->limits_max_block) {
        char staging[BKV_VALUE_TEXT], block[BKV_VALUE_TEXT];
        bkv_log(BKV_LOG_WARN, 0, "memory.staging is %s: blocks up to limits.max_block, %s, can only be put as raw",
                size_text(config->memory_staging, staging), size_text(config->limits_max_block, block));
    }
    const bkv_pipeline_config_t pipeline = {
        .store = app->store,
        .backend = app->backend,
        .compute_threads = config->compute_threads,
        .max_jobs = config->compute_max_jobs,
        .staging_bytes = config->memory_staging,
        .max_block_bytes = config->limits_max_block,
        .gpu_cache_bytes = config->compute_gpu_cache,
        .max_specs = config->limits_max_specs,
        .max_batch = config->limits_max_batch,
        .default_ttl_ms = config->memory_ttl,
        .now_ms = bkv_now_ms,
    };
    return bkv_pipeline_create(&pipeline, &app->pipeline, err);
}

// The strings stay where they are: none of them is reloadable.
static bkv_status_t start_transports(bkv_app_t *app, bkv_error_t *err) {
    const bkv_config_t *config = app->config;
    const bkv_transports_config_t transports = {
        .pipeline = app->pipeline,
        .store = app->store,
        .socket_path = config->listen_socket,
        .socket_mode = bkv_config_socket_mode(config),
        .max_sessions = config->transport_max_sessions,
        .idle_ms = config->transport_idle,
        .shm_bytes = config->transport_shm,
        .shm_window = config->transport_shm_window,
        .cuda_ipc = config->transport_cuda_ipc,
        .verbs_device = config->transport_verbs,
        .verbs_port = config->transport_verbs_port,
        .verbs_gid = bkv_config_verbs_gid(config),
        .verbs_sessions = config->transport_verbs_sessions,
        .now_ms = bkv_now_ms,
    };
    return bkv_transports_create(&transports, &app->transports, err);
}

// Never the same twice in a row, and never 0: clients compare it to notice a restart.
static bkv_status_t choose_epoch(uint64_t *epoch, bkv_error_t *err) {
    if (getrandom(epoch, sizeof(*epoch), 0) != (ssize_t)sizeof(*epoch)) {
        return bkv_fail(err, BKV_INTERNAL, "getrandom: %s", strerror(errno));
    }
    *epoch |= 1;
    return BKV_OK;
}

// Fewer threads than CPUs: they only move bytes, and on a small machine a second one costs more hand-overs than it saves.
static uint32_t rpc_threads(const bkv_config_t *config) {
    if (config->limits_rpc_threads != 0) {
        return config->limits_rpc_threads;
    }
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    return cpus < 8 ? 1 : cpus < 32 ? (uint32_t)cpus / 4 : 8;
}

static bkv_status_t start_server(bkv_app_t *app, bkv_error_t *err) {
    const bkv_config_t *config = app->config;
    uint64_t epoch = 0;
    bkv_status_t status = choose_epoch(&epoch, err);
    if (status != BKV_OK) {
        return status;
    }
    size_t source_count = bkv_sources_init(app->store, app->pipeline, app->transports, app->cluster, app->sources);
    const bkv_server_config_t server = {
        .pipeline = app->pipeline,
        .store = app->store,
        .transports = app->transports,
        .cluster = app->cluster,
        .peer_name = config->cluster_peer_name,
        .sources = app->sources,
        .source_count = source_count,
        .version = BKV_VERSION,
        .backend = app->backend->name,
        .boot_epoch = epoch,
        .socket_path = config->listen_socket,
        .socket_mode = bkv_config_socket_mode(config),
        .tcp = config->listen_tcp,
        .insecure = config->listen_insecure,
        .tls_cert = config->listen_tls_cert,
        .tls_key = config->listen_tls_key,
        .tls_client_ca = config->listen_tls_client_ca,
        .threads = rpc_threads(config),
        .max_calls = config->limits_max_calls,
        .max_batch = config->limits_max_batch,
        .peer_batch = BKV_PEER_BATCH,
        .max_message = config->limits_max_message,
        .max_block = config->limits_max_block,
        .op_timeout_ms = config->limits_op_timeout,
    };
    return bkv_server_start(&server, &app->server, err);
}

static void log_start(const bkv_app_t *app) {
    const bkv_config_t *config = app->config;
    char arena[BKV_VALUE_TEXT];
    bkv_log(BKV_LOG_INFO, 0, "balancekvd " BKV_VERSION ": backend %s, arena %s, configuration %s", app->backend->name,
            size_text(config->memory_arena, arena), config->file != NULL ? config->file : "built in");
    if (config->listen_socket[0] != '\0') {
        bkv_log(BKV_LOG_INFO, 0, "listening on unix:%s", config->listen_socket);
    }
    if (config->listen_tcp[0] != '\0') {
        size_t host = (size_t)(strrchr(config->listen_tcp, ':') - config->listen_tcp);
        bkv_log(BKV_LOG_INFO, 0, "listening on %.*s:%d%s", (int)host, config->listen_tcp, bkv_server_port(app->server),
                config->listen_tls_cert[0] != '\0' ? " (TLS)" : "");
    }
}

bkv_status_t bkv_app_start(bkv_app_t *app, const bkv_args_t *args, bkv_config_t *config, bkv_error_t *err) {
    *app = (bkv_app_t){.args = args, .config = config, .backend = bkv_backend_get(config->compute_backend)};
    bkv_status_t status = start_store(app, err);
    if (status == BKV_OK) {
        apply_quotas(app);
        status = start_pipeline(app, err);
    }
    if (status == BKV_OK) {
        status = start_transports(app, err);
    }
    if (status == BKV_OK) {
        status = bkv_join_create(config, app->store, &app->cluster, err);
    }
    if (status == BKV_OK) {
        status = start_server(app, err);
    }
    if (status == BKV_OK && app->cluster != NULL) {
        status = bkv_join_announce(config, app->cluster, app->transports, bkv_server_port(app->server), err);
    }
    if (status != BKV_OK) {
        bkv_config_locate(config, err);
        bkv_app_stop(app);
        return status;
    }
    log_start(app);
    return BKV_OK;
}

void bkv_app_stop(bkv_app_t *app) {
    if (app->cluster != NULL) {
        bkv_cluster_leave(app->cluster, LEAVE_MS);
    }
    if (app->server != NULL) {
        bkv_server_stop(app->server);
    }
    bkv_cluster_destroy(app->cluster);
    bkv_transports_destroy(app->transports);
    bkv_pipeline_destroy(app->pipeline);
    if (app->store != NULL) {
        bkv_store_destroy(app->store);
    }
    bkv_config_destroy(app->config);
    *app = (bkv_app_t){0};
}

// ---- reload ----

static bool has_tenant(const bkv_config_t *config, const char *name) {
    for (uint32_t i = 0; i < config->tenant_count; i++) {
        if (strcmp(config->tenants[i].name, name) == 0) {
            return true;
        }
    }
    return false;
}

void bkv_app_reload(bkv_app_t *app) {
    bkv_config_t *next;
    bkv_error_t error;
    bkv_log(BKV_LOG_INFO, 0, "reload: reading the configuration again");
    if (bkv_config_load(&app->args->flags, &next, &error) != BKV_OK) {
        bkv_log(BKV_LOG_ERROR, 0, "reload: %s; nothing was changed", error.message);
        return;
    }
    bkv_config_adopt(app->config, next); // next now holds what was
    bkv_log_set_level(app->config->log_level, NULL);
    bkv_server_set_op_timeout(app->server, app->config->limits_op_timeout);
    bkv_pipeline_set_default_ttl(app->pipeline, app->config->memory_ttl);
    bkv_store_set_default_quota(app->store, app->config->memory_tenant_quota);
    if (app->cluster != NULL) {
        bkv_cluster_set_limits(app->cluster, app->config->cluster_repair_delay, app->config->cluster_repair_rate,
                               app->config->cluster_hot_copies);
    }
    for (uint32_t i = 0; i < next->tenant_count; i++) {
        if (!has_tenant(app->config, next->tenants[i].name)) {
            set_quota(app, &next->tenants[i], BKV_QUOTA_DEFAULT);
        }
    }
    apply_quotas(app);
    bkv_config_destroy(next);
}
