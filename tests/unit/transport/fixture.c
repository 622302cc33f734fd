// fixture.c - see fixture.h.
#include "fixture.h"

#include <criterion/criterion.h>
#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

static _Atomic uint64_t clock_ms = 1000000;

uint64_t fixture_now(void) {
    return atomic_load(&clock_ms);
}

void fixture_advance(uint64_t ms) {
    atomic_fetch_add(&clock_ms, ms);
}

static void open_pipeline(fixture_t *fixture, uint32_t max_jobs) {
    bkv_error_t err;
    const bkv_store_config_t store = {.arena_bytes = 64 << 20, .slab_bytes = 8 << 20, .arena_fd = -1};
    cr_assert_eq(bkv_store_create(&store, fixture_now(), &fixture->store, NULL, &err), BKV_OK, "%s", err.message);
    const bkv_pipeline_config_t pipeline = {
        .store = fixture->store,
        .backend = bkv_backend_get("ref"),
        .compute_threads = 2,
        .max_jobs = max_jobs,
        .staging_bytes = 8 << 20,
        .max_block_bytes = 8 << 20,
        .max_specs = 4,
        .max_batch = 16,
        .now_ms = fixture_now,
    };
    cr_assert_eq(bkv_pipeline_create(&pipeline, &fixture->pipeline, &err), BKV_OK, "%s", err.message);
    fixture->model = (bkv_model_t){
        .name = "test",
        .shape = {.layers = 2, .heads = 2, .tokens = FIXTURE_TOKENS, .key_dim = 32, .value_dim = 16, .dtype = BKV_FP32},
        .params = {.codec = BKV_CODEC_RAW, .sink = 4, .seed = 11},
    };
    cr_assert_eq(bkv_model_complete(&fixture->model, &err), BKV_OK, "%s", err.message);
    cr_assert_eq(bkv_model_table_add(bkv_pipeline_models(fixture->pipeline), &fixture->model, &err), BKV_OK);
}

void fixture_open(fixture_t *fixture, uint32_t max_jobs) {
    bkv_error_t err;
    *fixture = (fixture_t){.folder = "/tmp/bkv-transport-XXXXXX"};
    cr_assert_not_null(mkdtemp(fixture->folder));
    snprintf(fixture->socket, sizeof(fixture->socket), "%s/d.sock", fixture->folder);
    snprintf(fixture->fd_socket, sizeof(fixture->fd_socket), "%s" BKV_FD_SUFFIX, fixture->socket);
    open_pipeline(fixture, max_jobs);
    fixture->config = (bkv_transports_config_t){
        .pipeline = fixture->pipeline,
        .store = fixture->store,
        .socket_path = fixture->socket,
        .socket_mode = 0600,
        .max_sessions = 16,
        .idle_ms = 1000,
        .shm_bytes = FIXTURE_SHM,
        .shm_window = FIXTURE_WINDOW,
        .verbs_device = "off",
        .verbs_gid = -1,
        .verbs_sessions = 1,
        .now_ms = fixture_now,
    };
    cr_assert_eq(bkv_transports_create(&fixture->config, &fixture->transports, &err), BKV_OK, "%s", err.message);
}

void fixture_close(fixture_t *fixture) {
    bkv_transports_destroy(fixture->transports);
    bkv_pipeline_metrics_t metrics;
    cr_assert(bkv_pipeline_wait_idle(fixture->pipeline, 60000));
    bkv_pipeline_metrics(fixture->pipeline, &metrics);
    cr_assert_eq(metrics.staging_bytes, 0);
    cr_assert_eq(fixture_pinned(fixture), 0);
    bkv_pipeline_destroy(fixture->pipeline);
    bkv_store_destroy(fixture->store);
    char lock[128];
    snprintf(lock, sizeof(lock), "%s.lock", fixture->fd_socket);
    unlink(lock);
    cr_assert_eq(rmdir(fixture->folder), 0, "the socket is gone, and nothing else was left");
}

bkv_transport_metrics_t fixture_metrics(fixture_t *fixture) {
    bkv_transport_metrics_t metrics;
    bkv_transports_metrics(fixture->transports, &metrics);
    return metrics;
}

uint64_t fixture_pinned(fixture_t *fixture) {
    bkv_store_metrics_t metrics;
    bkv_store_metrics(fixture->store, &metrics);
    return metrics.pinned;
}

size_t open_descriptors(void) {
    DIR *folder = opendir("/proc/self/fd");
    cr_assert_not_null(folder);
    size_t count = 0;
    while (readdir(folder) != NULL) {
        count++;
    }
    closedir(folder);
    return count;
}

// ---- sessions and blocks ----

bkv_session_id_t fixture_attach(fixture_t *fixture, uint64_t bytes) {
    bkv_error_t err;
    bkv_attach_result_t result;
    const bkv_attach_args_t args = {.kind = BKV_TRANSPORT_SHM, .local = true, .bytes = bytes};
    cr_assert_eq(bkv_session_attach(fixture->transports, &args, &result, &err), BKV_OK, "%s", err.message);
    cr_assert_eq(result.bytes, bytes);
    return result.id;
}

bkv_session_t *fixture_find(fixture_t *fixture, const bkv_session_id_t *id) {
    bkv_error_t err;
    bkv_session_t *session = NULL;
    cr_assert_eq(bkv_session_find(fixture->transports, id, &session, &err), BKV_OK, "%s", err.message);
    return session;
}

uint64_t fixture_fill(const fixture_t *fixture, uint32_t tokens, uint32_t seed, void *to) {
    bkv_shape_t shape = fixture->model.shape;
    shape.tokens = tokens;
    uint64_t bytes = bkv_shape_bytes(&shape);
    float *values = to;
    for (uint64_t i = 0; i < bytes / sizeof(float); i++) {
        seed = seed * 1664525u + 1013904223u;
        values[i] = (float)(int32_t)seed * 0x1p-30f;
    }
    return bytes;
}

bkv_ingest_t *fixture_begin(fixture_t *fixture, uint32_t key, uint32_t tokens, bkv_codec_t codec) {
    bkv_shape_t shape = fixture->model.shape;
    shape.tokens = tokens;
    bkv_ingest_args_t args = {
        .spec_id = fixture->model.id, .tokens = tokens, .payload_bytes = bkv_shape_bytes(&shape), .codec = codec};
    memcpy(args.key.bytes, &key, sizeof(key));
    bkv_error_t err;
    bkv_ingest_t *ingest = NULL;
    cr_assert_eq(bkv_ingest_begin(fixture->pipeline, &args, fixture_now(), &ingest, &err), BKV_OK, "%s", err.message);
    return ingest;
}

void fixture_put(fixture_t *fixture, uint32_t key, uint32_t tokens) {
    bkv_ingest_t *ingest = fixture_begin(fixture, key, tokens, BKV_CODEC_RAW);
    uint64_t bytes = bkv_ingest_bytes(ingest);
    void *payload = malloc(bytes);
    fixture_fill(fixture, tokens, key, payload);
    outcome_t outcome;
    outcome_init(&outcome);
    cr_assert_eq(bkv_ingest_write(ingest, payload, bytes, NULL), BKV_OK);
    cr_assert_eq(bkv_ingest_commit(ingest, outcome_put_done, &outcome, NULL), BKV_OK);
    outcome_wait(&outcome);
    cr_assert_eq(outcome.error.status, BKV_OK, "%s", outcome.error.message);
    free(payload);
}

bkv_delivery_t fixture_deliver(fixture_t *fixture, uint32_t key) {
    bkv_key_t name = {.bytes = {0}};
    memcpy(name.bytes, &key, sizeof(key));
    const bkv_deliver_range_t all = {0};
    bkv_delivery_t delivery;
    bkv_error_t err;
    cr_assert_eq(bkv_deliver_unverified(fixture->pipeline, &fixture->model.id, &name, &all, fixture_now(), &delivery, &err),
                 BKV_OK, "%s", err.message);
    return delivery;
}

// ---- callbacks and jobs ----

void outcome_init(outcome_t *outcome) {
    *outcome = (outcome_t){.error = {.status = BKV_OK}};
    sem_init(&outcome->called, 0, 0);
}

void outcome_wait(outcome_t *outcome) {
    while (sem_wait(&outcome->called) != 0) {
    }
}

void outcome_put_done(void *user, const bkv_error_t *error, const bkv_ingest_result_t *result) {
    outcome_t *outcome = user;
    outcome->put = *result;
    outcome_delivered(user, error);
}

void outcome_delivered(void *user, const bkv_error_t *error) {
    outcome_t *outcome = user;
    outcome->error = *error;
    sem_post(&outcome->called);
}

static void blocker_run(bkv_job_t *job, bkv_scratch_t *scratch) {
    (void)scratch;
    blocker_t *blocker = (blocker_t *)job;
    sem_post(&blocker->running);
    while (sem_wait(&blocker->release) != 0) {
    }
}

static void blocker_cancel(bkv_job_t *job) {
    (void)job;
}

void blocker_start(blocker_t *blocker, fixture_t *fixture) {
    *blocker = (blocker_t){.job = {.run = blocker_run, .cancel = blocker_cancel}};
    sem_init(&blocker->running, 0, 0);
    sem_init(&blocker->release, 0, 0);
    cr_assert_eq(bkv_pipeline_submit(fixture->pipeline, &blocker->job, NULL), BKV_OK);
    while (sem_wait(&blocker->running) != 0) {
    }
}

// ---- the client's end of the fd socket ----

int peer_connect(const fixture_t *fixture) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof(address.sun_path), "%s", fixture->fd_socket);
    int peer = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    cr_assert_geq(peer, 0);
    const struct timeval patience = {.tv_sec = 5};
    setsockopt(peer, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
    cr_assert_eq(connect(peer, (const struct sockaddr *)&address, sizeof(address)), 0);
    return peer;
}

bkv_fd_message_t peer_message(bkv_fd_op_t op, const bkv_session_id_t *id) {
    bkv_fd_message_t message = {.magic = BKV_FD_MAGIC, .op = op};
    memcpy(message.session, id->bytes, sizeof(message.session));
    return message;
}

void peer_send(int peer, const void *bytes, size_t length, const int *fds, size_t count) {
    struct iovec part = {.iov_base = (void *)(uintptr_t)bytes, .iov_len = length};
    union {
        char room[CMSG_SPACE(8 * sizeof(int))];
        struct cmsghdr align;
    } control = {.room = {0}};
    struct msghdr header = {.msg_iov = &part, .msg_iovlen = 1};
    if (count > 0) {
        header.msg_control = control.room;
        header.msg_controllen = CMSG_SPACE(count * sizeof(int));
        struct cmsghdr *first = CMSG_FIRSTHDR(&header);
        *first = (struct cmsghdr){.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(count * sizeof(int))};
        memcpy(CMSG_DATA(first), fds, count * sizeof(int));
    }
    cr_assert_eq(sendmsg(peer, &header, MSG_NOSIGNAL), (ssize_t)length);
}

bool peer_receive(int peer, bkv_fd_message_t *answer, int *fd) {
    struct iovec part = {.iov_base = answer, .iov_len = sizeof(*answer)};
    union {
        char room[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control;
    struct msghdr header = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = control.room, .msg_controllen = sizeof(control.room)};
    ssize_t length = recvmsg(peer, &header, MSG_CMSG_CLOEXEC);
    *fd = -1;
    if (length <= 0) {
        cr_assert(length == 0 || errno == ECONNRESET, "neither an answer nor an end within 5 s");
        return false;
    }
    cr_assert_eq(length, (ssize_t)sizeof(*answer));
    cr_assert_eq(answer->magic, BKV_FD_MAGIC);
    struct cmsghdr *first = CMSG_FIRSTHDR(&header);
    if (first != NULL) {
        memcpy(fd, CMSG_DATA(first), sizeof(*fd));
    }
    return true;
}

int peer_take(const fixture_t *fixture, const bkv_session_id_t *id, uint64_t bytes, uint8_t **window) {
    int peer = peer_connect(fixture), fd;
    const bkv_fd_message_t request = peer_message(BKV_FD_TAKE, id);
    bkv_fd_message_t answer;
    peer_send(peer, &request, sizeof(request), NULL, 0);
    cr_assert(peer_receive(peer, &answer, &fd));
    cr_assert_eq(answer.status, BKV_OK, "%s", answer.message);
    cr_assert_eq(answer.bytes, bytes);
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    cr_assert_neq(memory, MAP_FAILED);
    close(fd);
    *window = memory;
    return peer;
}
