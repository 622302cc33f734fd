// gpu.h - internal: what only nvcc can make, as plain C. *_cuda.cu implement it; where there is no nvcc, absent_cuda.c does,
// by saying so. Everything above it (compress_cuda.c, backend_cuda.c) is C and is built, checked and tested everywhere.
//
// Functions return 0 or a cudaError_t as int; bkv_gpu_error puts it in words. Streams are cudaStream_t.
#ifndef BKV_GPU_H
#define BKV_GPU_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct bkv_gpu_traits {
    uint32_t processors;    // streaming multiprocessors
    uint32_t shared_memory; // bytes that one thread block may have
    uint32_t capability;    // 10 * major + minor
} bkv_gpu_traits_t;

// Devices that a driver offers; 0 also where there is no driver.
uint32_t bkv_gpu_count(void);
// Reads a device's traits and lets our kernels have its shared memory. Leaves the calling thread's device as it was.
int bkv_gpu_open(int device, bkv_gpu_traits_t *traits);
const char *bkv_gpu_error(int error);

// Makes `device` the calling thread's; *before gets the one that was, for the call that puts it back.
int bkv_gpu_enter(int device, int *before);
void bkv_gpu_leave(int before);

// Stream-ordered device memory, copies in any direction, and waiting. The stream of the calling thread is bkv_gpu_own_stream.
void *bkv_gpu_own_stream(void);
int bkv_gpu_alloc(void **memory, size_t bytes, void *stream);
int bkv_gpu_free(void *memory, void *stream);
int bkv_gpu_copy(void *to, const void *from, size_t bytes, void *stream);
int bkv_gpu_wait(void *stream);

#ifdef __cplusplus
}
#endif
#endif
