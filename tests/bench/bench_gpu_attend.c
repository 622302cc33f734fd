// bench_gpu_attend.c - decode attention over records that lie on a GPU, against what a copy moves in the same run and against
// PyTorch's flash attention over the cache that the records stand for.
//
//   bench_gpu_attend [--out FILE.json] [--quick]
//
// One step: 16 sequences of 131,072 tokens, 32 query heads over 8 KV heads of 128 channels, blocks of 256 tokens. Half a
// gigabyte of records goes by in each step, eight times the cache. Bytes are those that a step must read: of the planes of
// one layer, all but the index of kept tokens. bench_gpu_sdpa.py, where there is PyTorch, times its attention over the whole
// cache in bfloat16; its seconds are read from its output.
#include "cuda/bkv_cuda.h"
#include "cuda/gpu.h"
#include "tests/bench/gpu_common.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SEQUENCES = 16, CONTEXT = 131072, BLOCK = 256, HEADS = 8, QUERY_HEADS = 32, DIM = 128, LAYERS = 2 };
enum { RECORDS = SEQUENCES * (CONTEXT / BLOCK), DISTINCT = 4, TURNS = 9, STEPS = 10 };

typedef struct bench {
    bkv_cuda_t *cuda;
    bkv_report_t report;
    uint8_t *records; // RECORDS of them on the device, `stride` bytes apart
    size_t stride, room;
    void *addresses, *first, *q, *out, *lse, *workspace; // on the device
    size_t workspace_room;
    double read; // bytes of one layer of one record that attention must read
} bench_t;

// Numbers that look like keys: channels with means of their own, a token in twenty on the other side.
static void payload_fill(uint16_t *at, size_t elements, uint64_t seed) {
    uint64_t state = seed;
    for (size_t i = 0; i < elements; i++) {
        double sum = -4;
        for (int j = 0; j < 2; j++) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            sum += (double)(state >> 33 & 0xffff) / 32768 + (double)(state >> 49) / 16384;
        }
        double mean = sin((double)(i % DIM) * 1.7) * (i / DIM % 20 ? 1 : -1);
        at[i] = bkv_float_to_bf16((float)(mean + sum));
    }
}

static void put(void *to, const void *from, size_t bytes) {
    gpu_must(bkv_gpu_copy(to, from, bytes, NULL), "copy");
    gpu_must(bkv_gpu_wait(NULL), "copy");
}

static double record_read_bytes(const void *record) {
    double bytes = 0;
    for (uint32_t head = 0; head < HEADS; head++) {
        bkv_section_view_t view;
        bkv_record_section(record, 0, head, &view);
        bytes += (double)(view.layout.key_bytes - view.layout.index_bytes + view.layout.value_bytes);
    }
    return bytes;
}

// RECORDS records on the device: a few that were compressed here, laid down again and again.
static void records_fill(bench_t *bench, bkv_codec_params_t params) {
    bkv_shape_t shape = {LAYERS, HEADS, BLOCK, DIM, DIM, BKV_BF16};
    const bkv_backend_t *backend = bkv_backend_get("auto");
    bkv_error_t err = {0};
    size_t bound = (size_t)bkv_codec_bound(&shape, &params), length = 0;
    bench->stride = (bound + 255) / 256 * 256;
    if (bench->stride * RECORDS > bench->room) {
        fprintf(stderr, "bench_gpu_attend: records of %zu bytes need more room\n", bound);
        exit(1);
    }
    uint16_t *payload = gpu_host_memory((size_t)bkv_shape_bytes(&shape));
    uint8_t *record = gpu_host_memory(bound);
    void *workspace = gpu_host_memory(bkv_compress_workspace(backend, &shape, &params));
    bench->read = 0;
    for (uint32_t i = 0; i < DISTINCT; i++) {
        bkv_block_t block;
        bkv_record_id_t id = {.position = (uint64_t)i * BLOCK};
        payload_fill(payload, (size_t)bkv_shape_bytes(&shape) / 2, 1 + i);
        bkv_block_from_payload(&shape, payload, &block);
        gpu_must_be(bkv_compress(backend, &block, &params, &id, record, bound, workspace, &length, &err), &err);
        gpu_must_be(bkv_record_check(record, length, &err), &err);
        bench->read += record_read_bytes(record) / DISTINCT;
        put(bench->records + i * bench->stride, record, length);
    }
    for (uint32_t i = DISTINCT; i < RECORDS; i++) {
        gpu_must(bkv_gpu_copy(bench->records + i * bench->stride, bench->records + i % DISTINCT * bench->stride, length, NULL),
                 "copy");
    }
    const void **addresses = gpu_host_memory(RECORDS * sizeof(void *));
    for (size_t i = 0; i < RECORDS; i++) { // neighbours in a sequence are no neighbours in memory
        addresses[i] = bench->records + i * 1237 % RECORDS * bench->stride;
    }
    put(bench->addresses, addresses, RECORDS * sizeof(void *));
    free(addresses);
    free(workspace);
    free(record);
    free(payload);
}

// Median seconds of one step over `sequences` sequences that share `records` records evenly.
static double step_seconds(bench_t *bench, uint32_t sequences, uint32_t records, uint32_t query_heads) {
    uint32_t *first = gpu_host_memory((sequences + 1) * sizeof(uint32_t));
    for (uint32_t b = 0; b <= sequences; b++) {
        first[b] = (uint32_t)((uint64_t)records * b / sequences);
    }
    put(bench->first, first, (sequences + 1) * sizeof(uint32_t));
    free(first);
    bkv_cuda_attend_args_t args = {.q = bench->q,
                                   .records = bench->addresses,
                                   .first = bench->first,
                                   .out = bench->out,
                                   .lse = bench->lse,
                                   .q_dtype = BKV_BF16,
                                   .out_dtype = BKV_BF16,
                                   .dtype = BKV_BF16,
                                   .batch = sequences,
                                   .max_records = records,
                                   .heads = HEADS,
                                   .query_heads = query_heads,
                                   .queries = 1,
                                   .key_dim = DIM,
                                   .value_dim = DIM};
    if (bkv_cuda_attend_workspace(bench->cuda, &args) > bench->workspace_room) {
        fprintf(stderr, "bench_gpu_attend: %u sequences need more workspace\n", sequences);
        exit(1);
    }
    double seconds[TURNS];
    bkv_error_t err = {0};
    for (int turn = -1; turn < TURNS; turn++) {
        double start = gpu_now();
        for (uint32_t step = 0; step < STEPS; step++) {
            args.layer = step % LAYERS;
            gpu_must_be(bkv_cuda_attend(bench->cuda, &args, bench->workspace, NULL, &err), &err);
        }
        gpu_must(bkv_gpu_wait(NULL), "attention");
        if (turn >= 0) {
            seconds[turn] = (gpu_now() - start) / STEPS;
        }
    }
    return bkv_quantile(seconds, TURNS, 0.5);
}

// Bytes a second that a copy on the device reads and writes.
static double copy_rate(const bench_t *bench) {
    size_t bytes = bench->room / 2;
    double seconds[TURNS];
    for (int turn = -1; turn < TURNS; turn++) {
        double start = gpu_now();
        for (int i = 0; i < 3; i++) {
            gpu_must(bkv_gpu_copy(bench->records, bench->records + bytes, bytes, NULL), "copy");
        }
        gpu_must(bkv_gpu_wait(NULL), "copy");
        if (turn >= 0) {
            seconds[turn] = (gpu_now() - start) / 3;
        }
    }
    return 2 * (double)bytes / bkv_quantile(seconds, TURNS, 0.5);
}

// Seconds of PyTorch's flash attention over the whole cache; 0 where there is none.
static double torch_seconds(void) {
    char command[128];
    snprintf(command, sizeof(command), "python3 tests/bench/bench_gpu_sdpa.py %d %d %d %d %d", SEQUENCES, CONTEXT, QUERY_HEADS,
             HEADS, DIM);
    double seconds = gpu_script_seconds(command);
    if (seconds <= 0) {
        printf("SKIPPED the comparison with PyTorch's attention: it needs python3 with PyTorch and a GPU\n");
    }
    return seconds;
}

static void bench_codecs(bench_t *bench, double copy, double torch) {
    static const struct {
        const char *name;
        bkv_codec_params_t params;
        bool judged;
    } runs[] = {
        {"balance 16x", {.codec = BKV_CODEC_BALANCE, .rate = 16, .sink = BKV_DEFAULT_SINK, .seed = 1}, true},
        {"balance 8x", {.codec = BKV_CODEC_BALANCE, .rate = 8, .sink = BKV_DEFAULT_SINK, .seed = 1}, false},
        {"balance 32x", {.codec = BKV_CODEC_BALANCE, .rate = 32, .sink = BKV_DEFAULT_SINK, .seed = 1}, false},
        {"dense4", {.codec = BKV_CODEC_DENSE4}, false},
        {"dense8", {.codec = BKV_CODEC_DENSE8}, false},
        {"raw", {.codec = BKV_CODEC_RAW}, false},
    };
    for (size_t i = 0; i < sizeof(runs) / sizeof(runs[0]); i++) {
        records_fill(bench, runs[i].params);
        double seconds = step_seconds(bench, SEQUENCES, RECORDS, QUERY_HEADS);
        char name[64];
        snprintf(name, sizeof(name), "%s: bytes read", runs[i].name);
        bkv_report_add(&bench->report, name, 1e-9 * bench->read * RECORDS / seconds, "GB/s", "copy on the device", 1e-9 * copy,
                       runs[i].judged ? BKV_BAR_AT_LEAST : BKV_BAR_NONE, 0.6);
        if (torch > 0) {
            snprintf(name, sizeof(name), "%s: steps", runs[i].name);
            bkv_report_add(&bench->report, name, 1 / seconds, "/s", "PyTorch, whole cache", 1 / torch,
                           runs[i].judged ? BKV_BAR_AT_LEAST : BKV_BAR_NONE, 8);
        }
    }
}

// A token's cost must not depend on how long its sequence is. As many tokens in all each time.
static void bench_lengths(bench_t *bench) {
    records_fill(bench, (bkv_codec_params_t){.codec = BKV_CODEC_BALANCE, .rate = 16, .sink = BKV_DEFAULT_SINK, .seed = 1});
    enum { LENGTHS = 5 };
    double cost[LENGTHS], least = INFINITY;
    for (uint32_t i = 0; i < LENGTHS; i++) {
        cost[i] = step_seconds(bench, RECORDS * BLOCK / (4096u << 2 * i), RECORDS, QUERY_HEADS) / RECORDS / BLOCK;
        least = cost[i] < least ? cost[i] : least;
    }
    for (uint32_t i = 0; i < LENGTHS; i++) {
        char name[64];
        snprintf(name, sizeof(name), "16x, %u x %u tokens: a token", RECORDS * BLOCK / (4096u << 2 * i), 4096u << 2 * i);
        bkv_report_add(&bench->report, name, 1e12 * cost[i], "ps", "the cheapest length", 1e12 * least, BKV_BAR_AT_MOST, 1.1);
    }
    for (uint32_t queries = 1; queries <= 16; queries *= 2) {
        char name[64];
        snprintf(name, sizeof(name), "16x, %u queries a KV head", queries);
        bkv_report_add(&bench->report, name, 1e6 * step_seconds(bench, SEQUENCES, RECORDS, queries * HEADS), "us", NULL, 0,
                       BKV_BAR_NONE, 0);
    }
    bkv_report_add(&bench->report, "16x, one sequence", 1e6 * step_seconds(bench, 1, CONTEXT / BLOCK, QUERY_HEADS), "us", NULL,
                   0, BKV_BAR_NONE, 0);
}

int main(int argc, char **argv) {
    const gpu_options_t options = gpu_options(argc, argv);
    static bench_t bench;
    bkv_error_t err = {0};
    if (bkv_cuda_open(0, &bench.cuda, &err) != BKV_OK) {
        printf("SKIPPED the GPU bench of attention: %s\n", err.message);
        return 0;
    }
    double torch = options.quick ? 0 : torch_seconds(); // first: it wants most of the memory
    size_t rows = (size_t)RECORDS * 16 * HEADS;
    bench.room = (size_t)RECORDS * ((size_t)LAYERS * HEADS * BLOCK * DIM * 4 + 4096);
    bench.records = gpu_memory(bench.room);
    bench.addresses = gpu_memory(RECORDS * sizeof(void *));
    bench.first = gpu_memory((RECORDS + 1) * sizeof(uint32_t));
    bench.q = gpu_memory(rows * DIM * 2);
    bench.out = gpu_memory(rows * DIM * 2);
    bench.lse = gpu_memory(rows * sizeof(float));
    bench.workspace_room = (size_t)256 << 20;
    bench.workspace = gpu_memory(bench.workspace_room);
    uint16_t *q = gpu_host_memory(rows / 64 * DIM * 2);
    payload_fill(q, rows / 64 * DIM, 99);
    for (size_t i = 0; i < 64; i++) {
        put((uint8_t *)bench.q + i * (rows / 64) * DIM * 2, q, rows / 64 * DIM * 2);
    }
    bench_codecs(&bench, copy_rate(&bench), torch);
    bench_lengths(&bench);
    bkv_cuda_close(bench.cuda);
    return gpu_report(&options, &bench.report);
}
