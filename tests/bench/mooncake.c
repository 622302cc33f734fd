// mooncake.c - Mooncake Store behind bench_store.h: a child, bench_mooncake.py, does what it is told line by line and says how
// long it took by its own clock, which the pipe is no part of.
#include "tests/bench/bench_store.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#define START_SECONDS 30 // the master, the owner of the memory and the client, one after the other

typedef struct mooncake {
    pid_t child;
    FILE *commands, *answers;
} mooncake_t;

static bool start_child(mooncake_t *mooncake, const char *python, const char *script, size_t largest) {
    int commands[2], answers[2];
    if (pipe(commands) != 0 || pipe(answers) != 0) {
        bkv_bench_fail("pipe: %s", strerror(errno));
    }
    char bytes[24];
    snprintf(bytes, sizeof(bytes), "%zu", largest);
    mooncake->child = fork();
    if (mooncake->child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGTERM);
        dup2(commands[0], STDIN_FILENO);
        dup2(answers[1], STDOUT_FILENO);
        close(commands[0]), close(commands[1]), close(answers[0]), close(answers[1]);
        execl(python, python, script, bytes, (char *)NULL);
        _exit(127);
    }
    close(commands[0]);
    close(answers[1]);
    mooncake->commands = fdopen(commands[1], "w");
    mooncake->answers = fdopen(answers[0], "r");
    return mooncake->child > 0 && mooncake->commands != NULL && mooncake->answers != NULL;
}

static void end_child(mooncake_t *mooncake) {
    fclose(mooncake->commands); // the end of its input: it ends what it started
    fclose(mooncake->answers);
    waitpid(mooncake->child, NULL, 0);
    free(mooncake);
}

// Sends a command, waits for "ok SECONDS"; anything else is a failure.
static double command(mooncake_t *mooncake, const char *what, uint32_t first, uint32_t count, size_t bytes) {
    char line[200];
    double seconds = 0;
    fprintf(mooncake->commands, "%s %u %u %zu\n", what, first, count, bytes);
    fflush(mooncake->commands);
    if (fgets(line, sizeof(line), mooncake->answers) == NULL) {
        bkv_bench_fail("Mooncake: ended");
    }
    if (sscanf(line, "ok %lf", &seconds) != 1) {
        bkv_bench_fail("Mooncake: %s: %s", what, line);
    }
    return seconds;
}

static double put(void *self, uint32_t first, uint32_t count, size_t bytes) {
    return command(self, "put", first, count, bytes);
}

static double get(void *self, uint32_t first, uint32_t count, size_t bytes) {
    return command(self, "get", first, count, bytes);
}

static void drop(void *self, uint32_t first, uint32_t count) {
    command(self, "drop", first, count, 0);
}

static void stop(void *self) {
    end_child(self);
}

bkv_bench_store_t bkv_bench_mooncake(const bkv_bench_mooncake_t *how, size_t largest) {
    bkv_bench_store_t store = {.name = "Mooncake", .put_name = "Mooncake put_from", .get_name = "Mooncake get_into"};
    if (how->python == NULL || how->script == NULL || access(how->python, X_OK) != 0) {
        snprintf(store.reason, sizeof(store.reason), "its wheel is not installed");
        return store;
    }
    mooncake_t *mooncake = calloc(1, sizeof(*mooncake));
    if (mooncake == NULL || !start_child(mooncake, how->python, how->script, largest)) {
        bkv_bench_fail("starting %s: %s", how->python, strerror(errno));
    }
    char line[128] = "it did not start in time\n";
    struct pollfd ready = {.fd = fileno(mooncake->answers), .events = POLLIN};
    if (poll(&ready, 1, START_SECONDS * 1000) == 1 && fgets(line, sizeof(line), mooncake->answers) == NULL) {
        snprintf(line, sizeof(line), "it ended at once\n");
    }
    if (strcmp(line, "ready\n") != 0) {
        snprintf(store.reason, sizeof(store.reason), "%.*s", (int)strcspn(line, "\n"), line);
        kill(mooncake->child, SIGTERM);
        end_child(mooncake);
        return store;
    }
    store.self = mooncake;
    store.put = put;
    store.get = get;
    store.drop = drop;
    store.stop = stop;
    return store;
}
