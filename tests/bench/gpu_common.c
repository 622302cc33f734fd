// gpu_common.c - see gpu_common.h.
#include "gpu_common.h"

#include "kernels/cuda/gpu.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

gpu_options_t gpu_options(int argc, char **argv) {
    gpu_options_t options = {0};
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--quick") == 0) {
            options.quick = true;
        } else if (strcmp(argv[i], "--out") == 0 && i + 1 < argc) {
            options.out = argv[++i];
        } else if (strcmp(argv[i], "--daemon") == 0 && i + 1 < argc) {
            options.daemon = argv[++i];
        }
    }
    return options;
}

int gpu_report(const gpu_options_t *options, const bkv_report_t *report) {
    bkv_report_print(report);
    bool written = !options->out || bkv_report_write(report, options->out);
    return written && bkv_report_met(report) ? 0 : 1;
}

double gpu_now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

void gpu_must(int error, const char *what) {
    if (error != 0) {
        fprintf(stderr, "%s: %s\n", what, bkv_gpu_error(error));
        exit(1);
    }
}

void gpu_must_be(bkv_status_t status, const bkv_error_t *err) {
    if (status != BKV_OK) {
        fprintf(stderr, "%s\n", err->message);
        exit(1);
    }
}

void *gpu_host_memory(size_t bytes) {
    void *memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!memory) {
        fprintf(stderr, "no %zu bytes of memory\n", bytes);
        exit(1);
    }
    return memory;
}

void *gpu_memory(size_t bytes) {
    void *memory;
    gpu_must(bkv_gpu_alloc(&memory, bytes, NULL), "device memory");
    return memory;
}

double gpu_script_seconds(const char *command) {
    FILE *script = popen(command, "r");
    char line[256];
    double seconds = 0;
    while (script && fgets(line, sizeof(line), script)) {
        printf("%s", line);
        (void)sscanf(line, "seconds %lf", &seconds);
    }
    return script && pclose(script) == 0 && seconds > 0 ? seconds : 0;
}
