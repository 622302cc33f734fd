// bench_kernels.c - `make bench-kernels`: how fast the CPU backends are, each against something measured in the same run.
// bench_kernels_compress.c has the rows of compression, bench_kernels_attend.c those of attention.
#include "tests/bench/bench_kernels.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

double bench_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

void *bench_alloc(size_t bytes) {
    size_t rounded = (bytes + 63) / 64 * 64 + 64;
    void *memory = aligned_alloc(64, rounded);
    if (!memory) {
        fprintf(stderr, "bench_kernels: no %zu bytes of memory\n", rounded);
        exit(1);
    }
    memset(memory, 0, rounded);
    return memory;
}

void bench_block(const bkv_shape_t *shape, uint64_t seed, bkv_block_t *block) {
    size_t n = (size_t)bkv_shape_bytes(shape) / 2;
    uint16_t *values = bench_alloc(2 * n);
    uint64_t state = seed;
    for (size_t i = 0; i < n; i++) {
        float sum = 0;
        for (uint32_t j = 0; j < 4; j++) { // of four uniforms: near enough to normal
            state = state * 6364136223846793005u + 1442695040888963407u;
            sum += (float)(state >> 40) * 0x1p-24f - 0.5f;
        }
        values[i] = bkv_float_to_bf16(sum * (i % 16 == 3 ? 6.0f : 2.0f));
    }
    bkv_block_from_payload(shape, values, block);
}

void bench_check(bkv_status_t status, const bkv_error_t *err) {
    if (status != BKV_OK) {
        fprintf(stderr, "bench_kernels: %s\n", err->message);
        exit(1);
    }
}

int main(int argc, char **argv) {
    const char *out = NULL;
    for (int i = 1; i + 1 < argc; i += 2) {
        if (strcmp(argv[i], "--out") == 0) {
            out = argv[i + 1];
        }
    }
    static bkv_report_t report;
    bench_compress(&report);
    bench_attend(&report);
    bkv_report_print(&report);
    if (out && !bkv_report_write(&report, out)) {
        return 1;
    }
    return bkv_report_met(&report) ? 0 : 2;
}
