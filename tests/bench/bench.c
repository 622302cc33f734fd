// bench.c - `make bench`: starts a daemon and the bare gRPC C core, runs the parts (bench.h), prints a table, writes a file.
//
//   bench --daemon build/bin/balancekvd --out build/bench/bench.json [--quick] [--part rpc|data|stores]
//         [--python PYTHON --script bench_mooncake.py]
//
// PYTHON is one that has the wheel of Mooncake Store (mooncake.sh).
#include "tests/bench/bench.h"

#include <getopt.h>
#include <limits.h>
#include <malloc.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define TIMEOUT_MS    20000
#define START_SECONDS 20

// ---- what the parts share ----

double bkv_bench_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

void bkv_bench_fail(const char *format, ...) {
    va_list list;
    va_start(list, format);
    fprintf(stderr, "bench: ");
    vfprintf(stderr, format, list);
    fprintf(stderr, "\n");
    va_end(list);
    exit(1);
}

void bkv_bench_must(bkv_status_t status, const bkv_error_t *error, const char *what) {
    if (status != BKV_OK) {
        bkv_bench_fail("%s: %s: %s", what, bkv_status_name(status), error->message);
    }
}

bkv_key_t bkv_bench_key(bkv_bench_t *bench) {
    bkv_key_t key;
    uint32_t number = bench->next_key++;
    bkv_key_next(&bench->spec, NULL, &number, 1, &key);
    return key;
}

bkv_put_t bkv_bench_block(const bkv_key_t *key, const uint8_t *payload, size_t bytes) {
    return (bkv_put_t){
        .key = *key,
        .tokens = (uint32_t)(bytes / BKV_BENCH_TOKEN_BYTES),
        .payload = payload,
        .payload_bytes = bytes,
    };
}

double bkv_bench_put(bkv_bench_t *bench, bkv_client_t *client, const bkv_key_t *key, const uint8_t *payload, size_t bytes) {
    bkv_error_t error;
    const bkv_put_t block = bkv_bench_block(key, payload, bytes);
    double start = bkv_bench_now();
    bkv_bench_must(bkv_put(client, &bench->spec, &block, 1, 0, NULL, &error), &error, "Put");
    return bkv_bench_now() - start;
}

double bkv_bench_get(bkv_bench_t *bench, bkv_client_t *client, const bkv_key_t *key, bkv_record_t *record) {
    bkv_error_t error;
    double start = bkv_bench_now();
    bkv_bench_must(bkv_get(client, &bench->spec, key, 1, NULL, 0, record, &error), &error, "Get");
    return bkv_bench_now() - start;
}

void bkv_bench_drop(bkv_bench_t *bench, const bkv_key_t *key) {
    bkv_error_t error;
    bkv_bench_must(bkv_drop(bench->client, &bench->spec, key, 1, 0, NULL, &error), &error, "Drop");
}

void bkv_bench_expect(const bkv_record_t *record, const uint8_t *payload, size_t bytes) {
    if (record->length < bytes || memcmp((uint8_t *)record->data + record->length - bytes, payload, bytes) != 0) {
        bkv_bench_fail("Get answered other bytes than were put");
    }
}

uint32_t bkv_bench_rounds(const bkv_bench_t *bench, uint32_t full) {
    return !bench->quick ? full : full < 30 ? 3 : full / 10;
}

// ---- the daemon under test ----

static pid_t start_daemon(const char *program, const char *socket) {
    pid_t pid = fork();
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGTERM);
        execl(program, program, "--socket", socket, "--tcp", "", "--arena", "2G", "--slab", "128M", "--prefault", "--level",
              "warn", (char *)NULL);
        perror(program);
        _exit(127);
    }
    return pid;
}

static bkv_client_t *connect_client(const char *endpoint, const char *transport) {
    bkv_error_t error;
    bkv_client_t *client;
    const bkv_client_options_t options = {.endpoint = endpoint, .timeout_ms = TIMEOUT_MS, .transport = transport};
    bkv_bench_must(bkv_client_create(&options, &client, &error), &error, "client");
    bkv_status_t status = BKV_BUSY;
    for (double start = bkv_bench_now(); status != BKV_OK && bkv_bench_now() - start < START_SECONDS;) {
        status = bkv_ping(client, 1000, NULL, &error);
        nanosleep(&(struct timespec){.tv_nsec = 20 * 1000 * 1000}, NULL);
    }
    bkv_bench_must(status, &error, "daemon");
    return client;
}

static bkv_status_t open_spec(bkv_client_t *client, bkv_spec_id_t *id, bkv_error_t *err) {
    const bkv_spec_t spec = {
        .model = "bench",
        .layers = 8,
        .kv_heads = 8,
        .key_dim = 128,
        .dtype = BKV_BF16,
        .block_tokens = BKV_BENCH_LARGEST / BKV_BENCH_TOKEN_BYTES,
        .codec = BKV_CODEC_RAW,
    };
    return bkv_open(client, &spec, 0, id, NULL, err);
}

// Is it in use? Otherwise says why not.
static bool shm_works(bkv_client_t *client) {
    bkv_error_t error;
    bkv_transport_info_t info[BKV_TRANSPORTS];
    size_t count = 0;
    bkv_bench_must(bkv_transports(client, 0, info, &count, &error), &error, "transports");
    for (size_t i = 0; i < count; i++) {
        if (strcmp(info[i].name, "shm") == 0 && !info[i].usable) {
            printf("SKIPPED shared memory: %s\n", info[i].reason);
        }
        if (strcmp(info[i].name, "shm") == 0) {
            return info[i].usable;
        }
    }
    printf("SKIPPED shared memory: this library knows no such transport\n");
    return false;
}

static void connect_clients(bkv_bench_t *bench, const char *endpoint) {
    bkv_error_t error;
    bench->client = connect_client(endpoint, "inline");
    bkv_bench_must(open_spec(bench->client, &bench->spec, &error), &error, "Open");
    bench->shm = connect_client(endpoint, "auto");
    if (!shm_works(bench->shm)) {
        bkv_client_destroy(bench->shm);
        bench->shm = NULL;
        return;
    }
    bkv_bench_must(open_spec(bench->shm, &bench->spec, &error), &error, "Open");
}

// ---- main ----

static const struct {
    const char *name;
    void (*run)(bkv_bench_t *bench);
} parts[] = {{"rpc", bkv_bench_rpc}, {"data", bkv_bench_data}, {"stores", bkv_bench_stores}};

typedef struct options {
    const char *daemon, *out, *part;
    bool quick;
    bkv_bench_mooncake_t mooncake;
} options_t;

static options_t parse(int argc, char **argv) {
    static const struct option flags[] = {
        {"daemon", required_argument, NULL, 'd'},
        {"out", required_argument, NULL, 'o'},
        {"quick", no_argument, NULL, 'q'},
        {"part", required_argument, NULL, 't'},
        {"python", required_argument, NULL, 'p'},
        {"script", required_argument, NULL, 's'},
        {NULL, 0, NULL, 0},
    };
    options_t options = {0};
    for (int flag; (flag = getopt_long(argc, argv, "", flags, NULL)) != -1;) {
        switch (flag) {
        case 'd':
            options.daemon = optarg;
            break;
        case 'o':
            options.out = optarg;
            break;
        case 't':
            options.part = optarg;
            break;
        case 'q':
            options.quick = true;
            break;
        case 'p':
            options.mooncake.python = optarg;
            break;
        case 's':
            options.mooncake.script = optarg;
            break;
        default:
            exit(2);
        }
    }
    if (options.daemon == NULL || options.out == NULL) {
        fprintf(stderr, "usage: bench --daemon BALANCEKVD --out FILE.json [--quick] [--part rpc|data|stores] [--python PYTHON "
                        "--script bench_mooncake.py]\n");
        exit(2);
    }
    return options;
}

// Finite bf16 numbers.
static uint8_t *make_payload(void) {
    uint16_t *payload =
        mmap(NULL, BKV_BENCH_LARGEST, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (payload == MAP_FAILED) {
        bkv_bench_fail("no memory for the payload");
    }
    uint32_t state = 1;
    for (size_t i = 0; i < BKV_BENCH_LARGEST / 2; i++) {
        state = state * 1664525u + 1013904223u;
        payload[i] = (uint16_t)(state >> 18);
    }
    return (uint8_t *)payload;
}

static void remove_folder(const char *folder) {
    static const char *const names[] = {"d.sock", "d.sock.lock", "d.sock.fd", "d.sock.fd.lock", "bare.sock"};
    char path[128];
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        snprintf(path, sizeof(path), "%s/%s", folder, names[i]);
        unlink(path);
    }
    rmdir(folder);
}

int main(int argc, char **argv) {
    options_t options = parse(argc, argv);
    // As the client library advises programs that move many large records: reuse memory, do not give it back each time.
    mallopt(M_MMAP_THRESHOLD, 1 << 30);
    mallopt(M_TRIM_THRESHOLD, INT_MAX);
    mallopt(M_TOP_PAD, 64 << 20);

    char folder[] = "/tmp/bkv-bench-XXXXXX", socket[64], endpoint[80], bare_address[80];
    if (mkdtemp(folder) == NULL) {
        bkv_bench_fail("no folder %s", folder);
    }
    snprintf(socket, sizeof(socket), "%s/d.sock", folder);
    snprintf(endpoint, sizeof(endpoint), "unix:%s", socket);
    snprintf(bare_address, sizeof(bare_address), "unix:%s/bare.sock", folder);

    static bkv_bench_t bench;
    bench.folder = folder;
    bench.payload = make_payload();
    bench.quick = options.quick;
    bench.mooncake = options.mooncake;
    pid_t bare = bkv_bare_serve(bare_address, bench.payload); // before gRPC is initialised here
    pid_t daemon = start_daemon(options.daemon, socket);
    grpc_init();
    connect_clients(&bench, endpoint);
    bkv_bare_init(&bench.bare, bare_address, bench.payload);

    for (size_t i = 0; i < sizeof(parts) / sizeof(parts[0]); i++) {
        if (options.part == NULL || strcmp(options.part, parts[i].name) == 0) {
            parts[i].run(&bench);
        }
    }

    bkv_client_destroy(bench.client);
    bkv_client_destroy(bench.shm);
    bkv_bare_deinit(&bench.bare);
    kill(daemon, SIGTERM);
    kill(bare, SIGKILL);
    int status = 0;
    waitpid(daemon, &status, 0);
    waitpid(bare, NULL, 0);
    remove_folder(folder);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
        bkv_bench_fail("the daemon did not end well");
    }
    bkv_report_print(&bench.report);
    bool written = bkv_report_write(&bench.report, options.out);
    return written && bkv_report_met(&bench.report) ? 0 : 1;
}
