// absent.c - gpu.h and attend_gpu.h where there was no nvcc at build time: no devices, and nothing else is then ever called.
#include "attend_gpu.h"
#include "gpu.h"

#define NO_NVCC 1

uint32_t bkv_gpu_count(void) {
    return 0;
}

const char *bkv_gpu_error(int error) {
    (void)error;
    return "this build has no CUDA: there was no nvcc";
}

int bkv_gpu_open(int device, bkv_gpu_traits_t *traits) {
    (void)device;
    *traits = (bkv_gpu_traits_t){0};
    return NO_NVCC;
}

int bkv_gpu_enter(int device, int *before) {
    (void)device;
    *before = 0;
    return NO_NVCC;
}

void bkv_gpu_leave(int before) {
    (void)before;
}

void *bkv_gpu_own_stream(void) {
    return NULL;
}

int bkv_gpu_alloc(void **memory, size_t bytes, void *stream) {
    (void)bytes;
    (void)stream;
    *memory = NULL;
    return NO_NVCC;
}

int bkv_gpu_free(void *memory, void *stream) {
    (void)memory;
    (void)stream;
    return NO_NVCC;
}

int bkv_gpu_copy(void *to, const void *from, size_t bytes, void *stream) {
    (void)to;
    (void)from;
    (void)bytes;
    (void)stream;
    return NO_NVCC;
}

int bkv_gpu_wait(void *stream) {
    (void)stream;
    return NO_NVCC;
}

int bkv_gpu_upload(const bkv_gpu_job_t *job, const uint8_t *bytes, uint32_t first, uint32_t count, void *stream) {
    (void)job;
    (void)bytes;
    (void)first;
    (void)count;
    (void)stream;
    return NO_NVCC;
}

int bkv_gpu_setup(const bkv_gpu_job_t *job, const bkv_gpu_block_t *blocks, uint32_t first, uint32_t count, void *stream) {
    (void)job;
    (void)blocks;
    (void)first;
    (void)count;
    (void)stream;
    return NO_NVCC;
}

#define NO_KERNEL(name)                                                                                                        \
    int name(const bkv_gpu_job_t *job, void *stream) {                                                                         \
        (void)job;                                                                                                             \
        (void)stream;                                                                                                          \
        return NO_NVCC;                                                                                                        \
    }

NO_KERNEL(bkv_gpu_raw)
NO_KERNEL(bkv_gpu_dense)
NO_KERNEL(bkv_gpu_balance)
NO_KERNEL(bkv_gpu_general)

bool bkv_gpu_balance_fits(const bkv_gpu_job_t *job) {
    (void)job;
    return false;
}

uint64_t bkv_gpu_general_scratch(const bkv_gpu_job_t *job) {
    (void)job;
    return 0;
}

bool bkv_gpu_attend_shape(bkv_gpu_attend_t *job, uint32_t shared_memory) {
    (void)shared_memory;
    job->columns = job->thread_block_warps = 1;
    return false;
}

int bkv_gpu_attend(const bkv_gpu_attend_t *job, void *stream) {
    (void)job;
    (void)stream;
    return NO_NVCC;
}
