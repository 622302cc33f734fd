// fuzz_fd.c - the fd socket's messages as hostile local clients may send them, to a real daemon's transports.
//
// The input is a series of turns of several peers: a byte says which peer speaks, whether it disconnects first, whether it sends
// a descriptor along and whether the session's name is a real one; a byte is the length; then the message. Whatever they say,
// no session is held twice, no descriptor stays, and an answer is one of ours.
#include "daemon/transport/session.h"

#include <assert.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define PEERS    4
#define SESSIONS 3
#define WINDOW   UINT64_C(65536)

typedef struct world {
    bkv_transports_t *transports;
    bkv_session_id_t sessions[SESSIONS];
    bkv_fd_peer_t peers[PEERS];
    int first; // descriptor that a new one gets while none is kept
} world_t;

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static uint64_t now_ms(void) {
    return 1;
}

// Once for all inputs: sessions are what each begins and ends itself.
static bkv_transports_t *open_transports(void) {
    char folder[] = "/tmp/bkv-fuzz-XXXXXX", path[64];
    bkv_store_t *store = NULL;
    bkv_pipeline_t *pipeline = NULL;
    bkv_transports_t *transports = NULL;
    const bkv_store_config_t arena = {.arena_bytes = 1 << 20, .slab_bytes = 65536, .arena_fd = -1};
    if (mkdtemp(folder) == NULL || bkv_store_create(&arena, 1, &store, NULL, NULL) != BKV_OK) {
        abort();
    }
    const bkv_pipeline_config_t compute = {.store = store,
                                           .backend = bkv_backend_get("ref"),
                                           .compute_threads = 1,
                                           .max_jobs = 1,
                                           .staging_bytes = 65536,
                                           .max_block_bytes = 65536,
                                           .max_specs = 1,
                                           .max_batch = 1,
                                           .now_ms = now_ms};
    snprintf(path, sizeof(path), "%s/d.sock", folder);
    if (bkv_pipeline_create(&compute, &pipeline, NULL) != BKV_OK) {
        abort();
    }
    const bkv_transports_config_t config = {.pipeline = pipeline,
                                            .store = store,
                                            .socket_path = path,
                                            .socket_mode = 0600,
                                            .max_sessions = SESSIONS,
                                            .idle_ms = 1,
                                            .shm_bytes = SESSIONS * WINDOW,
                                            .shm_window = WINDOW,
                                            .verbs_device = "off",
                                            .verbs_gid = -1,
                                            .verbs_sessions = 1,
                                            .now_ms = now_ms};
    if (bkv_transports_create(&config, &transports, NULL) != BKV_OK) {
        abort();
    }
    return transports;
}

// The lowest free descriptor from `least` on.
static int free_descriptor(int least) {
    int fd = fcntl(STDERR_FILENO, F_DUPFD_CLOEXEC, least);
    assert(fd >= 0);
    close(fd);
    return fd;
}

static void world_begin(world_t *world) {
    static bkv_transports_t *transports;
    if (transports == NULL) {
        transports = open_transports();
    }
    *world = (world_t){.transports = transports};
    for (size_t i = 0; i < SESSIONS; i++) {
        const bkv_attach_args_t args = {.kind = BKV_TRANSPORT_SHM, .local = true, .bytes = WINDOW};
        bkv_attach_result_t result;
        if (bkv_session_attach(transports, &args, &result, NULL) != BKV_OK) {
            abort(); // an earlier input's session was left behind
        }
        world->sessions[i] = result.id;
    }
    world->first = free_descriptor(0);
}

static void disconnect(world_t *world, bkv_fd_peer_t *peer) {
    if (peer->named) {
        bkv_session_lose(world->transports, &peer->session);
        assert(!bkv_session_alive(world->transports, &peer->session));
    }
    *peer = (bkv_fd_peer_t){.named = false};
}

// No two peers hold the same session.
static void check_holders(const world_t *world) {
    for (size_t i = 0; i < PEERS; i++) {
        for (size_t j = 0; j < i; j++) {
            assert(!world->peers[i].named || !world->peers[j].named ||
                   memcmp(&world->peers[i].session, &world->peers[j].session, sizeof(bkv_session_id_t)) != 0);
        }
    }
}

static void speak(world_t *world, bkv_fd_peer_t *peer, const uint8_t *bytes, size_t length, int fd) {
    bkv_fd_answer_t answer;
    bool goes_on = bkv_fd_handle(world->transports, peer, bytes, length, fd, &answer);
    assert(answer.message.magic == BKV_FD_MAGIC || (answer.message.magic == 0 && !goes_on));
    assert(memchr(answer.message.message, '\0', sizeof(answer.message.message)) != NULL);
    assert(answer.fd < 0 || (answer.session != NULL && answer.message.status == BKV_OK && answer.message.op == BKV_FD_TAKE));
    bkv_fd_answer_release(&answer);
    if (!goes_on) {
        disconnect(world, peer);
    }
    check_holders(world);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    world_t world;
    world_begin(&world);
    while (size >= 2) {
        uint8_t turn = data[0];
        size_t length = data[1] < size - 2 ? data[1] : size - 2;
        uint8_t message[UINT8_MAX];
        memcpy(message, data + 2, length);
        bkv_fd_peer_t *peer = &world.peers[turn % PEERS];
        if ((turn & 4) != 0) {
            disconnect(&world, peer);
        }
        if ((turn & 8) == 0 && length >= 24) {
            memcpy(message + 8, &world.sessions[(turn >> 5) % SESSIONS], sizeof(world.sessions[0]));
        }
        speak(&world, peer, message, length, (turn & 16) != 0 ? open("/dev/null", O_RDONLY | O_CLOEXEC) : -1);
        data += 2 + length;
        size -= 2 + length;
    }
    for (size_t i = 0; i < PEERS; i++) {
        disconnect(&world, &world.peers[i]);
    }
    for (size_t i = 0; i < SESSIONS; i++) {
        bkv_session_detach(world.transports, &world.sessions[i], NULL, NULL, NULL);
    }
    assert(free_descriptor(world.first) == world.first); // whatever came was closed
    return 0;
}
