// herd.c - see herd.h.
#include "herd.h"

#include "proto/placement.h"

#include <arpa/inet.h>
#include <criterion/criterion.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void serve_check(fake_call_t *call, herd_daemon_t *daemon) {
    atomic_fetch_add(&daemon->checks, 1);
    fake_write_bytes(call, daemon->mood == HERD_DRAINS ? "\x08\x02" : "\x08\x01", 2); // NOT_SERVING, SERVING
    fake_finish(call, GRPC_STATUS_OK, "");
}

static void serve_unpin(fake_call_t *call, herd_daemon_t *daemon) {
    Balancekv__V1__UnpinRequest *request = fake_read(call, &balancekv__v1__unpin_request__descriptor);
    Balancekv__V1__UnpinResponse response = BALANCEKV__V1__UNPIN_RESPONSE__INIT;
    atomic_fetch_add(&daemon->unpins, 1);
    response.boot_epoch = daemon->epoch;
    bool known = request != NULL && request->lease == daemon->lease;
    if (known) {
        fake_write(call, &response.base);
    }
    fake_finish(call, known ? GRPC_STATUS_OK : GRPC_STATUS_NOT_FOUND, known ? "" : "lease: not known");
    balancekv__v1__unpin_request__free_unpacked(request, NULL);
}

static void serve_cluster(fake_call_t *call, herd_daemon_t *daemon) {
    const herd_t *herd = daemon->herd;
    atomic_fetch_add(&daemon->clusters, 1);
    if (herd->replicas == 0) {
        fake_finish(call, GRPC_STATUS_FAILED_PRECONDITION, "cluster: this daemon runs alone");
        return;
    }
    char ids[HERD_MOST][16];
    char *addresses[HERD_MOST];
    Balancekv__V1__ClusterMember members[HERD_MOST], *list[HERD_MOST];
    Balancekv__V1__ClusterResponse response = BALANCEKV__V1__CLUSTER_RESPONSE__INIT;
    uint32_t count = herd->members;
    for (uint32_t i = 0; i < count; i++) {
        snprintf(ids[i], sizeof ids[i], "n%u", i);
        addresses[i] = (char *)herd->daemons[i].endpoint;
        balancekv__v1__cluster_member__init(&members[i]);
        members[i].id = ids[i];
        members[i].weight = 1;
        members[i].addresses = &addresses[i];
        members[i].n_addresses = 1;
        list[i] = &members[i];
    }
    response.self = ids[daemon - herd->daemons];
    response.state = (char *)"member";
    response.view = herd->view;
    response.seed = herd->seed;
    response.replicas = herd->replicas;
    response.members = list;
    response.n_members = count;
    response.boot_epoch = daemon->epoch;
    fake_write(call, &response.base);
    fake_finish(call, GRPC_STATUS_OK, "");
}

// Counts keys, and those whose first owner is another daemon. Owners are raced for here and now.
static void count_keys(herd_daemon_t *daemon, const ProtobufCBinaryData *keys, size_t count) {
    const herd_t *herd = daemon->herd;
    bkv_placement_member_t members[HERD_MOST];
    bkv_placement_t *placement = NULL;
    memset(members, 0, sizeof members);
    for (uint32_t i = 0; i < herd->members; i++) {
        snprintf(members[i].id, sizeof members[i].id, "n%u", i);
        members[i].weight = 1;
    }
    bkv_placement_config_t config = {
        .members = members, .count = herd->members, .replicas = herd->replicas, .seed = herd->seed};
    atomic_fetch_add(&daemon->keys, (unsigned)count);
    if (herd->replicas == 0) {
        return;
    }
    cr_assert(bkv_placement_create(&config, NULL, &placement, NULL) == BKV_OK);
    for (size_t i = 0; i < count; i++) {
        uint16_t owners[BKV_REPLICAS_MAX];
        bkv_key_t key;
        memcpy(key.bytes, keys[i].data, BKV_KEY_BYTES);
        bkv_placement_owners(placement, &key, owners);
        atomic_fetch_add(&daemon->strays, owners[0] != daemon - herd->daemons);
    }
    bkv_placement_destroy(placement);
}

// As fake_lookup.
static void serve_lookup(fake_call_t *call, herd_daemon_t *daemon) {
    Balancekv__V1__LookupRequest *request = fake_read(call, &balancekv__v1__lookup_request__descriptor);
    if (request == NULL) {
        fake_finish(call, GRPC_STATUS_CANCELLED, "gone");
        return;
    }
    Balancekv__V1__LookupResponse response = BALANCEKV__V1__LOOKUP_RESPONSE__INIT;
    Balancekv__V1__KeyState *states = calloc(request->n_keys + 1, sizeof *states);
    for (size_t i = 0; i < request->n_keys; i++) {
        bool resident = request->keys[i].data[0] % 2 == 0;
        states[i] = resident ? BALANCEKV__V1__KEY_STATE__KEY_RESIDENT : BALANCEKV__V1__KEY_STATE__KEY_ABSENT;
    }
    count_keys(daemon, request->keys, request->n_keys);
    response.n_states = request->n_keys;
    response.states = states;
    response.boot_epoch = daemon->epoch;
    fake_write(call, &response.base);
    fake_finish(call, GRPC_STATUS_OK, "");
    free(states);
    balancekv__v1__lookup_request__free_unpacked(request, NULL);
}

static void serve_get(fake_call_t *call, herd_daemon_t *daemon) {
    Balancekv__V1__GetRequest *request = fake_read(call, &balancekv__v1__get_request__descriptor);
    atomic_fetch_add(&daemon->gets, 1);
    bool all = request != NULL;
    if (request != NULL) {
        count_keys(daemon, request->keys, request->n_keys);
    }
    for (size_t i = 0; request != NULL && i < request->n_keys; i++) {
        bkv_key_t key;
        size_t length;
        memcpy(key.bytes, request->keys[i].data, BKV_KEY_BYTES);
        if (key.bytes[0] % 2 != 0) { // as in fake_lookup: not resident
            Balancekv__V1__RecordChunk chunk = BALANCEKV__V1__RECORD_CHUNK__INIT;
            chunk.index = (uint32_t)i;
            chunk.code = GRPC_STATUS_NOT_FOUND;
            chunk.message = (char *)"key: not here";
            fake_write(call, &chunk.base);
            all = false;
            continue;
        }
        void *record = fake_record(&key, 16, &length);
        fake_chunk(call, (uint32_t)i, &key, length, record, length);
        free(record);
    }
    fake_finish(call, all ? GRPC_STATUS_OK : GRPC_STATUS_NOT_FOUND, all ? "" : "key: not here");
    balancekv__v1__get_request__free_unpacked(request, NULL);
}

static void serve_known(fake_call_t *call, herd_daemon_t *daemon) {
    if (fake_is(call, "Open")) {
        atomic_fetch_add(&daemon->opens, 1);
        daemon->forgets = false;
        fake_open(call, daemon->epoch);
    } else if (fake_is(call, "Unpin")) {
        serve_unpin(call, daemon);
    } else if (fake_is(call, "Cluster")) {
        serve_cluster(call, daemon);
    } else if (daemon->forgets) {
        fake_finish(call, GRPC_STATUS_NOT_FOUND, "spec_id: not known");
    } else if (fake_is(call, "Lookup")) {
        serve_lookup(call, daemon);
    } else if (fake_is(call, "Put")) {
        atomic_fetch_add(&daemon->puts, 1);
        fake_put(call, daemon->epoch);
    } else if (fake_is(call, "Get")) {
        serve_get(call, daemon);
    }
}

static void serve(fake_call_t *call, void *user) {
    herd_daemon_t *daemon = user;
    unsigned lookup = atomic_fetch_add(&daemon->lookups, fake_is(call, "Lookup")) + 1;
    if (daemon->relents != 0 && lookup >= daemon->relents) {
        daemon->mood = HERD_SERVES;
    }
    while (daemon->mood == HERD_MUTE) {
        usleep(1000);
    }
    if (fake_is(call, "Check")) {
        serve_check(call, daemon);
        return;
    }
    while (daemon->mood == HERD_WORKS && !fake_is(call, "Open")) {
        usleep(1000);
    }
    if (daemon->mood == HERD_DRAINS) {
        fake_finish(call, GRPC_STATUS_UNAVAILABLE, "the daemon is draining; try another or come back");
    } else if (daemon->mood == HERD_BUSY && !fake_is(call, "Open")) {
        fake_finish(call, GRPC_STATUS_UNAVAILABLE, "1024 calls are in flight, limits.max_calls; retry after a pause");
    } else {
        serve_known(call, daemon);
    }
}

// A port that was free a moment ago.
static int free_port(void) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    cr_assert(fd >= 0 && bind(fd, (struct sockaddr *)&address, sizeof address) == 0);
    cr_assert(getsockname(fd, (struct sockaddr *)&address, &length) == 0);
    close(fd);
    return ntohs(address.sin_port);
}

void herd_make(herd_t *herd, uint32_t count, bool tcp) {
    cr_assert(count <= HERD_MOST);
    memset(herd, 0, sizeof *herd);
    herd->count = count;
    for (uint32_t i = 0; i < count; i++) {
        herd_daemon_t *daemon = &herd->daemons[i];
        fake_place_make(&daemon->place);
        daemon->epoch = 11 + i;
        daemon->herd = herd;
        daemon->forgets = true;
        if (tcp) {
            snprintf(daemon->endpoint, sizeof daemon->endpoint, "127.0.0.1:%d", free_port());
        } else {
            strcpy(daemon->endpoint, daemon->place.endpoint);
        }
        strcat(strcat(herd->endpoints, i > 0 ? "," : ""), daemon->endpoint);
    }
}

void herd_start(herd_t *herd, uint32_t number) {
    herd->daemons[number].server = fake_server_start(herd->daemons[number].endpoint, serve, &herd->daemons[number]);
}

void herd_stop(herd_t *herd, uint32_t number) {
    herd_daemon_t *daemon = &herd->daemons[number];
    if (daemon->server != NULL) {
        daemon->mood = HERD_SERVES; // lets go of those that wait
        fake_server_stop(daemon->server);
        daemon->server = NULL;
        daemon->forgets = true;
    }
}

void herd_end(herd_t *herd) {
    for (uint32_t i = 0; i < herd->count; i++) {
        herd_stop(herd, i);
        fake_place_remove(&herd->daemons[i].place);
    }
}

bkv_client_t *herd_client(const herd_t *herd, uint32_t timeout_ms) {
    bkv_client_t *client = NULL;
    bkv_error_t err = {0};
    bkv_client_options_t options = {.endpoint = herd->endpoints, .timeout_ms = timeout_ms, .transport = "inline"};
    cr_assert(bkv_client_create(&options, &client, &err) == BKV_OK, "%s", err.message);
    return client;
}
