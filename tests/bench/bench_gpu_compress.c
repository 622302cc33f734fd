// bench_gpu_compress.c - compression of KV that lies on a GPU, against what a copy moves in the same run.
//
//   bench_gpu_compress [--out FILE.json] [--quick]
//
// Rates are of payload: bytes of K and V that went in, over the time until the last record was whole. The bytes go round a
// gigabyte, twenty times the cache, so that none is found there from the time before. bench_gpu_authors.py, where there is
// PyTorch, times the published algorithm on the same blocks; its seconds are read from its output.
#include "cuda/bkv_cuda.h"
#include "cuda/gpu.h"
#include "tests/bench/report.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { LAYERS = 32, HEADS = 8, BLOCK = 256, DIM = 128, BLOCKS = 32, TURNS = 11 };

typedef struct bench {
    bkv_cuda_t *cuda;
    bkv_report_t report;
    uint8_t *payload;    // BLOCKS blocks of K and V on the device
    size_t block_bytes;  // of one of them
    bkv_block_t *blocks; // as many as the longest run takes; they go round the payload
    bkv_record_id_t *ids;
    uint8_t *records, *workspace;
    uint64_t *status;
    size_t record_room, workspace_room;
} bench_t;

static void must(int error, const char *what) {
    if (error != 0) {
        fprintf(stderr, "bench_gpu_compress: %s: %s\n", what, bkv_gpu_error(error));
        exit(1);
    }
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static void *device_take(size_t bytes) {
    void *memory;
    must(bkv_gpu_alloc(&memory, bytes, NULL), "device memory");
    return memory;
}

// Keys with a common mean, and values, all from a small generator: 64 MB on the host, laid down again and again.
static void payload_fill(bench_t *bench) {
    size_t bytes = bench->block_bytes * 2, elements = bytes / 2;
    uint16_t *host = malloc(bytes);
    uint64_t state = 1;
    for (size_t i = 0; i < elements; i++) {
        double sum = -6;
        for (int j = 0; j < 3; j++) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            sum += (double)(state >> 33 & 0xffff) / 32768 + (double)(state >> 49) / 16384;
        }
        double mean = sin((double)(i % DIM) * 1.7) * (i / DIM % 20 ? 1 : -1);
        host[i] = bkv_float_to_bf16((float)(mean + sum));
    }
    for (size_t i = 0; i < BLOCKS; i += 2) {
        must(bkv_gpu_copy(bench->payload + i * bench->block_bytes, host, bytes, NULL), "copy");
    }
    must(bkv_gpu_wait(NULL), "copy");
    free(host);
}

typedef enum layout { PAYLOAD, PAGED } layout_t;

// count blocks: block after block, or [layer][K,V][block][token][head][dim], where the 8 heads of a token are neighbours.
static void blocks_lay(bench_t *bench, uint32_t count, layout_t layout) {
    bkv_shape_t shape = {LAYERS, HEADS, BLOCK, DIM, DIM, BKV_BF16};
    int64_t row = 2 * DIM, token = HEADS * row, page = BLOCK * token;
    for (uint32_t i = 0; i < count; i++) {
        bkv_block_t *block = &bench->blocks[i];
        uint32_t at = i % BLOCKS;
        if (layout == PAYLOAD) {
            bkv_block_from_payload(&shape, bench->payload + at * bench->block_bytes, block);
        } else {
            *block = (bkv_block_t){.shape = shape,
                                   .keys = bench->payload + at * page,
                                   .values = bench->payload + (BLOCKS + at) * page,
                                   .key_stride = {2 * BLOCKS * page, row, token},
                                   .value_stride = {2 * BLOCKS * page, row, token}};
        }
        bench->ids[i] = (bkv_record_id_t){.tenant = 1, .position = (uint64_t)i * BLOCK};
    }
}

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// Median seconds of compressing `count` blocks, after one turn to warm up. A turn is `calls` calls one after another on the
// stream, as an engine makes them.
static double compress_seconds(bench_t *bench, uint32_t count, bkv_codec_params_t params, int turns, int calls) {
    bkv_error_t err = {0};
    double seconds[TURNS];
    bkv_cuda_compress_args_t args = {.blocks = bench->blocks,
                                     .ids = bench->ids,
                                     .count = count,
                                     .params = params,
                                     .records = bench->records,
                                     .status = bench->status,
                                     .workspace = bench->workspace,
                                     .workspace_bytes = bench->workspace_room};
    args.record_stride = (size_t)(bkv_codec_bound(&bench->blocks[0].shape, &params) + 255) / 256 * 256;
    if (args.record_stride * count > bench->record_room) {
        fprintf(stderr, "bench_gpu_compress: %u records need more room\n", count);
        exit(1);
    }
    for (int turn = -1; turn < turns; turn++) {
        double start = now();
        for (int call = 0; call < calls; call++) {
            if (bkv_cuda_compress(bench->cuda, &args, NULL, &err) != BKV_OK) {
                fprintf(stderr, "bench_gpu_compress: %s\n", err.message);
                exit(1);
            }
        }
        must(bkv_gpu_wait(NULL), "compress");
        if (turn >= 0) {
            seconds[turn] = (now() - start) / calls;
        }
    }
    qsort(seconds, (size_t)turns, sizeof(double), compare);
    return seconds[turns / 2];
}

// What a copy of the same payload takes: it reads every byte and writes as many.
static double copy_seconds(const bench_t *bench) {
    size_t bytes = bench->block_bytes * BLOCKS;
    uint8_t *to = device_take(bytes);
    double seconds[TURNS];
    for (int turn = -1; turn < TURNS; turn++) {
        double start = now();
        must(bkv_gpu_copy(to, bench->payload, bytes, NULL), "copy");
        must(bkv_gpu_wait(NULL), "copy");
        if (turn >= 0) {
            seconds[turn] = now() - start;
        }
    }
    must(bkv_gpu_free(to, NULL), "free");
    qsort(seconds, TURNS, sizeof(double), compare);
    return seconds[TURNS / 2];
}

static void bench_codecs(bench_t *bench, double copy) {
    static const struct {
        const char *name;
        bkv_codec_params_t params;
        layout_t layout;
        double bar;
    } runs[] = {
        {"balance 16x", {.codec = BKV_CODEC_BALANCE, .rate = 16, .sink = BKV_DEFAULT_SINK, .seed = 1}, PAYLOAD, 0.3},
        {"balance 16x, paged", {.codec = BKV_CODEC_BALANCE, .rate = 16, .sink = BKV_DEFAULT_SINK, .seed = 1}, PAGED, 0.3},
        {"balance 8x", {.codec = BKV_CODEC_BALANCE, .rate = 8, .sink = BKV_DEFAULT_SINK, .seed = 1}, PAYLOAD, 0},
        {"balance 32x", {.codec = BKV_CODEC_BALANCE, .rate = 32, .sink = BKV_DEFAULT_SINK, .seed = 1}, PAYLOAD, 0},
        {"dense4", {.codec = BKV_CODEC_DENSE4}, PAYLOAD, 0},
        {"dense8", {.codec = BKV_CODEC_DENSE8}, PAYLOAD, 0},
        {"raw", {.codec = BKV_CODEC_RAW}, PAYLOAD, 0},
    };
    double gigabytes = 1e-9 * (double)(bench->block_bytes * BLOCKS);
    for (size_t i = 0; i < sizeof(runs) / sizeof(runs[0]); i++) {
        blocks_lay(bench, BLOCKS, runs[i].layout);
        double seconds = compress_seconds(bench, BLOCKS, runs[i].params, TURNS, 1);
        bkv_report_add(&bench->report, runs[i].name, gigabytes / seconds, "GB/s", "copy on the device", gigabytes / copy,
                       runs[i].bar > 0 ? BKV_BAR_AT_LEAST : BKV_BAR_NONE, runs[i].bar);
    }
}

// The cost of a token must not depend on how many there are: the shortest and the longest within a tenth of one another.
static void bench_lengths(bench_t *bench, uint32_t most) {
    bkv_codec_params_t params = {.codec = BKV_CODEC_BALANCE, .rate = 16, .sink = BKV_DEFAULT_SINK, .seed = 1};
    blocks_lay(bench, most, PAYLOAD);
    double cost[8], least = INFINITY;
    uint32_t runs = 0;
    for (uint32_t blocks = 16; blocks <= most; blocks *= 4) {
        int calls = blocks < 256 ? (int)(256 / blocks) : 1;
        cost[runs] = compress_seconds(bench, blocks, params, blocks > 1024 ? 3 : TURNS, calls) / blocks / BLOCK;
        least = cost[runs] < least ? cost[runs] : least;
        runs++;
    }
    for (uint32_t i = 0; i < runs; i++) {
        char name[64];
        snprintf(name, sizeof(name), "balance 16x, %u tokens: one token", (16u << 2 * i) * BLOCK);
        bkv_report_add(&bench->report, name, 1e9 * cost[i], "ns", "the cheapest length", 1e9 * least, BKV_BAR_AT_MOST, 1.1);
    }
}

// Seconds that the authors' algorithm took for the same payload in PyTorch: the last line of the script's output.
static void bench_authors(bench_t *bench) {
    FILE *script = popen("python3 tests/bench/bench_gpu_authors.py", "r");
    char line[256];
    double seconds = 0;
    while (script && fgets(line, sizeof(line), script)) {
        printf("%s", line);
        (void)sscanf(line, "seconds %lf", &seconds);
    }
    if (!script || pclose(script) != 0 || seconds <= 0) {
        printf("SKIPPED the comparison with the authors' algorithm: it needs python3 with PyTorch and a GPU\n");
        return;
    }
    blocks_lay(bench, BLOCKS, PAYLOAD);
    bkv_codec_params_t params = {.codec = BKV_CODEC_BALANCE, .rate = 16, .sink = BKV_DEFAULT_SINK, .seed = 1};
    double tokens = BLOCKS * BLOCK;
    bkv_report_add(&bench->report, "balance 16x: tokens", tokens / compress_seconds(bench, BLOCKS, params, TURNS, 1), "/s",
                   "authors' algorithm in PyTorch", tokens / seconds, BKV_BAR_AT_LEAST, 100);
}

int main(int argc, char **argv) {
    const char *out = NULL;
    bool quick = false;
    for (int i = 1; i < argc; i++) {
        quick = quick || strcmp(argv[i], "--quick") == 0;
        if (strcmp(argv[i], "--out") == 0 && i + 1 < argc) {
            out = argv[++i];
        }
    }
    static bench_t bench;
    bkv_error_t err = {0};
    if (bkv_cuda_open(0, &bench.cuda, &err) != BKV_OK) {
        printf("SKIPPED the GPU bench of compression: %s\n", err.message);
        return 0;
    }
    uint32_t most = quick ? 64 : 4096;
    bkv_shape_t shape = {LAYERS, HEADS, BLOCK, DIM, DIM, BKV_BF16};
    bench.block_bytes = (size_t)bkv_shape_bytes(&shape);
    bench.payload = device_take(bench.block_bytes * BLOCKS);
    bench.blocks = calloc(most, sizeof(bkv_block_t));
    bench.ids = calloc(most, sizeof(bkv_record_id_t));
    bench.record_room = (bench.block_bytes + (1 << 16)) * (most / 16 + BLOCKS);
    bench.records = device_take(bench.record_room);
    bench.status = device_take(most * sizeof(uint64_t));
    bench.workspace_room = (size_t)64 << 20;
    bench.workspace = device_take(bench.workspace_room);
    payload_fill(&bench);
    bench_codecs(&bench, copy_seconds(&bench));
    bench_lengths(&bench, most);
    if (!quick) {
        bench_authors(&bench);
    }
    bkv_report_print(&bench.report);
    bool written = !out || bkv_report_write(&bench.report, out);
    bkv_cuda_close(bench.cuda);
    return written && bkv_report_met(&bench.report) ? 0 : 1;
}
