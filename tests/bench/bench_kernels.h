// bench_kernels.h - internal: what the parts of `make bench-kernels` share.
#ifndef BKV_BENCH_KERNELS_H
#define BKV_BENCH_KERNELS_H

#include "kernels/codec.h"
#include "tests/bench/report.h"

// Seconds that this thread has computed: what else runs on the machine meanwhile does not count.
double bench_now(void);

// 64-byte aligned memory, touched; ends the program where there is none.
void *bench_alloc(size_t bytes);

// A block of bfloat16 numbers as keys and values are: near normal, some channels larger than others. Deterministic.
void bench_block(const bkv_shape_t *shape, uint64_t seed, bkv_block_t *block);

// Ends the program when status is not BKV_OK.
void bench_check(bkv_status_t status, const bkv_error_t *err);

// The parts. Each measures on one core and adds its rows.
void bench_compress(bkv_report_t *report);
void bench_attend(bkv_report_t *report);

#endif
