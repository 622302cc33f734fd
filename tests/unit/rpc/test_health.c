// test_health.c - health while serving and while draining.
#include "rig.h"

#include "health.pb-c.h"
#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

// A call counts before it is let in, so that it counts says nothing of what a drain does with it; with a slot it is in.
static bool becomes_let_in(const rig_t *rig) {
    bkv_store_metrics_t metrics = {0};
    for (int i = 0; i < 500 && metrics.slot_bytes == 0; i++) {
        usleep(10000);
        bkv_store_metrics(rig->daemon.store, &metrics);
    }
    return metrics.slot_bytes != 0;
}

static int watch_next(peer_call_t *watch) {
    size_t length;
    uint8_t *bytes = peer_receive(watch, &length);
    cr_assert_not_null(bytes);
    Grpc__Health__V1__HealthCheckResponse *news = grpc__health__v1__health_check_response__unpack(NULL, length, bytes);
    int status = (int)news->status;
    grpc__health__v1__health_check_response__free_unpacked(news, NULL);
    free(bytes);
    return status;
}

Test(rpc_health, drain_refuses_new_work_and_tells_watchers) {
    rig_t rig;
    rig_open(&rig);
    peer_call_t watch, put;
    peer_start(rig.channel, "/grpc.health.v1.Health/Watch", 0, &watch);
    peer_send(&watch, "", 0);
    peer_send_last(&watch);
    cr_assert_eq(watch_next(&watch), 1);
    float *payload = rig_payload(RIG_BLOCK, 17);
    peer_start(rig.channel, "Put", 0, &put);
    rig_send_put(&put, &rig, 1, RIG_TOKENS, RIG_BLOCK, payload, RIG_BLOCK / 2);
    cr_assert(becomes_let_in(&rig));
    cr_assert_eq(bkv_server_open_calls(rig.daemon.server), 1, "a watch does not count");
    bkv_server_drain(rig.daemon.server);
    cr_assert_eq(watch_next(&watch), 2);
    grpc_status_code code;
    char text[256];
    cr_assert_null(rig_lookup(&rig, 0, 1, &code, text));
    cr_assert_eq(code, GRPC_STATUS_UNAVAILABLE);
    cr_assert(rig_send_data(&put, (uint8_t *)payload + RIG_BLOCK / 2, RIG_BLOCK - RIG_BLOCK / 2)); // what is in flight goes on
    peer_send_last(&put);
    size_t length;
    free(peer_receive(&put, &length));
    cr_assert_eq(peer_end(&put), GRPC_STATUS_OK, "%s", put.details);
    peer_free(&put);
    peer_daemon_stop(&rig.daemon); // ends the watch
    cr_assert_neq(peer_end(&watch), GRPC_STATUS_OK);
    peer_free(&watch);
    free(payload);
    rig_close(&rig);
}

static int check(rig_t *rig, const char *service, grpc_status_code *code) {
    Grpc__Health__V1__HealthCheckRequest request = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    request.service = (char *)(uintptr_t)service;
    Grpc__Health__V1__HealthCheckResponse *reply = peer_unary(rig->channel, "/grpc.health.v1.Health/Check", &request.base,
                                                              &grpc__health__v1__health_check_response__descriptor, code, NULL);
    int status = reply == NULL ? -1 : (int)reply->status;
    if (reply != NULL) {
        grpc__health__v1__health_check_response__free_unpacked(reply, NULL);
    }
    return status;
}

Test(rpc_health, check_knows_the_daemon_and_its_service) {
    rig_t rig;
    rig_open(&rig);
    grpc_status_code code;
    cr_assert_eq(check(&rig, "", &code), 1);
    cr_assert_eq(check(&rig, "balancekv.v1.BalanceKV", &code), 1);
    cr_assert_eq(check(&rig, "someone.Else", &code), -1);
    cr_assert_eq(code, GRPC_STATUS_NOT_FOUND);
    bkv_server_drain(rig.daemon.server);
    cr_assert_eq(check(&rig, "", &code), 2);
    cr_assert_eq(check(&rig, "balancekv.v1.BalanceKV", &code), 2);
    rig_close(&rig);
}

Test(rpc_health, watching_an_unknown_service_says_so_and_stays) {
    rig_t rig;
    rig_open(&rig);
    peer_call_t watch;
    peer_start(rig.channel, "/grpc.health.v1.Health/Watch", 0, &watch);
    peer_send(&watch, "\x0a\x04none", 6);
    peer_send_last(&watch);
    cr_assert_eq(watch_next(&watch), 3);
    peer_cancel(&watch);
    cr_assert_eq(peer_end(&watch), GRPC_STATUS_CANCELLED);
    peer_free(&watch);
    rig_close(&rig);
}
