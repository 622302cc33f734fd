// test_call.c - what holds for every call: known methods, message sizes, deadlines, how many at once.
#include "rig.h"

#include "daemon/observe/clock.h"
#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

Test(rpc_call, unknown_methods_and_oversized_messages_are_refused) {
    rig_t rig;
    rig_open(&rig);
    Balancekv__V1__StatsRequest request = BALANCEKV__V1__STATS_REQUEST__INIT;
    grpc_status_code code;
    char text[256];
    cr_assert_null(peer_unary(rig.channel, "Explode", &request.base, &balancekv__v1__stats_response__descriptor, &code, text));
    cr_assert_eq(code, GRPC_STATUS_UNIMPLEMENTED);
    cr_assert_not_null(strstr(text, "Explode"));
    peer_call_t call;
    size_t length = 9 << 20;
    uint8_t *junk = calloc(1, length);
    peer_start(rig.channel, "Put", 0, &call);
    peer_send(&call, junk, length);
    cr_assert_eq(peer_end(&call), GRPC_STATUS_RESOURCE_EXHAUSTED);
    peer_free(&call);
    free(junk);
    cr_assert_null(rig_lookup(&rig, 0, 65, &code, text));
    cr_assert_eq(code, GRPC_STATUS_RESOURCE_EXHAUSTED);
    cr_assert_eq(strncmp(text, "keys: 65", 8), 0, "%s", text);
    rig_close(&rig);
}

Test(rpc_call, every_call_ends_by_op_timeout) {
    rig_t rig;
    rig_open(&rig);
    bkv_server_set_op_timeout(rig.daemon.server, 300);
    peer_call_t call;
    peer_start(rig.channel, "Put", 0, &call); // and then says nothing
    uint64_t start_ms = bkv_now_ms();
    cr_assert_eq(peer_end(&call), GRPC_STATUS_DEADLINE_EXCEEDED, "%d %s", (int)call.code, call.details);
    cr_assert_lt(bkv_now_ms() - start_ms, 5000);
    peer_free(&call);
    rig_close(&rig);
}

Test(rpc_call, max_calls_holds_but_not_for_health_and_stats) {
    rig_t rig;
    peer_daemon_init(&rig.daemon, &rig.config);
    rig.config.max_calls = 2;
    rig_start(&rig);
    peer_call_t calls[2];
    for (int i = 0; i < 2; i++) {
        peer_start(rig.channel, "Put", 0, &calls[i]);
    }
    cr_assert(rig_reaches_open_calls(&rig, 2));
    grpc_status_code code;
    char text[256];
    cr_assert_null(rig_lookup(&rig, 0, 1, &code, text));
    cr_assert_eq(code, GRPC_STATUS_UNAVAILABLE);
    cr_assert_not_null(strstr(text, "max_calls"), "%s", text);
    Balancekv__V1__StatsRequest request = BALANCEKV__V1__STATS_REQUEST__INIT;
    Balancekv__V1__StatsResponse *stats =
        peer_unary(rig.channel, "Stats", &request.base, &balancekv__v1__stats_response__descriptor, &code, text);
    cr_assert_not_null(stats);
    cr_assert(strcmp(stats->version, "1.2.3") == 0 && stats->boot_epoch == 4711 && !stats->draining);
    balancekv__v1__stats_response__free_unpacked(stats, NULL);
    for (int i = 0; i < 2; i++) {
        peer_cancel(&calls[i]);
        peer_free(&calls[i]);
    }
    rig_close(&rig);
}
