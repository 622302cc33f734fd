// redis.c - Redis behind bench_store.h.
#include "tests/bench/bench_store.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef BKV_HAVE_HIREDIS

bkv_bench_store_t bkv_bench_redis(const char *folder, const uint8_t *payload) {
    (void)folder, (void)payload;
    return (bkv_bench_store_t){.name = "Redis", .reason = "libhiredis-dev was missing when this was built"};
}

#else

#include <errno.h>
#include <fcntl.h>
#include <hiredis/hiredis.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define START_SECONDS 5

typedef struct redis {
    pid_t server;
    redisContext *context;
    const uint8_t *payload;
    char socket[96];
} redis_t;

static pid_t start_server(const char *socket, const char *folder) {
    pid_t pid = fork();
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        int null = open("/dev/null", O_WRONLY);
        dup2(null, STDOUT_FILENO);
        execlp("redis-server", "redis-server", "--port", "0", "--unixsocket", socket, "--save", "", "--appendonly", "no",
               "--dir", folder, (char *)NULL);
        _exit(127);
    }
    return pid;
}

static redisReply *reply_to(redis_t *redis, int type) {
    redisReply *reply = NULL;
    if (redisGetReply(redis->context, (void **)&reply) != REDIS_OK || reply->type != type) {
        bkv_bench_fail("Redis: %s", reply != NULL ? reply->str : redis->context->errstr);
    }
    return reply;
}

static double put(void *self, uint32_t first, uint32_t count, size_t bytes) {
    redis_t *redis = self;
    double start = bkv_bench_now();
    for (uint32_t i = 0; i < count; i++) {
        redisAppendCommand(redis->context, "SET block-%u %b", first + i, redis->payload + i * bytes, bytes);
    }
    for (uint32_t i = 0; i < count; i++) {
        freeReplyObject(reply_to(redis, REDIS_REPLY_STATUS));
    }
    return bkv_bench_now() - start;
}

static double get(void *self, uint32_t first, uint32_t count, size_t bytes) {
    redis_t *redis = self;
    redisReply *replies[BKV_BENCH_BATCH];
    double start = bkv_bench_now();
    for (uint32_t i = 0; i < count; i++) {
        redisAppendCommand(redis->context, "GET block-%u", first + i);
    }
    for (uint32_t i = 0; i < count; i++) {
        replies[i] = reply_to(redis, REDIS_REPLY_STRING);
    }
    double seconds = bkv_bench_now() - start;
    for (uint32_t i = 0; i < count; i++) {
        if (replies[i]->len != bytes || memcmp(replies[i]->str, redis->payload + i * bytes, bytes) != 0) {
            bkv_bench_fail("Redis answered other bytes than were put");
        }
        freeReplyObject(replies[i]);
    }
    return seconds;
}

static void drop(void *self, uint32_t first, uint32_t count) {
    redis_t *redis = self;
    for (uint32_t i = 0; i < count; i++) {
        redisAppendCommand(redis->context, "DEL block-%u", first + i);
        freeReplyObject(reply_to(redis, REDIS_REPLY_INTEGER));
    }
}

static void stop(void *self) {
    redis_t *redis = self;
    redisFree(redis->context);
    kill(redis->server, SIGKILL);
    waitpid(redis->server, NULL, 0);
    unlink(redis->socket);
    free(redis);
}

// Waits until the server listens. False: it ended, or did not in time.
static bool connect_server(redis_t *redis) {
    for (double start = bkv_bench_now(); bkv_bench_now() - start < START_SECONDS;) {
        redis->context = redisConnectUnix(redis->socket);
        if (redis->context != NULL && redis->context->err == 0) {
            return true;
        }
        redisFree(redis->context);
        redis->context = NULL;
        if (waitpid(redis->server, NULL, WNOHANG) == redis->server) {
            return false;
        }
        nanosleep(&(struct timespec){.tv_nsec = 10 * 1000 * 1000}, NULL);
    }
    kill(redis->server, SIGKILL);
    waitpid(redis->server, NULL, 0);
    return false;
}

bkv_bench_store_t bkv_bench_redis(const char *folder, const uint8_t *payload) {
    bkv_bench_store_t store = {.name = "Redis", .put_name = "Redis SET", .get_name = "Redis GET"};
    redis_t *redis = calloc(1, sizeof(*redis));
    if (redis == NULL) {
        bkv_bench_fail("out of memory");
    }
    redis->payload = payload;
    snprintf(redis->socket, sizeof(redis->socket), "%s/redis.sock", folder);
    redis->server = start_server(redis->socket, folder);
    if (redis->server < 0 || !connect_server(redis)) {
        snprintf(store.reason, sizeof(store.reason), "redis-server does not start (package redis-server)");
        free(redis);
        return store;
    }
    store.self = redis;
    store.put = put;
    store.get = get;
    store.drop = drop;
    store.stop = stop;
    return store;
}

#endif
