// test_server.c - starting on sockets that are free or not, and stopping whatever goes on.
#include "rig.h"

#include "daemon/observe/clock.h"
#include <criterion/criterion.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

Test(rpc_server, stop_ends_calls_of_every_kind) {
    rig_t rig;
    rig_open(&rig);
    const uint32_t tokens = 8192;
    rig_open_spec(&rig, tokens);
    size_t bytes = RIG_BLOCK / RIG_TOKENS * tokens;
    float *payload = rig_payload(bytes, 19);
    rig_put(&rig, 1, tokens, payload, bytes);
    peer_call_t calls[4];
    const uint32_t numbers[] = {1, 1, 1, 1, 1, 1, 1, 1};
    rig_start_get(&rig, numbers, 8, 0, &calls[0]); // never read
    peer_start(rig.channel, "Put", 0, &calls[1]);
    rig_send_put(&calls[1], &rig, 2, tokens, bytes, payload, 1000); // never completed
    peer_start(rig.channel, "Lookup", 0, &calls[2]);                // never sent
    peer_start(rig.channel, "/grpc.health.v1.Health/Watch", 0, &calls[3]);
    peer_send(&calls[3], "", 0);
    usleep(100000);
    uint64_t start_ms = bkv_now_ms();
    peer_daemon_stop(&rig.daemon);
    cr_assert_lt(bkv_now_ms() - start_ms, 5000);
    cr_assert_eq(peer_daemon_pinned(&rig.daemon), 0);
    for (int i = 0; i < 4; i++) {
        size_t length;
        for (void *message; (message = peer_receive(&calls[i], &length)) != NULL;) { // what has arrived comes first
            free(message);
        }
        cr_assert_neq(peer_end(&calls[i]), GRPC_STATUS_OK);
        peer_free(&calls[i]);
    }
    free(payload);
    rig_close(&rig);
}

typedef struct loader {
    rig_t *rig;
    const float *payload;
    uint32_t number;
    unsigned calls;
} loader_t;

static void *load_run(void *argument) {
    loader_t *loader = argument;
    grpc_status_code code = GRPC_STATUS_OK;
    for (; code == GRPC_STATUS_OK; loader->calls++) {
        peer_call_t call;
        size_t length;
        if (loader->number % 2 == 0) {
            const uint32_t numbers[] = {1, 1, 1, 1, 1, 1, 1, 1};
            rig_start_get(loader->rig, numbers, 8, 0, &call);
            for (void *message; (message = peer_receive(&call, &length)) != NULL;) {
                free(message);
            }
        } else {
            peer_start(loader->rig->channel, "Put", 0, &call);
            rig_send_put(&call, loader->rig, 1000 * loader->number + loader->calls, RIG_TOKENS, RIG_BLOCK, loader->payload,
                         RIG_BLOCK);
            peer_send_last(&call);
            free(peer_receive(&call, &length));
        }
        code = peer_end(&call);
        peer_free(&call);
    }
    return NULL;
}

Test(rpc_server, stop_under_load_ends_every_call) {
    rig_t rig;
    rig_open(&rig);
    float *payload = rig_payload(RIG_BLOCK, 23);
    rig_put(&rig, 1, RIG_TOKENS, payload, RIG_BLOCK);
    pthread_t threads[6];
    loader_t loaders[6];
    for (uint32_t i = 0; i < 6; i++) {
        loaders[i] = (loader_t){.rig = &rig, .payload = payload, .number = i};
        cr_assert_eq(pthread_create(&threads[i], NULL, load_run, &loaders[i]), 0);
    }
    usleep(200000);
    peer_daemon_stop(&rig.daemon);
    for (uint32_t i = 0; i < 6; i++) {
        pthread_join(threads[i], NULL);
        cr_assert_gt(loaders[i].calls, 1);
    }
    cr_assert_eq(peer_daemon_pinned(&rig.daemon), 0);
    free(payload);
    rig_close(&rig);
}

// ---- sockets ----

Test(rpc_server, one_daemon_per_socket) {
    rig_t rig;
    bkv_error_t err;
    bkv_server_t *second;
    rig_open(&rig);
    struct stat status;
    cr_assert_eq(stat(rig.daemon.socket, &status), 0);
    cr_assert_eq(status.st_mode & 0777, 0600);
    cr_assert_eq(bkv_server_start(&rig.config, &second, &err), BKV_FAILED_PRECONDITION);
    cr_assert_not_null(strstr(err.message, rig.daemon.socket), "%s", err.message);
    cr_assert_eq(rig_resident(&rig, 0, 1), 0, "the first still serves");
    rig_close(&rig);
}

Test(rpc_server, stale_sockets_are_replaced_and_files_are_not) {
    rig_t rig;
    bkv_error_t err;
    peer_daemon_init(&rig.daemon, &rig.config);
    int file = open(rig.daemon.socket, O_CREAT | O_WRONLY, 0600);
    cr_assert_geq(file, 0);
    close(file);
    cr_assert_eq(bkv_server_start(&rig.config, &rig.daemon.server, &err), BKV_FAILED_PRECONDITION);
    cr_assert_not_null(strstr(err.message, "not a socket"), "%s", err.message);
    unlink(rig.daemon.socket);
    int left_behind = socket(AF_UNIX, SOCK_STREAM, 0);
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof(address.sun_path), "%s", rig.daemon.socket);
    cr_assert_eq(bind(left_behind, (const struct sockaddr *)(const void *)&address, sizeof(address)), 0);
    close(left_behind);
    rig_start(&rig);
    rig_open_spec(&rig, RIG_TOKENS);
    rig_close(&rig);
}

Test(rpc_server, tcp_is_loopback_unless_said_otherwise) {
    rig_t rig;
    bkv_error_t err;
    bkv_server_t *second;
    peer_daemon_init(&rig.daemon, &rig.config);
    rig.config.tcp = "0.0.0.0:0";
    cr_assert_eq(bkv_server_start(&rig.config, &second, &err), BKV_INVALID_ARGUMENT);
    cr_assert_not_null(strstr(err.message, "loopback"), "%s", err.message);
    rig.config.tcp = "127.0.0.1:0";
    rig_start(&rig);
    int port = bkv_server_port(rig.daemon.server);
    cr_assert_gt(port, 0);
    char target[32];
    snprintf(target, sizeof(target), "127.0.0.1:%d", port);
    grpc_channel *unix_channel = rig.channel;
    rig.channel = peer_connect(target);
    rig_open_spec(&rig, RIG_TOKENS);
    grpc_channel_destroy(rig.channel);
    rig.channel = unix_channel;
    bkv_server_config_t taken = rig.config;
    taken.socket_path = NULL;
    taken.tcp = target;
    cr_assert_eq(bkv_server_start(&taken, &second, &err), BKV_FAILED_PRECONDITION);
    cr_assert_not_null(strstr(err.message, target), "%s", err.message);
    rig_close(&rig);
}

Test(rpc_server, tls_files_are_checked_at_the_start) {
    rig_t rig;
    bkv_error_t err;
    bkv_server_t *server;
    peer_daemon_init(&rig.daemon, &rig.config);
    rig.config.tcp = "127.0.0.1:0";
    rig.config.tls_cert = "/nowhere/cert.pem";
    cr_assert_eq(bkv_server_start(&rig.config, &server, &err), BKV_INVALID_ARGUMENT);
    cr_assert_not_null(strstr(err.message, "tls_key"), "%s", err.message);
    rig.config.tls_key = "/dev/null";
    cr_assert_eq(bkv_server_start(&rig.config, &server, &err), BKV_INVALID_ARGUMENT);
    cr_assert_not_null(strstr(err.message, "/nowhere/cert.pem"), "%s", err.message);
    rig.config.tls_cert = "/etc/hostname";
    rig.config.tls_key = "/etc/hostname";
    cr_assert_eq(bkv_server_start(&rig.config, &server, &err), BKV_INVALID_ARGUMENT);
    cr_assert_not_null(strstr(err.message, "no PEM certificate"), "%s", err.message);
    peer_daemon_clear(&rig.daemon);
}
