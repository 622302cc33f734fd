// ipc_rig.c - see ipc_rig.h.
#include "ipc_rig.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void sleep_ms(long ms) {
    nanosleep(&(struct timespec){.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000}, NULL);
}

static double now_s(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

// ---- the daemon ----

const char *ipc_daemon_program(void) {
    static char path[512];
    ssize_t length = readlink("/proc/self/exe", path, sizeof(path) - 1);
    REQUIRE(length > 0, "/proc/self/exe: %s", strerror(errno));
    path[length] = '\0';
    for (int i = 0; i < 2; i++) { // tests/gpu-ipc, then tests
        char *slash = strrchr(path, '/');
        REQUIRE(slash != NULL, "no folder above %s", path);
        *slash = '\0';
    }
    REQUIRE(strlen(path) + sizeof("/bin/balancekvd") <= sizeof(path), "the path is too long");
    strcat(path, "/bin/balancekvd");
    return path;
}

static void launch(ipc_daemon_t *daemon) {
    daemon->pid = fork();
    REQUIRE(daemon->pid >= 0, "fork: %s", strerror(errno));
    if (daemon->pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGTERM);
        execl(daemon->program, daemon->program, "--socket", daemon->socket, "--tcp", "", "--arena", daemon->arena, "--slab",
              "64M", "--prefault", "--level", "info", "--target", "text", daemon->gpu_cache != NULL ? "--gpu-cache" : NULL,
              daemon->gpu_cache, (char *)NULL);
        perror(daemon->program);
        _exit(127);
    }
}

static void wait_until_it_serves(const ipc_daemon_t *daemon) {
    char fd_socket[80];
    snprintf(fd_socket, sizeof(fd_socket), "%s.fd", daemon->socket);
    for (int i = 0; i < 600; i++) {
        REQUIRE(waitpid(daemon->pid, NULL, WNOHANG) == 0, "the daemon has ended");
        if (access(daemon->socket, F_OK) == 0 && access(fd_socket, F_OK) == 0) {
            return;
        }
        sleep_ms(50);
    }
    REQUIRE(false, "the daemon does not serve %s after 30 s", daemon->socket);
}

void ipc_daemon_start(ipc_daemon_t *daemon, const char *program, const char *arena) {
    ipc_daemon_start_cache(daemon, program, arena, NULL);
}

void ipc_daemon_start_cache(ipc_daemon_t *daemon, const char *program, const char *arena, const char *gpu_cache) {
    *daemon = (ipc_daemon_t){.folder = "/tmp/bkv-ipc-XXXXXX", .program = program, .arena = arena, .gpu_cache = gpu_cache};
    REQUIRE(mkdtemp(daemon->folder) != NULL, "mkdtemp: %s", strerror(errno));
    snprintf(daemon->socket, sizeof(daemon->socket), "%s/d.sock", daemon->folder);
    snprintf(daemon->endpoint, sizeof(daemon->endpoint), "unix:%s", daemon->socket);
    launch(daemon);
    wait_until_it_serves(daemon);
}

void ipc_daemon_restart(ipc_daemon_t *daemon) {
    kill(daemon->pid, SIGKILL);
    waitpid(daemon->pid, NULL, 0);
    unlink(daemon->socket);
    launch(daemon); // exec follows at once: nothing of CUDA is touched in between
    wait_until_it_serves(daemon);
}

void ipc_daemon_stop(ipc_daemon_t *daemon) {
    int status = 0;
    kill(daemon->pid, SIGTERM);
    REQUIRE(waitpid(daemon->pid, &status, 0) == daemon->pid, "waitpid: %s", strerror(errno));
    REQUIRE(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the daemon ended with status %d", status);
    char command[96];
    snprintf(command, sizeof(command), "rm -rf %s", daemon->folder);
    (void)!system(command);
}

// ---- clients ----

bkv_client_t *ipc_client(const ipc_daemon_t *daemon, uint32_t timeout_ms) {
    bkv_client_t *client = NULL;
    bkv_error_t err = {0};
    const bkv_client_options_t options = {.endpoint = daemon->endpoint, .timeout_ms = timeout_ms};
    REQUIRE(bkv_client_create(&options, &client, &err) == BKV_OK, "client: %s", err.message);
    return client;
}

double ipc_metric(bkv_client_t *client, const char *name) {
    bkv_stats_t *stats = NULL;
    bkv_error_t err = {0};
    REQUIRE(bkv_stats_get(client, 0, &stats, &err) == BKV_OK, "stats: %s", err.message);
    double value = -1;
    for (size_t i = 0; i < stats->count; i++) {
        value = strcmp(stats->metrics[i].name, name) == 0 ? stats->metrics[i].value : value;
    }
    bkv_stats_free(stats);
    return value;
}

bool ipc_metric_becomes(bkv_client_t *client, const char *name, double value) {
    for (int i = 0; i < 200; i++) {
        if (ipc_metric(client, name) == value) {
            return true;
        }
        sleep_ms(50);
    }
    return false;
}

// ---- memory ----

uint8_t *ipc_memory(size_t bytes) {
    void *memory = NULL;
    int error = bkv_gpu_take(&memory, bytes);
    REQUIRE(error == 0, "device memory: %zu bytes: %s", bytes, bkv_gpu_error(error));
    return memory;
}

uint8_t *ipc_chunks(size_t chunk, uint32_t count) {
    void *base = NULL;
    int error = bkv_gpu_span_reserve(chunk * count, &base);
    for (uint32_t i = 0; error == 0 && i < count; i++) {
        error = bkv_gpu_span_create((uint8_t *)base + i * chunk, chunk, 0);
    }
    REQUIRE(error == 0, "chunks: %s", bkv_gpu_error(error));
    return base;
}

void ipc_keep_busy(void *stream, double seconds) {
    enum { BYTES = 1 << 30 };
    static uint8_t *from, *to;
    static double each; // seconds
    if (from == NULL) {
        from = ipc_memory(BYTES);
        to = ipc_memory(BYTES);
        double start = now_s();
        for (int i = 0; i < 11; i++) {
            start = i == 1 ? now_s() : start; // the first one warms up
            device_put(to, from, BYTES);
        }
        each = (now_s() - start) / 10;
    }
    for (double left = seconds; left > 0; left -= each) {
        int error = bkv_gpu_copy(to, from, BYTES, stream);
        REQUIRE(error == 0, "copy: %s", bkv_gpu_error(error));
    }
}
