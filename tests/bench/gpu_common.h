// gpu_common.h - what the GPU benches share: their command line, time, memory, and what must not fail.
#ifndef BKV_BENCH_GPU_COMMON_H
#define BKV_BENCH_GPU_COMMON_H

#include "kernels/status.h"
#include "tests/bench/report.h"

// [--out FILE.json] [--daemon BALANCEKVD] [--quick]
typedef struct gpu_options {
    const char *out, *daemon; // NULL: not given
    bool quick;
} gpu_options_t;

gpu_options_t gpu_options(int argc, char **argv);

// Prints the report and writes its file, if one is asked for. The exit status: 0 when that went well and every bar was met.
int gpu_report(const gpu_options_t *options, const bkv_report_t *report);

// Seconds of a clock that only goes forward.
double gpu_now(void);

// End the program with a line on stderr where something went wrong: by bkv_gpu's error, by a status.
void gpu_must(int error, const char *what);
void gpu_must_be(bkv_status_t status, const bkv_error_t *err);

// Memory, aligned to 64 bytes; free it with free. Device memory is freed with the process.
void *gpu_host_memory(size_t bytes);
void *gpu_memory(size_t bytes);

// The number in the last line "seconds NUMBER" that a command prints; what it prints is passed on. 0 where it fails or there is
// no such line.
double gpu_script_seconds(const char *command);

#endif
