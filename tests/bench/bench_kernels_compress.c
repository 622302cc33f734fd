// bench_kernels_compress.c - compression, folding and the Gram matrix on one core, by backend.
#include "tests/bench/bench_kernels.h"

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/lanes.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define ROUNDS 15

// Some layers of a block of 256 tokens, 8 heads of 128 each: more than the nearer caches hold, as blocks are.
static const bkv_shape_t layers = {.layers = 4, .heads = 8, .tokens = 256, .key_dim = 128, .value_dim = 128, .dtype = BKV_BF16};

static const char *const names[] = {"ref", "avx2", "avx512", "amx"};
enum { NAMES = sizeof(names) / sizeof(names[0]) };

static const bkv_backend_t *backend_of(size_t n) {
    return bkv_backend_get(names[n]);
}

// What one backend needs to compress a block again and again.
typedef struct job {
    const bkv_backend_t *backend;
    const bkv_block_t *block;
    bkv_codec_params_t params;
    void *record, *workspace;
    size_t capacity, length;
} job_t;

static job_t job_make(const bkv_backend_t *backend, const bkv_block_t *block, bkv_codec_t codec) {
    job_t job = {.backend = backend, .block = block, .params = {.codec = codec, .rate = 16, .seed = 1}};
    job.capacity = (size_t)bkv_codec_bound(&block->shape, &job.params);
    job.record = bench_alloc(job.capacity);
    job.workspace = bench_alloc(bkv_compress_workspace(backend, &block->shape, &job.params));
    return job;
}

// Seconds of one compression.
static double job_run(job_t *job) {
    bkv_record_id_t id = {.position = 4096};
    bkv_error_t err = {0};
    double start = bench_now();
    bkv_status_t status = bkv_compress(job->backend, job->block, &job->params, &id, job->record, job->capacity, job->workspace,
                                       &job->length, &err);
    double seconds = bench_now() - start;
    bench_check(status, &err);
    return seconds;
}

static void job_free(job_t *job) {
    free(job->record);
    free(job->workspace);
}

// Median seconds of every backend on the same block, measured in turns so that all meet the same machine; 0: not here.
static void compress_all(const bkv_block_t *block, bkv_codec_t codec, double seconds[NAMES]) {
    static double samples[NAMES][ROUNDS];
    job_t jobs[NAMES] = {{0}};
    for (size_t n = 0; n < NAMES; n++) {
        if (backend_of(n)) {
            jobs[n] = job_make(backend_of(n), block, codec);
        }
    }
    for (int round = -1; round < ROUNDS; round++) { // the first warms up
        for (size_t n = 0; n < NAMES; n++) {
            if (jobs[n].backend) {
                job_run(&jobs[n]); // what the others pushed out of the caches comes back: a daemon compresses block after block
                samples[n][round < 0 ? 0 : round] = job_run(&jobs[n]);
            }
        }
    }
    for (size_t n = 0; n < NAMES; n++) {
        seconds[n] = jobs[n].backend ? bkv_quantile(samples[n], ROUNDS, 0.5) : 0;
        job_free(&jobs[n]);
    }
}

// Rows "<what> <backend>" in GB/s of bfloat16, against ref; the bar is for the best backend.
static void add_speeds(bkv_report_t *report, const char *what, double bytes, const double seconds[NAMES], double bar) {
    size_t best = 0;
    for (size_t n = 0; n < NAMES; n++) {
        best = seconds[n] > 0 ? n : best;
    }
    for (size_t n = 0; n < NAMES; n++) {
        if (seconds[n] == 0) {
            printf("SKIPPED: %s %s: this machine has no such instructions\n", what, names[n]);
            continue;
        }
        char name[64];
        snprintf(name, sizeof(name), "%s %s", what, names[n]);
        bkv_report_add(report, name, bytes / seconds[n] * 1e-9, "GB/s", "ref", n == 0 ? 0 : bytes / seconds[0] * 1e-9,
                       n == best && bar > 0 ? BKV_BAR_AT_LEAST : BKV_BAR_NONE, bar);
    }
}

static void bench_codecs(bkv_report_t *report, const bkv_block_t *block) {
    double seconds[NAMES], bytes = (double)bkv_shape_bytes(&block->shape);
    compress_all(block, BKV_CODEC_BALANCE, seconds);
    add_speeds(report, "balance 16x", bytes, seconds, 10);
    for (size_t n = 0; n < NAMES; n++) {
        if (seconds[n] > 0) {
            char name[64];
            snprintf(name, sizeof(name), "head of 256 tokens %s", names[n]);
            bkv_report_add(report, name, seconds[n] / (block->shape.layers * block->shape.heads) * 1e6, "us", NULL, 0,
                           BKV_BAR_NONE, 0);
        }
    }
    compress_all(block, BKV_CODEC_DENSE4, seconds);
    add_speeds(report, "dense4", bytes, seconds, 0);
    compress_all(block, BKV_CODEC_DENSE8, seconds);
    add_speeds(report, "dense8", bytes, seconds, 0);
    compress_all(block, BKV_CODEC_RAW, seconds);
    bkv_report_add(report, "raw", bytes / seconds[0] * 1e-9, "GB/s", NULL, 0, BKV_BAR_NONE, 0);
}

// -- folds

enum { CHILDREN = 16 };

static double fold_seconds(const bkv_backend_t *backend, const void *const *records, uint64_t budget) {
    bkv_record_id_t id = {0};
    bkv_error_t err = {0};
    size_t length;
    void *record = bench_alloc((size_t)budget),
         *workspace = bench_alloc(bkv_fold_workspace(backend, records, CHILDREN, budget));
    double samples[5];
    for (int round = -1; round < 5; round++) {
        double start = bench_now();
        bkv_status_t status = bkv_fold(backend, records, CHILDREN, &id, &(bkv_fold_params_t){.budget = budget, .seed = 1},
                                       record, workspace, &length, &err);
        samples[round < 0 ? 0 : round] = bench_now() - start;
        bench_check(status, &err);
    }
    free(record);
    free(workspace);
    return bkv_quantile(samples, 5, 0.5);
}

// 16 blocks of int4 become one summary of an 16th of their bfloat16 bytes.
static void bench_folds(bkv_report_t *report) {
    bkv_shape_t shape = layers;
    shape.layers = 1;
    shape.heads = 2;
    void *records[CHILDREN];
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < CHILDREN; i++) {
        bkv_block_t block;
        bench_block(&shape, i + 1, &block);
        job_t job = job_make(backend_of(0), &block, BKV_CODEC_DENSE4);
        bkv_record_id_t id = {.position = (uint64_t)i * shape.tokens};
        bkv_error_t err = {0};
        bench_check(
            bkv_compress(job.backend, &block, &job.params, &id, job.record, job.capacity, job.workspace, &job.length, &err),
            &err);
        records[i] = job.record;
        bytes += bkv_shape_bytes(&shape);
        free(job.workspace);
        free((void *)(uintptr_t)block.keys);
    }
    double seconds[NAMES] = {0};
    for (size_t n = 0; n < NAMES; n++) {
        seconds[n] = backend_of(n) ? fold_seconds(backend_of(n), (const void *const *)records, bytes / 16 / 16 * 16) : 0;
    }
    add_speeds(report, "fold to 16x", (double)bytes, seconds, 0);
    for (uint32_t i = 0; i < CHILDREN; i++) {
        free(records[i]);
    }
}

// -- the Gram matrix against what the core can multiply at all

#if defined(__x86_64__)
// FLOPs a second of independent multiplications and additions in registers: 12 chains, more than latency times ports.
__attribute__((target("avx512f"))) static double peak_avx512(void) {
    const long rounds = 4000000;
    __m512 a = _mm512_set1_ps(1e-9f), b = _mm512_set1_ps(0.5f), s[12];
    for (int i = 0; i < 12; i++) {
        s[i] = _mm512_set1_ps((float)i);
    }
    double start = bench_now();
    for (long r = 0; r < rounds; r++) {
        _Pragma("GCC unroll 12") for (int i = 0; i < 12; i++) {
            s[i] = _mm512_fmadd_ps(a, b, s[i]);
        }
        __asm__ volatile("" : "+v"(a)); // so that no round is taken to be like the last
    }
    double seconds = bench_now() - start;
    for (int i = 1; i < 12; i++) {
        s[0] = _mm512_add_ps(s[0], s[i]);
    }
    __asm__ volatile("" ::"v"(s[0]));
    return (double)rounds * 12 * 32 / seconds;
}

__attribute__((target("avx2,fma"))) static double peak_avx2(void) {
    const long rounds = 4000000;
    __m256 a = _mm256_set1_ps(1e-9f), b = _mm256_set1_ps(0.5f), s[12];
    for (int i = 0; i < 12; i++) {
        s[i] = _mm256_set1_ps((float)i);
    }
    double start = bench_now();
    for (long r = 0; r < rounds; r++) {
        _Pragma("GCC unroll 12") for (int i = 0; i < 12; i++) {
            s[i] = _mm256_fmadd_ps(a, b, s[i]);
        }
        __asm__ volatile("" : "+x"(a));
    }
    double seconds = bench_now() - start;
    for (int i = 1; i < 12; i++) {
        s[0] = _mm256_add_ps(s[0], s[i]);
    }
    __asm__ volatile("" ::"x"(s[0]));
    return (double)rounds * 12 * 16 / seconds;
}

// FLOPs a second of a Gram matrix of 256 rows of 128: one multiplication and addition an element of the half that is needed,
// though some of the other half and the transposition of the rows take their time too.
static double gram_rate(const bkv_lanes_t *lanes) {
    enum { ROWS = 256, DIM = 128, TIMES = 20 };
    float *rows = bench_alloc(sizeof(float) * ROWS * DIM), *gram = bench_alloc(sizeof(float) * ROWS * ROWS);
    void *scratch = bench_alloc(lanes->products_scratch(ROWS, ROWS, DIM));
    for (uint32_t i = 0; i < ROWS * DIM; i++) {
        rows[i] = (float)(i * 2654435761u >> 20) * 0x1p-12f - 0.5f;
    }
    const bkv_rows_t matrix = {.rows = rows, .n = ROWS, .dim = DIM};
    double samples[ROUNDS];
    for (int round = -1; round < ROUNDS; round++) {
        double start = bench_now();
        for (int i = 0; i < TIMES; i++) {
            lanes->products(&matrix, NULL, gram, ROWS, scratch);
        }
        samples[round < 0 ? 0 : round] = (bench_now() - start) / TIMES;
    }
    free(rows);
    free(gram);
    free(scratch);
    return ROWS * (ROWS + 1.0) * DIM / bkv_quantile(samples, ROUNDS, 0.5);
}

// Rate and peak in turns, so that both meet the same clock and the same neighbours.
static void add_gram(bkv_report_t *report, const char *name, const bkv_lanes_t *lanes, double (*peak)(void), double bar) {
    double rates[5], peaks[5];
    for (int i = 0; i < 5; i++) {
        peaks[i] = peak() * 1e-9;
        rates[i] = gram_rate(lanes) * 1e-9;
    }
    bkv_report_add(report, name, bkv_quantile(rates, 5, 0.5), "GFLOPS", "FMA peak of the core, float",
                   bkv_quantile(peaks, 5, 0.5), bar > 0 ? BKV_BAR_AT_LEAST : BKV_BAR_NONE, bar);
}

static void bench_gram(bkv_report_t *report) {
    if (!bkv_cpu_avx2()) {
        printf("SKIPPED: Gram matrix: this machine has no AVX2\n");
        return;
    }
    bool wide = bkv_cpu_avx512();
    double (*peak)(void) = wide ? peak_avx512 : peak_avx2;
    add_gram(report, "gram ref", &bkv_lanes_ref, peak, 0);
    add_gram(report, "gram avx2", &bkv_lanes_avx2, peak, wide ? 0 : 0.4);
    if (wide) {
        add_gram(report, "gram avx512", &bkv_lanes_avx512, peak, 0.4);
    }
    if (bkv_cpu_amx()) {
        add_gram(report, "gram amx (bfloat16)", &bkv_lanes_amx, peak, 0.4);
    }
}
#else
static void bench_gram(bkv_report_t *report) {
    (void)report;
    printf("SKIPPED: Gram matrix: no vector backend on this architecture\n");
}
#endif

// -- cost a token from 4,096 tokens to a million, in blocks of 256

enum { LONGEST = 1048576 };

// Seconds a token of contexts of that length, one after the other through memory that holds the longest.
static double token_cost(const bkv_backend_t *backend, const uint8_t *payload, uint32_t tokens, uint32_t contexts) {
    bkv_shape_t shape = layers;
    shape.layers = shape.heads = 1;
    size_t block_bytes = (size_t)bkv_shape_bytes(&shape);
    uint32_t blocks = tokens / shape.tokens;
    bkv_block_t block;
    bkv_block_from_payload(&shape, payload, &block);
    job_t job = job_make(backend, &block, BKV_CODEC_BALANCE);
    double seconds = 0;
    for (uint32_t c = 0; c < contexts; c++) {
        const uint8_t *context = payload + (size_t)(c * 13 % (LONGEST / tokens)) * blocks * block_bytes;
        for (uint32_t i = 0; i < blocks; i++) {
            bkv_block_from_payload(&shape, context + i * block_bytes, &block);
            seconds += job_run(&job);
        }
    }
    job_free(&job);
    return seconds / ((double)contexts * tokens);
}

static void bench_length(bkv_report_t *report) {
    const uint32_t lengths[] = {4096, 65536, LONGEST}, contexts[] = {32, 4, 1};
    bkv_shape_t shape = layers;
    shape.layers = shape.heads = 1;
    size_t block_bytes = (size_t)bkv_shape_bytes(&shape), blocks = LONGEST / shape.tokens;
    uint8_t *payload = bench_alloc(blocks * block_bytes);
    bkv_block_t sample;
    shape.tokens = 4096;
    bench_block(&shape, 7, &sample);
    for (size_t i = 0; i < blocks; i++) { // memory of its own for every block; what is in it repeats
        memcpy(payload + i * block_bytes, (const uint8_t *)sample.keys + i % 16 * block_bytes, block_bytes);
    }
    free((void *)(uintptr_t)sample.keys);
    double costs[3][5];
    for (int round = 0; round < 5; round++) {
        for (int i = 0; i < 3; i++) {
            costs[i][round] = token_cost(bkv_backend_get("auto"), payload, lengths[i], contexts[i]);
        }
    }
    double base = bkv_quantile(costs[0], 5, 0.5) * 1e9;
    bkv_report_add(report, "a token of 4,096", base, "ns", NULL, 0, BKV_BAR_NONE, 0);
    bkv_report_add(report, "a token of 65,536", bkv_quantile(costs[1], 5, 0.5) * 1e9, "ns", "of 4,096", base, BKV_BAR_AT_MOST,
                   1.1);
    bkv_report_add(report, "a token of 1,048,576", bkv_quantile(costs[2], 5, 0.5) * 1e9, "ns", "of 4,096", base,
                   BKV_BAR_AT_MOST, 1.1);
    free(payload);
}

void bench_compress(bkv_report_t *report) {
    bkv_block_t block;
    bench_block(&layers, 1, &block);
    bench_codecs(report, &block);
    free((void *)(uintptr_t)block.keys);
    bench_folds(report);
    bench_gram(report);
    bench_length(report);
}
