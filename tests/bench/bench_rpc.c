// bench_rpc.c - Put, Get and Lookup through the client library and the real daemon, against the bare gRPC C core (bare.c),
// over unix sockets, interleaved in one run: medians of both sides see the same machine.
//
//   bench_rpc --daemon build/bin/balancekvd --out build/bench/bench.json [--rounds N]
//
// Put and Get move a block of codec raw. The bar is the bare echo of the same bytes, which brings them there and back. Two
// stricter comparisons, without a bar, stand beside it: the echo credited with the bytes of both ways, and the bare one-way
// transfer.
#include "client/balancekv.h"
#include "tests/bench/bare.h"
#include "tests/bench/report.h"

#include <getopt.h>
#include <limits.h>
#include <malloc.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MIB             (1024 * 1024)
#define LARGEST         (16 * MIB)
#define LAYERS          8
#define HEADS           8
#define DIM             128
#define BYTES_PER_TOKEN (2 * LAYERS * HEADS * DIM * 2)
#define MAX_ROUNDS      4000
#define LOOKUP_ROUNDS   3000
#define LOOKUP_KEYS     8
#define TIMEOUT_MS      20000

typedef struct bench {
    bkv_client_t *client;
    bkv_spec_id_t spec;
    bkv_bare_t bare;
    const uint8_t *payload;
    uint32_t next_key, rounds;
    bkv_report_t report;
} bench_t;

enum { UPLOAD, DOWNLOAD, ECHO, PUT, GET, KINDS };

static double now_s(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static void must(bkv_status_t status, const bkv_error_t *error, const char *what) {
    if (status != BKV_OK) {
        fprintf(stderr, "bench: %s: %s: %s\n", what, bkv_status_name(status), error->message);
        exit(1);
    }
}

// ---- the daemon under test ----

static pid_t start_daemon(const char *program, const char *socket) {
    pid_t pid = fork();
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGTERM);
        execl(program, program, "--socket", socket, "--tcp", "", "--arena", "1G", "--slab", "64M", "--prefault", "--level",
              "warn", (char *)NULL);
        perror(program);
        _exit(127);
    }
    return pid;
}

static void connect_client(bench_t *bench, const char *endpoint) {
    bkv_error_t error;
    const bkv_client_options_t options = {.endpoint = endpoint, .timeout_ms = TIMEOUT_MS};
    must(bkv_client_create(&options, &bench->client, &error), &error, "client");
    bkv_status_t status = BKV_BUSY;
    for (double start = now_s(); status != BKV_OK && now_s() - start < 20;) {
        status = bkv_ping(bench->client, 1000, NULL, &error);
        nanosleep(&(struct timespec){.tv_nsec = 20 * 1000 * 1000}, NULL);
    }
    must(status, &error, "daemon");
    const bkv_spec_t spec = {
        .model = "bench",
        .layers = LAYERS,
        .kv_heads = HEADS,
        .key_dim = DIM,
        .dtype = BKV_BF16,
        .block_tokens = LARGEST / BYTES_PER_TOKEN,
        .codec = BKV_CODEC_RAW,
    };
    must(bkv_open(bench->client, &spec, 0, &bench->spec, NULL, &error), &error, "Open");
}

// ---- Put and Get ----

static bkv_key_t new_key(bench_t *bench) {
    bkv_key_t key;
    uint32_t number = bench->next_key++;
    bkv_key_next(&bench->spec, NULL, &number, 1, &key);
    return key;
}

static double put(bench_t *bench, const bkv_key_t *key, size_t bytes) {
    bkv_error_t error;
    const bkv_put_t block = {
        .key = *key, .tokens = (uint32_t)(bytes / BYTES_PER_TOKEN), .payload = bench->payload, .payload_bytes = bytes};
    double start = now_s();
    must(bkv_put(bench->client, &bench->spec, &block, 1, 0, NULL, &error), &error, "Put");
    return now_s() - start;
}

static double get(bench_t *bench, const bkv_key_t *key, size_t bytes) {
    bkv_error_t error;
    bkv_record_t record;
    double start = now_s();
    must(bkv_get(bench->client, &bench->spec, key, 1, NULL, 0, &record, &error), &error, "Get");
    double seconds = now_s() - start;
    if (record.length < bytes || memcmp((uint8_t *)record.data + record.length - bytes, bench->payload, bytes) != 0) {
        fprintf(stderr, "bench: Get answered other bytes than were put\n");
        exit(1);
    }
    bkv_record_free(&record);
    return seconds;
}

static double bare_call(bench_t *bench, bkv_bare_method_t method, size_t bytes) {
    double start = now_s();
    bkv_bare_call(&bench->bare, method, bytes);
    return now_s() - start;
}

static void round_once(bench_t *bench, size_t bytes, double seconds[KINDS]) {
    bkv_error_t error;
    bkv_key_t key = new_key(bench);
    seconds[UPLOAD] = bare_call(bench, BKV_BARE_UPLOAD, bytes);
    seconds[PUT] = put(bench, &key, bytes);
    seconds[ECHO] = bare_call(bench, BKV_BARE_ECHO, bytes);
    seconds[GET] = get(bench, &key, bytes);
    seconds[DOWNLOAD] = bare_call(bench, BKV_BARE_DOWNLOAD, bytes);
    must(bkv_drop(bench->client, &bench->spec, &key, 1, 0, NULL, &error), &error, "Drop");
}

static void report_against(bench_t *bench, const char *what, size_t bytes, double rate, double echo, const char *one_way,
                           double one_way_rate) {
    char name[64];
    snprintf(name, sizeof(name), "%s %zu MiB", what, bytes / MIB);
    bkv_report_add(&bench->report, name, rate, "GB/s", "bare echo of the same bytes", echo, BKV_BAR_AT_LEAST, 0.6);
    bkv_report_add(&bench->report, name, rate, "GB/s", "bare echo, both ways counted", 2 * echo, BKV_BAR_NONE, 0);
    bkv_report_add(&bench->report, name, rate, "GB/s", one_way, one_way_rate, BKV_BAR_NONE, 0);
}

static void measure_blocks(bench_t *bench, size_t bytes, uint32_t rounds) {
    static double samples[KINDS][MAX_ROUNDS];
    double seconds[KINDS], rate[KINDS];
    for (uint32_t i = 0; i < rounds / 10 + 3; i++) {
        round_once(bench, bytes, seconds); // warm
    }
    for (uint32_t i = 0; i < rounds; i++) {
        round_once(bench, bytes, seconds);
        for (int kind = 0; kind < KINDS; kind++) {
            samples[kind][i] = seconds[kind];
        }
    }
    for (int kind = 0; kind < KINDS; kind++) {
        rate[kind] = (double)bytes / bkv_quantile(samples[kind], rounds, 0.5) / 1e9;
    }
    report_against(bench, "put", bytes, rate[PUT], rate[ECHO], "bare upload", rate[UPLOAD]);
    report_against(bench, "get", bytes, rate[GET], rate[ECHO], "bare download", rate[DOWNLOAD]);
}

// ---- Lookup ----

static void measure_lookup(bench_t *bench) {
    static double bare[LOOKUP_ROUNDS], ours[LOOKUP_ROUNDS];
    bkv_error_t error;
    bkv_key_t keys[LOOKUP_KEYS];
    bool resident[LOOKUP_KEYS];
    size_t prefix;
    for (size_t i = 0; i < LOOKUP_KEYS; i++) {
        keys[i] = new_key(bench);
        put(bench, &keys[i], BYTES_PER_TOKEN);
    }
    size_t request = 18 + LOOKUP_KEYS * 34; // what a LookupRequest takes
    for (int i = -LOOKUP_ROUNDS / 10; i < LOOKUP_ROUNDS; i++) {
        double before = bare_call(bench, BKV_BARE_UNARY, request), start = now_s();
        must(bkv_lookup(bench->client, &bench->spec, keys, LOOKUP_KEYS, 0, resident, &prefix, &error), &error, "Lookup");
        double seconds = now_s() - start;
        if (prefix != LOOKUP_KEYS) {
            fprintf(stderr, "bench: Lookup found %zu of %d keys\n", prefix, LOOKUP_KEYS);
            exit(1);
        }
        if (i >= 0) {
            bare[i] = before * 1e6;
            ours[i] = seconds * 1e6;
        }
    }
    bkv_report_add(&bench->report, "lookup p50, 8 keys", bkv_quantile(ours, LOOKUP_ROUNDS, 0.5), "us", "bare unary p50",
                   bkv_quantile(bare, LOOKUP_ROUNDS, 0.5), BKV_BAR_AT_MOST, 3);
    bkv_report_add(&bench->report, "lookup p99, 8 keys", bkv_quantile(ours, LOOKUP_ROUNDS, 0.99), "us", "bare unary p99",
                   bkv_quantile(bare, LOOKUP_ROUNDS, 0.99), BKV_BAR_NONE, 0);
}

// ---- main ----

typedef struct options {
    const char *daemon, *out;
    uint32_t rounds; // of 16 MiB; smaller blocks get more
} options_t;

static options_t parse(int argc, char **argv) {
    static const struct option flags[] = {
        {"daemon", required_argument, NULL, 'd'},
        {"out", required_argument, NULL, 'o'},
        {"rounds", required_argument, NULL, 'r'},
        {NULL, 0, NULL, 0},
    };
    options_t options = {.rounds = 60};
    for (int flag; (flag = getopt_long(argc, argv, "", flags, NULL)) != -1;) {
        switch (flag) {
        case 'd':
            options.daemon = optarg;
            break;
        case 'o':
            options.out = optarg;
            break;
        case 'r':
            options.rounds = (uint32_t)strtoul(optarg, NULL, 10);
            break;
        default:
            exit(2);
        }
    }
    if (options.daemon == NULL || options.out == NULL || options.rounds < 1 || options.rounds > MAX_ROUNDS / 16) {
        fprintf(stderr, "usage: bench_rpc --daemon BALANCEKVD --out FILE.json [--rounds 1..%d]\n", MAX_ROUNDS / 16);
        exit(2);
    }
    return options;
}

// Finite bf16 numbers.
static uint8_t *make_payload(void) {
    uint16_t *payload = mmap(NULL, LARGEST, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (payload == MAP_FAILED) {
        perror("bench: payload");
        exit(1);
    }
    for (uint32_t i = 0, state = 1; i < LARGEST / 2; i++) {
        state = state * 1664525u + 1013904223u;
        payload[i] = (uint16_t)(state >> 18);
    }
    return (uint8_t *)payload;
}

int main(int argc, char **argv) {
    options_t options = parse(argc, argv);
    // As the client library advises programs that move many large records: reuse memory, do not give it back each time.
    mallopt(M_MMAP_THRESHOLD, 1 << 30);
    mallopt(M_TRIM_THRESHOLD, INT_MAX);
    mallopt(M_TOP_PAD, 64 << 20);

    char folder[] = "/tmp/bkv-bench-XXXXXX", socket[64], endpoint[80], bare_socket[64], bare_address[80];
    if (mkdtemp(folder) == NULL) {
        perror("bench: mkdtemp");
        return 1;
    }
    snprintf(socket, sizeof(socket), "%s/d.sock", folder);
    snprintf(endpoint, sizeof(endpoint), "unix:%s", socket);
    snprintf(bare_socket, sizeof(bare_socket), "%s/bare.sock", folder);
    snprintf(bare_address, sizeof(bare_address), "unix:%s", bare_socket);

    static bench_t bench;
    bench.payload = make_payload();
    bench.rounds = options.rounds;
    pid_t bare = bkv_bare_serve(bare_address, bench.payload); // before gRPC is initialised here
    pid_t daemon = start_daemon(options.daemon, socket);
    grpc_init();
    connect_client(&bench, endpoint);
    bkv_bare_init(&bench.bare, bare_address, bench.payload);

    measure_blocks(&bench, 1 * MIB, options.rounds * 16);
    measure_blocks(&bench, 4 * MIB, options.rounds * 4);
    measure_blocks(&bench, 16 * MIB, options.rounds);
    measure_lookup(&bench);

    bkv_client_destroy(bench.client);
    bkv_bare_deinit(&bench.bare);
    kill(daemon, SIGTERM);
    kill(bare, SIGKILL);
    int status = 0;
    waitpid(daemon, &status, 0);
    waitpid(bare, NULL, 0);
    unlink(bare_socket);
    unlink(socket);
    char lock[80];
    snprintf(lock, sizeof(lock), "%s.lock", socket);
    unlink(lock);
    rmdir(folder);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
        fprintf(stderr, "bench: the daemon did not end well\n");
        return 1;
    }
    bkv_report_print(&bench.report);
    bool written = bkv_report_write(&bench.report, options.out);
    return written && bkv_report_met(&bench.report) ? 0 : 1;
}
