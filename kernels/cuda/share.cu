// share.cu - the CUDA runtime as share.h shows it: devices, streams, events, and allocations shared by handle. Chunks, which
// are shared by descriptor, are share_chunks.cu's.
#include "share.h"

#include <cuda_runtime.h>
#include <string.h>

static_assert(sizeof(cudaIpcMemHandle_t) == BKV_GPU_HANDLE_BYTES && sizeof(cudaIpcEventHandle_t) == BKV_GPU_HANDLE_BYTES,
              "handles of allocations and events have 64 bytes");

// The runtime keeps a thread's last error for cudaGetLastError, by which launches report theirs: whoever is told of one here
// must not find it there again.
static int told(cudaError_t error) {
    if (error != cudaSuccess) {
        (void)cudaGetLastError();
    }
    return (int)error;
}

// ---- devices ----

extern "C" int bkv_gpu_uuid(int device, uint8_t uuid[BKV_GPU_UUID_BYTES]) {
    cudaDeviceProp properties;
    cudaError_t error = cudaGetDeviceProperties(&properties, device);
    if (error == cudaSuccess) {
        memcpy(uuid, properties.uuid.bytes, BKV_GPU_UUID_BYTES);
    }
    return told(error);
}

extern "C" bool bkv_gpu_broken(void) {
    return told(cudaFree(NULL)) != 0; // frees nothing, and fails only where everything does
}

extern "C" int bkv_gpu_unused(size_t *bytes) {
    size_t all;
    return told(cudaMemGetInfo(bytes, &all));
}

extern "C" int bkv_gpu_reset(int device) {
    int before, error = bkv_gpu_enter(device, &before);
    if (error != 0) {
        return error;
    }
    (void)told(cudaDeviceReset()); // may report the very fault that it ends
    error = told(cudaSetDevice(device));
    void *probe = NULL;
    error = error != 0 ? error : told(cudaMalloc(&probe, 256));
    error = error != 0 ? error : told(cudaMemset(probe, 0, 256));
    error = error != 0 ? error : told(cudaDeviceSynchronize());
    (void)told(cudaFree(probe));
    bkv_gpu_leave(before);
    return error;
}

// ---- memory of one's own ----

extern "C" int bkv_gpu_take(void **memory, size_t bytes) {
    return told(cudaMalloc(memory, bytes));
}

extern "C" void bkv_gpu_give(void *memory) {
    (void)told(cudaFree(memory));
}

extern "C" int bkv_gpu_host_take(void **memory, size_t bytes) {
    return told(cudaHostAlloc(memory, bytes, cudaHostAllocPortable));
}

extern "C" void bkv_gpu_host_give(void *memory) {
    if (memory) {
        (void)told(cudaFreeHost(memory));
    }
}

extern "C" int bkv_gpu_pin(void *memory, size_t bytes) {
    return told(cudaHostRegister(memory, bytes, cudaHostRegisterPortable));
}

extern "C" void bkv_gpu_unpin(void *memory) {
    (void)told(cudaHostUnregister(memory));
}

// ---- streams and events ----

extern "C" int bkv_gpu_stream_create(void **stream) {
    return told(cudaStreamCreateWithFlags((cudaStream_t *)stream, cudaStreamNonBlocking));
}

extern "C" void bkv_gpu_stream_destroy(void *stream) {
    if (stream) {
        (void)told(cudaStreamDestroy((cudaStream_t)stream));
    }
}

extern "C" int bkv_gpu_event_create(bool shared, void **event) {
    unsigned flags = cudaEventDisableTiming | (shared ? cudaEventInterprocess : cudaEventBlockingSync);
    return told(cudaEventCreateWithFlags((cudaEvent_t *)event, flags));
}

extern "C" void bkv_gpu_event_destroy(void *event) {
    if (event) {
        (void)told(cudaEventDestroy((cudaEvent_t)event));
    }
}

extern "C" int bkv_gpu_event_record(void *event, void *stream) {
    return told(cudaEventRecord((cudaEvent_t)event, (cudaStream_t)stream));
}

extern "C" int bkv_gpu_event_query(void *event) {
    int error = told(cudaEventQuery((cudaEvent_t)event));
    return error == (int)cudaErrorNotReady ? BKV_GPU_NOT_YET : error;
}

extern "C" int bkv_gpu_event_wait(void *event) {
    return told(cudaEventSynchronize((cudaEvent_t)event));
}

extern "C" int bkv_gpu_event_export(void *event, uint8_t handle[BKV_GPU_HANDLE_BYTES]) {
    return told(cudaIpcGetEventHandle((cudaIpcEventHandle_t *)handle, (cudaEvent_t)event));
}

extern "C" int bkv_gpu_event_import(const uint8_t handle[BKV_GPU_HANDLE_BYTES], void **event) {
    cudaIpcEventHandle_t copy;
    memcpy(&copy, handle, sizeof(copy));
    return told(cudaIpcOpenEventHandle((cudaEvent_t *)event, copy));
}

// ---- allocations ----

extern "C" int bkv_gpu_export(void *base, uint8_t handle[BKV_GPU_HANDLE_BYTES]) {
    cudaIpcMemHandle_t copy;
    int error = told(cudaIpcGetMemHandle(&copy, base));
    memcpy(handle, &copy, sizeof(copy));
    return error;
}

extern "C" int bkv_gpu_import(const uint8_t handle[BKV_GPU_HANDLE_BYTES], void **base, size_t *bytes) {
    cudaIpcMemHandle_t copy;
    memcpy(&copy, handle, sizeof(copy));
    int error = told(cudaIpcOpenMemHandle(base, copy, cudaIpcMemLazyEnablePeerAccess));
    if (error != 0) {
        return error;
    }
    error = bkv_gpu_bytes_from(*base, bytes);
    if (error != 0) {
        (void)bkv_gpu_import_close(*base);
    }
    return error;
}

extern "C" int bkv_gpu_import_close(void *base) {
    return told(cudaIpcCloseMemHandle(base));
}
