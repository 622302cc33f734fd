// absent_share.c - share.h where there was no nvcc at build time: nothing is to be had, and every function says so.
#include "share.h"

#define NO_NVCC 1

// X(name, parameters): functions that only fail.
#define FAILING(X)                                                                                                             \
    X(bkv_gpu_uuid, (int device, uint8_t uuid[BKV_GPU_UUID_BYTES]), (void)device, (void)uuid)                                  \
    X(bkv_gpu_unused, (size_t * bytes), (void)bytes, (void)0)                                                                  \
    X(bkv_gpu_reset, (int device), (void)device, (void)0)                                                                      \
    X(bkv_gpu_take, (void **memory, size_t bytes), (void)memory, (void)bytes)                                                  \
    X(bkv_gpu_host_take, (void **memory, size_t bytes), (void)memory, (void)bytes)                                             \
    X(bkv_gpu_pin, (void *memory, size_t bytes), (void)memory, (void)bytes)                                                    \
    X(bkv_gpu_stream_create, (void **stream), (void)stream, (void)0)                                                           \
    X(bkv_gpu_event_create, (bool shared, void **event), (void)shared, (void)event)                                            \
    X(bkv_gpu_event_record, (void *event, void *stream), (void)event, (void)stream)                                            \
    X(bkv_gpu_event_query, (void *event), (void)event, (void)0)                                                                \
    X(bkv_gpu_event_wait, (void *event), (void)event, (void)0)                                                                 \
    X(bkv_gpu_event_export, (void *event, uint8_t handle[BKV_GPU_HANDLE_BYTES]), (void)event, (void)handle)                    \
    X(bkv_gpu_event_import, (const uint8_t handle[BKV_GPU_HANDLE_BYTES], void **event), (void)handle, (void)event)             \
    X(bkv_gpu_extent, (const void *address, bkv_gpu_extent_t *extent), (void)address, (void)extent)                            \
    X(bkv_gpu_bytes_from, (const void *address, size_t *bytes), (void)address, (void)bytes)                                    \
    X(bkv_gpu_export, (void *base, uint8_t handle[BKV_GPU_HANDLE_BYTES]), (void)base, (void)handle)                            \
    X(bkv_gpu_export_chunk, (void *base, int *fd), (void)base, (void)fd)                                                       \
    X(bkv_gpu_import_close, (void *base), (void)base, (void)0)                                                                 \
    X(bkv_gpu_granularity, (int device, size_t *bytes), (void)device, (void)bytes)                                             \
    X(bkv_gpu_span_reserve, (size_t bytes, void **base), (void)bytes, (void)base)                                              \
    X(bkv_gpu_gather, (const bkv_gpu_gather_t *gather, void *stream), (void)gather, (void)stream)

#define X(name, parameters, first, second)                                                                                     \
    int name parameters {                                                                                                      \
        first;                                                                                                                 \
        second;                                                                                                                \
        return NO_NVCC;                                                                                                        \
    }
FAILING(X)
#undef X

int bkv_gpu_import(const uint8_t handle[BKV_GPU_HANDLE_BYTES], void **base, size_t *bytes) {
    (void)handle;
    *base = NULL;
    *bytes = 0;
    return NO_NVCC;
}

int bkv_gpu_span_map(void *at, size_t bytes, int fd, int device) {
    (void)at;
    (void)bytes;
    (void)fd;
    (void)device;
    return NO_NVCC;
}

int bkv_gpu_span_create(void *at, size_t bytes, int device) {
    (void)at;
    (void)bytes;
    (void)device;
    return NO_NVCC;
}

bool bkv_gpu_broken(void) {
    return true;
}

void bkv_gpu_give(void *memory) {
    (void)memory;
}

void bkv_gpu_host_give(void *memory) {
    (void)memory;
}

void bkv_gpu_unpin(void *memory) {
    (void)memory;
}

void bkv_gpu_stream_destroy(void *stream) {
    (void)stream;
}

void bkv_gpu_event_destroy(void *event) {
    (void)event;
}

void bkv_gpu_span_free(void *base, size_t bytes) {
    (void)base;
    (void)bytes;
}

void bkv_gpu_span_unmap(void *at, size_t bytes) {
    (void)at;
    (void)bytes;
}
