// server.c - the server: starts and ends it, runs the worker threads, knows its counters. Addresses are listen.c's, calls are
// call.c's.
//
// The workers share one completion queue: whichever of them hears of an event runs it, and a long step of one call (a large
// copy, a checksum) keeps no other call waiting while another worker is free. Measured against a queue for each worker, it
// saves a hop between threads: 10 % of a Lookup.
//
// The end: shut down -> cancel what is left -> wait until nothing is held -> destroy the server -> shut the queue down ->
// join -> destroy it. A batch started after its queue was shut down would abort the process; hence the wait before it.
// grpc_shutdown is left out: it can block for ten seconds after heavy writes, and the process ends anyway.
#include "daemon/rpc/server.h"

#include "daemon/observe/clock.h"
#include "daemon/observe/log.h"
#include "daemon/rpc/call.h"
#include "daemon/rpc/listen.h"
#include "proto/grpc_arg.h"
#include "proto/handover.h"

#include <assert.h>
#include <grpc/support/log.h>
#include <grpc/support/time.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define ARMED_PER_METHOD 8 // a burst of calls finds that many ready; each one taken is replaced at once
#define SWEEP_MS         100

// Beside max_calls, so that one connection can exceed it and hear so, instead of being held back in silence.
#define SPARE_STREAMS 256

// Requests of keys: see bkv_server_request_most. A key takes 34 bytes on the wire and about 80 once unpacked.
#define REQUEST_BASE     ((size_t)16 << 10)
#define REQUEST_PER_KEY  ((size_t)68)
#define UNPACKED_BASE    ((size_t)6 << 20) // 16,384 allocations of GPU memory with handles take 3 to 4 MiB
#define UNPACKED_PER_KEY ((size_t)256)

// ---- holds ----

void bkv_server_hold(bkv_server_t *server) {
    atomic_fetch_add(&server->holds, 1);
}

void bkv_server_release(bkv_server_t *server) {
    if (atomic_fetch_sub(&server->holds, 1) == 1) {
        pthread_mutex_lock(&server->lock);
        server->idle = true;
        pthread_cond_broadcast(&server->changed);
        pthread_mutex_unlock(&server->lock);
    }
}

static void wait_idle(bkv_server_t *server) {
    pthread_mutex_lock(&server->lock);
    while (!server->idle) {
        pthread_cond_wait(&server->changed, &server->lock);
    }
    pthread_mutex_unlock(&server->lock);
}

size_t bkv_server_request_most(const bkv_server_t *server) {
    const bkv_server_config_t *config = &server->config;
    return REQUEST_BASE + REQUEST_PER_KEY * (config->max_batch > config->peer_batch ? config->max_batch : config->peer_batch);
}

// ---- workers ----

// How long to wait for the next event: without calls there is no deadline to watch.
static gpr_timespec wait_until(bkv_server_t *server) {
    if (atomic_load(&server->accepted) == 0) {
        return gpr_inf_future(GPR_CLOCK_MONOTONIC);
    }
    return gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC), gpr_time_from_millis(SWEEP_MS, GPR_TIMESPAN));
}

static void sweep(bkv_server_t *server) {
    uint64_t now_ms = bkv_now_ms();
    if (now_ms - atomic_load(&server->swept_ms) < SWEEP_MS) {
        return;
    }
    pthread_mutex_lock(&server->lock);
    if (now_ms - atomic_load(&server->swept_ms) >= SWEEP_MS) { // no other worker was faster
        atomic_store(&server->swept_ms, now_ms);
        bkv_call_sweep(server, now_ms);
    }
    pthread_mutex_unlock(&server->lock);
}

static void *worker_run(void *argument) {
    bkv_worker_t *worker = argument;
    for (;;) {
        grpc_event event = grpc_completion_queue_next(worker->server->queue, wait_until(worker->server), NULL);
        if (event.type == GRPC_QUEUE_SHUTDOWN) {
            return NULL;
        }
        if (event.type == GRPC_OP_COMPLETE) {
            const bkv_tag_t *tag = event.tag;
            BKV_TAKE_OVER(event.tag);
            tag->run(worker, tag->owner, event.success != 0);
            bkv_bump_reset(&worker->bump);
        }
        sweep(worker->server);
    }
}

static bkv_status_t start_workers(bkv_server_t *server, bkv_error_t *err) {
    server->queue = grpc_completion_queue_create_for_next(NULL);
    for (uint32_t i = 0; i < server->worker_count; i++) {
        bkv_worker_t *worker = &server->workers[i];
        worker->server = server;
        bkv_bump_init(&worker->bump, UNPACKED_BASE + UNPACKED_PER_KEY * server->config.max_batch);
        int failure = pthread_create(&worker->thread, NULL, worker_run, worker);
        if (failure != 0) {
            return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "limits.rpc_threads: cannot start thread %u: %s", i,
                            strerror(failure));
        }
        worker->running = true;
        char name[16];
        snprintf(name, sizeof(name), "bkv-rpc-%u", i % 1000);
        pthread_setname_np(worker->thread, name);
    }
    return BKV_OK;
}

// Ends the threads once nothing more will happen in their queue.
static void stop_workers(bkv_server_t *server) {
    grpc_completion_queue_shutdown(server->queue);
    for (uint32_t i = 0; i < server->worker_count; i++) {
        bkv_worker_t *worker = &server->workers[i];
        if (worker->running) {
            pthread_join(worker->thread, NULL);
        }
        bkv_bump_deinit(&worker->bump);
    }
    while (grpc_completion_queue_next(server->queue, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL).type != GRPC_QUEUE_SHUTDOWN) {
    } // with not one thread started, nobody has drained it yet
    grpc_completion_queue_destroy(server->queue);
}

// ---- counters ----

static void collect(void *owner, bkv_metric_emit_t emit, void *sink) {
    bkv_server_t *server = owner;
    const uint64_t calls_open = atomic_load(&server->open);
    const uint64_t calls_total = atomic_load(&server->calls_total);
    const uint64_t calls_failed_total = atomic_load(&server->calls_failed_total);
    const uint64_t calls_cancelled_total = atomic_load(&server->calls_cancelled_total);
    const uint64_t bytes_received_total = atomic_load(&server->bytes_received_total);
    const uint64_t bytes_sent_total = atomic_load(&server->bytes_sent_total);
#define X(name, is_counter, help) emit(sink, #name, help, is_counter, (double)name);
    BKV_SERVER_METRICS(X)
#undef X
}

// ---- start ----

// gRPC's own messages go where ours go.
static void log_grpc(gpr_log_func_args *args) {
    bkv_log_level_t level = args->severity == GPR_LOG_SEVERITY_ERROR ? BKV_LOG_WARN : BKV_LOG_DEBUG;
    bkv_log(level, 0, "grpc: %s", args->message);
}

static int clamp_int(uint64_t value) {
    return value > INT_MAX ? INT_MAX : (int)value;
}

static grpc_server *make_server(const bkv_server_config_t *config) {
    grpc_arg list[] = {
        bkv_int_arg(GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, clamp_int(config->max_message)),
        bkv_int_arg(GRPC_ARG_MAX_CONCURRENT_STREAMS, clamp_int((uint64_t)config->max_calls + SPARE_STREAMS)),
        bkv_int_arg(GRPC_ARG_ALLOW_REUSEPORT, 0), // a port in use is an error, not shared
        bkv_int_arg(GRPC_ARG_ENABLE_PER_MESSAGE_COMPRESSION, 0),
        bkv_int_arg(GRPC_ARG_ENABLE_PER_MESSAGE_DECOMPRESSION, 0), // a few KiB may unfold to gigabytes; see wire.c
        // Clients may ping as they like, and connections whose peer is gone do not stay.
        bkv_int_arg(GRPC_ARG_HTTP2_MAX_PING_STRIKES, 0),
        bkv_int_arg(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0),
        bkv_int_arg(GRPC_ARG_KEEPALIVE_TIME_MS, 60000),
        bkv_int_arg(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 20000),
        bkv_int_arg(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1),
        bkv_int_arg(GRPC_ARG_SERVER_HANDSHAKE_TIMEOUT_MS, 10000),
    };
    const grpc_channel_args args = {.num_args = sizeof(list) / sizeof(list[0]), .args = list};
    return grpc_server_create(&args, NULL);
}

static void register_methods(bkv_server_t *server) {
#define X(id, path, handler, client_stream, always)                                                                            \
    server->methods[BKV_METHOD_##id] = grpc_server_register_method(server->grpc, path, NULL, GRPC_SRM_PAYLOAD_NONE, 0);
    BKV_METHODS(X)
#undef X
}

static bkv_status_t bind_all(bkv_server_t *server, bkv_error_t *err) {
    const bkv_server_config_t *config = &server->config;
    bool with_socket = config->socket_path != NULL && config->socket_path[0] != '\0';
    bool with_tcp = config->tcp != NULL && config->tcp[0] != '\0';
    if (!with_socket && !with_tcp) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "listen.socket, listen.tcp: both are empty");
    }
    bkv_status_t status = with_socket ? bkv_listen_unix(server->grpc, config, &server->lock_fd, err) : BKV_OK;
    return status == BKV_OK && with_tcp ? bkv_listen_tcp(server->grpc, config, &server->port, err) : status;
}

static void free_parts(bkv_server_t *server) {
    free((void *)server->config.version);
    free((void *)server->config.backend);
    free((void *)server->config.sources);
    free(server->workers);
    free(server);
}

// The parts that need neither gRPC nor threads.
static bkv_server_t *server_new(const bkv_server_config_t *config) {
    bkv_server_t *server = calloc(1, sizeof(*server));
    if (server == NULL) {
        return NULL;
    }
    server->config = *config;
    server->config.version = strdup(config->version);
    server->config.backend = strdup(config->backend);
    server->worker_count = config->threads == 0 ? 1 : config->threads;
    server->workers = calloc(server->worker_count, sizeof(server->workers[0]));
    bkv_metric_source_t *sources = calloc(config->source_count + 1, sizeof(sources[0]));
    server->config.sources = sources;
    server->config.source_count = config->source_count + 1;
    if (server->config.version == NULL || server->config.backend == NULL || server->workers == NULL || sources == NULL) {
        free_parts(server);
        return NULL;
    }
    for (size_t i = 0; i < config->source_count; i++) {
        sources[i] = config->sources[i];
    }
    sources[config->source_count] = (bkv_metric_source_t){.collect = collect, .owner = server};
    server->lock_fd = -1;
    server->started_ms = bkv_now_ms();
    atomic_init(&server->op_timeout_ms, config->op_timeout_ms);
    pthread_mutex_init(&server->lock, NULL);
    pthread_cond_init(&server->changed, NULL);
    return server;
}

static void arm_all(bkv_server_t *server) {
    for (int method = 0; method <= BKV_METHOD_COUNT; method++) {
        for (int n = 0; n < ARMED_PER_METHOD; n++) {
            bkv_call_arm(server, (bkv_method_id_t)method);
        }
    }
}

static bkv_status_t open_server(bkv_server_t *server, bkv_error_t *err) {
    server->grpc = make_server(&server->config);
    grpc_server_register_completion_queue(server->grpc, server->queue, NULL);
    register_methods(server);
    bkv_status_t status = bind_all(server, err);
    if (status == BKV_OK) {
        grpc_server_start(server->grpc);
        arm_all(server);
    }
    return status;
}

static void on_stopped(bkv_worker_t *worker, void *owner, bool ok) {
    (void)worker;
    (void)ok;
    bkv_server_release(owner);
}

static void close_server(bkv_server_t *server) {
    atomic_store(&server->stopping, true);
    server->stopped = (bkv_tag_t){on_stopped, server};
    bkv_server_hold(server);
    BKV_HAND_OVER(&server->stopped);
    grpc_server_shutdown_and_notify(server->grpc, server->queue, &server->stopped);
    grpc_server_cancel_all_calls(server->grpc);
    wait_idle(server);
    grpc_server_destroy(server->grpc);
}

static void server_free(bkv_server_t *server) {
    if (server->lock_fd >= 0) {
        close(server->lock_fd);
    }
    pthread_cond_destroy(&server->changed);
    pthread_mutex_destroy(&server->lock);
    free_parts(server);
}

static bkv_status_t server_begin(bkv_server_t *server, bkv_error_t *err) {
    gpr_set_log_function(log_grpc);
    grpc_init();
    bkv_status_t status = start_workers(server, err);
    if (status == BKV_OK) {
        status = open_server(server, err);
        if (status != BKV_OK) {
            close_server(server);
        }
    }
    if (status != BKV_OK) {
        stop_workers(server);
    }
    return status;
}

bkv_status_t bkv_server_start(const bkv_server_config_t *config, bkv_server_t **server_out, bkv_error_t *err) {
    assert(config->pipeline != NULL && config->store != NULL && config->max_calls > 0 && config->max_batch > 0 &&
           config->peer_batch > 0);
    bkv_server_t *server = server_new(config);
    if (server == NULL) {
        return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "no memory for the server");
    }
    sigset_t all, before; // signals are the main thread's; what is started here inherits the mask
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    bkv_status_t status = server_begin(server, err);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (status != BKV_OK) {
        server_free(server);
        return status;
    }
    *server_out = server;
    return BKV_OK;
}

// ---- while it runs, and its end ----

int bkv_server_port(const bkv_server_t *server) {
    return server->port;
}

void bkv_server_set_op_timeout(bkv_server_t *server, uint64_t op_timeout_ms) {
    atomic_store(&server->op_timeout_ms, op_timeout_ms);
}

void bkv_server_drain(bkv_server_t *server) {
    atomic_store(&server->draining, true);
}

uint32_t bkv_server_open_calls(const bkv_server_t *server) {
    return atomic_load(&server->open);
}

void bkv_server_stop(bkv_server_t *server) {
    bkv_server_drain(server);
    close_server(server);
    stop_workers(server);
    server_free(server);
}
