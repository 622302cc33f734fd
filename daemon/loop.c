// loop.c - the event loop: signals, timers, the watchdog, and the end.
//
// SIGTERM and SIGINT drain: new calls are refused, those in flight have limits.drain_timeout to end. A member of a cluster leaves
// first, and serves until the others have heard of it. A second signal ends the process at once. SIGHUP reloads. Nothing here blocks, so that the loop always hears the next signal; that its timers run is
// half of what the watchdog proves, the other half is the progress of the compute threads.
#include "daemon/app.h"

#include "daemon/observe/clock.h"
#include "daemon/observe/log.h"
#include "daemon/observe/watchdog.h"
#include "daemon/systemd.h"
#include "daemon/value.h"

#include <assert.h>
#include <inttypes.h>
#include <malloc.h>
#include <signal.h>
#include <unistd.h>
#include <uv.h>

#define TICK_MS         1000
#define TICK_ENTRIES    65536  // looked at per tick for expiry
#define STATUS_TICKS    10     // between two STATUS lines
#define IDLE_TICKS      10     // without a call, after which free memory goes back to the system
#define DRAIN_POLL_MS   20     // how soon an empty house is noticed
#define LEFT_MS         500    // in which other members hear that this one has left, and go round it
#define STALL_MS        300000 // compute threads with work but without progress for so long are stuck
#define STOP_GRACE_S    10     // for jobs that still run after the drain
#define SIGNAL_COUNT    3
#define KEEP_FREE_BYTES ((size_t)16 << 20)

typedef struct loop {
    bkv_app_t *app;
    uv_loop_t uv;
    uv_signal_t signals[SIGNAL_COUNT];
    uv_timer_t tick, watchdog, drain;
    bkv_watchdog_t progress;
    uint64_t drain_until_ms;
    uint32_t ticks, idle_ticks;
    bool draining;
} loop_t;

// ---- timers ----

static void report_status(const loop_t *loop) {
    bkv_store_metrics_t store;
    bkv_store_metrics(loop->app->store, &store);
    bkv_systemd_status("%s%" PRIu64 " records, %" PRIu64 " of %" PRIu64 " MiB, %u calls open",
                       loop->draining ? "draining: " : "", store.entries, store.slot_bytes >> 20, store.arena_bytes >> 20,
                       bkv_server_open_calls(loop->app->server));
}

static void on_tick(uv_timer_t *timer) {
    loop_t *loop = timer->data;
    bkv_store_tick(loop->app->store, bkv_now_ms(), TICK_ENTRIES);
    bkv_transports_tick(loop->app->transports, bkv_now_ms());
    if (loop->ticks++ % STATUS_TICKS == 0) {
        report_status(loop);
    }
    loop->idle_ticks = bkv_server_open_calls(loop->app->server) == 0 ? loop->idle_ticks + 1 : 0;
    if (loop->idle_ticks == IDLE_TICKS) {
        malloc_trim(KEEP_FREE_BYTES);
    }
}

static void on_watchdog(uv_timer_t *timer) {
    loop_t *loop = timer->data;
    bkv_pipeline_metrics_t jobs;
    bkv_pipeline_metrics(loop->app->pipeline, &jobs);
    if (bkv_watchdog_check(&loop->progress, jobs.jobs_ended_total, jobs.jobs_queued + jobs.jobs_running, bkv_now_ms())) {
        bkv_systemd_alive();
    } else {
        bkv_log(BKV_LOG_ERROR, 0, "watchdog: %" PRIu64 " jobs and no progress for %d s; systemd will restart this daemon",
                jobs.jobs_queued + jobs.jobs_running, STALL_MS / 1000);
    }
}

// ---- the end ----

static void exit_now(int signal_number) {
    (void)signal_number;
    _exit(BKV_EXIT_FAILURE);
}

static void on_drain_poll(uv_timer_t *timer) {
    loop_t *loop = timer->data;
    uint32_t open = bkv_server_open_calls(loop->app->server);
    bool idle = open == 0 && bkv_pipeline_wait_idle(loop->app->pipeline, 0);
    if (!idle && bkv_now_ms() < loop->drain_until_ms) {
        return;
    }
    if (idle) {
        bkv_log(BKV_LOG_INFO, 0, "drained");
    } else {
        bkv_log(BKV_LOG_WARN, 0, "drain: limits.drain_timeout is over, %u calls are cut off", open);
    }
    uv_stop(&loop->uv);
}

static void refuse_new_calls(loop_t *loop) {
    bkv_server_drain(loop->app->server); // the pipeline stays open: calls in flight may begin further blocks
    uv_timer_start(&loop->drain, on_drain_poll, 0, DRAIN_POLL_MS);
}

static void on_left(uv_timer_t *timer) {
    refuse_new_calls(timer->data);
}

static void begin_drain(loop_t *loop, int signal_number) {
    char limit[BKV_VALUE_TEXT];
    bkv_value_format_ms(loop->app->config->limits_drain_timeout, limit);
    bkv_log(BKV_LOG_INFO, 0, "%s: draining, at most %s; once more ends at once",
            signal_number == SIGTERM ? "SIGTERM" : "SIGINT", limit);
    loop->draining = true;
    loop->drain_until_ms = bkv_now_ms() + loop->app->config->limits_drain_timeout;
    bkv_systemd_stopping();
    report_status(loop);
    bkv_cluster_t *cluster = loop->app->cluster;
    if (cluster != NULL && bkv_cluster_connected(cluster) && loop->app->config->limits_drain_timeout > LEFT_MS) {
        bkv_cluster_leave(cluster, 0); // nobody waits for it here
        uv_timer_start(&loop->drain, on_left, LEFT_MS, 0);
    } else {
        refuse_new_calls(loop);
    }
}

static void on_signal(uv_signal_t *handle, int signal_number) {
    loop_t *loop = handle->data;
    if (signal_number == SIGHUP) {
        bkv_systemd_reloading();
        bkv_app_reload(loop->app);
        bkv_systemd_ready();
    } else if (loop->draining) {
        bkv_log(BKV_LOG_WARN, 0, "second signal: ending at once");
        exit_now(signal_number);
    } else {
        begin_drain(loop, signal_number);
    }
}

// ---- set-up ----

static void loop_init(loop_t *loop, bkv_app_t *app) {
    static const int numbers[SIGNAL_COUNT] = {SIGTERM, SIGINT, SIGHUP};
    *loop = (loop_t){.app = app, .progress = {.stall_ms = STALL_MS}};
    int rc = uv_loop_init(&loop->uv);
    assert(rc == 0); // fails only without descriptors, and a handful was just opened
    for (size_t i = 0; i < SIGNAL_COUNT; i++) {
        rc |= uv_signal_init(&loop->uv, &loop->signals[i]);
        loop->signals[i].data = loop;
        rc |= uv_signal_start(&loop->signals[i], on_signal, numbers[i]);
    }
    uv_timer_t *timers[] = {&loop->tick, &loop->watchdog, &loop->drain};
    for (size_t i = 0; i < sizeof(timers) / sizeof(timers[0]); i++) {
        rc |= uv_timer_init(&loop->uv, timers[i]);
        timers[i]->data = loop;
    }
    rc |= uv_timer_start(&loop->tick, on_tick, 0, TICK_MS);
    uint64_t watchdog_ms = bkv_systemd_watchdog_ms();
    if (watchdog_ms != 0) {
        rc |= uv_timer_start(&loop->watchdog, on_watchdog, 0, watchdog_ms);
    }
    assert(rc == 0);
    (void)rc;
}

static void close_handle(uv_handle_t *handle, void *user) {
    (void)user;
    uv_close(handle, NULL);
}

static void loop_deinit(loop_t *loop) {
    uv_walk(&loop->uv, close_handle, NULL);
    uv_run(&loop->uv, UV_RUN_DEFAULT);
    int rc = uv_loop_close(&loop->uv);
    assert(rc == 0);
    (void)rc;
}

// From here on nobody runs the loop, but signals still mean what they did; and the rest of the way has a limit too.
static void end_at_next_signal(void) {
    const struct sigaction action = {.sa_handler = exit_now};
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGALRM, &action, NULL);
    alarm(STOP_GRACE_S);
}

int bkv_app_run(bkv_app_t *app) {
    loop_t loop;
    loop_init(&loop, app);
    bkv_systemd_ready();
    uv_run(&loop.uv, UV_RUN_DEFAULT);
    loop_deinit(&loop);
    end_at_next_signal();
    bkv_pipeline_drain(app->pipeline);
    return BKV_EXIT_OK;
}
