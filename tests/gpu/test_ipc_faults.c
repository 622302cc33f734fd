// test_ipc_faults.c - CUDA IPC when something goes wrong: what no client of ours would say, workers that die, a daemon that is
// restarted; and that a thousand blocks leave nothing behind. The daemon lives through all of it.
//
// It runs itself again as the worker that is to die: test_ipc_faults --worker export|put ENDPOINT.
#include "ipc_rig.h"

#include "client/device/device.h"

#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MEMORY ((size_t)64 << 20)
#define TOKENS 256

static const bkv_shape_t shape = {4, 8, TOKENS, 128, 128, BKV_BF16};

typedef struct world {
    ipc_daemon_t daemon;
    bkv_client_t *client;
    bkv_spec_id_t spec;
    uint8_t *memory; // MEMORY bytes of random numbers
    uint32_t next_key;
} world_t;

static void sleep_ms(long ms) {
    nanosleep(&(struct timespec){.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000}, NULL);
}

static bkv_spec_id_t open_spec(bkv_client_t *client) {
    const bkv_spec_t spec = {.model = "gpu-ipc-faults",
                             .layers = shape.layers,
                             .kv_heads = shape.heads,
                             .key_dim = shape.key_dim,
                             .dtype = shape.dtype,
                             .block_tokens = TOKENS,
                             .codec = BKV_CODEC_DENSE4};
    bkv_spec_id_t id;
    bkv_error_t err = {0};
    REQUIRE(bkv_open(client, &spec, 0, &id, NULL, &err) == BKV_OK, "open: %s", err.message);
    return id;
}

static uint8_t *random_memory(void) {
    uint8_t *memory = ipc_memory(MEMORY);
    uint16_t *host = malloc(MEMORY);
    draw_t draw = {41};
    for (size_t i = 0; i < MEMORY / 2; i++) {
        host[i] = i < 65536 ? bkv_float_to_bf16((float)draw_gauss(&draw)) : host[i - 65536];
    }
    device_put(memory, host, MEMORY);
    free(host);
    return memory;
}

typedef struct block {
    const void *keys[4], *values[4];
    bkv_device_put_t put;
} block_t;

// A payload at `memory`.
static void block_make(block_t *block, const uint8_t *memory, const bkv_spec_id_t *spec, uint32_t number) {
    size_t head = (size_t)TOKENS * shape.key_dim * 2, tensor = head * shape.heads;
    *block = (block_t){.put = {.tokens = TOKENS}};
    for (uint32_t layer = 0; layer < shape.layers; layer++) {
        block->keys[layer] = memory + 2 * layer * tensor;
        block->values[layer] = memory + (2 * layer + 1) * tensor;
    }
    block->put.layout = (bkv_kv_layout_t){
        .keys = block->keys, .values = block->values, .token_stride = shape.key_dim * 2u, .head_stride = head};
    bkv_key_next(spec, NULL, &number, 1, &block->put.key);
}

static bkv_device_t *share(bkv_client_t *client, const void *memory, size_t bytes) {
    bkv_device_t *shared = NULL;
    bkv_error_t err = {0};
    const bkv_device_range_t range = {memory, bytes};
    REQUIRE(bkv_device_share(client, 0, &range, 1, 0, &shared, &err) == BKV_OK, "share: %s", err.message);
    return shared;
}

static bkv_status_t put_one(world_t *world, bkv_device_t *shared, const uint8_t *memory, bkv_error_t *err) {
    block_t block;
    block_make(&block, memory, &world->spec, world->next_key++);
    return bkv_device_put(shared, &world->spec, &block.put, 1, NULL, 0, NULL, err);
}

// The daemon still does what it is for.
static void check_alive(world_t *world, const char *after) {
    bkv_error_t err = {0};
    bkv_device_t *shared = share(world->client, world->memory, MEMORY);
    bkv_status_t status = put_one(world, shared, world->memory, &err);
    check_that(status == BKV_OK, "after %s: %s", after, err.message);
    bkv_device_unshare(shared);
}

// ---- workers that die ----

static int worker_export(void) {
    uint8_t handle[BKV_GPU_HANDLE_BYTES];
    uint8_t *memory = ipc_memory(MEMORY);
    REQUIRE(bkv_gpu_export(memory, handle) == 0, "export");
    REQUIRE(write(1, handle, sizeof(handle)) == (ssize_t)sizeof(handle), "write");
    return 0; // and with the process goes the memory
}

// Submits blocks behind seconds of other work, says so, and waits to be killed.
static int worker_put(const char *endpoint) {
    const bkv_client_options_t options = {.endpoint = endpoint, .timeout_ms = 30000};
    bkv_client_t *client = NULL;
    bkv_queue_t *queue = NULL;
    bkv_error_t err = {0};
    enum { PUTS = 32 };
    static block_t blocks[PUTS];
    void *stream = NULL;
    REQUIRE(bkv_client_create(&options, &client, &err) == BKV_OK, "client: %s", err.message);
    REQUIRE(bkv_queue_create(client, PUTS, &queue, &err) == BKV_OK, "queue: %s", err.message);
    REQUIRE(bkv_gpu_stream_create(&stream) == 0, "stream");
    bkv_spec_id_t spec = open_spec(client);
    uint8_t *memory = random_memory();
    bkv_device_t *shared = share(client, memory, MEMORY);
    ipc_keep_busy(stream, 5);
    for (uint32_t i = 0; i < PUTS; i++) {
        block_make(&blocks[i], memory, &spec, 1000000 + i);
        void *on = i % 2 ? stream : NULL; // half of them can begin at once
        REQUIRE(bkv_device_put_submit(queue, i, shared, &spec, &blocks[i].put, 1, on, 0, NULL) == BKV_OK, "submit");
    }
    REQUIRE(write(1, "!", 1) == 1, "write");
    sleep_ms(60000);
    return 1;
}

// Starts this program as a worker; what it writes comes from *out.
static pid_t worker_start(const char *what, const char *endpoint, int *out) {
    int ends[2];
    REQUIRE(pipe(ends) == 0, "pipe: %s", strerror(errno));
    pid_t pid = fork();
    REQUIRE(pid >= 0, "fork: %s", strerror(errno));
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        dup2(ends[1], 1);
        execl("/proc/self/exe", "gpu-ipc_faults", "--worker", what, endpoint, (char *)NULL);
        _exit(127);
    }
    close(ends[1]);
    *out = ends[0];
    return pid;
}

static bool read_all(int fd, void *bytes, size_t length) {
    for (size_t at = 0; at < length;) {
        ssize_t got = read(fd, (uint8_t *)bytes + at, length - at);
        if (got <= 0) {
            return false;
        }
        at += (size_t)got;
    }
    return true;
}

static void test_killed_workers(world_t *world) {
    check_begin("ipc faults: workers killed with blocks under way");
    double lost = ipc_metric(world->client, "balancekv_sessions_lost_total");
    for (int i = 0; i < 3; i++) {
        int out;
        char byte;
        pid_t pid = worker_start("put", world->daemon.endpoint, &out);
        check_that(read_all(out, &byte, 1), "the worker did not come to its puts");
        sleep_ms(100 * i);
        kill(pid, SIGKILL);
        waitpid(pid, NULL, 0);
        close(out);
        check_that(ipc_metric_becomes(world->client, "balancekv_sessions", 0), "the dead worker's session stays");
        check_alive(world, "a worker's death");
    }
    check_that(ipc_metric(world->client, "balancekv_sessions_lost_total") == lost + 3, "not every loss was noticed");
}

// ---- what no client of ours says ----

static bkv_status_t ask(world_t *world, const uint8_t *handle, uint64_t bytes, bkv_error_t *err) {
    uint8_t uuid[BKV_GPU_UUID_BYTES];
    REQUIRE(bkv_gpu_uuid(0, uuid) == 0, "uuid");
    Balancekv__V1__DeviceAllocation allocation = BALANCEKV__V1__DEVICE_ALLOCATION__INIT, *list = &allocation;
    Balancekv__V1__DeviceWindow window = BALANCEKV__V1__DEVICE_WINDOW__INIT;
    Balancekv__V1__AttachRequest request = BALANCEKV__V1__ATTACH_REQUEST__INIT;
    Balancekv__V1__AttachResponse *response = NULL;
    allocation.handle = (ProtobufCBinaryData){.len = BKV_GPU_HANDLE_BYTES, .data = (uint8_t *)handle};
    allocation.bytes = bytes;
    window.uuid = (ProtobufCBinaryData){.len = sizeof(uuid), .data = uuid};
    window.n_allocations = 1;
    window.allocations = &list;
    request.cuda_ipc = &window;
    bkv_status_t status = bkv_client_session_ask(world->client->endpoints[0], &request, 10000, &response, err);
    if (status == BKV_OK) {
        bkv_client_session_end(world->client->endpoints[0], response->session.data, 1000);
        balancekv__v1__attach_response__free_unpacked(response, NULL);
    }
    return status;
}

static void test_handles(world_t *world) {
    check_begin("ipc faults: handles that are stale, garbage or say too much");
    bkv_error_t err = {0};
    uint8_t handle[BKV_GPU_HANDLE_BYTES];
    int out;
    pid_t pid = worker_start("export", world->daemon.endpoint, &out);
    check_that(read_all(out, handle, sizeof(handle)), "the worker exported nothing");
    waitpid(pid, NULL, 0);
    close(out);
    bkv_status_t status = ask(world, handle, MEMORY, &err);
    check_that(status == BKV_INVALID_ARGUMENT, "stale: status %d, %s", status, err.message);
    draw_t draw = {43};
    for (int i = 0; i < 50; i++) {
        uint8_t garbage[BKV_GPU_HANDLE_BYTES];
        for (size_t j = 0; j < sizeof(garbage); j++) {
            garbage[j] = i % 2 ? (uint8_t)(draw_unit(&draw) * 256) : handle[j]; // noise, or some bits of a real one
        }
        garbage[i % 64] ^= (uint8_t)(1 << i % 8);
        status = ask(world, garbage, MEMORY, &err);
        check_that(status == BKV_INVALID_ARGUMENT, "garbage %d: status %d, %s", i, status, err.message);
    }
    REQUIRE(bkv_gpu_export(world->memory, handle) == 0, "export");
    check_that(ask(world, handle, MEMORY, &err) == BKV_OK, "a good one: %s", err.message);
    check_that(ask(world, handle, MEMORY * 2, &err) == BKV_INVALID_ARGUMENT, "twice the bytes are taken");
    check_alive(world, "bad handles");
}

// The library is made to believe that it shares more than it does, so that it sends what it should refuse itself.
static void test_layouts(world_t *world) {
    check_begin("ipc faults: layouts past the shared memory");
    bkv_error_t err = {0};
    bkv_device_t *shared = share(world->client, world->memory, MEMORY);
    uint64_t bytes = shared->extents[0].bytes;
    shared->extents[0].bytes = shared->extents[0].whole = (uint64_t)1 << 40;
    static const uint64_t beyond[] = {16, 4096, (uint64_t)1 << 21, (uint64_t)1 << 30, (uint64_t)1 << 39};
    for (size_t i = 0; i < sizeof(beyond) / sizeof(beyond[0]); i++) {
        const uint8_t *at = world->memory + MEMORY - bkv_shape_bytes(&shape) + beyond[i];
        bkv_status_t status = put_one(world, shared, at, &err);
        check_that(status == BKV_INVALID_ARGUMENT && strstr(err.message, "place.layout") != NULL, "%llu bytes: status %d, %s",
                   (unsigned long long)beyond[i], status, err.message);
    }
    bkv_device_record_t record;
    block_t block;
    block_make(&block, world->memory, &world->spec, world->next_key++);
    bkv_status_t status = bkv_device_put(shared, &world->spec, &block.put, 1, NULL, 0, NULL, &err);
    check_that(status == BKV_OK, "what is there: %s", err.message);
    status = bkv_device_get(shared, &world->spec, &block.put.key, 1, NULL, world->memory + MEMORY, (size_t)1 << 30, NULL, 0,
                            &record, &err);
    check_that(status == BKV_INVALID_ARGUMENT, "a room past the end: status %d, %s", status, err.message);
    shared->extents[0].bytes = shared->extents[0].whole = bytes;
    bkv_device_unshare(shared);
    check_alive(world, "bad layouts");
}

// Chunks of which the worker says that they are larger than they are.
static void test_large_chunk(world_t *world) {
    check_begin("ipc faults: a chunk that says too much");
    size_t unit = 0;
    REQUIRE(bkv_gpu_granularity(0, &unit) == 0, "granularity");
    uint8_t *chunk = ipc_chunks(unit, 1);
    bkv_device_t *shared = share(world->client, chunk, unit);
    bkv_device_session_t *session = NULL;
    bkv_error_t err = {0};
    shared->extents[0].bytes = shared->bytes = 4 * unit;
    bkv_status_t status = bkv_device_attach(shared, 10000, &session, &err);
    check_that(status == BKV_INVALID_ARGUMENT, "status %d, %s", status, err.message);
    if (status == BKV_OK) {
        bkv_device_leave(session);
    }
    bkv_device_unshare(shared);
    bkv_gpu_span_unmap(chunk, unit);
    bkv_gpu_span_free(chunk, unit);
    check_alive(world, "a large chunk");
}

// ---- the daemon ----

static void test_restart(world_t *world) {
    check_begin("ipc faults: the daemon is killed and started again");
    bkv_error_t err = {0};
    bkv_device_t *shared = share(world->client, world->memory, MEMORY);
    for (int i = 0; i < 3; i++) {
        ipc_daemon_restart(&world->daemon);
        bkv_status_t status = put_one(world, shared, world->memory, &err);
        check_that(status == BKV_OK, "put after restart %d: %s", i, err.message);
    }
    bkv_device_unshare(shared);
}

// ---- a thousand blocks ----

static int count_in(pid_t pid, const char *what) {
    char path[64];
    snprintf(path, sizeof(path), "/proc/%d/%s", pid, what);
    int count = 0;
    DIR *folder = opendir(path);
    REQUIRE(folder != NULL, "%s: %s", path, strerror(errno));
    while (readdir(folder) != NULL) {
        count++;
    }
    closedir(folder);
    return count;
}

// 1,000 blocks through 20 sharings, and as many gets; the second thousand takes no more than the first.
static void thousand(world_t *world) {
    bkv_error_t err = {0};
    uint8_t *room = world->memory + MEMORY / 2;
    for (int i = 0; i < 20; i++) {
        bkv_device_t *shared = share(world->client, world->memory, MEMORY);
        block_t blocks[50];
        bkv_device_put_t puts[50];
        bkv_key_t keys[50];
        bkv_device_record_t records[50];
        for (uint32_t b = 0; b < 50; b++) {
            block_make(&blocks[b], world->memory + 16 * b, &world->spec, world->next_key++);
            puts[b] = blocks[b].put;
            keys[b] = puts[b].key;
        }
        bkv_status_t status = bkv_device_put(shared, &world->spec, puts, 50, NULL, 0, NULL, &err);
        check_that(status == BKV_OK, "put: %s", err.message);
        status = bkv_device_get(shared, &world->spec, keys, 20, NULL, room, MEMORY / 2, NULL, 0, records, &err);
        check_that(status == BKV_OK, "get: %s", err.message);
        bkv_device_unshare(shared);
    }
}

static void test_leaks(world_t *world) {
    check_begin("ipc faults: a thousand blocks leave nothing behind");
    size_t before = 0, after = 0;
    thousand(world);
    check_that(ipc_metric_becomes(world->client, "balancekv_sessions", 0), "sessions are left");
    sleep_ms(500);
    int descriptors = count_in(world->daemon.pid, "fd"), threads = count_in(world->daemon.pid, "task");
    REQUIRE(bkv_gpu_unused(&before) == 0, "unused");
    thousand(world);
    check_that(ipc_metric_becomes(world->client, "balancekv_sessions", 0), "sessions are left");
    sleep_ms(500);
    REQUIRE(bkv_gpu_unused(&after) == 0, "unused");
    check_that(after + ((size_t)2 << 20) >= before, "%zu bytes of GPU memory are gone", before - after);
    int now = count_in(world->daemon.pid, "fd");
    check_that(now <= descriptors, "%d descriptors are left over", now - descriptors);
    now = count_in(world->daemon.pid, "task");
    check_that(now <= threads, "%d threads are left over", now - threads);
    check_that(ipc_metric(world->client, "balancekv_pinned") == 0, "records are pinned");
}

// ---- a fault of the GPU, in a process of its own: what a reset can do on this machine ----

static int worker_fault(void) {
    uint64_t wild[2] = {16, 16}, *tables = (uint64_t *)(void *)ipc_memory(64);
    device_put(tables, wild, sizeof(wild));
    const bkv_gpu_gather_t gather = {.bases = tables,
                                     .pages = tables,
                                     .key_token = 16,
                                     .key_head = 16,
                                     .value_token = 16,
                                     .value_head = 16,
                                     .page_tokens = 1u << 30,
                                     .shape = {1, 1, 1, 8, 8, BKV_BF16},
                                     .payload = ipc_memory(256)};
    int error = bkv_gpu_gather(&gather, NULL);
    error = error != 0 ? error : bkv_gpu_wait(NULL);
    printf("  a kernel that reads address 32: %s; broken: %s\n", bkv_gpu_error(error), bkv_gpu_broken() ? "yes" : "no");
    error = bkv_gpu_reset(0);
    printf("  after a reset the device %s\n", error == 0 ? "can be used again" : bkv_gpu_error(error));
    return 0;
}

static void test_fault(world_t *world) {
    int out;
    char text[512] = {0};
    pid_t pid = worker_start("fault", world->daemon.endpoint, &out);
    (void)read_all(out, text, sizeof(text) - 1);
    waitpid(pid, NULL, 0);
    close(out);
    printf("%s", text);
    check_begin("ipc faults: another process's fault");
    check_alive(world, "another process's fault");
}

// ---- main ----

static int worker(const char *what, const char *endpoint) {
    return strcmp(what, "export") == 0 ? worker_export() : strcmp(what, "put") == 0 ? worker_put(endpoint) : worker_fault();
}

int main(int argc, char **argv) {
    if (argc > 3 && strcmp(argv[1], "--worker") == 0) {
        return worker(argv[2], argv[3]);
    }
    world_t world = {0};
    ipc_daemon_start(&world.daemon, argc > 1 ? argv[1] : ipc_daemon_program(), "1G"); // forks, so before CUDA is touched
    world.client = ipc_client(&world.daemon, 30000);
    if (bkv_gpu_count() == 0) {
        printf("SKIPPED the tests of CUDA IPC's faults: there is no CUDA device here\n");
        bkv_client_destroy(world.client);
        ipc_daemon_stop(&world.daemon);
        return 0;
    }
    world.spec = open_spec(world.client);
    world.memory = random_memory();
    test_handles(&world);
    test_layouts(&world);
    test_large_chunk(&world);
    test_killed_workers(&world);
    test_fault(&world);
    test_leaks(&world);
    test_restart(&world);
    bkv_client_destroy(world.client);
    ipc_daemon_stop(&world.daemon);
    return check_end();
}
