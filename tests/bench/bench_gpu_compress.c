// bench_gpu_compress.c - compression of KV that lies on a GPU, against what a copy moves in the same run.
//
//   bench_gpu_compress [--out FILE.json] [--quick]
//
// Rates are of payload: bytes of K and V that went in, over the time until the last record was whole. The bytes go round a
// gigabyte, twenty times the cache, so that none is found there from the time before. bench_gpu_authors.py, where there is
// PyTorch, times the published algorithm on the same blocks; its seconds are read from its output.
#include "cuda/bkv_cuda.h"
#include "cuda/gpu.h"
#include "tests/bench/gpu_common.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

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

// Keys with a common mean, and values, all from a small generator: 64 MB on the host, laid down again and again.
static void payload_fill(bench_t *bench) {
    size_t bytes = bench->block_bytes * 2, elements = bytes / 2;
    uint16_t *host = gpu_host_memory(bytes);
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
        gpu_must(bkv_gpu_copy(bench->payload + i * bench->block_bytes, host, bytes, NULL), "copy");
    }
    gpu_must(bkv_gpu_wait(NULL), "copy");
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
        double start = gpu_now();
        for (int call = 0; call < calls; call++) {
            gpu_must_be(bkv_cuda_compress(bench->cuda, &args, NULL, &err), &err);
        }
        gpu_must(bkv_gpu_wait(NULL), "compress");
        if (turn >= 0) {
            seconds[turn] = (gpu_now() - start) / calls;
        }
    }
    return bkv_quantile(seconds, (size_t)turns, 0.5);
}

// What a copy of the same payload takes: it reads every byte and writes as many.
static double copy_seconds(const bench_t *bench) {
    size_t bytes = bench->block_bytes * BLOCKS;
    uint8_t *to = gpu_memory(bytes);
    double seconds[TURNS];
    for (int turn = -1; turn < TURNS; turn++) {
        double start = gpu_now();
        gpu_must(bkv_gpu_copy(to, bench->payload, bytes, NULL), "copy");
        gpu_must(bkv_gpu_wait(NULL), "copy");
        if (turn >= 0) {
            seconds[turn] = gpu_now() - start;
        }
    }
    gpu_must(bkv_gpu_free(to, NULL), "free");
    return bkv_quantile(seconds, TURNS, 0.5);
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

// Against the authors' algorithm on the same payload in PyTorch.
static void bench_authors(bench_t *bench) {
    double seconds = gpu_script_seconds("python3 tests/bench/bench_gpu_authors.py");
    if (seconds <= 0) {
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
    const gpu_options_t options = gpu_options(argc, argv);
    static bench_t bench;
    bkv_error_t err = {0};
    if (bkv_cuda_open(0, &bench.cuda, &err) != BKV_OK) {
        printf("SKIPPED the GPU bench of compression: %s\n", err.message);
        return 0;
    }
    uint32_t most = options.quick ? 64 : 4096;
    bkv_shape_t shape = {LAYERS, HEADS, BLOCK, DIM, DIM, BKV_BF16};
    bench.block_bytes = (size_t)bkv_shape_bytes(&shape);
    bench.payload = gpu_memory(bench.block_bytes * BLOCKS);
    bench.blocks = calloc(most, sizeof(bkv_block_t));
    bench.ids = calloc(most, sizeof(bkv_record_id_t));
    bench.record_room = (bench.block_bytes + (1 << 16)) * (most / 16 + BLOCKS);
    bench.records = gpu_memory(bench.record_room);
    bench.status = gpu_memory(most * sizeof(uint64_t));
    bench.workspace_room = (size_t)64 << 20;
    bench.workspace = gpu_memory(bench.workspace_room);
    payload_fill(&bench);
    bench_codecs(&bench, copy_seconds(&bench));
    bench_lengths(&bench, most);
    if (!options.quick) {
        bench_authors(&bench);
    }
    bkv_cuda_close(bench.cuda);
    return gpu_report(&options, &bench.report);
}
