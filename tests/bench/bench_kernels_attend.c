// bench_kernels_attend.c - attention over summaries against the speed of the memory that holds them, and reading records.
//
// The summaries are many records of rate 16 whose bytes, together, are several times the caches. What they are compared with is
// a loop of loads over the same bytes on as many threads. A thread's rate is bytes by the seconds that it computed; those of
// several threads that run at once are added.
#include "tests/bench/bench_kernels.h"

#include "kernels/record.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define ROUNDS      5
#define MAX_THREADS 64
#define LAYERS      8
#define HEADS       8
#define DIM         128

// How much of the caches' size the records take, and the least and the most of it.
#define CACHES      3
#define LEAST_BYTES (256ull << 20)
#define MOST_BYTES  (1536ull << 20)

static const bkv_shape_t shape = {
    .layers = LAYERS, .heads = HEADS, .tokens = 256, .key_dim = DIM, .value_dim = DIM, .dtype = BKV_BF16};

// Copies of one record, side by side.
typedef struct store {
    uint8_t *bytes;
    size_t length; // of one record, a multiple of 64
    const void **records;
    uint32_t count;
    uint64_t planes; // bytes of one record that attention reads
    uint64_t codes;  // of one record
} store_t;

static size_t store_bytes(void) {
    long cache = 0;
#ifdef _SC_LEVEL3_CACHE_SIZE
    cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
    uint64_t wanted = cache > 0 ? CACHES * (uint64_t)cache : 0;
    return (size_t)(wanted < LEAST_BYTES ? LEAST_BYTES : wanted > MOST_BYTES ? MOST_BYTES : wanted);
}

static void *record_make(uint32_t rate, size_t *length) {
    const bkv_backend_t *backend = bkv_backend_get(NULL);
    bkv_codec_params_t params = {.codec = BKV_CODEC_BALANCE, .rate = rate, .seed = 1};
    bkv_record_id_t id = {.position = 4096};
    bkv_block_t block;
    bench_block(&shape, 7, &block);
    size_t capacity = (size_t)bkv_codec_bound(&shape, &params);
    void *record = bench_alloc(capacity), *workspace = bench_alloc(bkv_compress_workspace(backend, &shape, &params));
    bkv_error_t err = {0};
    bench_check(bkv_compress(backend, &block, &params, &id, record, capacity, workspace, length, &err), &err);
    free(workspace);
    free((void *)(uintptr_t)block.keys);
    return record;
}

static void store_make(uint32_t rate, size_t bytes, store_t *store) {
    size_t length;
    void *record = record_make(rate, &length);
    store->length = (length + 63) / 64 * 64;
    store->count = (uint32_t)(bytes / store->length);
    store->bytes = mmap(NULL, store->count * store->length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (store->bytes == MAP_FAILED) {
        fprintf(stderr, "bench_kernels: no %zu bytes of memory\n", bytes);
        exit(1);
    }
    madvise(store->bytes, store->count * store->length, MADV_HUGEPAGE); // as an arena is; without it both sides are slower
    store->records = bench_alloc(store->count * sizeof(void *));
    for (uint32_t i = 0; i < store->count; i++) {
        memcpy(store->bytes + i * store->length, record, length);
        store->records[i] = store->bytes + i * store->length;
    }
    store->planes = length - bkv_record_preamble(LAYERS, HEADS);
    store->codes = 0;
    for (uint32_t i = 0; i < LAYERS * HEADS; i++) {
        store->codes += 2ull * DIM * bkv_record_directory(record)[i].tokens;
    }
    free(record);
}

static void store_free(store_t *store) {
    munmap(store->bytes, store->count * store->length);
    free(store->records);
}

// One thread's share of the work: `count` records from `first` on.
typedef struct share {
    const store_t *store;
    const bkv_backend_t *backend; // NULL: only load the bytes
    uint32_t first, count;
    bkv_attend_args_t args;
    void *workspace;
    double seconds;
    uint64_t seen; // keeps the loads alive
} share_t;

#if defined(__x86_64__)
__attribute__((target("avx512f"))) static uint64_t load_wide(const uint8_t *bytes, size_t n) {
    __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
    for (size_t i = 0; i + 256 <= n; i += 256) {
        a = _mm512_xor_si512(a, _mm512_load_si512(bytes + i));
        b = _mm512_xor_si512(b, _mm512_load_si512(bytes + i + 64));
        c = _mm512_xor_si512(c, _mm512_load_si512(bytes + i + 128));
        d = _mm512_xor_si512(d, _mm512_load_si512(bytes + i + 192));
    }
    return (uint64_t)_mm512_reduce_add_epi64(_mm512_xor_si512(_mm512_xor_si512(a, b), _mm512_xor_si512(c, d)));
}
#endif

static uint64_t load_all(const uint8_t *bytes, size_t n) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f")) {
        return load_wide(bytes, n);
    }
#endif
    uint64_t lane[8] = {0};
    for (size_t i = 0; i + 64 <= n; i += 64) {
        for (size_t j = 0; j < 8; j++) {
            uint64_t word;
            memcpy(&word, bytes + i + 8 * j, sizeof(word));
            lane[j] ^= word;
        }
    }
    return lane[0] ^ lane[1] ^ lane[2] ^ lane[3] ^ lane[4] ^ lane[5] ^ lane[6] ^ lane[7];
}

static void *share_run(void *arg) {
    share_t *share = arg;
    const store_t *store = share->store;
    double start = bench_now();
    if (share->backend) {
        bkv_error_t err = {0};
        bench_check(
            bkv_attend(share->backend, store->records + share->first, share->count, &share->args, share->workspace, &err),
            &err);
    } else {
        share->seen = load_all(store->bytes + share->first * store->length, share->count * store->length);
    }
    share->seconds = bench_now() - start;
    return NULL;
}

static void args_make(uint32_t gqa, uint32_t queries, bkv_attend_args_t *args) {
    size_t rows = (size_t)LAYERS * HEADS * gqa * queries;
    float *q = bench_alloc(rows * DIM * sizeof(float));
    for (size_t i = 0; i < rows * DIM; i++) {
        q[i] = (float)(i * 2654435761u % 1000) * 0.004f - 2.0f;
    }
    *args = (bkv_attend_args_t){.layers = LAYERS, .query_heads = HEADS * gqa, .queries = queries, .q = q};
    args->out = bench_alloc(rows * DIM * sizeof(float));
    args->lse = bench_alloc(rows * sizeof(float));
}

static void args_free(bkv_attend_args_t *args) {
    free((void *)(uintptr_t)args->q);
    free(args->out);
    free(args->lse);
}

// Bytes a second over the first `records` of the store, `bytes` from each; the best of the rounds.
static double store_run(const store_t *store, const bkv_backend_t *backend, uint32_t threads, uint32_t records, uint64_t bytes,
                        uint32_t gqa, uint32_t queries) {
    static share_t shares[MAX_THREADS];
    for (uint32_t i = 0; i < threads; i++) {
        shares[i] = (share_t){.store = store, .backend = backend, .count = records / threads};
        shares[i].first = i * shares[i].count;
        if (backend) {
            args_make(gqa, queries, &shares[i].args);
            shares[i].workspace = bench_alloc(bkv_attend_workspace(backend, store->records, shares[i].count, &shares[i].args));
        }
    }
    double best = 0;
    for (uint32_t round = 0; round < ROUNDS; round++) {
        pthread_t thread[MAX_THREADS];
        double rate = 0;
        for (uint32_t i = 1; i < threads; i++) {
            if (pthread_create(&thread[i], NULL, share_run, &shares[i]) != 0) {
                fprintf(stderr, "bench_kernels: no thread\n");
                exit(1);
            }
        }
        share_run(&shares[0]);
        for (uint32_t i = 1; i < threads; i++) {
            pthread_join(thread[i], NULL);
        }
        for (uint32_t i = 0; i < threads; i++) {
            rate += (double)bytes * shares[i].count / shares[i].seconds;
        }
        best = rate > best ? rate : best;
    }
    for (uint32_t i = 0; backend && i < threads; i++) {
        args_free(&shares[i].args);
        free(shares[i].workspace);
    }
    return best;
}

static void decode_rows(bkv_report_t *report, const store_t *store, uint32_t threads) {
    char name[64], load[48];
    double read = store_run(store, NULL, threads, store->count, store->length, 0, 0);
    snprintf(load, sizeof(load), "loads, %u thread%s", threads, threads == 1 ? "" : "s");
    bkv_report_add(report, load, read / 1e9, "GB/s", NULL, 0, BKV_BAR_NONE, 0);
    const char *const names[] = {"avx2", "avx512", "amx"};
    for (uint32_t n = 0; n < 3; n++) {
        const bkv_backend_t *backend = bkv_backend_get(names[n]);
        for (uint32_t gqa = 4; backend && gqa <= 8; gqa *= 2) {
            uint32_t records = n == 0 ? store->count / 8 : store->count;
            double rate = store_run(store, backend, threads, records, store->planes, gqa, 1);
            snprintf(name, sizeof(name), "attend rate 16, GQA %u, %s, %u thread%s", gqa, names[n], threads,
                     threads == 1 ? "" : "s");
            // The bar is that of the best backend; what the others reach is shown.
            bkv_report_add(report, name, rate / 1e9, "GB/s", load, read / 1e9,
                           backend == bkv_backend_get(NULL) ? BKV_BAR_AT_LEAST : BKV_BAR_NONE, 0.6);
        }
    }
}

// Codes of one record that a backend takes in a second, times the query rows that it takes them for.
static double work_rate(const store_t *store, const bkv_backend_t *backend, uint32_t records, uint32_t queries) {
    double rate = store_run(store, backend, 1, records, store->planes, 4, queries);
    return rate / (double)store->planes * (double)store->codes * 4 * queries;
}

static void work_rows(bkv_report_t *report, const store_t *store) {
    const bkv_backend_t *best = bkv_backend_get(NULL);
    double ref = work_rate(store, bkv_backend_get("ref"), 16, 1);
    double one = work_rate(store, best, store->count / 4, 1), many = work_rate(store, best, 64, 64);
    bkv_report_add(report, "attend, 1 query", one / 1e9, "G codes x q/s", "ref", ref / 1e9, BKV_BAR_NONE, 0);
    bkv_report_add(report, "attend, 64 queries", many / 1e9, "G codes x q/s", "1 query", one / 1e9, BKV_BAR_AT_LEAST, 1.0);
}

// Floats written by reading every section.
static void read_row(bkv_report_t *report, const store_t *store) {
    float *k = bench_alloc(256 * DIM * sizeof(float)), *v = bench_alloc(256 * DIM * sizeof(float)), logw[256];
    double best = 0;
    for (uint32_t round = 0; round < ROUNDS; round++) {
        double start = bench_now();
        uint64_t floats = 0;
        for (uint32_t i = 0; i < 32 * LAYERS * HEADS; i++) {
            bkv_section_view_t view;
            bkv_record_section(store->records[i / (LAYERS * HEADS)], i / HEADS % LAYERS, i % HEADS, &view);
            bkv_section_read(&view, k, v, logw, NULL);
            floats += 2ull * DIM * view.tokens;
        }
        double rate = (double)floats / (bench_now() - start);
        best = rate > best ? rate : best;
    }
    bkv_report_add(report, "read a section as floats", best / 1e9, "G values/s", NULL, 0, BKV_BAR_NONE, 0);
    free(k);
    free(v);
}

void bench_attend(bkv_report_t *report) {
    store_t store;
    store_make(16, store_bytes(), &store);
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    decode_rows(report, &store, 1);
    if (cpus > 1) {
        decode_rows(report, &store, cpus < MAX_THREADS ? (uint32_t)cpus : MAX_THREADS);
    }
    work_rows(report, &store);
    read_row(report, &store);
    store_free(&store);
}
