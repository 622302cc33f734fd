// test_attach_session.c - Attach and Detach: what they ask of the transports, and what becomes of a session nobody heard of.
#include "rig.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static grpc_status_code detach(rig_t *rig, const void *session, size_t length, char text[256]) {
    Balancekv__V1__DetachRequest request = BALANCEKV__V1__DETACH_REQUEST__INIT;
    request.session = rig_bytes(session, length);
    grpc_status_code code;
    Balancekv__V1__DetachResponse *reply =
        peer_unary(rig->channel, "Detach", &request.base, &balancekv__v1__detach_response__descriptor, &code, text);
    cr_assert(reply == NULL || reply->boot_epoch == 4711);
    if (reply != NULL) {
        balancekv__v1__detach_response__free_unpacked(reply, NULL);
    }
    return code;
}

static Balancekv__V1__AttachResponse *attach(rig_t *rig, const Balancekv__V1__AttachRequest *request, grpc_status_code *code,
                                             char text[256]) {
    return peer_unary(rig->channel, "Attach", &request->base, &balancekv__v1__attach_response__descriptor, code, text);
}

Test(rpc_attach_session, sessions_come_and_go) {
    rig_t rig;
    rig_open_sharing(&rig);
    uint8_t first[BKV_SESSION_BYTES], second[BKV_SESSION_BYTES];
    char text[256];
    rig_attach(&rig, 4096, first);
    cr_assert(sharing_look(rig.config.transports).args.local);
    rig_attach(&rig, 8192, second);
    cr_assert_eq(sharing_sessions(rig.config.transports), 2);
    cr_assert_eq(detach(&rig, first, sizeof(first), text), GRPC_STATUS_OK, "%s", text);
    cr_assert_eq(detach(&rig, first, sizeof(first), text), GRPC_STATUS_FAILED_PRECONDITION);
    cr_assert_eq(detach(&rig, first, 15, text), GRPC_STATUS_INVALID_ARGUMENT);
    cr_assert_str_eq(text, "session: 15 bytes instead of 16");
    cr_assert_eq(sharing_sessions(rig.config.transports), 1);
    rig_close(&rig);
}

Test(rpc_attach_session, each_kind_of_window_reaches_its_transport) {
    rig_t rig;
    rig_open_sharing(&rig);
    bkv_transports_t *sharing = rig.config.transports;
    grpc_status_code code;
    char text[256];
    Balancekv__V1__AttachRequest request = BALANCEKV__V1__ATTACH_REQUEST__INIT;
    uint8_t gid[16] = {0xfe, 0x80}, uuid[16] = {3}, handle[64] = {5};
    Balancekv__V1__VerbsWindow verbs = BALANCEKV__V1__VERBS_WINDOW__INIT;
    verbs.queue_pair = 12, verbs.key = 34, verbs.address = 56, verbs.bytes = 78, verbs.gid = rig_bytes(gid, 16);
    request.verbs = &verbs;
    Balancekv__V1__AttachResponse *reply = attach(&rig, &request, &code, text);
    cr_assert_eq(code, GRPC_STATUS_OK, "%s", text);
    cr_assert(reply->verbs != NULL && reply->verbs->queue_pair == 7 && reply->verbs->reads == 3 && reply->verbs->gid.len == 16);
    balancekv__v1__attach_response__free_unpacked(reply, NULL);
    cr_assert(sharing_look(sharing).args.kind == BKV_TRANSPORT_VERBS && sharing_look(sharing).args.verbs.queue_pair == 12);
    cr_assert(sharing_look(sharing).args.verbs.gid[0] == 0xfe && sharing_look(sharing).args.verbs.bytes == 78 &&
              sharing_look(sharing).args.verbs.address == 56);

    Balancekv__V1__DeviceAllocation allocations[2] = {BALANCEKV__V1__DEVICE_ALLOCATION__INIT,
                                                      BALANCEKV__V1__DEVICE_ALLOCATION__INIT};
    Balancekv__V1__DeviceAllocation *pointers[2] = {&allocations[0], &allocations[1]};
    Balancekv__V1__DeviceWindow device = BALANCEKV__V1__DEVICE_WINDOW__INIT;
    allocations[0].handle = rig_bytes(handle, 64);
    allocations[0].bytes = allocations[1].bytes = 1 << 20;
    device.uuid = rig_bytes(uuid, 16), device.n_allocations = 2, device.allocations = pointers;
    request.verbs = NULL, request.cuda_ipc = &device;
    reply = attach(&rig, &request, &code, text);
    cr_assert_eq(code, GRPC_STATUS_OK, "%s", text);
    balancekv__v1__attach_response__free_unpacked(reply, NULL);
    cr_assert(sharing_look(sharing).args.kind == BKV_TRANSPORT_CUDA_IPC && sharing_look(sharing).args.allocation_count == 2 &&
              sharing_look(sharing).handle[0] == 5);
    rig_close(&rig);
}

Test(rpc_attach_session, an_attach_of_the_most_allocations_fits) {
    enum { MOST = BKV_DEVICE_ALLOCATIONS };
    rig_t rig;
    rig_open_sharing(&rig);
    static Balancekv__V1__DeviceAllocation allocations[MOST + 1], *pointers[MOST + 1];
    uint8_t handle[64] = {9}, uuid[16] = {0};
    for (int i = 0; i <= MOST; i++) {
        balancekv__v1__device_allocation__init(&allocations[i]);
        allocations[i].handle = rig_bytes(handle, 64);
        allocations[i].bytes = UINT64_MAX;
        pointers[i] = &allocations[i];
    }
    Balancekv__V1__DeviceWindow device = BALANCEKV__V1__DEVICE_WINDOW__INIT;
    Balancekv__V1__AttachRequest request = BALANCEKV__V1__ATTACH_REQUEST__INIT;
    device.uuid = rig_bytes(uuid, 16), device.n_allocations = MOST, device.allocations = pointers;
    request.cuda_ipc = &device;
    grpc_status_code code;
    char text[256];
    Balancekv__V1__AttachResponse *reply = attach(&rig, &request, &code, text);
    cr_assert_eq(code, GRPC_STATUS_OK, "%s", text);
    balancekv__v1__attach_response__free_unpacked(reply, NULL);
    cr_assert_eq(sharing_look(rig.config.transports).args.allocation_count, MOST);
    device.n_allocations = MOST + 1;
    cr_assert_null(attach(&rig, &request, &code, text));
    cr_assert_str_eq(text, "cuda_ipc.allocations: 16385 are not within 1..16384");
    rig_close(&rig);
}

Test(rpc_attach_session, what_the_transport_refuses_and_what_is_no_request) {
    rig_t rig;
    rig_open_sharing(&rig);
    Balancekv__V1__AttachRequest request = BALANCEKV__V1__ATTACH_REQUEST__INIT;
    grpc_status_code code;
    char text[256];
    cr_assert_null(attach(&rig, &request, &code, text));
    cr_assert_eq(code, GRPC_STATUS_INVALID_ARGUMENT);
    cr_assert_eq(strncmp(text, "request: exactly one of", 23), 0, "%s", text);
    Balancekv__V1__ShmWindow window = BALANCEKV__V1__SHM_WINDOW__INIT;
    request.shm = &window;
    cr_assert_null(attach(&rig, &request, &code, text));
    cr_assert_eq(code, GRPC_STATUS_INVALID_ARGUMENT);
    cr_assert_str_eq(text, "shm.bytes: 0");
    rig_close(&rig);
}

Test(rpc_attach_session, a_session_whose_client_gave_up_meanwhile_ends) {
    rig_t rig;
    rig_open_sharing(&rig);
    bkv_transports_t *sharing = rig.config.transports;
    Balancekv__V1__ShmWindow window = BALANCEKV__V1__SHM_WINDOW__INIT;
    Balancekv__V1__AttachRequest request = BALANCEKV__V1__ATTACH_REQUEST__INIT;
    window.bytes = 4096;
    request.shm = &window;
    uint8_t packed[64];
    size_t length = balancekv__v1__attach_request__pack(&request, packed);
    sharing_order(sharing, (sharing_orders_t){.late = true});
    peer_call_t call;
    peer_start(rig.channel, "Attach", 0, &call);
    peer_send(&call, packed, length);
    peer_send_last(&call);
    for (int i = 0; i < 500 && sharing_look(sharing).attached == 0; i++) {
        usleep(10000);
    }
    peer_cancel(&call);
    cr_assert_eq(peer_end(&call), GRPC_STATUS_CANCELLED);
    usleep(50000); // the daemon hears of it
    sharing_let_go(sharing);
    cr_assert(rig_reaches_open_calls(&rig, 0));
    cr_assert_eq(sharing_look(sharing).attached, 1);
    cr_assert_eq(sharing_sessions(sharing), 0);
    peer_free(&call);
    rig_close(&rig);
}

Test(rpc_attach_session, a_daemon_without_transports_says_so) {
    rig_t rig;
    rig_open(&rig);
    Balancekv__V1__ShmWindow window = BALANCEKV__V1__SHM_WINDOW__INIT;
    Balancekv__V1__AttachRequest request = BALANCEKV__V1__ATTACH_REQUEST__INIT;
    window.bytes = 4096;
    request.shm = &window;
    grpc_status_code code;
    char text[256];
    cr_assert_null(attach(&rig, &request, &code, text));
    cr_assert_eq(code, GRPC_STATUS_UNIMPLEMENTED);
    const uint8_t session[BKV_SESSION_BYTES] = {1};
    cr_assert_eq(detach(&rig, session, sizeof(session), text), GRPC_STATUS_UNIMPLEMENTED);
    Balancekv__V1__Place place = BALANCEKV__V1__PLACE__INIT;
    place.session = rig_bytes(session, sizeof(session));
    peer_call_t call;
    const uint32_t number = 1;
    rig_start_get_to(&rig, &number, 1, &place, &call);
    cr_assert_eq(peer_end(&call), GRPC_STATUS_FAILED_PRECONDITION);
    cr_assert_eq(strncmp(call.details, "place.session:", 14), 0, "%s", call.details);
    peer_free(&call);
    rig_close(&rig);
}

Test(rpc_attach_session, stats_and_open_say_what_is_on_offer) {
    rig_t rig;
    rig_open_sharing(&rig); // asserts of Open
    Balancekv__V1__StatsRequest request = BALANCEKV__V1__STATS_REQUEST__INIT;
    grpc_status_code code;
    Balancekv__V1__StatsResponse *reply =
        peer_unary(rig.channel, "Stats", &request.base, &balancekv__v1__stats_response__descriptor, &code, NULL);
    cr_assert_eq(code, GRPC_STATUS_OK);
    cr_assert(reply->n_transports == 2 && strcmp(reply->transports[0], "shm") == 0);
    cr_assert_str_eq(reply->transports[1], "inline");
    balancekv__v1__stats_response__free_unpacked(reply, NULL);
    rig_close(&rig);
}

Test(rpc_attach_session, who_comes_by_tcp_is_not_on_this_host) {
    rig_t rig;
    peer_daemon_init(&rig.daemon, &rig.config);
    rig.config.transports = sharing_create(rig.config.pipeline);
    rig.config.tcp = "127.0.0.1:0";
    rig_start(&rig);
    char target[64];
    snprintf(target, sizeof(target), "127.0.0.1:%d", bkv_server_port(rig.daemon.server));
    grpc_channel_destroy(rig.channel);
    rig.channel = peer_connect(target);
    Balancekv__V1__StatsRequest request = BALANCEKV__V1__STATS_REQUEST__INIT;
    grpc_status_code code;
    Balancekv__V1__StatsResponse *reply =
        peer_unary(rig.channel, "Stats", &request.base, &balancekv__v1__stats_response__descriptor, &code, NULL);
    cr_assert_eq(code, GRPC_STATUS_OK);
    cr_assert(reply->n_transports == 1 && strcmp(reply->transports[0], "inline") == 0);
    balancekv__v1__stats_response__free_unpacked(reply, NULL);
    uint8_t session[BKV_SESSION_BYTES];
    rig_attach(&rig, 4096, session); // the double does not mind
    cr_assert_not(sharing_look(rig.config.transports).args.local);
    rig_close(&rig);
}
